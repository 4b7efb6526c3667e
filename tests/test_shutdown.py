"""The end of a server process: draining, the drain's end, a second signal, and an engine that dies."""
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import rustinfer
from harness import (REFERENCES, ROOT, RawConnection, ServerProcess, chat_body, local_server, parse_events,
                     server_whose_model, slowed, streamed_text, wait_for)

CHAT = "/v1/chat/completions"


def start(server, stream: bool = True, max_tokens: int = 30) -> RawConnection:
    """A request that is known to run."""
    raw = RawConnection(server.port)
    raw.send_request("POST", CHAT, chat_body(stream=stream, max_tokens=max_tokens, ignore_eos=True))
    if stream:
        assert raw.read_head()[0] == 200
    else:
        wait_for(lambda: server.get("/v1/metrics")[2]["engine"]["num_requests_running"] > 0)
    return raw


def test_running_requests_finish_and_new_ones_are_refused(tmp_path):
    with server_whose_model("time.sleep(0.03)", tmp_path) as server:
        stream, whole, idle = start(server), start(server, stream=False), RawConnection(server.port)
        idle.request("GET", "/health")
        server.process.terminate()
        wait_for(lambda: server.get("/ready")[2]["status"] == "draining")
        assert server.get("/ready")[::2] == (503, {"status": "draining", "model_loaded": True})
        assert server.get("/health")[0] == 200
        for status, headers, body in (server.chat(), server.get("/v1/models")):
            assert (status, body["error"]["code"], body["error"]["type"]) == (503, "shutting_down", "server_error")
            assert 0 < int(headers["retry-after"]) <= 120 and headers["connection"] == "close"
        events = parse_events(b"".join(stream.read_chunks()))
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
        assert streamed_text(events)
        assert whole.read_response()[2]["usage"]["completion_tokens"] == 30
        assert server.process.wait(5) == 0
        assert idle.at_end()
        assert "stopped" in server.read_log()


def test_when_the_drain_time_is_over_streams_end_with_an_error_event(tmp_path):
    with server_whose_model("time.sleep(0.03)", tmp_path, "--drain-timeout", "0.3") as server:
        stream, whole = start(server, max_tokens=1000), start(server, stream=False, max_tokens=1000)
        started = time.monotonic()
        server.process.terminate()
        last = parse_events(b"".join(stream.read_chunks()))[-1]
        assert (last["error"]["code"], last["error"]["type"]) == ("shutting_down", "server_error")
        status, headers, body = whole.read_response()
        assert (status, body["error"]["code"]) == (503, "shutting_down") and headers["retry-after"]
        assert server.process.wait(5) == 0
        assert 0.3 < time.monotonic() - started < 3


def test_a_stream_that_still_waits_when_the_drain_ends_gets_a_status(tmp_path):
    with server_whose_model("time.sleep(0.03)", tmp_path, "--drain-timeout", "0.1", "--max-num-seqs", "1") as server:
        running = start(server, max_tokens=1000)  # noqa: F841 -- a socket without a name is closed
        with RawConnection(server.port) as waiting:
            waiting.send_request("POST", CHAT, chat_body(stream=True))
            wait_for(lambda: server.get("/v1/metrics")[2]["engine"]["num_requests_waiting"] == 1)
            server.process.terminate()
            status, headers, body = waiting.read_response()
        assert (status, body["error"]["code"]) == (503, "shutting_down") and headers["retry-after"]
        assert server.process.wait(5) == 0


@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT")])
def test_a_second_signal_ends_the_process_at_once(tmp_path, first, second):
    with server_whose_model("time.sleep(0.03)", tmp_path) as server:
        running = start(server, max_tokens=1000)  # noqa: F841 -- a socket without a name is closed
        server.process.send_signal(getattr(signal, first))
        wait_for(lambda: server.get("/ready")[2]["status"] == "draining")
        started = time.monotonic()
        server.process.send_signal(getattr(signal, second))
        assert server.process.wait(5) == 1
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_with_0(number):
    with ServerProcess("--device", "cpu", model=REFERENCES / "llama3-tied") as server:
        with RawConnection(server.port) as idle, RawConnection(server.port) as half:
            idle.request("GET", "/health")
            half.send(b"GET /hea")
            started = time.monotonic()
            server.process.send_signal(number)
            assert server.process.wait(5) == 0
            assert time.monotonic() - started < 2


def test_a_signal_that_comes_when_everything_is_stopped_changes_nothing():
    with ServerProcess("--device", "cpu", model=REFERENCES / "llama3-tied") as server:
        server.process.terminate()
        wait_for(lambda: "stopped" in server.read_log())
        while server.process.poll() is None:  # Python's own end takes some milliseconds
            server.process.terminate()
        assert server.process.wait() == 0


def test_a_signal_while_the_model_loads_ends_with_0(tmp_path):
    script = tmp_path / "slow_load.py"
    script.write_text(f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport rustinfer\n"
                      "rustinfer.Llama.load = lambda self, *_: [time.sleep(0.05) for _ in range(1200)]\n"
                      "sys.exit(rustinfer.main())\n")
    with ServerProcess("--device", "cpu", model=REFERENCES / "llama3-tied", script=script, wait=False) as server:
        assert server.get("/ready")[::2] == (503, {"status": "loading", "model_loaded": False})
        assert server.get("/health")[0] == 200
        status, headers, body = server.chat()
        assert (status, body["error"]["code"]) == (503, "model_loading") and headers["retry-after"]
        assert server.stop(5) == 0
        assert "Traceback" not in server.log


def test_what_swallows_the_exception_of_a_signal_is_imported_before_one_is_awaited():
    code = "import sys, rustinfer; sys.exit('numpy.random._generator' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.35, 0.5])
def test_a_signal_at_any_moment_of_the_start_leaves_no_traceback(delay):
    command = [sys.executable, str(ROOT / "rustinfer.py"), "--model", str(REFERENCES / "llama3-tied"), "--port", "0",
               "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode in (0, -signal.SIGTERM), errors  # before main runs, Python's own handling
    assert "Traceback" not in errors


def test_one_failed_step_fails_its_requests_and_the_engine_goes_on(tmp_path):
    with server_whose_model("assert next(runs) != 3, 'out of order'", tmp_path) as server:
        status, headers, body = server.chat(max_tokens=10, ignore_eos=True)
        assert (status, body["error"]["code"], headers["x-should-retry"]) == (500, "internal_error", "false")
        assert "out of order" not in body["error"]["message"]
        wait_for(lambda: "out of order" in server.read_log())
        assert server.chat(max_tokens=10, ignore_eos=True)[0] == 200 and server.get("/health")[0] == 200
        assert server.stop() == 0


def test_a_dead_engine_ends_the_process_with_1(tmp_path):
    with server_whose_model("assert next(runs) < 3, 'broken for good'", tmp_path) as server:
        with RawConnection(server.port) as raw:
            for _ in range(3):
                with contextlib.suppress(AssertionError, OSError):  # the last ones may find the door closed
                    assert raw.request("POST", CHAT, chat_body(max_tokens=10, ignore_eos=True))[0] == 500
        assert server.process.wait(10) == 1
        wait_for(lambda: "broken for good" in server.read_log())


def test_a_dead_engine_turns_health_and_ready_to_503():
    with rustinfer.LLM(REFERENCES / "llama3-tied",
                       device="cpu") as llm, local_server(llm) as server, RawConnection(server.port) as raw:
        llm.engine.scheduler.schedule = lambda: 1 // 0
        status, _, body = raw.request("POST", CHAT, chat_body())
        assert (status, body["error"]["type"]) == (500, "server_error")
        wait_for(lambda: llm.engine.dead)
        assert raw.request("GET", "/health")[::2] == (503, {"status": "unhealthy", "service": "rustinfer-server"})
        assert raw.request("GET", "/ready")[::2] == (503, {"status": "failed", "model_loaded": False})
        assert raw.request("POST", CHAT, chat_body())[0] == 503


class TestServerInAProgram:
    def test_stop_waits_for_running_requests_then_frees_the_port(self, tiny_llm):
        server = rustinfer.Server(tiny_llm, port=0)
        with slowed(tiny_llm, 0.02), RawConnection(server.port) as raw:
            raw.send_request("POST", CHAT, chat_body(stream=True, max_tokens=20, ignore_eos=True))
            raw.read_head()
            server.stop()
            assert parse_events(b"".join(raw.read_chunks()))[-1] == "[DONE]"
        server.stop()  # a second time is nothing
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 1)
        with rustinfer.Server(tiny_llm, port=server.port) as again:
            assert again.port == server.port

    def test_several_threads_may_stop_it_and_each_returns_when_it_has_stopped(self, tiny_llm):
        server = rustinfer.Server(tiny_llm, port=0)
        with slowed(tiny_llm, 0.02), RawConnection(server.port) as raw, ThreadPoolExecutor(4) as pool:
            raw.send_request("POST", CHAT, chat_body(stream=True, max_tokens=20, ignore_eos=True))
            raw.read_head()
            for stopped in [pool.submit(server.stop) for _ in range(4)]:
                stopped.result(20)
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", server.port), 1)
            assert parse_events(b"".join(raw.read_chunks()))[-1] == "[DONE]"

    def test_starting_and_stopping_leaves_no_thread(self, tiny_llm):
        before = set(threading.enumerate())
        for _ in range(5):
            with rustinfer.Server(tiny_llm, port=0) as server, RawConnection(server.port) as raw:
                assert raw.request("POST", CHAT, chat_body(max_tokens=2))[0] == 200
        wait_for(lambda: set(threading.enumerate()) <= before)

    def test_a_server_whose_model_was_closed_is_not_ready(self):
        llm = rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu")
        with rustinfer.Server(llm, port=0) as server, RawConnection(server.port) as raw:
            assert raw.request("GET", "/ready")[0] == 200
            llm.close()
            assert raw.request("GET", "/ready")[::2] == (503, {"status": "failed", "model_loaded": False})
            assert raw.request("POST", CHAT, chat_body())[0] == 503

    def test_the_model_outlives_its_server(self, tiny_llm):
        with rustinfer.Server(tiny_llm, port=0):
            pass
        assert tiny_llm.generate("Hello", max_tokens=2)
