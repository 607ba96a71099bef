"""Ways to ask the server's application: in process, over a socket of its own, and as bare ASGI messages."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import httpx
import uvicorn
from fastapi import FastAPI

from fake_engine import FakeEngine
from trimtab.engines.continuous.engine import Engine
from trimtab.serve.app import create_app
from trimtab.serve.flight import Room
from trimtab.serve.refusal import new_request_id

ASKED = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Client:
    """Asks an application of its own over an engine, without a guard in front."""

    def __init__(
        self,
        engine: FakeEngine,
        *,
        panels: Mapping[str, Mapping[str, float]] | None = None,
        room: Room | None = None,
    ) -> None:
        self.engine = engine
        self.app: FastAPI = create_app(cast(Engine, engine), model="pico", panels=panels, room=room)

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        await self.app({**scope, "state": {"request_id": new_request_id()}}, receive, send)

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask from within a loop."""
        transport = httpx.ASGITransport(app=self.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask, and wait for the whole response."""
        return asyncio.run(self.send(method, path, **options))

    def post(self, path: str, **fields: Any) -> httpx.Response:
        """Send fields to one of the two routes that answer; what they need is there unless said otherwise."""
        return self.ask("POST", path, json=filled(path, fields))

    def chat(self, **fields: Any) -> dict[str, Any]:
        """Return the answer to a chat that must be answered."""
        response = self.post(CHAT, **fields)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, status: int, path: str = CHAT, **fields: Any) -> dict[str, Any]:
        """Return the error of a request that must be refused so."""
        response = self.post(path, **fields)
        assert response.status_code == status, response.text
        return response.json()["error"]

    def stream(self, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
        """Return the events of a stream, which must be whole."""
        response = self.post(path, **{"stream": True, **fields})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, last = events_of(response.text)
        assert last == "[DONE]"
        return [json.loads(event) for event in events]

    def metric(self, name: str, **labels: str) -> float:
        """Return what is counted under a name; 0 for what has not been counted."""
        return self.app.state.server.metrics.registry.get_sample_value(f"trimtab_{name}", labels) or 0.0


def filled(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body that asks something, with fields of it replaced."""
    return {"model": "pico", **({"messages": ASKED} if path == CHAT else {"prompt": "Hi"}), **fields}


def events_of(text: str) -> list[str]:
    """Return the data of server-sent events."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


class Connection:
    """One request as ASGI messages: what was sent so far, and a client that may leave or read no more."""

    def __init__(self, client: Client, path: str, fields: Mapping[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._gone = asyncio.Event()
        self._body: bytes | None = json.dumps(filled(path, fields)).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("server", 80),
        }
        self.task = asyncio.ensure_future(client.asgi(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def text(self) -> str:
        """The body so far."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()


@asynccontextmanager
async def connected(client: Client, path: str = CHAT, **fields: Any) -> AsyncGenerator[Connection]:
    """Send a request; at the end its connection is closed, and the application has to be done with it soon."""
    connection = Connection(client, path, fields)
    yield connection
    connection.leave()
    connection.reads.set()
    await asyncio.wait_for(connection.task, 10)


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for something that happens in the loop or in a thread."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on loopback, and yield its address."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none", interface="asgi3"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
