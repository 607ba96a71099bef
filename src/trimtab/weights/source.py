"""Named weights, wherever they lie: a model in memory, a folder of safetensors shards, or a LoRA adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.artifact.delta import LowRank
from trimtab.errors import OptionError, brief, printable
from trimtab.files import open_regular, parse_json, read_bytes

Source = nn.Module | str | Path
INDEX, WHOLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
_JSON_LIMIT = 64 * 2**20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights:
    """Parameters by name, read one at a time; those of a folder are views of its files."""

    def __init__(self, source: Source) -> None:
        self.said = type(source).__name__ if isinstance(source, nn.Module) else brief(str(source), 240)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Any] = {}
        if isinstance(source, nn.Module):
            self._tensors = {name: p.detach() for name, p in source.named_parameters()}
            self.shapes = {name: tuple(p.shape) for name, p in self._tensors.items()}
            self.dtypes = {name: p.dtype for name, p in self._tensors.items()}
        else:
            self._open(Path(source))
        strange = [name for name, dtype in self.dtypes.items() if dtype not in _DTYPES.values()]
        if strange:
            raise OptionError(
                f"{strange[0]!r} of {self.said} has dtype {self.dtypes[strange[0]]}: quantised weights have no "
                "difference that could be added. Use the weights before quantisation."
            )

    def get(self, name: str) -> Tensor:
        """Return one parameter in its stored dtype."""
        return self._tensors[name] if name in self._tensors else self._files[name].get_tensor(name)

    def _open(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            entries = _read_json(folder / INDEX).get("weight_map")
            if not isinstance(entries, Mapping) or not all(isinstance(file, str) for file in entries.values()):
                raise OptionError(f"{str(folder / INDEX)!r} has no weight_map of names to files.")
            files = {Path(file).name for file in cast(Mapping[str, str], entries).values()}
        elif (folder / WHOLE).is_file():
            files = {WHOLE}
        else:
            pickled = sorted(folder.glob("*.bin")) if folder.is_dir() else []
            wanted = f"a folder with {WHOLE} or {INDEX}"
            raise OptionError(
                f"{pickled[0].name!r} is a pickle, which is never opened. Save the model as safetensors."
                if pickled
                else f"{self.said} holds no weights; expected {wanted}."
            )
        for file in sorted(files):
            opened = open_shard(folder / file)
            for name in opened.keys():  # noqa: SIM118  # no mapping
                part = opened.get_slice(name)
                self._files[name] = opened
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _DTYPES.get(part.get_dtype(), torch.int8)


def open_shard(path: Path) -> Any:
    """Open one safetensors file; raises `OptionError` that says what is wrong with it."""
    try:
        with open_regular(path):
            return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise OptionError(f"Cannot read {brief(str(path), 240)}: {printable(str(error))[:200]}.") from None


def is_adapter(source: Source) -> bool:
    """Tell whether a source is a folder with a PEFT adapter."""
    return not isinstance(source, nn.Module) and (Path(source) / "adapter_config.json").is_file()


def read_adapter(folder: str | Path) -> dict[str, LowRank]:
    """Return what a PEFT LoRA adapter adds to each weight, by the weight's name in the bare model, its scale included.

    Raises `OptionError` for what is no plain LoRA: DoRA, biases, and whole modules saved along.
    """
    folder = Path(folder)
    config = _read_json(folder / "adapter_config.json")
    kind = str(config.get("peft_type")).upper()
    for wrong, said in (
        (kind != "LORA", f"an adapter of type {brief(config.get('peft_type'))}"),
        (bool(config.get("use_dora")), "a DoRA adapter, which scales weights as well"),
        (config.get("bias", "none") != "none", "an adapter with biases"),
        (
            bool(config.get("modules_to_save")),
            f"an adapter with whole modules ({brief(config.get('modules_to_save'))})",
        ),
    ):
        if wrong:
            raise OptionError(f"{str(folder)!r} is {said}; a knob is made of plain LoRA weights.")
    file = open_shard(folder / ADAPTER)
    names = list(file.keys())
    found: dict[str, LowRank] = {}
    for name in names:
        module, side, rest = name.partition(".lora_A.")
        if not side:
            if ".lora_B." not in name:
                raise OptionError(f"{str(folder)!r} holds {name!r}, which is no part of a plain LoRA adapter.")
            continue
        a, b = file.get_tensor(name).float(), file.get_tensor(f"{module}.lora_B.{rest}").float()
        bare = module.removeprefix("base_model.model.")
        product = LowRank(a, b * _scale(config, bare, a.shape[0]))
        if config.get("fan_in_fan_out"):  # the weight is stored [in, out], as in GPT-2
            product = LowRank(product.b.T.contiguous(), product.a.T.contiguous())
        found[f"{bare}.weight"] = product
    if not found:
        raise OptionError(f"{str(folder)!r} holds no LoRA weights.")
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) where rank-stabilised; patterns name modules with an alpha of their own."""
    alpha = float(config.get("lora_alpha") or rank)
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    for pattern, own in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = float(own)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: object = parse_json(read_bytes(path, _JSON_LIMIT))
    except (OSError, ValueError) as error:
        raise OptionError(f"Cannot read {brief(str(path), 240)}: {error}.") from None
    if not isinstance(value, dict):
        raise OptionError(f"{brief(str(path), 240)} holds no JSON object.")
    return cast(dict[str, Any], value)
