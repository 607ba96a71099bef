"""PaLRS (arXiv:2509.23982) re-measured: which steps there are, in which order, and how workers share and keep them."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from trimtab.checkpoint import Checkpoint, describe_model
from trimtab.errors import OptionError, TrimtabWarning
from trimtab.render import load
from trimtab.reproduce import cells
from trimtab.reproduce.bench import Bench
from trimtab.reproduce.data import WORLD, Data, check_sources
from trimtab.reproduce.evidence import Evidence, grid_key
from trimtab.reproduce.recipe import Recipe, Sizes
from trimtab.reproduce.report import Report, build, write
from trimtab.reproduce.steps import Key, Progress, Step, refuse_strangers, running, usual_workers


class Runner:
    """What one process works with: the recipe, the folder, and a bench for each model that it was asked about."""

    def __init__(
        self, recipe: Recipe, sizes: Mapping[str, Sizes], out: Path, data: Path, job: Mapping[str, Any]
    ) -> None:
        self.recipe, self.sizes, self.out, self._data = recipe, sizes, out, data
        self._kept = Checkpoint(out / "steps", lambda: job)
        self._benches: dict[str, Bench] = {}

    def run(self, key: Key, arguments: Mapping[str, Any]) -> Any:
        """Return a step's record: the one that is kept, or a new one, which holds what there is to warn of."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)
            return self._kept.step(" ".join(key), lambda: self._compute(key, arguments))

    def _compute(self, key: Key, arguments: Mapping[str, Any]) -> Any:
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
    prints = {source: _fingerprint(data, source) for source in _sources(recipe)}
    check_sources(recipe, sizes.values(), Data(data, recipe.data_seed))
    job: dict[str, Any] = {"work": "reproduce palrs", "recipe": asdict(replace(recipe, models=()))}
    job["sizes"] = {model: asdict(size) for model, size in sizes.items()}
    for model in sizes:
        loaded = load(model, dtype=recipe.dtype)
        job[f"model {model}"] = describe_model(loaded.model, loaded.tokenizer)
        del loaded
    job["data"] = prints
    job = json.loads(json.dumps(job))
    Checkpoint(out / "steps", lambda: job)  # before any worker: another run in this folder is the user's to know
    (out / "knobs").mkdir(parents=True, exist_ok=True)
    early = list(first_steps(recipe, sizes))
    later = sum(2 + len(recipe.training) * (size.many_seeds + size.seeds) for size in sizes.values())
    total = len(early) + later * len(recipe.domains)
    done: dict[Key, Any] = {}
    with running(workers, Runner, (recipe, sizes, out, data, job)) as run:
        for steps in (lambda: early, lambda: list(later_steps(recipe, sizes, done))):
            for key, record in run(steps()):
                done[key] = record
                progress(len(done), total, " ".join(key))
    return done


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
    if len(set(names)) < len(names):
        raise OptionError(f"A model is named twice: {', '.join(names)}.")
    if workers is not None and workers < 1:
        raise OptionError(f"workers counts from 1; got {workers}.")
    folder, sizes = Path(out), sizes_of(recipe, names, quick=quick)
    kept = len(list(folder.glob("steps/step-*.json")))
    count = workers or usual_workers(names[0], recipe.dtype)
    records = measure(recipe, sizes, folder, Path(data), workers=count, progress=progress)
    evidence = Evidence(records, recipe, sizes, command)
    report = build(evidence, quick=quick, seconds=time.perf_counter() - begun, kept=kept)
    write(report, folder)
    return report


def _sources(recipe: Recipe) -> set[str]:
    domains = recipe.domains.values()
    return {*recipe.guardrails, *(d.pairs for d in domains), *(d.task for d in domains)}


def _fingerprint(data: Path, source: str) -> str:
    """Return the sha256 of the file that a source names; of PrefWorld, which is part of the package, its name."""
    if source.startswith(WORLD):
        return source
    file = data / source.rpartition(":")[2]
    if not file.exists():
        raise OptionError(f"The recipe's {source!r} is not there: no file {str(file)!r}. Name its folder by --data.")
    files = [file] if file.is_file() else sorted(path for path in file.rglob("*") if path.is_file())
    state = hashlib.sha256()
    for path in files:
        state.update(path.read_bytes())
    return state.hexdigest()
