"""KV caches that several texts go on from: the tokens they begin with are run once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from trimtab.adapter.blocks import rope_types
from trimtab.adapter.calls import CACHE_NAMES, parameters

if TYPE_CHECKING:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from trimtab.adapter.stream import Adapter


def cache_name(adapter: Adapter) -> str | None:
    """Return what the model calls a KV cache that rows can be copied out of; None where it has none of that kind.

    It has to hold keys and values of every token: states of recurrent layers stand for whole rows, padding included,
    and chunks of attention begin at columns, not at positions. Rotary embeddings that depend on the longest position in
    a call would be others for a prompt by itself.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    name = next((name for name in CACHE_NAMES if name in parameters(adapter.decoder)), None)
    config = adapter.text_config
    if name is None or not hasattr(config, "get_text_config") or getattr(config, "attention_chunk_size", None):
        return None
    if rope_types(config) & {"longrope", "dynamic"}:
        return None
    layers = DynamicCache(config=config).layers
    return name if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) else None


def full_cache() -> DynamicCache:
    """Return an empty cache that keeps every token, in layers with a sliding window too: their masks look less far."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def shared_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Return a cache whose rows go on from those of another, in the order of `rows [R]` int64, each as often as named.

    Good for one forward: what a block adds it is given back, behind a copy of its rows, and nothing is kept.
    """
    from transformers.cache_utils import DynamicLayer

    shared: Any = full_cache()
    places: dict[torch.device, Tensor] = {}
    behind = _behind()
    # the blocks above the highest that is read have not run
    shared.layers = [
        behind(head, rows, places) if head.is_initialized else DynamicLayer() for head in cast(Any, cache).layers
    ]
    return shared


@functools.cache
def _behind() -> Callable[[Any, Tensor, dict[torch.device, Tensor]], DynamicLayer]:
    """Make the class once: one made at each call lives until garbage is collected, and its tensors leave holes."""
    from transformers.cache_utils import DynamicLayer

    class Behind(DynamicLayer):
        """What one block has cached: new keys and values are given back behind a copy of their rows, and not kept."""

        def __init__(self, head: Any, rows: Tensor, places: dict[torch.device, Tensor]) -> None:
            super().__init__()
            self._head: tuple[Tensor, Tensor] = head.keys, head.values
            self._rows, self._places = rows, places
            self.keys, self.values, self.is_initialized = head.keys, head.values, True
            self.dtype, self.device = head.keys.dtype, head.keys.device

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if key_states.device not in self._places:  # once, and not at every block: it waits for an accelerator
                self._places[key_states.device] = self._rows.to(key_states.device)
            own = self._places[key_states.device]
            keys, values = (head.index_select(0, own) for head in self._head)
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    return Behind
