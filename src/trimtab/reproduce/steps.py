"""The steps of a reproduction: run here or in worker processes, each kept in the output folder once it is done."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.adapter import Adapter
from trimtab.checkpoint import Checkpoint, describe_model
from trimtab.errors import OptionError, TrimtabError, TrimtabWarning
from trimtab.render import load
from trimtab.reproduce.data import WORLD
from trimtab.workers import open_pool

Key = tuple[str, ...]
"""Model, kind of step, and what else tells it from others, as in `("prefworld", "steer", "math", "palrs", "100", "0")`:
domain, way to steer, pairs, seed."""
Step = tuple[Key, dict[str, Any]]
"""A key, with what the step needs of earlier ones."""
Progress = Callable[[int, int, str], None]
"""Called with the steps that are done, how many there are, and the last one's name."""
OURS = {"steps", "knobs", "report.json", "report.md", "report.html"}
SMALL = 50_000_000
"""Parameters below which a model is small enough for two processes to beat two threads."""


class StepRunner(ABC):
    """What one process works with: the output folder, whose finished steps are taken as they are."""

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        self.out = out
        self._kept = Checkpoint(out / "steps", lambda: job)

    def run(self, key: Key, arguments: Mapping[str, Any]) -> Any:
        """Return a step's record: the one that is kept, or a new one, whose `warnings` are those of computing it."""

        def compute() -> dict[str, Any]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", TrimtabWarning)
                record = self.compute(key, arguments)
            said = [str(one.message) for one in caught if issubclass(one.category, TrimtabWarning)]
            return record | {"warnings": sorted(set(said))} if said else record

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)  # of a kept step that is damaged: it is computed again
            return self._kept.step(" ".join(key), compute)

    @abstractmethod
    def compute(self, key: Key, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do a step; return its record, of plain JSON values."""


def begin_job(
    out: Path,
    paper: str,
    about: Mapping[str, Any],
    models: Iterable[str],
    dtype: str,
    data: Path,
    sources: Iterable[str],
) -> dict[str, Any]:
    """Return what a run depends on: the recipe with its sizes, `about`, and fingerprints of models and of files.

    Raises `OptionError` where `out` keeps the steps of another run, before any worker has begun.
    """
    job: dict[str, Any] = {"work": f"reproduce {paper}", **about, "data": {s: fingerprint(data, s) for s in sources}}
    for model in models:
        loaded = load(model, dtype=dtype)
        job[f"model {model}"] = describe_model(loaded.model, loaded.tokenizer)
        del loaded
    job = json.loads(json.dumps(job))
    Checkpoint(out / "steps", lambda: job)
    return job


def find_file(data: Path, source: str) -> Path:
    """Return the file, or folder, that a source names below `data`; raises `OptionError` where it is missing."""
    file = data / source.rpartition(":")[2]
    if not file.exists():
        raise OptionError(f"The recipe's {source!r} is not there: no file {str(file)!r}. Name its folder by --data.")
    return file


def fingerprint(data: Path, source: str) -> str:
    """Return the sha256 of the file that a source names; of PrefWorld, which is part of the package, its name."""
    if source.startswith(WORLD):
        return source
    file = find_file(data, source)
    files = [file] if file.is_file() else sorted(path for path in file.rglob("*") if path.is_file())
    state = hashlib.sha256()
    for path in files:
        state.update(path.read_bytes())
    return state.hexdigest()


def check_call(models: Sequence[str], workers: int | None) -> None:
    """Raise `OptionError` for a model that is named twice, and for fewer than one worker."""
    if len(set(models)) < len(models):
        raise OptionError(f"A model is named twice: {', '.join(models)}.")
    if workers is not None and workers < 1:
        raise OptionError(f"workers counts from 1; got {workers}.")


def refuse_strangers(out: Path) -> None:
    """Raise `OptionError` where the output folder holds what no reproduction wrote."""
    strangers = sorted(path.name for path in out.iterdir() if path.name not in OURS) if out.is_dir() else []
    if strangers:
        raise OptionError(f"{str(out)!r} holds other files, {strangers[0]!r} for one. Pass a folder of its own.")


def usual_workers(model: str, dtype: str) -> int:
    """Return two processes, each with a thread, for a small model on a CPU, and one for any other."""
    loaded = load(model, dtype=dtype).model
    small = sum(p.numel() for p in loaded.parameters()) < SMALL and Adapter(loaded).input_device.type == "cpu"
    return min(2, os.cpu_count() or 1) if small else 1


def run_waves(
    workers: int,
    make: Callable[..., StepRunner],
    begin: tuple[Any, ...],
    waves: Callable[[Mapping[Key, Any]], Iterator[list[Step]]],
    total: int,
    progress: Progress,
) -> dict[Key, Any]:
    """Run all steps, about `total` of them; return their records by key.

    `waves(done)` yields lists of steps, each of which may need the records of those before it, in `done`.
    `make(*begin)` makes each process its runner; both are pickled.
    """
    done: dict[Key, Any] = {}
    with _running(workers, make, begin) as run:
        for steps in waves(done):
            for key, record in run(steps):
                done[key] = record
                progress(len(done), max(total, len(done)), " ".join(key))
    return done


@contextmanager
def _running(
    workers: int, make: Callable[..., StepRunner], begin: tuple[Any, ...]
) -> Generator[Callable[[list[Step]], Iterator[tuple[Key, Any]]]]:
    """Yield what runs a list of steps and yields their records as they come: here, or in worker processes."""
    if workers == 1:
        runner = make(*begin)
        yield lambda steps: ((key, runner.run(key, arguments)) for key, arguments in steps)
        return
    # a step is kept whole or not at all, so that workers can be ended within one
    with open_pool(workers, _begin, (make, begin)) as pool:

        def run(steps: list[Step]) -> Iterator[tuple[Key, Any]]:
            try:
                futures = [pool.submit(_step, key, arguments) for key, arguments in steps]
                yield from (future.result() for future in as_completed(futures))
            except BrokenProcessPool:
                raise TrimtabError(
                    "A worker process was ended, most likely for want of memory. Finished steps are kept: run the same "
                    "again with one worker, or with smaller sizes in a folder of their own."
                ) from None

        yield run


# What a worker keeps between steps has to be a global: a pool hands its processes nothing but arguments.
_runner: StepRunner | None = None


def _begin(make: Callable[..., StepRunner], begin: tuple[Any, ...]) -> None:
    global _runner
    _runner = make(*begin)


def _step(key: Key, arguments: Any) -> tuple[Key, Any]:
    assert _runner is not None
    return key, _runner.run(key, arguments)
