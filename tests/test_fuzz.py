"""Broken requests by the thousand: tests/bench/fuzz.py, which can send a million, in small."""
import os
import sys

from harness import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import fuzz  # noqa: E402

REQUESTS = 20_000 if os.environ.get("RUSTINFER_TEST_ALL") == "1" else 2_000


def test_broken_requests_are_refused_and_leave_nothing_behind():
    result = fuzz.run(REQUESTS, seed=1, processes=2)
    assert result.broken == []
    kinds = {kind for kind, _ in result.seen}
    assert {"fields", "json", "query", "route", "head", "spliced", "good"} <= kinds
    assert sum(result.seen.values()) >= REQUESTS
    assert result.meter.growth() < 0.1


def test_a_wrong_answer_is_noticed(tiny_server):
    """The fuzzer itself: what is no right answer does not pass."""
    worker = fuzz.Worker(tiny_server.port, None, 0, 1)
    worker.run()
    for status, headers, body in ((500, {}, {"error": {}}), (400, {}, {"error": {"message": "x"}}), (302, {}, {}),
                                  (200, {"content-type": "text/event-stream"}, b'data: {"error": {}}\n\n')):
        try:
            worker.check(status, headers, body)
        except AssertionError:
            continue
        raise AssertionError(f"{status} {body} passed")
