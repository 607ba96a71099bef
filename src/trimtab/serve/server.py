"""What the routes of one application share."""

from __future__ import annotations

import asyncio
from typing import Annotated, NamedTuple

from fastapi import Depends, Request

from trimtab.engines.continuous.engine import Engine
from trimtab.serve.catalogue import Catalogue
from trimtab.serve.flight import Desk
from trimtab.serve.metrics import Metrics


class Server(NamedTuple):
    """An engine, what it is asked for by name, and what is going on."""

    engine: Engine
    catalogue: Catalogue
    desk: Desk
    metrics: Metrics
    loading: asyncio.Lock
    """Held while a knob file is read: one at a time, for the memory that they need."""


async def server_of(request: Request) -> Server:
    """Return the server whose application a request came to."""
    return request.app.state.server


Here = Annotated[Server, Depends(server_of)]
"""The parameter of a route that gets its server."""
