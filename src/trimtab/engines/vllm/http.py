"""Over HTTP: the field `knobs` in the body of a request, and the list of an engine's knobs at `/v1/knobs`.

vLLM's server needs no change: a middleware of its command line moves `knobs` to `vllm_xargs`, where vLLM's own routes
take it from.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

from trimtab.engines.listing import listed
from trimtab.engines.vllm.front import front_of, load_knob_async
from trimtab.engines.vllm.settings import REQUESTED
from trimtab.errors import OptionError, TrimtabError, brief
from trimtab.files import parse_json

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""Routes whose requests have `vllm_xargs`."""
KNOBS = "/v1/knobs"


class KnobsInBody:
    """ASGI middleware; vLLM's `--middleware trimtab.engines.vllm.http.KnobsInBody` puts it in."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            _add_routes(scope["app"])
        if scope["type"] != "http" or scope["method"] != "POST" or not _may_hold_knobs(scope):
            await self._app(scope, receive, send)
            return
        messages, body = await _read(receive)
        try:
            moved = move_knobs(body, scope["path"])
            _admit(scope, body if moved is None else moved)
        except TrimtabError as error:
            await _refuse(send, str(error))
            return
        if moved is not None:
            messages = [{"type": "http.request", "body": moved, "more_body": False}]
            headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(moved)).encode())]}
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        await self._app(scope, replay, send)


def _may_hold_knobs(scope: Message) -> bool:
    """Tell whether a body is worth reading, which is done before anybody checks a key: not uploads and the like."""
    kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
    return scope["path"] != KNOBS and b"json" in kind.lower()


async def _read(receive: Receive) -> tuple[list[Message], bytes]:
    """Take in a request's body, as the routes do."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, b"".join(m.get("body", b"") for m in messages)


def move_knobs(body: bytes, path: str) -> bytes | None:
    """Return a body with `knobs` moved to `vllm_xargs`, or None where there is none to move.

    Raises `OptionError` where knobs would be lost: on other routes, and with beam search.
    """
    if path not in ROUTES and f'"{REQUESTED}"'.encode() not in body:
        return None
    content = _parsed(body)
    if not isinstance(content, dict) or content.get(REQUESTED) is None:
        return None
    fields = cast(dict[str, Any], content)
    if path not in ROUTES:
        raise OptionError(f"{path} takes no {REQUESTED!r}; these do: {', '.join(ROUTES)}.")
    if fields.get("use_beam_search"):
        raise OptionError("Beam search goes on from every beam as from a prompt, and vLLM takes no knobs with it.")
    others = fields.get("vllm_xargs") or {}
    if not isinstance(others, dict) or REQUESTED in others:
        raise OptionError(f"vllm_xargs is an object, and {REQUESTED!r} stands either in it or beside it.")
    knobs = fields.pop(REQUESTED)
    if not isinstance(knobs, str | dict):
        raise OptionError(f'knobs are written {{"math": 0.8}} or "math=0.8"; got {brief(knobs)}.')
    text = knobs if isinstance(knobs, str) else json.dumps(knobs)
    return json.dumps({**fields, "vllm_xargs": {**others, REQUESTED: text}}).encode()


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None  # the route itself says what is wrong


def _admit(scope: Message, body: bytes) -> None:
    """Raise what admission would, before an answer that is streamed has begun."""
    content = _parsed(body) if scope["path"] in ROUTES else None
    others = cast(dict[str, Any], content).get("vllm_xargs") if isinstance(content, dict) else None
    if isinstance(others, dict) and others.get(REQUESTED) is not None:
        front_of(scope["app"].state.engine_client).admission.admit(cast(dict[str, Any], others)[REQUESTED])


async def _refuse(send: Send, message: str) -> None:
    content = {"error": {"message": message, "type": "BadRequestError", "param": REQUESTED, "code": 400}}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


# The list of knobs


def _add_routes(app: Any) -> None:
    """Add `/v1/knobs` to the server's own routes, behind whatever guards them."""

    async def get_knobs(request: Any) -> Any:
        try:
            return _json(listed(front_of(request.app.state.engine_client).admission))
        except TrimtabError as error:
            return _json({"error": {"message": str(error), "type": "NotFoundError", "code": 404}}, 404)

    async def post_knob(request: Any) -> Any:
        engine = request.app.state.engine_client
        try:
            front = front_of(engine)
            if not front.settings.allow_loading:
                raise OptionError("This server loads knobs at its start only. Start it with --allow-loading.")
            name, path = read_order(await request.body())
            await load_knob_async(engine, name, path)
        except TrimtabError as error:
            return _json({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)
        return _json(listed(front.admission))

    app.add_route(KNOBS, get_knobs, methods=["GET"])
    app.add_route(KNOBS, post_knob, methods=["POST"])


def read_order(body: bytes) -> tuple[str, str]:
    """Read the body of `POST /v1/knobs`: a name, and the path of a file on the server's machine."""
    try:
        content: object = parse_json(body)
    except ValueError as error:
        raise OptionError(f"The body is not JSON: {error}.") from None
    fields = cast(dict[str, object], content) if isinstance(content, dict) else {}
    name, path = fields.get("name"), fields.get("path")
    if not isinstance(name, str) or not isinstance(path, str) or not path or fields.keys() != {"name", "path"}:
        raise OptionError('A knob is loaded by {"name": "math", "path": "math.knob.safetensors"}.')
    return name, path


def _json(content: dict[str, Any], status: int = 200) -> Any:
    return importlib.import_module("starlette.responses").JSONResponse(content, status)  # which vLLM brings along
