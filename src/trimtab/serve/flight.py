"""Answers in flight: how many there may be, their steps as they come, and their end where nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

from starlette.types import Receive

from trimtab.engines.continuous.engine import Engine
from trimtab.engines.continuous.requests import Request, Step
from trimtab.errors import OptionError
from trimtab.serve.errors import unavailable
from trimtab.serve.metrics import Metrics
from trimtab.serve.refusal import Refusal, retry_after


@dataclass(frozen=True)
class Room:
    """How many answers a server has room for, and how long each may take."""

    requests: int = 64
    """Answers that a step of the engine holds."""
    queue: int = 256
    """Answers that may wait for that; those of one request count one by one."""
    timeout: float = 600.0
    """Seconds for a request, from when it was read to its last byte."""

    def __post_init__(self) -> None:
        """Raise `OptionError` for room in which nothing could be answered."""
        if not (self.requests > 0 and self.queue >= 0 and self.timeout > 0):
            raise OptionError(
                f"requests and timeout are above 0, and queue is 0 or more; got {self.requests}, {self.timeout:g} and "
                f"{self.queue}."
            )


class ClientGone(Exception):
    """The client has closed its connection, and nobody is left to answer."""


class Desk:
    """Takes on requests while there is room for their answers."""

    def __init__(self, engine: Engine, room: Room, metrics: Metrics) -> None:
        self.engine, self.room, self.metrics = engine, room, metrics
        self.flying = 0
        metrics.in_flight.set_function(lambda: self.flying)
        metrics.waiting.set_function(lambda: max(0, self.flying - room.requests))

    def check_open(self) -> None:
        """Raise `Refusal` where no request is answered any more."""
        if not self.engine.alive:
            raise unavailable("The engine has stopped. The server has to be started again.")

    def take(self, answers: int, receive: Receive) -> Flight:
        """Return a flight with room for some answers, a context that is left at its end; raises `Refusal`."""
        self.check_open()
        places = self.room.requests + self.room.queue
        if answers > places:
            raise Refusal(400, f"{answers} answers are asked for at once; this server takes up to {places}.", param="n")
        if self.flying + answers > places:
            raise Refusal(
                429,
                f"{self.flying} answers are being made or wait, and {answers} more would be beyond the {places} that "
                "this server takes. Try again in a while.",
                code="busy",
                headers=retry_after(1),
            )
        return Flight(self, answers, receive)


class Flight:
    """The answers of one HTTP request, numbered from 0: from when there was room for them until all are over."""

    def __init__(self, desk: Desk, answers: int, receive: Receive) -> None:
        self._desk, self._places = desk, answers
        desk.flying += answers
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._started = False  # whether a step has come
        self._names: dict[int, str] = {}  # of answers that are not over
        self._steps: asyncio.Queue[tuple[int, Step] | None] = asyncio.Queue()
        self._fate = "cancelled"
        self._watch = self._loop.create_task(self._watch_client(receive))

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engine, one for each answer."""
        for index, request in enumerate(requests):
            self._names[index] = self._desk.engine.submit(request, partial(self._deliver, index))
            self._desk.metrics.prompt_tokens.inc(len(request.ids))

    @property
    def going(self) -> bool:
        """Whether there is an answer that is not over."""
        return bool(self._names)

    async def next(self) -> tuple[int, Step]:
        """Return the next step of an answer that is not over; raises `ClientGone`."""
        while True:
            came = await self._steps.get()
            if came is None:
                raise ClientGone
            index, step = came
            if index in self._names:
                if not self._started:
                    self._started = True
                    self._desk.metrics.first_token.observe(self._loop.time() - self._begun)
                if step.token is not None:
                    self._desk.metrics.completion_tokens.inc()
                return came

    def end(self, index: int, ending: str) -> None:
        """Count an answer as over, whatever the engine thinks of it; its place is free."""
        self._desk.engine.cancel(self._names.pop(index))
        self._desk.metrics.answers.labels(ending).inc()
        self._places -= 1
        self._desk.flying -= 1

    @asynccontextmanager
    async def limited(self) -> AsyncGenerator[None]:
        """Hold what happens within against the time limit; raises `Refusal`.

        It is a 503, which OpenAI's clients try again. That helps where the request has only waited; where its answer
        was being made it would take as long again, and they are told not to.
        """
        seconds = self._desk.room.timeout
        limit = asyncio.timeout_at(self._begun + seconds)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            self._fate = "timeout"
            what = "The answer was not complete" if self._started else "The answer had not begun"
            headers = {**retry_after(1), **({"x-should-retry": "false"} if self._started else {})}
            hint = "Ask for fewer tokens (max_tokens)." if self._started else "Try again in a while."
            raise Refusal(
                503, f"{what} within {seconds:g} seconds. {hint}", code="time_limit", headers=headers
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.cancel()
        if self.going or self._places == 0:
            self._desk.metrics.duration.observe(self._loop.time() - self._begun)
        for index in list(self._names):
            self.end(index, self._fate)
        self._desk.flying -= self._places  # those that never came to the engine
        self._places = 0

    def _deliver(self, index: int, step: Step) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._steps.put_nowait, (index, step))

    async def _watch_client(self, receive: Receive) -> None:
        """Say so once the client has gone, also while its request waits."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._desk.metrics.disconnects.inc()
        self._steps.put_nowait(None)
