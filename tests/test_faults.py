"""A bad day: every part fails once, processes are signalled and killed under load, disks and descriptors run out.

What a client gets is the right answer, a documented error, or a connection that ends before its answer is whole; never
a mixed-up answer, nor one cut short that looks complete. Afterwards all blocks are free and the next one is answered.
"""
import concurrent.futures
import contextlib
import os
import random
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
import rustinfer
import trustme
from harness import (DEMO, REFERENCES, ROOT, RawConnection, ServerProcess, chat_body,
                     local_server, parse_events, slowed, streamed_text, wait_for)

CHAT = "/v1/chat/completions"
QUESTIONS = ("What is Rust?", "Count to 10.", "Who are you?", "Tell me a joke.")
MUCH = {"stream": True, "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "logprobs": True, "top_logprobs": 20}
SHAPE = {"structured_outputs": {"choice": ["yes", "no"]}}


class Panic(BaseException):
    """As libraries in Rust raise it."""


FAULTS = pytest.mark.parametrize("fault", [RuntimeError, MemoryError, Panic])
STREAMING = pytest.mark.parametrize("stream", [False, True])


def fails_at(function, fault, turn=0):
    """The function, whose call number `turn` raises; what it raised at is in `calls`."""
    calls = []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) - 1 == turn:
            raise fault("seeded fault")
        return function(*args, **options)

    failing.calls = calls
    return failing


@pytest.fixture(scope="module")
def llm():
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm:
        yield llm


@pytest.fixture
def server(llm):
    """After each test: nothing left over, the answer as before, no thread more."""
    before, body = threading.active_count(), chat_body(max_tokens=8, temperature=0)
    with local_server(llm) as server:
        with RawConnection(server.port) as raw:
            right = raw.request("POST", CHAT, body)[2]["choices"]
            yield server
            assert raw.request("POST", CHAT, body)[2]["choices"] == right
        wait_for(lambda: not server.connections and not server._jobs)
        llm.engine.blocks.check(())
        assert not llm.engine._handles and not llm.engine.scheduler.has_work and llm.engine.dead is None
    wait_for(lambda: threading.active_count() <= before)


def ask(server, **fields):
    with RawConnection(server.port) as raw:
        return raw.request("POST", CHAT, chat_body(**{"max_tokens": 20, "ignore_eos": True, **fields}))


def check_failed(answer, stream, begun):
    """A 500, or where a stream had begun an error event at its end; no word of what went wrong inside.

    begun: None where that depends on who was faster.
    """
    status, _, body = answer
    assert status in {True: (200,), False: (500,), None: (200, 500)}[begun if stream else False]
    body = parse_events(body)[-1] if status == 200 else body
    assert (body["error"]["code"], body["error"]["type"]) == ("internal_error", "server_error")
    assert "seeded" not in body["error"]["message"]


class TestOneRequest:
    """A part fails for one request: it alone is told."""

    @FAULTS
    @STREAMING
    @pytest.mark.parametrize("owner, name, turn, begun", [
        ("template", "encode", 0, False), ("tokenizer", "token_bytes", 0, False), ("tokenizer", "token_bytes", 9, None),
        ("grammars", "compile", 0, False)])
    def test_a_failing_tokenizer_template_or_grammar_compiler(
            self, server, llm, monkeypatch, owner, name, turn, begun, stream, fault):
        failing = fails_at(getattr(getattr(llm, owner), name), fault, turn)
        monkeypatch.setattr(getattr(llm, owner), name, failing)
        answer = ask(server, stream=stream, **(SHAPE if owner == "grammars" else {}))
        assert len(failing.calls) > turn
        check_failed(answer, stream, begun)
        monkeypatch.undo()

    @FAULTS
    @STREAMING
    def test_a_failing_encoder(self, server, llm, monkeypatch, stream, fault):
        monkeypatch.setattr(rustinfer.Tokenizer, "_ids", staticmethod(fails_at(rustinfer.Tokenizer._ids, fault)))
        check_failed(ask(server, stream=stream), stream, False)
        monkeypatch.undo()

    @FAULTS
    @pytest.mark.parametrize("name, turn", [("_choice", 0), ("first_events", 0), ("text_event", 0), ("text_event", 2),
                                            ("end_events", 0), ("last_events", 0)])
    def test_a_failing_reply(self, server, monkeypatch, name, turn, fault):
        failing, stream = fails_at(getattr(rustinfer.ChatReply, name), fault, turn), name != "_choice"
        monkeypatch.setattr(rustinfer.ChatReply, name, lambda self, *args: failing(self, *args))
        check_failed(ask(server, stream=stream, max_tokens=400), stream, True)
        assert len(failing.calls) > turn
        monkeypatch.undo()

    @FAULTS
    @STREAMING
    def test_a_failing_head(self, server, monkeypatch, stream, fault):
        failing = fails_at(rustinfer.Server.cors_headers, fault)
        monkeypatch.setattr(rustinfer.Server, "cors_headers", lambda self, request: failing(self, request))
        check_failed(ask(server, stream=stream), stream, False)
        monkeypatch.undo()

    @FAULTS
    def test_a_failing_queue_place(self, server, llm, monkeypatch, fault):
        """The second of n choices cannot be queued: the first does not run on."""
        monkeypatch.setattr(llm, "submit", fails_at(llm.submit, fault, 1))
        check_failed(ask(server, n=3), False, False)
        monkeypatch.undo()

    @FAULTS
    def test_a_failing_answer_object_leaves_no_sequence(self, server, llm, monkeypatch, fault):
        monkeypatch.setattr(rustinfer, "StopMatcher", fails_at(rustinfer.StopMatcher, fault))
        check_failed(ask(server, max_tokens=1500), False, False)
        monkeypatch.undo()

    @FAULTS
    @pytest.mark.parametrize("question", ["compute_bitmask", "consume_token", "is_stopped", "is_error"])
    def test_a_failing_grammar_ends_its_request_and_no_other(self, server, llm, monkeypatch, question, fault):
        class Matcher:
            def __init__(self, inner):
                self.inner = inner

            def deep_copy(self):
                return Matcher(self.inner.deep_copy())

            def __getattr__(self, name):
                return fails_at(getattr(self.inner, name), fault) if name == question else getattr(self.inner, name)

        compile_it = llm.grammars.compile

        def compile_badly(structure):
            constraint = compile_it(structure)
            constraint._matcher = Matcher(constraint._matcher)
            return constraint

        right = ask(server, temperature=0, max_tokens=60)[2]["choices"]
        monkeypatch.setattr(llm.grammars, "compile", compile_badly)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            other = pool.submit(ask, server, temperature=0, max_tokens=60)
            status, _, body = ask(server, structured_outputs={"regex": "[ab]{9}"})
            assert other.result()[2]["choices"] == right
        assert (status, body["error"]["code"]) == (500, "internal_error") and "grammar" in body["error"]["message"]
        monkeypatch.undo()


class TestOneStep:
    """A step fails: who was in it is told, and everybody else goes on."""

    @pytest.mark.parametrize("fault", [RuntimeError, MemoryError])
    @STREAMING
    @pytest.mark.parametrize("place, turn",
                             [("run", 0),
                              ("run", 7),
                              ("prepare_batch", 0),
                              ("prepare_batch", 5),
                              ("sample", 0),
                              ("sample", 6)])
    def test_a_failing_run(self, server, llm, monkeypatch, place, turn, stream, fault):
        owner = {"run": llm.engine.model, "prepare_batch": rustinfer, "sample": llm.engine._runner._sampler}[place]
        monkeypatch.setattr(owner, place, fails_at(getattr(owner, place), fault, turn))
        check_failed(ask(server, stream=stream), stream, None if turn else False)
        monkeypatch.undo()

    @STREAMING
    def test_logits_that_are_not_numbers(self, server, llm, monkeypatch, stream):
        run, steps = llm.engine.model.run, []

        def run_to_nan(batch):
            steps.append(batch)
            return run(batch) * (float("nan") if len(steps) == 4 else 1)

        monkeypatch.setattr(llm.engine.model, "run", run_to_nan)
        check_failed(ask(server, stream=stream), stream, None)
        monkeypatch.undo()

    def test_of_many_requests_each_gets_its_own_answer_or_an_error(self, server, llm, monkeypatch):
        """Every eleventh step fails while requests come and go; no answer is another's."""
        texts = [f"number {index} of them" for index in range(8)]
        right = {text: ask(server, text=text, temperature=0, max_tokens=4)[2]["choices"] for text in texts}
        run, steps = llm.engine.model.run, []

        def run_badly(batch):
            steps.append(0)
            if len(steps) % 11 == 0:
                raise MemoryError
            return run(batch)

        monkeypatch.setattr(llm.engine.model, "run", run_badly)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            ask_one = lambda text: (text, ask(server, text=text, temperature=0, max_tokens=4))
            answers = list(pool.map(ask_one, texts * 12))
        monkeypatch.undo()
        assert {answer[0] for _, answer in answers} == {200, 500}
        assert all(answer[2]["choices"] == right[text] for text, answer in answers if answer[0] == 200)


class TestNoRoom:
    """Threads and descriptors run out."""

    def test_without_a_thread_a_client_is_told_to_come_again(self, server, monkeypatch):
        start = threading.Thread.start

        def refuse(thread):
            if thread.name.startswith("Thread-"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with RawConnection(server.port) as raw:
            status, headers, body = raw.request("GET", "/health")
        monkeypatch.undo()
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "too_many_connections", "1")

    def test_idle_connections_give_their_descriptors_up(self, tmp_path):
        """With 40 descriptors, 60 silent clients and then honest ones: each of those is answered."""
        script = tmp_path / "few.py"
        script.write_text(f"import resource, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport rustinfer\n"
                          "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\nsys.exit(rustinfer.main())\n")
        with ServerProcess("--device", "cpu", model=REFERENCES / "llama3-tied", script=script) as server:
            silent = [RawConnection(server.port) for _ in range(60)]
            for _ in range(5):
                assert server.chat(max_tokens=4)[0] == 200 and server.get("/health")[0] == 200
            for raw in silent:
                raw.socket.close()
            assert server.chat(max_tokens=4, stream=True)[0] == 200
            assert server.stop() == 0 and "Traceback" not in server.log

    def test_descriptors_above_1023_speak_tls(self, llm, tmp_path):
        pem = tmp_path / "both.pem"
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
        with local_server(llm, ssl_certfile=str(pem)) as server, contextlib.ExitStack() as opened:
            if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2200:
                rustinfer.raise_file_limit(2200)
            for _ in range(1100):
                opened.enter_context(open(os.devnull))
            with socket.create_connection(("127.0.0.1", server.port), 10) as plain:
                with ssl._create_unverified_context().wrap_socket(plain) as inside:
                    assert inside.fileno() > 1023
                    inside.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    assert inside.recv(100).startswith(b"HTTP/1.1 200")


class TestNobodyReadsTheLog:
    """stdout and stderr are full or closed; the exit code is as ever."""

    @pytest.mark.parametrize("flags, code", [((), 0), (("--no-such-flag",), 2), (("--max-num-seqs", "0"), 2)])
    @pytest.mark.parametrize("sink", ["full", "closed"])
    def test_the_server_goes_on_and_ends_as_it_should(self, sink, flags, code):
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            port = chosen.getsockname()[1]
        if sink == "full":
            out = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, out = os.pipe()
            os.close(reader)
        command = [sys.executable, str(ROOT / "rustinfer.py"), "--model", str(DEMO),
                                       "--device", "cpu", "--port", str(port)]
        process = subprocess.Popen([*command, *flags], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        os.close(out)
        try:
            if code == 0:
                wait_for(lambda: self.is_ready(port), 30)
                for _ in range(30):
                    with RawConnection(port) as raw:
                        assert raw.request("POST", CHAT, chat_body(max_tokens=3))[0] == 200
                        assert raw.request("POST", CHAT, {})[0] == 400
                process.terminate()
            assert process.wait(20) == code
        finally:
            process.kill()
            process.wait()

    @staticmethod
    def is_ready(port):
        with contextlib.suppress(OSError), RawConnection(port) as raw:
            return raw.request("GET", "/ready")[0] == 200


class TestSignals:
    """Real processes under load are signalled at random moments."""

    def load(self, port, rng, right, ended, seen):
        """One client: asks to the end; every answer is right, a documented error, or visibly cut short."""
        while not ended.is_set():
            text, stream = rng.choice(QUESTIONS), rng.random() < 0.5
            try:
                with RawConnection(port, 20) as raw:
                    raw.send_request("POST", CHAT, chat_body(text, stream=stream, temperature=0, max_tokens=200))
                    status, _, body = raw.read_response()
            except AssertionError as error:
                assert "the connection ended" in str(error), error
                seen.append("cut")
            except ConnectionError:
                seen.append("closed")
            else:
                seen.append(self.judge(text, status, body, right))

    @staticmethod
    def judge(text, status, body, right):
        if status == 200 and isinstance(body, dict):
            assert body["choices"][0]["message"]["content"] == right[text]
        elif status == 200:
            *events, last = parse_events(body)
            if last != "[DONE]":
                assert last["error"]["code"] == "shutting_down"
                assert right[text].startswith(streamed_text(events))
                return "shutting_down"
            assert streamed_text(events) == right[text]
        else:
            assert (status, body["error"]["code"]) in ((503, "shutting_down"), (429, "queue_full"))
            return body["error"]["code"]
        return "right"

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("first, second, codes",
                             [(signal.SIGTERM, None, (0,)),
                              (signal.SIGKILL, None, (-signal.SIGKILL,)),
                              (signal.SIGTERM, signal.SIGTERM, (0, 1)),
                              (signal.SIGINT, signal.SIGTERM, (0, 1))])
    def test_no_answer_is_mixed_up_or_looks_whole_when_it_is_not(self, first, second, codes, seed):
        rng, ended, seen = random.Random(seed), threading.Event(), []
        with ServerProcess("--device", "cpu", "--drain-timeout", rng.choice(("0.05", "5")), "--max-num-seqs", "6",
                           model=DEMO) as server:
            right = {text: server.chat(text, temperature=0, max_tokens=200)[2]["choices"][0]["message"]["content"]
                     for text in QUESTIONS}
            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                clients = [pool.submit(self.load, server.port, random.Random(number),
                                       right, ended, seen) for number in range(12)]
                try:
                    wait_for(lambda: "right" in seen)
                    time.sleep(rng.uniform(0, 0.5))
                    server.process.send_signal(first)
                    if second:
                        time.sleep(rng.uniform(0, 0.1))
                        server.process.send_signal(second)
                    assert server.process.wait(20) in codes
                finally:
                    ended.set()
                for client in clients:
                    client.result(30)
            assert "right" in seen and "Traceback" not in server.read_log()


class TestNobodyReads:
    """A client that does not read holds no blocks; once it reads it gets all of its answer."""

    @pytest.fixture(autouse=True)
    def steady(self, llm):
        """The answer takes longer than it takes to notice that nobody reads it."""
        with slowed(llm, 0.002):
            yield

    def test_its_sequence_is_put_aside_and_goes_on_later(self, llm, server):
        body = chat_body(**MUCH)
        with RawConnection(server.port) as raw:
            right = raw.request("POST", CHAT, body)[2]
        slow = RawConnection.__new__(RawConnection)
        slow.socket, slow.buffer = socket.socket(), b""
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.socket.connect(("127.0.0.1", server.port))
        slow.send_request("POST", CHAT, body)
        wait_for(lambda: llm.engine.scheduler.aside)
        state = llm.engine.snapshot()
        assert (state["kv_blocks_used"], state["num_requests_running"], state["num_requests_waiting"]) == (0, 0, 1)
        assert ask(server)[0] == 200
        slow.socket.settimeout(30)
        assert streamed_text(parse_events(slow.read_response()[2])) == streamed_text(parse_events(right))
        slow.socket.close()

    def test_one_that_is_put_aside_waits_and_once_cancelled_is_no_longer_listed(self, llm, server):
        with RawConnection(server.port) as slow, RawConnection(server.port) as raw:
            slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.send_request("POST", CHAT, chat_body(**MUCH), {"x-request-id": "slow"})
            wait_for(lambda: llm.engine.scheduler.aside)
            [entry] = raw.request("GET", "/v1/queue")[2]["requests"]
            assert (entry["state"], entry["position"], entry["kv_blocks"]) == ("waiting", None, 0)
            assert raw.request("DELETE", "/v1/queue/slow")[2]["cancelled"]
            assert raw.request("GET", "/v1/queue")[2]["requests"] == []
            wait_for(lambda: not llm.engine._handles)
            status, _, body = slow.read_response()
            assert status == 200 and parse_events(body)[-1]["error"]["code"] == "cancelled"

    @pytest.mark.parametrize("how", ["leave", "drain"])
    def test_one_that_is_put_aside_can_leave(self, llm, how):
        with local_server(llm) as server:
            with RawConnection(server.port) as raw:
                raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                raw.send_request("POST", CHAT, chat_body(**MUCH))
                wait_for(lambda: llm.engine.scheduler.aside)
                if how == "drain":
                    server.stop(0)
            wait_for(lambda: not llm.engine._handles)
        assert not llm.engine.scheduler.aside and not llm.engine.scheduler.has_work
        llm.engine.blocks.check(())

    def test_a_slow_attack_holds_nobody_up(self, llm, monkeypatch):
        """Half-open, slow and non-reading connections at once, as many as there may be: an honest client is served."""
        with local_server(llm, max_connections=48) as server, contextlib.ExitStack() as opened:
            for number in range(60):
                raw = opened.enter_context(RawConnection(server.port))
                if number % 3 == 0:
                    raw.send(b"GET /health HTTP/1.1\r\nHo")
                elif number % 3 == 1:
                    raw.send(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n{" % CHAT.encode())
                else:
                    raw.send_request("POST", CHAT, chat_body(**MUCH))
                assert ask(server)[0] == 200
        wait_for(lambda: not llm.engine._handles)


def test_a_sequence_put_aside_keeps_its_turn_and_its_tokens(llm):
    params = rustinfer.SamplingParams(max_tokens=60, ignore_eos=True, temperature=0)
    right = list(llm.engine.submit([5, 6, 7], params))
    with slowed(llm, 0.002):
        handle = llm.engine.submit([5, 6, 7], params)
        taken = handle.take(at_least=3)
        for _ in range(5):
            handle.hold(True)
            wait_for(lambda: handle.seq in llm.engine.scheduler.aside)
            assert not handle.seq.block_table
            taken += handle.take(0)
            handle.hold(False)
            if handle.finish_reason is None:
                taken += handle.take(10)
        assert taken + list(handle) == right
    handle.hold(True)  # of one that has ended it is nothing
    assert not llm.engine.scheduler.has_work
