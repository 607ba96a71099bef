"""Worker processes with one thread each, which keep what they have loaded and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import transformers

from trimtab.errors import TrimtabWarning


def open_pool(count: int, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> ProcessPoolExecutor:
    """Return a pool of `count` processes; each calls `initializer(*arguments)` before its first job.

    They are spawned, so a script that opens a pool needs the usual `if __name__ == "__main__":`. One thread each: two
    processes beat two threads on small matrices. Trimtab's warnings and transformers' bars are left out there.
    """
    context = multiprocessing.get_context("spawn")
    begin = (os.getpid(), initializer, arguments)
    return ProcessPoolExecutor(count, context, initializer=_begin, initargs=begin)


def end_pool(pool: ProcessPoolExecutor) -> None:
    """End the workers at once, whatever they are doing."""
    workers = list((pool._processes or {}).values())  # pyright: ignore[reportPrivateUsage]  # public from Python 3.14
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()


def _begin(parent: int, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", TrimtabWarning)
    transformers.logging.disable_progress_bar()
    initializer(*arguments)


def _leave_with(parent: int) -> None:
    """End this worker once the process that began it is gone, killed and so unable to say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
