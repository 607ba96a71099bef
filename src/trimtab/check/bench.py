"""A model with what every check needs: random rows of tokens, knobs, and ways to run it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from trimtab.adapter import CACHE_NAMES, Adapter
from trimtab.artifact import Knob
from trimtab.errors import AdapterError
from trimtab.ops import Side, pad_rows
from trimtab.types import Site, Where

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (7, 4, 1)
NEW = 3
"""Tokens generated, or forced, after prompts of `LENGTHS` tokens."""


@dataclass
class Bench:
    """A model with what every check needs."""

    adapter: Adapter
    model: PreTrainedModel
    rows: list[list[int]]
    new: Tensor  # [B, NEW]
    norms: dict[int, float] = field(default_factory=dict[int, float])

    @property
    def middle(self) -> int:
        """A layer with others above and below it."""
        return self.adapter.n_layers // 2

    @property
    def tolerance(self) -> float:
        """Largest difference of logits, as a share of their spread, that rounding explains."""
        return {torch.float32: 1e-3, torch.float64: 1e-6}.get(self.adapter.dtype, 0.1)

    def knob(self, layer: int, where: Where = "all", *, seed: int = 0, gain: float = 0.5) -> Knob:
        """Return a knob with a random vector, as long at strength 1 as `gain` mean residual norms of the layer."""
        vector = torch.randn(self.adapter.hidden_size, generator=torch.Generator().manual_seed(seed))
        site, name = Site(layer, "last"), f"check-{layer}-{seed}"
        norms = {layer: self.norms.get(layer, 1.0)}
        return Knob(name=name, method="random", vectors={site: vector}, norms=norms, site=site, gain=gain, where=where)

    def pad(self, rows: Sequence[Sequence[int]], side: Side = "left") -> dict[str, Tensor]:
        """Pad rows; positions count real tokens, as models with absolute positions need."""
        inputs, known = pad_rows(rows, side=side, value=0)._asdict(), self.parameters
        return {name: value.to(self.adapter.input_device) for name, value in inputs.items() if name in known}

    @property
    def parameters(self) -> set[str]:
        """Names of what the model's `forward` takes."""
        names = set(inspect.signature(self.model.forward).parameters)
        # what wraps a model may hand everything on
        return names if "input_ids" in names else {"input_ids", "attention_mask", "position_ids", "use_cache"}

    def logits(self, rows: Sequence[Sequence[int]], side: Side = "left") -> list[Tensor]:
        """Logits of whole rows without a cache, `[T, V]` float32 each, padding left out."""
        inputs = self.pad(rows, side)
        off = {"use_cache": False} if "use_cache" in self.parameters else {}
        out: Tensor = self.model(**inputs, **off).logits.float()
        width = out.shape[1]
        starts = [width - len(row) if side == "left" else 0 for row in rows]
        return [out[i, start : start + len(row)] for i, (row, start) in enumerate(zip(rows, starts, strict=True))]

    def generate(self, rows: Sequence[Sequence[int]], **options: Any) -> Tensor:
        """Return the `NEW` tokens `[B, NEW]` that the model says after left-padded prompts, greedily."""
        inputs = {name: value for name, value in self.pad(rows).items() if name != "position_ids"}
        run = cast(Callable[..., Tensor], self.model.generate)
        return run(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None, **options)[
            :, max(map(len, rows)) :
        ]

    def next(self, out: Any, token: Tensor, past: int) -> dict[str, Any]:
        """Return the arguments of a decode step after an output."""
        cache = next(((name, value) for name, value in out.items() if name in CACHE_NAMES and value is not None), None)
        if cache is None:
            raise AdapterError(f"The model returns no KV cache ({', '.join(CACHE_NAMES)}) to go on with.")
        step: dict[str, Any] = {"input_ids": token, "position_ids": torch.tensor([[past]], device=token.device)}
        step = {name: value for name, value in step.items() if name in self.parameters}
        return {**step, cache[0]: cache[1], "use_cache": True}
