"""Several processes that share one job of learning: who reads what, and how the parts come together.

A job is cut into batches that do not depend on how many processes there are, so that any number of them reads the same
batches, and any number can go on from a checkpoint that another number left. `torchrun` starts the processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.errors import OptionError, TrimtabError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """One process among `size` that run the same code on the same job; `rank` counts from 0."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise OptionError(f"Ranks count from 0 to {self.size - 1}; got {self.rank}.")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def takes(self, batch: int) -> bool:
        """Tell whether a batch of the job, by its number, is this process's to run."""
        return batch % self.size == self.rank

    def add(self, part: Tensor) -> Tensor:
        """Add up the parts of all processes, in place; where all but one hold zeros, exactly."""
        if self.size > 1:
            dist.all_reduce(part)
        return part

    def collect(self, part: T) -> list[T]:
        """Return what each process holds, in order of rank; small things only."""
        if self.size == 1:
            return [part]
        parts: list[T | None] = [None] * self.size
        dist.all_gather_object(parts, part)
        return parts  # pyright: ignore[reportReturnType]  # every place has been filled

    def first(self, make: Callable[[], T]) -> T:
        """Call `make` here, after the leader's call has come to its end; where that is an error, everyone has it."""
        if self.size == 1:
            return make()
        made, failed = list[T](), None
        if self.leads:
            try:
                made.append(make())
            except TrimtabError as error:
                failed = error
        told = self.collect(None if failed is None else str(failed))[0]
        if failed is not None:
            raise failed
        if told is not None:
            raise OptionError(told)
        return made[0] if made else make()


ALONE = Team()
"""A process by itself."""


def torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether `torchrun` has started this process as one of several."""
    return environment.get("WORLD_SIZE", "1") not in ("", "1") and "TORCHELASTIC_RUN_ID" in environment


@contextmanager
def open_team(*, minutes: float = 60) -> Generator[Team]:
    """Join the processes that `torchrun` has started, for the time of the context; alone without it.

    Tensors meet over gloo on CPUs and over nccl on GPUs. A process that waits `minutes` for another gives up.
    """
    if not torchrun():
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
