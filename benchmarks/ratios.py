"""Ratios of paired times: the median over rounds, its interval by bootstrap, and the quartiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS, LEVEL, SEED = 10_000, 0.95, 0

Round = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""What one round measured, by side and way: `cpu`, `wall`, `peak_mb`."""


class Spread(NamedTuple):
    """A median over rounds, the ends of its 95 % interval, and the quartiles."""

    median: float
    low: float
    high: float
    lower: float
    upper: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    """Return the median of values with the percentile bootstrap interval over rounds, and the quartiles.

    With few rounds the interval is about as wide as all that was seen; with one it is a point, which says nothing.

    >>> spread([1.0, 3.0, 2.0])[:3]
    (2.0, 1.0, 3.0)
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"A spread is that of finite values, and at least one; got {list(values)}.")
    picks = np.random.default_rng(SEED).integers(array.size, size=(DRAWS, array.size))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.median(array[picks], axis=1), [tail, 1 - tail])
    lower, upper = np.quantile(array, [0.25, 0.75])
    return Spread(float(np.median(array)), float(low), float(high), float(lower), float(upper), array.size)


def seconds(rounds: Sequence[Round], side: str, way: str, clock: str) -> list[float]:
    """Return a way's time of every round; NaN for a round without it."""
    return [float(done.get(side, {}).get(way, {}).get(clock, math.nan)) for done in rounds]


def ratios(rounds: Sequence[Round], side: str, way: str, base: str, clock: str) -> list[float]:
    """Return a way's time over that of its base of the same round, for the rounds that have both."""
    own, other = (seconds(rounds, side, name, clock) for name in (way, base))
    return [a / b for a, b in zip(own, other, strict=True) if math.isfinite(a / b)]


def beside(
    rounds: Sequence[Round], ours: tuple[str, str], theirs: tuple[str, str], clock: str, sides: tuple[str, str]
) -> list[float]:
    """Return our ratio over the peer's, round by round: each is a (way, base) of its side."""
    found: list[float] = []
    for done in rounds:
        pair = [ratios([done], side, *ways, clock) for side, ways in zip(sides, (ours, theirs), strict=True)]
        if all(pair):
            found.append(pair[0][0] / pair[1][0])
    return found
