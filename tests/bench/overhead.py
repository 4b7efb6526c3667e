"""What serving costs the engine: `python tests/bench/overhead.py [--rounds N] [--streams N] [--json FILE]`.

The engine's model is replaced by a sleep of 1 ms a step; scheduling, the engine's own bookkeeping and all of the server
are the real ones. Steps a second with as many streams as --streams, all read by a client in a process of its own,
against steps a second of as many sequences that nobody reads; in turns, medians. Twice: the sleep during the step, as
on the CPU, and beside the engine's work on the step before it, as on a card.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

import load  # noqa: E402

import rustinfer  # noqa: E402

STEP = 0.001  # seconds


class AtOnce:
    """A runner whose model sleeps while the engine waits."""

    looks_ahead = False

    def __init__(self, token_ids):
        self._tokens = itertools.cycle([rustinfer.Sampled(token_id, None, None, True) for token_id in token_ids])

    def _draw(self, step):
        complete = [len(seq.token_ids) - seq.num_computed_tokens == count for seq, count in step.items()]
        return [next(self._tokens) if drawn else None for drawn in complete]

    def launch(self, step):
        time.sleep(STEP)
        return self._draw(step)

    def collect(self, launched):
        return launched


class Ahead(AtOnce):
    """A runner whose model sleeps while the engine works on."""

    looks_ahead, _free = True, 0.0

    def launch(self, step):
        self._free = max(self._free, time.perf_counter()) + STEP
        return self._free, self._draw(step)

    def collect(self, launched):
        done, tokens = launched
        time.sleep(max(0.0, done - time.perf_counter()))
        return tokens


def simulate(llm, kind):
    """Put the runner into an engine that is idle."""
    ordinary = [number for number in range(300, 800) if llm.tokenizer.decode([number]).isascii()]
    llm.engine._runner = kind(ordinary)


def counted(llm, seconds):
    """Steps a second, and the part of a core that this process takes."""
    steps, started, used = llm.engine.metrics.steps, time.perf_counter(), time.process_time()
    time.sleep(seconds)
    elapsed = time.perf_counter() - started
    return (llm.engine.metrics.steps - steps) / elapsed, (time.process_time() - used) / elapsed


def settle(llm, streams):
    """Wait until all sequences decode."""
    while (running := list(llm.engine.scheduler.running)) is None or len(running) < streams or any(
            seq.num_output_tokens < 2 for seq in running):
        time.sleep(0.01)
    time.sleep(0.2)


def unread(llm, streams, seconds):
    """`counted` with nobody reading."""
    params = rustinfer.SamplingParams(max_tokens=llm.max_model_len - 8, ignore_eos=True)
    handles = [llm.engine.submit([9, 9, 9, 9], params) for _ in range(streams)]
    for handle in handles:
        handle.want(1 << 31)
    settle(llm, streams)
    counts = counted(llm, seconds)
    for handle in handles:
        handle.abort()
    for handle in handles:
        handle.take(at_least=1 << 31)
    return counts


def read_streams(pipe, url):
    """The client's process: on each message (streams, seconds) a load; answers with its figures."""
    fields = lambda _: {"max_tokens": 4000, "ignore_eos": True, "stream_options": {"include_usage": True}}
    client = load.Client(url, fields)
    for streams, seconds in iter(pipe.recv, None):
        pipe.send(client.run(load.Load(streams, seconds=seconds, grace=0, prompts=load.Lengths(4, 4))))


def read(llm, streams, seconds, pipe):
    """`counted` with all streams read, and the client's part of a core."""
    pipe.send((streams, seconds + 1))
    settle(llm, streams)
    counts = counted(llm, seconds)
    seen = pipe.recv()
    while llm.engine.scheduler.has_work:
        time.sleep(0.01)
    if seen["errors"] != {"cut off": streams} or seen["tokens_per_s"] < 0.8 * streams * counts[0]:
        raise SystemExit(f"the client did not keep up, or was refused: {seen}")
    return (*counts, seen["client_cpu"])


def measure(rounds, streams, seconds, **options):
    """{kind of engine: medians}"""
    context, results = multiprocessing.get_context("spawn"), {}
    with rustinfer.LLM(device="cpu", max_num_seqs=streams, **options) as llm, rustinfer.Server(llm, port=0) as server:
        ours, theirs = context.Pipe()
        client = context.Process(target=read_streams, args=(theirs, server.url), daemon=True)
        client.start()
        for kind in (AtOnce, Ahead):
            simulate(llm, kind)
            rows = [(*unread(llm, streams, seconds), *read(llm, streams, seconds, ours)) for _ in range(rounds)]
            names = "unread_steps_per_s", "unread_cpu", "read_steps_per_s", "read_cpu", "client_cpu"
            results[kind.__name__] = {name: statistics.median(column) for name, column in zip(names, zip(*rows))}
            results[kind.__name__]["ratio"] = statistics.median(row[2] / row[0] for row in rows)
        ours.send(None)
        client.join()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--stream-interval", type=float, default=rustinfer.EngineConfig.stream_interval)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    args = parser.parse_args()
    results = measure(args.rounds, args.streams, args.seconds, stream_interval=args.stream_interval)
    print(f"{os.cpu_count()} cores, {args.streams} streams, medians of {args.rounds}")
    for name, one in results.items():
        print(f"{name}: {one['unread_steps_per_s']:.0f} steps/s unread, {one['read_steps_per_s']:.0f} read, "
              f"{one['ratio']:.1%}; of a core: engine alone {one['unread_cpu']:.0%}, with the server "
              f"{one['read_cpu']:.0%}, client {one['client_cpu']:.0%}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
