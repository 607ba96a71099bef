"""The records of a COLD-Steer run as scores of questions by seed, and effects with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.evals.stats import Interval, bootstrap_runs
from trimtab.reproduce.cold_recipe import Recipe, Sizes
from trimtab.reproduce.steps import Key

DRAWS = 4000
Matrix = np.ndarray


class Evidence:
    """The records of one model by kind of step; scores are `[seeds, questions]`."""

    def __init__(self, records: Mapping[Key, Any], recipe: Recipe, sizes: Sizes, model: str, command: str) -> None:
        self._records, self.recipe, self.sizes = records, recipe, sizes
        self.model, self.command = model, command
        self.curved = list(recipe.behaviours)[: sizes.curves]

    def of(self, kind: str, *rest: object) -> Any:
        """Return one step's record."""
        return self._records[(self.model, kind, *map(str, rest))]

    def seeds(self, kind: str, *rest: object) -> list[Any]:
        """Return the records of all seeds."""
        return [self.of(kind, *rest, seed) for seed in range(self.sizes.seeds)]

    def behaviour(self, name: str, system: str, n: int, what: str = "probability") -> Matrix:
        """Return the scores of a system's test questions; "base" is the model as it is, one run."""
        if system == "base":
            return np.array([self.of("base")["test"][name][what]])
        return np.array([record["test"][what] for record in self.seeds("behaviour", name, system, n)])

    def chosen(self, name: str, system: str, n: int) -> list[dict[str, Any]]:
        """Return what validation chose, seed by seed; empty where a system was refused."""
        return [record.get("chosen", {}) for record in self.seeds("behaviour", name, system, n)]

    def validated(self, system: str, n: int) -> float:
        """Return the mean validation score of what was chosen, over the behaviours with curves."""
        rows = [row for name in self.curved for row in self.chosen(name, system, n)]
        return float(np.mean([row.get("score", 0.5) for row in rows]))

    def gain(self, system: str, n: int, over: str = "base", names: Sequence[str] = ()) -> Interval:
        """Return by how much the matching letter becomes likelier, averaged over behaviours."""
        groups = [
            (self.behaviour(name, over, n), self.behaviour(name, system, n)) for name in names or self.recipe.behaviours
        ]
        return bootstrap_runs(groups)

    def share(self, few: str, n: int, many: str, of: int) -> Interval:
        """Return the effect of `few` from n pairs over that of `many` from `of`; to read where the latter is large."""
        (a, draws_a), (b, draws_b) = self._effects(few, n, many, of)
        ratio = draws_a / np.where(np.abs(draws_b) < 1e-9, np.nan, draws_b)
        if abs(b) < 1e-9 or np.isnan(ratio).all():
            return Interval(0.0, 0.0, 0.0)
        low, high = np.nanquantile(ratio, [0.025, 0.975])
        return Interval(a / b, float(low), float(high))

    def surplus(self, few: str, n: int, many: str, of: int, share: float) -> Interval:
        """Return by how much the effect of `few` from n pairs exceeds that share of the effect of `many` from `of`."""
        (a, draws_a), (b, draws_b) = self._effects(few, n, many, of)
        low, high = np.quantile(draws_a - share * draws_b, [0.025, 0.975])
        return Interval(a - share * b, float(low), float(high))

    def _effects(self, few: str, n: int, many: str, of: int) -> list[tuple[float, Matrix]]:
        """Return both effects, averaged over the behaviours with curves, and their bootstrap draws.

        Questions are resampled together for both, seeds apart.
        """
        random, draws, points = np.random.default_rng(0), np.zeros((2, DRAWS)), np.zeros(2)
        for name in self.curved:
            bare = self.behaviour(name, "base", 0)[0]
            items = random.integers(len(bare), size=(DRAWS, len(bare)))
            for side, (system, count) in enumerate(((few, n), (many, of))):
                effects = self.behaviour(name, system, count) - bare
                runs = random.integers(len(effects), size=(DRAWS, len(effects)))
                by_item = np.stack([effects[row].mean(axis=0) for row in runs])  # [draws, questions]
                draws[side] += np.take_along_axis(by_item, items, axis=1).mean(axis=1) / len(self.curved)
                points[side] += effects.mean() / len(self.curved)
        return [(float(points[side]), draws[side]) for side in (0, 1)]

    def written(self, name: str, system: str) -> Matrix:
        """Return 0 or 1 by test prompt: whether the answer is on the target side."""
        records = [self.of("writing", name, "base", 0)] if system == "base" else self.seeds("writing", name, system)
        return np.array([record["test"]["on_side"] for record in records])

    def opinions(self, group: str, system: str, of: str, what: str = "kl") -> Matrix:
        """Return the distance of a system turned to `group` from the answers of the group `of`."""
        if system == "base":
            return np.array([self.of("opinions", "everybody", "base", 0)["test"][what][of]])
        return np.array([record["test"][what][of] for record in self.seeds("opinions", group, system)])


def fall(before: Sequence[Matrix], after: Sequence[Matrix]) -> Interval:
    """Return by how much a distance falls, over groups that are asked the same questions."""
    return bootstrap_runs([(now, then) for then, now in zip(before, after, strict=True)])
