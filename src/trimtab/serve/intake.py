"""Bodies on their way in: of what kind, how long, how slow, and JSON that is safe to hand on.

A body is read whole and checked before the application sees it: what the application parses is what was judged here.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from trimtab.errors import brief
from trimtab.files import parse_json
from trimtab.serve.refusal import Refusal
from trimtab.types import is_unicode

if TYPE_CHECKING:
    from starlette.types import Message, Receive

DEEPEST = 32
"""How many lists and objects of a body may stand in each other."""
KINDS = {"POST": "application/json", "PUT": "application/octet-stream"}
"""The media type of each method that has a body."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Gone(Exception):
    """The client has left before its body was there."""


def announces_body(head: dict[str, str]) -> bool:
    """Tell from the headers whether a body follows."""
    return "transfer-encoding" in head or head.get("content-length", "0").strip("0") != ""


def check_announced(method: str, version: str, head: dict[str, str], limit: int) -> None:
    """Raise `Refusal` for a body that will not be read, going by its headers."""
    chunked = "transfer-encoding" in head
    if chunked and ("content-length" in head or version == "1.0"):  # another server may see two requests in it
        raise Refusal(400, "Where the body ends is said in two ways. Send Content-Length or Transfer-Encoding.")
    if method not in KINDS:
        if announces_body(head):
            raise Refusal(400, f"{method} takes no body here. Leave it out.")
        return
    kind, _, parameters = (part.strip().lower() for part in head.get("content-type", "").partition(";"))
    if kind != KINDS[method] or parameters.replace('"', "").replace(" ", "") not in ("", "charset=utf-8"):
        got = brief(head["content-type"]) if "content-type" in head else "none"
        raise Refusal(415, f"The content-type of {method} is {KINDS[method]}, in UTF-8 where it is text; got {got}.")
    if head.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, f"Bodies are taken as they are; got content-encoding {brief(head['content-encoding'])}.")
    if not chunked and "content-length" not in head:
        raise Refusal(411, f"{method} needs a body. Send Content-Length.")
    length = head.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, f"Content-Length is a number of bytes; got {brief(length)}.")
    if int(length) > limit:
        raise _too_large(limit)


async def read_body(receive: Receive, limit: int, seconds: float) -> bytes:
    """Return the whole body; raises `Refusal` for one that is longer or slower than allowed, whatever it announced."""
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _too_large(limit)
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(408, f"The body was not there after {seconds:g} s.", code="timeout") from None
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read to the application, and after it what the connection has to say."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def check_json(body: bytes) -> None:
    """Raise `Refusal` for a body that is no JSON object, or one that some readers of JSON read differently.

    Such are NaN and numbers beyond every float, names that stand twice, and escapes that are no characters.
    """
    try:
        value: object = parse_json(body, deepest=DEEPEST)
    except ValueError as error:
        said = str(error)
        if "set_int_max_str_digits" in said:  # Python's advice is not for clients
            said = "it has a number of thousands of digits"
        raise Refusal(400, f"The body is not JSON that is taken here: {said}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"The body is a JSON {type(value).__name__}; expected an object.", code="invalid_json")
    if _SURROGATE.search(body) and not _is_unicode(value):
        raise Refusal(400, "The body has half a surrogate pair, which is no character.", code="invalid_json")


def _is_unicode(value: Any) -> bool:
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, dict):
        return all(is_unicode(name) and _is_unicode(part) for name, part in value.items())
    return all(map(_is_unicode, value)) if isinstance(value, list) else True


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413, f"The body is longer than {limit} bytes, which is the most that is read.", code="body_too_large"
    )
