"""Alignment Vectors (arXiv:2410.19206) re-measured: which steps there are, in which order, and how they are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimtab.errors import OptionError
from trimtab.reproduce import alignment_cells as cells
from trimtab.reproduce.alignment_bench import LevelBench
from trimtab.reproduce.alignment_cost import LEVEL, cost
from trimtab.reproduce.alignment_recipe import LevelData, Recipe, Sizes, load_recipe
from trimtab.reproduce.alignment_report import NOTES, build
from trimtab.reproduce.alignment_sections import sections
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
        self._make = lambda: LevelBench(model, recipe, sizes, data, out)
        self._bench: LevelBench | None = None

    def compute(self, key: Key, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if self._bench is None:
            self._bench = self._make()
        bench = self._bench
        _, kind, *rest = key
        if kind in ("vector", "sweep", "grid", "prompts", "sibling"):
            return getattr(cells, kind)(bench, *rest)
        if kind == "combine":
            return cells.combine(bench, rest[0], arguments["table"])
        if kind == "joint":
            return cells.joint(bench, rest[0])
        if kind == "matrix":
            return cells.matrix(bench, arguments["strengths"])
        if kind == "stage":
            return cells.stage(bench, rest[0], arguments["rate"])
        assert kind == "cost", kind
        return cost(bench, rest[0], arguments["strength"], arguments["sentence"])


def waves(recipe: Recipe, sizes: Sizes, model: str, done: Mapping[Key, Any]) -> Iterator[list[Step]]:
    """Yield the steps in waves, each of which needs the records of those before it in `done`."""
    domains, first = list(recipe.domains), next(iter(recipe.domains))
    each = [(domain, way) for way in recipe.ways for domain in domains]
    learned = [(domain, kind) for kind in recipe.vectors for domain in domains]
    yield [*(((model, "vector", *one), {}) for one in learned), ((model, "prompts"), {})]
    searched = [*recipe.ways, "random"]
    yield [*(((model, "grid", way), {}) for way in searched), *(((model, "sweep", *one), {}) for one in each)]
    rates = {domain: done[model, "vector", domain, "plain"]["learning_rate"] for domain in domains}
    experts = {way: {d: done[model, "sweep", d, way]["chosen"][LEVEL] for d in domains} for way in recipe.ways}
    yield [
        *(((model, "combine", way), {"table": done[model, "grid", way]["rows"]}) for way in searched),
        ((model, "matrix"), {"strengths": experts}),
        *(((model, "joint", combination), {}) for combination in recipe.joint[: sizes.joint]),
        *([((model, "sibling"), {})] if recipe.sibling else []),
    ]
    if recipe.sibling:
        yield [((model, "stage", domain), {"rate": rate}) for domain, rate in rates.items()]
    # What is timed comes last, when a single step is left: another beside it would be measured too.
    sentence = done[model, "prompts"]["sentences"][first][LEVEL]
    yield [((model, "cost", first), {"strength": experts["plain"][first], "sentence": sentence})]


def step_count(recipe: Recipe, sizes: Sizes) -> int:
    """Return how many steps `waves` yields."""
    domains, ways = len(recipe.domains), len(recipe.ways)
    stages = 1 + domains if recipe.sibling else 0
    grids = 2 * (ways + 1)
    return domains * (len(recipe.vectors) + ways) + grids + 3 + len(recipe.joint[: sizes.joint]) + stages


def measure(
    recipe: Recipe, sizes: Sizes, model: str, out: Path, data: Path, *, workers: int, progress: Progress
) -> dict[Key, Any]:
    """Run every step that `out` does not keep yet; return all records by key."""
    refuse_strangers(out)
    drawn = LevelData(data, recipe.data_seed)
    counts = {name: len(drawn.questions(source, "test", sizes.test)) for name, source in recipe.domains.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise OptionError(f"Domains need as many test questions each; got {said}. Set sizes.test to the smallest.")
    for source in recipe.guardrails:
        drawn.task(source, "test", 1)
    about = {"recipe": asdict(replace(recipe, models=())), "sizes": asdict(sizes)}
    sources = {*recipe.domains.values(), *recipe.guardrails, *recipe.sibling}
    job = begin_job(out, "alignment-vectors", about, [model], recipe.dtype, data, sources)
    (out / "knobs").mkdir(parents=True, exist_ok=True)
    begin, total = (recipe, sizes, model, out, data, job), step_count(recipe, sizes)
    return run_waves(workers, Runner, begin, lambda done: waves(recipe, sizes, model, done), total, progress)


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
        raise OptionError(f"Alignment vectors are measured on one model at a time; got {', '.join(names)}.")
    check_call(names, workers)
    folder, sizes = Path(out), recipe.quick if quick else recipe.sizes
    kept = len(list(folder.glob("steps/step-*.json")))
    count = workers or usual_workers(names[0], recipe.dtype)
    records = measure(recipe, sizes, names[0], folder, Path(data), workers=count, progress=progress)
    report = build(recipe, sizes, names[0], records, command, quick=quick)
    report |= {"seconds": time.perf_counter() - begun, "steps_kept": kept}
    write(report, sections(report), NOTES, folder)
    return report
