"""OpenAI's two forms of an answer, whole and in pieces: chat completions, and the older completions of a text."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.render import Renderer
from trimtab.serve.answers import Part, Piece
from trimtab.serve.replies import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    Finish,
    Likely,
    LikelyToken,
    Projections,
    Reply,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Usage,
)

LEAST = -9999.0
"""What OpenAI writes for the log-probability of what cannot be."""


@dataclass(frozen=True)
class Told:
    """What an answer says beside its text."""

    model: str
    knobs: Mapping[str, float]
    logprobs: bool
    projected: Sequence[str] | None
    """Names of the knobs whose projections are told; None tells of none."""
    usage: bool
    """Whether a stream ends with its usage, and has a field for it in every event."""


class Form(Protocol):
    """How the answers of one request are written."""

    def opening(self, count: int) -> Iterator[Reply]:
        """Return the events before those of any answer."""
        ...

    def events(self, index: int, part: Part) -> Iterator[Reply]:
        """Return the events of a part of an answer."""
        ...

    def last(self, usage: Usage) -> Reply:
        """Return the event that holds the usage."""
        ...

    def whole(self, answers: Sequence[Part], usage: Usage) -> Reply:
        """Return all answers at once."""
        ...


class _Base:
    PREFIX: str

    def __init__(self, told: Told, renderer: Renderer) -> None:
        self._told, self._renderer = told, renderer
        self._head: dict[str, Any] = {
            "id": self.PREFIX + secrets.token_hex(12),
            "created": int(time.time()),
            "model": told.model,
            "knobs": dict(told.knobs),
        }
        self._chunk: dict[str, Any] = {**self._head, **({"usage": None} if told.usage else {})}

    def _projections(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if self._told.projected is None:
            return {}
        along = {name: [p.token.projections.get(name) for p in pieces] for name in self._told.projected}
        return {"projections": Projections(tokens=[p.text for p in pieces], knobs=along)}


class ChatForm(_Base):
    """`chat.completion`, and its chunks."""

    PREFIX = "chatcmpl-"

    def opening(self, count: int) -> Iterator[Reply]:
        """Say for every answer that it is the assistant's."""
        for index in range(count):
            delta = Delta(role="assistant", content="")
            yield self._event([ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)])

    def events(self, index: int, part: Part) -> Iterator[Reply]:
        """Return an event for the text, and one for the end."""
        if part.pieces:
            choice = ChunkChoice(
                index=index,
                delta=Delta(content=part.text),
                logprobs=self._logprobs(part),
                finish_reason=None,
                **self._projections(part.pieces),
            )
            yield self._event([choice])
        if part.ending:
            yield self._event([ChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=_finish(part))])

    def last(self, usage: Usage) -> Reply:
        """Return the event that holds the usage."""
        return ChatChunk(**self._head, usage=usage, object="chat.completion.chunk", choices=[])

    def whole(self, answers: Sequence[Part], usage: Usage) -> Reply:
        """Return all answers at once."""
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(role="assistant", content=part.text),
                logprobs=self._logprobs(part),
                finish_reason=_finish(part),
                **self._projections(part.pieces),
            )
            for index, part in enumerate(answers)
        ]
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=usage)

    def _event(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(**self._chunk, object="chat.completion.chunk", choices=choices)

    def _logprobs(self, part: Part) -> ChatLogprobs | None:
        if not self._told.logprobs:
            return None
        tokens = [
            LikelyToken(
                **self._likely(piece.token.id, piece.token.logprob),
                top_logprobs=[Likely(**self._likely(*pair)) for pair in piece.token.top],
            )
            for piece in part.pieces
        ]
        return ChatLogprobs(content=tokens)

    def _likely(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._renderer.token_text(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": _bounded(logprob), "bytes": list(text.encode()) if whole else None}


class TextForm(_Base):
    """`text_completion`, which is its own chunk."""

    PREFIX = "cmpl-"

    def opening(self, count: int) -> Iterator[Reply]:
        """Begin with nothing."""
        yield from ()

    def events(self, index: int, part: Part) -> Iterator[Reply]:
        """Return an event for the text, and one for the end."""
        if part.pieces:
            yield self._event([self._choice(index, part, None)])
        if part.ending:
            yield self._event([TextChoice(index=index, text="", logprobs=None, finish_reason=_finish(part))])

    def last(self, usage: Usage) -> Reply:
        """Return the event that holds the usage."""
        return TextCompletion(**self._head, usage=usage, object="text_completion", choices=[])

    def whole(self, answers: Sequence[Part], usage: Usage) -> Reply:
        """Return all answers at once."""
        choices = [self._choice(index, part, _finish(part)) for index, part in enumerate(answers)]
        return TextCompletion(**self._head, object="text_completion", choices=choices, usage=usage)

    def _event(self, choices: list[TextChoice]) -> TextCompletion:
        return TextCompletion(**self._chunk, object="text_completion", choices=choices)

    def _choice(self, index: int, part: Part, finish: Finish | None) -> TextChoice:
        return TextChoice(
            index=index,
            text=part.text,
            logprobs=self._logprobs(part),
            finish_reason=finish,
            **self._projections(part.pieces),
        )

    def _logprobs(self, part: Part) -> TextLogprobs | None:
        if not self._told.logprobs:
            return None
        told = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        offset = part.offset
        for piece in part.pieces:
            top: dict[str, float] = {}
            for token, logprob in (*piece.token.top, (piece.token.id, piece.token.logprob)):
                top.setdefault(self._renderer.token_text(token), _bounded(logprob))  # of tokens alike, the likelier
            told.tokens.append(self._renderer.token_text(piece.token.id))
            told.token_logprobs.append(_bounded(piece.token.logprob))
            told.top_logprobs.append(top)
            told.text_offset.append(offset)
            offset += len(piece.text)
        return told


def _finish(part: Part) -> Finish:
    assert part.ending in ("stop", "length")
    return part.ending


def _bounded(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > LEAST else LEAST  # also for what is no number
