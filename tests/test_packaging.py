"""The wheel carries everything, the command finds it, and the file alone is enough to serve."""
import ast
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from harness import REFERENCES, ROOT, ServerProcess


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project, built as a wheel from a copy of the tree and unpacked into a folder of its own."""
    copy, wheels, target = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "target"))
    files = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True)
    names = files.stdout.decode().split("\0") if files.returncode == 0 else []
    names = [n for n in names if n] or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if ".venv" not in p.parts]
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(copy)],
                   check=True, capture_output=True, timeout=120)
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(target)
    return target


def test_wheel_holds_kernels_page_and_demo(installed):
    for name in ("kernels", "web/index.html", "demo/model.safetensors", "demo/tokenizer.json"):
        assert (installed / "rustinfer_data" / name).exists(), name


def test_installed_command_is_main(installed):
    entry = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "rustinfer = rustinfer:main" in entry


def test_installed_file_serves_the_demo_model_and_the_page(installed, tmp_path):
    with ServerProcess("--device", "cpu", script=installed / "rustinfer.py", cwd=tmp_path) as server:
        assert server.get("/v1/models")[2]["data"][0]["id"] == "demo"
        assert b"<title>rustinfer" in server.get("/")[2]


@pytest.fixture
def lone_file(tmp_path):
    shutil.copy(ROOT / "rustinfer.py", tmp_path)
    return tmp_path / "rustinfer.py"


def test_lone_file_serves_a_model_folder(lone_file):
    folder = REFERENCES / "smollm2"
    (lone_file.parent / "index.html").write_text("a page of the program, not ours to show")
    with ServerProcess("--device", "cpu", model=folder, script=lone_file, cwd=lone_file.parent) as server:
        status, _, body = server.chat("Hello", max_tokens=4)
        assert status == 200 and body["usage"]["completion_tokens"] == 4
        assert b"/v1" in server.get("/")[2]


def test_lone_file_without_a_model_says_what_to_pass(lone_file):
    command = [sys.executable, str(lone_file), "--port", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert answer.returncode == 2 and "--model" in answer.stderr.strip().splitlines()[-1]


def test_pep_723_header_names_the_core_dependencies():
    head = (ROOT / "rustinfer.py").read_text(encoding="utf-8").split("# ///")[1]
    listed = ast.literal_eval(head.split("dependencies = ")[1].replace("#", "").strip())
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    wanted = setup.split("install_requires =")[1].split("\n\n")[0].split()
    assert sorted(listed) == sorted(wanted)


def test_pyproject_holds_the_build_system_alone():
    tables = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("[")]
    assert tables == ["[build-system]"]


def test_import_needs_neither_cupy_nor_pynvml():
    code = ("import sys; sys.modules['cupy'] = sys.modules['pynvml'] = None; import rustinfer; "
            "print(rustinfer.find_card('auto'))")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "CuPy is not installed" in answer.stdout
