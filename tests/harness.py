"""What the tests share: reference models, real server processes, and a raw HTTP client that accepts nothing sloppy."""
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = Path(__file__).resolve().parent / "references"
REFERENCE_NAMES = sorted(path.parent.name for path in REFERENCES.glob("*/config.json"))
DEMO = ROOT / "demo"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def reference_answers(name: str) -> tuple[dict, dict]:
    """reference.json and reference.npz of a reference model, as make_references.py describes them."""
    folder = REFERENCES / name
    with np.load(folder / "reference.npz") as arrays:
        return json.loads((folder / "reference.json").read_text(encoding="utf-8")), dict(arrays)


def give_up(message: str, promise: str = "RUSTINFER_TEST_ALL") -> None:
    """Skips the test or the module, or fails it where this variable promises that all is there."""
    import pytest

    pytest.fail(message) if os.environ.get(promise) == "1" else pytest.skip(message, allow_module_level=True)


def need_tool(*names: str, promise: str = "RUSTINFER_TEST_ALL") -> str:
    """The path of a system tool; without it the test is skipped, or fails where it is promised."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        give_up(f"needs {' or '.join(names)}", promise)
    return path


def need_compiler() -> str:
    """The C compiler that the kernels are compiled with, as `need_tool`."""
    return need_tool("cc", "gcc", "clang")


def need_client(name: str):
    """A module of a client that the extra `clients` installs; without it the module that calls this is skipped."""
    if importlib.util.find_spec(name) is None:
        give_up(f"needs {name} (pip install '.[clients]')", "RUSTINFER_TEST_CLIENTS")
    return importlib.import_module(name)


def num_running(llm) -> int:
    """Requests that the engine works on."""
    return llm.engine.snapshot()["num_requests_running"]


class ServerProcess:
    """`python rustinfer.py ... --port 0` in a process of its own; use `with`."""

    def __init__(self, *flags: str, model: Path | str | None = None, script: Path = ROOT / "rustinfer.py",
                 env: dict[str, str] | None = None, wait: bool = True, cwd: Path | None = None):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RUSTINFER_") and key not in (
            "MODEL_PATH", "HOST", "PORT", "DEVICE", "MAX_TOKENS")}
        model_flags = ["--model", str(model)] if model else []
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(script), *model_flags, "--port", "0", *flags], env={**clean, **(env or {})}, cwd=cwd,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        os.set_blocking(self.process.stderr.fileno(), False)
        self.log = ""
        self.port = self._read_port()
        self.url = f"http://127.0.0.1:{self.port}"
        if wait:
            self.wait_ready()

    def _read_port(self) -> int:
        for _ in range(3000):
            self.read_log()
            if match := re.search(r"listening on https?://\S+?:(\d+)", self.log):
                return int(match[1])
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"the server did not start: {self.log}")

    def read_log(self) -> str:
        """Everything on stderr so far."""
        with contextlib.suppress(BlockingIOError, ValueError):  # nothing there, or closed
            while chunk := os.read(self.process.stderr.fileno(), 65536):
                self.log += chunk.decode(errors="replace")
        return self.log

    def wait_ready(self, timeout: float = 60) -> float:
        """Seconds from process start until /ready says so."""
        while time.monotonic() - self.started < timeout:
            assert self.process.poll() is None, self.read_log()
            if self.get("/ready")[0] == 200:
                return time.monotonic() - self.started
            time.sleep(0.01)
        raise AssertionError(f"not ready after {timeout} s: {self.read_log()}")

    def request(self, method: str, path: str, body=None, headers: dict[str, str] | None = None):
        """(status, headers, parsed JSON or bytes) of one request on a connection of its own."""
        with RawConnection(self.port) as connection:
            return connection.request(method, path, body, headers)

    def get(self, path: str, **headers: str):
        return self.request("GET", path, headers=headers)

    def chat(self, text: str = "Hello", **fields):
        """(status, headers, body) of a chat request with one user message."""
        return self.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def stop(self, timeout: float = 20) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.read_log()
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


WRAPPER = """
import sys, time
sys.path.insert(0, {root!r})
import rustinfer

run, runs = rustinfer.Llama.run, iter(range(10**9))

def changed_run(self, batch):
    {change}
    return run(self, batch)

rustinfer.Llama.run = changed_run
sys.exit(rustinfer.main())
"""


@contextlib.contextmanager
def server_whose_model(change: str, tmp_path: Path, *flags: str, model: Path = REFERENCES / "llama3-tied"):
    """A server process whose every forward pass begins with a line of Python."""
    script = tmp_path / "changed.py"
    script.write_text(WRAPPER.format(root=str(ROOT), change=change))
    with ServerProcess("--device", "cpu", *flags, model=model, script=script) as server:
        yield server


@contextlib.contextmanager
def local_server(llm=None, **options):
    """A server in this process, on any port, which ends without waiting for its requests."""
    import rustinfer

    server = rustinfer.Server(llm, port=0, **options)
    try:
        yield server
    finally:
        server.stop(drain_timeout=0)


@contextlib.contextmanager
def slowed(llm, seconds: float):
    """Every step of the engine takes this much longer."""
    run = llm.engine._runner.launch

    def slow_run(step):
        time.sleep(seconds)
        return run(step)

    llm.engine._runner.launch = slow_run
    try:
        yield llm
    finally:
        del llm.engine._runner.launch


def free_port() -> int:
    """A port for a program that cannot pick one and tell."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def client_of(server, kind: str = "OpenAI", **options):
    """The openai SDK (or its AsyncOpenAI) with a server's address, which asks once; use `with`."""
    import openai

    options = {"api_key": "unused", "max_retries": 0, "timeout": 60, **options}
    return getattr(openai, kind)(base_url=server.url + "/v1", **options)


def wait_for(condition, timeout: float = 10) -> float:
    """Seconds until the condition holds; an assertion error if it never does."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, "waited in vain"
        time.sleep(0.002)
    return time.monotonic() - started


def chat_body(text: str = "Hello", **fields) -> dict:
    """A chat request with one user message."""
    return {"messages": [{"role": "user", "content": text}], **fields}


class RawConnection:
    """A socket that speaks HTTP/1.1 and checks every answer: framing, required headers, error shape."""

    def __init__(self, port: int, timeout: float = 30):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.buffer = b""

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def request(self, method: str, path: str, body=None, headers: dict[str, str] | None = None):
        self.send_request(method, path, body, headers)
        return self.read_response(method)

    def send_request(self, method: str, path: str, body=None, headers: dict[str, str] | None = None) -> None:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Host": "127.0.0.1", **({"Content-Type": "application/json"} if body is not None else {}),
                  **({"Content-Length": str(len(data))} if body is not None else {}), **(headers or {})}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.send(head.encode() + b"\r\n" + data)

    def read_more(self) -> bool:
        data = self.socket.recv(65536)
        self.buffer += data
        return bool(data)

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            assert self.read_more(), f"the connection ended after {self.buffer[:200]!r}"
        found, self.buffer = self.buffer.split(mark, 1)
        return found

    def read_head(self) -> tuple[int, dict[str, str]]:
        lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3}) [ -~]+", lines[0])
        assert match, lines[0]
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, separator, value = line.partition(": ")
            assert separator and re.fullmatch(r"[A-Za-z0-9-]+", name) and name.lower() not in headers, line
            headers[name.lower()] = value
        return int(match[1]), headers

    def read_response(self, method: str = "GET"):
        """(status, headers, body); JSON bodies are parsed, and errors must have the documented shape."""
        status, headers = self.read_head()
        if status == 100:
            return status, headers, b""
        assert ("content-length" in headers) != ("transfer-encoding" in headers) or status == 204, headers
        assert "server" not in headers and "date" in headers
        if method == "HEAD" or status == 204:
            return status, headers, b""
        if "transfer-encoding" in headers:
            body = b"".join(self.read_chunks())
        else:
            size = int(headers["content-length"])
            while len(self.buffer) < size:
                assert self.read_more(), "the connection ended inside a body"
            body, self.buffer = self.buffer[:size], self.buffer[size:]
        if headers.get("content-type") == "application/json":
            body = json.loads(body)
            if status >= 400 and "status" not in body and body.get("type") != "error":  # Anthropic's has it
                check_error(body["error"])
        return status, headers, body

    def read_chunks(self):
        """The chunks of a chunked body, as they come."""
        while size := int(self.read_until(b"\r\n"), 16):
            while len(self.buffer) < size + 2:
                assert self.read_more(), "the connection ended inside a chunk"
            chunk, end, self.buffer = self.buffer[:size], self.buffer[size : size + 2], self.buffer[size + 2 :]
            assert end == b"\r\n"
            yield chunk
        assert self.read_until(b"\r\n") == b""

    def exchange(self, data: bytes, method: str = "GET"):
        """(status, headers, body) of a request given as bytes."""
        self.send(data)
        return self.read_response(method)

    def read_rest(self) -> bytes:
        """Everything until the server closes the connection."""
        while self.read_more():
            pass
        rest, self.buffer = self.buffer, b""
        return rest

    def at_end(self) -> bool:
        """True if the server has closed the connection and nothing is left to read."""
        try:
            return not self.buffer and not self.read_more()
        except ConnectionResetError:
            return True


def ask(server, method: str, path: str, body=None, **headers: str):
    """(status, headers, body) of one request to a server in this process, on a connection of its own."""
    with RawConnection(server.port) as raw:
        return raw.request(method, path, body, headers)


def check_error(error: dict) -> None:
    """The shape that OpenAI's clients parse."""
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    assert error["param"] is None or isinstance(error["param"], str)
    assert isinstance(error["code"], str)


def parse_events(body: bytes) -> list:
    """The `data:` payloads of an SSE body, parsed; the last must be [DONE] or an error."""
    events = []
    for block in body.decode("ascii").split("\n\n")[:-1]:
        if not block.startswith(":"):
            assert block.startswith("data: ") and "\n" not in block, block
            events.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
    assert events[-1] == "[DONE]" or "error" in events[-1]
    return events


def streamed_text(events: list) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in events if isinstance(chunk, dict)
                   for choice in chunk.get("choices", ()))
