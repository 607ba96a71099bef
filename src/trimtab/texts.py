"""What is run for each pair and which of its tokens are read: formats, positions by name, rendered texts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal, NamedTuple, cast, get_args

from trimtab.errors import OptionError, PairsError, brief, unknown_name
from trimtab.losses import Loss
from trimtab.pairs import Pairs
from trimtab.render import Rendered, Renderer

Format = Literal["response_as_user", "question_response"]
"""How an answer is read: alone in the user's slot (PaLRS), or as the assistant's turn after its prompt."""

FORMATS: tuple[Format, ...] = get_args(Format)
POSITIONS = ("post_instruction", "response_end", "demonstrated", "last", "response_mean")


def read_positions(positions: Sequence[str] | str) -> tuple[str, ...]:
    """Return positions as a tuple of names; one may stand by itself. Raises `OptionError` for what is no name.

    >>> read_positions("last")
    ('last',)
    """
    names = cast(object, (positions,) if isinstance(positions, str) else positions)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in cast(Sequence[object], names)):
        raise OptionError(f"Positions are names, as in ['last', 'response_mean']; got {brief(positions)}.")
    return tuple(cast(Sequence[str], names))


def expand_positions(renderer: Renderer, positions: Sequence[str] | str, format: Format) -> tuple[str, ...]:
    """Write out positions without an index token by token, and check that each exists in this format and template.

    `("post_instruction",)` becomes `("post_instruction[-2]", "post_instruction[-1]")` where two tokens follow the slot.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    names: list[str] = []
    for position in read_positions(positions):
        group, bracket, _ = position.partition("[")
        if group not in POSITIONS:
            raise unknown_name("position", position, POSITIONS)
        if group not in ("post_instruction", "response_end"):
            if bracket:
                raise OptionError(f"Position {group!r} is one place and takes no index; got {position!r}.")
            names.append(group)
            continue
        count = _token_count(renderer, group, format)
        known = [f"{group}[-{k}]" for k in range(count, 0, -1)]
        if not bracket:
            names += known
        elif position in known:
            names.append(position)
        else:
            raise unknown_name("position", position, known)
    if not names:
        raise OptionError(f"There are no positions to read. Known: {', '.join(sorted(POSITIONS))}.")
    return tuple(dict.fromkeys(names))


def _token_count(renderer: Renderer, group: str, format: Format) -> int:
    if not renderer.has_template:
        raise OptionError(
            f"{group} tokens are those of a chat template, and this tokenizer has none. Use position 'last' or "
            "'response_mean' with format='question_response'."
        )
    if group == "post_instruction":
        if format != "response_as_user":
            raise OptionError(
                "post_instruction tokens come before the answer in format 'question_response', so they are the same "
                "for chosen and rejected. Use format='response_as_user', or position 'response_end', 'last' or "
                "'response_mean'."
            )
        return renderer.post_instruction_count()
    if format != "question_response":
        raise OptionError(
            "response_end tokens close the assistant's turn, and format 'response_as_user' has none. "
            "Use format='question_response', or position 'post_instruction'."
        )
    count = renderer.closing_count()
    if not count:
        raise OptionError("This tokenizer's template puts no token after an answer. Use position 'last'.")
    return count


class Text(NamedTuple):
    """Ids to run for one answer of a pair, and the tokens of them that are kept."""

    side: int  # 0 chosen, 1 rejected
    pair: int
    ids: array[int]
    reads: dict[int, slice]  # index of a position: the tokens whose mean is kept
    norms: slice = slice(0, 0)  # the tokens whose norms count; never the first of a sequence, which is a prompt's
    head: int = 0  # the tokens before anything that is read which the pair's other answer has too


def render_pairs(renderer: Renderer, pairs: Pairs, names: Sequence[str], format: Format) -> list[Text]:
    """Render the answers of every pair for the positions, each text with its reads; norms are read once per answer."""
    texts: list[Text] = []
    questions = _other_questions(pairs) if "demonstrated" in names else []
    for n, pair in enumerate(pairs):
        sides: list[list[Text]] = []
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            full = renderer.full(pair.prompt, answer)
            span = slice(full.response_start, full.response_end)
            reads = _reads(full, names) if format == "question_response" else {}
            own = [Text(side, n, array("i", full.ids), reads, span)]
            if format == "response_as_user" and set(names) != {"demonstrated"}:
                alone = renderer.as_user(answer)
                own.append(Text(side, n, array("i", alone.ids), _reads(alone, names)))
            if questions:
                ids = array("i", renderer.demonstrated(pair.prompt, answer, questions[n]))
                own.append(Text(side, n, ids, {names.index("demonstrated"): slice(len(ids) - 1, len(ids))}))
            sides.append(own)
        for chosen, rejected in zip(*sides, strict=True):
            head = _head(chosen, rejected)
            texts += [chosen._replace(head=head), rejected._replace(head=head)]
    return texts


def _head(one: Text, other: Text) -> int:
    """Count the tokens that two texts begin with alike, up to the first that is read in either."""
    starts = [s.start for text in (one, other) for s in (*text.reads.values(), text.norms) if s.stop]
    alike = takewhile(lambda ids: ids[0] == ids[1], zip(one.ids, other.ids, strict=False))
    return min(*starts, sum(1 for _ in alike))


def _reads(text: Rendered, names: Sequence[str]) -> dict[int, slice]:
    reads: dict[int, slice] = {}
    for p, name in enumerate(names):
        if name == "last":
            reads[p] = slice(text.response_end - 1, text.response_end)
        elif name == "response_mean":
            reads[p] = slice(text.response_start, text.response_end)
        elif name != "demonstrated":
            at = len(text.ids) + int(name[name.index("[") + 1 : -1])
            reads[p] = slice(at, at + 1)
    return reads


class Answer(NamedTuple):
    """A rendered prompt with an answer: `ids`, of which `start` and later belong to the answer."""

    ids: list[int]
    start: int
    side: int
    pair: int


class Item(NamedTuple):
    """The answers of one pair that a loss looks at, and what it wants of each."""

    pair: int
    texts: list[Answer]
    shares: tuple[float, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(text.ids) for text in self.texts)


def render_items(renderer: Renderer, pairs: Pairs, loss: Loss) -> list[Item]:
    """Render the answers of every pair that a loss looks at, with the tokens that count for it."""
    items: list[Item] = []
    for n, pair in enumerate(pairs):
        texts: list[Answer] = []
        for side, answer in enumerate(loss.texts(pair, n + 1)):
            full = renderer.full(pair.prompt, answer)
            ids = full.ids if loss.closing else full.ids[: full.response_end]
            texts.append(Answer(ids, full.response_start, side, n))
        items.append(Item(n, texts, loss.shares(pair, n + 1)))
    return items


def _other_questions(pairs: Pairs) -> list[str]:
    """Return for each pair the question of the next pair, around the end, that asks something else."""
    asked = [pair.prompt[-1].content for pair in pairs]
    if len(set(asked)) < 2:
        raise PairsError("Position 'demonstrated' asks another pair's question, and these pairs ask only one.")
    others: list[str] = []
    for n, question in enumerate(asked):
        others.append(next(other for other in (*asked[n + 1 :], *asked[:n]) if other != question))
    return others


def check_context(limit: int | None, texts: Sequence[Text] | Sequence[Answer]) -> None:
    """Raise `PairsError` where a text is longer than the model's context of `limit` tokens."""
    longest = max(texts, key=lambda text: len(text.ids))
    if limit is not None and len(longest.ids) > limit:
        answer = ("chosen", "rejected")[longest.side] if longest.side < 2 else f"option {longest.side + 1} as"
        long = len({text.pair for text in texts if len(text.ids) > limit})
        raise PairsError(
            f"Pair {longest.pair + 1} is {len(longest.ids)} tokens long when rendered with its {answer} answer; this "
            f"model's context holds {limit}. Leave long pairs out ({long} of {texts[-1].pair + 1})."
        )
