"""Tokens to text while they come: a character is handed on once all of its bytes are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no text: one for the first bytes of a character, or one for every byte
around, those of whole characters included."""
BYTES = 3
"""Bytes of a character that is not complete, at most; a token is one of them or more."""
WINDOW = 32
"""Tokens that are decoded again, where none of them ends with a character."""


class Pieces:
    """The text of one answer, piece by piece; together the pieces are the text of all its tokens.

    Only the last few tokens are decoded each time, however long the answer is. `waiting` says whether the last
    character is not complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode, self._ids = decode, list[int]()
        # Decoding starts at `_start`, a little before what is new, since tokens need their neighbours; `_out`
        # characters from there on have been handed on. `_whole` is where tokens and characters last ended together.
        self._start, self._out, self._whole = 0, 0, 0
        self.waiting = False

    def add(self, ids: Sequence[int]) -> str:
        """Return the characters that tokens have made complete."""
        self._ids += ids
        return self._next(final=False)

    def end(self) -> str:
        """Return what is left once there are no more tokens."""
        return self._next(final=True)

    def _next(self, *, final: bool) -> str:
        text = self._decode(self._ids[self._start :])
        sure = len(text) if final else len(text.rstrip(UNFINISHED))
        if len(self._ids) - self._whole > BYTES:  # what is there will never be a character, but for its last bytes
            sure = max(sure, len(text) - BYTES)
        piece, self._out = text[self._out : sure], max(self._out, sure)
        self.waiting = self._out < len(text)
        if piece and not self.waiting:
            self._move(max(self._start, self._whole), len(text))
            self._whole = len(self._ids)
        elif len(self._ids) - self._start > WINDOW:
            self._move(len(self._ids) - WINDOW // 2, len(text))
        return piece

    def _move(self, start: int, length: int) -> None:
        """Decode from another token on, with as much still to be handed on as there was."""
        left = length - self._out
        self._start = start
        self._out = max(0, len(self._decode(self._ids[start:])) - left)
