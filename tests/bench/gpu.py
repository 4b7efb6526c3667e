"""Check and measure the CUDA path on a card: `python tests/bench/gpu.py --out DIR [--only STAGE ...]`.

One command, under eight minutes on an H100 or H200, alone on the card. Stages, in this order:

card          what it is; copy, read and matrix rates, of which later numbers are percentages
kernels       every kernel in every form against the array expressions, and the forms against each other, bit for bit
accuracy      logits and answers of random weights and of the demo model against float32 (KL divergence, perplexity)
bits          64 requests alone, together, without graphs, without programmatic launch, chunked, preempted: equal bits
kernel_speed  each op at the sizes of Llama-3.2-1B and 3.1-8B
decode        steps at batch 1 to 256 and contexts of 128 to 8192, by replay and through the engine
prefill       prompts of 512 to 8192 tokens
load          a checkpoint of the 1B shape, from the start of a process until it is ready
served        1, 8 and 64 streams over HTTP against the bare engine
transformers  static cache and torch.compile on the same weights, where they are installed
memory        1000 requests leave the card's memory as it was

Weights are random. DIR gets results.json, written anew after every stage, and two pictures where matplotlib is
installed; tables for BENCHMARKS.md are printed at the end. Stages fail on wrong numbers, never on slow ones, and the
others still run; exit status 1 says that one failed. `--dry-run` needs no card: tiny shapes on the tests' stand-in for
CuPy, to see that this program works; its times mean nothing.
"""
from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import shlex
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_checks as checks  # noqa: E402
import gpu_report  # noqa: E402
import gpu_speed as speed  # noqa: E402
from gpu_card import Card  # noqa: E402


class Stage(NamedTuple):
    name: str
    run: Callable  # of (card, left)
    budget: float  # seconds, within which it should stop of its own accord


STAGES = (
    Stage("card", speed.stage_card, 20), Stage("kernels", checks.stage_kernels, 80),
    Stage("accuracy", checks.stage_accuracy, 50), Stage("bits", checks.stage_bits, 60),
    Stage("kernel_speed", speed.stage_kernel_speed, 70), Stage("decode", speed.stage_decode, 90),
    Stage("prefill", speed.stage_prefill, 25), Stage("load", speed.stage_load, 60),
    Stage("served", speed.stage_served, 50), Stage("transformers", speed.stage_transformers, 100),
    Stage("memory", checks.stage_memory, 20))
DEADLINE = 470  # seconds in all
LEAST = 10  # seconds without which a stage is left out, and which every later one is left
GRACE = 60  # seconds beyond its budget after which a stage counts as hung


class Run:
    """The stages one after the other, and what they found, in a file at any time."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.dry = args.out, args.dry_run
        self.started = time.monotonic()
        self.deadline = self.started + (3600 if self.dry else args.deadline)
        self.results = {"command": shlex.join(["python", *sys.argv]), "date": datetime.date.today().isoformat(),
                        "dry_run": self.dry, "stages": {}}
        self._lock = threading.Lock()  # the guard writes, too
        self._hung_at = float("inf")
        self._current = "start"
        self.card: Card | None = None

    def record(self, name: str, entry: dict) -> None:
        with self._lock:
            self.results["stages"][name] = entry
            self.results["seconds"] = time.monotonic() - self.started
            whole = self.out / "results.json.part"
            whole.write_text(json.dumps(gpu_report.plain(self.results), indent=2) + "\n", encoding="utf-8")
            os.replace(whole, self.out / "results.json")

    def guard(self) -> None:
        """A thread: ends the process when a stage hangs, as a kernel can, with what there is until then."""
        while time.monotonic() < self._hung_at:
            time.sleep(0.5)
        self.record(self._current, {"status": "failed", "error": "hung: the process was ended"})
        print(f"{self._current}: hung; results so far are in {self.out}", flush=True)
        self.tidy()
        os._exit(3)

    def tidy(self) -> None:
        """Leave no process and no checkpoint behind."""
        if self.card:
            self.card.end_children()
            shutil.rmtree(self.card.folder, ignore_errors=True)

    def run_stage(self, stage: Stage, num_later: int) -> bool:
        """True when later stages may run."""
        began = time.monotonic()
        budget = min(3600 if self.dry else stage.budget, self.deadline - began - num_later * LEAST)
        if budget < LEAST:
            self.record(stage.name, {"status": "skipped", "error": "out of time"})
            return True
        self._current, self._hung_at = stage.name, began + budget + GRACE
        print(f"{stage.name} ...", end=" ", flush=True)
        entry = {"status": "passed"}
        try:
            entry |= stage.run(self.card, lambda: began + budget - time.monotonic())
        except Exception as error:
            entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}",
                      "traceback": traceback.format_exc(), **getattr(error, "found", {})}
        entry["seconds"] = time.monotonic() - began
        self._hung_at = float("inf")
        if entry["status"] == "failed":
            entry["card_lost"] = self.clean_up()
        self.record(stage.name, entry)
        print(f"{entry['status']} in {entry['seconds']:.1f} s {entry.get('error', '')[:600]}", flush=True)
        return not entry.get("card_lost")

    def clean_up(self) -> bool:
        """After a failure: give back what the stage held. True when the card is lost to this process."""
        gc.collect()
        lost = self.card.is_lost()
        if not lost:
            try:
                self.card.close_model()
            except Exception:
                self.card.loaded = None
        return lost

    def run(self, stages: list[Stage]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self.guard, daemon=True).start()
        self._hung_at = time.monotonic() + 180
        try:
            self.card = Card(self.dry)
        except Exception as error:
            self.record("start", {"status": "failed", "error": repr(error), "traceback": traceback.format_exc()})
            return print(f"no card: {error}")
        finally:
            self._hung_at = float("inf")
        try:
            for number, stage in enumerate(stages):
                later_stages = stages[number + 1 :]
                if not self.run_stage(stage, len(later_stages)):
                    for later in later_stages:
                        self.record(later.name, {"status": "skipped", "error": f"the card was lost in {stage.name}"})
                    break
        finally:
            self.tidy()

    @property
    def failed(self) -> list[str]:
        return [name for name, entry in self.results["stages"].items() if entry["status"] == "failed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=names, default=names, help="these stages alone")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds in all (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the stand-in for CuPy")
    args = parser.parse_args()
    run = Run(args)
    # Percentages need the rates of the stage `card`.
    run.run([stage for stage in STAGES if stage.name in {"card", *args.only}])
    if run.card is None:
        return 1
    print("\n" + gpu_report.markdown(run.results))
    gpu_report.draw(run.results, args.out)
    if not run.card.is_lost():
        run.card.close_model()
    print(f"{args.out / 'results.json'}; failed: {', '.join(run.failed) or 'nothing'}", flush=True)
    return int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
