"""The data of a reproduction: pairs to learn from, to choose with and to test with, and the questions of tasks."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from trimtab.errors import OptionError, PairsError
from trimtab.evals.tasks import Task
from trimtab.pairs import Pairs
from trimtab.prefworld import world

Split = Literal["validation", "test"]
WORLD = "prefworld:"


def training_pairs(source: str, n: int, *, seed: int, data_seed: int) -> Pairs:
    """Draw `n` pairs to learn from: another seed draws others; fewer where the file has no more."""
    if source.startswith(WORLD):
        return world.pairs(source.removeprefix(WORLD), n, seed=seed)
    train = _parts(source, data_seed)["train"]
    return train.take(min(n, len(train)), seed=seed)


def held_out_pairs(source: str, split: Split, n: int, *, data_seed: int) -> Pairs:
    """Draw `n` pairs whose prompts no training pair has, nor a pair of the other split."""
    if source.startswith(WORLD):
        return world.pairs(source.removeprefix(WORLD), n, split=split, seed=data_seed)
    part = _parts(source, data_seed)[split]
    return part[: min(n, len(part))]


def questions(source: str, split: Split, n: int, *, data_seed: int) -> Task:
    """Draw `n` questions of a task; no question is in both splits."""
    return world.task(source.removeprefix(WORLD), split, n, seed=data_seed)


@lru_cache(maxsize=8)
def _parts(source: str, data_seed: int) -> dict[str, Pairs]:
    """Split a file's pairs by prompt: three fifths to learn from, a fifth to choose with, a fifth to test with."""
    try:
        pairs = Pairs.load(source, duplicates="drop")
        rest, test = pairs.split(0.2, seed=data_seed)
        train, validation = rest.split(0.25, seed=data_seed)
    except (OSError, PairsError) as error:
        raise OptionError(f"The recipe's pairs {source!r}: {error}") from None
    return {"train": train, "validation": validation, "test": test}
