"""A server under everything at once for a long time: `python tests/bench/soak.py [--minutes 30]`.

32 clients with two keys ask for streams and whole answers, several choices, structured output, tools and completions,
leave in the middle, cancel, run into the time limit and send what is refused. Answers are compared with earlier ones.
At the end memory must be within 2 % of what it was after the warm-up (five minutes, or a sixth of a shorter run),
all blocks free, no thread left over, and nothing answered 500.
"""
import argparse
import collections
import contextlib
import itertools
import json
import random
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent),
                str(Path(__file__).resolve().parent.parent.parent)]
import psutil  # noqa: E402
from fuzz import Broken, Maker, read_tracebacks  # noqa: E402
from harness import RawConnection, ServerProcess, parse_events, streamed_text, wait_for  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEYS = ("soak-key-alice", "soak-key-bob-2")
FLAGS = ("--device", "cpu", "--request-timeout", "3", "--max-num-seqs", "24", "--kv-cache-memory", "48MiB",
         *itertools.chain.from_iterable(("--api-key", key) for key in KEYS))
QUESTIONS = ("What is Rust?", "Count to 10.", "Tell me a joke.", "Who are you?", "What is the capital of France?")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"],
          "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {
    "type": "object", "properties": {"what": {"enum": ["sun", "rain"]}}, "required": ["what"]}}}]
LONG = dict(max_tokens=3000, ignore_eos=True)


class Client:
    """One of the clients: does one thing after the other until it is told to stop."""

    def __init__(self, port, seed, expected, stopped):
        self.port, self.rng, self.expected, self.stopped = port, random.Random(seed), expected, stopped
        self.maker, self.key = Maker(self.rng), KEYS[seed % 2]
        self.seen, self.broken = collections.Counter(), []

    def run(self):
        ways = (self.stream, self.stream, self.whole, self.choices, self.shaped, self.called,
                self.completion, self.leave, self.leave, self.bad, self.bad, self.cancel, self.overtime)
        while not self.stopped.is_set() and len(self.broken) < 5:
            way = self.rng.choice(ways)
            try:
                with RawConnection(self.port, 30) as raw:
                    self.seen[way.__name__, way(raw)] += 1
            except (AssertionError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
                self.broken.append(f"{way.__name__}: {type(error).__name__}: {str(error)[:1000]}")

    def ask(self, raw, body, path=CHAT, **headers):
        return raw.request("POST", path, body, {"x-api-key": self.key, **headers})

    def question(self, **fields):
        """A body whose right answer is known, and that answer."""
        text = self.rng.choice(QUESTIONS)
        return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 60, **fields}, text

    def told(self, text, answer):
        """The answer must be as the first time: whoever else is there changes nothing."""
        if self.expected.setdefault(text, answer) != answer:
            raise Broken(f"{text!r} was answered {answer!r}, before {self.expected[text]!r}")

    def right(self, status, body):
        if status not in (200, 408):
            raise Broken(f"status {status}: {body}")
        return status == 200

    def stream(self, raw):
        body, text = self.question(stream=True)
        status, _, answer = self.ask(raw, body)
        if self.right(status, answer):
            events = parse_events(answer)
            if events[-1] != "[DONE]":
                return events[-1]["error"]["code"]
            self.told(text, streamed_text(events))
        return status

    def whole(self, raw):
        for _ in range(3):  # on one connection
            body, text = self.question()
            status, _, answer = self.ask(raw, body)
            if self.right(status, answer):
                self.told(text, answer["choices"][0]["message"]["content"])
        return status

    def choices(self, raw):
        body, text = self.question(n=3)
        status, _, answer = self.ask(raw, body)
        if self.right(status, answer):
            for choice in answer["choices"]:
                self.told(text, choice["message"]["content"])
        return status

    def shaped(self, raw):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        status, _, answer = self.ask(raw, self.question(response_format=wanted, temperature=1.0)[0])
        if self.right(status, answer) and answer["choices"][0]["finish_reason"] == "stop":
            if not set(json.loads(answer["choices"][0]["message"]["content"])) == {"a", "b"}:
                raise Broken(f"not the shape: {answer}")
        return status

    def called(self, raw):
        status, _, answer = self.ask(raw, self.question(tools=TOOLS, tool_choice="required", temperature=1.0)[0])
        if self.right(status, answer) and answer["choices"][0]["finish_reason"] == "tool_calls":
            call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
            if json.loads(call["arguments"])["what"] not in ("sun", "rain"):
                raise Broken(f"not the tool's arguments: {answer}")
        return status

    def completion(self, raw):
        body = {"prompt": ["One two", [5, 6, 7]], "max_tokens": 30, "logprobs": 2, "echo": True, "n": 2}
        status, _, answer = self.ask(raw, body, COMPLETIONS)
        if self.right(status, answer) and [choice["index"] for choice in answer["choices"]] != [0, 1, 2, 3]:
            raise Broken(f"choices: {answer}")
        return status

    def leave(self, raw):
        """In the queue, in prefill, in decode, or before the request is whole."""
        long = " ".join(self.rng.choice(("sun", "rain", "x")) for _ in range(self.rng.choice((1, 5, 500))))
        body = json.dumps({"messages": [{"role": "user", "content": long}], "stream": self.rng.random() < 0.5, **LONG})
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {self.key}\r\n"
        data = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        raw.send(data[: self.rng.choice((len(data), len(data), self.rng.randrange(len(data))))])
        raw.socket.settimeout(self.rng.choice((0.001, 0.02, 0.2)))
        with contextlib.suppress(TimeoutError):
            raw.read_more()
        return 0

    def bad(self, raw):
        """What the fuzzer sends: refused, or a short answer."""
        _, method, target, body = self.maker.framed()
        raw.send(self.maker.request("it", method, target, body).replace(
            b"\r\n", f"\r\nx-api-key: {self.key}\r\n".encode(), 1))
        status, _, answer = raw.read_response(method)
        if status >= 500 and status not in (501, 505):
            raise Broken(f"status {status} for {method} {target} {body}: {answer}")
        return status

    def cancel(self, raw):
        name = f"c{self.rng.getrandbits(60)}"
        raw.send_request("POST", CHAT, {**self.question()[0], **LONG}, {"x-api-key": self.key, "x-request-id": name})
        with RawConnection(self.port, 30) as other:
            for _ in range(100):
                if other.request("DELETE", f"/v1/queue/{name}", headers={"x-api-key": self.key})[0] == 200:
                    break
                time.sleep(0.01)
        status, _, answer = raw.read_response()
        if status not in (200, 408, 409):
            raise Broken(f"status {status}: {answer}")
        return status

    def overtime(self, raw):
        status, _, answer = self.ask(raw, {**self.question()[0], **LONG, "n": 2})
        self.right(status, answer)
        return status


def warm_up(server):
    """Threads of the process once the libraries have made theirs; the right answers."""
    expected, stopped = {}, threading.Event()
    client = Client(server.port, 0, expected, stopped)
    for way in (client.stream, client.whole, client.shaped, client.called, client.completion, client.choices) * 5:
        with RawConnection(server.port) as raw:
            way(raw)
    time.sleep(1)
    return psutil.Process(server.process.pid).num_threads(), expected


def check_idle(server, threads):
    """Nothing is left of it all."""
    process = psutil.Process(server.process.pid)
    state = lambda: server.get("/v1/metrics", **{"x-api-key": KEYS[0]})[2]["engine"]
    held = ("kv_blocks_used", "num_requests_running", "num_requests_waiting")
    wait_for(lambda: not any(map(state().get, held)), 30)
    wait_for(lambda: process.num_threads() <= threads, 30)


def soak(seconds, num_clients=32, tell=lambda *_: None):
    """(what was done and answered, what went wrong, [(second, bytes)])."""
    with ServerProcess(*FLAGS) as server:
        threads, expected = warm_up(server)
        stopped, process, samples, tracebacks = threading.Event(), psutil.Process(server.process.pid), [], []
        clients = [Client(server.port, seed, expected, stopped) for seed in range(num_clients)]
        running = [threading.Thread(target=client.run) for client in clients]
        started = time.monotonic()
        for thread in running:
            thread.start()
        while time.monotonic() - started < seconds:
            time.sleep(min(5, seconds / 50))
            samples.append((time.monotonic() - started, process.memory_info().rss))
            tracebacks += read_tracebacks(server)
            tell(*samples[-1])
        stopped.set()
        for thread in running:
            thread.join()
        check_idle(server, threads)
        if server.stop() != 0:
            raise Broken(f"the server ended with {server.process.returncode}")
    seen = sum((client.seen for client in clients), collections.Counter())
    return seen, tracebacks + [error for client in clients for error in client.broken], samples


def growth(samples, after):
    """The last tenth over what was there `after` so many seconds, as medians."""
    part = max(1, len(samples) // 10)
    late = statistics.median(size for _, size in samples[-part:])
    return late / statistics.median(size for _, size in [one for one in samples if one[0] >= after][:part]) - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--minutes", type=float, default=30)
    seconds = parser.parse_args().minutes * 60
    tell = lambda second, size: print(f"{second:7.0f} s {size / 1e6:7.1f} MB", flush=True)
    seen, broken, samples = soak(seconds, tell=tell)
    print("".join(f"{error}\n" for error in broken), end="")
    for (way, answer), count in sorted(seen.items(), key=str):
        print(f"{way:12} {answer} {count}")
    grown = growth(samples, min(300, seconds / 6))
    print(f"{sum(seen.values())} requests in {seconds / 60:g} minutes, memory {samples[-1][1] / 1e6:.1f} MB, "
          f"{grown:+.2%} since the warm-up; {len(broken)} wrong")
    sys.exit(bool(broken) or grown > 0.02)


if __name__ == "__main__":
    main()
