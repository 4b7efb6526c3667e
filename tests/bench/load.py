"""Load for any OpenAI-compatible server, and what its clients saw of it; serve.py and overhead.py use it.

One thread and a selector: while requests run, what arrives is only kept, with its time; events are parsed afterwards.
A request is `POST /v1/completions`, streaming, greedy, on a connection of its own, with a prompt of random digits (a
digit is a token of the random checkpoints here; what a server counted is in `prompt_tokens`).

ttft    from when a request was due (not sent) to its first text
itl     gaps between two arrivals of text of a request; one that writes several tokens at once has fewer, longer ones
tpot    from the first text to the last, divided by the tokens in between: the mean time of a request's further tokens
e2e     from when it was due to its last byte
"""
import dataclasses
import gc
import heapq
import itertools
import json
import math
import random
import resource
import selectors
import socket
import time
import urllib.parse

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Whole numbers, log-uniform between two bounds: many short ones, few long ones."""

    low: int
    high: int

    @classmethod
    def parse(cls, text):
        low, _, high = text.partition("-")
        lengths = cls(int(low), int(high or low))
        if not 0 < lengths.low <= lengths.high:
            raise ValueError(f"{text} is not LOW-HIGH with 0 < LOW <= HIGH")
        return lengths

    def draw(self, rng):
        return round(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))


@dataclasses.dataclass(frozen=True)
class Load:
    """What clients do: `concurrency` requests at any time, or else `rate` new ones a second (Poisson).

    Begins no request after `seconds`; cuts off those that still run `grace` seconds later. shares {key: its part of
    the requests}; equal seeds give equal requests.
    """

    concurrency: int = 0
    rate: float = 0.0
    seconds: float = 12.0
    grace: float = 12.0
    prompts: Lengths = Lengths(32, 384)
    answers: Lengths = Lengths(16, 96)
    shares: tuple = (("", 1.0),)
    seed: int = 0
    digits: int = 0  # other ones for the same lengths and arrivals: no server has seen those prompts

    @property
    def name(self):
        return f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g} a second"

    def requests(self):
        """(prompt, tokens to generate), for ever."""
        rng, digits = (random.Random(f"{self.seed} {self.name} {part}") for part in ("lengths", self.digits))
        while True:
            length, tokens = self.prompts.draw(rng), self.answers.draw(rng)
            yield "".join(digits.choices("0123456789", k=length)), tokens

    def arrivals(self):
        """(seconds after the start, key) of each request that waits for no other."""
        rng = random.Random(f"arrivals {self.seed} {self.name}")
        if self.concurrency:
            for key in self.slots():
                yield 0.0, key
            return
        keys, weights, now = [key for key, _ in self.shares], [part for _, part in self.shares], 0.0
        while (now := now + rng.expovariate(self.rate)) < self.seconds:
            yield now, rng.choices(keys, weights)[0]

    def slots(self):
        """The key of each of the requests that run at once: whoever has least of its share is next."""
        taken = dict.fromkeys(dict(self.shares), 0)
        for _ in range(self.concurrency):
            key = min(taken, key=lambda key: (taken[key] + 1) / dict(self.shares)[key])
            taken[key] += 1
            yield key


# -- the client


class Stream:
    """One request: its socket, and what arrived when."""

    def __init__(self, address, head, body, due, key):
        self.due, self.key, self.reads, self.failure = due, key, [], None
        self.ended = None
        self.socket = socket.create_connection(address, 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.socket.sendall(head + body)
        self.socket.setblocking(False)

    def read(self):
        """Take what is there; False at the end."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return True
        except OSError as error:
            data, self.failure = b"", f"{type(error).__name__}"
        now = time.perf_counter()
        if data:
            self.reads.append((now, data))
            return True
        self.close(now)
        return False

    def close(self, now, failure=None):
        self.failure = self.failure or failure
        self.ended = self.reads[-1][0] if self.reads and not failure else now
        self.socket.close()


class Client:
    """Drives one server with loads, one after another."""

    def __init__(self, url, fields=lambda tokens: {"max_tokens": tokens}, path="/v1/completions"):
        parts = urllib.parse.urlsplit(url)
        self._address, self._path, self._fields = (parts.hostname, parts.port or 80), parts.path + path, fields

    def _open(self, prompt, tokens, due, key):
        text = {"messages": [{"role": "user", "content": prompt}]} if "chat" in self._path else {"prompt": prompt}
        body = json.dumps({**text, "stream": True, **self._fields(tokens)}).encode()
        lines = [f"POST {self._path} HTTP/1.1", f"Host: {self._address[0]}", "Content-Type: application/json",
                 f"Content-Length: {len(body)}", "Connection: close"]
        lines += [f"Authorization: Bearer {key}"] if key else []
        return Stream(self._address, "\r\n".join(lines).encode() + b"\r\n\r\n", body, due, key)

    def run(self, load):
        """The load's figures."""
        gc.collect()
        gc.disable()  # a collection would be a pause of the server's
        try:
            used, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            streams = self._drive(load, started)
            elapsed, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        finally:
            gc.enable()
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        finished = max((stream.ended for stream in streams), default=started) - started
        return figures([outcome(stream) for stream in streams], finished, cpu / elapsed)

    def _drive(self, load, started):
        """All requests of the load, ended."""
        requests, arrivals, streams = load.requests(), load.arrivals(), []
        due, selector = [next(arrivals)], selectors.DefaultSelector()
        due += arrivals if load.concurrency else ()
        while True:
            now = time.perf_counter() - started
            while due and due[0][0] <= now:
                moment, key = heapq.heappop(due)
                if moment >= load.seconds:
                    continue
                stream = self._open(*next(requests), started + moment, key)
                selector.register(stream.socket, selectors.EVENT_READ, stream)
                streams.append(stream)
                if not load.concurrency:
                    due += itertools.islice(arrivals, 1)
            if now >= load.seconds + load.grace or not (due or selector.get_map()):
                break
            until = min([load.seconds + load.grace, *(moment for moment, _ in due[:1])])
            for entry, _ in selector.select(max(0.0, until - now)):
                if not self._advance(selector, entry) and load.concurrency:
                    heapq.heappush(due, (time.perf_counter() - started, entry.data.key))
        for entry in list(selector.get_map().values()):
            entry.data.close(time.perf_counter(), "cut off")
        selector.close()
        return streams

    @staticmethod
    def _advance(selector, entry):
        """False when the stream has ended."""
        descriptor = entry.fd
        if entry.data.read():
            return True
        selector.unregister(descriptor)
        return False


# -- what arrived


@dataclasses.dataclass
class Outcome:
    """A request as its client saw it; times in seconds from when it was due."""

    key: str
    error: str | None
    prompt_tokens: int
    output_tokens: int
    texts: list  # when text arrived; what one read brought counts once
    e2e: float


def body_of(reads):
    """(status, [(time, bytes of the body)]) of the reads of an answer, chunked or not."""
    pending, status, parts, chunked = b"", None, [], False
    for moment, data in reads:
        pending += data
        if status is None:
            head, mark, rest = pending.partition(b"\r\n\r\n")
            if not mark:
                continue
            status, chunked, pending = int(head.split(None, 2)[1]), b"transfer-encoding: chunked" in head.lower(), rest
        if not chunked:
            parts.append((moment, pending))
            pending = b""
            continue
        while mark := pending.find(b"\r\n") + 1:
            size = int(pending[: mark - 1].partition(b";")[0], 16)
            if size == 0 or len(pending) < mark + 1 + size + 2:
                break
            parts.append((moment, pending[mark + 1 : mark + 1 + size]))
            pending = pending[mark + 1 + size + 2 :]
    return status, parts


def events_of(parts):
    """(time, JSON value) of each event of a body; whatever else it holds is left out."""
    pending = b""
    for moment, data in parts:
        pending = (pending + data).replace(b"\r\n", b"\n")
        *events, pending = pending.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                yield moment, json.loads(event[6:])


def has_text(value):
    return any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in value.get("choices", ()))


def outcome(stream):
    """What a request came to."""
    status, parts = body_of(stream.reads)
    texts, usage, error, count = [], None, stream.failure, 0
    if status != 200:
        error = error or f"status {status}"
    for moment, value in events_of(parts) if status == 200 else ():
        usage = value.get("usage") or usage
        if value.get("error"):
            error = error or "error event"
        if has_text(value):
            count += 1
            if not texts or texts[-1] != moment - stream.due:
                texts.append(moment - stream.due)
    if not usage:
        error = error or "no usage"
        usage = {"prompt_tokens": 0, "completion_tokens": count}  # of a request that was cut off: at least so many
    return Outcome(stream.key, error, usage["prompt_tokens"], usage["completion_tokens"], texts,
                   stream.ended - stream.due)


# -- figures


def percentile(values, part):
    """The smallest value that `part` percent of them do not exceed; None of none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(part / 100 * len(ranked)) - 1)] if ranked else None


def spread(values):
    return {f"p{part}": percentile(values, part) for part in PERCENTILES}


def waits(outcomes):
    """Times to first token. Who was cut off before it counts as having waited until then."""
    return [one.texts[0] if one.texts else one.e2e for one in outcomes if one.texts or one.error == "cut off"]


def key_figures(outcomes):
    return {"requests": len(outcomes), "output_tokens": sum(one.output_tokens for one in outcomes),
            "ttft_s": spread(waits(outcomes))}


def figures(outcomes, elapsed, client_cpu):
    """A load's figures."""
    good = [one for one in outcomes if not one.error]
    errors = [one.error for one in outcomes if one.error]
    long = [one for one in good if one.output_tokens > 1 and one.texts]
    keys = sorted({one.key for one in outcomes})
    return {
        "requests": len(outcomes), "errors": {error: errors.count(error) for error in sorted(set(errors))},
        "elapsed_s": elapsed, "client_cpu": client_cpu,
        "prompt_tokens": sum(one.prompt_tokens for one in outcomes),
        "output_tokens": sum(one.output_tokens for one in outcomes),
        "tokens_per_s": sum(one.output_tokens for one in outcomes) / elapsed if elapsed else 0.0,
        "requests_per_s": len(good) / elapsed if elapsed else 0.0,
        "ttft_s": spread(waits(outcomes)),
        "itl_s": spread([after - before for one in outcomes for before, after in itertools.pairwise(one.texts)]),
        "tpot_s": spread([(one.texts[-1] - one.texts[0]) / (one.output_tokens - 1) for one in long]),
        "e2e_s": spread([one.e2e for one in good]),
        "keys": {key: key_figures([one for one in outcomes if one.key == key]) for key in keys},
    }
