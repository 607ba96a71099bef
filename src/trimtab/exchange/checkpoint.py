"""A setting written into a model's own weights: vectors as biases where that is exact, differences of weights added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.artifact import model_identity
from trimtab.errors import KnobError
from trimtab.exchange.bias import find_place, probe_ids, with_bias
from trimtab.exchange.constant import Constant, new_folder, write_record
from trimtab.render import load, model_class
from trimtab.runtime import Dose, steer
from trimtab.weights.live import applied

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ROWS, TOKENS = 4, 24
"""Of the comparison of what was written with what was meant."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference of logits, as a share of their length: a sum is rounded in another order than by hooks."""


class Compared(NamedTuple):
    """Logits of what was written beside those of hooks, over random tokens."""

    error: float
    """Length of the difference over the length of the logits."""
    largest: float
    """Largest difference of a logit."""
    effect: float
    """Length of what the knobs change over the length of the logits."""
    same_tokens: float
    """Share of positions at which the same token is the likeliest."""


def write_checkpoint(
    folder: Path, found: Constant, dose: Dose, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Compared:
    """Write a model folder that needs no Trimtab, load it again, and compare it with the steered model.

    Memory: the model, a copy of what changes in it, and while it is compared a second model. Raises `KnobError` where a
    vector has no bias that could stand for it, and where the loaded model is not the steered one; nothing is left then.
    """
    config, biases = _biases(found, Adapter(model))
    with new_folder(folder) as made:
        _write(made, found, biases, config, model)
        tokenizer.save_pretrained(made)
        write_record(made, dose, str(model_identity(model, hashes=False)["model"]))
        device = str(Adapter(model).input_device)
        return compare(model, dose, lambda: load(made, dtype=model.dtype, device=device).model)


def _biases(found: Constant, adapter: Adapter) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Return the configuration, and the parameters that a plain copy of the model lacks or has otherwise."""
    config: Any = adapter.model.config
    if not found.addends:
        return config, {}
    if getattr(config, "quantization_config", None) is not None:
        raise KnobError("This model is quantised, so that its layers cannot be given a bias. Load it as it was before.")
    places = {layer: find_place(adapter, layer) for layer in found.addends}
    config, extra = with_bias(config, [place.module for place in places.values()])
    own = dict(adapter.model.named_parameters(remove_duplicate=False))
    for layer, place in places.items():
        name = f"{place.module}.bias"
        before = own[name].detach().float().cpu() if name in own else extra[name]
        extra[name] = before + found.addends[layer] / place.factor
    dtype: Any = adapter.model.dtype
    for name, tensor in extra.items():
        extra[name] = tensor.to(dtype)
        if not bool(torch.isfinite(extra[name]).all()):
            raise KnobError(f"{name!r} would hold values that are not finite in {dtype}.")
    return config, extra


def _write(
    folder: Path, found: Constant, biases: dict[str, Tensor], config: PretrainedConfig, model: PreTrainedModel
) -> None:
    with ExitStack() as stack:
        if found.weights:
            stack.enter_context(applied(model, found.weights))
        state = {**model.state_dict(), **biases}
        model.save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(config)
    config.architectures = [model_class(config)._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)


@torch.no_grad()
def compare(model: PreTrainedModel, dose: Dose, written: Callable[[], nn.Module]) -> Compared:
    """Put the logits of what was written, once it is loaded, beside those of the model under hooks.

    Raises `KnobError` where they differ by more than rounding.
    """
    adapter = Adapter(model)
    ids = probe_ids(adapter, ROWS, TOKENS)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    bare = _logits(model, inputs)
    with steer(model, dose, prompt_lengths=[TOKENS] * ROWS):
        wanted = _logits(model, inputs)
    got = _logits(written(), inputs)
    length = float(wanted.norm())
    found = Compared(
        error=float((got - wanted).norm()) / length,
        largest=float((got - wanted).abs().max()),
        effect=float((wanted - bare).norm()) / length,
        same_tokens=float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
    )
    if not found.error <= TOLERANCES[model.dtype]:
        raise KnobError(
            f"What was written is not the steered model: its logits differ by {found.error:.2g} of their length, where "
            f"{TOLERANCES[model.dtype]:g} is rounding in {model.dtype}. Nothing was kept."
        )
    return found


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits.float().cpu()
