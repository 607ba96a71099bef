"""One request of a load: sent, waited for where the server is full, and timed as its answer streams in."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

from trimtab.errors import brief, printable
from trimtab.serve.figures import Outcome

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

FULL = 429
WAIT = 1.0
"""Seconds until a full server is asked again that does not say when."""
PATIENCE = 0.02
"""Seconds for which somebody waits who leaves before the first piece of an answer."""
SAID_LIMIT = 2**16
"""Bytes of an error's body that are read."""


class _Failed(Exception):
    """A request came to nothing: the kind of error, and what was said of it."""

    def __init__(self, kind: str, said: str | bytes) -> None:
        super().__init__(kind, said)
        self.kind, self.said = kind, said if isinstance(said, bytes) else said.encode()


async def ask(
    client: AsyncClient, url: str, body: bytes, *, begun: float, timeout: float, cut: int | None = None
) -> Outcome:
    """Send a request and read its answer, within `timeout` seconds of `begun` on the loop's clock; an error is counted.

    A server that answers 429 is asked again when it says, as long as there is time. With `cut` the connection is
    closed once so many pieces of text have come; with 0 after a moment, whether or not the server has said anything.
    """
    import httpx

    outcome, clock = Outcome(begun), asyncio.get_running_loop().time
    try:
        async with asyncio.timeout_at(clock() + PATIENCE if cut == 0 else begun + timeout):
            while (wait := await _attempt(client, url, body, outcome, cut)) is not None:
                if clock() + wait > begun + timeout:
                    raise _Failed(f"HTTP {FULL}", f"full, and asks for {wait:g} s more of the {timeout:g} s")
                outcome.retries += 1
                await asyncio.sleep(wait)
    except _Failed as failure:
        outcome.fail(failure.kind, message(client, failure.said))
    except TimeoutError:
        outcome.disconnected = cut == 0
        if not outcome.disconnected:
            outcome.fail("timeout", f"no whole answer within {timeout:g} s")
    except (httpx.TransportError, httpx.DecodingError) as error:
        outcome.fail("connection", brief(str(error) or type(error).__name__, 300))
    return outcome


async def _attempt(client: AsyncClient, url: str, body: bytes, outcome: Outcome, cut: int | None) -> float | None:
    """Ask once; return how long to wait where the server is full."""
    async with client.stream("POST", url, content=body) as response:
        if response.status_code == FULL:
            return _wait(response.headers.get("retry-after", ""))
        if response.status_code != 200:
            raise _Failed(f"HTTP {response.status_code}", await start_of(response))
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise _Failed("no stream", await start_of(response))
        await _read(response, outcome, cut)
    return None


async def _read(response: Response, outcome: Outcome, cut: int | None) -> None:
    """Take the events as they come; leaving before the end closes the connection."""
    if cut == 0:
        outcome.disconnected = True
        return
    clock, rest = asyncio.get_running_loop().time, b""
    # To its end, also after [DONE]: a connection is used again only where its answer was read whole.
    async for block in response.aiter_bytes():
        now = clock()
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                _take(line[5:].strip(), outcome, now)
                outcome.disconnected = len(outcome.pieces) == cut
                if outcome.disconnected:
                    return
    if not outcome.finished:
        raise _Failed("cut short", f"the stream ends after {len(outcome.pieces)} pieces of text without saying why")


def _take(data: bytes, outcome: Outcome, now: float) -> None:
    """Take what counts out of an event: text, the answer's end, the number of tokens."""
    outcome.ended = now
    if data == b"[DONE]":
        outcome.finished = True
        return
    try:
        event: Any = json.loads(data)
        if event.get("error") is not None:
            raise _Failed("error in the stream", data)
        for choice in (event.get("choices") or [])[:1]:
            delta = choice.get("delta") or choice
            if delta.get("content") or delta.get("reasoning_content") or delta.get("text"):
                outcome.pieces.append(now)
            outcome.finished |= choice.get("finish_reason") is not None
        count = (event.get("usage") or {}).get("completion_tokens")
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _Failed("broken stream", data) from None
    if type(count) is int:
        outcome.tokens = count


def _wait(text: str) -> float:
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d*)?", text) else WAIT


async def start_of(response: Response) -> bytes:
    """Read the body of an answer, or as much of it as is worth reading."""
    found = b""
    async for block in response.aiter_bytes():
        found += block
        if len(found) > SAID_LIMIT:
            break
    return found[:SAID_LIMIT]


def message(client: AsyncClient, data: bytes) -> str:
    """Return the message in an error's body, or what there is of a body without one, on one short line.

    The key of the client is taken out of it: some servers repeat the one that they refuse.
    """
    text = data.decode("utf-8", "replace")
    try:
        body: Any = json.loads(text)
        found = body.get("error", body.get("detail"))
        text = str(found["message"] if isinstance(found, dict) else found or text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    key = client.headers.get("authorization", "").removeprefix("Bearer ")
    text = text.replace(key, "***") if key else text
    text = " ".join(printable(text.replace("\n", " ")).split())
    return text if len(text) <= 300 else text[:297] + "..."
