"""HAProxy and nginx with the files of deploy/ in front of two real servers: streams, a killed and a drained replica."""
from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from harness import (DEMO, ROOT, ServerProcess, check_error, free_port, need_tool, parse_events, server_whose_model,
                     wait_for)

DEPLOY = ROOT / "deploy"
CHAT = "/v1/chat/completions"
NGINX = """
daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log stderr notice; user root;
events {{ worker_connections 512; }}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi; uwsgi_temp_path {folder}/uwsgi;
    include {folder}/rustinfer.conf;
}}
"""


class Proxy:
    """A proxy process in front of two ports; use `with`."""

    def __init__(self, folder: Path, ports: list[int]):
        self.folder, self.ports, self.port = folder, ports, free_port()
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(self.command(), env={**os.environ, **self.environment()}, cwd=folder,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(self._listens)

    def environment(self) -> dict[str, str]:
        return {}

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill() if isinstance(self, HAProxy) else self.process.terminate()  # nginx has children
        self.process.wait(20)


class HAProxy(Proxy):
    def command(self) -> list[str]:
        return [need_tool("haproxy", "/usr/sbin/haproxy"), "-db", "-f", str(DEPLOY / "haproxy.cfg")]

    def environment(self) -> dict[str, str]:
        first, second = self.ports
        return {"LISTEN": f"127.0.0.1:{self.port}", "REPLICA_1": f"127.0.0.1:{first}",
                "REPLICA_2": f"127.0.0.1:{second}"}

    def drain_first(self, process: subprocess.Popen) -> None:
        """SIGTERM to the first replica, and return once HAProxy has seen that it is not ready."""
        process.terminate()
        wait_for(lambda: "Server replicas/replica-1 is DOWN" in self.log())


class Nginx(Proxy):
    def command(self) -> list[str]:
        nginx = need_tool("nginx", "/usr/sbin/nginx")
        self.write()
        (self.folder / "nginx.conf").write_text(NGINX.format(folder=self.folder))
        return [nginx, "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]

    def write(self, first_is: str = "") -> None:
        """deploy/nginx.conf with our addresses."""
        text = (DEPLOY / "nginx.conf").read_text()
        for shown, real in (("listen 80;", f"listen 127.0.0.1:{self.port};"),
                            ("server rustinfer-1:8000", f"server 127.0.0.1:{self.ports[0]} {first_is}"),
                            ("server rustinfer-2:8000", f"server 127.0.0.1:{self.ports[1]}"),
                            ("/var/log/nginx/access.log", "/dev/stdout")):
            assert text.count(shown) == 1
            text = text.replace(shown, real)
        (self.folder / "rustinfer.conf").write_text(text)

    def drain_first(self, process: subprocess.Popen) -> None:
        """As the file says: "down", reload, and SIGTERM once only the new workers take requests."""
        self.write("down")
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.log().count("gracefully shutting down") == 2)
        process.terminate()


@pytest.fixture(params=[HAProxy, Nginx], ids=["haproxy", "nginx"])
def proxy(request, tmp_path):
    """Starts the proxy in front of two servers."""
    with contextlib.ExitStack() as stack:
        yield lambda servers: stack.enter_context(request.param(tmp_path, [server.port for server in servers]))


def start_replica(stack: contextlib.ExitStack, folder: Path, number: int, *flags: str) -> ServerProcess:
    """A server of the demo model that takes its time, so that answers are on their way when something happens."""
    return stack.enter_context(server_whose_model(
        "time.sleep(0.02)", folder, "--served-model-name", f"replica-{number}", *flags, model=DEMO))


@pytest.fixture
def replicas(tmp_path):
    """Two servers whose answers tell by their model who gave them; the test may end them."""
    with contextlib.ExitStack() as stack:
        yield [start_replica(stack, tmp_path, number) for number in (1, 2)]


@pytest.fixture(scope="module")
def twins():
    """Two servers of the same model, which tests leave as they found them."""
    with ServerProcess("--device", "cpu", model=DEMO, wait=False) as first, ServerProcess(
            "--device", "cpu", model=DEMO, wait=False) as second:
        first.wait_ready()
        second.wait_ready()
        yield first, second


def ask(port: int, method: str = "POST", path: str = CHAT, body: bytes | None = None, headers=(), **fields):
    """(status, headers, body) of a request with a connection of its own; a chat request unless told otherwise."""
    if method == "POST" and body is None:
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, **fields}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json", **dict(headers)})
        response = connection.getresponse()
        shown, data = {name.lower(): value for name, value in response.getheaders()}, response.read()
        return response.status, shown, json.loads(data) if shown["content-type"] == "application/json" else data


class Stream:
    """A streamed answer, read as far as asked."""

    def __init__(self, port: int, max_tokens: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.connection.request("POST", CHAT, json.dumps({
            "messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": max_tokens,
            "ignore_eos": True}), {"Content-Type": "application/json", "Accept-Encoding": "gzip"})
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self.data = b""

    @property
    def events(self) -> list[bytes]:
        """The whole events so far."""
        return self.data.split(b"\n\n")[:-1]

    def read_event(self) -> None:
        """Wait for one more event at least."""
        count = len(self.events)
        while len(self.events) <= count:
            data = self.response.read1(65536)
            assert data, "the stream ended"
            self.data += data

    @property
    def replica(self) -> str:
        return json.loads(self.events[0][6:])["model"]

    def finish(self) -> str | None:
        """Why the answer ended; None where it was cut off."""
        try:
            self.data += self.response.read()
        except (http.client.IncompleteRead, ConnectionError):
            return None
        finally:
            self.connection.close()
        events = parse_events(self.data)
        return events[-2]["choices"][0]["finish_reason"] if events[-1] == "[DONE]" else None


def start_streams(port: int, count: int, max_tokens: int) -> list[Stream]:
    """Streams that have all begun."""
    streams = [Stream(port, max_tokens) for _ in range(count)]
    for stream in streams:
        stream.read_event()
    return streams


def kill(server: ServerProcess) -> None:
    """SIGKILL, and return when its port is closed: what reaches it before that is as good as sent."""
    server.process.kill()
    server.process.wait()


def running(server: ServerProcess) -> int:
    return server.get("/v1/metrics")[2]["engine"]["num_requests_running"]


def test_tokens_arrive_while_the_replica_computes_the_rest(proxy, replicas):
    stream = Stream(proxy(replicas).port, max_tokens=1500)
    for _ in range(8):
        stream.read_event()
        assert sum(map(running, replicas)) == 1
    assert len(stream.events) < 1000
    stream.connection.close()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_the_work_behind_the_proxy(proxy, replicas, stream):
    connection = http.client.HTTPConnection("127.0.0.1", proxy(replicas).port, timeout=60)
    connection.request("POST", CHAT, json.dumps({
        "messages": [{"role": "user", "content": "Hello"}], "stream": stream, "max_tokens": 1500, "ignore_eos": True}),
        {"Content-Type": "application/json"})
    wait_for(lambda: sum(map(running, replicas)) == 1)
    connection.close()
    wait_for(lambda: sum(map(running, replicas)) == 0)


def test_streams_are_shared_out_and_a_killed_replica_fails_its_own_alone(proxy, replicas):
    front = proxy(replicas)
    streams = start_streams(front.port, 8, max_tokens=150)
    assert sorted(stream.replica for stream in streams) == ["replica-1"] * 4 + ["replica-2"] * 4
    kill(replicas[0])
    later = [ask(front.port) for _ in range(12)]
    assert [(status, body.get("model", body)) for status, _, body in later] == [(200, "replica-2")] * 12
    ends = {stream.replica: set() for stream in streams}
    for stream in streams:
        ends[stream.replica].add(stream.finish())
    assert ends == {"replica-1": {None}, "replica-2": {"length"}}


def test_a_replica_that_comes_back_gets_work_again(proxy, replicas, tmp_path):
    front = proxy(replicas)
    kill(replicas[0])
    assert {ask(front.port)[2]["model"] for _ in range(4)} == {"replica-2"}
    with contextlib.ExitStack() as stack:
        start_replica(stack, tmp_path, 1, "--port", str(replicas[0].port))
        wait_for(lambda: ask(front.port)[2]["model"] == "replica-1")


def test_a_draining_replica_finishes_its_streams_while_new_ones_go_to_the_other(proxy, replicas):
    front = proxy(replicas)
    streams = start_streams(front.port, 4, max_tokens=300)
    assert {stream.replica for stream in streams} == {"replica-1", "replica-2"}
    front.drain_first(replicas[0].process)
    new = start_streams(front.port, 4, max_tokens=5)
    assert {stream.replica for stream in new} == {"replica-2"} and running(replicas[0]) == 2
    assert {stream.finish() for stream in streams + new} == {"length"}
    assert replicas[0].process.wait(20) == 0


def test_the_openai_client_works(proxy, twins):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{proxy(twins).port}/v1",
                           api_key="none", max_retries=0)
    [model] = client.models.list().data
    fields = {"model": model.id, "messages": [{"role": "user", "content": "What is Rust?"}], "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0]
    stream = list(client.chat.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content
    assert len(stream) > 4 and stream[-1].choices[0].finish_reason == whole.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**fields, n=1000)
    assert caught.value.body["param"] == "n"


def test_a_request_id_goes_from_the_client_to_the_replica_or_begins_at_the_proxy(proxy, twins):
    front = proxy(twins)
    assert ask(front.port, headers={"X-Request-Id": "from.the-client"})[1]["x-request-id"] == "from.the-client"
    given = ask(front.port)[1]["x-request-id"]
    for name in ("from.the-client", given):
        wait_for(lambda: name in front.log() and any(f"request {name} " in server.read_log() for server in twins))


def test_the_metrics_of_a_replica_are_not_served_by_the_proxy(proxy, twins):
    status, _, body = ask(proxy(twins).port, "GET", "/metrics")
    assert (status, body["error"]["code"]) == (404, "not_found")
    check_error(body["error"])


def test_a_body_that_is_too_large_is_refused_as_the_server_does(proxy, twins):
    front = proxy(twins)
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=60)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", str(5 << 20))
    connection.endheaders(b"{")
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, error["code"]) == (413, "request_too_large")
    check_error(error)


def test_without_replicas_the_error_is_one_that_clients_understand_and_retry(proxy):
    front = proxy([SimpleNamespace(port=free_port()) for _ in range(2)])
    status, headers, body = ask(front.port)
    assert status in (502, 503) and 0 < int(headers["retry-after"]) <= 120
    check_error(body["error"])


class DyingReplica(http.server.BaseHTTPRequestHandler):
    """Is ready, reads a request, and ends the connection without an answer."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append(self.headers)
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def dying():
    """Two such replicas, and the headers of the requests that reached them."""
    posts, servers = [], [http.server.ThreadingHTTPServer(("127.0.0.1", 0), DyingReplica) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for server, thread in zip(servers, threads):
        server.posts, server.port = posts, server.server_port
        thread.start()
    yield servers, posts
    for server, thread in zip(servers, threads):
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_request_that_was_sent_is_never_sent_again(proxy, dying):
    servers, posts = dying
    status, _, body = ask(proxy(servers).port)
    assert (status, body["error"]["code"], len(posts)) == (502, "bad_gateway", 1)
    check_error(body["error"])


def test_the_address_that_is_passed_on_is_the_clients_own(proxy, dying):
    servers, posts = dying
    ask(proxy(servers).port, headers={"X-Forwarded-For": "203.0.113.7"})
    assert posts[0].get_all("X-Forwarded-For") == ["127.0.0.1"]
