"""The steps of a reproduction: run here or in worker processes, each kept in the output folder once it is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from trimtab.adapter import Adapter
from trimtab.errors import OptionError, TrimtabError
from trimtab.render import load
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


class Runner(Protocol):
    """What one process works with."""

    def run(self, key: Key, arguments: Any) -> Any:
        """Return a step's record: the one that is kept, or a new one."""
        ...


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


@contextmanager
def running(
    workers: int, make: Callable[..., Runner], begin: tuple[Any, ...]
) -> Generator[Callable[[list[Step]], Iterator[tuple[Key, Any]]]]:
    """Yield what runs a list of steps and yields their records as they come: here, or in worker processes.

    `make(*begin)` makes each process its runner; both are pickled.
    """
    if workers == 1:
        runner = make(*begin)
        yield lambda steps: ((key, runner.run(key, arguments)) for key, arguments in steps)
        return
    with open_pool(workers, _begin, (make, begin)) as pool:

        def run(steps: list[Step]) -> Iterator[tuple[Key, Any]]:
            futures = [pool.submit(_step, key, arguments) for key, arguments in steps]
            try:
                yield from (future.result() for future in as_completed(futures))
            except BrokenProcessPool:
                raise TrimtabError(
                    "A worker process was ended, most likely for want of memory. Finished steps are kept: run the same "
                    "again with one worker, or with smaller sizes in a folder of their own."
                ) from None
            except BaseException:  # what has not begun is not worth waiting for
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield run


# What a worker keeps between steps has to be a global: a pool hands its processes nothing but arguments.
_runner: Runner | None = None


def _begin(make: Callable[..., Runner], begin: tuple[Any, ...]) -> None:
    global _runner
    _runner = make(*begin)


def _step(key: Key, arguments: Any) -> tuple[Key, Any]:
    assert _runner is not None
    return key, _runner.run(key, arguments)
