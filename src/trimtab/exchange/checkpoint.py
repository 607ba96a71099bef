"""A setting written into a model's own weights: vectors as biases where that is exact, differences of weights added."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.artifact import model_identity
from trimtab.errors import KnobError, TrimtabWarning
from trimtab.exchange.bias import Place, find_place, probe_ids, with_bias
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

    Every parameter of what was written must be what was meant, bit for bit, and its logits those of hooks, within
    rounding. Memory: the model, a copy of what changes in it, and meanwhile a second model. Raises `KnobError` where a
    vector has no bias that could stand for it, and where the loaded model is not the steered one; nothing is left then.
    """
    adapter = Adapter(model)
    check_dtype(model)
    if next(model.parameters()).is_meta:
        raise KnobError("A checkpoint is written of a model's weights, and this model has none. Load them.")
    places = {layer: find_place(adapter, layer) for layer in found.addends}
    config, zeros = with_bias(model.config, [place.module for place in places.values()])
    with new_folder(folder) as made, ExitStack() as stack:
        if found.weights:
            stack.enter_context(applied(model, found.weights))
        state = {**model.state_dict(), **_biases(found, places, zeros, model)}
        model.save_pretrained(made, state_dict=dict(state))  # which empties it
        _config_of(config, model).save_pretrained(made)
        tokenizer.save_pretrained(made)
        write_record(made, dose, str(model_identity(model, hashes=False)["model"]))
        written = load(made, dtype=model.dtype, device=str(adapter.input_device)).model
        for name, parameter in written.named_parameters():
            if not torch.equal(parameter, state[name].to(parameter.device)):
                raise KnobError(f"{name!r} was written otherwise than it was meant. Nothing was kept.")
        stack.close()  # hooks turn weights themselves
        return compare(model, dose, written)


def _biases(
    found: Constant, places: Mapping[int, Place], zeros: Mapping[str, Tensor], model: PreTrainedModel
) -> dict[str, Tensor]:
    """Return the parameters that a plain copy of the model, as it stands, lacks or has otherwise."""
    own, extra = dict(model.named_parameters(remove_duplicate=False)), dict(zeros)
    for layer, place in places.items():
        name = f"{place.module}.bias"
        before = own[name].detach().float().cpu() if name in own else extra[name]
        extra[name] = before + found.addends[layer] / place.factor
    for name, tensor in extra.items():
        extra[name] = tensor.to(model.dtype)
        if not bool(torch.isfinite(extra[name]).all()):
            raise KnobError(f"{name!r} would hold values that are not finite in {model.dtype}.")
    return extra


def _config_of(config: PretrainedConfig, model: PreTrainedModel) -> PretrainedConfig:
    """Return a configuration that says which class and dtype it is of."""
    own = copy.deepcopy(config)
    same = type(config) is type(model.config)
    own.architectures = [type(model).__name__ if same else model_class(config)._model_mapping[type(config)].__name__]
    own.dtype = model.dtype
    return own


def check_dtype(model: PreTrainedModel) -> None:
    """Raise `KnobError` for a model whose logits cannot be compared."""
    if model.dtype not in TOLERANCES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
        raise KnobError(f"This model computes in {model.dtype}; what is written is compared in {known}. Load it so.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise KnobError("This model is quantised, and what is added to it would be too. Load it as it was before.")


@torch.no_grad()
def compare(model: PreTrainedModel, dose: Dose, written: nn.Module) -> Compared:
    """Put the logits of what was written beside those of the model under hooks.

    Raises `KnobError` where they differ by more than rounding. Warns where rounding is as large as what the knobs do,
    so that the comparison shows little.
    """
    adapter = Adapter(model)
    ids = probe_ids(adapter, ROWS, TOKENS)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    bare = _logits(model, inputs)
    with steer(model, dose, prompt_lengths=[TOKENS] * ROWS):
        wanted = _logits(model, inputs)
    got = _logits(written, inputs)
    if not bool(wanted.isfinite().all() and got.isfinite().all() and wanted.any()):
        raise KnobError("At these strengths the model's logits are not finite, or all 0. Take smaller ones.")
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
    if found.error > found.effect / 4:
        warnings.warn(
            f"The knobs change the logits by {found.effect:.2g} of their length, and what was written differs by "
            f"{found.error:.2g}: in {model.dtype} so small a dose drowns in rounding. Load the model in float32.",
            TrimtabWarning,
            stacklevel=4,
        )
    return found


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits.float().cpu()
