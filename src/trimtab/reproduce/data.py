"""The data of a reproduction: pairs to learn from, to choose with and to test with, and the questions of tasks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from trimtab.errors import OptionError, PairsError, unknown_name
from trimtab.evals.benchmarks import BENCHMARKS, load_benchmark
from trimtab.evals.tasks import AnyTask
from trimtab.pairs import Pairs
from trimtab.prefworld import world

Split = Literal["validation", "test"]
WORLD = "prefworld:"


class Data:
    """Draws what a recipe names: parts of PrefWorld, or files below the folder `root`.

    A file's pairs are split by prompt: three fifths to learn from, a fifth to choose with, a fifth to test with.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._seed = root, seed

    def training_pairs(self, source: str, n: int, *, seed: int) -> Pairs:
        """Draw `n` pairs to learn from: another seed draws others; fewer where the file has no more."""
        if source.startswith(WORLD):
            return world.pairs(source.removeprefix(WORLD), n, seed=seed)
        train = _parts(self._root / source, self._seed)["train"]
        return train.take(min(n, len(train)), seed=seed)

    def held_out_pairs(self, source: str, split: Split, n: int) -> Pairs:
        """Draw at most `n` pairs whose prompts no training pair has, nor a pair of the other split."""
        if source.startswith(WORLD):
            return world.pairs(source.removeprefix(WORLD), n, split=split, seed=self._seed)
        return _parts(self._root / source, self._seed)[split][:n]

    def questions(self, source: str, split: Split, n: int) -> AnyTask:
        """Draw at most `n` questions of `prefworld:FAMILY` or `BENCHMARK:FILE`; none is in both splits."""
        if source.startswith(WORLD):
            return world.task(source.removeprefix(WORLD), split, n, seed=self._seed)
        name, _, file = source.partition(":")
        if name not in BENCHMARKS:
            raise unknown_name("benchmark of the recipe", name, [*BENCHMARKS, "prefworld"])
        whole = load_benchmark(name, self._root / file, split=split)
        if len(whole) <= n:
            return whole
        return load_benchmark(name, self._root / file, split=split, n=n, seed=self._seed)


@lru_cache(maxsize=8)
def _parts(path: Path, seed: int) -> dict[str, Pairs]:
    try:
        pairs = Pairs.load(path, duplicates="drop")
        rest, test = pairs.split(0.2, seed=seed)
        train, validation = rest.split(0.25, seed=seed)
    except PairsError as error:
        raise OptionError(f"The recipe's pairs: {error}") from None
    return {"train": train, "validation": validation, "test": test}


def overlap(pairs: Pairs, task: AnyTask) -> int:
    """Count the questions of a task that a pair's prompt holds: what was learned from them cannot be tested on them.

    A question is known by its first line, where that has 40 characters or more.
    """
    known = "\n".join(message.content for pair in pairs for message in pair.prompt)
    prompts = (p if isinstance(p, str) else p[-1].content for p in task.prompts)
    openings = (prompt.strip().partition("\n")[0].strip() for prompt in prompts)
    return sum(len(opening) >= 40 and opening in known for opening in openings)
