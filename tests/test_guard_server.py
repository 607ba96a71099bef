"""The guard under uvicorn: slow and silent clients, floods, and servers that end with requests under way."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest

from guarded import Running, running
from trimtab.errors import MissingDependency, OptionError
from trimtab.serve import connections
from trimtab.serve.guard import GuardSettings
from trimtab.serve.keys import Keys
from trimtab.serve.run import STANDS_ON, bind, check_exposure, check_installed, serve

HEAD = b"POST /v1/wait HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SECONDS = 0.5
"""How patient the server of most tests is with headers, bodies and clients that do not read."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    patience = {"headers": SECONDS, "idle": 1, "unread": SECONDS, "connections": 10}
    with running(settings={"body_seconds": SECONDS}, patience=patience) as there:
        yield there


class Connection:
    """A connection of which every byte is seen."""

    def __init__(self, server: Running) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=10)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def rest(self) -> bytes:
        """Read until the server closes."""
        parts: list[bytes] = []
        with suppress(ConnectionResetError):
            while part := self.socket.recv(2**16):
                parts.append(part)
        return b"".join(parts)


def parsed(answer: bytes) -> tuple[int, dict[str, str], Any]:
    """Take an answer apart, which must be whole and the only one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert len(headers) == len(lines)
    assert int(headers["content-length"]) == len(body)
    return int(first.split()[1]), headers, json.loads(body)


def refused(answer: bytes, status: int) -> str:
    """Check that an answer is an error in OpenAI's form, with the headers that all have, and return its message."""
    got, headers, body = parsed(answer)
    assert got == status
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert "server" not in headers
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["message"]


def asked(
    server: Running, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """Send one request on a connection of its own."""
    with client_of(server) as client:
        answer = client(method, path, body, headers or {})
        return answer.status, json.loads(answer.read())


@contextmanager
def client_of(server: Running) -> Iterator[Any]:
    """Give a function that sends requests on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

    def ask(method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        return connection.getresponse()

    with closing(connection):
        yield ask


# Connections


def test_a_request_is_answered(server: Running) -> None:
    assert asked(server, "POST", "/v1/wait", {"number": 7}) == (200, {"number": 7})


def test_headers_that_come_slowly_are_not_waited_for(server: Running) -> None:
    with Connection(server) as connection:
        began = time.monotonic()
        with suppress(ConnectionError):
            for byte in HEAD * 10:  # a byte now and then does not make the time longer
                connection.send(bytes([byte]))
                time.sleep(0.05)
                if time.monotonic() - began > 5:
                    break
        assert SECONDS < time.monotonic() - began < 4
    with Connection(server) as connection:
        began = time.monotonic()
        connection.send(HEAD)
        assert f"{SECONDS:g} s" in refused(connection.rest(), 408)
        assert time.monotonic() - began < 4


def test_headers_of_a_second_request_are_not_waited_for_either(server: Running) -> None:
    with Connection(server) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.socket.recv(2**16).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        connection.send(b"GET /health HTTP/1.1\r\nHost:")
        refused(connection.rest(), 408)
        assert SECONDS < time.monotonic() - began < 4


def test_a_connection_on_which_nothing_comes_is_closed_without_an_answer(server: Running) -> None:
    began = time.monotonic()
    with Connection(server) as connection:
        assert connection.rest() == b""
        assert SECONDS < time.monotonic() - began < 4
    with Connection(server) as connection:
        began = time.monotonic()
        connection.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.rest().count(b"HTTP/1.1") == 1
        assert 1 < time.monotonic() - began < 5


def test_a_body_that_comes_slowly_is_not_waited_for(server: Running) -> None:
    for announced in (b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        with Connection(server) as connection:
            began = time.monotonic()
            connection.send(HEAD + announced)
            assert f"{SECONDS:g} s" in refused(connection.rest(), 408)
            assert SECONDS < time.monotonic() - began < 5


@pytest.mark.parametrize(
    "flood",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",  # in one piece
        b"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"c" * 200_000,  # without an end
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"G" * 200_000,
    ],
    ids=["headers", "header", "path", "method"],
)
def test_a_flood_of_headers_is_cut_short(server: Running, flood: bytes) -> None:
    with Connection(server) as connection:
        with suppress(ConnectionError):
            connection.send(flood)
        assert refused(connection.rest(), 431)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: b\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 0x2\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(server: Running, nonsense: bytes) -> None:
    with Connection(server) as connection:
        connection.send(nonsense)
        assert refused(connection.rest(), 400)


def test_http_2_without_asking_is_refused(server: Running) -> None:
    with Connection(server) as connection:
        connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert "PRI" in refused(connection.rest(), 405)


def test_transfer_encodings_other_than_chunked_are_not_implemented(server: Running) -> None:
    with Connection(server) as connection:
        connection.send(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n")
        refused(connection.rest(), 501)


def test_50_megabytes_are_refused_unread(server: Running) -> None:
    size = 50_000_000
    with Connection(server) as connection:
        connection.send(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % size)
        refused(connection.rest(), 413)  # and no "100 Continue" before it
    with Connection(server) as connection:
        connection.send(HEAD + b"Content-Length: %d\r\n\r\n" % size)
        sent, part = 0, b" " * 100_000
        with suppress(ConnectionError):
            while sent < size:
                sent += connection.socket.send(part)
        assert sent < size / 2  # what the two ends' buffers hold
        assert "1048576 bytes" in refused(connection.rest(), 413)


def test_chunks_without_a_length_are_counted(server: Running) -> None:
    with Connection(server) as connection:
        connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
        with suppress(ConnectionError):
            for _ in range(100):
                connection.send(chunk)
        refused(connection.rest(), 413)
    with Connection(server) as connection:
        connection.send(
            HEAD + b'Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\nc\r\n"number": 3}\r\n0\r\n\r\n'
        )
        assert parsed(connection.rest())[::2] == (200, {"number": 3})


def test_two_requests_in_one_piece_are_answered_in_order(server: Running) -> None:
    body = [b'{"number": 1}', b'{"number": 2}']
    with Connection(server) as connection:
        connection.send(b"".join(HEAD + b"Content-Length: 13\r\n\r\n" + part for part in body))
        said = b""
        while said.count(b'{"number":') < 2 and (part := connection.socket.recv(2**16)):
            said += part
        assert said.index(b'{"number":1}') < said.index(b'{"number":2}')


def test_a_client_that_does_not_read_is_let_go(server: Running) -> None:
    body = json.dumps({"count": 1000, "size": 2**17, "seconds": 0}).encode()
    with Connection(server) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        connection.send(HEAD.replace(b"/wait", b"/stream") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert within(5, lambda: asked(server, "GET", "/v1/running")[1] == 1)
        assert within(5, lambda: asked(server, "GET", "/v1/running")[1] == 0)
    status, _ = asked(server, "GET", "/health")
    assert status == 200


def within(seconds: float, holds: Any) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.02)
    return False


def test_there_are_only_so_many_connections(server: Running) -> None:
    time.sleep(2 * SECONDS)  # those of other tests are gone
    many = [Connection(server) for _ in range(10)]
    try:
        for connection in many:
            connection.send(b"G")
        with Connection(server) as late:
            assert "too many connections" in refused(late.rest(), 503)
    finally:
        for connection in many:
            connection.socket.close()
    assert within(5, lambda: asked(server, "GET", "/health")[0] == 200)


def test_what_a_proxy_would_say_is_not_believed(server: Running) -> None:
    said = {"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https", "Forwarded": "for=192.0.2.7;proto=https"}
    assert asked(server, "GET", "/v1/client", headers=said) == (200, {"client": "127.0.0.1", "scheme": "http"})


def test_an_upgrade_to_a_websocket_is_refused(server: Running) -> None:
    with Connection(server) as connection:
        connection.send(
            b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert "server-sent events" in refused(connection.rest(), 400)


def test_the_log_has_a_line_for_each_request_and_nothing_that_was_in_one() -> None:
    key = "ana-0123456789abcdef"
    with running({"TRIMTAB_API_KEY": key}) as server:
        bearer = {"Authorization": f"Bearer {key}"}
        assert asked(server, "POST", "/v1/wait", {"prompt": "hush"}, bearer)[0] == 200
        assert asked(server, "POST", "/v1/wait", {"prompt": "hush"})[0] == 401
        with client_of(server) as client:
            assert client("POST", "/v1/fail", {"prompt": "hush"}, bearer).status == 500
        server.signal()
        assert server.ended() == 0
        said = server.said()
    assert [said.count(f"POST /v1/wait {status} ") for status in (200, 401)] == [1, 1]
    assert "ValueError" in said  # the failure, where it was raised
    assert "in fail" in said
    assert "hush" not in said
    assert key not in said
    assert "Traceback" not in said


# The end


def test_sigterm_under_load_loses_no_request_that_was_accepted() -> None:
    with running(serve={"drain": 20}) as server:
        ending = threading.Event()
        answers: list[tuple[int, bool]] = []

        def again_and_again(number: int) -> None:
            """Ask again and again on one connection, until the server says that it ends."""
            with client_of(server) as client:
                for turn in range(10_000):
                    answer = client("POST", "/v1/wait", {"seconds": 0.01 * (number % 5), "number": turn})
                    data = json.loads(answer.read())
                    answers.append((answer.status, ending.is_set()))
                    if answer.status == 200:
                        assert data == {"number": turn}
                    if answer.status == 503 or answer.getheader("connection") == "close":
                        return
                raise AssertionError("the server did not end")

        with ThreadPoolExecutor(12) as pool:
            long = pool.submit(asked, server, "POST", "/v1/wait", {"seconds": 1.5, "number": -1})
            clients = [pool.submit(again_and_again, number) for number in range(10)]
            time.sleep(0.7)
            ending.set()
            server.signal()
            assert long.result() == (200, {"number": -1})
            for one in clients:
                one.result()  # raises what a lost request raised there
        assert server.ended() == 0
        assert {status for status, _ in answers} <= {200, 503}
        assert sum(status == 200 for status, late in answers if not late) > 50
        assert not any(status == 503 for status, late in answers if not late)


def test_clients_that_wait_at_the_door_when_it_closes_are_let_in_and_told() -> None:
    with running() as server:
        found: Counter[str] = Counter()

        def knock() -> None:
            """Ask on one connection after the other, until none is to be had."""
            while True:
                try:
                    connection = Connection(server)
                except ConnectionRefusedError:
                    return
                with connection:
                    connection.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    found[connection.rest()[9:12].decode() or "reset"] += 1

        with ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(knock) for _ in range(16)]
            time.sleep(0.5)
            server.signal()
            for one in clients:
                one.result()
        assert server.ended() == 0
    assert found["200"] > 50
    assert set(found) <= {"200", "503", "reset"}
    assert found["reset"] <= 1  # who comes between the last look and the lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stream_at_its_end_and_lets_nobody_in(number: int) -> None:
    with running() as server, client_of(server) as idle, client_of(server) as stream:
        assert idle("GET", "/health").read()
        answer = stream("POST", "/v1/stream", {"count": 10, "size": 10, "seconds": 0.1})
        assert answer.read(10) == b"." * 10
        server.signal(number)
        time.sleep(0.3)
        late = idle("GET", "/health")
        assert (late.status, late.getheader("retry-after")) == (503, "5")
        assert "shutting down" in json.loads(late.read())["error"]["message"]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)
        assert answer.read() == b"." * 90
        assert server.ended() == 0


def test_connections_at_rest_do_not_hold_up_the_end() -> None:
    with running() as server, client_of(server) as resting, Connection(server) as silent:
        assert resting("GET", "/health").status == 200
        began = time.monotonic()
        server.signal()
        assert server.ended() == 0
        assert time.monotonic() - began < 5
        assert silent.rest() == b""


def test_what_is_not_over_when_the_time_is_up_is_cut_off() -> None:
    with running(serve={"drain": 1}) as server, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(asked, server, "POST", "/v1/wait", {"seconds": 60})
        with Connection(server) as connection:
            body = json.dumps({"count": 600, "size": 10, "seconds": 0.1}).encode()
            connection.send(HEAD.replace(b"/wait", b"/stream") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert connection.socket.recv(2**16)
            began = time.monotonic()
            server.signal()
            assert server.ended() == 0
            assert 1 < time.monotonic() - began < 8
            assert not connection.rest().endswith(b"0\r\n\r\n")  # the stream does not look whole
        status, answer = waiting.result()
        assert status == 503
        assert "shutting down" in answer["error"]["message"]


def test_a_second_signal_ends_the_server_at_once() -> None:
    with running() as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asked, server, "POST", "/v1/wait", {"seconds": 60})
        assert within(5, lambda: asked(server, "GET", "/v1/running")[1] == 1)
        server.signal()
        time.sleep(0.5)
        assert server.process.poll() is None
        began = time.monotonic()
        server.signal()
        assert server.ended() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 3
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            waiting.result()


def test_after_sigkill_the_same_port_serves_again_at_once() -> None:
    with running() as server, client_of(server) as client:
        assert client("GET", "/health").read()  # a connection that is open, of which something stays behind
        server.signal(signal.SIGKILL)
        assert server.ended() == -signal.SIGKILL
        with running(port=server.port) as again:
            assert again.port == server.port
            assert asked(again, "GET", "/health")[0] == 200


def test_a_dead_engine_ends_the_server_with_status_1_for_a_supervisor_to_see() -> None:
    with running() as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asked, server, "POST", "/v1/wait", {"seconds": 1, "number": 4})
        assert within(5, lambda: asked(server, "GET", "/v1/running")[1] == 1)
        assert asked(server, "POST", "/v1/die", {})[0] == 200
        assert server.ended() == 1
        assert waiting.result() == (200, {"number": 4})


# The start


def test_a_port_that_is_taken_is_told_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=rf"127\.0\.0\.1:{port}: .*--port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(OptionError, match=r"0 .* to 65535"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no such host", "a" * 300, "\ud800"])
def test_an_address_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(OptionError, match="Cannot listen"):
        bind(host, 0)


def test_two_that_took_one_address_do_not_both_serve(capfd: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        with pytest.raises(OptionError, match=r"Cannot listen on http://127\.0\.0\.1"):
            serve(_app(), GuardSettings(), second)
    assert "Listening" not in capfd.readouterr().out


def _app() -> Any:
    from fastapi import FastAPI

    return FastAPI()


def test_the_network_is_served_with_keys_or_on_demand_only() -> None:
    keys = Keys.of(("ana-0123456789abcdef",))
    with pytest.raises(OptionError, match=r"--keys FILE .*--open"):
        check_exposure(GuardSettings(host="0.0.0.0"), open=False)
    with pytest.raises(OptionError, match=r"--keys FILE .*--open"):
        check_exposure(GuardSettings(host="::", keys=Keys.of((), ("admin-0123456789abcdef",))), open=False)
    check_exposure(GuardSettings(host="0.0.0.0", keys=keys), open=False)
    check_exposure(GuardSettings(host="0.0.0.0"), open=True)
    check_exposure(GuardSettings(), open=False)


def test_a_server_on_all_addresses_says_where_it_listens() -> None:
    with running(settings={"host": "0.0.0.0"}) as server:
        assert server.url.startswith("http://0.0.0.0:")
        assert asked(server, "GET", "/health")[0] == 200


def test_a_uvicorn_that_is_not_the_known_one_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_USED", (*connections._USED, "no_such_attribute"))
    with pytest.raises(MissingDependency, match=r"no_such_attribute.*pip install uvicorn"):
        serve(_app(), GuardSettings(), bind("127.0.0.1", 0))


@pytest.mark.parametrize("name", STANDS_ON)
def test_what_the_server_stands_on_is_missed_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=f"needs {name}\\."):
        check_installed()


def test_serving_without_the_extra_names_the_command_that_installs_it_before_anything_is_loaded() -> None:
    code = f"import sys; sys.modules |= dict.fromkeys({STANDS_ON}); from trimtab.cli import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(['serve', 'prefworld', '--port', '0']))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs fastapi, uvicorn, prometheus_client. Install" in done.stderr
    assert 'pip install "trimtab[serve]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_guard_needs_neither_torch_nor_a_web_framework_to_load() -> None:
    names = "connections guard hosts intake keys limits refusal run screen"
    code = f"import sys\nfor name in {names.split()}: __import__('trimtab.serve.' + name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trimtab.serve.run" in loaded
    assert not {"torch", "fastapi", "starlette", "uvicorn", "h11"} & set(loaded)
