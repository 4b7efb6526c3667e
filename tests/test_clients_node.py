"""openai for Node and a server with the demo model: each case of openai_node.cjs is a test of its own."""
import re
import subprocess

import pytest
from harness import ROOT, give_up, need_tool

pytestmark = pytest.mark.clients
SCRIPT = ROOT / "tests" / "openai_node.cjs"
CASES = re.findall(r"^cases\.(\w+) = ", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
SLOW = [name for name in CASES if name.startswith("slow_")]


@pytest.fixture(scope="module")
def node():
    """The node command, if it finds the packages."""
    command = need_tool("node", promise="RUSTINFER_TEST_CLIENTS")
    found = subprocess.run([command, "-e", "require('openai'); require('zod')"], capture_output=True, timeout=60)
    if found.returncode:
        give_up("needs openai for Node (npm install --prefix DIR openai zod; NODE_PATH=DIR/node_modules)",
                "RUSTINFER_TEST_CLIENTS")
    return command


def run_case(node: str, name: str, url: str) -> None:
    done = subprocess.run([node, str(SCRIPT), name, url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in CASES if name not in SLOW])
def test_node(node, demo_server, name):
    run_case(node, name, demo_server.url)


@pytest.mark.parametrize("name", SLOW)
def test_node_leaves(node, slow_demo, name):
    run_case(node, name, slow_demo[1].url)
