"""A worker: holds one case open in its environment, and runs the ways it is told to, a line of JSON for each.

    python -m benchmarks.worker ours 1    (started by `wire.py`; 1 is the number of threads)

Lines that come in: `{"do": "open", "kind": ..., "options": {...}}`, `{"do": "run", "way": ...}`, `{"do": "profile",
"way": ...}` and `{"do": "versions"}`. Each is answered by one line. Whatever else prints goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.ways import Way, measure, peak_mb

PACKAGES = ("torch", "transformers", "numpy", "trimtab", "trl", "repeng", "steering-vectors", "scikit-learn")
LINES = 30
"""Of a profile."""
MESSAGE = 160
"""Letters of an error's first line that are kept."""

Kind = Callable[[dict[str, Any]], Mapping[str, Way]]


def main() -> None:
    """Answer until there is nothing more to read."""
    side, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to standard output too
    torch.set_num_threads(threads)
    worker = Worker(kinds(side))
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


def kinds(side: str) -> Mapping[str, Kind]:
    """Import what an environment can run."""
    if side == "ours":
        from benchmarks.ours import KINDS
    else:
        from benchmarks.peers import KINDS
    return KINDS


class Worker:
    """What is open: a case's ways, on a device."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._ways: Mapping[str, Way] = {}
        self._device = "cpu"

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a line asks for; an error is an answer as well, since a peer may raise anything and that is found."""
        try:
            return getattr(self, f"_{request['do']}")(request)
        except Exception as error:  # noqa: BLE001  # it is handed on
            return {"cannot": told(error)}

    def _versions(self, _request: object) -> dict[str, Any]:
        found: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:3]))}
        for package in PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name()
        return found

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._ways = {}  # what was open before is let go first
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        options = request["options"]
        self._device = options["device"]
        self._ways = self._kinds[request["kind"]](options)
        gc.collect()
        gc.freeze()  # what the imports brought is not looked through again before every run
        return {"ways": [*self._ways], "peak_mb": peak_mb()}

    def _run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return measure(self._ways[request["way"]], self._device)

    def _profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": profiled(self._ways[request["way"]])}


def told(error: Exception) -> str:
    """Return an error's kind and first line, without the paths of this machine."""
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"(?:/[\w.+-]+){2,}", "...", f"{type(error).__name__}: {first}")[:MESSAGE]


def profiled(way: Way) -> str:
    """Run a way once to warm up, once under cProfile, once under torch's profiler; return where the time went."""
    import cProfile
    import io
    import pstats

    from torch.profiler import ProfilerActivity, profile

    with way() as action:
        action()
    calls = cProfile.Profile()
    with way() as action:
        calls.runcall(action)
    text = io.StringIO()
    pstats.Stats(calls, stream=text).strip_dirs().sort_stats("tottime").print_stats(LINES)
    accelerated = torch.cuda.is_available()
    watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerated else [])]
    with way() as action, profile(activities=watched) as found:
        action()
    sort = "self_cuda_time_total" if accelerated else "self_cpu_time_total"
    return f"{text.getvalue()}\n{found.key_averages().table(sort_by=sort, row_limit=LINES)}"


if __name__ == "__main__":
    main()
