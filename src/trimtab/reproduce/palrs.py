"""PaLRS (arXiv:2509.23982) re-measured: which steps there are, in which order, and how workers share and keep them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from trimtab.reproduce import cells
from trimtab.reproduce.bench import Bench
from trimtab.reproduce.data import WORLD, Data, check_sources
from trimtab.reproduce.document import Report, write
from trimtab.reproduce.evidence import Evidence, grid_key
from trimtab.reproduce.recipe import Recipe, Sizes, load_recipe
from trimtab.reproduce.report import NOTES, build, sections
from trimtab.reproduce.steps import (
    Key,
    Progress,
    Step,
    StepRunner,
    begin_job,
    check_call,
    find_file,
    refuse_strangers,
    run_waves,
    usual_workers,
)

__all__ = ["load_recipe", "measure", "reproduce"]


class Runner(StepRunner):
    """Adds the recipe, and a bench for each model that it was asked about."""

    def __init__(
        self, recipe: Recipe, sizes: Mapping[str, Sizes], out: Path, data: Path, job: Mapping[str, Any]
    ) -> None:
        super().__init__(out, job)
        self.recipe, self.sizes, self._data = recipe, sizes, data
        self._benches: dict[str, Bench[Recipe, Sizes]] = {}

    def compute(self, key: Key, arguments: Mapping[str, Any]) -> dict[str, Any]:
        model, kind, name, *rest = key
        if model not in self._benches:
            self._benches[model] = Bench(model, self.recipe, self.sizes[model], self._data)
        bench, domain = self._benches[model], self.recipe.domains[name]
        if kind == "base":
            return cells.base(bench, domain)
        if kind == "examples":
            return cells.examples(bench, domain, int(rest[0]))
        if kind == "grid":
            return cells.grid(bench, domain, self.recipe.training[rest[0]], int(rest[1]))
        if kind == "train":
            way, n, seed = self.recipe.training[rest[0]], int(rest[1]), int(rest[2])
            return cells.trained(bench, domain, way, n, seed, arguments["setting"])
        way = self.recipe.steering[rest[0]]
        if kind == "steer":
            n, seed = int(rest[1]), int(rest[2])
            controls = rest[0] == self.recipe.main and n == self.sizes[model].pairs
            return cells.steered(bench, domain, way, n, seed, knob_file(self.out, key), controls=controls)
        file = knob_file(self.out, (model, "steer", name, rest[0], str(self.sizes[model].pairs), "0"))
        if kind == "dose":
            return cells.dose(bench, domain, file)
        if kind == "map":
            return cells.site_map(bench, domain, way, file)
        assert kind == "naive", kind
        return cells.chosen_on_test(bench, domain, way)


def knob_file(out: Path, key: Key) -> Path:
    """Return where a step keeps its knob."""
    return out / "knobs" / f"{'-'.join(part.replace('/', '-') for part in key)}.knob.safetensors"


def sizes_of(recipe: Recipe, models: Sequence[str], *, quick: bool) -> dict[str, Sizes]:
    """Return how many items each model uses: the first the recipe's own sizes, the others its smaller ones."""
    if quick:
        return dict.fromkeys(models, recipe.quick)
    return {model: recipe.others if number else recipe.sizes for number, model in enumerate(models)}


def first_steps(recipe: Recipe, sizes: Mapping[str, Sizes]) -> Iterator[Step]:
    """Yield the steps that need no other, the long ones first."""
    for (model, size), domain, name in product(sizes.items(), recipe.domains, recipe.training):
        for n in (size.many_pairs, size.pairs) if size.many_grid else (size.pairs,):
            yield (model, "grid", domain, name, str(n)), {}
    for (model, size), domain in product(sizes.items(), recipe.domains):
        yield (model, "base", domain), {}
        yield (model, "naive", domain, recipe.main), {}
        for seed in range(size.seeds):
            yield (model, "examples", domain, str(seed)), {}
            for name in recipe.steering:
                yield (model, "steer", domain, name, str(size.pairs), str(seed)), {}
        for n, seed in product(size.counts, range(size.count_seeds)):
            yield (model, "steer", domain, recipe.main, str(n), str(seed)), {}


def later_steps(recipe: Recipe, sizes: Mapping[str, Sizes], done: Mapping[Key, Any]) -> Iterator[Step]:
    """Yield the steps that need the settings of a grid, or a knob; curves of a refused knob are left out."""
    for (model, size), domain in product(sizes.items(), recipe.domains):
        for name in recipe.training:
            for n, seeds in ((size.many_pairs, size.many_seeds), (size.pairs, size.seeds)):
                chosen = done[grid_key(model, domain, name, n, size)]["record"]["chosen"]
                setting = (chosen["learning_rate"], chosen["beta"])
                for seed in range(seeds):
                    yield (model, "train", domain, name, str(n), str(seed)), {"setting": setting}
        if "refused" not in done[model, "steer", domain, recipe.main, str(size.pairs), "0"]:
            yield (model, "dose", domain, recipe.main), {}
            yield (model, "map", domain, recipe.main), {}


def measure(
    recipe: Recipe, sizes: Mapping[str, Sizes], out: Path, data: Path, *, workers: int, progress: Progress
) -> dict[Key, Any]:
    """Run every step that `out` does not keep yet; return all records by key."""
    refuse_strangers(out)
    for source in _sources(recipe):
        if not source.startswith(WORLD):
            find_file(data, source)
    most = max(max(size.pairs, size.many_pairs, *size.counts) for size in sizes.values())
    check_sources(recipe.guardrails, recipe.domains.values(), most, Data(data, recipe.data_seed))
    about = {"recipe": asdict(replace(recipe, models=())), "sizes": {m: asdict(size) for m, size in sizes.items()}}
    job = begin_job(out, "palrs", about, sizes, recipe.dtype, data, _sources(recipe))
    (out / "knobs").mkdir(parents=True, exist_ok=True)
    early = list(first_steps(recipe, sizes))
    later = sum(2 + len(recipe.training) * (size.many_seeds + size.seeds) for size in sizes.values())
    total = len(early) + later * len(recipe.domains)

    def waves(done: Mapping[Key, Any]) -> Iterator[list[Step]]:
        yield early
        yield list(later_steps(recipe, sizes, done))

    return run_waves(workers, Runner, (recipe, sizes, out, data, job), waves, total, progress)


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

    `data` is the folder below which the recipe's files lie. `models` replace the recipe's: the first is measured in
    full, the others enough to tell whether it was lucky. `workers` are processes with a thread each; None takes two
    where the first model is small and on a CPU, else one. Finished steps stay in `out`, so the same call goes on where
    it was stopped. `quick` uses the recipe's smallest sizes: everything runs, and no figure means anything. `progress`
    is called with the steps that are done, how many there are, and the last one's name. Raises `OptionError` where
    `out` holds another run and where a file of the recipe is missing.
    """
    begun = time.perf_counter()
    names = tuple(models) or recipe.models
    check_call(names, workers)
    folder, sizes = Path(out), sizes_of(recipe, names, quick=quick)
    kept = len(list(folder.glob("steps/step-*.json")))
    count = workers or usual_workers(names[0], recipe.dtype)
    records = measure(recipe, sizes, folder, Path(data), workers=count, progress=progress)
    evidence = Evidence(records, recipe, sizes, command)
    report = build(evidence, quick=quick, seconds=time.perf_counter() - begun, kept=kept)
    write(report, sections(report), NOTES, folder)
    return report


def _sources(recipe: Recipe) -> set[str]:
    domains = recipe.domains.values()
    return {*recipe.guardrails, *(d.pairs for d in domains), *(d.task for d in domains)}
