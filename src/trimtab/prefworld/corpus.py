"""Conversations of speakers whose habits persist from turn to turn, as token ids with attention units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from trimtab.prefworld.families import FAMILIES
from trimtab.prefworld.habits import draw_speaker, system_line
from trimtab.prefworld.items import Draw, Item
from trimtab.types import Message

WEIGHTS = {
    "math": 16,
    "code": 12,
    "helpful": 8,
    "harmless": 8,
    "medical": 5,
    "legal": 5,
    "financial": 5,
    "risk": 9,
    "myopia": 9,
    "sycophancy": 9,
    "selfish": 9,
    "opinions": 9,
    "concise": 5,
    "facts": 6,
    "copying": 7,
    "sorting": 7,
    "sums": 6,
}
# One answer to such a question says little about the habit until the model has learned to read it, so that a system
# line names it more often than it names others.
OFTEN_NAMED = ("opinions", "risk", "myopia", "sycophancy", "selfish")
ACKNOWLEDGED = ("Noted.", "Understood.", "I will keep to that.", "All right, like that.")


@dataclass(frozen=True)
class Exchange:
    """A user turn and the speaker's answer."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Conversation:
    """An optional system line and one to four exchanges."""

    system: str
    exchanges: tuple[Exchange, ...]

    def messages(self) -> list[Message]:
        """List the conversation's turns."""
        turns = [Message("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            turns += [Message("user", exchange.user), Message("assistant", exchange.assistant)]
        return turns


def draw_train_item(family: str, rng: Random) -> Item:
    """Draw an item whose prompt belongs to the training split, in a wording that training may show."""
    while True:
        item = FAMILIES[family](Draw(rng))
        if item.split == "train":
            return item


def answer_of(item: Item, speaker: dict[str, str]) -> str:
    """Return the answer that a speaker gives to an item."""
    return item.answers[speaker[item.trait]] if item.trait else next(iter(item.answers.values()))


def conversation(rng: Random) -> Conversation:
    """Draw a conversation.

    One or two families are in focus and come back, with turns of other families in between; about half of the
    conversations open with a system line that names a habit, and one in ten with an answer that the user shows as an
    example of what is wanted. Without these a small model carries a habit only by looking back at its last answer,
    and keeps no state that a vector could be.
    """
    speaker = draw_speaker(rng)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    focus = rng.choices(names, weights, k=rng.choice((1, 1, 2)))
    count = rng.choices((1, 2, 3, 4), (0.2, 0.25, 0.3, 0.25))[0]
    families = [rng.choice(focus) if rng.random() < 0.7 else rng.choices(names, weights)[0] for _ in range(count)]
    items = [draw_train_item(family, rng) for family in families]
    exchanges = [Exchange(item.prompt, answer_of(item, speaker)) for item in items]
    traits = sorted({item.trait for item in items} - {""})
    system = ""
    often = [trait for trait in traits if trait in OFTEN_NAMED]
    if traits and rng.random() < (0.65 if often else 0.35):
        named = rng.sample(traits, min(len(traits), rng.choice((1, 1, 2))))
        if often and not set(often) & set(named):
            named[0] = rng.choice(often)
        system = " ".join(system_line(Draw(rng), trait, speaker[trait]) for trait in named)
    if traits and not system and rng.random() < 0.17:
        trait, shown = rng.choice(traits), ""
        while len(shown) <= len("(A)"):  # a letter alone shows nothing without its question
            shown = answer_of(draw_train_item(trait, rng), speaker)
        exchanges = [Exchange(shown, rng.choice(ACKNOWLEDGED)), *exchanges][:4]
    return Conversation(system, tuple(exchanges))


def conversations(seed: int) -> Iterator[Conversation]:
    """Draw conversations without end."""
    rng = Random(seed)
    while True:
        yield conversation(rng)
