"""Connections that are not waited for: limits for slow headers, for clients that do not read, and in number.

uvicorn itself waits for the end of a request's headers, and for a client to read, as long as the client likes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from trimtab.errors import MissingDependency
from trimtab.serve.refusal import SECURITY_HEADERS, Refusal, new_request_id, retry_after

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.h11_impl import H11Protocol as Base
else:
    Base = object  # uvicorn is optional: `protocol_class` brings the two together

_USED = ("conn", "connections", "cycle", "send_400_response", "shutdown", "timeout_keep_alive_task", "transport")
"""What is used or replaced of uvicorn's protocol, beyond what asyncio asks of any."""
_KNOWN = {
    400: "This is no request of HTTP/1.1.",
    431: "The headers are too long.",
    501: "Transfer-Encoding is chunked here, or none.",
}


@dataclass(frozen=True)
class Patience:
    """How long a connection may be of no use, in seconds, and how many there may be."""

    headers: float = 10.0
    """Until a request's headers are there."""
    idle: float = 30.0
    """Between two requests."""
    unread: float = 60.0
    """While the client takes in nothing of an answer."""
    connections: int = 512


def protocol_class(patience: Patience) -> type[Any]:
    """Return uvicorn's protocol of h11 with these limits; somebody has to call `sweep` of each object now and then."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    return type("Impatient", (Impatient, H11Protocol), {"patience": patience})


def check_protocol(config: Any, state: Any) -> None:
    """Raise `MissingDependency` where uvicorn's protocol is not the one that is known here."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    plain = H11Protocol(config, state, {})
    lacking = [name for name in _USED if not hasattr(plain, name)]
    if lacking:
        raise MissingDependency(
            f"H11Protocol of uvicorn {uvicorn.__version__} has no {', '.join(lacking)}, which limits of time need. "
            "Install one that has: pip install uvicorn==0.54"
        )


class Impatient(Base):
    """One connection."""

    patience: Patience
    seen: tuple[str, int] | None = None
    """What the connection was found waiting for, and since when."""
    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.patience.connections:
            self.refuse(Refusal(503, "There are too many connections. Try again soon.", headers=retry_after(1)))

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; called while h11's error is handled, which may know a better status."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        status = status if status in _KNOWN else 400
        self.refuse(Refusal(status, _KNOWN[status]))

    def refuse(self, refusal: Refusal) -> None:
        """Answer in the application's place, if nobody has begun to, and close the connection."""
        import h11

        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = refusal.response()
            headers += [*SECURITY_HEADERS, (b"x-request-id", new_request_id().encode()), (b"connection", b"close")]
            phrase = HTTPStatus(refusal.status).phrase.encode()
            response = h11.Response(status_code=refusal.status, headers=headers, reason=phrase)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def sweep(self, now: float) -> None:
        """End the connection if it has been waiting for the same thing for too long."""
        waiting = self._waiting()
        if waiting != self.seen:
            self.seen, self.since = waiting, now
        elif waiting is None:
            return
        elif waiting[0] == "unread" and now - self.since > self.patience.unread:
            self.transport.abort()
        elif waiting[0] == "headers" and now - self.since > self.patience.headers:
            if self.conn.trailing_data[0]:
                said = f"The headers were not there after {self.patience.headers:g} s."
                self.refuse(Refusal(408, said, code="timeout"))
            self.transport.close()  # where nothing came, nothing is answered: browsers connect ahead of time

    def _waiting(self) -> tuple[str, int] | None:
        import h11

        unread = self.transport.get_write_buffer_size()
        if unread:
            return "unread", unread
        if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None:
            return "headers", 0
        return None

    def is_idle(self) -> bool:
        """Tell whether no request is under way, not even the first byte of one."""
        cycle: Any = self.cycle  # None at first, whatever its annotation says
        over = cycle is None or cycle.response_complete
        return over and not self.conn.trailing_data[0] and not self.transport.is_closing()
