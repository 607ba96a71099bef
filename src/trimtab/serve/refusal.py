"""Errors in OpenAI's form, and the headers that every response carries."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

Headers = list[tuple[bytes, bytes]]

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

SECURITY_HEADERS: Headers = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        b"object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Refusal(Exception):
    """A request is not answered, and why: a status, and a message that the client may read."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, list(headers)

    def response(self) -> tuple[Headers, bytes]:
        """Return headers and body."""
        body = json.dumps(error_body(self.status, self.message, code=self.code)).encode()
        length = str(len(body)).encode()
        return [(b"content-type", b"application/json"), (b"content-length", length), *self.headers], body


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form, with the type that goes with a status."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    """Return the header that says when to come again: whole seconds, at least one."""
    return b"retry-after", str(max(1, -int(-seconds // 1))).encode()


def new_request_id() -> str:
    """Return a name for one request; what a client sends as such is never taken over."""
    return f"req_{secrets.token_hex(12)}"
