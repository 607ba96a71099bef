"""Low-rank weight knobs, and vectors, as PEFT keeps LoRA adapters: a folder with a configuration and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.artifact import DeltaKnob
from trimtab.artifact.parts import LowRank, Part, joined, scaled
from trimtab.errors import KnobError
from trimtab.exchange.bias import find_place
from trimtab.weights.rows import is_linear
from trimtab.weights.source import ADAPTER

PREFIX = "base_model.model."


def low_rank_sum(weights: Mapping[DeltaKnob, float], model: nn.Module) -> dict[str, LowRank]:
    """Return what weight knobs add at their strengths, by parameter; exact, since ranks lie side by side.

    Raises `KnobError` for a dense part, and for a weight that is no linear layer's.
    """
    total: dict[str, Part] = {}
    for knob, strength in weights.items():
        for name, part in knob.parts.items():
            if not isinstance(part, LowRank):
                raise KnobError(
                    f"Knob {knob.name!r} changes {name!r} by a dense difference, which an adapter has no room for. "
                    "Compress it first (trimtab.weights.compress), which says what is lost; or export a checkpoint."
                )
            if not is_linear(model, name):
                raise KnobError(
                    f"Knob {knob.name!r} changes {name!r}, which is no linear layer's weight, and an adapter adds to "
                    "those. Export a checkpoint."
                )
            own = scaled(part, knob.alpha(strength))
            total[name] = joined(total[name], own) if name in total else own
    found: dict[str, LowRank] = {}
    for name, part in total.items():
        assert isinstance(part, LowRank)  # as sums of these are
        found[name] = part
    return found


def bias_parts(addends: Mapping[int, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Return the vectors that stand for `addends` behind linear layers, `[D]` by the layers' names.

    Raises `KnobError` for a model without weights, in which no place can be looked for, and for a block without one.
    """
    if next(adapter.model.parameters()).is_meta:
        raise KnobError("A vector's place in an adapter is found by running the model, and this one has no weights.")
    places = {layer: find_place(adapter, layer) for layer in addends}
    return {place.module: addends[layer] / place.factor for layer, place in places.items()}


def write_adapter(
    folder: Path, parts: Mapping[str, LowRank], biases: Mapping[str, Tensor], model: nn.Module, base: str
) -> dict[str, Tensor]:
    """Write a folder that `PeftModel.from_pretrained` loads; its scale is 1, and strengths are in its matrices.

    `biases` are added behind layers as an adapter's own bias (PEFT's `lora_bias`), whose matrices are zero where no
    part says otherwise. `base` is what the configuration says of the model beneath. Returns the tensors of the file.
    Raises `KnobError` where the model mixes layers that hold their weights `[out, in]` with those of GPT-2, which hold
    them `[in, out]`: PEFT takes one or the other.
    """
    sides = {name.removesuffix(".weight"): part for name, part in parts.items()}
    modules = {name: model.get_submodule(name) for name in sorted({*sides, *biases})}
    turned = {not isinstance(module, nn.Linear) for module in modules.values()}
    if len(turned) > 1:
        raise KnobError(
            "An adapter changes weights stored [out, in], or weights stored [in, out]; this one would both."
        )
    (fan_in_fan_out,) = turned
    for name, module in modules.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        out, inner = weight.shape
        sides.setdefault(name, LowRank(torch.zeros(1, inner), torch.zeros(out, 1)))
    ranks = {name: sides[name].rank for name in modules}
    top = max(ranks.values())
    other = {re.escape(name): rank for name, rank in ranks.items() if rank != top}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(biases),
        "fan_in_fan_out": fan_in_fan_out,
    }
    tensors: dict[str, Tensor] = {}
    for name in modules:
        part = sides[name]
        a, b = (part.b.T, part.a.T) if fan_in_fan_out else part
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        if biases:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = biases.get(name, torch.zeros(len(b)))
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / ADAPTER, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return stored
