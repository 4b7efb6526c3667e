"""A slow attack and an honest client: `python tests/bench/attack.py [--rounds 5] [--same-key]`.

500 connections that never finish their head, 100 whose bodies come byte by byte, and 100 that ask for long streams and
never read, each renewed as soon as the server ends it. Beside them one client measures its time to first token,
with and without the attack in turns. The attackers have one key and the honest client another, unless --same-key.
"""
import argparse
import json
import multiprocessing
import re
import select
import socket
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]
from harness import RawConnection, ServerProcess, wait_for  # noqa: E402

CHAT = "/v1/chat/completions"
ATTACKER, HONEST = "attack-key-1", "honest-key-1"
STREAM = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True,
                    "max_tokens": 2000, "ignore_eos": True, "logprobs": True, "top_logprobs": 5})
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {ATTACKER}\r\nContent-Type: application/json\r\n"
FIRST = {"half-open": f"GET /health HTTP/1.1\r\nHost: localhost\r\nx-api-key: {ATTACKER}\r\nX",
         "slow body": HEAD + "Content-Length: 100000\r\n\r\n{",
         "non-reading": HEAD + f"Content-Length: {len(STREAM)}\r\n\r\n{STREAM}"}
COUNTS = {"half-open": 500, "slow body": 100, "non-reading": 100}


class Attackers:
    """All of the connections, kept open by one thread; the server's answers are never read."""

    def __init__(self, port, counts):
        self.port, self.poll, self.kinds, self.sockets, self.renewed = port, select.poll(), {}, {}, 0
        for kind, count in counts.items():
            for _ in range(count):
                self.open(kind)

    def open(self, kind):
        connection = socket.socket()
        if kind == "non-reading":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little room for what is not read
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(FIRST[kind].encode())
        self.sockets[connection.fileno()], self.kinds[connection.fileno()] = connection, kind
        self.poll.register(connection, select.POLLRDHUP)

    def go_on(self, seconds):
        """Trickle, and renew what the server has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for number, connection in list(self.sockets.items()):
                if self.kinds[number] == "slow body":
                    try:
                        connection.send(b" ")
                    except OSError:
                        pass  # the poll tells
            for number, _ in self.poll.poll(0):
                self.poll.unregister(number)
                self.sockets.pop(number).close()
                self.open(self.kinds.pop(number))
                self.renewed += 1
            time.sleep(0.25)

    def close(self):
        for connection in self.sockets.values():
            connection.close()


def attack(port, counts, pipe):
    """A process: attacks from one message on to the next."""
    while pipe.recv():
        attackers = Attackers(port, counts)
        pipe.send(len(attackers.sockets))
        while not pipe.poll():
            attackers.go_on(0.25)
        pipe.recv()
        attackers.close()
        pipe.send(attackers.renewed)


def first_token_s(port, key):
    """Seconds from connecting to the first text of a stream."""
    body = {"messages": [{"role": "user", "content": "What is Rust?"}],
            "max_tokens": 8, "temperature": 0, "stream": True}
    started = time.monotonic()
    with RawConnection(port) as raw:
        raw.send_request("POST", CHAT, body, {"x-api-key": key})
        status, _ = raw.read_head()
        assert status == 200, status
        for chunk in raw.read_chunks():
            if re.search(rb'"content": ?"[^"]', chunk):
                return time.monotonic() - started
    raise AssertionError("no token came")


def measure(server, key, seconds):
    """Times to first token, one request every tenth of a second."""
    times, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        times.append(first_token_s(server.port, key))
        time.sleep(0.1)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=25, help="of each half of a round")
    parser.add_argument("--same-key", action="store_true")
    parser.add_argument("--only", choices=list(COUNTS), help="one kind of connection")
    options = parser.parse_args()
    key, ours = ATTACKER if options.same_key else HONEST, multiprocessing.get_context("spawn")
    pipe, theirs = ours.Pipe()
    counts = {kind: count for kind, count in COUNTS.items() if options.only in (None, kind)}
    quiet, attacked, renewed = [], [], 0
    flags = ("--device", "cpu", "--max-connections", "1024", "--api-key", ATTACKER, "--api-key", HONEST)
    with ServerProcess(*flags) as server:
        process = ours.Process(target=attack, args=(server.port, counts, theirs), daemon=True)
        process.start()
        state = lambda: server.get("/v1/metrics", **{"x-api-key": HONEST})[2]["engine"]
        measure(server, key, 2)
        for _ in range(options.rounds):
            quiet += measure(server, key, options.seconds / 4)
            pipe.send(True)
            assert pipe.recv() == sum(counts.values())
            attacked.append(measure(server, key, options.seconds))
            pipe.send(True)
            renewed += pipe.recv()
            wait_for(lambda: state()["kv_blocks_used"] == 0, 60)
        pipe.send(False)
    every = [value for times in attacked for value in times]
    early = [value for times in attacked for value in times[: len(times) // 5]]
    print(f"{renewed} connections renewed; time to first token, ms")
    for what, values in {"without the attack": quiet, "with it": every, "in its first fifth": early}.items():
        median, late = statistics.median(values) * 1000, sorted(values)[int(len(values) * 0.99)] * 1000
        print(f"{what:20} median {median:6.1f}, p99 {late:6.1f} of {len(values)}")
    print(f"the median grows by {1000 * (statistics.median(every) - statistics.median(quiet)):.1f} ms")


if __name__ == "__main__":
    main()
