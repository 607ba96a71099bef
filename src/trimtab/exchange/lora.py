"""Low-rank weight knobs as PEFT keeps LoRA adapters: a folder with `adapter_config.json` and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from trimtab.artifact import DeltaKnob
from trimtab.artifact.parts import LowRank, Part, joined, scaled
from trimtab.errors import KnobError
from trimtab.weights.rows import is_linear
from trimtab.weights.source import ADAPTER


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
    return {name: part for name, part in total.items() if isinstance(part, LowRank)}


def write_adapter(folder: Path, parts: Mapping[str, LowRank], model: nn.Module, base: str) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads; its scale is 1, and strengths are in its matrices.

    `base` is what the configuration says of the model beneath. Raises `KnobError` where the model mixes layers that
    hold their weights `[out, in]` with those of GPT-2, which hold them `[in, out]`: PEFT takes one or the other.
    """
    modules = {name: name.removesuffix(".weight") for name in parts}
    turned = {not isinstance(model.get_submodule(module), nn.Linear) for module in modules.values()}
    if len(turned) > 1:
        raise KnobError(
            "An adapter changes weights stored [out, in], or weights stored [in, out]; this one would both."
        )
    (fan_in_fan_out,) = turned
    ranks = {module: parts[name].rank for name, module in modules.items()}
    top = max(ranks.values())
    other = {re.escape(module): rank for module, rank in ranks.items() if rank != top}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(modules.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        a, b = (parts[name].b.T, parts[name].a.T) if fan_in_fan_out else (parts[name].a, parts[name].b)
        for side, tensor in (("A", a), ("B", b)):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensor.detach().float().cpu().contiguous()
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
