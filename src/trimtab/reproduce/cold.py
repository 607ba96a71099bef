"""COLD-Steer (arXiv:2603.06495) re-measured: which steps there are, in which order, and how they are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from trimtab.errors import OptionError
from trimtab.prefworld.families.surveys import GROUPS
from trimtab.reproduce import cold_cells as cells
from trimtab.reproduce.bench import Bench
from trimtab.reproduce.cold_data import EVERYBODY, behaviour_questions
from trimtab.reproduce.cold_facts import facts, speed
from trimtab.reproduce.cold_recipe import CURVES, POLLS, WRITING, Recipe, Sizes, load_recipe
from trimtab.reproduce.cold_report import build, notes
from trimtab.reproduce.cold_sections import sections
from trimtab.reproduce.document import Report, write
from trimtab.reproduce.steps import (
    Key,
    Progress,
    Step,
    StepRunner,
    begin_job,
    check_call,
    refuse_strangers,
    run_waves,
    usual_workers,
)

__all__ = ["load_recipe", "measure", "reproduce"]


class Runner(StepRunner):
    """Adds the recipe, and the bench of its model once a step is not kept."""

    def __init__(self, recipe: Recipe, sizes: Sizes, model: str, out: Path, data: Path, job: Mapping[str, Any]) -> None:
        super().__init__(out, job)
        self._make = lambda: Bench[Recipe, Sizes](model, recipe, sizes, data)
        self._data = data
        self._bench: Bench[Recipe, Sizes] | None = None
        self._behaviours: cells.Behaviours | None = None
        self._polls: cells.Polls | None = None

    def compute(self, key: Key, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if self._bench is None:
            self._bench = self._make()
        bench = self._bench
        _, kind, *rest = key
        if kind == "writing":
            return cells.writing(bench, rest[0], rest[1], int(rest[2]))
        if kind == "opinions":
            self._polls = self._polls or cells.Polls(bench)
            return cells.opinions(self._polls, rest[0], rest[1], int(rest[2]))
        self._behaviours = self._behaviours or cells.Behaviours(bench, self._data)
        if kind == "behaviour":
            n, seed = int(rest[2]), int(rest[3])
            return cells.behaviour(self._behaviours, rest[0], rest[1], n, seed, full=n == bench.sizes.pairs)
        return {"base": cells.base, "facts": facts, "speed": speed}[kind](self._behaviours)


def waves(recipe: Recipe, sizes: Sizes, model: str) -> Iterator[list[Step]]:
    """Yield the steps in waves: what is timed comes last, alone, and the long ones come first."""
    seeds = range(sizes.seeds)
    keys: list[tuple[str, ...]] = []
    curves = [system for system in CURVES if system in recipe.systems]
    some = list(recipe.behaviours)[: sizes.curves]
    for n in sorted({*sizes.counts, sizes.pairs}, reverse=True):
        every = n == sizes.pairs
        for name, system, seed in product(
            recipe.behaviours if every else some, recipe.systems if every else curves, seeds
        ):
            keys.append((model, "behaviour", name, system, str(n), str(seed)))
    for name, system, seed in product(recipe.writing, ("base", *WRITING), seeds):
        if system in recipe.systems or (system == "base" and seed == 0):
            keys.append((model, "writing", name, system, str(seed)))
    if recipe.groups:
        keys.append((model, "opinions", EVERYBODY, "base", "0"))
        for group, system, seed in product((*GROUPS, EVERYBODY), POLLS, seeds):
            if system in recipe.systems:
                keys.append((model, "opinions", group, system, str(seed)))
    keys += [(model, "base"), (model, "facts")]
    yield [(key, {}) for key in keys]
    yield [((model, "speed"), {})]


def measure(
    recipe: Recipe, sizes: Sizes, model: str, out: Path, data: Path, *, workers: int, progress: Progress
) -> dict[Key, Any]:
    """Run every step that `out` does not keep yet; return all records by key."""
    refuse_strangers(out)
    most = max(sizes.pairs, *sizes.counts)
    for source in recipe.behaviours.values():
        for split, n in (("train", most), ("validation", sizes.validation), ("test", sizes.test)):
            behaviour_questions(source, split, n, seed=0, root=data)
    about = {"recipe": asdict(replace(recipe, models=())), "sizes": asdict(sizes)}
    sources = {
        *recipe.guardrails,
        *(d.pairs for d in recipe.writing.values()),
        *(d.task for d in recipe.writing.values()),
    }
    for source in recipe.behaviours.values():
        sources |= {source, source.replace("/generate/", "/test/")}
    job = begin_job(out, "cold-steer", about, [model], recipe.dtype, data, sorted(sources))
    planned = list(waves(recipe, sizes, model))
    begin, total = (recipe, sizes, model, out, data, job), sum(map(len, planned))
    return run_waves(workers, Runner, begin, lambda done: iter(planned), total, progress)


def reproduce(
    recipe: Recipe,
    *,
    out: str | Path,
    data: str | Path = "data",
    models: Sequence[str] = (),
    quick: bool = False,
    workers: int | None = None,
    command: str = "",
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Run the whole protocol of a recipe, write the report to `out` (JSON, Markdown, HTML), and return it.

    `data` is the folder below which the recipe's files lie. `models` replaces the recipe's; one model is measured.
    `workers`, finished steps, `quick` and `progress` are as for `trimtab.reproduce.palrs.reproduce`. Raises
    `OptionError` where `out` holds another run, where a file of the recipe is missing, and for several models.
    """
    begun = time.perf_counter()
    names = tuple(models) or recipe.models
    if len(names) != 1:
        raise OptionError(f"COLD-Steer is measured on one model at a time; got {', '.join(names)}.")
    check_call(names, workers)
    folder, sizes = Path(out), recipe.quick if quick else recipe.sizes
    kept = len(list(folder.glob("steps/step-*.json")))
    count = workers or usual_workers(names[0], recipe.dtype)
    records = measure(recipe, sizes, names[0], folder, Path(data), workers=count, progress=progress)
    report = build(recipe, sizes, names[0], records, command, quick=quick)
    report |= {"seconds": time.perf_counter() - begun, "steps_kept": kept}
    write(report, sections(report), notes(recipe, sizes), folder)
    return report
