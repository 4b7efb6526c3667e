"""Server-sent events: framing, order and timing of chunks, and the same text as without streaming."""
import json
import re
import threading
import time
import urllib.parse

import pytest
import rustinfer
from harness import RawConnection, chat_body, local_server, parse_events, slowed, streamed_text

CHAT = "/v1/chat/completions"


def ask(port: int, stream: bool = True, text: str = "Hello", **fields):
    """(status, headers, events or body) of a chat on a connection of its own."""
    fields = {"max_tokens": 12, "ignore_eos": True, "temperature": 0, **fields}
    with RawConnection(port) as raw:
        status, headers, body = raw.request("POST", CHAT, chat_body(text, stream=stream, **fields))
        return status, headers, parse_events(body) if stream and status == 200 else body


def ask_text(port: int, stream: bool, **fields) -> tuple[str, str]:
    """(text, finish_reason), streaming or not."""
    body = ask(port, stream, **fields)[2]
    if stream:
        return streamed_text(body), next(chunk["choices"][0]["finish_reason"] for chunk in body[-2::-1]
                                         if chunk["choices"])
    return body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]


def query(**fields) -> str:
    return CHAT + "?" + urllib.parse.urlencode({name: value if isinstance(value, str) else json.dumps(value) for name,
                                                value in fields.items()})


class TestFraming:
    def test_headers_are_those_of_an_event_stream(self, tiny_server):
        status, headers, _ = ask(tiny_server.port)
        assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"
        assert headers["transfer-encoding"] == "chunked" and headers["x-request-id"]

    def test_role_comes_once_and_first_then_text_then_the_reason_then_done(self, tiny_server):
        *chunks, done = ask(tiny_server.port)[2]
        assert done == "[DONE]"
        assert chunks[0]["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                         "finish_reason": None}]
        for chunk in chunks[1:-1]:
            [choice] = chunk["choices"]
            assert set(choice["delta"]) == {"content"} and choice["delta"]["content"]
            assert choice["finish_reason"] is None
        assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]

    def test_all_chunks_share_id_created_and_model_and_none_has_usage(self, tiny_server):
        *chunks, _ = ask(tiny_server.port)[2]
        assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
        assert chunks[0]["object"] == "chat.completion.chunk" and chunks[0]["model"] == "llama3-tied"
        assert not any("usage" in chunk for chunk in chunks)

    def test_usage_comes_last_when_asked_for_and_is_null_elsewhere(self, tiny_server):
        *chunks, usage, done = ask(tiny_server.port, stream_options={"include_usage": True})[2]
        assert done == "[DONE]" and usage["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
        assert usage["usage"]["completion_tokens"] == 12
        assert usage["usage"]["performance"]["decode_iterations"] == 11
        assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + 12

    def test_two_answers_have_different_ids(self, tiny_server):
        assert ask(tiny_server.port)[2][0]["id"] != ask(tiny_server.port)[2][0]["id"]

    def test_the_connection_goes_on_after_a_stream(self, tiny_server):
        with RawConnection(tiny_server.port) as raw:
            for _ in range(2):
                assert raw.request("POST", CHAT, chat_body(stream=True, max_tokens=3))[0] == 200
            assert raw.request("GET", "/health")[0] == 200

    def test_http_1_0_gets_a_stream_that_ends_with_the_connection(self, tiny_server):
        body = json.dumps(chat_body(stream=True, max_tokens=3)).encode()
        with RawConnection(tiny_server.port) as raw:
            raw.send(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            status, headers = raw.read_head()
            assert status == 200 and "transfer-encoding" not in headers and headers["connection"] == "close"
            assert parse_events(raw.read_rest())[-1] == "[DONE]"

    @pytest.mark.parametrize("fields, status", [
        ({"model": "other"}, 404), ({"n": 9}, 400), ({"max_tokens": 5000}, 400), ({"messages": []}, 400)])
    def test_an_error_before_the_stream_has_a_status_of_its_own(self, tiny_server, fields, status):
        found, headers, body = ask(tiny_server.port, **fields) if "messages" not in fields else tiny_server.request(
            "POST", CHAT, {"stream": True, **fields})
        assert found == status and headers["content-type"] == "application/json" and body["error"]["message"]


class TestTiming:
    def test_tokens_are_sent_as_they_are_drawn(self, tiny_llm):
        with slowed(tiny_llm, 0.02), local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            started = time.monotonic()
            raw.send_request("POST", CHAT, chat_body(stream=True, max_tokens=50, ignore_eos=True, temperature=0))
            raw.read_head()
            times = [time.monotonic() - started for _ in raw.read_chunks()]
        assert times[0] < 0.5 < 0.9 < times[-1]
        assert len(times) > 20 and max(after - before for before, after in zip(times, times[1:])) < 0.5

    def test_writes_of_a_fast_stream_are_bundled(self, tiny_server):
        with RawConnection(tiny_server.port) as raw:
            raw.send_request("POST", CHAT, chat_body(stream=True, max_tokens=200, ignore_eos=True))
            raw.read_head()
            started, chunks = time.monotonic(), list(raw.read_chunks())
        assert len(chunks) <= (time.monotonic() - started) / 0.02 + 4

    def test_pings_keep_a_silent_stream_awake(self, tiny_llm, monkeypatch):
        monkeypatch.setattr(rustinfer, "PING_INTERVAL", 0.05)
        with slowed(tiny_llm, 1), local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            raw.send_request("POST", CHAT, chat_body(stream=True, max_tokens=2, ignore_eos=True))
            raw.read_head()
            chunks = list(raw.read_chunks())
        body = b"".join(chunks)
        assert 4 <= chunks.count(b": ping\n\n") <= 40  # a busy machine has fewer
        assert parse_events(body)[-1] == "[DONE]" and b"\nid:" not in body

    def test_text_that_is_held_back_causes_no_pings(self, tiny_server):
        text = ask_text(tiny_server.port, False, max_tokens=100, temperature=1, seed=3)[0]
        with RawConnection(tiny_server.port) as raw:
            body = raw.request("POST", CHAT, chat_body(
                stream=True, max_tokens=100, ignore_eos=True, temperature=1, seed=3, stop=text + "never"))[2]
        assert b": ping" not in body and streamed_text(parse_events(body)) == text


class TestSameText:
    @pytest.mark.parametrize("fields", [{}, {"temperature": 1, "seed": 1},
                                        {"temperature": 1.5, "seed": 2, "top_p": 0.9},
                                        {"temperature": 1, "seed": 3, "top_k": 5}])
    def test_streamed_text_is_the_unstreamed_text(self, tiny_server, fields):
        fields = {"max_tokens": 120, **fields}
        assert ask_text(tiny_server.port, True, **fields) == ask_text(tiny_server.port, False, **fields)

    @pytest.mark.parametrize("seed", range(5))
    def test_stop_strings_end_the_text_wherever_tokens_meet(self, tiny_server, seed):
        fields = {"max_tokens": 60, "temperature": 1, "seed": seed}
        text = ask_text(tiny_server.port, False, **fields)[0]
        for start in range(0, len(text) - 4, 9):
            stop = text[start : start + 3]
            wanted = (text[: text.index(stop)], "stop")
            assert ask_text(tiny_server.port, False, stop=["never in it", stop], **fields) == wanted
            assert ask_text(tiny_server.port, True, stop=stop, **fields) == wanted

    def test_a_stop_string_ends_the_count_too(self, tiny_server):
        fields = {"max_tokens": 200, "temperature": 1, "seed": 5}
        whole = ask(tiny_server.port, False, **fields)[2]
        body = ask(tiny_server.port, False, stop=whole["choices"][0]["message"]["content"][10:13], **fields)[2]
        assert body["usage"]["completion_tokens"] < 100 and body["choices"][0]["finish_reason"] == "stop"

    @pytest.mark.parametrize("text", ["naïve Привет 日本語", "👩‍👩‍👧 😀", "a\u2028b\r\n\x00", "ﷺ\u0301"])
    def test_characters_of_many_bytes_are_never_split(self, tiny_llm, text):
        tokens, runner = iter(tiny_llm.tokenizer.encode(text)), tiny_llm.engine._runner
        run, length = runner.launch, len(tiny_llm.tokenizer.encode(text))
        with slowed(tiny_llm, 0.02), local_server(tiny_llm) as server:
            runner.launch = lambda step: [drawn and drawn._replace(token_id=next(tokens)) for drawn in run(step)]
            *chunks, _ = ask(server.port, max_tokens=length)[2]
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(pieces) == text and len([piece for piece in pieces if piece]) <= len(text)

    @pytest.mark.parametrize("text", ["Hello", "Привет", "你好"])
    def test_the_demo_model_says_the_same_streaming_or_not(self, demo_server, text):
        fields = {"text": text, "max_tokens": 60, "ignore_eos": False}
        assert ask_text(demo_server.port, True, **fields) == ask_text(demo_server.port, False, **fields)

    def test_64_streams_at_once_say_what_each_says_alone(self, tiny_server):
        jobs = [{"text": "word " * (number * 7 % 150 + 1), "max_tokens": 10 + number % 7,
                 **({"temperature": 1, "seed": number} if number % 2 else {})} for number in range(64)]
        alone = [ask_text(tiny_server.port, False, **job) for job in jobs]
        together: list = [None] * 64

        def run(number: int) -> None:
            together[number] = ask_text(tiny_server.port, True, **jobs[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone


class TestEventSource:
    MESSAGES = [{"role": "user", "content": "Hello & 100 % of «it»"}]

    def test_get_streams_the_same_events(self, tiny_server):
        path = query(model="llama3-tied", messages=self.MESSAGES, max_tokens=12, temperature=0, ignore_eos=True,
                     stream=True)
        status, headers, body = tiny_server.get(path, Accept="text/event-stream")
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        assert streamed_text(parse_events(body)) == ask_text(tiny_server.port, True,
                                                             text=self.MESSAGES[0]["content"])[0]

    def test_it_streams_unless_told_not_to(self, tiny_server):
        fields = {"messages": self.MESSAGES, "max_tokens": 2}
        assert tiny_server.get(query(**fields))[1]["content-type"].startswith("text/event-stream")
        assert tiny_server.get(query(**fields, stream=False))[2]["object"] == "chat.completion"

    def test_usage_and_stop_work_too(self, tiny_server):
        events = parse_events(tiny_server.get(query(messages=self.MESSAGES, max_tokens=2, stop=["x", "y"],
                                                    stream_options={"include_usage": True}))[2])
        assert events[-2]["usage"]["prompt_tokens"] > 0

    @pytest.mark.parametrize("path, param", [
        (CHAT, "messages"), (query(messages="hi"), "messages"),
        (query(messages=MESSAGES, max_tokens="x"), "max_tokens"),
        (query(messages=MESSAGES, n=9), "n"), (query(messages=MESSAGES, what="x"), "what"),
        (query(messages=MESSAGES, temperature=9), "temperature"),
        (CHAT + "?messages", None), (CHAT + "?messages=%ff", None)])
    def test_errors_are_400_and_name_the_parameter(self, tiny_server, path, param):
        status, _, body = tiny_server.get(path)
        assert status == 400 and body["error"]["param"] == param

    def test_an_unknown_model_is_404(self, tiny_server):
        assert tiny_server.get(query(messages=self.MESSAGES, model="gpt-4"))[2]["error"]["code"] == "model_not_found"


class TestEngineErrors:
    def test_before_the_first_byte_the_status_is_500(self, tiny_llm):
        with local_server(tiny_llm) as server:
            tiny_llm.engine._runner.launch = lambda step: 1 // 0
            status, headers, body = ask(server.port)
            del tiny_llm.engine._runner.launch
            assert status == 500 and headers["x-should-retry"] == "false" and body["error"]["type"] == "server_error"
            assert ask(server.port)[0] == 200

    def test_after_it_an_error_event_ends_the_stream(self, tiny_llm):
        run, steps = tiny_llm.engine._runner.launch, iter(range(100))

        def run_then_fail(step):
            time.sleep(0.03)
            return run(step) if next(steps) < 5 else 1 // 0

        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            tiny_llm.engine._runner.launch = run_then_fail
            status, _, body = raw.request("POST", CHAT, chat_body(stream=True, max_tokens=50, ignore_eos=True))
            del tiny_llm.engine._runner.launch
            *chunks, last = parse_events(body)
            assert status == 200 and raw.at_end()
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "internal_error")
            assert b"[DONE]" not in body
            assert not re.search(r"division|0x", last["error"]["message"])
            assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
            assert ask(server.port)[0] == 200
