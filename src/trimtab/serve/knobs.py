"""The routes that list models, panels and knobs, and for whoever holds the admin key put knobs in and take them out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from trimtab.artifact import AnyKnob, load_knob
from trimtab.engines.continuous.engine import Engine
from trimtab.engines.listing import describe, explain, listed
from trimtab.errors import KnobError, UnknownName, brief, unknown_name
from trimtab.serve.errors import RESPONSES, ErrorBody
from trimtab.serve.refusal import Refusal
from trimtab.serve.replies import (
    Deleted,
    KnobCard,
    KnobList,
    ModelEntry,
    ModelList,
    PanelEntry,
    PanelList,
    Put,
    reply,
)
from trimtab.serve.server import Here

BYTES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
ADMIN: dict[int | str, dict[str, Any]] = {403: {"model": ErrorBody, "description": "This takes the admin key"}}
"""What the guard in front of the application answers to others."""

router = APIRouter(responses=RESPONSES)


@router.get("/v1/models", response_model=ModelList)
async def list_models(here: Here) -> Response:
    """List the model, and a name for each of its panels."""
    names = here.catalogue.names
    return reply(ModelList(object="list", data=[here.catalogue.entry(name) for name in names]))


@router.get("/v1/models/{id:path}", response_model=ModelEntry)
async def get_model(id: str, here: Here) -> Response:
    """Say what a model's name stands for."""
    return reply(here.catalogue.entry(id))


@router.get("/v1/panels", response_model=PanelList)
async def list_panels(here: Here) -> Response:
    """List the panels with their settings."""
    panels = here.catalogue.panels.items()
    entries = [PanelEntry(id=name, object="panel", knobs=dict(setting)) for name, setting in panels]
    return reply(PanelList(object="list", data=entries))


@router.get("/v1/knobs", response_model=KnobList)
async def list_knobs(here: Here) -> Response:
    """List the knobs that requests can turn, and what becomes of strengths outside their safe ranges."""
    return reply(KnobList(**listed(here.engine.admission, here.engine.directions)))


@router.get("/v1/knobs/{id:path}", response_model=KnobCard)
async def get_knob(id: str, here: Here) -> Response:
    """Tell where a knob comes from, and what was measured of it."""
    return reply(_card(here.engine, id, _known(here.engine, id)))


@router.put("/v1/knobs/{id:path}", response_model=Put, responses=ADMIN, openapi_extra=BYTES)
async def put_knob(id: str, request: Request, here: Here) -> Response:
    """Load a knob file, which is the body, under a name.

    `replaced` tells whether a knob had it, which requests in flight keep.
    """
    async with here.loading:
        replaced = id in here.engine.admission.knobs
        knob = await run_in_threadpool(_load, here.engine, id, await request.body())
    return reply(Put(**_card(here.engine, id, knob).model_dump(), replaced=replaced))


@router.delete("/v1/knobs/{id:path}", response_model=Deleted, responses=ADMIN)
async def delete_knob(id: str, here: Here) -> Response:
    """Take a knob's name away; requests in flight keep the knob."""
    try:
        await run_in_threadpool(here.engine.unload, id)
    except UnknownName as error:
        raise Refusal(404, str(error), param="id") from None
    return reply(Deleted(id=id, object="knob", deleted=True))


def _known(engine: Engine, name: str) -> AnyKnob:
    knobs = engine.admission.knobs
    if name not in knobs:
        raise Refusal(404, str(unknown_name("knob", name[:100], knobs)), param="id")
    return knobs[name]


def _card(engine: Engine, name: str, knob: AnyKnob) -> KnobCard:
    return KnobCard(**describe(name, knob, projects=name in engine.directions), **explain(knob))


def _load(engine: Engine, name: str, data: bytes) -> AnyKnob:
    """Read a knob from the bytes of its file, and give it to the engine; raises `KnobError` that names no path."""
    with tempfile.TemporaryDirectory(prefix="trimtab-", ignore_cleanup_errors=True) as folder:  # for this user only
        path = Path(folder, "uploaded.safetensors")
        path.write_bytes(data)
        try:
            knob = load_knob(path)
        except KnobError as error:
            told = str(error).removeprefix(f"Cannot load a knob from {brief(str(path), 240)}: ")
            raise KnobError(f"The body is no knob file: {told.replace(folder, '...')}") from None
        engine.load(name, knob)  # while the file is there: large tensors are read from it
    return knob
