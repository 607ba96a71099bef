"""One question of the world, its answers per side, and the split it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Literal, TypeVar

Split = Literal["train", "validation", "test"]
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A question with one answer drawn for each side of the trait that decides it.

    `answers` maps side to text; its first side is the one that a preference pair calls chosen. `truth` holds what the
    family's grader needs. `trait` is empty for guardrails, which have one side only. `values` are the numbers and words
    that fill the wording, where a family has so many that some can be kept from training altogether; empty where they
    are what the model has to know (a country, a statement, a topic).
    """

    family: str
    prompt: str
    answers: Mapping[str, str]
    trait: str = ""
    truth: Mapping[str, object] = field(default_factory=dict[str, object])
    values: str = ""

    @property
    def split(self) -> Split:
        """The split of the item's values, in whatever wording; without values, of its prompt."""
        return split_of(self.values or self.prompt)


def split_of(key: str) -> Split:
    """Assign a key to a split: 8 in 10 train, 1 validation, 1 test.

    The hash does not depend on the process, so what was trained on can never be drawn for a test.
    """
    digit = hashlib.sha256(key.encode()).digest()[0] % 10
    return "validation" if digit == 8 else "test" if digit == 9 else "train"


def capitalised(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


def templates(*grids: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Write out every combination of the parts of each grid, in an order drawn once and for all.

    The combinations that a `Draw` keeps back are then new wordings made of words that other wordings use.
    """
    made = ["".join(parts) for grid in grids for parts in product(*grid)]
    Random(0).shuffle(made)
    return tuple(capitalised(text) for text in made)


LEADS = (
    "Hello. ",
    "Hi there. ",
    "Quick question. ",
    "Please help. ",
    "One more thing. ",
    "I wonder about this. ",
    "Good day. ",
    "Now to something else. ",
    "Listen. ",
    "Here is what I want to know. ",
    "Excuse me. ",
    "Next: ",
)


@dataclass(frozen=True)
class Draw:
    """A source of choices that keeps some phrases back as templates that training never shows."""

    rng: Random
    unseen: bool = False

    def phrase(self, phrases: Sequence[str]) -> str:
        """Choose a wording: one of the last sixth (at least one) if `unseen`, else one of the others."""
        kept_back = max(1, len(phrases) // 6)
        return self.rng.choice(phrases[-kept_back:] if self.unseen else phrases[:-kept_back])

    def ask(self, phrases: Sequence[str]) -> str:
        """Choose a wording, half of the time with a greeting or a remark before it."""
        return ("" if self.rng.random() < 0.5 else self.any(LEADS)) + self.phrase(phrases)

    def any(self, values: Sequence[T]) -> T:
        """Choose one of `values`; values are split by the prompt's hash and not by name."""
        return self.rng.choice(values)
