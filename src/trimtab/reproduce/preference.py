"""Preference Vectors (arXiv:2504.20106) re-measured: which steps there are, and how they are run and kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimtab.errors import TrainError
from trimtab.reproduce import preference_cells as cells
from trimtab.reproduce.bench import Bench
from trimtab.reproduce.data import Data, check_sources
from trimtab.reproduce.document import Report, write
from trimtab.reproduce.preference_recipe import Recipe, Sizes, load_recipe
from trimtab.reproduce.preference_report import NOTES, build, sections
from trimtab.reproduce.preference_systems import Rates, flipped_names, plus_names, systems, trained_names
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

__all__ = ["load_recipe", "reproduce"]


class Runner(StepRunner):
    """Adds the recipe, and a bench for each model that it was asked about."""

    def __init__(self, recipe: Recipe, sizes: Sizes, out: Path, data: Path, job: Mapping[str, Any]) -> None:
        super().__init__(out, job)
        self._recipe, self._sizes, self._data = recipe, sizes, data
        self._benches: dict[str, cells.PreferenceBench] = {}

    def compute(self, key: Key, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do a step; return its record."""
        model, kind, *rest = key
        if model not in self._benches:
            bench = Bench(model, self._recipe, self._sizes, self._data)
            self._benches[model] = cells.PreferenceBench(bench, self.out / "knobs" / model.replace("/", "-"))
        bench = self._benches[model]
        if kind == "train":
            name, rate, seed = rest
            return bench.train(name, float(rate), int(seed))
        if kind == "steer":
            return bench.steer(rest[0])
        if kind == "plus":
            name, rate, seed = rest
            return bench.plus(name, float(rate), int(seed))
        rates: Rates = arguments["rates"]
        if kind in ("test", "compose"):
            name, seed = rest
            return getattr(bench, kind)(name, rates, int(seed))
        if kind == "equal":
            return bench.equal(rest[0], rates)
        if kind == "geometry":
            return bench.systems.geometry(rates)
        return {"grid": bench.grid, "scale": bench.scale}[kind](rates, int(rest[0]))


def rates_of(recipe: Recipe, name: str) -> tuple[float, ...]:
    """Return the rates that are tried for what is trained under a name."""
    return recipe.rewards.learning_rates if name.startswith("reward-") else recipe.training.learning_rates


def first_steps(recipe: Recipe, models: Sequence[str]) -> Iterator[Step]:
    """Yield every training at every rate, with the first draw of pairs."""
    for model in models:
        for name in trained_names(recipe):
            for rate in rates_of(recipe, name):
                yield (model, "train", name, f"{rate:g}", "0"), {}
        for name in recipe.preferences:
            yield (model, "steer", name), {}


def plus_steps(recipe: Recipe, models: Sequence[str]) -> Iterator[Step]:
    """Yield a look at the positive half of each of the two vectors, at every rate."""
    for model in models:
        for name in recipe.two:
            for rate in rates_of(recipe, name):
                yield (model, "plus", name, f"{rate:g}", "0"), {}


def second_steps(recipe: Recipe, sizes: Sizes, rates: Mapping[str, Rates]) -> Iterator[Step]:
    """Yield the trainings with the other draws, at the rates that were chosen, and those of the controls."""
    for model, chosen in rates.items():
        for seed in range(sizes.seeds):
            for name in flipped_names(recipe):
                yield (model, "train", name, f"{chosen[name]:g}", str(seed)), {}
            if not seed:
                continue
            for name in trained_names(recipe):
                own = {chosen[name], chosen[f"{name} plus"] if name in recipe.two else None}
                for rate in sorted(rate for rate in own if rate is not None):
                    yield (model, "train", name, f"{rate:g}", str(seed)), {}


def last_steps(recipe: Recipe, sizes: Sizes, rates: Mapping[str, Rates]) -> Iterator[Step]:
    """Yield what is measured of what was trained."""
    for model, chosen in rates.items():
        needs = {"rates": dict(chosen)}
        for seed in map(str, range(sizes.seeds)):
            for kind in ("grid", "scale"):
                yield (model, kind, seed), needs
            for what in cells.COMPOSED:
                yield (model, "compose", what, seed), needs
            for name in systems(recipe):
                yield (model, "test", name, seed), needs
        for name in recipe.preferences:
            yield (model, "equal", name), needs
        yield (model, "geometry"), needs


def choose_rate(records: Mapping[float, Mapping[str, Any]], budget: float) -> float | None:
    """Return the rate with the best validation score of those whose guardrails keep the budget; else the mildest.

    Of equal ones the smallest; None where nothing could be trained at any.
    """
    records = {rate: record for rate, record in records.items() if "score" in record}
    kept = [rate for rate, record in records.items() if record["drop"] <= budget + 1e-9]
    if not kept:
        return min(records, key=lambda rate: (records[rate]["drop"], rate), default=None)
    return max(kept, key=lambda rate: (records[rate]["score"], -rate))


def choose_rates(recipe: Recipe, models: Sequence[str], done: Mapping[Key, Any]) -> dict[str, dict[str, float | None]]:
    """Return each training's rate by model, of those that were tried with the first draw of pairs.

    A control takes the rate of its vector. Raises `TrainError` where a preference could not be trained at any rate.
    """
    chosen: dict[str, dict[str, float | None]] = {}
    for model in models:
        own = chosen[model] = {}
        for name in trained_names(recipe):
            tried = {rate: done[model, "train", name, f"{rate:g}", "0"] for rate in rates_of(recipe, name)}
            own[name] = choose_rate(tried, recipe.budget)
            if own[name] is None and name in recipe.preferences:
                said = next(record["refused"] for record in tried.values())
                raise TrainError(f"{model}: the vector of {name} could not be trained at any rate: {said}")
        for name in recipe.two:
            tried = {rate: done[model, "plus", name, f"{rate:g}", "0"] for rate in rates_of(recipe, name)}
            own[f"{name} plus"] = choose_rate(tried, recipe.budget)
            own[f"{name} flipped"] = own[name]
    return chosen


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

    Arguments and errors are those of `trimtab.reproduce.palrs.reproduce`; every model is measured alike.
    """
    begun, folder, names = time.perf_counter(), Path(out), tuple(models) or recipe.models
    check_call(names, workers)
    sizes = recipe.quick if quick else recipe.sizes
    refuse_strangers(folder)
    sample = Data(Path(data), recipe.data_seed)
    check_sources(recipe.guardrails, recipe.preferences.values(), sizes.pairs, sample)
    kept = len(list(folder.glob("steps/step-*.json")))
    measured = replace(recipe, models=(), sizes=Sizes(), quick=Sizes())
    about = {"recipe": asdict(measured), "sizes": asdict(sizes)}
    sources = {*recipe.guardrails, *(s for d in recipe.preferences.values() for s in (d.pairs, d.task))}
    job = begin_job(folder, "preference-vector", about, names, recipe.dtype, Path(data), sorted(sources))
    early = list(first_steps(recipe, names))
    looks = list(plus_steps(recipe, names))
    every = (*trained_names(recipe), *plus_names(recipe), *flipped_names(recipe))
    likely = {model: {name: rates_of(recipe, name)[0] for name in every} for model in names}
    later = [*second_steps(recipe, sizes, likely), *last_steps(recipe, sizes, likely)]
    total = len(early) + len(looks) + len(later)  # a few more where rates of a vector and of its half differ
    count = workers or usual_workers(names[0], recipe.dtype)

    def waves(done: Mapping[Key, Any]) -> Iterator[list[Step]]:
        yield early
        yield looks
        rates = choose_rates(recipe, names, done)
        yield list(second_steps(recipe, sizes, rates))
        yield list(last_steps(recipe, sizes, rates))

    done = run_waves(count, Runner, (recipe, sizes, folder, Path(data), job), waves, total, progress)
    report = build(recipe, sizes, done, choose_rates(recipe, names, done), command)
    report |= {"quick": quick, "seconds": time.perf_counter() - begun, "steps_kept": kept}
    if quick:
        report["summary"] = f"A quick run, which shows that everything works: no figure counts. {report['summary']}"
    write(report, sections(report), NOTES, folder)
    return report
