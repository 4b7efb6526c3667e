"""What operators use: Prometheus' numbers, the queue, time limits, the log as JSON, HTTPS."""
import contextlib
import http.client
import json
import ssl
import threading
import time

import openai
import prometheus_client.parser
import pytest
import trustme
from harness import (
    RawConnection, ask, ServerProcess, chat_body, client_of, local_server, parse_events, slowed, wait_for)

import rustinfer
from rustinfer import SettingsError

CHAT = "/v1/chat/completions"
LONG = dict(max_tokens=300, ignore_eos=True)


def samples(server):
    """{name: {labels without the model's: value}} of /metrics."""
    status, headers, body = ask(server, "GET", "/metrics")
    assert status == 200 and headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in prometheus_client.parser.text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key != "model_name"))
            assert sample.name.startswith("process_") or sample.labels["model_name"] == "llama3-tied"
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


class TestPrometheus:
    def test_a_request_is_counted_everywhere(self, tiny_llm):
        with local_server(tiny_llm) as server:
            before = samples(server)
            usage = ask(server, "POST", CHAT, chat_body(max_tokens=7, ignore_eos=True))[2]["usage"]
            ask(server, "POST", CHAT, {})
            ask(server, "GET", "/nope")
            after = samples(server)
            grown = lambda name, *labels: after[name].get(labels, 0) - before.get(name, {}).get(labels, 0)
            assert grown("rustinfer:generation_tokens_total") == 7
            assert grown("rustinfer:prompt_tokens_total") == usage["prompt_tokens"]
            assert grown("rustinfer:prefix_cache_queries_total") == usage["prompt_tokens"]
            assert grown("rustinfer:request_success_total", ("finished_reason", "length")) == 1
            errors = after["rustinfer:errors_total"]
            assert errors[(("code", "invalid_value"),)] == errors[(("code", "not_found"),)] == 1
            for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds",
                         "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
                         "request_prompt_tokens", "request_generation_tokens"):
                assert grown(f"rustinfer:{name}_count") == 1, name
            assert grown("rustinfer:batch_size_sum") >= 7
            assert after["rustinfer:num_requests_running"][()] == after["rustinfer:num_requests_waiting"][()] == 0
            assert 0 <= after["rustinfer:kv_cache_usage_perc"][()] <= 1
            assert after["process_resident_memory_bytes"][()] > 0

    def test_gauges_show_what_runs_and_waits(self, tiny_llm):
        with slowed(tiny_llm, 0.02), local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            raw.send_request("POST", CHAT, chat_body(stream=True, **LONG))
            raw.read_head()
            found = samples(server)
            assert found["rustinfer:num_requests_running"][()] == 1 and found["rustinfer:kv_cache_usage_perc"][()] > 0

    def test_output_tokens_are_counted_as_they_come(self, tiny_llm):
        """Or a rate over them would stand still while long answers run, and jump when they end."""
        with slowed(tiny_llm, 0.02), local_server(tiny_llm) as server, RawConnection(server.port) as raw:
            before = samples(server)["rustinfer:generation_tokens_total"][()]
            raw.send_request("POST", CHAT, chat_body(stream=True, **LONG))
            raw.read_head()
            wait_for(lambda: samples(server)["rustinfer:generation_tokens_total"][()] > before + 2)
            assert samples(server)["rustinfer:num_requests_running"][()] == 1

    def test_a_card_is_told_of(self, tiny_llm):
        card = {"device_id": 0, "utilization_percent": 37, "memory_used_mb": 3, "memory_total_mb": 9,
                "temperature_celsius": 61, "power_watts": 120.5}
        collector = rustinfer.EngineCollector("m", tiny_llm.engine.snapshot, lambda: card, {})
        values = {family.name: family.samples[0].value for family in collector.collect() if family.samples}
        assert values["rustinfer:gpu_memory_used_bytes"] == 3 << 20 and values["rustinfer:gpu_power_watts"] == 120.5
        assert values["rustinfer:gpu_utilization_ratio"] == 0.37
        card["power_watts"] = None
        assert "rustinfer:gpu_power_watts" not in [family.name for family in collector.collect()]

    def test_before_the_model_is_loaded_the_process_is_told_of(self):
        with local_server() as server:
            assert b"process_cpu_seconds_total" in ask(server, "GET", "/metrics")[2]


class TestQueue:
    @pytest.fixture
    def server(self):
        with rustinfer.LLM(None, device="cpu", max_num_seqs=1) as llm, slowed(llm, 0.02):
            with local_server(llm, api_key=("alice-key-1", "bob-key-22")) as server:
                yield server

    def start(self, server, key, name, **fields):
        raw = RawConnection(server.port)
        raw.send_request("POST", CHAT, chat_body(**{**LONG, **fields}), {"x-api-key": key, "x-request-id": name})
        return raw

    def listed(self, server, key):
        return ask(server, "GET", "/v1/queue", **{"x-api-key": key})[2]

    def test_ones_own_requests_are_listed_and_cancelled(self, server):
        first, second = (self.start(server, "alice-key-1", name) for name in ("one", "two"))
        wait_for(lambda: len(self.listed(server, "alice-key-1")["requests"]) == 2)
        other = self.start(server, "bob-key-22", "three")
        wait_for(lambda: len(self.listed(server, "bob-key-22")["requests"]) == 1)
        wait_for(lambda: any(entry["completion_tokens"] for entry in self.listed(server, "alice-key-1")["requests"]))
        body = self.listed(server, "alice-key-1")
        entries = {entry["id"]: entry for entry in body["requests"]}
        assert set(entries) == {"one", "two"} and body["num_requests_running"] + body["num_requests_waiting"] == 3
        runs = next(entry for entry in entries.values() if entry["state"] == "running")
        waits = next(entry for entry in entries.values() if entry["state"] == "waiting")
        assert runs["kv_blocks"] > 0 and runs["position"] is None and runs["age_seconds"] > 0
        assert waits["kv_blocks"] == 0 and waits["position"] in (0, 1) and waits["completion_tokens"] == 0
        assert "Hello" not in json.dumps(body)
        for name in ("three", "no-such"):
            assert ask(server, "DELETE", f"/v1/queue/{name}", **{"x-api-key": "alice-key-1"})[0] == 404
        for name in ("one", "two"):
            status, _, body = ask(server, "DELETE", f"/v1/queue/{name}", **{"x-api-key": "alice-key-1"})
            assert (status, body) == (200, {"id": name, "cancelled": True})
        for raw in (first, second):
            status, headers, body = raw.read_response()
            assert (status, body["error"]["code"], headers["x-should-retry"]) == (409, "cancelled", "false")
            raw.socket.close()
        wait_for(lambda: self.listed(server, "bob-key-22")["num_requests_waiting"] == 0)
        assert [entry["finish_reason"] for entry in self.listed(server, "alice-key-1")["recent"]] == ["abort"] * 2
        assert self.listed(server, "bob-key-22")["recent"] == []
        assert [entry["id"] for entry in self.listed(server, "bob-key-22")["requests"]] == ["three"]
        other.socket.close()

    def test_a_cancelled_stream_ends_with_an_error_event(self, server):
        raw = self.start(server, "bob-key-22", "it", stream=True)
        raw.read_head()
        ask(server, "DELETE", "/v1/queue/it", **{"x-api-key": "bob-key-22"})
        events = parse_events(b"".join(raw.read_chunks()))
        assert events[-1]["error"]["code"] == "cancelled"
        raw.socket.close()

    def test_a_stream_that_waits_is_told_its_place(self, server, monkeypatch):
        monkeypatch.setattr(rustinfer, "PLACE_INTERVAL", 0.05)
        first = self.start(server, "alice-key-1", "first")
        wait_for(lambda: self.listed(server, "alice-key-1")["num_requests_running"] == 1)
        raw = self.start(server, "alice-key-1", "waits", stream=True, max_tokens=2)
        assert raw.read_head()[0] == 200
        assert next(raw.read_chunks()).startswith(b": waiting, 0 before this one")
        first.socket.close()
        body = b"".join(raw.read_chunks())
        assert parse_events(body)[-1] == "[DONE]"
        raw.socket.close()

    def test_a_full_queue_says_when_to_come_back(self, tmp_path):
        with rustinfer.LLM(None, device="cpu", max_num_seqs=1, max_queue=1) as llm, slowed(llm, 0.05):
            with local_server(llm) as server:
                for _ in range(3):
                    ask(server, "POST", CHAT, chat_body(max_tokens=1))
                running = []
                for count in ("num_requests_running", "num_requests_waiting"):
                    running.append(self.start(server, "x", count, max_tokens=100))
                    wait_for(lambda: llm.engine.snapshot()[count] == 1)
                status, headers, body = ask(server, "POST", CHAT, chat_body(max_tokens=1))
                assert (status, body["error"]["code"]) == (429, "queue_full") and int(headers["retry-after"]) >= 1
                for raw in running:
                    raw.socket.close()


class TestTimeLimit:
    @pytest.mark.parametrize("fields", [{}, {"stop": ["no such text"]}, {"n": 2}])
    def test_an_answer_that_takes_too_long_is_408_and_not_tried_again(self, tiny_llm, fields):
        with slowed(tiny_llm, 0.02), local_server(tiny_llm, request_timeout=0.3) as server:
            status, headers, body = ask(server, "POST", CHAT, chat_body(**LONG, **fields))
            assert (status, body["error"]["code"], headers["x-should-retry"]) == (408, "request_timeout", "false")
            wait_for(lambda: not tiny_llm.engine.scheduler.has_work)
            assert ask(server, "POST", CHAT, chat_body(max_tokens=2))[0] == 200

    def test_a_stream_that_takes_too_long_ends_with_an_error_event(self, tiny_llm):
        with slowed(tiny_llm, 0.02), local_server(tiny_llm, request_timeout=0.4) as server:
            status, _, body = ask(server, "POST", CHAT, chat_body(stream=True, **LONG))
            events = parse_events(body)
            assert status == 200 and len(events) > 2 and events[-1]["error"]["code"] == "request_timeout"


class TestLog:
    def test_json_lines_hold_the_facts_of_a_request(self):
        with ServerProcess("--device", "cpu", "--log-format", "json", "--api-key", "alice-key-1") as server:
            body = {**chat_body(max_tokens=3, ignore_eos=True), "user": "u-1\n", "metadata": {"a": "b"}}
            server.request("POST", CHAT, body, {"x-api-key": "alice-key-1", "x-request-id": "it"})
            server.request("POST", CHAT, {}, {"x-api-key": "alice-key-1", "x-request-id": "bad"})
            server.stop()
            records = [json.loads(line) for line in server.log.splitlines()]
            found = {record["request_id"]: record for record in records if "request_id" in record}
            it, bad = found["it"], found["bad"]
            assert (it["level"], it["status"], it["key"]) == ("info", 200, "key-1")
            assert (it["completion"], it["finish"]) == (3, "length")
            assert it["request"] == f"POST {CHAT}" and it["user"] == "u-1\n" and it["metadata"] == {"a": "b"}
            assert it["total_ms"] >= it["first_token_ms"] > 0 and it["queue_ms"] >= 0 and it["address"] == "127.0.0.1"
            assert (bad["status"], bad["error"]) == (400, "invalid_value")
            assert all(record["time"].endswith("+00:00") for record in records)
            assert any("listening on" in record.get("message", "") for record in records)


class TestTLS:
    @pytest.fixture(scope="class")
    @classmethod
    def files(cls, tmp_path_factory):
        folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        issued.private_key_pem.write_to_path(folder / "key.pem")
        issued.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        return folder

    @pytest.mark.parametrize("options", [("cert.pem", "key.pem"), ("both.pem", None)])
    def test_the_client_talks_to_it_streaming_and_not(self, tiny_llm, files, options):
        cert, key = (name and str(files / name) for name in options)
        trusted = ssl.create_default_context(cafile=str(files / "ca.pem"))
        with local_server(tiny_llm, ssl_certfile=cert, ssl_keyfile=key) as server:
            assert server.url.startswith("https://")
            with client_of(server, http_client=openai.DefaultHttpxClient(verify=trusted)) as client:
                options = dict(model="llama3-tied", messages=[{"role": "user", "content": "Hi"}], max_tokens=20,
                               temperature=0, extra_body={"ignore_eos": True})
                whole = client.chat.completions.create(**options).choices[0].message.content
                parts = [chunk.choices[0].delta.content or "" for chunk in
                         client.chat.completions.create(stream=True, **options)]
                assert "".join(parts) == whole

    @pytest.mark.parametrize("version, fields", [("1.0", {"stream": True}), ("1.1", {})])
    def test_the_end_of_a_connection_is_told_from_a_cut(self, tiny_llm, files, version, fields):
        trusted = ssl.create_default_context(cafile=str(files / "ca.pem"))
        body = json.dumps(chat_body(max_tokens=3, **fields)).encode()
        head = (f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        with local_server(tiny_llm, ssl_certfile=str(files / "both.pem")) as server:
            with RawConnection(server.port) as raw:
                raw.socket = trusted.wrap_socket(raw.socket, server_hostname="localhost", suppress_ragged_eofs=False)
                raw.send(head.encode() + body)
                assert b" 200 " in raw.read_rest()  # an SSLEOFError where the end is not told

    def test_a_client_that_leaves_is_noticed(self, tiny_llm, files):
        trusted = ssl.create_default_context(cafile=str(files / "ca.pem"))
        with slowed(tiny_llm, 0.02), local_server(tiny_llm, ssl_certfile=str(files / "both.pem")) as server:
            client = http.client.HTTPSConnection("localhost", server.port, context=trusted)
            client.request("POST", CHAT, json.dumps(chat_body(stream=True, **LONG)))
            assert client.getresponse().readline() and len(tiny_llm.engine.scheduler.running) == 1
            client.close()
            wait_for(lambda: not tiny_llm.engine.scheduler.has_work)

    def test_plain_http_and_silence_hold_nobody_up(self, tiny_llm, files, monkeypatch):
        monkeypatch.setattr(rustinfer, "HEAD_TIMEOUT", 0.3)
        trusted = ssl.create_default_context(cafile=str(files / "ca.pem"))
        with local_server(tiny_llm, ssl_certfile=str(files / "both.pem")) as server:
            with RawConnection(server.port) as plain, RawConnection(server.port) as silent:
                plain.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                client = http.client.HTTPSConnection("localhost", server.port, context=trusted)
                client.request("GET", "/health")
                assert client.getresponse().status == 200
                client.close()
                plain.read_rest()
                assert silent.at_end()
            wait_for(lambda: not server.connections)

    def test_connections_that_are_dropped_in_the_handshake_are_no_error(self, tiny_llm, files, caplog):
        with local_server(tiny_llm, ssl_certfile=str(files / "both.pem"), max_connections=2) as server:
            with contextlib.ExitStack() as opened:
                for count in range(1, 7):
                    raw = opened.enter_context(RawConnection(server.port))
                    raw.send(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
                    wait_for(lambda: len(server.connections) >= min(count, 2))
                server.stop(0)
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    def test_a_path_may_begin_at_home(self, files, monkeypatch):
        monkeypatch.setenv("HOME", str(files))
        with local_server(None, ssl_certfile="~/cert.pem", ssl_keyfile="~/key.pem") as server:
            assert server.url.startswith("https://")

    def test_files_that_cannot_be_used_are_named(self, files):
        for options in (dict(ssl_certfile=str(files / "cert.pem")), dict(ssl_keyfile=str(files / "key.pem")),
                        dict(ssl_certfile=__file__), dict(ssl_certfile=str(files / "ca.pem"),
                                                          ssl_keyfile=str(files / "key.pem"))):
            with pytest.raises(SettingsError, match="--ssl-"):
                rustinfer.Server(None, port=0, **options)


def test_no_thread_is_left_by_servers_that_come_and_go(tiny_llm):
    before = set(threading.enumerate())
    for _ in range(3):
        with local_server(tiny_llm, requests_per_minute=1000) as server:
            assert ask(server, "GET", "/metrics")[0] == 200
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
