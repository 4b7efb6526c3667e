"""A minute of everything at once: tests/bench/soak.py in small."""
import os
import sys

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import soak  # noqa: E402


@pytest.mark.skipif(os.environ.get("RUSTINFER_TEST_ALL") != "1", reason="takes a minute; RUSTINFER_TEST_ALL=1 runs it")
def test_a_minute_of_everything_leaves_nothing_behind():
    seen, broken, samples = soak.soak(60)
    assert broken == [] and {way for way, _ in seen} >= {
        "stream", "leave", "bad", "shaped", "called", "cancel", "overtime"}
    assert soak.growth(samples, 30) < 0.05  # the memory of a process is not steady yet
