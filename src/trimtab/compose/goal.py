"""What is wanted of several preferences at once, and which measured setting comes closest; needs no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from trimtab.errors import OptionError, TuneError, unknown_name
from trimtab.evals.choosing import paired_error
from trimtab.evals.stats import SelectionBias, expected_best_of
from trimtab.types import check_strength, format_setting

Rule = Literal["sum", "worst"]
"""How the preferences count together: all of them, or the one that comes off worst."""

CLOSE = 1e-9


@dataclass(frozen=True)
class Goal:
    """What makes one setting better than another; preferences are called by name, and their scores lie in 0..1.

    A weighted preference is worth `weight * score`, so that a negative weight wants less of it. One with a target is
    worth `-|score - target|`: it is missed from above as well as from below. Rule "sum" adds these up, "worst" takes
    the smallest, which asks that none be sacrificed. `floors` are the smallest scores, of preferences or guardrails,
    that a setting may have at all.
    """

    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    targets: Mapping[str, float] = field(default_factory=dict[str, float])
    floors: Mapping[str, float] = field(default_factory=dict[str, float])
    rule: Rule = "sum"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise unknown_name("rule", str(self.rule), get_args(Rule))
        for name, weight in self.weights.items():
            check_strength(weight, f"weight of {name!r}")
        for what, given in (("target", self.targets), ("floor", self.floors)):
            for name, score in given.items():
                if not 0 <= check_strength(score, f"{what} of {name!r}") <= 1:
                    raise OptionError(f"The {what} of {name!r} is a score, from 0 to 1; got {score:g}.")
        both = [name for name in self.weights if name in self.targets]
        if both:
            raise OptionError(f"{both[0]!r} has a weight and a target. Give it one of them.")
        if not self.names:
            raise OptionError("The goal weighs nothing. Give a preference a weight other than 0, or a target.")

    @property
    def names(self) -> list[str]:
        """The preferences that count: those with a target, or a weight other than 0."""
        return [*(name for name, weight in self.weights.items() if weight), *self.targets]

    def terms(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return what each preference that counts is worth; larger is better."""
        return {
            name: -abs(scores[name] - self.targets[name]) if name in self.targets else self.weights[name] * scores[name]
            for name in self.names
        }

    def value(self, scores: Mapping[str, float]) -> float:
        """Return what the scores are worth together; larger is better."""
        terms = self.terms(scores).values()
        return sum(terms) if self.rule == "sum" else min(terms)

    def slopes(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return by how much the value rises with each score, near these scores."""
        terms = self.terms(scores)
        counted = list(terms) if self.rule == "sum" else [min(terms, key=lambda name: terms[name])]
        return {
            name: -math.copysign(1.0, scores[name] - self.targets[name]) if name in self.targets else self.weights[name]
            for name in counted
        }


@dataclass(frozen=True, eq=False)
class Tried:
    """A setting with what was measured under it: scores of items by preference and by guardrail, `[n]` each.

    `excess` says by how much each budget is exceeded, 0 or less being kept; `broken` is the share of broken answers and
    `kl` the KL to the base model in nats per token.
    """

    setting: Mapping[str, float]
    items: Mapping[str, np.ndarray] = field(repr=False)
    rails: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray], repr=False)
    broken: float = 0.0
    kl: float | None = None
    excess: Mapping[str, float] = field(default_factory=dict[str, float])

    @cached_property
    def scores(self) -> dict[str, float]:
        """The mean score of every preference and guardrail."""
        return {name: float(np.mean(scores)) for name, scores in {**self.rails, **self.items}.items()}

    @property
    def dose(self) -> float:
        """The sum of the strengths, whatever their signs; 0 is the base model."""
        return sum(map(abs, self.setting.values()))

    def exceeds(self, goal: Goal) -> dict[str, float]:
        """Return by how much each budget and floor is missed; 0 or less is kept."""
        return {**self.excess, **{f"floor of {n}": floor - self.scores[n] for n, floor in goal.floors.items()}}

    def qualifies(self, goal: Goal) -> bool:
        """Tell whether all budgets and floors are kept."""
        return all(amount <= CLOSE for amount in self.exceeds(goal).values())

    def harm(self) -> tuple[float, float]:
        """Return what tells mild settings from others: KL where there are guardrails to measure it on, and the dose."""
        return ((self.kl or 0.0) if self.rails else 0.0), self.dose


def choose_setting(table: Sequence[Tried], goal: Goal, *, mildest: bool = True) -> Tried:
    """Return the setting of a table that serves the goal best; one table serves any number of goals.

    Of those that keep all budgets and floors the largest value wins; or rather, with `mildest`, the one that does the
    least harm (see `Tried.harm`) among those that are better than the base model, where it is in the table, and that
    the items cannot tell from the best: by paired differences at most one standard error, tasks taken as independent.
    Raises `TuneError` where no setting qualifies, and `UnknownName` for a goal of other preferences.
    """
    _check(table, goal)
    allowed = [tried for tried in table if tried.qualifies(goal)]
    if not allowed:
        raise TuneError(nothing_left(table, goal))

    def value(tried: Tried) -> float:
        return goal.value(tried.scores)

    top = max(allowed, key=lambda tried: (value(tried), -tried.dose))
    if not mildest:
        return top
    bar = max((value(tried) for tried in allowed if not tried.dose), default=-math.inf)
    equal = [tried for tried in allowed if _alike(top, tried, goal)]
    gaining = [tried for tried in equal if value(tried) > bar + CLOSE]
    return min(gaining or equal, key=lambda tried: (*tried.harm(), -value(tried)))


def pareto_front(table: Sequence[Tried], goal: Goal) -> list[Tried]:
    """Return the qualifying settings that no other beats on one preference of the goal without losing on another.

    Of settings with the same scores the mildest stands for all. Ordered by the first preference.
    """
    _check(table, goal)
    by_point: dict[tuple[float, ...], Tried] = {}
    for tried in sorted(table, key=Tried.harm):
        if tried.qualifies(goal):
            by_point.setdefault(tuple(goal.terms(tried.scores).values()), tried)
    points = sorted(by_point)
    return [by_point[points[i]] for i in undominated(np.array(points).reshape(len(points), len(goal.names)))]


def undominated(points: np.ndarray) -> list[int]:
    """Return which of the points `[M, P]` no other equals or beats everywhere and beats somewhere; larger is better.

    >>> undominated(np.array([[0, 3], [1, 1], [2, 2], [2, 0]]))
    [0, 2]
    """
    found: list[int] = []
    for i, point in enumerate(points):
        beaten = (points >= point).all(axis=1) & (points > point).any(axis=1)
        if not beaten.any():
            found.append(i)
    return found


def goal_bias(base: Tried, table: Sequence[Tried], goal: Goal) -> SelectionBias:
    """Return what the best of as many useless settings would seem to add to the goal's value.

    As `trimtab.evals.stats.selection_bias`, and the same for one preference of weight 1. Settings that do not qualify
    are left out: they are not chosen from. There must be one that does, `base` apart.
    """
    others = [tried for tried in table if tried is not base and tried.qualifies(goal)]
    squares = [sum(float(d.var()) / len(d) for d in _differences(tried, base, goal)) for tried in others]
    error = math.sqrt(float(np.mean(squares)))
    items = sum(len(base.items[name]) for name in goal.names)
    return SelectionBias(expected_best_of(len(others)) * error, len(others), items, error)


def nothing_left(table: Sequence[Tried], goal: Goal) -> str:
    """Say which setting comes closest to qualifying, and what it misses by how much."""
    closest = min(table, key=lambda tried: max(tried.exceeds(goal).values()))
    missed = {name: amount for name, amount in closest.exceeds(goal).items() if amount > CLOSE}
    said = ", ".join(f"{name} by {amount:.3g}" for name, amount in missed.items())
    return (
        f"None of the {len(table)} settings that were measured keeps the budgets and floors. The closest, "
        f"{format_setting(closest.setting)}, misses {said}. Allow smaller strengths, more items, "
        f"{'a lower floor, ' if goal.floors else ''}or a larger budget."
    )


def _alike(top: Tried, other: Tried, goal: Goal) -> bool:
    error = math.hypot(*map(paired_error, _differences(top, other, goal)))
    return goal.value(top.scores) - goal.value(other.scores) <= error + CLOSE


def _differences(one: Tried, other: Tried, goal: Goal) -> list[np.ndarray]:
    """Return by how much each item of each preference speaks for one setting rather than the other."""
    rise, fall = goal.slopes(one.scores), goal.slopes(other.scores)
    return [rise.get(n, 0.0) * one.items[n] - fall.get(n, 0.0) * other.items[n] for n in goal.names]


def _check(table: Sequence[Tried], goal: Goal) -> None:
    if not table:
        raise OptionError("The table is empty: measure a setting first.")
    for name in goal.names:
        if name not in table[0].items:
            raise unknown_name("preference", name, table[0].items)
    for name in goal.floors:
        if name not in table[0].scores:
            raise unknown_name("preference or guardrail", name, table[0].scores)
