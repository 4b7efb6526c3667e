"""README, --help, .ci/run and the settings table say the same; the README's examples run."""
import re
import subprocess
import sys

import pytest

import rustinfer
from harness import ROOT, ServerProcess, need_tool

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def setting_row(setting: rustinfer.Setting) -> str:
    flag = f"{setting.flag} {setting.metavar}".strip().replace("|", r"\|")  # or it would end the cell
    default = "" if setting.default in (None, ()) else "off" if setting.default is False else setting.default
    return f"| `{flag}` | `{setting.variable}` | {default} | {setting.help} |"


@pytest.mark.parametrize("setting", rustinfer.SETTINGS, ids=lambda setting: setting.name)
def test_readme_lists_every_setting_as_the_table_has_it(setting):
    assert setting_row(setting) in README


def test_readme_lists_no_setting_that_is_gone():
    flags = re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)
    assert flags == [setting.flag for setting in rustinfer.SETTINGS]


@pytest.mark.parametrize("setting", rustinfer.SETTINGS, ids=lambda setting: setting.name)
def test_help_lists_every_setting(setting):
    shown = " ".join(rustinfer.build_parser().format_help().split())
    assert setting.flag in shown and f"[{setting.variable}]" in shown


def test_rows_of_tables_have_the_cells_of_their_head():
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_ci_runs_the_readme_commands():
    setup = [block.strip() for block in blocks("sh") if "venv .venv" in block]
    assert len(setup) == 2
    for command in setup:
        assert "\n" not in command
        assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_curl_example_gets_an_answer(demo_server):
    need_tool("curl")
    command = next(block for block in blocks("sh") if block.startswith("curl")).replace(":8000", f":{demo_server.port}")
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    assert "Rust is a" in answer.stdout


def test_readme_openai_example_streams(demo_server):
    code = next(block for block in blocks("python") if "openai" in block).replace(":8000", f":{demo_server.port}")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert len(answer.stdout.split()) > 5


def test_readme_library_example_runs():
    code = next(block for block in blocks("python") if "import LLM" in block)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                            cwd=ROOT)
    assert "1, 2, 3" in answer.stdout and "http://127.0.0.1:" in answer.stdout


def test_page_is_served_from_a_checkout():
    with ServerProcess("--device", "cpu") as server:
        status, headers, body = server.get("/")
        assert status == 200 and headers["content-type"].startswith("text/html") and b"<title>rustinfer" in body
