"""Broken requests, any number of them, against real servers: `python tests/bench/fuzz.py [--requests N] [--seed S]`.

Several processes send bytes that were cut and spliced, heads and framing made of wrong parts, JSON that is none, every
field of every route with values of other types, ranges and sizes, tools, schemas, grammars, query strings, and
garbage to a port that speaks TLS. Where the framing is right, requests are pipelined, and each answer must carry its
own request's id; a good request goes between and must get the right answer. Whatever comes back must be well
formed, no 500, and in time; memory and threads of the servers must not grow.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import random
import re
import socket
import ssl
import statistics
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]
import psutil  # noqa: E402
import trustme  # noqa: E402
from harness import RawConnection, ServerProcess, check_error, parse_events  # noqa: E402

import rustinfer  # noqa: E402

FLAGS = ("--device", "cpu", "--max-tokens", "4", "--max-model-len", "512", "--kv-cache-memory", "16MiB")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD = {"messages": [{"role": "user", "content": "What is Rust?"}], "max_tokens": 6, "temperature": 0}
STATUSES = {200, 204, 400, 403, 404, 405, 408, 413, 414, 415, 429, 431, 501, 505}
DEADLINE = 20.0  # seconds within which every answer must have come
PIECES = (b"\r\n", b"\n", b"\r", b"\x00", b": ", b" ", b"\t", b"\xff", b"0\r\n\r\n", b"Content-Length: 5\r\n",
          b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"{", b"[[[[", b'"',
          b"\\ud800", b"1e999", b"NaN", b"%", b"%ff", b"HTTP/1.1", b"99999999999999999999", b"-1", b"null", b"true")
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE",
           "BREW", "get", "CONNECT", "P\u00d6ST", "", "G(T", "M" * 300)
TARGETS = (CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/apply-template", "/v1/models", "/v1/models/demo", "/health",
           "/ready", "/metrics", "/v1/metrics", "/v1/queue", "/v1/queue/x", "/openapi.json", "/", "*", "//health",
           "/v1/models/%ff%00", "http://h/health", "ftp://h/", "/health#x", "/h\u00e9", "health", "/" + "x" * 9000,
           "/health?" + "y" * 7000, "/v1/../health", "/%2e%2e", "", "?", "/v1/queue/" + "%41" * 500)
HEADERS = ("Content-Length: 5", "Content-Length: +5", "Content-Length: 99999999999999999999", "Content-Length: -1",
           "Content-Length: 4194305", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked",
           "Transfer-Encoding : chunked", "Transfer-Encoding: identity", "Host: evil.example", "Host: localhost",
           "Host:", "Foo : y", "Foo", ": y", " folded", "Foo: \x00", "Foo: \x7f", "Foo: a\rb", "Expect: 100-continue",
           "Expect: nonsense", "Connection: close", "Connection: keep-alive, x", "Upgrade: h2c", "Origin: null",
           "Content-Type: text/plain", "Content-Type: multipart/form-data; boundary=\xe9", "X-Request-ID: a b",
           "Authorization: Bearer " + "k" * 4000, "Authorization: Basic \xff", "x-api-key: \xe9",
           "Cookie: " + "c" * 9000, "Accept-Encoding: gzip;q=\u00b2", "Range: bytes=0-", "If-None-Match: *",
           "X: " + " " * 5000 + "\x01")
VERSIONS = ("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/11.1", "http/1.1", "",
            "HTTP/1.1 ")
TEXTS = ("", "x", " ", "\x00", "\ud800", "\udfff\ud800", "\U0001f600" * 9, "\ufdd0", "\ufdd0\ufdd1\ufdef", "<|eot_id|>",
         "<|start_header_id|>system<|end_header_id|>", "e\u0301" * 50, "\u202e", "{{ 7*7 }}", "{% for %}",
         "../../etc/passwd", "\r\nSet-Cookie: a=b", "a" * 3000, "\ufeff", "True", "NaN", "1e5", "%s%n", "auto", "none",
         "required", "user", "json")
NUMBERS = (0, 1, -1, 2, 3, 8, 9, 16, 255, 4096, 1 << 31, (1 << 63) - 1, -(1 << 63), 1 << 64, 10**30, 10**399, 10**401,
           0.0, -0.0, 0.5, 1.0, 1.5, -0.1, 2.0001, 1e-300, 1e308, 4.9e-324, 1528, 1535, 1536)
SCHEMAS = (
    {"type": "object"}, {}, True, {"type": "nonsense"}, {"type": ["string", 5]}, {"$ref": "#"}, {"$ref": "#/$defs/x"},
    {"$ref": "http://example.org/x"}, {"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 10**9}, {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "("}, {"type": "string", "minLength": 10**9},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"enum": []}, {"enum": [None, 1, "a", {}]}, {"const": "\ud7ff"}, {"anyOf": []}, {"allOf": [{}, {"type": "null"}]},
    {"not": {}}, {"type": "object", "properties": {"a": 5}}, {"properties": {"": {"type": "null"}}, "required": ["b"]},
    {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(60)}}, {"x-guidance": 5},
    {"type": "string", "format": "date-time"}, {"type": "number", "multipleOf": 0}, {"if": {}, "then": False},
    {"type": "object", "patternProperties": {"[": {}}}, {"type": "array", "prefixItems": [{}] * 40})
REGEXES = ("", "a", "(", "[", "a{1000}", "(a{100}){100}", "(a|aa)+b", "\\", "(?=x)", "(?<n>a)\\k<n>",
           "\\p{L}+", "[^\\x00-\\xff]", ".*" * 40, "a" * 5000, "\U0001f600+", "$^", "(?i)A", "\\d{1,99999}")
GRAMMARS = ("", "start: A", 'start: "a"', "start: start", 'start: "a" start | ""', "%import common.INT\nstart: INT",
            "start: /(/", "nonsense", "start: b\nb: c\nc: b", "start: /a/" * 50, 'start: "\\ud800"',
            '%llguidance {}\nstart: "a"', 'start: %json {"type": 5}')
STRUCTURED = ("messages", "tools", "tool_choice", "response_format", "structured_outputs", "prompt", "tokens", "stop",
              "logit_bias", "n", "max_tokens", "stream_options", "chat_template_kwargs")
MESSAGES = "%5B%7B%22role%22:%22user%22,%22content%22:%22x%22%7D%5D"


class Broken(AssertionError):
    """The server did what it must not."""


class Maker:
    """Makes hostile requests from one source of randomness."""

    def __init__(self, rng):
        self.rng = rng

    # -- values

    def value(self, depth=0):
        """Any JSON value, seldom what anybody wants."""
        rng, kind = self.rng, self.rng.randrange(9 if depth < 3 else 6)
        if kind < 2:
            return rng.choice(TEXTS)
        if kind < 4:
            return rng.choice(NUMBERS)
        if kind < 6:
            return rng.choice((None, True, False))
        size = rng.choice((0, 1, 1, 2, 3))
        if kind < 8:
            return [self.value(depth + 1) for _ in range(size)]
        names = ("", "type", "name", "role", "content", "function", "text", "schema", "0", "\ud800", "json_schema")
        return {rng.choice(names): self.value(depth + 1) for _ in range(size)}

    def around(self, field):
        """A value for a field of the tables: at its bounds, beyond them, or of another type."""
        rng = self.rng
        if field.low is None or rng.random() < 0.4:
            return self.value()
        low, high = field.low, field.high
        at = rng.choice((low, high, low - 1, high + 1, (low + high) / 2, low + 0.5))
        if field.kind == "array":
            return [self.value(2) for _ in range(int(min(max(at, 0), 5000)))]
        return int(at) if field.kind == "integer" and rng.random() < 0.8 else at

    def message(self):
        rng = self.rng
        text = rng.choice(TEXTS)
        message = {"role": rng.choice(("user", "system", "assistant", "tool", "developer", "function", 5)),
                   "content": rng.choice((text, [{"type": "text", "text": text}], None, self.value()))}
        if rng.random() < 0.3:
            function = {"name": rng.choice(("f", self.value(2))),
                        "arguments": rng.choice(('{"a": 1}', "{", "[]", self.value()))}
            message["tool_calls"] = [{"id": self.value(2), "type": "function", "function": function}]
        if rng.random() < 0.3:
            message[rng.choice(("name", "tool_call_id", "refusal", "audio", "x", "function_call"))] = self.value()
        return message

    def tool(self):
        rng = self.rng
        return rng.choice((self.value(), {"type": "function", "function": {
            "name": rng.choice(("f", "g", "", "a b", self.value(2))),
            "parameters": rng.choice((*SCHEMAS, self.value())),
            **({"strict": rng.choice((True, False, None, 1))} if rng.random() < 0.5 else {})}}))

    def special(self, name):
        """A value that comes close to what the field of this name takes, or None."""
        rng = self.rng
        schema, mode = rng.choice((*SCHEMAS, self.value())), rng.choice(("auto", "required", "none", self.value(2)))
        one, text = {"type": "function", "function": {"name": rng.choice(("f", "h", None))}}, rng.choice(TEXTS)
        named = {"name": "x", "schema": schema}
        makers = {
            "messages": lambda: [self.message() for _ in range(rng.choice((0, 1, 1, 2, 5)))],
            "tools": lambda: [self.tool() for _ in range(rng.choice((0, 1, 1, 2, 130)))],
            "tool_choice": lambda: rng.choice((mode, one, {"type": "allowed_tools", "allowed_tools": rng.choice((
                self.value(), {"mode": mode, "tools": rng.choice(([one], self.value()))}))})),
            "response_format": lambda: {"type": rng.choice(("json_schema", "json_object", "text", self.value(2))),
                                        "json_schema": rng.choice((named, named, schema, None, self.value()))},
            "structured_outputs": lambda: {
                rng.choice(("json", "regex", "choice", "grammar", "json_object")): rng.choice((
                    schema, rng.choice(REGEXES), rng.choice(GRAMMARS), ["a", "b"], [], self.value()))},
            "logit_bias": lambda: {rng.choice(("5", "-1", "1535", "1536", "x", "05", "9" * 30)): rng.choice((
                1, -100, 101, self.value())) for _ in range(rng.choice((0, 1, 2, 400)))},
            "stop": lambda: rng.choice((text, [text] * rng.choice((0, 1, 4, 17)), [text, "a"], self.value())),
            "stream_options": lambda: {"include_usage": rng.choice((True, False, None, 1, "x"))},
            "chat_template_kwargs": lambda: {rng.choice(("date_string", "thinking", "x", "messages")): self.value()},
            "prompt": lambda: rng.choice((text, [text], [5, 6], [[5], [6, 1536]], [-1], [[]], [10**30], ["x"] * 65,
                                          self.value())),
            "tokens": lambda: rng.choice(([5, 6], [-1], [10**30], [1535, 1536], [True], self.value())),
            "n": lambda: rng.choice((1, 2, 0, 9, self.value())),
            "max_tokens": lambda: rng.choice((1, 2, 0, 600, -1, self.value())),
        }
        return makers[name]() if name in makers else None

    def fields(self):
        """(path, body) of a route with one to three fields replaced or added."""
        rng = self.rng
        path, fields = rng.choice(list(rustinfer.Server.FIELDS.items()))
        base = {CHAT: {**GOOD, "max_tokens": 1}, COMPLETIONS: {"prompt": "Hello", "max_tokens": 1},
                "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [5]},
                "/apply-template": {"messages": GOOD["messages"]},
                "/v1/responses": {"input": "Hello", "max_output_tokens": 1},
                "/v1/messages": {"messages": GOOD["messages"], "max_tokens": 1},
                "/v1/messages/count_tokens": {"messages": GOOD["messages"]}}
        body = dict(base[path])
        for _ in range(rng.choice((1, 1, 2, 3))):
            close = [name for name in fields if name in STRUCTURED]
            name = rng.choice(rng.choice(([*fields], close, ["unknown", *TEXTS])))
            close = self.special(name) if rng.random() < 0.7 else None
            body[name] = close if close is not None else self.around(fields[name]) if name in fields else self.value()
        if path == CHAT and "tool_choice" in body and rng.random() < 0.7:
            body.setdefault("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}])
        if rng.random() < 0.15:
            body.pop(rng.choice(list(body)))
        return path, body

    def json_text(self):
        """(path, bytes) of a body that is JSON no more, or JSON that breaks parsers."""
        rng = self.rng
        path, body = self.fields() if rng.random() < 0.5 else (CHAT, GOOD)
        text = json.dumps(body).encode()
        whole = (
            b"[" * 5000, b'{"a":' * 90 + b"1" + b"}" * 90, b'{"seed": ' + b"1" * 4400 + b"}", b'{"seed": NaN}',
            b"\xff\xfe{}", b'{"temperature": 1e999}', b'{"n": 1, "n": 2}', b'"text"', b"5", b"null", b"[]", b"", b" ",
            b"\xef\xbb\xbf{}", text.decode().encode("utf-16"), b'{"user": "\\ud800"}', b'{"user": "\xed\xa0\x80"}',
            b"{'a': 1}", text * 2, text[:-1], b'{"messages": ' + b"[" * 63 + b"]" * 63 + b"}",
            b'{"user": "' + b"x" * 200_000 + b'"}')
        return path, rng.choice(whole) if rng.random() < 0.4 else self.mutate(text)

    def query(self):
        """A target with a query string for the GET chat route."""
        rng, parts = self.rng, []
        for _ in range(rng.choice((0, 1, 2, 4, 120))):
            name = rng.choice([*rustinfer.QUERY_FIELDS, "unknown"])
            close = self.special(name) if rng.random() < 0.5 else None
            field = rustinfer.QUERY_FIELDS.get(name, rustinfer.Field("x", "any"))
            value = close if close is not None else self.around(field)
            text = json.dumps(value) if rng.random() < 0.7 else str(value)
            parts.append(f"{name}={urllib.parse.quote(text.encode(errors='surrogatepass'))}")
        given = rng.choice(("&", ";", "&&")).join(parts)
        known = f"&messages={MESSAGES}"
        extra = rng.choice(("", known, f"{known}&stream=false", "&%", "&a=%ff", "&=", "&a"))
        return f"{CHAT}?{given}{extra}&max_tokens=1"[:7900]

    # -- bytes

    def mutate(self, given):
        """Some bytes cut, doubled, flipped or replaced."""
        data, rng = bytearray(given), self.rng
        for _ in range(rng.randrange(1, 6)):
            start = rng.randrange(len(data) + 1)
            stop = min(len(data), start + rng.choice((0, 0, 1, 2, 5, 30)))
            noise, twice = rng.randbytes(rng.randrange(4)), bytes(data[start:stop]) * 2
            data[start:stop] = rng.choice((rng.choice(PIECES), noise, twice, b""))
        return bytes(data)

    def chunked(self, body):
        size = self.rng.choice((1, 3, 40, 1000))
        parts = [body[at : at + size] for at in range(0, len(body), size)][:400]
        return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"

    def seed_bytes(self):
        """A good request as bytes, to be broken."""
        rng = self.rng
        body = json.dumps(rng.choice((GOOD, {**GOOD, "stream": True}, {**GOOD, "stop": ["a"], "seed": 5}))).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        query = f"GET {CHAT}?max_tokens=2&messages={MESSAGES} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        return rng.choice((b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", query,
                           head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
                           head + b"Transfer-Encoding: chunked\r\n\r\n" + self.chunked(body)))

    def head_bytes(self):
        """A head put together of parts that do not belong in one, with some body behind it."""
        rng = self.rng
        lines = [rng.choice(HEADERS) for _ in range(rng.choice((0, 1, 1, 2, 3, 120)))]
        lines += ["Host: localhost"] if rng.random() < 0.8 else []
        start = f"{rng.choice(METHODS)} {rng.choice(TARGETS)} {rng.choice(VERSIONS)}"
        head = "\r\n".join([start, *lines]).encode("latin-1", "replace") + b"\r\n\r\n"
        return head + rng.choice((b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", json.dumps(GOOD).encode()))

    def raw(self):
        """(kind, bytes) of something that need not be HTTP."""
        kind = self.rng.choice(("spliced", "spliced", "head", "head", "noise"))
        if kind == "head":
            return kind, self.head_bytes()
        if kind == "noise":
            return kind, self.rng.randbytes(self.rng.randrange(300))
        return kind, self.mutate(self.seed_bytes())

    def framed(self):
        """(kind, method, target, body or None) of a request whose framing is right."""
        rng = self.rng
        kind = rng.choice(("fields", "fields", "fields", "json", "json", "query", "route"))
        if kind == "query":
            return kind, "GET", self.query(), None
        if kind == "route":
            target = rng.choice([t for t in TARGETS if re.fullmatch(r"/[!-~]*", t) and "#" not in t and len(t) < 5000])
            method = rng.choice(("GET", "POST", "DELETE", "OPTIONS", "PUT"))
            return kind, method, target, None if method in ("GET", "OPTIONS") else b"{}"
        path, body = self.fields() if kind == "fields" else self.json_text()
        return kind, "POST", path, body if isinstance(body, bytes) else json.dumps(body).encode()

    def request(self, number, method, target, body):
        """A framed request as bytes, by length or in chunks."""
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {number}\r\n"
        if body is None:
            return head.encode() + b"\r\n"
        if self.rng.random() < 0.15:
            return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + self.chunked(body)
        return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Worker:
    """Sends its share of the requests, and looks at every answer."""

    def __init__(self, port, tls_port, count, seed, progress=None):
        self.port, self.tls_port, self.count, self.progress = port, tls_port, count, progress
        self.maker = Maker(random.Random(seed))
        self.seen, self.longest, self.number = collections.Counter(), 0.0, 0
        self.broken = []  # what was answered wrongly
        self.trusting = ssl._create_unverified_context()

    def run(self):
        """(answers by kind and status, the longest wait, what was answered wrongly)."""
        rng = self.maker.rng
        with RawConnection(self.port, DEADLINE) as raw:
            self.good = self.ask_good(raw)
        while self.number < self.count and len(self.broken) < 20:
            before, way = self.number, rng.random()
            try:
                (self.garble_tls if way < 0.02 and self.tls_port else self.provoke if way < 0.4 else self.converse)()
            except (Broken, OSError) as error:
                self.broken.append(f"{type(error).__name__}: {error}")
            if self.progress is not None:
                with self.progress.get_lock():
                    self.progress.value += self.number - before
        return self.seen, self.longest, self.broken

    def ask_good(self, raw):
        """What the good request is answered."""
        status, _, body = raw.request("POST", CHAT, GOOD)
        if status != 200:
            raise Broken(f"a good request got {status}: {body}")
        return body["choices"][0]["message"]["content"]

    def note(self, kind, status, started):
        self.number += 1
        self.seen[kind, status] += 1
        self.longest = max(self.longest, time.monotonic() - started)

    def converse(self):
        """Framed requests, pipelined, with a good one behind them: all on one connection while it lasts."""
        waiting = [self.maker.framed() for _ in range(self.maker.rng.choice((1, 3, 6, 10)))]
        waiting.append(("good", "POST", CHAT, json.dumps(GOOD).encode()))
        while waiting:
            with RawConnection(self.port, DEADLINE) as raw:
                names = [f"n{self.number}-{index}" for index in range(len(waiting))]
                data = [self.maker.request(name, *one[1:]) for name, one in zip(names, waiting)]
                small = sum(map(len, data)) < 100_000  # more could fill both sides' buffers
                if small:
                    self.push(raw, b"".join(data))
                for name, sent in zip(names, data):
                    if not small:
                        self.push(raw, sent)
                    if self.read_framed(raw, name, waiting.pop(0), sent):
                        break

    def push(self, raw, data):
        try:
            raw.send(data)
        except OSError:  # the server may have answered and closed before it read all
            pass

    def read_framed(self, raw, name, one, sent):
        """Check the answer of one request; True when the connection ends with it."""
        kind, method = one[:2]
        started = time.monotonic()
        try:
            status, headers, body = raw.read_response(method)
            self.check(status, headers, body)
            if headers["x-request-id"] != name:
                raise Broken(f"the answer is of {headers['x-request-id']}")
            if kind == "good" and (status, body["choices"][0]["message"]["content"]) != (200, self.good):
                raise Broken("a good request got another answer")
        except (AssertionError, OSError, ValueError, KeyError, TypeError) as error:
            raise Broken(f"{type(error).__name__}: {str(error)[:500]}; {kind} request {sent[:3000]!r}") from error
        self.note(kind, status, started)
        return headers.get("connection") == "close"

    LAST = b"event: response.completed", b"event: response.incomplete", b"event: message_stop"

    def check(self, status, headers, body):
        """Of any answer; errors have the documented shape."""
        if status not in STATUSES:
            if not (status == 429 or status == 503 and body["error"]["code"] == "too_many_connections"):
                raise Broken(f"status {status}: {body}")
        if headers.get("content-type", "").startswith("text/event-stream") and body:
            named = body.startswith(b"event: ")  # the other dialects
            last = body.rstrip().split(b"\n\n")[-1] if named else parse_events(body)[-1]
            if last != "[DONE]" if not named else not last.startswith(self.LAST):
                raise Broken(f"a stream ended with {last}")
        elif status >= 400 and "status" not in body and body.get("type") != "error":
            check_error(body["error"])

    def provoke(self):
        """Bytes that need not be HTTP, and a FIN: the server ends the connection by itself, soon."""
        kind, data = self.maker.raw()
        started = time.monotonic()
        with RawConnection(self.port, DEADLINE) as raw:
            try:
                self.push(raw, data)
                raw.socket.shutdown(socket.SHUT_WR)
                answer = raw.read_rest()
            except TimeoutError as error:
                raise Broken(f"no end after {DEADLINE} s; sent {data!r}") from error
            except OSError:
                answer = raw.buffer
            try:
                status = self.check_answers(raw, answer) if b"HEAD" not in data else 0
            except (AssertionError, ValueError, KeyError, TypeError) as error:
                raise Broken(
                    f"{type(error).__name__}: {str(error)[:500]}; {kind} {data!r} got {answer[:3000]!r}") from error
        self.note(kind, status, started)

    def check_answers(self, raw, answer):
        """The last status of answers one after the other. A stream may be cut short: our FIN counts as leaving."""
        raw.buffer, status = answer, 0
        raw.read_more = lambda: False
        while raw.buffer:
            try:
                status, headers, body = raw.read_response()
            except AssertionError as error:
                if status := 299 if "the connection ended" in str(error) and b"text/event-stream" in answer else 0:
                    return status
                raise
            if status != 100:
                self.check(status, headers, body)
        return status

    def garble_tls(self):
        """Bytes to the port that speaks TLS: noise, a ClientHello cut or changed, plain HTTP, or HTTP inside TLS."""
        rng, started = self.maker.rng, time.monotonic()
        kind = rng.choice(("noise", "hello", "plain", "inside", "after", "good"))
        with socket.create_connection(("127.0.0.1", self.tls_port), DEADLINE) as plain:
            try:
                if kind in ("inside", "after", "good"):
                    self.talk_inside(plain, kind)
                else:
                    plain.sendall({"noise": rng.randbytes(rng.randrange(1, 400)), "plain": self.maker.seed_bytes(),
                                   "hello": self.maker.mutate(self.client_hello())}[kind])
                    plain.shutdown(socket.SHUT_WR)
                    while plain.recv(65536):
                        pass
            except TimeoutError as error:
                raise Broken(f"TLS {kind}: no end after {DEADLINE} s") from error
            except OSError:
                if kind == "good":
                    raise
        self.note(f"tls {kind}", 0, started)

    def talk_inside(self, plain, kind):
        with self.trusting.wrap_socket(plain) as inside:
            raw = RawConnection.__new__(RawConnection)
            raw.socket, raw.buffer = inside, b""
            if kind == "good" and self.ask_good(raw) != self.good:
                raise Broken("a good request over TLS got another answer")
            if kind == "after":  # bytes that are no record of TLS
                os.write(inside.fileno(), self.maker.rng.randbytes(50))
            elif kind == "inside":
                raw.send(self.maker.raw()[1])
            if kind != "good":
                inside.settimeout(0.02)  # then leave, wherever the server is
                try:
                    raw.read_more()
                except TimeoutError:
                    pass

    def client_hello(self):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self.trusting.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
        except ssl.SSLWantReadError:
            return outgoing.read()


def read_tracebacks(server):
    """The log since the last call, if there is a bug in it; what was looked at is dropped."""
    shown, server.log = server.read_log(), ""
    at = shown.find("Traceback")
    return [] if at < 0 else [shown[max(0, at - 500) :][:5000]]


class Meter:
    """What the servers hold: memory and threads, sampled while the requests are sent."""

    def __init__(self, servers):
        self.servers, self.processes = servers, [psutil.Process(server.process.pid) for server in servers]
        self.samples, self.tracebacks = [], []  # (requests so far, bytes, threads); from the logs

    def sample(self, done):
        held = [(process.memory_info().rss, process.num_threads()) for process in self.processes]
        self.samples.append((done, *map(sum, zip(*held))))
        for server in self.servers:
            self.tracebacks += read_tracebacks(server)

    def growth(self):
        """Memory at the end over that after a quarter of the requests, as medians of a tenth of the samples around."""
        last, part = self.samples[-1][0], max(1, len(self.samples) // 10)
        late = statistics.median(size for _, size, _ in self.samples[-part:])
        early = statistics.median(
            size for _, size, _ in [sample for sample in self.samples if sample[0] >= last / 4][:part])
        return late / early - 1


def send(port, tls_port, count, seed):
    """A worker in a process of its own."""
    return Worker(port, tls_port, count, seed, send.progress).run()


def adopt(progress):
    send.progress = progress


def attack(servers, requests, seed, processes):
    """Send so many requests; (answers by kind and status, longest wait, what was answered wrongly, meter)."""
    context = multiprocessing.get_context("spawn")
    progress, meter = context.Value("q", 0), Meter(servers)
    port, tls_port = servers[0].port, servers[1].port if len(servers) > 1 else None
    seen, longest, broken = collections.Counter(), 0.0, []
    with concurrent.futures.ProcessPoolExecutor(processes, context, adopt, (progress,)) as pool:
        jobs = [pool.submit(send, port, tls_port, -(-requests // processes), seed * 1000 + number)
                for number in range(processes)]
        while not all(job.done() for job in jobs):
            time.sleep(0.5)
            meter.sample(progress.value)
        for found, wait, wrong in [job.result() for job in jobs]:
            seen, longest, broken = seen + found, max(longest, wait), broken + wrong
        meter.sample(progress.value)
    return seen, longest, broken + meter.tracebacks, meter


def check_idle(servers, threads):
    """After all of it no thread, block or request is left."""
    deadline = time.monotonic() + 60
    for server, before in zip(servers, threads):
        process = psutil.Process(server.process.pid)
        while process.num_threads() > before and time.monotonic() < deadline:
            time.sleep(0.1)
        if process.num_threads() > before:
            raise Broken(f"{process.num_threads()} threads; {before} before")
    with RawConnection(servers[0].port) as raw:
        state = raw.request("GET", "/v1/metrics")[2]["engine"]
    if state["kv_blocks_used"] or state["num_requests_running"] or state["num_requests_waiting"]:
        raise Broken(f"something is left: {state}")


def start_servers(folder):
    """[one that speaks HTTP, one that speaks HTTPS]."""
    pem = Path(folder) / "both.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    plain = ServerProcess(*FLAGS)
    return [plain, ServerProcess(*FLAGS, "--ssl-certfile", str(pem), wait=False)]


def warm_up(servers):
    """Threads of each server once it has made those that it keeps: the libraries' own come with the first requests."""
    worker = Worker(servers[0].port, servers[1].port, 500, 0)
    worker.run()
    with socket.create_connection(("127.0.0.1", servers[1].port), DEADLINE) as plain:
        worker.talk_inside(plain, "good")
    time.sleep(1)
    return [psutil.Process(server.process.pid).num_threads() for server in servers]


class Result(NamedTuple):
    """What came of a run."""

    seen: collections.Counter  # answers by kind and status
    longest: float  # seconds waited for an answer
    broken: list[str]  # what was answered wrongly
    meter: Meter
    threads: list[int]  # of each server, before and after
    seconds: float


def run(requests, seed, processes):
    """Start the servers, send so many requests, and see that nothing of them is left."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server) for server in start_servers(folder)]
        threads, started = warm_up(servers), time.monotonic()
        seen, longest, broken, meter = attack(servers, requests, seed, processes)
        seconds = time.monotonic() - started
        check_idle(servers, threads)
    return Result(seen, longest, broken, meter, threads, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=3)
    options = parser.parse_args()
    result = run(options.requests, options.seed, options.processes)
    print("".join(f"{error}\n" for error in result.broken), end="")
    for (kind, status), count in sorted(result.seen.items()):
        print(f"{kind:12} {status:3} {count:8}")
    samples, total = result.meter.samples, sum(result.seen.values())
    tenths = samples[:: max(1, len(samples) // 10)]
    print("memory of both servers, MB: " + ", ".join(f"{size / 1e6:.1f} after {done}" for done, size, _ in tenths))
    print(f"{total} requests in {result.seconds:.0f} s, {total / result.seconds:.0f} a second; longest wait "
          f"{result.longest:.2f} s; {len(result.broken)} answered wrongly; memory {samples[-1][1] / 1e6:.1f} MB, "
          f"{result.meter.growth():+.2%} since a quarter of them; at most {max(sample[2] for sample in samples)} "
          f"threads, {sum(result.threads)} before and after")
    sys.exit(bool(result.broken))


if __name__ == "__main__":
    main()
