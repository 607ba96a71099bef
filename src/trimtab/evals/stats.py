"""Intervals and tests for scores: paired bootstrap, Wilson, McNemar, Holm, and what choosing the best of many is worth.

Conventions: a score is a number per item, larger is better; a difference is the second argument minus the first; two
systems are compared on the same items in the same order; intervals are two-sided. The same arguments give the same
interval, bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
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
    first, second = _paired(a, b)
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


def bootstrap_ratio(
    parts: Scores, wholes: Scores, *, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return sum(parts) / sum(wholes), as of nats and tokens, with its percentile bootstrap interval over items `[N]`.

    >>> bootstrap_ratio([3, 1], [1, 1]).estimate
    2.0
    """
    first, second = _paired(parts, wholes)
    if (second <= 0).any():
        raise OptionError(f"What is divided by must be positive; got {float(second.min()):g}.")
    tail, random, count = (1 - _level(level)) / 2, np.random.default_rng(seed), first.size
    ratios: list[npt.NDArray[np.float64]] = []
    for start in range(0, draws, rows := max(1, CHUNK // count)):
        picked = random.integers(count, size=(min(rows, draws - start), count))
        ratios.append(first[picked].sum(axis=1) / second[picked].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return Interval(float(first.sum() / second.sum()), float(low), float(high))


Runs = npt.NDArray[np.floating]
"""Scores `[S, N]` of N items by S runs, such as knobs learned from S draws of pairs."""


def bootstrap_runs(
    groups: Sequence[tuple[Runs, Runs]],
    *,
    within: Sequence[tuple[Runs, Runs]] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the mean of `b - a` with its interval where both were run several times, averaged over groups.

    A group is `(a [S, N], b [R, N])`: S and R runs on the same N items, such as one model with knobs from S draws of
    pairs. Items are resampled together and runs of either side apart, so that the interval covers the choice of items
    and of pairs. Groups, such as models, are not resampled; those with as many items are taken to have been asked the
    same ones, and get the same draw of them. With few runs the interval is too narrow: a bootstrap of S runs has
    (S - 1) / S of their variance.

    `within` holds flags of the same shapes, 0 or 1: means are then those of the flagged scores, such as of the answers
    that are on the preferred side, and each side of each group must have some.
    """
    if not groups or any(a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] for a, b in groups):
        raise OptionError("Groups are pairs of scores [S, N] and [R, N] of the same items, and at least one.")
    weights = within or [(np.ones_like(a), np.ones_like(b)) for a, b in groups]
    sides = [
        (group[side], own[side], sign)
        for group, own in zip(groups, weights, strict=True)
        for side, sign in enumerate((-1.0, 1.0))
    ]
    if any(x.shape != w.shape or not w.any() for x, w, _ in sides):
        raise OptionError("Flags have the shapes of the scores, and every side has at least one that is set.")
    tail, random = (1 - _level(level)) / 2, np.random.default_rng(seed)
    means, counts = np.zeros(draws), sorted({x.shape[1] for x, _, _ in sides})
    rows = max(1, CHUNK // counts[-1])
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        items = {count: random.integers(count, size=(size, count)) for count in counts}
        for x, w, sign in sides:
            shares = _shares(random, size, len(x))
            parts, wholes = (np.take_along_axis(shares @ y, items[x.shape[1]], axis=1).sum(axis=1) for y in (x * w, w))
            with np.errstate(invalid="ignore"):  # a draw without any flagged item says nothing, and is left out below
                means[start : start + size] += sign * parts / wholes / len(groups)
    estimate = sum(sign * float((x * w).sum() / w.sum()) for x, w, sign in sides) / len(groups)
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _shares(random: np.random.Generator, size: int, count: int) -> Runs:
    """Draw `count` runs with replacement, `size` times; return which share of a draw each run has, `[size, count]`."""
    picks = random.integers(count, size=(size, count))
    return np.stack([(picks == run).mean(axis=1) for run in range(count)], axis=1)


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


def mcnemar(a: Scores, b: Scores) -> float:
    """Return the exact two-sided p-value that two systems are right equally often, from scores of 0 and 1 `[N]`.

    Only items that one gets right and the other wrong count (McNemar 1947); under the hypothesis each falls either way
    with probability one half. Raises `OptionError` for other scores, for which `paired_bootstrap` is meant.

    >>> mcnemar([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1])
    0.0625
    """
    first, second = _paired(a, b)
    if not np.isin([first, second], (0.0, 1.0)).all():
        raise OptionError("McNemar's test needs scores of 0 and 1. Use paired_bootstrap for others.")
    won, lost = int((second > first).sum()), int((second < first).sum())
    n, fewer, ways, tail = won + lost, min(won, lost), 1, 0
    for k in range(fewer + 1):
        tail += ways  # binomial coefficients as whole numbers: exact however many items there are
        ways = ways * (n - k) // (k + 1)
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number, in their order: reject those at most the level (Holm 1979).

    The chance of a single false rejection among all of them then stays within the level, however they depend.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise OptionError(f"p-values lie between 0 and 1; got {next(p for p in p_values if not 0 <= p <= 1)!r}.")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def cohen_kappa(a: Sequence[object], b: Sequence[object]) -> float:
    """Return how far two labellings agree beyond chance (Cohen 1960): 1 is agreement, 0 what chance would bring.

    NaN where both give every item one and the same label, which leaves chance no room.

    >>> cohen_kappa([1, 1, 0, 0], [1, 0, 0, 0])
    0.5
    """
    if len(a) != len(b) or not len(a):
        raise OptionError(f"Labels must be of the same items, and at least one; got {len(a)} and {len(b)}.")
    same = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    first, second = Counter(a), Counter(b)
    chance = sum(first[label] * second[label] for label in first) / len(a) ** 2
    return math.nan if chance == 1 else (same - chance) / (1 - chance)


class SelectionBias(NamedTuple):
    """The score that the best of several useless settings is expected to seem to add: `expected`.

    `settings` were compared on `items`; `error` is the standard error of one setting's paired difference to the base.
    """

    expected: float
    settings: int
    items: int
    error: float


def selection_bias(base: Scores, settings: Sequence[Scores]) -> SelectionBias:
    """Return what choosing the best of `settings` on these items would seem to gain if none of them did anything.

    `base` `[N]` and every setting `[N]` are scores of the same items. A useless setting changes some items either way;
    of k such differences, normal with the standard error that these show, the largest is expected at E[max of k
    standard normals] times that error. For scores of 0 and 1 of which a share f changes the error is sqrt(f / N).
    Settings are taken as independent: alike ones gain less, so that this is an upper figure.

    >>> bias = selection_bias([0, 1] * 50, [[0, 1] * 40 + [1, 0] * 10] * 30)
    >>> round(100 * bias.expected, 1)  # a fifth of 100 items, best of 30
    9.1
    """
    if not settings:
        raise OptionError("There must be at least one setting to choose from.")
    differences = [second - first for first, second in (_paired(base, s) for s in settings)]
    items = differences[0].size
    error = math.sqrt(float(np.mean([d.var() for d in differences])) / items)
    return SelectionBias(expected_best_of(len(settings)) * error, len(settings), items, error)


def expected_best_of(count: int) -> float:
    """Return the expected largest of `count` standard normals, by numerical integration of x d(Phi(x)^count).

    >>> round(expected_best_of(2), 4)  # 1 / sqrt(pi)
    0.5642
    """
    edges = np.linspace(-9.0, 9.0, 3601)
    cumulative = np.array([NormalDist().cdf(x) for x in edges]) ** count
    return float(((edges[1:] + edges[:-1]) / 2 * np.diff(cumulative)).sum())


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise OptionError(f"The level must be between 0 and 1, e.g. 0.95; got {level!r}.")
    return level


def _paired(a: Scores, b: Scores) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    first, second = _scores(a, "a"), _scores(b, "b")
    if first.shape != second.shape:
        raise OptionError(f"Paired scores must be of the same items; got {first.size} and {second.size}.")
    return first, second


def _scores(values: Scores, name: str) -> npt.NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not scores.size:
        raise OptionError(f"Scores must be one number for each item; got shape {list(scores.shape)} for {name}.")
    if not np.isfinite(scores).all():
        raise OptionError(f"Scores must be finite; {name} holds {int((~np.isfinite(scores)).sum())} that are not.")
    return scores
