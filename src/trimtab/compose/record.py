"""What composing measured, as plain JSON values: every setting, the Pareto front, the cross-talk of the knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trimtab.artifact import Rack
from trimtab.compose.goal import CLOSE, Goal, Tried, pareto_front
from trimtab.compose.search import Bounds, alone_at
from trimtab.evals.evaluation import describe_knob
from trimtab.evals.stats import SelectionBias, paired_bootstrap


def compose_record(
    table: Sequence[Tried], chosen: Tried, bias: SelectionBias, goal: Goal, rack: Rack, reach: Bounds
) -> dict[str, Any]:
    """Set out a table whose first row is the base model, and what was chosen of it; `front` are numbers of `trials`."""
    base = table[0]
    return {
        "trimtab": "composition",
        "knobs": {
            name: {**describe_knob(knob, chosen.setting[name]), "bounds": list(reach[name])}
            for name, knob in rack.items()
        },
        "goal": asdict(goal),
        "base": describe_tried(base, goal),
        "chosen": describe_tried(chosen, goal),
        "gain": goal.value(chosen.scores) - goal.value(base.scores),
        "selection_bias": bias._asdict(),
        "trials": [describe_tried(tried, goal) for tried in table],
        "front": [table.index(tried) for tried in pareto_front(table, goal)],
        "cross_talk": cross_talk(table, reach),
    }


def describe_tried(tried: Tried, goal: Goal) -> dict[str, Any]:
    """Return a row of plain values; `misses` says which budgets and floors are not kept, and by how much."""
    return {
        "setting": dict(tried.setting),
        "scores": {name: tried.scores[name] for name in tried.items},
        "guardrails": {name: tried.scores[name] for name in tried.rails},
        "broken": tried.broken,
        "kl": tried.kl,
        "value": goal.value(tried.scores),
        "misses": {name: amount for name, amount in tried.exceeds(goal).items() if amount > CLOSE},
    }


def cross_talk(table: Sequence[Tried], reach: Bounds) -> dict[str, dict[str, Any]]:
    """Return by how much each knob alone moves each preference and guardrail: the change and its 95 percent interval.

    Paired bootstrap over items. A knob stands at 1, or at the bound that comes before; the table holds these settings,
    and the base model first.
    """
    base, found = table[0], dict[str, dict[str, Any]]()
    for name, ends in reach.items():
        strength = alone_at(ends)
        own: Mapping[str, float] = {**dict.fromkeys(reach, 0.0), name: strength}
        alone = next(tried for tried in table if dict(tried.setting) == own)
        before, after = {**base.items, **base.rails}, {**alone.items, **alone.rails}
        changes = {task: paired_bootstrap(before[task], after[task])._asdict() for task in before}
        found[name] = {"strength": strength, "changes": changes}
    return found
