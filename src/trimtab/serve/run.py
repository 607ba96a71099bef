"""Run an application by uvicorn: where it listens, what it logs, and how it ends without losing a request."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import socket
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from trimtab.errors import MissingDependency, OptionError, brief
from trimtab.serve.connections import Impatient, Patience, check_protocol, protocol_class
from trimtab.serve.guard import Guard, GuardSettings
from trimtab.serve.hosts import is_loopback
from trimtab.serve.screen import HEADER_LIMIT

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from uvicorn import Server as Base
else:
    Base = object  # uvicorn is optional: `serve` brings the two together

STANDS_ON = ("fastapi", "uvicorn", "prometheus_client")
"""Packages that are not installed with Trimtab."""
INSTALL = 'Install what it stands on with: pip install "trimtab[serve]"'
_LINGER = 0.5
"""Seconds for which connections stay open when the server ends, so that requests already on their way are answered."""
_CUT = 1
"""Seconds that uvicorn gives to requests which are not over when the time to finish is."""
_DEAD = 5.0
"""Most seconds for requests to end when there is nobody left to answer them."""


class Discreet(logging.Formatter):
    """Writes of an error what it is and where it was raised; its message may hold what stood in the request."""

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Write an error, with those that it was raised for."""
        error: BaseException | None = ei[1]
        told: list[str] = []
        while error is not None:
            told.append(f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip())
            inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
            error = inner or error.__cause__ or error.__context__
        return "\n".join(told)


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "trimtab.serve.run.Discreet", "format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "trimtab.serve": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


def check_installed() -> None:
    """Raise `MissingDependency` unless what the server stands on is there."""
    missing = [name for name in STANDS_ON if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"The server needs {', '.join(missing)}. {INSTALL}")


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded for it; port 0 is any free one. Raises `OptionError`."""
    if not 0 <= port < 2**16:
        raise OptionError(f"A port is a number from 0 (any that is free) to 65535; got {port}.")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # of localhost, which is often both, the better known
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise OptionError(f"Cannot listen on {brief(host)}: {error}.") from None
    try:
        if os.name == "posix":  # where it means: at once after a crash; on Windows it would mean: shared with others
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OptionError(f"Cannot listen on {host}:{port}: {error.strerror}. Try another --port.") from None
    return bound


def check_exposure(settings: GuardSettings, *, open: bool) -> None:
    """Raise `OptionError` for a server that others on the network could use without a key, unless that is said."""
    if not open and not settings.keys.users and not is_loopback(settings.host):
        raise OptionError(
            f"Listening on {brief(settings.host)} without keys lets everybody who reaches this machine use the model. "
            "Pass --keys FILE (or set TRIMTAB_API_KEY), or --open to let them."
        )


def serve(
    app: ASGIApp,
    settings: GuardSettings,
    bound: socket.socket,
    *,
    drain: float = 30.0,
    patience: Patience | None = None,
    dead: Callable[[], bool] = lambda: False,
) -> int:
    """Answer requests at an address that `bind` took, until a signal or until `dead`, and return a status.

    SIGTERM or SIGINT ends the server: new requests get 503, those that run have `drain` seconds, and the status is 0. A
    second signal ends the process at once. Once `dead` says that there is nobody left to answer, it ends with status 1,
    for a supervisor to start it anew. When it accepts connections, it prints "Listening on http://HOST:PORT".
    """
    import uvicorn

    guard, patience = Guard(app, settings), patience or Patience()
    config = uvicorn.Config(
        guard,
        http=protocol_class(patience),
        ws="none",
        loop="asyncio",
        interface="asgi3",
        log_config=LOGGING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        workers=1,
        h11_max_incomplete_event_size=HEADER_LIMIT,
        timeout_keep_alive=cast(int, patience.idle),  # seconds of the loop's clock, whole or not
        timeout_graceful_shutdown=_CUT,
    )
    server = type("Runner", (Runner, uvicorn.Server), {})(config)
    server.guard, server.drain, server.dead = guard, drain, dead
    with bound:
        server.run(sockets=[bound])
    return server.status


class Runner(Base):
    """uvicorn's server, which sweeps its connections, and takes its time to end."""

    guard: Guard
    drain: float
    dead: Callable[[], bool]
    status = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True  # without noting the signal, as uvicorn does to be killed by it in the end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets
        check_protocol(self.config, self.server_state)
        try:
            await super().startup(sockets)
        except OSError as error:  # another server had taken the address too, and listens by now
            await self.lifespan.shutdown()
            raise OptionError(f"Cannot listen on {_url(sockets[0])}: {error.strerror}. Try another --port.") from None
        if self.started:
            print(f"Listening on {_url(sockets[0])}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        self._sweep()
        if self.dead():
            self.status, self.should_exit, self.drain = 1, True, min(self.drain, _DEAD)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.guard.draining = True
        for bound in sockets or ():
            bound.listen(0)  # nobody comes in any more,
        await asyncio.sleep(0.05)  # who waits at the door is let in, for closing it would cut them off,
        for listener in self.servers:
            listener.close()
        await self._finish()
        await super().shutdown(sockets)

    async def _finish(self) -> None:
        """Wait for running requests; connections at rest are closed once nothing can be on its way to them."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self.server_state.connections and loop.time() - began < self.drain:
            self._sweep()
            if loop.time() - began > _LINGER:
                for connection in self._connections():
                    if connection.is_idle():
                        connection.shutdown()
            await asyncio.sleep(0.05)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in self._connections():
            connection.sweep(now)

    def _connections(self) -> list[Impatient]:
        return cast(list[Impatient], list(self.server_state.connections))


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
