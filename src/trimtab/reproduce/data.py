"""The data of a reproduction: pairs to learn from, to choose with and to test with, and the questions of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from trimtab.errors import OptionError, PairsError, unknown_name
from trimtab.evals.benchmarks import BENCHMARKS, load_benchmark
from trimtab.evals.tasks import AnyTask, Task
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.reproduce.recipe import Domain
from trimtab.types import Pair

Split = Literal["validation", "test"]
WORLD = "prefworld:"


class Data:
    """Draws what a recipe names: parts of PrefWorld, or files below the folder `root`.

    A file's pairs are split by prompt: three fifths to learn from, a fifth to choose with, a fifth to test with.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._seed = root, seed

    def training_pairs(self, source: str, n: int, *, seed: int) -> Pairs:
        """Draw `n` pairs to learn from: another seed draws others."""
        if source.startswith(WORLD):
            return world.pairs(source.removeprefix(WORLD), n, seed=seed)
        train = _parts(self._root / source, self._seed)["train"]
        if n > len(train):
            raise OptionError(
                f"The recipe learns from {n} pairs of {source!r}, and the file leaves {len(train)} for that, three in "
                "five. Add pairs, or lower pairs, many_pairs and counts in the recipe's [sizes]."
            )
        return train.take(n, seed=seed)

    def training_questions(self, source: str, n: int, *, seed: int) -> Task:
        """Draw `n` questions to train on by their grader; raises `PairsError` for benchmarks, which spare none."""
        if not source.startswith(WORLD):
            raise PairsError(f"{source!r} has questions to choose and to test with, and none to train on.")
        return world.task(source.removeprefix(WORLD), "train", n, seed=seed)

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


def check_sources(guardrails: Iterable[str], domains: Iterable[Domain], most: int, data: Data) -> None:
    """Raise for a source that is not known, or that holds fewer pairs than the `most` that are learned from."""
    for source in guardrails:
        data.questions(source, "test", 1)
    for domain in domains:
        data.questions(domain.task, "test", 1)
        data.training_pairs(domain.pairs, 1 if domain.pairs.startswith(WORLD) else most, seed=0)


@lru_cache(maxsize=8)
def _parts(path: Path, seed: int) -> dict[str, Pairs]:
    try:
        pairs = Pairs.load(path, duplicates="drop")
        rest, test = pairs.split(0.2, seed=seed)
        train, validation = rest.split(0.25, seed=seed)
    except PairsError as error:
        raise OptionError(f"The recipe's pairs: {error}") from None
    return {"train": train, "validation": validation, "test": test}


def overlap(pairs: Iterable[Pair], task: AnyTask) -> int:
    """Count the questions of a task that a pair asks too: what was learned from them cannot be tested on them.

    Spaces do not count, nor do lines with which all questions begin or end, as a benchmark's instruction does. A
    question that stands within a longer prompt counts from 40 characters on.
    """
    asked = [_lines(p if isinstance(p, str) else p[-1].content) for p in task.prompts]
    start, end = _alike(asked), _alike([lines[::-1] for lines in asked])
    learned = [_lines(message.content) for pair in pairs for message in pair.prompt]
    known = {" ".join(lines) for lines in learned}
    alone = known | {" ".join(lines[start : len(lines) - end]) for lines in learned}
    together = "\n".join(sorted(known))
    bare = [" ".join(lines[start : len(lines) - end]) for lines in asked]
    return sum(bool(q) and (q in alone or (len(q) >= 40 and q in together)) for q in bare)


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def _alike(texts: Sequence[Sequence[str]]) -> int:
    """Return how many lines all of several texts begin with."""
    first, *others = texts or [()]
    same = [all(line in other[i : i + 1] for other in others) for i, line in enumerate(first)]
    return same.index(False) if others and not all(same) else 0
