"""Weight knobs: dense ones put in and taken out, beside a copy; low-rank ones with another mixture in every row."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks import bare
from benchmarks.models import model_of, prompts
from benchmarks.ours.steering import knob_of
from benchmarks.ways import Action, Way
from trimtab.artifact import DeltaKnob, LowRank
from trimtab.artifact.parts import Part
from trimtab.runtime import Dose, steer
from trimtab.weights.live import applied

RANKS, COUNTS = (8, 16, 64), (1, 4)


def weight_knob(model: nn.Module, make: Callable[[torch.Size], Part], name: str) -> DeltaKnob:
    """Make a random knob on every matrix of the blocks."""
    matrices = {n: p.shape for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
    return DeltaKnob(name, "random", {n: make(shape) for n, shape in matrices.items()})


def thin(rank: int) -> Callable[[torch.Size], Part]:
    """Return what makes a small random part of a rank."""
    return lambda shape: LowRank(0.01 * torch.randn(rank, shape[1]), 0.01 * torch.randn(shape[0], rank))


def fresh_memory() -> None:
    """Give freed memory back, so that what comes next gets pages it has not used, as at its first time."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def dense(options: dict[str, Any]) -> dict[str, Way]:
    """Clone the touched weights once; put a dense knob into them and take it out, which must leave every bit."""
    model = model_of(options)
    stored = getattr(torch, options["stored"])
    knob = weight_knob(model, lambda shape: (0.01 * torch.randn(shape)).to(stored), "dense")
    touched = [model.get_parameter(name).detach() for name in knob.parts]
    before = [weight.double().sum() for weight in touched]

    @contextmanager
    def clone() -> Generator[Action]:
        if options["fresh"]:
            fresh_memory()
        yield lambda: [weight.clone() for weight in touched] and None

    def there_and_back() -> None:
        with applied(model, {knob: 0.7}):
            pass

    @contextmanager
    def turn() -> Generator[Action]:
        if options["fresh"]:
            fresh_memory()
        yield there_and_back
        if any(weight.double().sum() != sum_ for weight, sum_ in zip(touched, before, strict=True)):
            raise RuntimeError("The weights did not come back.")

    return {"clone": clone, "put in and taken out": turn}


def low_rank(options: dict[str, Any]) -> dict[str, Way]:
    """Read a prompt, or decode, in batches whose rows all have another mixture of low-rank knobs."""
    torch.manual_seed(0)
    model = model_of(options)
    depth, width, rows = model.config.num_hidden_layers, model.config.hidden_size, options["rows"]
    steering = [knob_of({layer: torch.randn(width)}, f"way{layer}") for layer in range(depth)]
    turned: dict[str, Sequence[Any]] = {"steering at every layer": steering}
    for count in COUNTS:
        for rank in RANKS:
            knobs = [weight_knob(model, thin(rank), f"k{i}") for i in range(count)]
            turned[f"{count} of rank {rank}"] = knobs
    ids = prompts(rows, options["prompt"], options["device"])

    def way(settings: list[Dose]) -> Way:
        @contextmanager
        def ready() -> Generator[Action]:
            with steer(model, settings):
                if options["new"]:
                    yield lambda: bare.generate(model, ids, options["new"])
                else:
                    yield lambda: bare.score(model, ids)

        return ready

    found: dict[str, Way] = {"plain": way([{}] * rows)}
    for name, knobs in turned.items():
        found[name] = way([{knob: 0.5 + row / rows + i for i, knob in enumerate(knobs)} for row in range(rows)])
    return found
