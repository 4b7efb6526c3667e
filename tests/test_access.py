"""Keys, limits and shares: who may ask, for how much, and what is told to those who may not."""
import concurrent.futures
import contextlib
import json
import threading

import openai
import pytest
from harness import RawConnection, ask, ServerProcess, client_of, local_server, num_running, slowed, wait_for

import rustinfer
from rustinfer import Allowance, Client, Limits, RateLimitError, Server, ServerConfig, SettingsError, Tenant

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "ignore_eos": True}
ALICE, BOB = "alice-secret-1", "bob-secret-22"
CHAT = "/v1/chat/completions"


@pytest.fixture
def clock(monkeypatch):
    """Time that only a test moves."""
    now = [100.0]
    monkeypatch.setattr(rustinfer.time, "monotonic", lambda: now[0])
    return now


def key_file(tmp_path, *entries):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"name": name, "key": key, **limits} for name, key, limits in entries]))
    return str(path)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


class TestAllowance:
    def test_it_refills_evenly_and_never_beyond_a_minutes_worth(self, clock):
        allowance = Allowance(60)
        allowance.use(60)
        assert allowance.level == 0 and allowance.seconds_until(1) == 1 and allowance.seconds_until(30) == 30
        clock[0] += 10
        assert allowance.level == 10 and allowance.seconds_until(10) == 0
        clock[0] += 1000
        assert allowance.level == 60

    def test_an_overdrawn_one_is_paid_back_first(self, clock):
        allowance = Allowance(120)
        allowance.use(180)
        assert allowance.level == -60 and allowance.seconds_until(0) == 30
        allowance.use(-500)
        assert allowance.level == 120


class TestClient:
    def test_requests_and_tokens_are_taken_or_refused_with_the_time_to_wait(self, clock):
        client = Client(Tenant("a"), Limits(2, 100))
        assert client.take("requests", 1) == client.take("requests", 1) == 1
        with pytest.raises(RateLimitError) as caught:
            client.take("requests", 1)
        assert caught.value.headers["Retry-After"] == "30" and caught.value.headers["retry-after-ms"] == "30000"
        assert caught.value.headers["x-ratelimit-remaining-requests"] == "0"
        assert client.take("tokens", 1000) == 100  # more than a minute's worth is never there
        with pytest.raises(RateLimitError):
            client.take("tokens", 1)
        client.settle(100, 30)
        assert client.headers()["x-ratelimit-remaining-tokens"] == "70"
        assert client.headers()["x-ratelimit-reset-tokens"] == "18.000s"

    def test_without_limits_nothing_is_counted(self):
        client = Client(Tenant("a"), Limits())
        assert [client.take("requests", 1), client.take("tokens", 10**9), client.headers()] == [0, 0, {}]

    def test_no_more_run_at_once_than_may(self):
        client = Client(Tenant("a"), Limits(max_concurrent_requests=2))
        with client.running(), client.running():
            with pytest.raises(RateLimitError), client.running():
                pass
        assert client.num_running == 0
        with client.running():
            pass

    def test_many_threads_take_no_more_than_there_is(self, clock):
        client = Client(Tenant("a"), Limits(requests_per_minute=50))
        taken, start = [], threading.Barrier(8)

        def take():
            start.wait()
            for _ in range(20):
                try:
                    taken.append(client.take("requests", 1))
                except RateLimitError:
                    pass

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(take)
        assert len(taken) == 50


class TestKeyFile:
    @pytest.mark.parametrize("content, said", [
        ("{}", "array"), ("[]", "a list"), ("[5]", r"\[0\]"), ('[{"name": "a"}]', r"\[0\]"),
        ("nonsense", "the file is not valid JSON.*char 0"),
        ('[{"name": "a", "key": "long-enough"}], "more": []', "not valid JSON"),
        ('[{"name": "a", "key": "short"}]', "8 to 512"), ('[{"name": "", "key": "long-enough"}]', "not empty"),
        ('[{"name": "a", "key": "long-enough", "limit": 5}]', "limit"),
        ('[{"name": "a", "key": "long-enough", "tokens_per_minute": 0}]', "tokens_per_minute"),
        ('[{"name": "a", "key": "long-enough"}, {"name": "a", "key": "long-enough-2"}]', "twice"),
        ('[{"name": "a", "key": "long-enough"}, {"name": "b", "key": "long-enough"}]', "twice")])
    def test_what_is_wrong_is_said_and_no_key_is_shown(self, tmp_path, content, said):
        path = tmp_path / "keys.json"
        path.write_text(content)
        with pytest.raises(SettingsError, match=said) as caught:
            rustinfer.Access(ServerConfig(api_key_file=str(path)))
        assert "long-enough" not in str(caught.value)

    def test_limits_of_a_key_replace_the_general_ones(self, tmp_path):
        path = key_file(tmp_path, ("alice", ALICE, {"requests_per_minute": 7}), ("bob", BOB, {}))
        access = rustinfer.Access(ServerConfig(api_key_file=path, requests_per_minute=3, tokens_per_minute=90))
        for key, requests in ((ALICE, "7"), (BOB, "3")):
            headers = access.client(key, "").headers()
            assert headers["x-ratelimit-limit-requests"] == requests and headers["x-ratelimit-limit-tokens"] == "90"


class TestKeys:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tiny_llm, tmp_path_factory):
        path = key_file(tmp_path_factory.mktemp("keys"), ("bob", BOB, {}))
        with local_server(tiny_llm, api_key=(ALICE,), api_key_file=path) as server:
            yield server

    @pytest.mark.parametrize("method, path", [
        ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("GET", "/v1/metrics"), ("GET", "/metrics"),
        ("GET", "/version"), ("GET", "/v1/capabilities"), ("GET", "/openapi.json"),
        ("POST", CHAT), ("GET", CHAT), ("HEAD", CHAT), ("POST", "/v1/completions"), ("POST", "/tokenize"),
        ("POST", "/detokenize"), ("POST", "/apply-template"),
        ("GET", "/v1/queue"), ("DELETE", "/v1/queue/x"), ("GET", "/nope"), ("PUT", CHAT), ("GET", "//health"),
        ("GET", "/health/"), ("GET", "/%68ealth"), ("GET", "/health/../v1/models")])
    def test_everything_else_needs_a_key(self, server, method, path):
        for headers in ({}, bearer("wrong-secret"), bearer(""), bearer(ALICE + "x"), bearer(ALICE[:-1]),
                        {"Authorization": ALICE}, {"Authorization": f"Basic {ALICE}"}, {"x-api-key": "wrong-secret"},
                        {"Authorization": "Bearer caf\xe9-caf\xe9"}):
            status, answer, body = ask(server, method, path, {} if method == "POST" else None, **headers)
            assert status == 401 and answer["www-authenticate"] == "Bearer"
            assert method == "HEAD" or body["error"]["code"] == "invalid_api_key"

    @pytest.mark.parametrize("headers", [bearer(ALICE), bearer(BOB), {"x-api-key": ALICE}, {"X-API-Key": BOB},
                                         {"Authorization": f"bearer {ALICE}"}])
    def test_each_key_opens_by_either_header(self, server, headers):
        assert ask(server, "GET", "/v1/models", **headers)[0] == 200
        assert ask(server, "POST", CHAT, HELLO, **headers)[0] == 200
        assert ask(server, "GET", "/nope", **headers)[0] == 404

    def test_probes_page_and_preflights_are_open(self, server):
        assert [ask(server, "GET", path)[0] for path in ("/health", "/ready", "/")] == [200] * 3
        assert ask(server, "OPTIONS", CHAT)[0] == 204

    def test_a_key_in_the_query_is_for_the_route_of_eventsource_alone(self, server):
        query = "?max_tokens=2&messages=[{%22role%22:%22user%22,%22content%22:%22Hi%22}]&api_key="
        assert ask(server, "GET", CHAT + query + ALICE)[0] == 200
        assert ask(server, "GET", CHAT + query + "wrong-secret")[0] == 401
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics")):
            assert ask(server, method, f"{path}?api_key={ALICE}", {} if method == "POST" else None)[0] == 401

    def test_no_key_is_ever_logged_and_its_name_is(self):
        with ServerProcess("--device", "cpu", "--api-key", ALICE, "--log-level", "debug") as server:
            query = "?max_tokens=2&messages=[{%22role%22:%22user%22,%22content%22:%22Hi%22}]&api_key="
            for key in (ALICE, "wrong-secret"):
                server.request("GET", CHAT + query + key)
                server.request("POST", CHAT, HELLO, bearer(key))
            server.stop()
            assert "key=key-1" in server.log and "invalid_api_key" in server.log
            assert ALICE not in server.log and "wrong-secret" not in server.log

    def test_the_client_sees_its_own_error_class(self, server):
        with client_of(server, api_key="wrong-secret") as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with client_of(server, api_key=BOB) as client:
            assert client.models.list().data

    def test_equal_prompts_of_two_keys_share_nothing(self, server, tiny_llm):
        body = {"prompt": list(range(200, 300)), "max_tokens": 2}
        cached = lambda key: ask(server, "POST", "/v1/completions", body, **bearer(key))[2]["usage"][
            "prompt_tokens_details"]["cached_tokens"]
        assert cached(ALICE) == 0 and cached(BOB) == 0 and cached(ALICE) > 0 and cached(BOB) > 0

    def test_a_public_address_without_a_key_is_warned_about(self):
        with ServerProcess("--host", "0.0.0.0", "--device", "cpu") as server:
            assert "no API key is set" in server.read_log()
        with ServerProcess("--host", "0.0.0.0", "--device", "cpu", "--api-key", ALICE) as server:
            assert "no API key is set" not in server.read_log()


class TestLimits:
    def test_requests_a_minute(self, tiny_llm):
        with local_server(tiny_llm, requests_per_minute=2) as server:
            first = ask(server, "POST", CHAT, HELLO)
            assert first[0] == 200 and first[1]["x-ratelimit-limit-requests"] == "2"
            assert first[1]["x-ratelimit-remaining-requests"] == "1"
            assert ask(server, "POST", "/tokenize", {"prompt": "a"})[0] == 200
            status, headers, body = ask(server, "POST", CHAT, HELLO)
            assert status == 429 and body["error"]["code"] == "rate_limit_exceeded"
            assert body["error"]["type"] == "rate_limit_error" and 25 <= int(headers["retry-after"]) <= 30
            assert ask(server, "GET", "/v1/models")[0] == 200  # it computes nothing

    def test_the_tokens_of_an_answer_count_as_they_were_used(self, tiny_llm):
        with local_server(tiny_llm, tokens_per_minute=1000) as server:
            status, headers, body = ask(server, "POST", CHAT, {**HELLO, "max_tokens": 400, "stop": ["e", "a"]})
            used = body["usage"]["total_tokens"]
            left = int(ask(server, "GET", "/v1/models")[1]["x-ratelimit-remaining-tokens"])
            assert status == 200 and 1000 - used - 1 <= left <= 1000 - used + 40
            assert ask(server, "POST", CHAT, {**HELLO, "max_tokens": 400, "n": 8})[0] == 429

    def test_requests_at_once(self, tiny_llm):
        with slowed(tiny_llm, 0.02), local_server(tiny_llm, max_concurrent_requests=1) as server:
            with RawConnection(server.port) as raw:
                raw.send_request("POST", CHAT, {**HELLO, "max_tokens": 60, "stream": True})
                raw.read_head()
                status, headers, body = ask(server, "POST", CHAT, HELLO)
                assert status == 429 and headers["retry-after"] == "1"
            wait_for(lambda: ask(server, "POST", CHAT, HELLO)[0] == 200)

    def test_a_refused_request_costs_no_tokens(self, tiny_llm):
        with local_server(tiny_llm, tokens_per_minute=600) as server:
            for body in ({**HELLO, "model": "other"}, {**HELLO, "max_tokens": 10**6}):
                assert ask(server, "POST", CHAT, body)[0] in (400, 404)
            assert ask(server, "GET", "/v1/models")[1]["x-ratelimit-remaining-tokens"] == "600"

    def test_a_prompt_that_only_waited_costs_nothing(self):
        with rustinfer.LLM(None, device="cpu", max_num_seqs=1) as llm, slowed(llm, 0.02):
            with local_server(llm, tokens_per_minute=5000) as server, RawConnection(server.port) as runs:
                runs.send_request("POST", CHAT, {**HELLO, "max_tokens": 1000, "ignore_eos": True})
                wait_for(lambda: num_running(llm) == 1)
                left = lambda: int(ask(server, "GET", "/v1/models")[1]["x-ratelimit-remaining-tokens"])
                before = left()
                with RawConnection(server.port) as waits:
                    waits.send_request("POST", "/v1/completions", {"prompt": [5] * 2000}, {"x-request-id": "waits"})
                    wait_for(lambda: ask(server, "DELETE", "/v1/queue/waits")[0] == 200)
                    assert waits.read_response()[0] == 409 and left() >= before

    def test_forgotten_addresses_are_those_that_were_silent_longest(self, monkeypatch):
        monkeypatch.setattr(rustinfer.Access, "MAX_ADDRESSES", 3)
        access = rustinfer.Access(ServerConfig(requests_per_minute=5))
        first = access.client(None, "1")
        with access.client(None, "2").running():
            for address in ("3", "1", "4"):
                access.client(None, address)
            assert access.client(None, "1") is first and access.client(None, "2").num_running == 1


class TestShares:
    """500 requests of one key and one of another, over HTTP, with equal prompts."""

    @pytest.fixture
    def llm(self):
        with rustinfer.LLM(None, device="cpu", max_queue=600) as llm:
            yield llm

    @pytest.fixture
    def shared(self, llm, monkeypatch):
        """Blocks that sequences of two tenants had at once, in any step."""
        schedule, found = llm.engine.scheduler.schedule, []

        def watched():
            step, owners = schedule(), {}
            for seq in llm.engine.scheduler.running:
                found.extend(block for block in seq.block_table if owners.setdefault(block, seq.tenant) != seq.tenant)
            return step

        monkeypatch.setattr(llm.engine.scheduler, "schedule", watched)
        return found

    def test_one_request_passes_500_of_another_key_and_they_share_nothing(self, llm, shared, tmp_path):
        path, engine = key_file(tmp_path, ("alice", ALICE, {}), ("bob", BOB, {})), llm.engine
        body = {"messages": [{"role": "user", "content": "What is Rust? " * 8}], "ignore_eos": True, "max_tokens": 40}
        with local_server(llm, api_key_file=path, max_connections=700) as server, contextlib.ExitStack() as opened:
            crowd = [opened.enter_context(RawConnection(server.port)) for _ in range(500)]
            with slowed(llm, 0.05):  # the engine must not be done with the crowd before all have come
                for raw in crowd:
                    raw.send_request("POST", CHAT, body, bearer(ALICE))
                wait_for(lambda: engine.snapshot()["num_requests_waiting"] > 400)
                steps = engine.metrics.steps
                status, _, answer = ask(server, "POST", CHAT, {**body, "max_tokens": 1}, **bearer(BOB))
                assert status == 200 and answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
                assert engine.metrics.steps - steps < 20 and engine.snapshot()["num_requests_waiting"] > 300
            hits = [raw.read_response()[2]["usage"]["prompt_tokens_details"]["cached_tokens"] for raw in crowd[-5:]]
            assert min(hits) > 0 and shared == []
        wait_for(lambda: not engine.scheduler.has_work and engine.snapshot()["kv_blocks_used"] == 0)


class TestHosts:
    @pytest.mark.parametrize("host, status", [
        ("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:5", 200), ("LOCALHOST:1", 200), ("evil.example", 403),
        ("evil.example:8000", 403), ("localhost.evil.example", 403), ("10.0.0.1", 403)])
    def test_on_loopback_the_host_must_be_ours(self, tiny_llm, host, status):
        with local_server(tiny_llm) as server:
            assert ask(server, "GET", "/health", Host=host)[0] == status

    def test_more_names_may_be_allowed_and_keys_make_the_check_needless(self, tiny_llm):
        for options in ({"allowed_hosts": "evil.example, other"}, {"allowed_hosts": "*"}, {"api_key": (ALICE,)}):
            with local_server(tiny_llm, **options) as server:
                assert ask(server, "GET", "/health", Host="evil.example")[0] == 200


def test_options_are_checked_as_flags_are(tiny_llm):
    with pytest.raises(SettingsError, match="api_key"):
        Server(tiny_llm, port=0, api_key=("short",))
    with pytest.raises(SettingsError, match="no such option"):
        Server(tiny_llm, port=0, api_keys=("long-enough",))
