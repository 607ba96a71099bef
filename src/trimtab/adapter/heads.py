"""KV caches that several texts go on from: the tokens they begin with are run once, and each text has a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from trimtab.adapter.blocks import rope_types
from trimtab.adapter.calls import CACHE_NAMES, parameters

if TYPE_CHECKING:
    from transformers import DynamicCache

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


def copied_rows(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """Return a new cache with rows of another, in the order of `rows [R]` int64, each as often as it is named."""
    copy, own = full_cache(), rows
    for number, layer in enumerate(cast(Any, cache).layers):
        if layer.is_initialized:  # the blocks above the highest that is read have not run
            own = own.to(layer.keys.device)  # once, unless layers lie on several devices
            copy.update(layer.keys[own], layer.values[own], number)
    return copy
