"""What composing is given, checked and brought to one form: knobs and tasks by name, and a goal of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from trimtab.artifact import AnyKnob, Rack
from trimtab.compose.goal import Goal, Rule
from trimtab.errors import OptionError, TrimtabWarning, brief, unknown_name
from trimtab.evals.tasks import AnyTask
from trimtab.pairs import prompt_hash
from trimtab.prompts import read_prompt


def named_knobs(knobs: Mapping[str, AnyKnob | str | Path]) -> Rack:
    """Load what are paths, and give every knob the name that it goes by here, which tells it from the others."""
    if not isinstance(knobs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"Knobs come by name, as a rack or as in {{'math': knob}}; got {brief(knobs)}.")
    if not knobs:
        raise OptionError("There are no knobs to compose. Pass at least one.")
    rack = Rack(**knobs)
    return Rack(**{name: knob if knob.name == name else knob.with_(name=name) for name, knob in rack.items()})


def named_tasks(preferences: Mapping[str, AnyTask] | Sequence[AnyTask]) -> list[AnyTask]:
    """Return the preferences as tasks of those names; raises `OptionError` for values that are none."""
    if not isinstance(preferences, Mapping):
        return list(preferences)
    tasks = [(name, task) for name, task in preferences.items() if isinstance(task, AnyTask)]  # pyright: ignore[reportUnnecessaryIsInstance]
    if len(tasks) < len(preferences):
        raise OptionError("Preferences are tasks by name, as in {'math': task}.")
    return [replace(task, name=name) for name, task in tasks]


def check_tasks(tasks: Sequence[AnyTask]) -> None:
    """Raise `OptionError` for what is no task, is empty, or is named like another."""
    for task in tasks:
        if not isinstance(task, AnyTask):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"Preferences and guardrails are tasks; got {brief(task)}.")
        if not len(task):
            raise OptionError(f"Task {task.name!r} is empty: there is nothing to measure in it. Leave it out.")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise OptionError(f"Preferences and guardrails need names of their own; got {', '.join(names)}.")


def read_goal(
    tasks: Sequence[AnyTask],
    guardrails: Sequence[AnyTask],
    weights: Mapping[str, float] | None,
    targets: Mapping[str, float] | None,
    floors: Mapping[str, float] | None,
    rule: Rule,
) -> Goal:
    """Return the goal, all weights 1 where there is none; raises for names that are not measured."""
    if not tasks:
        raise OptionError("There are no preferences to compose for. Pass at least one task.")
    names = [task.name for task in tasks]
    for name in [*(weights or {}), *(targets or {})]:
        if name not in names:
            raise unknown_name("preference", name, names)
    measured = [*names, *(rail.name for rail in guardrails)]
    for name in floors or {}:
        if name not in measured:
            raise unknown_name("preference or guardrail", name, measured)
    if weights is None and targets is None:
        weights = dict.fromkeys(names, 1.0)
    return Goal(dict(weights or {}), dict(targets or {}), dict(floors or {}), rule)


def warn_of_seen(rack: Rack, tasks: Sequence[AnyTask]) -> None:
    """Warn of tasks whose prompts a knob was learned from."""
    asked = {task.name: {prompt_hash(read_prompt(prompt)) for prompt in task.prompts} for task in tasks}
    for name, knob in rack.items():
        known: object = knob.provenance.get("prompt_hashes")
        hashes = set(cast(list[object], known) if isinstance(known, list) else [])
        for task, prompts in asked.items():
            if shared := len(prompts & hashes):
                warnings.warn(
                    f"Knob {name!r} was learned from {shared} of the {len(prompts)} prompts of {task}: what is chosen "
                    "on them fits them too well. Compose on prompts that learning has not seen.",
                    TrimtabWarning,
                    stacklevel=3,
                )
