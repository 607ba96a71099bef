"""The routes that answer: what a request asks the engine for, and its answers, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing, suppress
from typing import Any, NamedTuple

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from trimtab.engines.continuous.requests import Request, Sampling
from trimtab.errors import AdapterError, OptionError, RenderError
from trimtab.serve.answers import Answer, AnswerFailed, Part, Piece
from trimtab.serve.catalogue import Catalogue
from trimtab.serve.errors import RESPONSES, refused, unavailable
from trimtab.serve.flight import ClientGone, Desk, Flight
from trimtab.serve.forms import ChatForm, Form, TextForm, Told
from trimtab.serve.metrics import GONE
from trimtab.serve.refusal import Refusal, unexpected
from trimtab.serve.replies import ChatCompletion, TextCompletion, Usage, reply, written
from trimtab.serve.schemas import ChatRequest, TextRequest
from trimtab.serve.server import Here, Server

PARTING = 5.0
"""Seconds for the last event of a stream whose time is up."""
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

router = APIRouter(responses={**RESPONSES, **STREAM})


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completion(body: ChatRequest, request: HttpRequest, here: Here) -> Response:
    """Answer a conversation."""
    return await _answer(here, request, body)


@router.post("/v1/completions", response_model=TextCompletion)
async def text_completion(body: TextRequest, request: HttpRequest, here: Here) -> Response:
    """Go on with a text, or with each of several."""
    return await _answer(here, request, body)


async def _answer(here: Server, http: HttpRequest, body: ChatRequest | TextRequest) -> Response:
    desk, renderer = here.desk, here.engine.renderer
    with ExitStack() as stack:
        flight = stack.enter_context(desk.take(body.prompts * body.each, http.receive))
        try:
            async with flight.limited():
                order = await run_in_threadpool(place, here.catalogue, body)
                _submit(flight, order, body)
                form = (ChatForm if isinstance(body, ChatRequest) else TextForm)(order.told, renderer)
                run = Run(flight, [Answer(renderer, body.stops) for _ in order.requests], order.prompt_tokens)
                if not body.stream:
                    parts = await run.collect()
                    return await run_in_threadpool(lambda: reply(form.whole(parts, run.usage)))  # may be much to write
        except ClientGone:
            return Response(status_code=GONE)
        except AnswerFailed as error:
            raise _failed(desk, error) from None
        return EventStream(stack.pop_all(), flight, _events(run, form, order.told.usage, desk))


def _submit(flight: Flight, order: Order, body: ChatRequest | TextRequest) -> None:
    try:
        flight.submit(order.requests)
    except (AdapterError, OptionError) as error:  # ids that the model has no embeddings for
        raise refused(error, body.PROMPT) from None


class Order(NamedTuple):
    """What a request comes to: one request to the engine for every answer, in OpenAI's order."""

    requests: Sequence[Request]
    prompt_tokens: int
    told: Told


def place(catalogue: Catalogue, body: ChatRequest | TextRequest) -> Order:
    """Look up the knobs, render the prompts, and see that the answers fit behind them; raises `Refusal`."""
    engine = catalogue.engine
    admitted = catalogue.admit(body)
    try:
        rows = body.rows(engine.renderer)
    except RenderError as error:
        raise refused(error, body.PROMPT) from None
    requests = [
        Request(
            ids,
            _longest(body, len(ids), engine.context_length),
            frozenset(engine.ends),
            admitted,
            Sampling(body.heat, 1.0 if body.top_p is None else body.top_p, body.seed_of(number), body.alternatives),
            bool(body.projections),
        )
        for ids in rows
        for number in range(body.each)
    ]
    told = Told(
        model=body.model,
        knobs={} if admitted is None else admitted.applied,
        logprobs=body.alternatives is not None,
        projected=sorted(engine.directions) if body.projections else None,
        usage=body.stream_options is not None and bool(body.stream_options.include_usage),
    )
    return Order(requests, sum(map(len, rows)), told)


def _longest(body: ChatRequest | TextRequest, prompt: int, context: int) -> int:
    """Return the most tokens of an answer behind a prompt of so many."""
    if not prompt:
        raise Refusal(400, "The prompt has no tokens. Say something.", param=body.PROMPT)
    room = context - prompt
    longest = body.longest or max(1, min(room, body.USUAL or room))
    if longest > room:
        advice = f"ask for at most {room} tokens (max_tokens), or shorten it" if room > 0 else "shorten it"
        raise Refusal(
            400,
            f"The prompt has {prompt} tokens when rendered, and an answer of up to {longest} does not fit behind it: "
            f"a request here has room for {context}. Please {advice}.",
            param=body.PROMPT,
            code="context_length_exceeded",
        )
    return longest


class Run:
    """The answers of one request while they are made."""

    def __init__(self, flight: Flight, answers: Sequence[Answer], prompt_tokens: int) -> None:
        self.answers = answers
        self._flight, self._prompt_tokens = flight, prompt_tokens

    async def parts(self) -> AsyncGenerator[tuple[int, Part]]:
        """Yield the parts of all answers as they come; raises `AnswerFailed` and `ClientGone`."""
        while self._flight.going:
            index, step = await self._flight.next()
            try:
                part = self.answers[index].add(step)
            except AnswerFailed:
                self._flight.end(index, "error")
                raise
            if part.ending:
                self._flight.end(index, part.ending)
            yield index, part

    async def collect(self) -> list[Part]:
        """Return all answers, each in one part."""
        pieces: list[list[Piece]] = [[] for _ in self.answers]
        ended: list[Part] = [Part((), 0, "") for _ in self.answers]
        async with aclosing(self.parts()) as parts:
            async for index, part in parts:
                pieces[index] += part.pieces
                ended[index] = part
        return [Part(own, 0, part.ending) for own, part in zip(pieces, ended, strict=True)]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        made = sum(answer.tokens for answer in self.answers)
        prompt = self._prompt_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)


async def _events(run: Run, form: Form, usage: bool, desk: Desk) -> AsyncGenerator[str]:
    for event in form.opening(len(run.answers)):
        yield f"data: {written(event)}\n\n"
    try:
        async with aclosing(run.parts()) as parts:
            async for index, part in parts:
                for event in form.events(index, part):
                    yield f"data: {written(event)}\n\n"
    except AnswerFailed as error:
        raise _failed(desk, error) from None
    if usage:
        yield f"data: {written(form.last(run.usage))}\n\n"


def _failed(desk: Desk, error: AnswerFailed) -> Refusal:
    alive = desk.engine.alive
    return Refusal(500, str(error), code="engine_error") if alive else unavailable(str(error))


class EventStream(StreamingResponse):
    """Server-sent events, ended by `[DONE]`, or by an error where something went wrong; then the flight is over."""

    media_type = "text/event-stream"

    def __init__(self, stack: ExitStack, flight: Flight, events: AsyncGenerator[str]) -> None:
        super().__init__(events, headers={"X-Accel-Buffering": "no"})
        self._stack, self._flight, self._events = stack, flight, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""

        async def say(event: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": more})

        last = "[DONE]"
        with self._stack:
            try:
                async with self._flight.limited(), aclosing(self._events):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async for event in self._events:
                        await say(event)
            except (ClientGone, OSError):
                return
            except Refusal as error:
                last = error.body.decode()
            except Exception:  # noqa: BLE001  # which is logged
                last = unexpected(scope["state"]["request_id"]).body.decode()
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(PARTING):  # for a client that reads no more
                await say(f"data: {last}\n\n", more=False)
