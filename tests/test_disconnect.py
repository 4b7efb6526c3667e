"""Clients that leave: their work ends and their KV blocks are free within 100 ms or two steps."""
import socket
import threading
import time

import pytest
import rustinfer
from harness import REFERENCES, RawConnection, chat_body, local_server, slowed, wait_for

STEP = 0.03  # seconds that a step takes here
LIMIT = 0.1 + 3 * STEP  # 100 ms or two steps, whichever is later; and the step's own time
CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm():
    """One sequence at a time, few tokens a step, slowly: requests queue, prompts prefill over many steps."""
    config = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "no_prefix_caching": True}
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu", **config) as llm, slowed(llm, STEP):
        yield llm


@pytest.fixture
def server(llm):
    with local_server(llm) as server:
        yield server
    wait_for(lambda: state(llm) == (0, 0, 0))


def state(llm) -> tuple[int, int, int]:
    """Requests running, requests waiting, KV blocks in use."""
    snapshot = llm.engine.snapshot()
    return snapshot["num_requests_running"], snapshot["num_requests_waiting"], snapshot["kv_blocks_used"]


def start(server, stream: bool, text: str = "Hi", **fields) -> RawConnection:
    raw = RawConnection(server.port)
    raw.send_request("POST", CHAT, chat_body(text, stream=stream, **{**LONG, **fields}))
    return raw


def wait_for_decode(llm) -> None:
    wait_for(lambda: any(seq.num_output_tokens > 1 for seq in list(llm.engine.scheduler.running)))


def leave(raw: RawConnection, how: str) -> None:
    """Close the socket, send only a FIN, or reset the connection."""
    if how == "fin":
        raw.socket.shutdown(socket.SHUT_WR)
    else:
        if how == "reset":
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.socket.close()


LEAVING = pytest.mark.parametrize("how", ["close", "fin", "reset"])
STREAMING = pytest.mark.parametrize("stream", [True, False])


@LEAVING
@STREAMING
def test_leaving_in_decode_frees_the_blocks(server, llm, stream, how):
    raw = start(server, stream)
    wait_for_decode(llm)
    leave(raw, how)
    assert wait_for(lambda: state(llm) == (0, 0, 0)) < LIMIT
    raw.socket.close()


@LEAVING
@STREAMING
def test_leaving_in_prefill_frees_the_blocks(server, llm, stream, how):
    raw = start(server, stream, "word " * 200, max_tokens=5)
    wait_for(lambda: state(llm)[0] == 1)
    assert not any(seq.num_output_tokens for seq in llm.engine.scheduler.running)
    leave(raw, how)
    assert wait_for(lambda: state(llm) == (0, 0, 0)) < LIMIT
    raw.socket.close()


@LEAVING
@STREAMING
def test_leaving_the_queue_makes_room_in_it(server, llm, stream, how):
    first = start(server, True)
    wait_for_decode(llm)
    second = start(server, stream)
    wait_for(lambda: state(llm)[:2] == (1, 1))
    leave(second, how)
    assert wait_for(lambda: state(llm)[:2] == (1, 0)) < LIMIT
    assert state(llm)[2] > 0  # the one that stayed goes on
    second.socket.close()
    first.socket.close()


def test_the_request_that_waited_runs_when_the_one_before_it_leaves(server, llm):
    first = start(server, True)
    wait_for_decode(llm)
    with start(server, False, max_tokens=2) as second:
        leave(first, "close")
        assert second.read_response()[2]["usage"]["completion_tokens"] == 2


def test_leaving_an_event_source_frees_the_blocks(server, llm):
    with RawConnection(server.port) as raw:
        messages = "%5B%7B%22role%22:%22user%22,%22content%22:%22x%22%7D%5D"
        raw.send_request("GET", f"{CHAT}?max_tokens=1000&messages={messages}")
        wait_for_decode(llm)
    assert wait_for(lambda: state(llm) == (0, 0, 0)) < LIMIT


@STREAMING
def test_pipelined_bytes_are_not_leaving(server, llm, stream):
    with start(server, stream, max_tokens=12) as raw:
        raw.send_request("GET", "/health")
        status, _, body = raw.read_response()
        assert status == 200 and (b"[DONE]" in body if stream else body["usage"]["completion_tokens"] == 12)
        assert raw.read_response()[2]["status"] == "healthy"


def test_a_client_that_pipelines_and_then_leaves_is_noticed(server, llm):
    raw = start(server, False)
    raw.send_request("GET", "/health")
    wait_for_decode(llm)
    leave(raw, "close")
    assert wait_for(lambda: state(llm) == (0, 0, 0)) < LIMIT


def test_leaving_is_logged_with_what_was_done(server, llm, caplog):
    caplog.set_level("INFO", "rustinfer")
    raw = start(server, False)
    wait_for_decode(llm)
    leave(raw, "close")
    wait_for(lambda: any("error=client_left" in record.message for record in caplog.records))
    [line] = [record.message for record in caplog.records if "error=client_left" in record.message]
    assert "finish=abort" in line and "prompt=" in line


def test_a_body_that_never_comes_is_noticed(server):
    raw = RawConnection(server.port)
    raw.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    wait_for(lambda: any(handler.busy for handler in list(server.connections)))
    raw.socket.close()
    assert wait_for(lambda: not server.connections) < 0.5


def test_64_clients_that_leave_at_once_leave_nothing_behind(server, llm):
    clients = [start(server, number % 2 == 0) for number in range(64)]
    wait_for(lambda: sum(state(llm)[:2]) == 64)
    for raw in clients:
        leave(raw, "close")
    assert wait_for(lambda: state(llm) == (0, 0, 0)) < LIMIT + 0.5
    wait_for(lambda: not server.connections)


def test_a_slow_reader_is_dropped_in_the_end(tiny_llm, monkeypatch):
    monkeypatch.setattr(rustinfer.ChatReply, "text_event", lambda self, place, text,
                        tokens: b"data: " + b"x" * 200_000 + b"\n\n")  # fills any buffer
    with local_server(tiny_llm, write_timeout=0.3) as server, start(server, True) as raw:
        raw.read_head()
        started = time.monotonic()
        wait_for(lambda: state(tiny_llm) == (0, 0, 0) and not server.connections)
        assert time.monotonic() - started < 5


def test_the_watcher_ignores_a_descriptor_that_was_given_to_another_connection():
    watcher, called = rustinfer.Watcher(), threading.Event()
    ours, theirs = socket.socketpair()
    watcher.add(ours, called.set)
    watcher.discard(ours)
    theirs.close()
    assert not called.wait(0.1)
    watcher.add(ours, called.set)
    assert called.wait(1)
    watcher.close()
    ours.close()
