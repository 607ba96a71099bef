"""What errors of Trimtab, of pydantic and of FastAPI come to for a client: refusals, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from trimtab.errors import AdapterError, EngineError, KnobError, OptionError, RenderError, UnknownName, brief, printable
from trimtab.serve.refusal import Refusal, retry_after

SHOWN = 3
"""Flaws of one request that are told at once."""


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not what was asked for."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": said}
    for status, said in {
        400: "What is asked for cannot be done; the message says why",
        404: "There is nothing of that name",
        429: "There is no room for the request now",
        500: "A failure of the server; the message does not say more than where to look",
        503: "No request is answered now, or the time for this one is up",
        "4XX": "Refused before anybody looked at what was asked for: by key, host, length, speed or type of the body",
    }.items()
}
"""What every route may answer in place of what was asked for."""


def unavailable(message: str) -> Refusal:
    """Return the refusal of a server that cannot answer now."""
    return Refusal(503, message, code="unavailable", headers=retry_after(1))


def refused(error: Exception, param: str | None = None) -> Refusal:
    """Return what a client is told of one of Trimtab's own errors."""
    return unavailable(str(error)) if isinstance(error, EngineError) else Refusal(400, str(error), param=param)


REFUSALS = (OptionError, UnknownName, RenderError, KnobError, AdapterError)
"""Trimtab's errors that a request is to blame for."""


def respond(refusal: Refusal) -> Response:
    """Return a refusal as a response."""
    return Response(refusal.body, refusal.status, refusal.headers, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Let every error of a route, and every request without one, be answered in OpenAI's form."""

    async def own(_: Request, error: Exception) -> Response:
        return respond(error if isinstance(error, Refusal) else refused(error))

    async def http(request: Request, error: Exception) -> Response:
        return respond(_said(request, cast(HTTPException, error)))

    async def invalid(_: Request, error: Exception) -> Response:
        return respond(_flaws(cast(RequestValidationError, error).errors()))

    for kind in (Refusal, EngineError, *REFUSALS):
        app.add_exception_handler(kind, own)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def _said(request: Request, error: HTTPException) -> Refusal:
    path, message, headers = printable(request.scope["path"][:200]), str(error.detail), error.headers
    if error.status_code == 404:
        message = f"There is nothing at {path}. /openapi.json lists what there is."
    elif error.status_code == 405:
        allowed = _methods(request) or (headers or {}).get("Allow", "")
        message, headers = f"{path} takes {allowed}; got {request.method}.", {"Allow": allowed}
    return Refusal(error.status_code, message, headers=headers)


def _methods(request: Request) -> str:
    """Return the methods of a path, of which the router knows those of one route only."""
    route = request.scope.get("route")
    paths: Mapping[str, Mapping[str, Any]] = cast(FastAPI, request.app).openapi()["paths"]
    known = paths.get(route.path_format, {}) if isinstance(route, APIRoute) else {}
    return ", ".join(sorted(method.upper() for method in known))


def _flaws(errors: Sequence[Any]) -> Refusal:
    """Tell what is wrong with a body in a few sentences, and the first flaw's place as `param`."""
    told = [_flaw(error) for error in errors[:SHOWN]]
    return Refusal(400, " ".join(message for message, _ in told), param=told[0][1])


def _flaw(error: Mapping[str, Any]) -> tuple[str, str | None]:
    context = error.get("ctx") or {}
    place = _place(cast(Sequence[str | int], error["loc"])[1:])  # the first part says that it is the body
    if error["type"] == "said":
        return f"{place + ': ' if place else ''}{error['msg']}", place or context["param"]
    got = "" if error["type"] == "missing" else f"; got {brief(error['input'])}"
    words = str(error["msg"])
    return f"{place or 'The body'}: {words[:1].lower()}{words[1:]}{got}.", place or None


def _place(parts: Sequence[str | int]) -> str:
    """Write where in a body a flaw is, such as `messages[0].content`; parts with a tilde name a choice of types."""
    place = ""
    for part in parts:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("~"):
            place += f".{part}" if place else part
    return printable(place)[:200]
