"""Worker processes with one thread each, which keep what they have loaded and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from trimtab.errors import TrimtabWarning


@contextmanager
def open_pool(
    count: int, initializer: Callable[..., None], arguments: tuple[Any, ...]
) -> Generator[ProcessPoolExecutor]:
    """Yield a pool of `count` processes; each calls `initializer(*arguments)` before its first job.

    They are spawned, so a script that opens a pool needs the usual `if __name__ == "__main__":`. One thread each: two
    processes beat two threads on small matrices. Trimtab's warnings and transformers' remarks are left out there.
    Ctrl-C is told to this process alone, Windows apart, and an exception ends the workers at once, whatever they do.
    """
    context = multiprocessing.get_context("spawn")
    begin = (os.getpid(), initializer, arguments)
    # made outside the block below: it starts multiprocessing's own helper, which lets interrupts through again
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=begin)
    try:
        with _deaf_to_interrupts():
            for _ in range(count):  # a worker begins with each job, as long as none is idle
                pool.submit(os.getpid)
        yield pool
        pool.shutdown()
    except BaseException:
        workers = list((pool._processes or {}).values())  # pyright: ignore[reportPrivateUsage]  # public from Python 3.14
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise


@contextmanager
def _deaf_to_interrupts() -> Generator[None]:
    """Make this thread deaf to Ctrl-C in the block, and processes that it begins there for good."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", TrimtabWarning)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    initializer(*arguments)


def _leave_with(parent: int) -> None:
    """End this worker once the process that began it is gone, killed and so unable to say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
