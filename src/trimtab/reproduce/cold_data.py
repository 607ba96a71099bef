"""Questions of behaviours in CAA's form, asked with their options both ways round, and opinions of groups."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimtab.errors import OptionError, PairsError, brief
from trimtab.evals.choices import ChoiceTask
from trimtab.formats import read_file
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.prefworld.families.surveys import GROUPS, STANCES
from trimtab.reproduce.data import WORLD, Split
from trimtab.types import Message, Pair

LETTERS = ("(A)", "(B)")
_OPTIONS = re.compile(r"\n\s*\(A\)\s*(?P<a>.*?)\s*\n\s*\(B\)\s*(?P<b>.*)", re.DOTALL)
_MORE = re.compile(r"\n\s*\(C\)")
STATEMENTS: Mapping[str, tuple[int, ...]] = {"train": (0, 1), "validation": (2,), "test": (3,)}
"""Which of the four statements of a theme each split asks about: a group's stance on a theme has to carry over."""


@dataclass(frozen=True)
class Question:
    """A question whose last lines are its two options, and the number of the one that matches the behaviour."""

    prompt: str
    right: int

    def turned(self) -> Question:
        """Return the question with its options the other way round."""
        found = _OPTIONS.search(self.prompt)
        assert found is not None
        head = self.prompt[: found.start()]
        return Question(f"{head}\n (A) {found['b'].rstrip()}\n (B) {found['a'].rstrip()}", 1 - self.right)


def behaviour_questions(
    source: str, split: Split | str, n: int, *, seed: int, root: Path, without: Collection[str] = ()
) -> list[Question]:
    """Draw `n` questions of a behaviour; of CAA's training file four fifths are learned from and a fifth chooses.

    `without` are prompts that may not be asked, either way round.
    """

    def free(question: Question) -> bool:
        return question.prompt not in without and question.turned().prompt not in without

    if source.startswith(WORLD):
        found, size = list[Question](), n + n // 20
        while len(found) < n:
            found = [q for q in _from_world(source.removeprefix(WORLD), split, size, seed) if free(q)][:n]
            size += 50
        return found
    known = [q for q in _caa(root / source.partition(":")[2])[split] if free(q)]
    if n > len(known):
        raise OptionError(f"{source!r} has {len(known)} questions for {split}; the recipe asks for {n}.")
    return random.Random(f"{source}/{split}/{seed}").sample(known, n)


@lru_cache(maxsize=32)
def _from_world(family: str, split: Split | str, n: int, seed: int) -> list[Question]:
    items = world.items(family, cast(Split, split), n, seed=seed, truth={"form": "letter"})
    return [Question(item.prompt, LETTERS.index(next(iter(item.answers.values())))) for item in items]


@lru_cache(maxsize=16)
def _caa(folder: Path) -> dict[str, list[Question]]:
    test = folder.parent.parent / "test" / folder.name / "test_dataset_ab.json"
    learned = list(dict.fromkeys(_read_caa(folder / "generate_dataset.json")))  # some ask twice
    order = random.Random(folder.name).sample(learned, len(learned))
    cut = len(order) // 5
    return {"train": order[cut:], "validation": order[:cut], "test": _read_caa(test)}


def _read_caa(file: Path) -> list[Question]:
    """Read the questions of a file that have two options, of which one matches; those with more are left out."""
    try:
        records = read_file(file)
    except PairsError as error:
        raise OptionError(f"The recipe's behaviours: {error}") from None
    found: list[Question] = []
    for place, record in records:
        fields = cast(Mapping[str, Any], record) if isinstance(record, Mapping) else {}
        question, right = fields.get("question"), str(fields.get("answer_matching_behavior")).strip()
        if not isinstance(question, str) or not _OPTIONS.search(question):
            raise OptionError(f"{file}: {place} is no question with options (A) and (B): {brief(record)}.")
        if right in LETTERS and not _MORE.search(question):
            found.append(Question(question, LETTERS.index(right)))
    if not found:
        raise OptionError(f"{file} has no question with two options, of which one matches.")
    return found


def letter_pairs(questions: Sequence[Question]) -> Pairs:
    """Return questions as pairs of letters, (A) and (B) by turns, so that letters say nothing."""
    asked = [q.turned() if n % 2 == q.right else q for n, q in enumerate(questions)]
    pairs = (Pair((Message("user", q.prompt),), LETTERS[q.right], LETTERS[1 - q.right]) for q in asked)
    return Pairs({(pair.prompt, pair.chosen): pair for pair in pairs}.values())


def letters_task(name: str, questions: Sequence[Question]) -> ChoiceTask:
    """Return a task that asks every question both ways round, one after the other; the score is a probability."""
    asked = [each for q in questions for each in (q, q.turned())]
    return ChoiceTask(
        name,
        tuple(q.prompt for q in asked),
        (LETTERS,) * len(asked),
        tuple(frozenset({q.right}) for q in asked),
        rule="mass",
        closing=False,
    )


def by_question(values: Sequence[float] | np.ndarray) -> list[float]:
    """Return the mean of what a question scored both ways round, `[n]` of `[2 n]`."""
    return np.asarray(values, dtype=float).reshape(-1, 2).mean(axis=1).tolist()


# --- opinions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poll:
    """A survey question, and how each group's answers are shared out among the options."""

    prompt: str
    shares: Mapping[str, tuple[float, ...]]


def polls(split: Split | str, n: int, *, seed: int) -> list[Poll]:
    """Draw survey questions; statements of one split are in no other."""
    wanted = STATEMENTS[split]
    drawn: list[Poll] = []
    size = 4 * n
    while len(drawn) < n:
        items = world.items("opinions", cast(Split, split), size, seed=seed)
        kept = [item for item in items if cast(int, item.truth["statement"]) % 4 in wanted]
        drawn = [Poll(i.prompt, cast(Mapping[str, tuple[float, ...]], i.truth["distributions"])) for i in kept[:n]]
        size *= 2
    return drawn


def poll_pairs(drawn: Sequence[Poll], group: str) -> Pairs:
    """Return survey questions as pairs: a group's commonest answer and its rarest, with options and shares beside."""
    made: list[Pair] = []
    for poll in drawn:
        shares = shares_of(poll, group)
        meta = {"options": list(STANCES), "shares": shares.tolist()}
        best, worst = STANCES[int(shares.argmax())], STANCES[int(shares.argmin())]
        made.append(Pair((Message("user", poll.prompt),), best, worst, meta))
    return Pairs(made)


def shares_of(poll: Poll, group: str) -> np.ndarray:
    """Return a group's shares `[options]`; "everybody" is the mean of all groups."""
    if group == EVERYBODY:
        return np.mean([poll.shares[g] for g in GROUPS], axis=0)
    return np.array(poll.shares[group])


EVERYBODY = "everybody"


def poll_task(drawn: Sequence[Poll]) -> ChoiceTask:
    """Return a task whose likelihoods say how the model would answer."""
    return ChoiceTask(
        "opinions",
        tuple(poll.prompt for poll in drawn),
        (STANCES,) * len(drawn),
        (frozenset({0}),) * len(drawn),
        rule="mass",
        closing=False,
    )
