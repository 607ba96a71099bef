"""What tuning takes of the settings that were measured on validation items, and what it says where none will do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.errors import TrimtabWarning, TuneError
from trimtab.evals.stats import SelectionBias
from trimtab.evals.tasks import AnyTask
from trimtab.evals.trial import Trial


def choose(
    table: Sequence[Mapping[str, Any]],
    scores: Sequence[np.ndarray],
    trial: Trial,
    name: str,
    task: AnyTask | None,
    bias: SelectionBias | None,
) -> Mapping[str, Any]:
    """Choose among the rows within the budgets as `tune` says; warns if the choice is no better than the base."""
    allowed = [i for i, row in enumerate(table) if row["within_budget"]]
    if not allowed:
        raise TuneError(_nothing_left(name, table, trial))
    if task is None:
        best = table[max(allowed, key=lambda i: (table[i]["margin"], -table[i]["gain"]))]
        if best["margin"] <= 0:
            warnings.warn(
                f"No setting of {name!r} raises the margin of the chosen answers over the rejected ones; the best "
                f"changes it by {best['margin']:.3g} nats. Try other gains, or other tokens to steer.",
                TrimtabWarning,
                stacklevel=3,
            )
        return best
    top, base = max(allowed, key=lambda i: table[i]["score"]), trial.base["score"]
    equal = [i for i in allowed if alike(scores[top], scores[i])]
    gaining = [table[i] for i in equal if table[i]["score"] > base] or [table[i] for i in equal]

    def harm(row: Mapping[str, Any]) -> tuple[float, float, float]:
        return (row.get("kl", 0.0) if row["guardrails"] else 0.0), row["gain"], -row["score"]

    best = min(gaining, key=harm)
    if best["score"] <= base:
        warnings.warn(
            f"No setting of {name!r} scores above the base model on {task.name!r} "
            f"({base:.3g} without the knob, at best {best['score']:.3g} with it).",
            TrimtabWarning,
            stacklevel=3,
        )
    elif bias and best["score"] - base <= bias.expected:
        warnings.warn(
            f"The best of {bias.settings} settings of {name!r} scores {best['score'] - base:.3g} more than the base "
            f"model on {bias.items} items of {task.name!r}; the best of as many useless ones would seem to add "
            f"{bias.expected:.2g}. Add items, or do not count on this gain.",
            TrimtabWarning,
            stacklevel=3,
        )
    return best


def _nothing_left(name: str, table: Sequence[Mapping[str, Any]], trial: Trial) -> str:
    """Say which budget the setting with the smallest gain broke, and by how much."""
    smallest = min(table, key=lambda row: row["gain"])
    drops = {g: trial.base["guardrails"][g] - value for g, value in smallest["guardrails"].items()}
    worst = max(drops, key=lambda g: drops[g], default=None)
    broken = smallest["broken"] - trial.base["broken"]
    said = f"broken answers rise by {broken:.3g} (budget {trial.broken_budget:g})"
    if worst is not None and drops[worst] > trial.budget:
        said = f"guardrail {worst!r} falls by {drops[worst]:.3g} (budget {trial.budget:g})"
    return (
        f"None of the {len(table)} settings of {name!r} keeps within the budgets: at gain {smallest['gain']:g}, "
        f"{smallest['site']}, {smallest['where']} tokens, {said}. Try smaller gains than "
        f"{smallest['gain']:g}, more items, or a larger budget."
    )


def alike(best: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether scores `[n]` on the same items lie within one standard error of the best, by paired difference."""
    difference = best - other
    return bool(difference.mean() <= paired_error(difference) + 1e-9)


def paired_error(difference: np.ndarray) -> float:
    """Return the standard error of a mean difference from the differences of the items, `[n]`; 0 for one item."""
    return float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0
