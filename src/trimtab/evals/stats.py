"""Intervals for scores: paired bootstrap, bootstrap of a mean, Wilson.

Conventions: a score is a number per item, larger is better; a difference is the second argument minus the first; two
systems are compared on the same items in the same order; intervals are two-sided. The same arguments give the same
interval, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.errors import OptionError

Scores = Sequence[float] | npt.NDArray[np.floating] | npt.NDArray[np.integer] | npt.NDArray[np.bool_]

CHUNK = 1 << 22
"""Resampled indices held at once: 32 MB, however many draws and items."""


class Interval(NamedTuple):
    """A point estimate with the ends of its interval."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(a: Scores, b: Scores, *, draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the mean of `b - a` over items `[N]` with its percentile bootstrap interval.

    Items are resampled with replacement and keep their pairing (Efron and Tibshirani 1993, chapters 13 and 16). It
    covers the choice of items, not that of seeds or pairs. It is too narrow where few items differ: in simulation 95
    percent is 93 to 94 at N = 20 to 100 with normal differences, and 76 at N = 20 where one item in eight changes.

    >>> paired_bootstrap([0, 0, 1, 0], [1, 1, 1, 1]).estimate
    0.75
    """
    first, second = _scores(a, "a"), _scores(b, "b")
    if first.shape != second.shape:
        raise OptionError(f"Paired scores must be of the same items; got {first.size} and {second.size}.")
    if draws < 100:
        raise OptionError(f"The bootstrap needs at least 100 draws; got {draws!r}.")
    tail = (1 - _level(level)) / 2
    difference = second - first  # [N]
    random, count = np.random.default_rng(seed), difference.size
    rows = max(1, CHUNK // count)
    means = np.concatenate(
        [
            difference[random.integers(count, size=(min(rows, draws - start), count))].mean(axis=1)
            for start in range(0, draws, rows)
        ]
    )  # [draws]
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(difference.mean()), float(low), float(high))


def bootstrap_mean(values: Scores, *, draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the mean of the items' values `[N]` with its percentile bootstrap interval."""
    return paired_bootstrap(np.zeros(len(values)), values, draws=draws, seed=seed, level=level)


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Return the share of successes with Wilson's score interval (Wilson 1927), right for small n and at 0 and 1.

    >>> [round(end, 4) for end in wilson(5, 10)]
    [0.5, 0.2366, 0.7634]
    """
    if not 0 <= successes <= n or n == 0:
        raise OptionError(f"Successes must be between 0 and n, and n at least 1; got {successes!r} of {n!r}.")
    z = NormalDist().inv_cdf(0.5 + _level(level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half  # exactly, where rounding would leave 1e-18
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high)


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise OptionError(f"The level must be between 0 and 1, e.g. 0.95; got {level!r}.")
    return level


def _scores(values: Scores, name: str) -> npt.NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not scores.size:
        raise OptionError(f"Scores must be one number for each item; got shape {list(scores.shape)} for {name}.")
    if not np.isfinite(scores).all():
        raise OptionError(f"Scores must be finite; {name} holds {int((~np.isfinite(scores)).sum())} that are not.")
    return scores
