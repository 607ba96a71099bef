"""From tokens to text: whole characters, stop strings, and pieces that put together are the answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from trimtab.engines.continuous.requests import Ending, Step, Token
from trimtab.render import Pieces
from trimtab.serve.answers import Answer, AnswerFailed, Part

pytestmark = pytest.mark.quick
steady = settings(deadline=None, derandomize=True, database=None)

LETTERS = st.text("ab c\u00e9\u4e2d\U0001f600\N{REPLACEMENT CHARACTER}", max_size=30)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=10)


def cut(text: str, sizes: Sequence[int]) -> list[bytes]:
    """Cut a text's bytes into tokens of these sizes, over and over."""
    return cut_bytes(text.encode(), *sizes)


def cut_bytes(data: bytes, *sizes: int) -> list[bytes]:
    tokens, i = list[bytes](), 0
    while data:
        size = sizes[i % len(sizes)]
        tokens.append(data[:size])
        data, i = data[size:], i + 1
    return tokens


def renderer(tokens: Sequence[bytes]) -> Any:
    return SimpleNamespace(decode=lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"))


def token(number: int) -> Token:
    return Token(number, None, (), {})


def parts_of(tokens: Sequence[bytes], stops: Sequence[str] = (), ending: Ending = "stop") -> list[Part]:
    """Return what an answer hands on, up to the part that ends it."""
    answer, parts = Answer(renderer(tokens), stops), list[Part]()
    for step in [*(Step(token(i)) for i in range(len(tokens))), Step(None, ending)]:
        parts.append(answer.add(step))
        if parts[-1].ending:
            break
    return parts


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Read character by character, and stop as soon as the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        met = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(met)]
    return text


@steady
@given(text=st.one_of(LETTERS, st.text(max_size=30)), sizes=CUTS)
@example(text="\N{REPLACEMENT CHARACTER}" * 20, sizes=[1])
@example(text="\N{REPLACEMENT CHARACTER}" * 20, sizes=[2, 5])
def test_pieces_together_are_the_text_however_it_is_cut_and_no_character_is_split(text: str, sizes: list[int]) -> None:
    tokens = cut(text, sizes)
    pieces = Pieces(renderer(tokens).decode)
    shown = [pieces.add([i]) for i in range(len(tokens))]
    assert "".join([*shown, pieces.end()]) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
        assert pieces.end() == ""


@steady
@given(text=st.text("ab c\u00e9\u4e2d\U0001f600", max_size=30))
def test_pieces_are_whole_characters_where_a_run_of_bytes_is_text_as_a_whole_or_not_at_all(text: str) -> None:
    core = Tokenizer(models.BPE(vocab={f"<0x{byte:02X}>": byte for byte in range(256)}, merges=[]))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = Pieces(core.decode)
    shown = [pieces.add([byte]) for byte in text.encode()]
    assert "".join(shown) == text
    assert pieces.end() == ""


def test_bytes_that_are_no_text_are_shown_and_not_collected_for_ever() -> None:
    asked: list[int] = []
    tokens = [b"\xff"] * 400 + [b"a"]

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return renderer(tokens).decode(ids)

    pieces = Pieces(decode)
    text = "".join(pieces.add([i]) for i in range(len(tokens)))
    assert text + pieces.end() == "\N{REPLACEMENT CHARACTER}" * 400 + "a"
    assert max(asked) < 40


def test_characters_are_shown_where_no_token_ends_with_one() -> None:
    text = "\u4e2d" * 200
    tokens = [text.encode()[:1], *cut_bytes(text.encode()[1:], 3)]
    pieces = Pieces(renderer(tokens).decode)
    shown = [pieces.add([i]) for i in range(len(tokens))]
    assert shown[:4] == ["", "\u4e2d", "\u4e2d", "\u4e2d"]
    assert "".join(shown) + pieces.end() == text


@steady
@given(text=LETTERS, sizes=CUTS, stops=st.lists(st.text("ab c\u00e9\u4e2d", min_size=1, max_size=4), max_size=4))
@example(text="abc", sizes=[1], stops=["abc", "b"])
@example(text="abc", sizes=[5], stops=["abc", "b"])
@example(text="aab", sizes=[1], stops=["ab"])
def test_an_answer_is_the_text_up_to_the_stop_string_that_is_complete_first(
    text: str, sizes: list[int], stops: list[str]
) -> None:
    parts = parts_of(cut(text, sizes), stops)
    assert "".join(part.text for part in parts) == before_stop(text, stops)
    assert [part.ending for part in parts] == [""] * (len(parts) - 1) + ["stop"]


@steady
@given(text=LETTERS, sizes=CUTS, stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_every_token_of_an_answer_comes_once_in_order_with_the_text_that_it_brought(
    text: str, sizes: list[int], stops: list[str]
) -> None:
    tokens = cut(text, sizes)
    parts = parts_of(tokens, stops)
    pieces = [piece for part in parts for piece in part.pieces]
    assert [piece.token.id for piece in pieces] == list(range(len(pieces)))
    if before_stop(text, stops) == text:
        assert len(pieces) == len(tokens)
    at = 0
    for part in parts:
        assert part.offset == at
        at += len(part.text)


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    shown = [part.text for part in parts_of([b"it", b" is", b" co", b"o", b"l cold", b"!"], ["cold"])]
    assert shown == ["it", " is", "", " coo", "l "]
    assert [part.text for part in parts_of([b"co", b"ld"], ["cold"])] == ["", ""]
    assert [part.text for part in parts_of([b"a", b"co"], ["cold"])] == ["a", "", "co"]


def test_a_stop_string_counts_whatever_else_would_have_ended_the_answer() -> None:
    answer = Answer(renderer([b"a", b"b"]), ["b"])
    assert answer.add(Step(token(0))).ending == ""
    last = answer.add(Step(token(1), "length"))
    assert (last.text, last.ending, answer.tokens) == ("", "stop", 2)


def test_a_character_that_is_never_completed_is_shown_at_the_end() -> None:
    parts = parts_of([b"a", b"\xf0", b"\x9f"], ending="length")
    assert "".join(part.text for part in parts) == "a\N{REPLACEMENT CHARACTER}"
    assert [piece.text for piece in parts[-1].pieces] == ["", "\N{REPLACEMENT CHARACTER}"]
    assert parts[-1].ending == "length"


def test_a_failure_of_the_engine_is_raised_with_its_words() -> None:
    answer = Answer(renderer([b"a"]), [])
    answer.add(Step(token(0)))
    with pytest.raises(AnswerFailed, match="too large"):
        answer.add(Step(None, "error", "A strength is too large."))
