"""The records of an Alignment Vectors run as scores of test questions, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from trimtab.evals.stats import Interval
from trimtab.reproduce.alignment_recipe import LEVELS, VECTORS, Recipe, Sizes
from trimtab.reproduce.steps import Key

DRAWS = 2000
EXPERT = LEVELS.index("expert")
Record = Mapping[str, Any]


class Evidence:
    """The records of one model by kind of step."""

    def __init__(self, records: Mapping[Key, Any], recipe: Recipe, sizes: Sizes, model: str, command: str) -> None:
        self._records, self.recipe, self.sizes = records, recipe, sizes
        self.model, self.command, self.domains = model, command, list(recipe.domains)

    def of(self, kind: str, *rest: str) -> Any:
        """Return one step's record."""
        return self._records[(self.model, kind, *rest)]

    def all(self, kind: str) -> list[Any]:
        """Return the records of every step of a kind, in the order of their keys, which need not be the recipe's."""
        return [self._records[key] for key in sorted(self._records) if key[1] == kind]

    def vector_seconds(self, way: str, what: str = "seconds") -> float:
        """Return the seconds of training all that a way of turning takes; "grid_seconds" are of every rate tried."""
        return sum(self.of("vector", domain, kind)[what] for domain in self.domains for kind in VECTORS[way])

    def stages(self) -> dict[str, Any]:
        """Return the records on another fine-tuning stage by domain; none where the recipe has no sibling."""
        return {domain: self.of("stage", domain) for domain in self.domains} if self.recipe.sibling else {}

    def at(self, domain: str, strength: float) -> Record:
        """Return the row of a domain's curve at one lambda."""
        return next(row for row in self.of("sweep", domain, "plain")["rows"] if row["lambda"] == strength)


def resampled(measure: Callable[[np.ndarray], float], n: int, *, seed: int = 0) -> Interval:
    """Return `measure` of all `n` questions, with its 95 percent percentile bootstrap interval.

    `measure` takes the numbers of questions `[n]`, of which a draw repeats some. Domains have questions of their own:
    one draw of numbers serves all of them, which is as good as a draw for each.
    """
    random = np.random.default_rng(seed)
    found = [measure(random.integers(n, size=n)) for _ in range(DRAWS)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(measure(np.arange(n))), float(low), float(high))


# --- along lambda ---------------------------------------------------------------------------------------------------


def curves(rows: Sequence[Record], what: str) -> np.ndarray:
    """Return where each level is: 0 or 1 by lambda, level and question, `[lambdas, levels, n]`."""
    levels = np.array([row[what] for row in rows])  # [lambdas, n]
    return (levels[:, None, :] == np.arange(len(LEVELS))[None, :, None]).astype(float)


def handed_over(shares: np.ndarray, strengths: np.ndarray) -> bool:
    """Tell whether each level leads at its peak, by half of the questions or more, and the peaks are in order.

    `shares [lambdas, levels]`. The peak is the middle of the lambdas that share the maximum.

    >>> handed_over(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]]), np.array([-1, 0, 1]))
    True
    """
    tops = shares.max(axis=0)  # [levels]
    peaks = [float(strengths[shares[:, i] >= tops[i] - 1e-9].mean()) for i in range(len(tops))]
    return bool((tops >= 0.5).all()) and all(a < b for a, b in pairwise(peaks))


# --- combinations ---------------------------------------------------------------------------------------------------


def hits(rows: Sequence[Record], domains: Sequence[str]) -> np.ndarray:
    """Return the likeliest levels of every combination's test questions, `[combinations, domains, n]`."""
    return np.array([[row["test"][domain] for domain in domains] for row in rows])


def wanted(rows: Sequence[Record]) -> np.ndarray:
    """Return the levels that combinations ask for, `[combinations, domains]`."""
    return np.array([[LEVELS.index(level) for level in row["levels"]] for row in rows])


def reached(likeliest: np.ndarray, targets: np.ndarray, *, strict: bool) -> np.ndarray:
    """Tell of every combination whether its level leads in every domain; `strict`: and on half of the questions.

    `likeliest [combinations, domains, n]`, `targets [combinations, domains]`. A level that shares the lead has it not.
    """
    shares = (likeliest[..., None] == np.arange(len(LEVELS))).mean(axis=2)  # [combinations, domains, levels]
    own = np.take_along_axis(shares, targets[..., None], axis=2)  # [combinations, domains, 1]
    leads = (shares >= own - 1e-12).sum(axis=2) == 1
    return (leads & (own[..., 0] >= 0.5) if strict else leads).all(axis=1)


def on_target(likeliest: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the preference accuracy of the wanted level, `[combinations, domains]`."""
    return (likeliest == targets[..., None]).mean(axis=2)


# --- other domains --------------------------------------------------------------------------------------------------


def spread(record: Record, kind: str, domains: Sequence[str], at: np.ndarray | None = None) -> np.ndarray:
    """Return O[e, d]: by how much domain d's vector changes the share of expert answers in domain e."""
    found = np.zeros((len(domains), len(domains)))
    for i, e in enumerate(domains):
        base = np.array(record["base"]["test"][e]) == EXPERT
        for j, d in enumerate(domains):
            change = (np.array(record[kind][d]["test"][e]) == EXPERT).astype(float) - base
            found[i, j] = change.mean() if at is None else change[at].mean()
    return found


def apart_and_together(matrix: np.ndarray) -> tuple[float, float]:
    """Return the mean off the diagonal, and on it."""
    k = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / max(k * (k - 1), 1)), float(np.trace(matrix) / k)


# --- cost -----------------------------------------------------------------------------------------------------------


def seconds(row: Record) -> np.ndarray:
    """Return seconds of answers by question, over all rounds, `[n]`."""
    return np.array(row["answers"])[..., :2].sum(axis=2).mean(axis=0)


def equal_seconds(row: Record, vector: Record) -> np.ndarray:
    """Return what answers of the vector's lengths would take after a row's prompt, by question `[n]`.

    Seconds until the first token are as measured; each further token takes what the row's own tokens took on average.
    """
    own, other = np.array(row["answers"]), np.array(vector["answers"])  # [rounds, n, 3]
    steps = max(float((own[..., 2] - 1).sum()), 1.0)
    return (own[..., 0] + (other[..., 2] - 1) * own[..., 1].sum() / steps).mean(axis=0)
