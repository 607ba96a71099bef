"""What is measured: a way is a context that makes ready and gives what is to be timed."""

from __future__ import annotations

import gc
import hashlib
import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

Action = Callable[[], object]
Way = Callable[[], AbstractContextManager[Action]]


def directly(action: Action) -> Way:
    """Make a way of what needs nothing made ready."""

    @contextmanager
    def way() -> Generator[Action]:
        yield action

    return way


def measure(way: Way, device: str) -> dict[str, Any]:
    """Run a way once: seconds of processor and wall clock, the most memory so far, and a mark of what came out.

    What a way returns is a tensor of tokens, of which a hash is kept; or a number, which is taken in place of the
    seconds, such as what another process has measured of itself; or nothing.
    """
    gc.collect()
    accelerated = device.startswith("cuda")
    with way() as action:
        if accelerated:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        cpu, wall = cpu_seconds(), time.perf_counter()
        value = action()
        if accelerated:
            torch.cuda.synchronize()
        found: dict[str, Any] = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
        if accelerated:
            found["device_mb"] = torch.cuda.max_memory_allocated() / 1e6
    found["peak_mb"] = peak_mb()
    if isinstance(value, Tensor):
        found["check"] = hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()[:12]
    elif isinstance(value, float):
        found |= {"cpu": value, "wall": value}
    return found


def cpu_seconds() -> float:
    """Return the processor seconds of this process, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_mb() -> float:
    """Return the most memory this process has held, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
