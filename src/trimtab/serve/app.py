"""The application: every route of the server, over one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.responses import FileResponse, PlainTextResponse, Response

from trimtab.engines.continuous.engine import Engine
from trimtab.serve import completions, knobs
from trimtab.serve.catalogue import Catalogue
from trimtab.serve.errors import RESPONSES, add_handlers
from trimtab.serve.flight import Desk, Room
from trimtab.serve.metrics import Metrics, Outermost
from trimtab.serve.refusal import Refusal
from trimtab.serve.replies import Health, reply
from trimtab.serve.server import Here, Server
from trimtab.types import Setting

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""What the page is made of."""


def create_app(
    engine: Engine, *, model: str, panels: Mapping[str, Setting] | None = None, room: Room | None = None
) -> FastAPI:
    """Return the application; `model` is the name that requests ask for, `panels` are settings by name.

    It is to stand behind a `Guard`: it asks nobody for a key, and takes bodies as they come.
    """
    app = FastAPI(title="Trimtab", version=version("trimtab"), docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics()
    desk = Desk(engine, room or Room(), metrics)
    app.state.server = Server(engine, Catalogue(engine, model, panels or {}), desk, metrics, asyncio.Lock())
    for routes in (status, knobs.router, completions.router, page_routes(PAGE)):
        app.include_router(routes)
    add_handlers(app)
    app.add_middleware(Outermost, metrics=metrics)
    return app


status = APIRouter()


@status.get("/health", response_model=Health, responses={503: RESPONSES[503]})
async def health(here: Here) -> Response:
    """Say whether requests are answered."""
    here.desk.check_open()
    return reply(Health(status="ok"))


@status.get("/metrics", response_class=PlainTextResponse)
async def read_metrics(here: Here) -> Response:
    """Return what the server counts, in Prometheus' text form."""
    return PlainTextResponse(here.metrics.text(), media_type="text/plain; version=0.0.4")


def page_routes(folder: Path) -> APIRouter:
    """Return the routes of the files that are in a folder now, by their names: no request's path is ever one of a file.

    The page itself is at `/`.
    """
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = {path.name: path for path in found if path.suffix in KINDS}

    async def serve(name: str) -> Response:
        if name not in files:
            raise Refusal(404, "The playground has no such file.")
        return FileResponse(files[name], media_type=KINDS[files[name].suffix], headers={"Cache-Control": "no-cache"})

    async def index() -> Response:
        return await serve("index.html")

    router = APIRouter(include_in_schema=False)
    router.add_api_route("/", index)
    router.add_api_route("/playground/{name}", serve)
    return router
