"""An OpenAI-compatible server of our own on loopback, which streams at the pace it is told, for tests of loads."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Refusal = tuple[int, dict[str, str], str]
"""Status, headers and body."""


@dataclass
class Fake:
    """Streams `pieces` of text, the first after `delay` seconds and the others `gap` apart.

    The head of the answer comes `held` seconds late. `refusals` are given first, one a request. `stream` takes the
    place of the events, and may lack their end. `bodies`, `headers`, `arrivals` and `ports` keep what came when
    and whence, `left` counts the callers that closed before the end, `now` those that are being answered, `most` how
    many that ever were.
    """

    pieces: int = 3
    held: float = 0.0
    delay: float = 0.0
    gap: float = 0.0
    usage: bool = True
    refusals: list[Refusal] = field(default_factory=list)
    stream: bytes | None = None
    kind: str = "text/event-stream; charset=utf-8"
    models: Refusal = (200, {}, '{"object": "list", "data": [{"id": "first"}, {"id": "second"}]}')
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    ports: set[int] = field(default_factory=set)
    left: int = 0
    now: int = 0
    most: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    fake: Fake
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.plain(self.fake.models if self.path == "/v1/models" else (404, {}, '{"detail": "Not Found"}'))

    def do_POST(self) -> None:
        fake, body = self.fake, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.arrivals.append(time.monotonic())
            fake.ports.add(self.client_address[1])
            fake.bodies.append({**body, "path": self.path})
            fake.headers.append({name.lower(): value for name, value in self.headers.items()})
            refusal = fake.refusals.pop(0) if fake.refusals else None
            fake.now += 1
            fake.most = max(fake.most, fake.now)
        try:
            if refusal is not None:
                self.done()
                self.plain(refusal)
            else:
                self.answer(body)
        except ConnectionError:
            self.close_connection = True
            with fake.lock:
                fake.left += 1
            self.done()

    def done(self) -> None:
        with self.fake.lock:
            self.fake.now -= 1

    def answer(self, body: dict[str, Any]) -> None:
        self.pause(self.fake.held)
        self.send_response(200)
        self.send_header("Content-Type", self.fake.kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.fake.stream is not None:
            self.chunk(self.fake.stream)
        else:
            self.events(body)
        self.done()  # before the caller knows, who may ask again at once
        self.chunk(b"")

    def events(self, body: dict[str, Any]) -> None:
        fake, chat = self.fake, "messages" in body
        pieces = min(fake.pieces, body["max_tokens"])
        for number in range(pieces):
            self.pause(fake.gap if number else fake.delay)
            text = {"delta": {"content": " word"}} if chat else {"text": " word"}
            self.event({"choices": [{"index": 0, **text, "finish_reason": None}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if fake.usage and body["stream_options"]["include_usage"]:
            # Two tokens a piece, so that counts of tokens and of pieces differ.
            self.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2 * pieces}})
        self.chunk(b"data: [DONE]\n\n")

    def pause(self, seconds: float) -> None:
        """Wait, unless the caller leaves meanwhile: nothing else comes on this connection before its answer ends."""
        readable, _, _ = select.select([self.connection], [], [], seconds)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    def event(self, content: dict[str, Any]) -> None:
        self.chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def plain(self, what: Refusal) -> None:
        status, headers, body = what
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # connections that a caller keeps open
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a caller that is gone is what some tests are about."""


@contextmanager
def serve(fake: Fake) -> Iterator[Fake]:
    """Answer until the context ends."""
    server = _Server(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": fake}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
