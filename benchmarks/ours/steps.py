"""Steered generation, the ways taking turns at every token: what slows the machine down slows all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from benchmarks import bare
from benchmarks.models import model_of
from benchmarks.ours.steering import baked_copy, by_row, knob_for
from benchmarks.ways import Way, directly
from trimtab.adapter import Adapter, cache_name, full_cache
from trimtab.runtime import steer

Run = tuple[Any, Callable[[], AbstractContextManager[object]]]
"""A model, and the context in which it generates."""


def stepping(options: dict[str, Any]) -> dict[str, Way]:
    """Generate as `benchmarks.ours.steering.generating` does, but by the model alone, and token by token in turn."""
    model = model_of(options)
    knob, rows = knob_for(model), options["rows"]
    one, other, baked = deepcopy(model), deepcopy(model), baked_copy(model, knob, options["device"])
    runs: dict[str, Run] = {
        "plain": (model, nullcontext),
        "trimtab": (one, lambda: steer(one, {knob: 1.0})),
        "trimtab, a setting per row": (other, lambda: steer(other, by_row(knob, rows))),
        "trimtab, baked": (baked, nullcontext),
    }
    turns = Turns(runs, bare.ids_of(options), options["new"])
    return {name: directly(lambda name=name: turns.seconds(name)) for name in runs}


class Turns:
    """Runs all ways together, and tells the seconds of each when it is asked for.

    Each way has a copy of the model of its own, since hooks act on the whole model. At each run the weights that all
    have in common change places among the copies, and at each token the ways their order, so that neither favours a
    way. For processors: nothing here waits for an accelerator.
    """

    def __init__(self, runs: Mapping[str, Run], ids: Tensor, new: int) -> None:
        models = [model for model, _ in runs.values()]
        plain = dict(models[0].named_parameters())
        self._weights = [[model.get_parameter(name) for model in models] for name in plain]
        for copies in self._weights:
            assert all(torch.equal(copy, copies[0]) for copy in copies), "baking changed a weight of the plain model"
        name = cache_name(Adapter(models[0]))
        assert name is not None
        self._cache_name = name
        self._runs, self._ids, self._new = runs, ids, new
        self._clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # as `State.clock`
        self._found: dict[str, float] = {}

    def seconds(self, name: str) -> float:
        """Return a way's seconds in the latest run; asked for the second time, all ways are run again."""
        if name not in self._found:
            self._run()  # the first run in a process is slower
            self._found = self._run()
        return self._found.pop(name)

    @torch.no_grad()
    def _run(self) -> dict[str, float]:
        for copies in self._weights:
            shuffled = random.sample([copy.data for copy in copies], len(copies))
            for copy, data in zip(copies, shuffled, strict=True):
                copy.data = data
        taken: dict[str, list[Tensor]] = {name: [] for name in self._runs}
        found = dict.fromkeys(self._runs, 0.0)
        with ExitStack() as exits:
            ways = [
                (name, exits.enter_context(closing(self._generate(model, context, taken[name]))))
                for name, (model, context) in self._runs.items()
            ]
            for _ in range(self._new + 1):  # the last turn is the end of the context
                for name, way in random.sample(ways, len(ways)):
                    begun = self._clock()
                    next(way, None)
                    found[name] += self._clock() - begun
        _check({name: torch.cat(ids, dim=1) for name, ids in taken.items()})
        return found

    def _generate(
        self, model: Any, context: Callable[[], AbstractContextManager[object]], taken: list[Tensor]
    ) -> Generator[None]:
        """Take the likeliest token again and again, with a KV cache; stop after each."""
        ids, mask = self._ids, torch.ones_like(self._ids)
        given: dict[str, Any] = {"use_cache": True, self._cache_name: full_cache(), "logits_to_keep": 1}
        with context():
            for _ in range(self._new):
                logits: Tensor = model(input_ids=ids, attention_mask=mask, **given).logits
                ids = logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                taken.append(ids)
                yield


def _check(found: Mapping[str, Tensor]) -> None:
    """Make sure that ways that steer did so: the same tokens as the baked model, up to rounding, and not plain ones."""
    plain, steered, baked = (found[name] for name in ("plain", "trimtab", "trimtab, baked"))
    if torch.equal(plain, steered):
        raise RuntimeError("The steered model came to the tokens of the plain one.")
    if (steered == baked).float().mean() < 0.5:
        raise RuntimeError("The baked model came to other tokens than the steered one.")
