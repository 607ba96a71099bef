"""One question of the world, its answers per side, and the split it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, TypeVar

Split = Literal["train", "validation", "test"]
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A question with one answer drawn for each side of the trait that decides it.

    `answers` maps side to text; its first side is the one that a preference pair calls chosen. `truth` holds what the
    family's grader needs. `trait` is empty for guardrails, which have one side only.
    """

    family: str
    prompt: str
    answers: Mapping[str, str]
    trait: str = ""
    truth: Mapping[str, object] = field(default_factory=dict[str, object])


def split_of(prompt: str) -> Split:
    """Assign a prompt to a split by its filled-in text: 8 in 10 train, 1 validation, 1 test.

    The hash does not depend on the process, so a prompt that was trained on can never be drawn for a test.
    """
    digit = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "validation" if digit == 8 else "test" if digit == 9 else "train"


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
        """Choose a wording with a lead-in before it, which is empty half of the time."""
        return ("" if self.rng.random() < 0.5 else self.phrase(LEADS)) + self.phrase(phrases)

    def any(self, values: Sequence[T]) -> T:
        """Choose one of `values`; values are split by the prompt's hash and not by name."""
        return self.rng.choice(values)


def capitalised(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]
