"""Steered generation, the ways taking turns at every token: what slows the machine down slows all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
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

Setting = tuple[Any, Callable[[], AbstractContextManager[object]]]
"""A model, and the context in which it generates."""


def stepping(options: dict[str, Any]) -> dict[str, Way]:
    """Generate as `benchmarks.ours.steering.generating` does, but by the model alone, and token by token in turn."""
    model = model_of(options)
    knob, rows = knob_for(model), options["rows"]
    one, other, baked = deepcopy(model), deepcopy(model), baked_copy(model, knob, options["device"])
    settings: dict[str, Setting] = {
        "plain": (model, nullcontext),
        "trimtab": (one, lambda: steer(one, {knob: 1.0})),
        "trimtab, a setting per row": (other, lambda: steer(other, by_row(knob, rows))),
        "trimtab, baked": (baked, nullcontext),
    }
    turns = Turns(settings, bare.ids_of(options), options["new"])
    return {name: directly(lambda name=name: turns.seconds(name)) for name in settings}


class Turns:
    """Runs all ways together, and then tells the seconds of each when it is asked for.

    Each way has a copy of the model of its own, since hooks act on the whole model. Which of the copies in memory a
    weight is, and the order of the ways at each token, are drawn anew, so that neither favours a way.
    """

    def __init__(self, settings: dict[str, Setting], ids: Tensor, new: int) -> None:
        self._settings, self._ids, self._new = settings, ids, new
        self._clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self._found: dict[str, float] = {}

    def seconds(self, name: str) -> float:
        """Return the seconds of a way in a run whose other ways are not asked for again before the next run."""
        if name not in self._found:
            self._run()  # the first run in a process is slower
            self._found = self._run()
        return self._found.pop(name)

    @torch.no_grad()
    def _run(self) -> dict[str, float]:
        self._change_places()
        ways = [(name, self._generate(*setting)) for name, setting in self._settings.items()]
        found = dict.fromkeys(self._settings, 0.0)
        for _ in range(self._new + 1):  # what ends with the context is the last turn
            for name, way in random.sample(ways, len(ways)):
                begun = self._clock()
                next(way, None)
                found[name] += self._clock() - begun
        return found

    def _change_places(self) -> None:
        models = [model for model, _ in self._settings.values()]
        for name, _ in models[0].named_parameters():
            copies = [model.get_parameter(name) for model in models]
            for copy, data in zip(copies, random.sample([copy.data for copy in copies], len(copies)), strict=True):
                copy.data = data

    def _generate(self, model: Any, setting: Callable[[], AbstractContextManager[object]]) -> Generator[None]:
        """Take the likeliest token again and again, with a KV cache; stop after each."""
        name = cache_name(Adapter(model))
        assert name is not None
        cache, ids = full_cache(), self._ids
        with setting():
            for _ in range(self._new):
                logits: Tensor = model(input_ids=ids, use_cache=True, **{name: cache}).logits
                ids = logits[:, -1:].argmax(-1)
                yield
