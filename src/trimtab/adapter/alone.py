"""One block by itself, in a dtype of one's choice, on what the model calls it with: for trying things on a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trimtab.adapter.aside import hidden_of
from trimtab.adapter.stream import Adapter


class Alone(NamedTuple):
    """A copy of a block, and what runs it and returns its output `[B, T, D]`."""

    block: nn.Module
    run: Callable[[], Tensor]


@torch.no_grad()
def block_alone(adapter: Adapter, layer: int, dtype: torch.dtype, **inputs: object) -> Alone:
    """Copy block `layer` to `dtype`, with what the model calls it with on `inputs`; the model is left as it was.

    Memory: the block once more.
    """
    block = adapter.blocks[adapter.layer(layer)]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        adapter.run_to(layer, **inputs)
    finally:
        handle.remove()
    args, kwargs = _to(calls[0], dtype)
    own = copy.deepcopy(block).to(dtype)

    @torch.no_grad()
    def run() -> Tensor:
        return hidden_of(own(*args, **kwargs))

    return Alone(own, run)


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Convert the floating tensors among arguments."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_to(item, dtype) for item in cast(tuple[Any, ...] | list[Any], value))
    if isinstance(value, Mapping):
        return {name: _to(item, dtype) for name, item in cast(Mapping[str, Any], value).items()}
    return value
