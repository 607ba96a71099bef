"""The bodies of requests: JSON as RFC 8259 has it, said to be JSON, read without holding up anybody else."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from trimtab.files import parse_json
from trimtab.serve.errors import ApiError
from trimtab.types import is_unicode

LONG = 2**16
"""Bodies beyond this many bytes are read in a thread."""


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is read by `read_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        inner = super().get_route_handler()
        takes_json = self.body_field is not None

        async def handle(request: Request) -> Response:
            if takes_json:
                kind = request.headers.get("content-type", "")
                if kind.partition(";")[0].strip().lower() != "application/json":
                    raise ApiError(415, f"A body is application/json here; its content type is {kind[:100]!r}.")
            return await inner(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        return read_body(body) if len(body) < LONG else await run_in_threadpool(read_body, body)


def read_body(body: bytes) -> Any:
    """Read JSON; raises `ApiError` that says what is wrong with it.

    Python's own reader takes more: NaN, two fields of one name, halves of surrogate pairs.
    """
    try:
        value = parse_json(body)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ApiError(400, f"The body is not JSON: {error}.") from None
    if b"\\u" in body and not _is_unicode(value):
        raise ApiError(400, "A text in the body holds half of a surrogate pair, which is no character.")
    return value


def _is_unicode(value: Any) -> bool:
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, dict):
        return all(is_unicode(key) and _is_unicode(part) for key, part in value.items())
    return all(_is_unicode(part) for part in value) if isinstance(value, list) else True
