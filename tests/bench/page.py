"""How the page holds up: its size, the first paint, and tasks of more than 50 ms while long answers stream.

    python tests/bench/page.py [--chromium /usr/bin/chromium]

The server and the page are real and share this machine; the text is given, a piece a token, in place of the model's.
"""

import argparse
import contextlib
import dataclasses
import gzip
import itertools
import json
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import DEMO, ROOT, local_server, slowed  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

import rustinfer  # noqa: E402

PROSE = [
    "Tokens ",
    "come ",
    "one ",
    "by ",
    "one, ",
    "and ",
    "the ",
    "**last** ",
    "block ",
    "alone ",
    "is ",
    "`drawn` ",
    "again.",
    "\n\n",
]
ITEMS = ["- An ", "item ", "with ", "[a link]", "(https://example.com) ", "and ", "*some* ", "text\n"] * 6 + ["\n"]
CODE = ["```", "python\n", *["    value ", "= function", "(argument, ", "other)\n"] * 10, "```", "\n\n"]
TABLE = ["| name ", "| value ", "|\n", "|---", "|---:", "|\n", *["| `one` ", "| **2** ", "|\n"] * 10, "\n"]
MIXED = [*PROSE * 3, *ITEMS, *PROSE * 2, *CODE, *TABLE]
TEXTS = {  # what it is: (pieces a token, seconds that a step takes besides its work)
    "4,000 tokens of Markdown, as fast as they come": (MIXED, 0),
    "the same at 200 tokens/s": (MIXED, 0.005),
    "200 KB in one line without a space": (["x" * 50], 0),
    "200 KB of one code block": (["```\n", *["let value = 12; " * 3 + "\n"] * 5000], 0),
    "list items": (ITEMS[:-1], 0),
    "200 KB of paragraphs": (["**Some** words, and " * 2 + "`more`.\n\n"], 0),
}
CATEGORIES = [
    "toplevel",
    "disabled-by-default-devtools.timeline",
]  # of the trace: all tasks, with their time on the CPU


@contextlib.contextmanager
def speaking(pieces):
    """Every token of an answer is the next of these pieces, over and over after the first."""
    usual = rustinfer.ChatReply.text_event

    def text_event(self, index, text, tokens=()):
        left = self.__dict__.setdefault("left", itertools.chain(pieces, itertools.cycle(pieces[1:] or pieces)))
        return b"".join(usual(self, index, piece, [token]) for token, piece in zip(tokens, left))

    rustinfer.ChatReply.text_event = text_event
    try:
        yield
    finally:
        rustinfer.ChatReply.text_event = usual


def first_paint(browser, url: str) -> float:
    """Milliseconds from navigation to the first contentful paint, in a fresh context."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(url)
        page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint').length")
        return page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")


def tasks_of(trace: bytes) -> list[tuple[float, float]]:
    """(milliseconds on the clock, milliseconds on the CPU) of every task of the page's main thread."""
    events = json.loads(trace)["traceEvents"]
    mains = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    return [
        (event["dur"] / 1000, event.get("tdur", 0) / 1000)
        for event in events
        if event["name"] == "RunTask" and event["ph"] == "X" and (event["pid"], event["tid"]) in mains
    ]


def stream(browser, url: str, logprobs: bool = False) -> tuple[int, float, list[tuple[float, float]]]:
    """One answer: its characters, the seconds until all of it was drawn, and the page's tasks."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#status[data-state=ready]")
        if logprobs:
            page.evaluate("setValue('logprobs', true)")
        browser.start_tracing(page=page, categories=CATEGORIES)
        page.evaluate("window.began = performance.now(); send('Go')")
        page.wait_for_function("() => !streams.size && !dirty.size", timeout=120_000)
        size, seconds = page.evaluate("[current.messages[1].content.length, (performance.now() - began) / 1000]")
        return size, seconds, tasks_of(browser.stop_tracing())


def report(name: str, size: int, seconds: float, tasks: list[tuple[float, float]]) -> None:
    (clock, cpu), over = map(max, zip(*tasks)), sum(clock > 100 for clock, _ in tasks)
    print(f"| {name} | {size / 1000:.0f} | {seconds:.1f} | {clock:.0f} | {cpu:.0f} | {over} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    file = (ROOT / "web" / "index.html").read_bytes()
    print(f"web/index.html: {len(file) / 1000:.1f} kB, {len(gzip.compress(file)) / 1000:.1f} kB with gzip\n")
    with rustinfer.LLM(DEMO, device="cpu", max_tokens=4000) as llm, sync_playwright() as playwright:
        llm.default_params = dataclasses.replace(llm.default_params, ignore_eos=True)
        browser = playwright.chromium.launch(executable_path=parser.parse_args().chromium, args=["--no-sandbox"])
        with local_server(llm) as server:
            paints = sorted(first_paint(browser, server.url) for _ in range(11))
            print(
                f"first contentful paint: median {statistics.median(paints):.0f} ms of {len(paints)}, {paints[0]:.0f}"
                f" to {paints[-1]:.0f}\n"
            )
            print(
                "| answer | thousand characters | s until drawn | longest task, ms | on the CPU | over 100 ms |\n"
                "|---|---|---|---|---|---|"
            )
            for name, (pieces, pause) in TEXTS.items():
                with speaking(pieces), slowed(llm, pause) if pause else contextlib.nullcontext():
                    report(name, *stream(browser, server.url))
            with speaking(PROSE):
                report("4,000 tokens with their probabilities", *stream(browser, server.url, logprobs=True))
        browser.close()


if __name__ == "__main__":
    main()
