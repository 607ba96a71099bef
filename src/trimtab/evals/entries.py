"""Entries of an evaluation's record: answers, pairs and texts under one setting, as plain values with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trimtab.evals.cost import Cost
from trimtab.evals.effects import Divergence, Manner, Perplexity, effect, perplexity_change
from trimtab.evals.likelihood import Margins
from trimtab.evals.stats import Interval, Scores, bootstrap_mean, mcnemar, paired_bootstrap, wilson
from trimtab.evals.tasks import AnyTask, Outcome

PROMPTS = "prompts"
"""Stands for a task where the pairs' own prompts are answered: no grader, but manner, judge and side effects."""


class Ask(NamedTuple):
    """A task to be answered: its role ("task", "guardrail" or `PROMPTS`), and "greedy", "sampled" or "likelihood"."""

    task: AnyTask
    role: str
    mode: str


class Said(NamedTuple):
    """What was answered to a task, how, and at which cost."""

    outcome: Outcome
    manner: Manner
    cost: Cost


def describe_answers(ask: Ask, said: Said) -> dict[str, Any]:
    """Describe the answers to one task."""
    outcome, task = said.outcome, ask.task
    row: dict[str, Any] = {"task": task.name, "role": ask.role, "mode": ask.mode, "n": len(outcome.answers)}
    if ask.role != PROMPTS:
        row["accuracy"] = as_fields(_mean(outcome.scores))
        row["interval"] = "wilson" if _binary(outcome.scores) else "bootstrap"
    sides = sorted({side for side in outcome.sides if side is not None})
    if sides:
        named: dict[str, str | None] = {**{side: side for side in sides}, "neither": None}
        row["sides"] = {
            name: {"share": outcome.share(side), "accuracy": outcome.accuracy_within(side)}
            for name, side in named.items()
        }
    if ask.mode == "likelihood":
        return row
    if outcome.isolation is not None:
        row["isolation"] = outcome.isolation
    return row | {
        "broken": float(outcome.degenerate.mean()),
        "repetition": float(said.manner.repetition.mean()),
        "tokens": float(said.manner.tokens.mean()),
    }


def compare_scores(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Compare scores `[n]` of the same items; p is McNemar's, None for scores other than 0 and 1."""
    p = mcnemar(before, after) if _binary(before) and _binary(after) else None
    return {"difference": as_fields(paired_bootstrap(before, after)), "p": p}


def describe_preference(margins: Margins, bare: Margins | None = None) -> dict[str, Any]:
    """Describe how often, and by how many nats, the chosen answers are likelier than the rejected."""
    wins = _wins(margins)
    entry: dict[str, Any] = {
        "n": len(wins),
        "accuracy": as_fields(_mean(wins)),
        "margin": as_fields(bootstrap_mean(margins.margin)),
    }
    if bare is not None:
        entry |= compare_scores(_wins(bare), wins)
        entry["margin_difference"] = as_fields(paired_bootstrap(bare.margin, margins.margin))
    return entry


def _wins(margins: Margins) -> np.ndarray:
    return (np.sign(margins.margin) + 1) / 2


def describe_neutral(read: Perplexity, bare: Perplexity | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "texts": len(read.nats),
        "tokens": int(read.tokens.sum()),
        "perplexity": read.per_token,
        "nats_per_token": float(read.nats.sum() / read.tokens.sum()),
        "bits_per_byte": read.bits_per_byte,
    }
    return entry if bare is None else entry | {"change": as_fields(perplexity_change(bare, read))}


def compare_manner(bare: Sequence[Said], said: Sequence[Said]) -> dict[str, Any]:
    """Compare broken answers, repetition and length over all greedy answers."""

    def gather(some: Sequence[Said]) -> list[np.ndarray]:
        parts = [(one.outcome.degenerate, one.manner.repetition, one.manner.tokens) for one in some]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    found: dict[str, Any] = {}
    for name, before, after in zip(("broken", "repetition", "tokens"), gather(bare), gather(said), strict=True):
        measure = effect(before, after)
        found[name] = {"bare": measure.bare, "steered": measure.steered, "change": as_fields(measure.change)}
    return found


def join(parts: Sequence[Divergence]) -> Divergence:
    return Divergence(np.concatenate([part.nats for part in parts]), np.concatenate([part.tokens for part in parts]))


def total_cost(said: Sequence[Said]) -> dict[str, Any]:
    """Sum what answering and grading took."""
    seconds, tokens = sum(one.cost.seconds for one in said), sum(float(one.manner.tokens.sum()) for one in said)
    peaks = [one.cost.peak_bytes for one in said if one.cost.peak_bytes is not None]
    return {
        "answers": sum(len(one.outcome.answers) for one in said),
        "seconds": seconds,
        "tokens": int(tokens),
        "peak_bytes": max(peaks, default=None),
    }


def _mean(scores: Scores) -> Interval:
    values = np.asarray(scores, dtype=float)
    return wilson(int(values.sum()), len(values)) if _binary(values) else bootstrap_mean(values)


def _binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def as_fields(found: Interval) -> dict[str, float]:
    return found._asdict()
