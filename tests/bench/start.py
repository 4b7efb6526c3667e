"""How long the demo model takes from process start to ready: `python tests/bench/start.py [--runs 7]`."""
import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import ServerProcess  # noqa: E402


def seconds_to_ready() -> float:
    with ServerProcess("--device", "cpu", wait=False) as server:
        return server.wait_ready()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = sorted(seconds_to_ready() for _ in range(parser.parse_args().runs))
    print(f"process start to ready, demo model: median {statistics.median(runs):.2f} s of {len(runs)} runs, "
          f"{runs[0]:.2f} to {runs[-1]:.2f}")


if __name__ == "__main__":
    main()
