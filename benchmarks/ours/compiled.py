"""Decoding with a static KV cache under `torch.compile`, steered and not."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks import bare
from benchmarks.models import model_of
from benchmarks.ours.steering import by_row, knob_for
from benchmarks.ways import Action, Way
from trimtab.runtime import Dose, steer


def compiled(options: dict[str, Any]) -> dict[str, Way]:
    """Decode plainly, with one knob at four layers, and with a setting per row; reading the prompt is not timed."""
    model, ids = model_of(options), bare.ids_of(options)
    knob, rows, new = knob_for(model), options["rows"], options["new"]
    step = torch.compile(model, dynamic=False)

    def way(settings: Any) -> Way:
        @contextmanager
        def ready() -> Generator[Action]:
            with steer(model, settings), torch.no_grad():
                cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new + 1)
                first = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                yield lambda: decode(first, cache)

        return ready

    def decode(token: Tensor, cache: Any) -> Tensor:
        tokens = [token]
        for _ in range(new):
            token = step(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            tokens.append(token)
        return torch.cat(tokens, 1)

    settings: dict[str, Dose | list[Dose]] = {"plain": {}, "trimtab": {knob: 1.0}}
    settings["trimtab, a setting per row"] = by_row(knob, rows)
    return {name: way(setting) for name, setting in settings.items()}
