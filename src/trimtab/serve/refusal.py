"""Errors in OpenAI's form, and the headers that every response carries."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping

Headers = list[tuple[bytes, bytes]]

_LOG = logging.getLogger("trimtab.serve")
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
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = json.dumps({"error": error}).encode()

    def response(self) -> tuple[Headers, bytes]:
        """Return headers and body."""
        whole = {"content-type": "application/json", "content-length": str(len(self.body)), **self.headers}
        return [(name.encode(), value.encode()) for name, value in whole.items()], self.body


def unexpected(request_id: str) -> Refusal:
    """Log the error that is being handled, and return what a client may be told of it: nothing but where to look."""
    _LOG.exception("%s failed", request_id)
    return Refusal(500, f"Something went wrong here; the server's log has it as {request_id}.", code="internal_error")


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header that says when to come again: whole seconds, at least one."""
    return {"retry-after": str(max(1, -int(-seconds // 1)))}


def new_request_id() -> str:
    """Return a name for one request; what a client sends as such is never taken over."""
    return f"req_{secrets.token_hex(12)}"
