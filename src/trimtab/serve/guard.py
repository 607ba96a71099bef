"""The guard in front of the application: what gets past is small, whole, from an allowed place, and of a known key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from trimtab.errors import OptionError
from trimtab.serve.hosts import Hosts, check_origin, check_origin_option
from trimtab.serve.intake import KINDS, Gone, announces_body, check_announced, check_json, read_body, replay
from trimtab.serve.keys import Keys
from trimtab.serve.limits import Limits, client_of
from trimtab.serve.refusal import SECURITY_HEADERS, Refusal, new_request_id, retry_after, unexpected
from trimtab.serve.screen import METHODS, check_line, head_of, is_page

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("trimtab.serve")

_LINGER = 1.0
"""Seconds for which the rest of a refused body is still taken in, so that the client gets to read the answer."""
_LINGER_BYTES = 2**20
_LONG = 2**16
"""Bytes of JSON from which on others are not held up while it is checked."""
_ADMINS_OWN = ("PUT", "DELETE")


@dataclass(frozen=True)
class GuardSettings:
    """What the guard lets through."""

    host: str = "127.0.0.1"
    """Where the server listens, which says whom a request may be for."""
    keys: Keys = field(default_factory=Keys)
    allow_hosts: tuple[str, ...] = ()
    """Names under which the server is asked for, beyond localhost."""
    allow_origins: tuple[str, ...] = ()
    """Origins of pages that may use the server."""
    rate: float | None = None
    """Requests per minute of one key, or of one address where there are no keys."""
    concurrency: int | None = None
    """Requests at a time, likewise."""
    body_limit: int = 2**20
    """Longest JSON body, in bytes."""
    body_seconds: float = 30.0
    file_limit: int = 2**28
    """Longest body of PUT, in bytes."""
    file_seconds: float = 300.0

    def __post_init__(self) -> None:
        """Raise `OptionError` for a limit that nothing could keep."""
        bodies = (self.body_limit, self.body_seconds, self.file_limit, self.file_seconds)
        if not all(limit is None or limit > 0 for limit in (*bodies, self.rate, self.concurrency)):
            raise OptionError("Limits of requests and bodies are positive. Leave one out to have none, or its default.")


class Guard:
    """ASGI middleware around the whole application.

    PUT and DELETE come through for admin keys only. The application finds in `request.state` the request's name,
    `request_id`, and `key`, which tells keys apart and is empty without one.
    """

    def __init__(self, app: ASGIApp, settings: GuardSettings) -> None:
        self.app, self.settings = app, settings
        self.draining = False
        """Whether the server is about to end: set to true, requests that run go on, and new ones are refused."""
        self.hosts = Hosts.of(settings.host, settings.allow_hosts, keys=bool(settings.keys.users))
        self.origins = {check_origin_option(origin) for origin in settings.allow_origins}
        self.limits = Limits(settings.rate, settings.concurrency)
        self.inner = _with_cors(self._admit, self.origins) if self.origins else self._admit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "No websockets are answered here."})
            return
        began = time.monotonic()
        exchange = _Exchange(scope, receive, send, self)
        scope.setdefault("state", {}).update(key="", request_id=exchange.id)
        try:
            await self._screen(scope, exchange)
        except asyncio.CancelledError:
            if not self.draining:  # else the time to finish is over, and this request's task goes on to its end
                raise
            if exchange.status is None:
                await _refuse(_shutting_down(), exchange.send)
        except Exception:  # noqa: BLE001  # which is logged
            refusal = unexpected(exchange.id)
            if exchange.status is None:
                await _refuse(refusal, exchange.send)
        finally:
            path = quote(scope["path"], safe="/:")[:200]  # without the query string
            took = 1000 * (time.monotonic() - began)
            who = scope["state"]["key"] or "-"
            log.info(
                "%s %s %s %s %.0f ms, key %s", exchange.id, scope["method"], path, exchange.status or "-", took, who
            )

    async def _screen(self, scope: Scope, exchange: _Exchange) -> None:
        """Refuse what is wrong whoever sends it, and hand on the rest."""
        try:
            head = head_of(scope)
            check_line(scope, preflights=bool(self.origins))
            self.hosts.check(head.get("host"))
            if scope["method"] not in ("GET", "HEAD"):
                check_origin(head, self.origins)
            if head.get("upgrade", "").lower() == "websocket":
                raise Refusal(400, "No websockets are answered here. Streams are server-sent events: stream=true.")
        except Refusal as refusal:
            await _refuse(refusal, exchange.send)
        else:
            exchange.unread = announces_body(head)
            scope["trimtab.head"] = head
            await self.inner(scope, exchange.receive, exchange.send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask for a key, count the request, read its body, and let the application answer."""
        head: dict[str, str] = scope["trimtab.head"]
        try:
            if self.draining:
                raise _shutting_down()
            if scope["method"] in ("GET", "HEAD") and (is_page(scope["path"]) or scope["path"] == "/health"):
                check_announced(scope["method"], scope["http_version"], head, 0)
                await self.app(scope, receive, send)
                return
            with self.limits.admitted(self._client(scope, head)):
                await self.app(scope, await self._body(scope, head, receive), send)
        except Refusal as refusal:
            await _refuse(refusal, send)
        except Gone:
            pass

    def _client(self, scope: Scope, head: dict[str, str]) -> str:
        """Return who is asking, by key or else by address, and note it in the scope; refuses a stranger."""
        keys = self.settings.keys
        address = client_of(scope["client"][0] if scope.get("client") else "")
        scheme, _, key = head.get("authorization", "").partition(" ")
        caller = keys.find(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else None
        who = address if caller is None else f"key {caller.name}"
        if caller is not None:
            scope["state"]["key"] = caller.name
        elif keys.users:
            self.limits.charge(who)  # so that guessing is slow
            said = "This key is not known." if "authorization" in head else "No key was sent."
            raise Refusal(
                401,
                f"{said} Send Authorization: Bearer and your key.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if scope["method"] in _ADMINS_OWN and (caller is None or not caller.admin):
            self.limits.charge(who)
            why = "needs an admin key" if keys.admins else "needs an admin key, and this server was started without one"
            raise Refusal(403, f"{scope['method']} {why}.", code="admin_only")
        return who

    async def _body(self, scope: Scope, head: dict[str, str], receive: Receive) -> Receive:
        """Read and check a request's body, and return what gives it to the application."""
        method, settings = scope["method"], self.settings
        whole = method == "PUT"
        limit = settings.file_limit if whole else settings.body_limit
        check_announced(method, scope["http_version"], head, limit)
        if method not in KINDS:
            return receive
        body = await read_body(receive, limit, settings.file_seconds if whole else settings.body_seconds)
        if not whole and len(body) < _LONG:
            check_json(body)
        elif not whole:
            await asyncio.to_thread(check_json, body)
        return replay(body, receive)


class _Exchange:
    """One request and its answer, with the headers that every answer carries."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, guard: Guard) -> None:
        self._receive, self._send, self._guard = receive, send, guard
        self.page = is_page(scope["path"])
        self.id = new_request_id()
        self.status: int | None = None
        self.unread = True
        """Whether there is more of the body; until the headers are known, there may be."""

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self.unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": self._headers(message)}
            self.status = message["status"]
        elif self.unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body"}
        await self._send(message)

    def _headers(self, message: Message) -> list[tuple[bytes, bytes]]:
        own = [*SECURITY_HEADERS, (b"x-request-id", self.id.encode())]
        if not self.page:
            own.append((b"cache-control", b"no-store"))
        if self.unread or self._guard.draining:
            own.append((b"connection", b"close"))
        names = {name for name, _ in own}
        return [(name, value) for name, value in message.get("headers", ()) if name.lower() not in names] + own

    async def _linger(self) -> None:
        """Take in what is left of a refused body: a connection closed on it would take the answer along."""
        taken = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while self.unread and taken < _LINGER_BYTES:
                    taken += len((await self.receive()).get("body", b""))


async def _refuse(refusal: Refusal, send: Send) -> None:
    headers, body = refusal.response()
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _shutting_down() -> Refusal:
    return Refusal(503, "The server is shutting down. Try again soon.", code="draining", headers=retry_after(5))


def _with_cors(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=METHODS,
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )
