"""What a piece of work costs: seconds of wall time, and the memory that it took beyond what was there before."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_SELF = Path("/proc/self")


@dataclass
class Cost:
    """`seconds` of wall time and `peak_bytes` above the start; None where the platform does not tell.

    On a CUDA device memory is what torch's allocator handed out, elsewhere the resident memory of the whole process.
    Both are known once the work is over.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured() -> Generator[Cost]:
    """Measure the work within.

    >>> with measured() as cost:
    ...     _ = sum(range(1000))
    >>> cost.seconds > 0
    True
    """
    cost, cuda = Cost(), torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _restart_peak()
    begun = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
        cost.peak_bytes = None if before is None or peak is None else max(0, peak - before)


def _restart_peak() -> int | None:
    """Let the kernel count the peak of resident memory anew (proc(5), clear_refs); return the bytes in use now.

    What earlier work has freed goes back to the system first: else the process would keep it, work would use it again,
    and the second of two like jobs would seem to need nothing.
    """
    if sys.platform != "linux":
        return None
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # not granted in every container
        (_SELF / "clear_refs").write_text("5")
        return _status("VmRSS")
    return None


def _status(field: str) -> int | None:
    if sys.platform != "linux":
        return None
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return None
