"""Strengths of several knobs for a goal: settings measured on validation data, the best of them as a panel."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, Panel, Rack, model_identity, save_panel
from trimtab.checkpoint import Checkpoint, describe_model, versions
from trimtab.compose.arguments import check_tasks, named_knobs, named_tasks, read_goal, warn_of_seen
from trimtab.compose.goal import Goal, Rule, Tried, choose_setting, goal_bias, nothing_left, pareto_front
from trimtab.compose.record import compose_record
from trimtab.compose.search import Answer, Search, Setting, ask_optuna, bounds_of, plan
from trimtab.errors import OptionError, TrimtabWarning, TuneError
from trimtab.evals.choices import ChoiceTask
from trimtab.evals.evaluation import describe_knob, describe_task
from trimtab.evals.stats import SelectionBias
from trimtab.evals.tasks import AnyTask, what_is_asked
from trimtab.evals.trial import KL_ITEMS, Trial
from trimtab.types import check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Composed", "Goal", "Tried", "choose_setting", "compose", "pareto_front"]


@dataclass(frozen=True, eq=False)
class Composed:
    """The chosen strengths as a panel, everything that was measured, and the record of it as plain JSON values.

    `table` serves other goals too: `choose_setting(composed.table, Goal(...))` needs no model.
    """

    panel: Panel
    table: tuple[Tried, ...]
    record: Mapping[str, Any]

    def save(self, path: str | Path, files: Mapping[str, str | Path] | None = None) -> None:
        """Write the panel; `files` says where knobs lie, and the others are written beside it.

        Such a knob's file is named after the panel and the knob, as in `panel.math.knob.safetensors`. Raises
        `UnknownName` for a file of a knob that the panel has not.
        """
        path, places = Path(path), dict(files or {})
        for name in places:
            _ = self.panel.rack[name]
        written: set[str] = set()
        for name, knob in self.panel.rack.items():
            if name not in places:
                plain = name.replace("/", "_")
                while plain in written:  # "a/b" beside "a_b"
                    plain += "_"
                written.add(plain)
                places[name] = path.parent / f"{path.stem}.{plain}.knob.safetensors"
                knob.save(places[name])
        save_panel(path, {name: (places[name], strength) for name, strength in self.panel.setting.items()})


def compose(
    knobs: Mapping[str, AnyKnob | str | Path],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preferences: Mapping[str, AnyTask] | Sequence[AnyTask],
    *,
    weights: Mapping[str, float] | None = None,
    targets: Mapping[str, float] | None = None,
    guardrails: Sequence[AnyTask] = (),
    floors: Mapping[str, float] | None = None,
    rule: Rule = "sum",
    budget: float = 0.02,
    broken_budget: float = 0.05,
    search: Search = "tpe",
    trials: int | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    grid: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    batch_size: int = 128,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Composed:
    """Find the strengths of `knobs`, of any kinds together, that serve a goal best on validation data.

    `preferences` are tasks, answered or by likelihood, whose scores lie in 0..1; a mapping gives them names of its own.
    `weights`, `targets`, `floors` and `rule` are those of `trimtab.compose.Goal`; without weights and targets every
    preference has weight 1, and a preference with neither is measured and reported only. A setting qualifies that keeps
    every floor, whose `guardrails` each stay within `budget` (a share of items) of the base model, and whose broken
    answers (empty, cut, repeating) rise by at most `broken_budget`. Among these the goal decides, and the mildest of
    those that the items cannot tell from the best wins; see `choose_setting`.

    `search`: "tpe" has Optuna's Parzen estimator look for the goal's value, "nsga2" its genetic algorithm for the
    Pareto front of the preferences, of which the goal then takes one; `trials` settings (60), repeats included. "grid"
    measures every combination, of `grid` (strengths for all knobs, or by name) or else of -1, -0.5, 0, 0.5 and 1 within
    the bounds. The base model comes first, then each knob alone at strength 1, then, of Optuna's, all at 1. `bounds`
    are by default a tuned knob's safe range and -1 to 1.5 for another; where 1 lies beyond them the bound takes its
    place.

    All tasks must be validation data: test the panel on others. Prompts that a knob was learned from bring a warning,
    and so do a choice that is no better than the base model and a gain that the best of as many useless settings would
    seem to have. The record holds every setting (`trials`), the `front`, the `cross_talk` (how far each knob alone
    moves each preference and guardrail, with paired bootstrap intervals), the choice and what it rests on. Raises
    `TuneError` if nothing qualifies, `MissingDependency` without Optuna, which "grid" does without.

    `checkpoint` is a folder that keeps what the model says under each setting, as for `tune`: the same call goes on
    where it was stopped, to the same result, and one with another goal or search takes from it what is there.
    `progress` is called with the settings done and their number.
    """
    begun = time.perf_counter()
    rack, tasks = named_knobs(knobs), named_tasks(preferences)
    check_tasks([*tasks, *guardrails])
    goal = read_goal(tasks, guardrails, weights, targets, floors, rule)
    reach = bounds_of({name: knob.safe_range for name, knob in rack.items()}, bounds)
    planned = plan(reach, search, trials, grid, bounded=bounds is not None)
    if not all(np.isfinite(share) and share >= 0 for share in (budget, broken_budget)):
        raise OptionError(f"Budgets are finite and not negative; got {budget:g} and {broken_budget:g}.")
    check_seed(seed)
    Adapter(model).check_plain("composing")
    warn_of_seen(rack, [*tasks, *guardrails])
    kept = Checkpoint(checkpoint, lambda: _job(rack, model, tokenizer, [*tasks, *guardrails], batch_size))
    prompts = [p for row in zip_longest(*(task.prompts for task in tasks)) for p in row if p is not None]
    trial = Trial(model, tokenizer, prompts, tasks, guardrails, budget, broken_budget, batch_size, kept)
    done = count(1)
    bench = _Bench(
        trial, rack, [t.name for t in tasks], [g.name for g in guardrails], lambda: progress(next(done), planned.total)
    )
    if search == "grid":
        for setting in planned.first:
            bench.measure(setting)
    else:
        ask = bench.asked_by(goal, several=search == "nsga2")
        objectives = len(goal.names) if search == "nsga2" else 1
        ask_optuna(search, reach, planned.first, ask, objectives=objectives, trials=planned.total, seed=seed)
    table = tuple(bench.table.values())
    chosen, bias = _choose(table, goal)
    options = {
        "budget": budget,
        "broken_budget": broken_budget,
        "search": search,
        "trials": None if search == "grid" else planned.total,
        "grid": grid if grid is None or isinstance(grid, Mapping) else list(grid),
        "seed": seed,
        "batch_size": batch_size,
        "kl_items": KL_ITEMS,
    }
    found = {
        **compose_record(table, chosen, bias, goal, rack, reach),
        "isolation": trial.isolation,
        "options": options,
        **_spec(model, tokenizer, tasks, guardrails),
        "seconds": time.perf_counter() - begun,
    }
    return Composed(Panel(rack, dict(chosen.setting)), table, found)


class _Bench:
    """Knobs with the trial that measures them; what was measured stays in `table`, in its order, by strengths."""

    def __init__(
        self, trial: Trial, rack: Rack, names: Sequence[str], rails: Sequence[str], advance: Callable[[], None]
    ) -> None:
        self._trial, self._rack, self._names, self._rails, self._advance = trial, rack, names, rails, advance
        base = dict.fromkeys(rack, 0.0)
        row, items = {**trial.base, "kl": 0.0}, (trial.base_items, trial.base_rail_items)
        self.table: dict[tuple[float, ...], Tried] = {tuple(base.values()): self._tried(base, row, *items)}

    def measure(self, setting: Setting) -> Tried:
        """Measure a setting, once; knobs at 0 are left out, so that the base model is the base model."""
        key = tuple(setting.values())
        if key not in self.table:
            turned = {name: strength for name, strength in setting.items() if strength}
            self.table[key] = self._tried(setting, *self._trial.measure(self._rack.resolve(turned)))
        self._advance()
        return self.table[key]

    def asked_by(self, goal: Goal, *, several: bool) -> Callable[[Setting], Answer]:
        """Return the measurement as a search takes it: the goal's value, or with `several` what each term is worth."""

        def ask(setting: Setting) -> Answer:
            tried = self.measure(setting)
            values = goal.terms(tried.scores).values() if several else [goal.value(tried.scores)]
            return Answer(list(values), tried.exceeds(goal))

        return ask

    def _tried(
        self, setting: Setting, row: Mapping[str, Any], items: Sequence[np.ndarray], rail_items: Sequence[np.ndarray]
    ) -> Tried:
        return Tried(
            setting,
            dict(zip(self._names, items, strict=True)),
            dict(zip(self._rails, rail_items, strict=True)),
            row["broken"],
            row.get("kl"),
            self._trial.excess(row),
        )


def _choose(table: Sequence[Tried], goal: Goal) -> tuple[Tried, SelectionBias]:
    """Choose, and warn of what is no gain; the base model comes first in the table and alone is no choice."""
    base, others = table[0], table[1:]
    if not any(tried.qualifies(goal) for tried in others):
        raise TuneError(nothing_left(others, goal))
    chosen, bias = choose_setting(table, goal), goal_bias(base, table, goal)
    gain = goal.value(chosen.scores) - goal.value(base.scores)
    if chosen is base:
        warnings.warn(
            f"None of the {len(others)} settings that were measured serves the goal better than the base model, "
            "so that the panel leaves every knob at 0.",
            TrimtabWarning,
            stacklevel=3,
        )
    elif base.qualifies(goal) and gain <= bias.expected:
        warnings.warn(
            f"The best of {bias.settings} settings gains {gain:.3g} over the base model on {bias.items} items; the "
            f"best of as many useless ones would seem to gain {bias.expected:.2g}. Add items, or do not count on this.",
            TrimtabWarning,
            stacklevel=3,
        )
    return chosen, bias


def _job(
    rack: Rack, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[AnyTask], batch_size: int
) -> dict[str, Any]:
    """Return what the kept steps depend on; goal, budgets and search are not among it, nor are graders."""
    return {
        "work": "composing",
        **describe_model(model, tokenizer),
        "knobs": {name: describe_knob(knob, 1.0) for name, knob in rack.items()},
        "tasks": [what_is_asked(task) for task in tasks],
        "batch size": batch_size,
    }


def _spec(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[AnyTask],
    guardrails: Sequence[AnyTask],
) -> dict[str, Any]:
    asked = [*((task, "preference") for task in tasks), *((rail, "guardrail") for rail in guardrails)]
    return {
        "model": {**model_identity(model, tokenizer), "dtype": str(model.dtype), "device": model.device.type},
        "tasks": [
            describe_task(task, role, "likelihood" if isinstance(task, ChoiceTask) else "greedy")
            for task, role in asked
        ],
        "versions": versions(),
    }
