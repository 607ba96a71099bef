"""Trimtab: learn a preference from a few pairs of answers, and turn it like a knob at inference."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.artifact import Knob, Rack, load_knob
    from trimtab.compose import compose
    from trimtab.generate import generate
    from trimtab.learn import learn
    from trimtab.pairs import Pairs
    from trimtab.render import load
    from trimtab.runtime import steer
    from trimtab.train.bipo import learn_vector
    from trimtab.train.steps import learn_lookahead, learn_step
    from trimtab.train.vectors import learn_weights
    from trimtab.tune import tune

__all__ = [
    "Knob",
    "Pairs",
    "Rack",
    "compose",
    "generate",
    "learn",
    "learn_lookahead",
    "learn_step",
    "learn_vector",
    "learn_weights",
    "load",
    "load_knob",
    "steer",
    "tune",
]

# Loaded when asked for, so that `trimtab --help` does not wait for torch.
_HOME = {
    "Knob": "artifact",
    "Pairs": "pairs",
    "Rack": "artifact",
    "compose": "compose",
    "generate": "generate",
    "learn": "learn",
    "learn_lookahead": "train.steps",
    "learn_step": "train.steps",
    "learn_vector": "train.bipo",
    "learn_weights": "train.vectors",
    "load": "render",
    "load_knob": "artifact",
    "steer": "runtime",
    "tune": "tune",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trimtab.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing trimtab/learn.py makes Python put that module at trimtab.learn, where the function belongs.
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
