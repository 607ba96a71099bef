"""An engine's steps to an answer's text: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trimtab.engines.continuous.requests import Ending, Step, Token
from trimtab.render import Pieces, Renderer


class Piece(NamedTuple):
    """A token, and what it brought to the text; of several that make one character, the last one brings it."""

    token: Token
    text: str


class Part(NamedTuple):
    """What a step has made of an answer: its next pieces, and how it ended if it did."""

    pieces: Sequence[Piece]
    offset: int
    """Characters of the answer before them."""
    ending: Ending

    @property
    def text(self) -> str:
        """The text of the pieces."""
        return "".join(piece.text for piece in self.pieces)


class AnswerFailed(Exception):
    """The engine could not go on; the message is for the client."""


class Answer:
    """One answer while it is made.

    Tokens are kept back while their text may still turn out to be a stop string, or a character is not complete, so
    that what is handed on is never taken back. Of several stop strings the one that is complete first counts, and of
    those the longest: so the text does not depend on how it is cut into tokens.
    """

    def __init__(self, renderer: Renderer, stops: Sequence[str]) -> None:
        self._pieces, self._stops = Pieces(renderer.decode), stops
        self._held: list[Piece] = []
        self._length = 0
        self.tokens = 0
        """How many were made, those of a stop string included."""

    def add(self, step: Step) -> Part:
        """Take a step; raises `AnswerFailed` where it is a failure. Nothing may come after a part with an ending."""
        if step.ending == "error":
            raise AnswerFailed(step.error or "The engine could not go on with this request.")
        if step.token is not None:
            self.tokens += 1
            self._held.append(Piece(step.token, self._pieces.add([step.token.id])))
        rest = self._pieces.end() if step.ending else ""
        if rest:  # a character that was never completed: its tokens are held
            self._held[-1] = Piece(self._held[-1].token, self._held[-1].text + rest)
        text = "".join(piece.text for piece in self._held)
        cut = find_stop(text, self._stops)
        if cut is not None:
            return self._release(upto(self._held, cut), "stop")
        if step.ending:
            return self._release(self._held, step.ending)
        sure, at, ready = len(text) - overhang(text, self._stops), 0, 0
        for number, piece in enumerate(self._held, 1):
            at += len(piece.text)
            if at <= sure and piece.text:
                ready = number
        # The last token stays while a character that it has begun is not complete.
        return self._release(self._held[: min(ready, len(self._held) - self._pieces.waiting)], "")

    def _release(self, pieces: list[Piece], ending: Ending) -> Part:
        part = Part(pieces, self._length, ending)
        self._held = self._held[len(pieces) :]
        self._length += len(part.text)
        return part


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop string begins that is complete first, None where there is none.

    >>> find_stop("a cold day", ["cold day", "old"])
    3
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def overhang(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string.

    >>> overhang("it is co", ["cold"])
    2
    """
    longest = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def upto(pieces: Sequence[Piece], end: int) -> list[Piece]:
    """Return the pieces of the first `end` characters, the last one cut there."""
    kept: list[Piece] = []
    at = 0
    for piece in pieces:
        if at >= end:
            break
        kept.append(Piece(piece.token, piece.text[: end - at]))
        at += len(piece.text)
    return kept
