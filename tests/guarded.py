"""A small application behind the guard, in a process of its own, for tests.

    python tests/guarded.py '{"settings": {"body_seconds": 1}, "patience": {"headers": 1}, "serve": {"drain": 5}}'

It takes any free port unless there is a "port", and keys from the environment. POST /v1/wait answers after `seconds`,
POST /v1/stream sends `count` chunks of `size` bytes, one per `seconds`, GET /v1/running counts both, and POST /v1/die
lets the engine be dead.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

LINE = re.compile(r"Listening on http://\S+:\d+\n")


@dataclass
class Running:
    """A server's process."""

    process: subprocess.Popen[str]
    url: str
    log: IO[str]
    """A file: of a pipe that nobody reads, a busy server would soon have to wait for the other end."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ended(self, seconds: float = 30) -> int:
        """Wait for the end, and return the exit status."""
        return self.process.wait(timeout=seconds)

    def said(self) -> str:
        """Return what was logged so far."""
        self.log.seek(0)
        return self.log.read()


@contextmanager
def running(environment: dict[str, str] | None = None, **options: Any) -> Iterator[Running]:
    """Run the application until the context ends; `options` are those of the program."""
    names = ("TRIMTAB_API_KEY", "TRIMTAB_ADMIN_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | (environment or {})
    command = [sys.executable, str(Path(__file__)), json.dumps(options)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            server = Running(process, line.strip().removeprefix("Listening on "), log)
            assert LINE.fullmatch(line), line + server.said()
            yield server
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def main(options: dict[str, Any]) -> int:
    from trimtab.serve.connections import Patience
    from trimtab.serve.guard import GuardSettings
    from trimtab.serve.keys import load_keys
    from trimtab.serve.run import bind, serve

    app = FastAPI(redirect_slashes=False)
    there = {"running": 0, "dead": False}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete() -> dict[str, str]:
        return {}

    @app.get("/v1/client")
    async def client(request: Request) -> dict[str, Any]:
        assert request.client is not None
        return {"client": request.client.host, "scheme": request.url.scheme}

    @app.get("/v1/running")
    async def count() -> int:
        return there["running"]

    @app.post("/v1/die")
    async def die() -> None:
        there["dead"] = True

    @app.post("/v1/fail")
    async def fail(request: Request) -> None:
        raise ValueError(await request.json())

    @app.post("/v1/wait")
    async def wait(request: Request) -> dict[str, Any]:
        there["running"] += 1
        try:
            body = await request.json()
            await asyncio.sleep(body.get("seconds", 0))
            return {"number": body.get("number")}
        finally:
            there["running"] -= 1

    @app.post("/v1/stream")
    async def stream(request: Request) -> StreamingResponse:
        body = await request.json()

        async def chunks() -> AsyncIterator[bytes]:
            there["running"] += 1
            try:
                for _ in range(body["count"]):
                    yield b"." * body["size"]
                    await asyncio.sleep(body["seconds"])
            finally:
                there["running"] -= 1

        return StreamingResponse(chunks())

    settings = GuardSettings(**{"keys": load_keys(), **options.get("settings", {})})
    return serve(
        app,
        settings,
        bind(settings.host, options.get("port", 0)),
        patience=Patience(**options.get("patience", {})),
        dead=lambda: there["dead"],
        **options.get("serve", {}),
    )


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
