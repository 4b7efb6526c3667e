"""Servers under load, side by side: `python tests/bench/serve.py [--llama-cpp DIR] [--rounds N] [--plot FILE]`.

A random checkpoint of the SmolLM2-135M shape, served by rustinfer, by `transformers serve` and by llama.cpp's server,
two cores for server and client together. In each round each server is started in turn, warmed up and put under the same
loads: so many requests at once, then so many new ones a second. load.py says what is measured; every request gets
exactly the tokens it asks for. A load waits for a quiet machine; where other processes take more than DISTURBED of a
core meanwhile, it is run again, and the least disturbed try counts. Medians of the rounds that nobody disturbed; where
there is none, the least disturbed round. `--url URL` drives servers that already run instead.

Needs transformers[serving] for the one, gguf and a folder with llama-server for the other; cpu.py says how to build
that (target llama-server). Peers run with what served them best here: transformers with continuous batching, 1024
tokens a step (without: one request at a time; without a limit the first 32 prompts take longer than 15 s), llama.cpp in
BF16 (faster than F16 at 8 and 32), 32 slots of 512 tokens, no copies of prompts in memory.
"""
import argparse
import dataclasses
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

import load
from cpu import SHAPES, draw_bars, processor, rate, write_gguf

ROOT = Path(__file__).resolve().parent.parent.parent
THREADS = 2
DISTURBED = 0.1  # of a core
OURS, TRANSFORMERS, LLAMA_CPP = "rustinfer", "transformers serve", "llama.cpp"


# -- the machine


def busy_seconds():
    """Of all cores, the hypervisor's part included, without low priorities: those get what is left over."""
    spent, left = psutil.cpu_times()._asdict(), ("idle", "iowait", "nice", "guest", "guest_nice")
    return sum(value for name, value in spent.items() if name not in left)


def own_seconds(process):
    """Of this process, the given one and its children."""
    total = time.process_time()
    for one in [process, *process.children(recursive=True)]:
        spent = one.cpu_times()
        total += spent.user + spent.system
    return total


class Others:
    """How much of a core everybody else takes, since it was made."""

    def __init__(self, process):
        self._process = process
        self._started, self._busy, self._own = time.perf_counter(), busy_seconds(), own_seconds(process)

    def share(self):
        spent = busy_seconds() - self._busy - own_seconds(self._process) + self._own
        return max(0.0, spent) / (time.perf_counter() - self._started)


# -- servers


def plain_fields(tokens):
    """Greedy, no end before its time, with usage: as rustinfer, llama.cpp, vLLM and SGLang understand it."""
    return {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}


def transformers_fields(tokens):
    """The same for `transformers serve`, which always tells usage and knows no ignore_eos: no token has the id -1."""
    spec = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": tokens}
    return {"max_tokens": tokens, "temperature": 0, "generation_config": json.dumps(spec)}


FIELDS = {"plain": plain_fields, "transformers": transformers_fields}


class ServerUnderTest:
    """A server in a process of its own, ready and warm; use `with`."""

    def __init__(self, name, command, ready, log, fields):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._log = log.open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen([*map(str, command), "--port", str(port)], stdin=subprocess.DEVNULL,
                                         stdout=self._log, stderr=subprocess.STDOUT, env=environment)
        self._name, self.client = name, load.Client(f"http://127.0.0.1:{port}", fields)
        try:
            self._wait(f"http://127.0.0.1:{port}{ready}")
            self.client.run(load.Load(concurrency=2, seconds=2, grace=60, seed=1))
        except BaseException:
            self.__exit__()
            raise

    def _wait(self, url):
        for _ in range(1200):
            try:
                return urllib.request.urlopen(url, timeout=10).close()
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.1)
        raise SystemExit(f"{self._name} did not start; see {self._log.name}")

    def run(self, one, tries, patience):
        """The figures of the least disturbed try of a load, `others_cpu` among them."""
        seen = []
        while len(seen) < tries and (not seen or seen[-1]["others_cpu"] > DISTURBED):
            self._wait_quiet(patience)
            others = Others(psutil.Process(self._process.pid))
            figures = self.client.run(dataclasses.replace(one, digits=len(seen)))
            seen.append({**figures, "others_cpu": others.share()})
        return min(seen, key=lambda figures: figures["others_cpu"])

    def _wait_quiet(self, patience):
        for _ in range(int(patience)):
            others = Others(psutil.Process(self._process.pid))
            time.sleep(1)
            if others.share() < DISTURBED:
                break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class RunningServer:
    """A server that somebody else started."""

    def __init__(self, url, fields, path):
        self._client = load.Client(url, fields, path)

    def run(self, one, tries, patience):
        return {**self._client.run(one), "others_cpu": 0.0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def contenders(folder, tools):
    """{name: a function that starts it}"""
    from make_references import random_checkpoint

    model, gguf = folder / "135M", folder / "135M-BF16.gguf"
    if not (model / "config.json").exists():
        random_checkpoint(model, **SHAPES["135M"])
    found = {
        OURS: ([sys.executable, ROOT / "rustinfer.py", "--model", model, "--device", "cpu", "--threads", THREADS],
               "/ready", plain_fields),
        TRANSFORMERS: ([sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model,
                        "--device", "cpu", "--host", "127.0.0.1", "--continuous-batching",
                        "--cb-max-batch-tokens", 1024], "/health", transformers_fields)}
    if tools:
        if not gguf.exists():
            write_gguf(model, gguf)
        found[LLAMA_CPP] = ([tools / "llama-server", "-m", gguf, "-t", THREADS, "-tb", THREADS, "-np", 32, "-c", 16384,
                             "-b", 2048, "-ub", 512, "-cram", 0, "--no-webui"], "/health", plain_fields)
    return {name: functools.partial(ServerUnderTest, name, command, ready, folder / f"{name}.log", fields)
            for name, (command, ready, fields) in found.items()}


# -- rounds


def quiet(rounds):
    """The rounds in which nobody disturbed a load, or else the least disturbed one."""
    found = [one for one in rounds if one["others_cpu"] <= DISTURBED]
    return found or [min(rounds, key=lambda one: one["others_cpu"])]


def middle(seen):
    """The medians of figures that are alike; of what a round did not have, the others'."""
    if isinstance(seen[0], dict):
        keys = dict.fromkeys(key for one in seen for key in one)
        return {key: middle([one[key] for one in seen if key in one]) for key in keys}
    known = [value for value in seen if value is not None]
    return statistics.median(known) if known else None


def measure(starters, loads, args):
    """{load: {server: [the figures of each round]}}; kept in a file as they come."""
    seen = {one.name: {name: [] for name in starters} for one in loads}
    for number in range(args.rounds):
        for name, start in starters.items():
            with start() as server:
                for one in loads:
                    figures = server.run(one, args.tries, args.patience)
                    seen[one.name][name].append(figures)
                    print(f"round {number + 1}, {name}, {one.name}: {brief(figures)}", file=sys.stderr, flush=True)
                    if args.json:
                        kept = {"processor": processor(), "loads": seen}
                        args.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return seen


def brief(figures):
    return (f"{figures['tokens_per_s']:.1f} tokens/s, first token {times(figures['ttft_s'])} ms, a token "
            f"{times(figures['tpot_s'])} ms, {figures['requests']} requests, {figures['errors'] or 'no errors'}, of a "
            f"core: client {figures['client_cpu']:.1%}, others {figures['others_cpu']:.1%}")


# -- report


def times(spread):
    """p50 / p90 / p99 in ms."""
    return " / ".join("-" if value is None else rate(value * 1000) for value in spread.values())


def failed(rounds):
    """How many of all requests did not finish."""
    return f"{sum(sum(one['errors'].values()) for one in rounds)} of {sum(one['requests'] for one in rounds)}"


def table(seen):
    """The results as Markdown."""
    lines = ["| load | server | tokens/s | requests/s | first token, ms | per further token, ms | between writes, ms "
             "| whole answer, ms | not finished | others, of a core |", "|---" * 10 + "|"]
    for name, servers in seen.items():
        for server, rounds in servers.items():
            rounds = quiet(rounds)
            one = middle(rounds)
            spreads = " | ".join(times(one[key]) for key in ("ttft_s", "tpot_s", "itl_s", "e2e_s"))
            lines.append(f"| {name} | {server} | {rate(one['tokens_per_s'])} | {rate(one['requests_per_s'])} | "
                         f"{spreads} | {failed(rounds)} | {one['others_cpu']:.0%} |")
    return "\n".join(lines)


COMPARED = {"tokens/s": ("tokens_per_s",), "first token p50": ("ttft_s", "p50"), "first token p99": ("ttft_s", "p99"),
            "further p50": ("tpot_s", "p50"), "further p99": ("tpot_s", "p99"), "whole p50": ("e2e_s", "p50"),
            "whole p99": ("e2e_s", "p99")}


def ratio(ours, theirs, path):
    """How many times better the medians of ours are; None where one of them has no figure."""
    a, b = (functools.reduce(dict.get, path, middle(quiet(rounds))) for rounds in (ours, theirs))
    if not a or not b:
        return None
    return a / b if path == ("tokens_per_s",) else b / a


def comparison(seen, first):
    """`first` against each of the others: above 1 it is ahead."""
    lines = [f"| {first} against | load | {' | '.join(COMPARED)} |", "|---" * (len(COMPARED) + 2) + "|"]
    for other in [name for name in next(iter(seen.values())) if name != first]:
        for name, servers in seen.items():
            ratios = [ratio(servers[first], servers[other], path) for path in COMPARED.values()]
            shown = " | ".join("-" if value is None else f"{value:.2f}" for value in ratios)
            lines.append(f"| {other} | {name} | {shown} |")
    return "\n".join(lines)


def shares(seen):
    """What each key got, where there are several."""
    lines = ["| load | server | key | output tokens | first token, ms |", "|---" * 5 + "|"]
    for name, servers in seen.items():
        for server, rounds in servers.items():
            lines += [f"| {name} | {server} | {key} | {one['output_tokens']:.0f} | {times(one['ttft_s'])} |"
                      for key, one in middle(quiet(rounds))["keys"].items()]
    return "\n".join(lines)


def plot(seen, path):
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # letters stay letters
    medians = {name: {server: middle(quiet(rounds)) for server, rounds in servers.items()}
               for name, servers in seen.items()}
    at_once = {name: servers for name, servers in medians.items() if name.endswith("at once")}
    rates = {float(name.split()[0]): servers for name, servers in medians.items() if name not in at_once}
    figure = Figure(figsize=(10, 2.2 * 2 * bool(at_once) + 2.8 * bool(rates)), layout="constrained")
    parts = figure.subfigures(bool(at_once) + bool(rates), 1, squeeze=False,
                              height_ratios=[4.4] * bool(at_once) + [2.8] * bool(rates))[:, 0]
    if at_once:
        plot_bars(parts[0], at_once)
    if rates:
        plot_rates(parts[-1], rates)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def colour(number):
    return ("tab:blue", "tab:grey", "tab:orange", "tab:green")[number % 4]


def ms(seconds):
    """For a plot, which leaves out what is not there."""
    return float("nan") if seconds is None else 1000 * seconds


def plot_bars(figure, loads):
    """Tokens a second and the 99th percentile of the time to first token, a column a load."""
    panels = {"tokens/s": lambda one: one["tokens_per_s"],
              "first token p99, ms": lambda one: ms(one["ttft_s"]["p99"])}
    for row, (title, pick) in zip(figure.subplots(2, len(loads), squeeze=False), panels.items()):
        for axes, (name, servers) in zip(row, loads.items()):
            values = [pick(one) for one in servers.values()]
            colours = [colour(number) for number in range(len(servers))]
            draw_bars(axes, [*servers], values, colours, f"{name}: {title}", axes is row[0])


def plot_rates(figure, rates):
    """What becomes of it as more requests come a second."""
    panels = {"tokens/s": lambda one: one["tokens_per_s"],
              "first token p99, ms": lambda one: ms(one["ttft_s"]["p99"]),
              "further token p50, ms": lambda one: ms(one["tpot_s"]["p50"])}
    for axes, (title, pick) in zip(figure.subplots(1, 3), panels.items()):
        for number, server in enumerate(next(iter(rates.values()))):
            axes.plot([*rates], [pick(one[server]) for one in rates.values()], "o-", color=colour(number), label=server)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("requests a second")
        if "ms" in title:
            axes.set_yscale("log")
        else:
            axes.legend(frameon=False, fontsize=8)


# -- command line


def parse_key(text):
    key, _, part = text.partition("=")
    return key, float(part or 1)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", default=[], help="a server that runs already; repeat to compare")
    parser.add_argument("--chat", action="store_true", help="with --url: chat instead of completions")
    parser.add_argument("--fields", choices=FIELDS, default="plain", help="with --url: how to ask for exact lengths")
    parser.add_argument("--extra", type=json.loads, default={}, metavar="JSON", help="with --url: more request fields")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 2, 4, 6], help="new requests a second")
    parser.add_argument("--seconds", type=float, default=12, help="no request of a load begins later")
    parser.add_argument("--grace", type=float, default=12, help="those that run so long after that are cut off")
    parser.add_argument("--prompts", type=load.Lengths.parse, default=load.Load.prompts, metavar="LOW-HIGH")
    parser.add_argument("--answers", type=load.Lengths.parse, default=load.Load.answers, metavar="LOW-HIGH")
    parser.add_argument("--key", type=parse_key, action="append", metavar="KEY[=SHARE]", help="a client; repeat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=3, help="of a load that others disturb")
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for a quiet machine")
    parser.add_argument("--only", nargs="*", help="names of servers")
    parser.add_argument("--llama-cpp", type=Path, help="folder with llama-server")
    parser.add_argument("--folder", type=Path, help="where checkpoints and logs are kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this file (SVG or PNG)")
    return parser.parse_args()


def loads_of(args):
    common = {"seconds": args.seconds, "grace": args.grace, "prompts": args.prompts, "answers": args.answers,
              "shares": tuple(args.key or load.Load.shares), "seed": args.seed}
    return [load.Load(concurrency=number, **common) for number in args.concurrency] + [
        load.Load(rate=number, **common) for number in args.rates]


def starters_of(args, folder):
    if args.url:
        fields = lambda tokens: {**FIELDS[args.fields](tokens), **args.extra}
        path = "/v1/chat/completions" if args.chat else "/v1/completions"
        return {url: functools.partial(RunningServer, url, fields, path) for url in args.url}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # of the servers, too
    folder.mkdir(parents=True, exist_ok=True)
    found = contenders(folder, args.llama_cpp)
    return {name: start for name, start in found.items() if not args.only or name in args.only}


def main():
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are stopped
    with tempfile.TemporaryDirectory() as scratch:
        starters = starters_of(args, args.folder or Path(scratch))
        seen = measure(starters, loads_of(args), args)
    figures = [one for servers in seen.values() for rounds in servers.values() for one in rounds]
    client, others = ([one[name] for one in figures] for name in ("client_cpu", "others_cpu"))
    print(f"{processor()}, {THREADS} cores, {time.strftime('%Y-%m-%d')}; p50 / p90 / p99; of a core the client took at "
          f"most {max(client):.1%}, other processes {statistics.median(others):.1%} (median), {max(others):.1%} at most"
          f"\n\n{table(seen)}")
    if len(starters) > 1:
        print(f"\n{comparison(seen, next(iter(starters)))}")
    if args.key:
        print(f"\n{shares(seen)}")
    if args.plot:
        plot(seen, args.plot)


if __name__ == "__main__":
    main()
