"""Which texts are run together: those of like length, under a budget, and those that begin alike as one group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trimtab.texts import Text

SHORTEST_HEAD = 8
"""Tokens in common that are worth a run of their own; a chat template begins with a few that all texts share."""
LEAST_SAVED = 1 / 16
"""Share of all tokens that sharing has to save, or every text is run whole."""
UNEVEN = 7 / 8
"""A text shorter than this share of a batch's longest goes into the next batch, where this one is large enough."""
LARGE_ENOUGH = 1 / 4
"""Share of the budget that keeps a processor busy."""
AHEAD = 2000
"""Tokens that an accelerator computes while a call is launched: an H200 800 at 7 billion parameters, 2,000 at one."""
TRIAL = 3
"""Calls by which sharing is tried out."""
CUTS = (SHORTEST_HEAD, LEAST_SAVED, UNEVEN, LARGE_ENOUGH)


class Group(NamedTuple):
    """Texts whose first `head` tokens are the same, and are run once; a text of its own has none."""

    head: int
    texts: list[Text]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(text.ids) for text in self.texts)

    @property
    def tail_tokens(self) -> int:
        """Tokens that are run for each text by itself, without padding."""
        return sum(len(text.ids) - self.head for text in self.texts)


def group(texts: Iterable[Text]) -> list[Group]:
    """Put the texts together that begin alike; each for itself where that would save little."""
    alike: dict[bytes, list[Text]] = defaultdict(list)
    alone: list[Group] = []
    for text in texts:
        if text.head >= SHORTEST_HEAD:
            alike[text.ids[: text.head].tobytes()].append(text)
        else:
            alone.append(Group(0, [text]))
    groups = [Group(same[0].head, same) for same in alike.values()]  # two at least: both answers of a pair
    saved = sum(g.head * (len(g.texts) - 1) for g in groups)
    if saved < LEAST_SAVED * sum(len(text.ids) for g in (*groups, *alone) for text in g.texts):
        groups = [Group(0, [text]) for g in groups for text in g.texts]
    return [*groups, *alone]


def worth_calls(groups: Iterable[Group], budget: int) -> bool:
    """Tell whether sharing saves an accelerator more tokens than the calls cost that it takes on top."""
    batches = make_batches([g for g in groups if g.head], budget)
    whole = [sum(len(text.ids) for g in batch for text in g.texts) for batch in batches]
    calls = TRIAL + sum(1 + math.ceil(n / budget) for n in whole) - math.ceil(sum(whole) / budget)
    saved = sum(g.head * (len(g.texts) - 1) for batch in batches for g in batch)
    return saved >= AHEAD * calls


def make_batches(groups: Iterable[Group], budget: int) -> list[list[Group]]:
    """Cut groups of like length into batches, the longest first.

    Of groups with heads, these fill at most a quarter of the budget with padding, since they are kept while the tails
    are run, which are at most the budget without padding. Texts for themselves fill at most the budget with padding. A
    group that is larger than that is cut; a single text stays.
    """
    cut = [part for g in groups for part in _cut(g, budget)]
    batches: list[list[Group]] = []
    tails = 0
    for g in sorted(cut, key=lambda g: (-g.head, -g.longest)):
        batch = batches[-1] if batches else []
        first = batch[0] if batch else g
        if g.head:
            fits = (len(batch) + 1) * first.head <= budget // 4 and tails + g.tail_tokens <= budget
        else:
            fits = not first.head and _fits(len(batch), 0, first.longest, g.longest, budget)
        if batch and fits:
            batch.append(g)
            tails += g.tail_tokens
        else:
            batches.append([g])
            tails = g.tail_tokens
    return batches


def parts_of(texts: Sequence[Text], heads: Sequence[int], width: int, budget: int) -> list[list[int]]:
    """Cut the texts of a batch, by number, into parts that are run at once: `budget` tokens with those of the heads.

    `heads` counts the tokens of each text's head, and `width` those of the longest head, to which all are padded.
    """
    tails = [len(text.ids) - head for text, head in zip(texts, heads, strict=True)]
    parts: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: -tails[i]):
        if parts and _fits(len(parts[-1]), width, tails[parts[-1][0]], tails[i], budget):
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _fits(rows: int, heads: int, longest: int, tokens: int, budget: int) -> bool:
    """Tell whether a text of `tokens` behind its head belongs to `rows` others, the longest of which has `longest`."""
    uneven = tokens < UNEVEN * longest and rows * longest >= LARGE_ENOUGH * budget
    return (rows + 1) * (heads + longest) <= budget and not uneven


def smaller(batch: list[Group]) -> list[list[Group]]:
    """Cut a batch in two, between groups or within one; take a single text's head off; of a text whole nothing is left.

    A text by itself is smallest whole: behind a head there are that head's keys and values, and a copy of them.
    """
    if len(batch) > 1:
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    (only,) = batch
    if len(only.texts) == 1:
        return [[Group(0, only.texts)]] if only.head else []
    middle = len(only.texts) // 2
    return [[Group(only.head if len(part) > 1 else 0, part)] for part in (only.texts[:middle], only.texts[middle:])]


def _cut(whole: Group, most: int) -> list[Group]:
    """Cut a group whose texts have more than `most` tokens behind their head."""
    pieces: list[list[Text]] = []
    size = 0
    for text in whole.texts:
        tail = len(text.ids) - whole.head
        if pieces and size + tail <= most:
            pieces[-1].append(text)
            size += tail
        else:
            pieces.append([text])
            size = tail
    return [Group(whole.head if len(piece) > 1 else 0, piece) for piece in pieces]
