import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from harness import DEMO, REFERENCES, ServerProcess, local_server, slowed  # noqa: E402


@pytest.fixture(scope="session")
def tiny_llm():
    """A reference model in this process, for tests that need no particular answers."""
    import rustinfer

    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm:
        yield llm


@pytest.fixture(scope="session")
def demo_server():
    """A server process with the demo model, shared by tests that leave it as they found it."""
    with ServerProcess("--device", "cpu", model=DEMO) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server():
    """A server process with a reference model (random weights), shared likewise."""
    with ServerProcess("--device", "cpu", model=REFERENCES / "llama3-tied") as server:
        yield server


@pytest.fixture
def slow_demo():
    """The demo model in this process and its server, too slow for a long answer to end by itself during a test."""
    import rustinfer

    with rustinfer.LLM(DEMO, device="cpu") as llm, slowed(llm, 0.03), local_server(llm) as server:
        yield llm, server
