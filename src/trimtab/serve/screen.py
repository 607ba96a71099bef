"""What is wrong with a request before anybody asks who sends it: its line, its headers, its address."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from trimtab.errors import brief
from trimtab.serve.refusal import Refusal

if TYPE_CHECKING:
    from starlette.types import Scope

URL_LIMIT = 2048
"""Longest path and query string, in bytes."""
HEADER_LIMIT = 2**15
"""Most bytes of all headers together."""
HEADER_COUNT = 100
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_ONCE = frozenset(
    {
        "authorization",
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "origin",
        "sec-fetch-site",
        "transfer-encoding",
        "upgrade",
    }
)
"""The headers that are looked at here, of which there may be one each: two readers could choose differently."""


def is_page(path: str) -> bool:
    """Tell whether a path is the playground's, which a browser loads before it has a key to send."""
    return path == "/" or path.startswith("/playground/")


def head_of(scope: Scope) -> dict[str, str]:
    """Return the headers that are looked at; raises `Refusal` for too many of them, and for one that stands twice."""
    if len(scope["headers"]) > HEADER_COUNT or sum(len(n) + len(v) for n, v in scope["headers"]) > HEADER_LIMIT:
        raise Refusal(431, f"At most {HEADER_COUNT} headers are taken, of {HEADER_LIMIT} bytes together.")
    head: dict[str, str] = {}
    for raw_name, value in scope["headers"]:
        name: str = raw_name.decode("latin-1").lower()
        if name in _ONCE:
            if name in head:
                raise Refusal(400, f"There are two headers {name}. Send one.")
            head[name] = value.decode("latin-1").strip()
    return head


def check_line(scope: Scope, *, preflights: bool) -> None:
    """Raise `Refusal` for a method, a path or a query string that is none of this server's."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if len(raw) + len(scope["query_string"]) > URL_LIMIT:
        raise Refusal(414, f"The URL is longer than {URL_LIMIT} bytes.")
    known = (*METHODS, "OPTIONS") if preflights else METHODS
    if scope["method"] not in known:
        allowed = ", ".join(known)
        raise Refusal(
            405,
            f"Method {brief(scope['method'])} is not answered. Known: {allowed}.",
            headers={"allow": allowed},
        )
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise Refusal(400, "The path is not UTF-8.") from None
    first, *segments = path.split("/")
    if (
        first
        or not segments
        or re.search(r"[\x00-\x1f\x7f\\]", path)
        or {".", ".."} & {*segments}
        or "" in segments[:-1]
    ):
        raise Refusal(400, f"{brief(path)} is no path of this server, which has no //, . or .. in it.")
    if scope["query_string"] and not is_page(path):
        raise Refusal(400, "No query strings are taken here. Options go into the body, a key into Authorization.")
