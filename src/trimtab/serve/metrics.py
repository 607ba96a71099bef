"""What a server counts and times, for Prometheus; and the outermost layer, which sees every request and failure."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.serve.errors import respond
from trimtab.serve.refusal import unexpected

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GONE = 499
"""The status that is counted, and seen by nobody, where the client has gone before there was an answer."""


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("trimtab_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.answers = Counter("trimtab_answers", "Answers, by how they ended", ["ending"], registry=registry)
        self.in_flight = Gauge("trimtab_answers_in_flight", "Answers that are made, or wait", registry=registry)
        self.waiting = Gauge("trimtab_answers_waiting", "Those for which a step has no room", registry=registry)
        self.prompt_tokens = Counter("trimtab_prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter("trimtab_completion_tokens", "Tokens of answers", registry=registry)
        self.disconnects = Counter(
            "trimtab_client_disconnects", "Clients that went before their answer was complete", registry=registry
        )
        self.first_token = Histogram(
            "trimtab_time_to_first_token_seconds",
            "From the request to the first token of any of its answers",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self.duration = Histogram(
            "trimtab_completion_seconds",
            "From the request to the end of its last answer",
            buckets=WHOLE,
            registry=registry,
        )

    def text(self) -> bytes:
        """Return everything in Prometheus' text form."""
        return generate_latest(self.registry)


class Outermost:
    """ASGI middleware: counts requests, and answers what no handler has seen with a neutral 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:  # noqa: BLE001  # which is logged
            refusal = unexpected(scope["state"]["request_id"])
            if not status:  # otherwise the connection is closed before the answer is complete, which a client sees
                await respond(refusal)(scope, receive, watched)
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, APIRoute) else "other"  # paths that anybody can make up are one
            self._metrics.requests.labels(path, str(status or GONE)).inc()
