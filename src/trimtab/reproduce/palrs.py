"""PaLRS (arXiv:2509.23982) re-measured: which steps there are, in which order, and how workers share and keep them."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimtab.checkpoint import Checkpoint, describe_model
from trimtab.render import load
from trimtab.reproduce import cells
from trimtab.reproduce.bench import Bench
from trimtab.reproduce.recipe import Recipe, Sizes
from trimtab.workers import open_pool

Progress = Callable[[int, int, str], None]
Key = tuple[str, ...]
"""Model, kind of step, domain and what else tells it from others, as in `("prefworld", "steer", "math", "palrs", "100",
"0")`: way to steer, pairs, seed."""
Step = tuple[Key, dict[str, Any]]


class Runner:
    """What one process works with: the recipe, the folder, and a bench for each model that it was asked about."""

    def __init__(self, recipe: Recipe, sizes: Sizes, out: Path, job: Mapping[str, Any]) -> None:
        self.recipe, self.sizes, self.out = recipe, sizes, out
        self._kept = Checkpoint(out / "steps", lambda: job)
        self._benches: dict[str, Bench] = {}

    def run(self, key: Key, arguments: Mapping[str, Any]) -> Any:
        """Return a step's record: the one that is kept, or a new one."""
        return self._kept.step(" ".join(key), lambda: self._compute(key, arguments))

    def _compute(self, key: Key, arguments: Mapping[str, Any]) -> Any:
        model, kind, name, *rest = key
        if model not in self._benches:
            self._benches[model] = Bench(model, self.recipe, self.sizes)
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
            controls = rest[0] == self.recipe.main and n == self.sizes.pairs
            return cells.steered(bench, domain, way, n, seed, knob_file(self.out, key), controls=controls)
        file = knob_file(self.out, (model, "steer", name, rest[0], str(self.sizes.pairs), "0"))
        if kind == "dose":
            return cells.dose(bench, domain, file)
        if kind == "map":
            return cells.site_map(bench, domain, way, file)
        assert kind == "naive", kind
        return cells.chosen_on_test(bench, domain, way)


def knob_file(out: Path, key: Key) -> Path:
    """Return where a step keeps its knob."""
    return out / "knobs" / f"{'-'.join(part.replace('/', '-') for part in key)}.knob.safetensors"


def first_steps(recipe: Recipe, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Key]:
    """Yield the steps that need no other, the long ones first."""
    for model in models:
        for domain in recipe.domains:
            for name in recipe.training:
                for n in (sizes.many_pairs, sizes.pairs):
                    yield model, "grid", domain, name, str(n)
    for model in models:
        for domain in recipe.domains:
            yield model, "base", domain
            yield model, "naive", domain, recipe.main
            for seed in range(sizes.seeds):
                yield model, "examples", domain, str(seed)
                for name in recipe.steering:
                    yield model, "steer", domain, name, str(sizes.pairs), str(seed)
            for n in sizes.counts:
                for seed in range(sizes.count_seeds):
                    yield model, "steer", domain, recipe.main, str(n), str(seed)


def later_steps(recipe: Recipe, sizes: Sizes, models: tuple[str, ...], done: Mapping[Key, Any]) -> Iterator[Step]:
    """Yield the steps that need the settings of a grid, or a knob; curves of a refused knob are left out."""
    for model in models:
        for domain in recipe.domains:
            for name in recipe.training:
                for n, seeds in ((sizes.many_pairs, sizes.many_seeds), (sizes.pairs, sizes.seeds)):
                    chosen = done[model, "grid", domain, name, str(n)]["record"]["chosen"]
                    for seed in range(seeds):
                        setting = (chosen["learning_rate"], chosen["beta"])
                        yield (model, "train", domain, name, str(n), str(seed)), {"setting": setting}
            if "refused" not in done[model, "steer", domain, recipe.main, str(sizes.pairs), "0"]:
                yield (model, "dose", domain, recipe.main), {}
                yield (model, "map", domain, recipe.main), {}


def measure(
    recipe: Recipe,
    models: tuple[str, ...],
    out: Path,
    *,
    quick: bool,
    workers: int,
    progress: Progress,
) -> tuple[dict[Key, Any], dict[str, Any]]:
    """Run every step that `out` does not keep yet; return all records by key, and what they depend on."""
    sizes = recipe.quick if quick else recipe.sizes
    job: dict[str, Any] = {"work": "reproduce palrs", "recipe": asdict(replace(recipe, models=models)), "quick": quick}
    for model in models:
        loaded = load(model, dtype=recipe.dtype)
        job[f"model {model}"] = describe_model(loaded.model, loaded.tokenizer)
        del loaded
    job = json.loads(json.dumps(job))
    (out / "knobs").mkdir(parents=True, exist_ok=True)
    early: list[Step] = [(key, {}) for key in first_steps(recipe, sizes, models)]
    later = len(recipe.domains) * len(models) * (2 + len(recipe.training) * (sizes.many_seeds + sizes.seeds))
    done: dict[Key, Any] = {}
    with _running(workers, (recipe, sizes, out, job)) as run:
        for steps in (lambda: early, lambda: list(later_steps(recipe, sizes, models, done))):
            for key, record in run(steps()):
                done[key] = record
                progress(len(done), len(early) + later, " ".join(key))
    return done, job


@contextmanager
def _running(workers: int, begin: tuple[Any, ...]) -> Generator[Callable[[list[Step]], Iterator[tuple[Key, Any]]]]:
    """Yield what runs a list of steps and yields their records as they come: here, or in worker processes."""
    if workers == 1:
        runner = Runner(*begin)
        yield lambda steps: ((key, runner.run(key, arguments)) for key, arguments in steps)
        return
    with open_pool(workers, _begin, begin) as pool:

        def run(steps: list[Step]) -> Iterator[tuple[Key, Any]]:
            futures = [pool.submit(_step, key, arguments) for key, arguments in steps]
            try:
                yield from (future.result() for future in as_completed(futures))
            except BaseException:  # what has not begun is not worth waiting for
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield run


# What a worker keeps between steps has to be a global: a pool hands its processes nothing but arguments.
_runner: Runner | None = None


def _begin(recipe: Recipe, sizes: Sizes, out: Path, job: Mapping[str, Any]) -> None:
    global _runner
    _runner = Runner(recipe, sizes, out, job)


def _step(key: Key, arguments: Mapping[str, Any]) -> tuple[Key, Any]:
    assert _runner is not None
    return key, _runner.run(key, arguments)
