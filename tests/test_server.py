"""Server: routes, framing, limits, CORS and logging, by raw bytes against a real process."""
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import rustinfer
from harness import REFERENCES, ROOT, RawConnection, ServerProcess, chat_body, local_server, slowed, wait_for

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT = chat_body(max_tokens=2, ignore_eos=True)
MESSAGES = "%5B%7B%22role%22:%22user%22,%22content%22:%22x%22%7D%5D"
ROUTES = ("/health", "/ready", "/v1/metrics", "/v1/models", "/v1/models/llama3-tied", "/v1/chat/completions", "/")


def get(*lines: str, target: str = "/health", version: str = "HTTP/1.1") -> bytes:
    """A GET with more header lines."""
    head = "".join(f"{line}\r\n" for line in ("Host: localhost", *lines))
    return f"GET {target} {version}\r\n{head}\r\n".encode("latin-1")


def post(body: bytes, *lines: str, target: str = "/v1/chat/completions") -> bytes:
    """A POST whose framing is up to its header lines."""
    head = "".join(f"{line}\r\n" for line in ("Host: localhost", "Content-Type: application/json", *lines))
    return f"POST {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def chunked(body: bytes, size: int = 7) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.fixture
def raw(tiny_server):
    with RawConnection(tiny_server.port) as connection:
        yield connection


def refused(raw, data: bytes, status: int, code: str | None = None) -> None:
    """The answer is an error with this status, and the connection ends."""
    answer = raw.exchange(data)
    assert answer[0] == status, answer
    assert answer[1]["connection"] == "close"
    assert code is None or answer[2]["error"]["code"] == code
    assert raw.at_end()


class TestConnections:
    def test_a_connection_serves_many_requests(self, raw):
        for _ in range(3):
            status, headers, _ = raw.exchange(GET)
            assert status == 200 and "connection" not in headers
        assert raw.request("POST", "/v1/chat/completions", CHAT)[0] == 200
        assert raw.exchange(GET)[0] == 200

    @pytest.mark.parametrize("method, path, body, status", [
        ("GET", "/nope", None, 404), ("POST", "/nope", CHAT, 404), ("POST", "/health", CHAT, 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", {"messages": []}, 400),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "x"}, 404),
        ("DELETE", "/v1/models", b"x" * 1000, 405), ("GET", "/health", b"ignored", 200)])
    def test_a_connection_survives_an_error(self, raw, method, path, body, status):
        assert raw.request(method, path, body)[0] == status
        assert raw.exchange(GET)[0] == 200

    def test_a_large_body_that_no_route_reads_ends_the_connection_after_a_readable_answer(self, raw):
        status, headers, _ = raw.request("POST", "/nope", b"x" * 3_000_000)
        assert status == 404 and headers["connection"] == "close"
        assert raw.at_end()

    def test_a_chunked_body_that_no_route_reads_ends_the_connection(self, raw):
        refused(raw, post(chunked(b"x" * 500_000, 50_000), "Transfer-Encoding: chunked", target="/nope"), 404)

    def test_pipelined_requests_are_answered_in_order(self, raw):
        raw.send(GET + get(target="/nope") + post(b"{}", "Content-Length: 2") + GET)
        assert [raw.read_response()[0] for _ in range(4)] == [200, 404, 400, 200]

    def test_a_request_pipelined_behind_a_generation_waits_its_turn(self, raw):
        body = json.dumps({**CHAT, "max_tokens": 20}).encode()
        raw.send(post(body, f"Content-Length: {len(body)}") + GET)
        status, _, answer = raw.read_response()
        assert status == 200 and answer["usage"]["completion_tokens"] == 20
        assert raw.read_response()[2]["status"] == "healthy"

    @pytest.mark.parametrize("lines", [["Connection: close"], ["Connection: keep-alive, Close"],
                                       ["Connection: x", "Connection: close"],
                                       ["Connection:close , te"]])
    def test_close_among_the_connection_tokens_is_honoured(self, raw, lines):
        status, headers, _ = raw.exchange(get(*lines))
        assert status == 200 and headers["connection"] == "close" and raw.at_end()

    def test_other_connection_tokens_keep_it_open(self, raw):
        assert raw.exchange(get("Connection: keep-alive, TE, closed"))[0] == 200
        assert raw.exchange(GET)[0] == 200

    @pytest.mark.parametrize("connection", ["Connection: keep-alive", "X-Other: 1"])
    def test_http_1_0_gets_one_answer(self, raw, connection):
        raw.send(f"GET /health HTTP/1.0\r\n{connection}\r\n\r\n".encode())
        status, headers, body = raw.read_response()
        assert status == 200 and body["status"] == "healthy" and headers["connection"] == "close" and raw.at_end()

    def test_bytes_may_come_one_by_one(self, raw):
        body = json.dumps(CHAT).encode()
        for byte in post(body, f"Content-Length: {len(body)}"):
            raw.send(bytes([byte]))
        assert raw.read_response()[0] == 200

    def test_empty_lines_before_a_request_are_skipped(self, raw):
        assert raw.exchange(b"\r\n" + GET)[0] == 200
        assert raw.exchange(b"\r\n\r\n\r\n" + GET)[0] == 200
        raw.send(b"\r\n\r")
        time.sleep(0.02)
        assert raw.exchange(b"\n" + GET)[0] == 200

    def test_empty_lines_do_not_hide_a_long_request_line(self, raw):
        refused(raw, b"\r\n" + get(target="/" + "x" * 9000), 414)


class TestMethods:
    @pytest.mark.parametrize("path", [*ROUTES, "/nope"])
    def test_head_is_get_without_the_body(self, raw, path):
        expected, head = raw.request("GET", path), raw.request("HEAD", path)
        if path != "/v1/chat/completions":
            assert head[0] == expected[0] and head[1].get("content-type") == expected[1].get("content-type")
            assert path == "/v1/metrics" or head[1]["content-length"] == expected[1]["content-length"]
        assert raw.exchange(GET)[0] == 200  # no stray body

    def test_head_of_a_stream_starts_no_generation(self, tiny_server, raw):
        before = tiny_server.get("/v1/metrics")[2]["engine"]["prompt_tokens"]
        status, headers, _ = raw.request("HEAD", "/v1/chat/completions?messages=" + MESSAGES)
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        assert tiny_server.get("/v1/metrics")[2]["engine"]["prompt_tokens"] == before

    @pytest.mark.parametrize("path", [*ROUTES, "*"])
    def test_options_names_the_methods(self, raw, path):
        status, headers, body = raw.request("OPTIONS", path)
        assert status == 204 and body == b"" and "content-length" not in headers
        allow = headers["allow"].split(", ")
        assert "OPTIONS" in allow and ("GET" in allow) == (path != "*")
        assert ("POST" in allow) == (path == "/v1/chat/completions")
        assert raw.exchange(GET)[0] == 200

    @pytest.mark.parametrize("path", ROUTES)
    @pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "BREW", "get"])
    def test_other_methods_are_405_with_allow(self, raw, path, method):
        status, headers, body = raw.request(method, path)
        assert (status, body["error"]["code"]) == (405, "method_not_allowed")
        assert "GET" in headers["allow"] and "OPTIONS" in headers["allow"]

    @pytest.mark.parametrize("path", [path for path in ROUTES if path != "/v1/chat/completions"])
    def test_post_is_405_where_there_is_nothing_to_post(self, raw, path):
        status, headers, body = raw.request("POST", path, {})
        assert (status, body["error"]["code"], headers["allow"]) == (405, "method_not_allowed", "GET, HEAD, OPTIONS")

    @pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "BREW"])
    @pytest.mark.parametrize("path", [
        "/nope", "//health", "/health/", "/Health", "/%68ealth", "/v1", "/v1/", "/v1/models;x",
        "/v1/chat/completions/", "/./health",
        "/v1/../health", "/v1//models", "/health%00", "/v1/chat%2Fcompletions", "http://h//health"])
    def test_unknown_paths_are_404_on_the_exact_raw_path(self, raw, method, path):
        status, _, body = raw.request(method, path, {} if method == "POST" else None)
        assert (status, body["error"]["code"], body["error"]["type"]) == (404, "not_found", "invalid_request_error")

    @pytest.mark.parametrize("target", ["http://h/health", "HTTP://example.org:80/health", "https://h/health?x=1",
                                        "/health?a=b&c", "/health?"])
    def test_absolute_targets_and_queries_reach_the_path(self, raw, target):
        assert raw.exchange(get(target=target))[2]["status"] == "healthy"

    def test_an_absolute_target_without_a_path_is_the_root(self, raw):
        assert raw.exchange(get(target="http://h"))[0] == 200


class TestFraming:
    @pytest.mark.parametrize("data", [
        b"GET /health\r\n\r\n", b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health  HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1 \r\nHost: localhost\r\n\r\n", b" GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET\t/health\tHTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /hea lth HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /h\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /h\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"G(T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health#a HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET ftp://h/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT h:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: h\n\n", b"GET /health HTTP/1.1\r\nHost: h\nX: y\r\n\r\n",
        b"GET /health HTTP/1.1\rHost: localhost\r\r\n\r\n",
        b"GET /health HTTPS/1.1\r\nHost: localhost\r\n\r\n", b"GET /health http/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/11.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"])
    def test_a_broken_head_is_400_and_ends_the_connection(self, raw, data):
        refused(raw, data, 400, "invalid_value")

    @pytest.mark.parametrize("version", ["HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/3.0"])
    def test_other_versions_are_505(self, raw, version):
        refused(raw, get(version=version), 505)

    @pytest.mark.parametrize("line", [
        "Foo", "Foo : y", "Foo\t: y", ": y", " Foo: y", "Foo: y\x00", "Foo: y\x7f", "Foo: a\rb", "F\xe9o: y",
        "Foo(: y", "Foo: y\r\n folded",
        "Foo: y\r\n\tfolded", "Foo: y\n", "Foo: \x0b", "Foo: \x1f"])
    def test_a_broken_header_line_is_400(self, raw, line):
        refused(raw, get(line), 400, "invalid_value")

    @pytest.mark.parametrize("line", ["Foo:", "Foo:  \t y \t ", "Foo: caf\xe9", "x-!#$%&'*+.^_`|~0: y"])
    def test_unusual_but_legal_header_lines_pass(self, raw, line):
        assert raw.exchange(get(line))[0] == 200

    @pytest.mark.parametrize("lines", [
        ["Content-Length: +5"], ["Content-Length: -5"], ["Content-Length: 1_0"], ["Content-Length: 0x5"],
        ["Content-Length: 5 5"],
        ["Content-Length: 5, 5"], ["Content-Length: 5.0"], ["Content-Length:"], ["Content-Length: five"],
        ["Content-Length: \xb2"],
        ["Content-Length: " + "9" * 19], ["Content-Length: 5", "Content-Length: 5"],
        ["Content-Length: 5", "content-length: 6"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked", "Content-Length: 0"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"]])
    def test_an_ambiguous_body_length_is_400(self, raw, lines):
        refused(raw, post(b"hello", *lines), 400, "invalid_value")

    @pytest.mark.parametrize("coding", ["gzip", "gzip, chunked", "chunked, chunked", "identity", "xchunked",
                                        "chunked;q=1", ""])
    def test_other_transfer_codings_are_501(self, raw, coding):
        refused(raw, post(b"0\r\n\r\n", f"Transfer-Encoding: {coding}"), 501)

    def test_transfer_encoding_in_http_1_0_is_400(self, raw):
        refused(raw, b"POST /v1/chat/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400)

    def test_a_post_without_a_length_has_an_empty_body(self, raw):
        status, _, body = raw.exchange(post(b""))
        assert (status, body["error"]["code"]) == (400, "invalid_json")

    def test_a_body_hides_no_second_request(self, raw):
        status, _, _ = raw.exchange(post(GET, f"Content-Length: {len(GET)}", target="/nope"))
        assert status == 404
        raw.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            raw.read_more()


class TestChunkedBodies:
    BODY = json.dumps(CHAT).encode()

    def send(self, raw, body: bytes):
        return raw.exchange(post(body, "Transfer-Encoding: chunked"))

    @pytest.mark.parametrize("body", [
        chunked(BODY), chunked(BODY, 1), chunked(BODY, 1000),
        b"%X;ext=1;b=\"c\"\r\n%s\r\n000\r\n\r\n" % (len(BODY), BODY),
        b"%x \r\n%s\r\n0\r\nTrailer: x\r\nOther: y\r\n\r\n" % (len(BODY), BODY)])
    def test_valid_ones_are_read_and_the_connection_goes_on(self, raw, body):
        assert self.send(raw, body)[0] == 200
        assert raw.exchange(GET)[0] == 200

    @pytest.mark.parametrize("body", [
        b"zz\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n", b"\r\nhello\r\n0\r\n\r\n",
        b"5_0\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n", b"4\r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n\r\n",
        b"123456789\r\nhello\r\n0\r\n\r\n",
        b"5;" + b"x" * 2000 + b"\r\nhello\r\n0\r\n\r\n", b"5;\x00\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nbad trailer\r\n\r\n",
        b"5\r\nhello\r\n0\r\nA : b\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b" 5\r\nhello\r\n0\r\n\r\n"])
    def test_broken_ones_are_400_and_end_the_connection(self, raw, body):
        refused(raw, post(body, "Transfer-Encoding: chunked"), 400, "invalid_value")

    def test_too_much_is_413(self, raw):
        refused(raw, post(b"400001\r\nx", "Transfer-Encoding: chunked"), 413, "request_too_large")

    def test_too_much_in_small_chunks_is_413(self, raw):
        chunk = b"80000\r\n" + b"x" * (1 << 19) + b"\r\n"
        refused(raw, post(chunk * 9, "Transfer-Encoding: chunked"), 413, "request_too_large")


class TestExpect:
    def test_continue_is_sent_before_the_body_is_read(self, raw):
        body = json.dumps(CHAT).encode()
        raw.send(post(b"", f"Content-Length: {len(body)}", "Expect: 100-Continue"))
        assert raw.read_response()[0] == 100
        assert raw.exchange(body)[0] == 200
        assert raw.exchange(GET)[0] == 200

    def test_no_continue_where_the_body_is_already_there(self, raw):
        body = json.dumps(CHAT).encode()
        assert raw.exchange(post(body, f"Content-Length: {len(body)}", "Expect: 100-continue"))[0] == 200

    @pytest.mark.parametrize("length, target, status",
                             [(5 << 20, "/v1/chat/completions", 413), (100, "/nope", 404), (100, "/health", 405)])
    def test_no_continue_before_path_and_size_are_checked(self, raw, length, target, status):
        refused(raw, post(b"", f"Content-Length: {length}", "Expect: 100-continue", target=target), status)


class TestLimits:
    def test_100_header_fields_pass_and_101_are_431(self, raw):
        assert raw.exchange(get(*(f"x-{i}: y" for i in range(99))))[0] == 200
        refused(raw, get(*(f"x-{i}: y" for i in range(100))), 431, "headers_too_large")

    def test_a_long_request_line_is_414(self, raw):
        assert raw.exchange(get(target="/health?" + "x" * 8000))[0] == 200
        refused(raw, get(target="/" + "x" * 9000), 414, "uri_too_long")

    def test_a_request_line_without_end_is_414(self, raw):
        refused(raw, b"GET /" + b"x" * 9000, 414, "uri_too_long")

    def test_a_large_head_is_431(self, raw):
        assert raw.exchange(get("x: " + "y" * 30_000))[0] == 200
        refused(raw, get("x: " + "y" * 33_000), 431, "headers_too_large")

    def test_a_head_without_end_is_431(self, raw):
        refused(raw, b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 6000, 431, "headers_too_large")

    def test_headers_of_blanks_take_linear_time(self, raw):
        started = time.monotonic()
        refused(raw, get("x: y" + " " * 31_000 + "\x01"), 400)
        assert time.monotonic() - started < 1

    @pytest.mark.parametrize("send_it", [True, False])
    def test_a_body_over_4_mib_is_413_and_readable(self, raw, send_it):
        size = (4 << 20) + 1
        raw.send(post(b"", f"Content-Length: {size}"))
        sender = threading.Thread(target=self.push, args=(raw.socket, size if send_it else 0))
        sender.start()
        status, _, body = raw.read_response()
        sender.join()
        assert (status, body["error"]["code"]) == (413, "request_too_large")

    @staticmethod
    def push(connection: socket.socket, size: int) -> None:
        connection.sendall(b"x" * size)

    def test_a_body_of_4_mib_is_read(self, raw):
        status, _, body = raw.request("POST", "/v1/chat/completions", b"x" * (4 << 20))
        assert (status, body["error"]["code"]) == (400, "invalid_json")

    def test_a_slow_head_is_408(self, tiny_llm, monkeypatch):
        monkeypatch.setattr(rustinfer, "HEAD_TIMEOUT", 0.3)
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            started = time.monotonic()
            for byte in b"GET /health HT":
                raw.send(bytes([byte]))
                time.sleep(0.02)
            refused(raw, b"", 408, "request_timeout")
            assert 0.25 < time.monotonic() - started < 3

    @pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
    def test_a_slow_body_is_408(self, tiny_llm, monkeypatch, framing):
        monkeypatch.setattr(rustinfer, "BODY_TIMEOUT", 0.3)
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            raw.send(post(b"3e", framing))
            started = time.monotonic()
            refused(raw, b"", 408, "request_timeout")
            assert 0.2 < time.monotonic() - started < 3

    def test_an_idle_connection_is_closed_without_an_answer(self, tiny_llm, monkeypatch):
        monkeypatch.setattr(rustinfer, "IDLE_TIMEOUT", 0.2)
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            assert raw.exchange(GET)[0] == 200
            assert raw.at_end()

    def test_an_announced_body_that_no_route_wants_is_not_waited_for_long(self, tiny_llm, monkeypatch):
        monkeypatch.setattr(rustinfer, "REST_TIMEOUT", 0.2)
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            assert raw.exchange(post(b"x", "Content-Length: 100", target="/nope"))[0] == 404
            assert raw.at_end()

    def test_a_client_that_never_reads_the_error_is_let_go(self, tiny_llm, monkeypatch):
        monkeypatch.setattr(rustinfer, "LINGER_TIMEOUT", 0.2)
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            raw.send(b"nonsense\r\n\r\n")
            wait_for(lambda: not server.connections, 3)


class TestConnectionCap:
    @pytest.fixture
    def server(self, tiny_llm):
        with slowed(tiny_llm, 0.02), local_server(tiny_llm, max_connections=8) as server:
            yield server

    def test_idle_connections_make_room_oldest_first(self, server):
        silent = [RawConnection(server.port) for _ in range(8)]
        wait_for(lambda: len(server.connections) == 8)
        with RawConnection(server.port) as raw:
            assert raw.exchange(GET)[0] == 200
        assert silent[0].at_end()
        silent[7].send(GET)
        assert silent[7].read_response()[0] == 200
        for connection in silent:
            connection.socket.close()

    def test_a_flood_of_silent_connections_leaves_the_server_reachable_and_small(self, server):
        flood = [RawConnection(server.port) for _ in range(100)]
        wait_for(lambda: server._http._open <= 9)
        assert len(server.connections) <= 8
        with RawConnection(server.port) as raw:
            assert raw.exchange(GET)[0] == 200
        for connection in flood:
            connection.socket.close()

    def test_when_all_are_at_work_the_newcomer_gets_an_honest_503(self, server):
        busy = [RawConnection(server.port) for _ in range(8)]
        for connection in busy:
            connection.send_request("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 200, "stream": True})
            assert connection.read_head()[0] == 200
        with RawConnection(server.port) as raw:
            status, headers, body = raw.exchange(GET)
            assert (status, body["error"]["code"]) == (503, "too_many_connections")
            assert headers["retry-after"] == "1" and headers["connection"] == "close" and headers["x-request-id"]
            assert headers["access-control-allow-origin"] == "*" and raw.at_end()
        for connection in busy:
            connection.socket.close()
        wait_for(lambda: server._http._open == 0)
        with RawConnection(server.port) as raw:
            assert raw.exchange(GET)[0] == 200


class TestOrigins:
    FOREIGN = {"Origin": "https://evil.example"}

    def chat(self, server, headers: dict, body=CHAT):
        data = json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in {"Content-Length": len(data), **headers}.items())
        with RawConnection(server.port) as raw:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n{lines}\r\n"
            return raw.exchange(head.encode() + data)

    @pytest.mark.parametrize("path", [*ROUTES, "/nope"])
    def test_any_origin_may_read_by_default_and_never_with_credentials(self, raw, path):
        headers = raw.request("GET", path, headers=self.FOREIGN)[1]
        assert headers["access-control-allow-origin"] == "*" and "access-control-allow-credentials" not in headers

    def test_a_broken_request_carries_the_header_too(self, raw):
        assert raw.exchange(b"nonsense\r\n\r\n")[1]["access-control-allow-origin"] == "*"

    def test_preflight_allows_what_the_api_takes(self, raw):
        asked = {**self.FOREIGN, "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}
        status, headers, _ = raw.request("OPTIONS", "/v1/chat/completions", headers=asked)
        assert status == 204 and headers["access-control-allow-origin"] == "*"
        assert "POST" in headers["access-control-allow-methods"]
        assert headers["access-control-allow-headers"] == "*, Authorization"
        assert "access-control-allow-credentials" not in headers

    @pytest.mark.parametrize("kind", [
        "text/plain", "text/plain;charset=UTF-8", "TEXT/PLAIN", "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x", "", None,
        "text/plain, application/json", "application/csp-report"])
    def test_a_foreign_page_must_announce_json(self, tiny_server, kind):
        headers = {**self.FOREIGN, **({"Content-Type": kind} if kind is not None else {})}
        status, _, body = self.chat(tiny_server, headers)
        assert (status, body["error"]["code"]) == (415, "unsupported_media_type")

    @pytest.mark.parametrize("origin", ["null", "http://127.0.0.1:9999", "http://localhost:8000"])
    def test_every_other_origin_is_foreign(self, tiny_server, origin):
        assert self.chat(tiny_server, {"Origin": origin, "Content-Type": "text/plain"})[0] == 415

    @pytest.mark.parametrize("headers", [
        {**FOREIGN, "Content-Type": "application/json"}, {**FOREIGN, "Content-Type": "application/json; charset=utf-8"},
        {"Origin": "http://127.0.0.1:8000", "Content-Type": "text/plain"}, {"Content-Type": "text/plain"}, {},
        {"Content-Type": "application/x-www-form-urlencoded"}])
    def test_anything_else_is_read_as_json(self, tiny_server, headers):
        assert self.chat(tiny_server, headers)[0] == 200

    def test_with_a_list_only_its_origins_may_read(self):
        with local_server(None, cors_origins="https://a.example, https://b.example:8443") as server:
            for origin, allowed in (("https://a.example", True), ("https://b.example:8443", True),
                                    ("https://c.example", False),
                                    ("https://b.example", False), ("null", False)):
                with RawConnection(server.port) as raw:
                    for method in ("GET", "OPTIONS"):
                        headers = raw.request(method, "/health", headers={"Origin": origin})[1]
                        assert headers.get("access-control-allow-origin") == (origin if allowed else None)
                        assert headers["vary"] == "Origin" and "access-control-allow-credentials" not in headers
            with RawConnection(server.port) as raw:
                assert "access-control-allow-origin" not in raw.exchange(GET)[1]


class TestRequestIds:
    @pytest.mark.parametrize("given", ["abc", "A-1_b.c", "x" * 128])
    def test_a_sane_one_is_echoed(self, raw, given):
        assert raw.request("GET", "/nope", headers={"X-Request-ID": given})[1]["x-request-id"] == given

    @pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "caf\xe9", "a/b", "<script>", 'a"b'])
    def test_any_other_is_replaced(self, raw, given):
        found = raw.exchange(get(f"X-Request-ID: {given}"))[1]["x-request-id"]
        assert found != given and re.fullmatch(r"[0-9a-f]{16}", found)

    def test_each_answer_has_its_own(self, raw):
        assert raw.exchange(GET)[1]["x-request-id"] != raw.exchange(GET)[1]["x-request-id"]

    def test_broken_requests_have_one_too(self, raw):
        assert raw.exchange(b"nonsense\r\n\r\n")[1]["x-request-id"]


class TestRoutes:
    def test_health(self, tiny_server):
        assert tiny_server.get("/health")[::2] == (200, {"status": "healthy", "service": "rustinfer-server"})

    def test_ready(self, tiny_server):
        assert tiny_server.get("/ready")[::2] == (200, {"status": "ready", "model_loaded": True})

    def test_metrics_have_the_shape_of_the_seed(self, tiny_server):
        status, _, body = tiny_server.get("/v1/metrics")
        assert status == 200 and list(body)[:4] == ["cpu", "memory", "gpu", "timestamp"]
        assert set(body["cpu"]) == {"utilization_percent",
                                    "core_count"} and set(body["memory"]) == {"used_mb", "total_mb", "available_mb"}
        assert body["gpu"] is None
        assert isinstance(body["cpu"]["utilization_percent"], float) and isinstance(body["cpu"]["core_count"], int)
        assert all(isinstance(value, int) and value > 0 for value in body["memory"].values())
        assert isinstance(body["timestamp"], int) and abs(body["timestamp"] - time.time()) < 60

    def test_models_lists_the_one_that_is_served(self, tiny_server):
        status, _, body = tiny_server.get("/v1/models")
        assert status == 200 and body["object"] == "list" and len(body["data"]) == 1
        model = body["data"][0]
        assert model["id"] == "llama3-tied" and model["object"] == "model" and model["max_model_len"] == 2048
        assert isinstance(model["created"], int) and isinstance(model["owned_by"], str)
        assert tiny_server.get("/v1/models/llama3-tied")[2] == model

    @pytest.mark.parametrize("name", ["other", "", "llama3-tied/x", "%ff", "%00", "..", "x" * 5000])
    def test_other_models_are_404(self, tiny_server, name):
        status, _, body = tiny_server.get(f"/v1/models/{name}")
        assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
        assert len(body["error"]["message"]) < 1500

    def test_a_model_id_may_hold_slashes(self, tiny_llm, monkeypatch):
        monkeypatch.setattr(tiny_llm, "name", "meta-llama/Tiny 1")
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            for path in ("/v1/models/meta-llama/Tiny%201", "/v1/models/meta-llama%2FTiny%201"):
                assert raw.request("GET", path)[2]["id"] == "meta-llama/Tiny 1"
            assert raw.request("POST", "/v1/chat/completions", {**CHAT, "model": "meta-llama/Tiny 1"})[0] == 200
            assert raw.request("POST", "/v1/chat/completions", {**CHAT, "model": "Tiny 1"})[0] == 404

    def test_root_says_something_to_a_browser(self, tiny_server):
        status, headers, body = tiny_server.get("/")
        assert status == 200 and headers["content-type"].startswith("text/") and body

    def test_no_answer_names_the_software_below(self, raw):
        for data in (GET, get(target="/nope"), b"nonsense\r\n\r\n"):
            raw.send(data)
            head = raw.read_until(b"\r\n\r\n").lower()
            assert b"python" not in head and b"basehttp" not in head and b"\r\nserver:" not in head
            raw.buffer = b""

    def test_an_overlong_prompt_is_refused_with_both_numbers(self, tiny_server):
        status, _, body = tiny_server.chat("x" * 5000)
        error = body["error"]
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
        assert re.search(r"maximum context length is 2048 tokens: .* has 5\d\d\d tokens\b.*context_length_exceeded",
                         error["message"])
        assert tiny_server.chat("x", max_tokens=2048)[2]["error"]["code"] == "context_length_exceeded"

    def test_a_full_queue_is_429_with_retry_after(self):
        with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu", max_num_seqs=1, max_queue=1) as llm:
            with slowed(llm, 0.05), local_server(llm) as server:
                holders = [RawConnection(server.port) for _ in range(2)]
                for count, raw in enumerate(holders):
                    raw.send_request("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 500, "stream": True})
                    wait_for(lambda: (llm.engine.snapshot()["num_requests_running"],
                                      llm.engine.snapshot()["num_requests_waiting"])
                             == (1, count))
                with RawConnection(server.port) as raw:
                    status, headers, body = raw.request("POST", "/v1/chat/completions", CHAT)
                assert (status, body["error"]["code"], body["error"]["type"]) == (429, "queue_full", "rate_limit_error")
                assert 0 < int(headers["retry-after"]) <= 120
                for raw in holders:
                    raw.socket.close()

    def test_probes_answer_while_a_large_prompt_is_read(self, tiny_server):
        slow = threading.Thread(target=tiny_server.chat, args=("hello world " * 200_000,))
        slow.start()
        longest = 0.0
        while slow.is_alive():
            started = time.monotonic()
            assert tiny_server.get("/health")[0] == 200
            longest = max(longest, time.monotonic() - started)
        slow.join()
        assert longest < 1


class TestLoading:
    def test_a_server_without_a_model_answers_and_says_so(self, tiny_llm):
        with local_server(None) as server, RawConnection(server.port) as raw:
            assert raw.request("GET", "/health")[::2] == (200, {"status": "healthy", "service": "rustinfer-server"})
            assert raw.request("GET", "/ready")[::2] == (503, {"status": "loading", "model_loaded": False})
            assert raw.request("GET", "/v1/metrics")[0] == 200
            for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/x"), ("GET", "/v1/chat/completions"),
                                 ("POST", "/v1/chat/completions")):
                status, headers, body = raw.request(method, path, CHAT if method == "POST" else None)
                assert (status, body["error"]["code"], body["error"]["type"]) == (503, "model_loading", "server_error")
                assert 0 < int(headers["retry-after"]) <= 120
            server.attach(tiny_llm)
            assert raw.request("GET", "/ready")[::2] == (200, {"status": "ready", "model_loaded": True})
            assert raw.request("POST", "/v1/chat/completions", CHAT)[0] == 200


class TestFailures:
    def test_a_bug_is_500_without_its_details_and_the_connection_goes_on(self, tiny_llm, monkeypatch, caplog):
        monkeypatch.setattr(tiny_llm.template, "encode", lambda messages: 1 // 0)
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            status, headers, body = raw.request("POST", "/v1/chat/completions", CHAT, {"X-Request-ID": "find-me"})
            assert (status, body["error"]["type"], body["error"]["code"]) == (500, "server_error", "internal_error")
            assert "division" not in body["error"]["message"] and headers["x-should-retry"] == "false"
            assert raw.exchange(GET)[0] == 200
        assert any("find-me" in record.message and record.exc_info for record in caplog.records)

    def test_a_failed_step_is_500_and_the_next_request_works(self, tiny_llm):
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            tiny_llm.engine._runner.launch = lambda step: 1 // 0
            status, headers, body = raw.request("POST", "/v1/chat/completions", CHAT)
            del tiny_llm.engine._runner.launch
            assert (status, body["error"]["code"]) == (500, "internal_error") and headers["x-should-retry"] == "false"
            assert raw.request("POST", "/v1/chat/completions", CHAT)[0] == 200

    def test_a_header_with_a_line_break_is_never_sent(self, tiny_llm, monkeypatch):
        monkeypatch.setattr(rustinfer.Server, "cors_headers", lambda self, request: {"X": "a\r\nSet-Cookie: b"})
        with local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            raw.send(GET)
            assert b"Set-Cookie" not in raw.read_rest()


class TestLogging:
    def lines(self, server, request_id: str) -> list[str]:
        wait_for(lambda: request_id in server.read_log())
        return [line for line in server.log.splitlines() if request_id in line]

    def test_one_line_a_request_with_counts_and_times(self, tiny_server):
        tiny_server.request("POST", "/v1/chat/completions", CHAT, {"X-Request-ID": "log-1"})
        [line] = self.lines(tiny_server, "log-1")
        assert re.search(r"INFO request log-1 from 127\.0\.0\.1: POST /v1/chat/completions 200 total_ms=[\d.]+ "
                         r"prompt=\d+ cached=\d+ completion=2 queue_ms=[\d.]+ first_token_ms=[\d.]+ finish=length$",
                         line)

    def test_errors_are_logged_with_their_code(self, tiny_server):
        tiny_server.request("POST", "/v1/chat/completions", {}, {"X-Request-ID": "log-2"})
        [line] = self.lines(tiny_server, "log-2")
        assert " 400 " in line and "error=invalid_value" in line

    def test_prompts_answers_and_queries_are_never_logged(self, tiny_server):
        secret = "Xyzzy-7734"
        answer = tiny_server.request("POST", "/v1/chat/completions", chat_body(secret, max_tokens=20),
                                     {"X-Request-ID": "log-3"})[2]
        tiny_server.request("POST", "/v1/chat/completions", chat_body(secret, bad=secret), {"X-Request-ID": "log-4"})
        tiny_server.request("GET", f"/v1/chat/completions?messages={secret}&x={secret}",
                            headers={"X-Request-ID": "log-5"})
        tiny_server.request("POST", "/v1/chat/completions", f'{{"{secret}'.encode(), {"X-Request-ID": "log-6"})
        for name in ("log-3", "log-4", "log-5", "log-6"):
            assert self.lines(tiny_server, name)
        assert secret not in tiny_server.log
        assert answer["choices"][0]["message"]["content"] not in tiny_server.log

    def test_client_text_cannot_forge_lines(self, tiny_server):
        tiny_server.request("POST", "/v1/chat/completions", {**CHAT, "user": "a\nINFO request forged\x1b[31m\u2028"},
                            {"X-Request-ID": "log-7"})
        [line] = self.lines(tiny_server, "log-7")
        assert "INFO request forged" in line and "\x1b" not in line and "\u2028" not in line

    def test_long_methods_and_paths_are_cut(self, tiny_server):
        tiny_server.request("M" * 4000, "/" + "p" * 3000, headers={"X-Request-ID": "log-8"})
        [line] = self.lines(tiny_server, "log-8")
        assert len(line) < 400

    def test_control_characters_are_escaped(self):
        read, write = os.pipe()
        with os.fdopen(write, "w") as stream, os.fdopen(read) as reader:
            handler = rustinfer.DroppingLogHandler(stream)
            handler.emit(logging.makeLogRecord({"msg": "a\x1b[31m\x00\x7f\rb\u2028\x85", "levelname": "INFO"}))
            handler.close()
            assert reader.readline().endswith("INFO a\\x1b[31m\\x00\\x7f\\rb\\u2028\\x85\n")

    def test_a_pipe_that_nobody_reads_never_blocks_the_server(self):
        command = [sys.executable, str(ROOT / "rustinfer.py"), "--model", str(REFERENCES / "llama3-tied"), "--port",
                   "0", "--device", "cpu"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            port = int(re.search(rb":(\d+)\n", process.stdout.readline())[1])
            for _ in range(8):  # some 100 KB of log, more than a pipe holds
                with RawConnection(port) as raw:
                    for _ in range(100):
                        assert raw.exchange(get(target="/" + "x" * 80))[0] == 404
            process.terminate()
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    def test_a_closed_pipe_never_stops_the_server(self):
        with ServerProcess("--device", "cpu", model=REFERENCES / "llama3-tied") as server:
            server.process.stderr.close()
            for _ in range(20):
                assert server.get("/nope")[0] == 404
            server.process.terminate()
            assert server.process.wait(15) == 0
