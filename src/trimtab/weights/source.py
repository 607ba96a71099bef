"""Named weights, wherever they lie: a model in memory, a folder of safetensors shards, or a LoRA adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.artifact.file import number
from trimtab.artifact.parts import LowRank
from trimtab.errors import KnobError, OptionError, brief, printable
from trimtab.files import open_regular, parse_json, read_bytes

Source = nn.Module | str | Path
INDEX, WHOLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
_JSON_LIMIT = 64 * 2**20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNFIT = {
    "use_dora": "of DoRA, which scales weights as well",
    "bias": "with biases",
    "lora_bias": "with biases",
    "modules_to_save": "with whole modules",
    "trainable_token_indices": "with embeddings of its own",
    "target_parameters": "of parameters that are no module's weight",
    "layer_replication": "of a model with repeated layers",
    "use_qalora": "of QALoRA, which pools what it reads",
    "alora_invocation_tokens": "that acts after certain tokens only",
    "megatron_config": "of a model that is split over devices",
    "init_lora_weights": "whose start changed the model's own weights",
}
"""Fields of an adapter's configuration that, when set, make it more than `scale * B A` on some weights."""
PATTERNS_LIMIT = 2000
PATTERN = re.compile(r"[\w.\\^$|()-]{1,300}")
"""Patterns that are tried: one with repetitions, in a file of others, may take for ever."""
_HARMLESS_STARTS = (True, "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that add nothing and leave the model as it is."""


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
                f"{brief(strange[0])} of {self.said} is stored as none of {', '.join(_DTYPES)}: quantised weights have "
                "no difference that could be added. Use the weights before quantisation."
            )

    def get(self, name: str) -> Tensor:
        """Return one parameter in its stored dtype."""
        return self._tensors[name] if name in self._tensors else self._files[name].get_tensor(name)

    def _open(self, folder: Path) -> None:
        listed: Mapping[str, str] = {}
        if (folder / INDEX).is_file():
            entries = _read_json(folder / INDEX).get("weight_map")
            if not isinstance(entries, Mapping) or not all(isinstance(file, str) for file in entries.values()):
                raise OptionError(f"{str(folder / INDEX)!r} has no weight_map of names to files.")
            listed = cast(Mapping[str, str], entries)
            files = {Path(file).name for file in listed.values()}
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
                if name in self._files:
                    raise OptionError(f"{self.said} holds {brief(name)} in two shards. Get the checkpoint again.")
                part = opened.get_slice(name)
                self._files[name] = opened
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _DTYPES.get(part.get_dtype(), torch.int8)
        missing = sorted(listed.keys() - self._files.keys())
        if missing:
            raise OptionError(
                f"{self.said} lacks {len(missing)} weights that its index lists, {brief(missing[0])} for one. Get the "
                "checkpoint again."
            )


def open_shard(path: Path) -> Any:
    """Open one safetensors file; raises `OptionError` that says what is wrong with it."""
    try:
        with open_regular(path):
            return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise OptionError(f"Cannot read {brief(str(path), 240)}: {printable(str(error))[:200]}.") from None


def is_adapter(source: Source) -> bool:
    """Tell whether a source is a folder with a PEFT adapter; raises `OptionError` for what is no source at all."""
    if not isinstance(source, Source):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"Pass models in memory, or folders of checkpoints or adapters; got {brief(source)}.")
    return not isinstance(source, nn.Module) and (Path(source) / "adapter_config.json").is_file()


def read_adapter(folder: str | Path) -> dict[str, LowRank]:
    """Return what a PEFT LoRA adapter adds to each weight, by the weight's name in the bare model, its scale included.

    Raises `OptionError` for what is no plain LoRA: see `_UNFIT`.
    """
    folder = Path(folder)
    config = _read_json(folder / "adapter_config.json")
    if str(config.get("peft_type")).upper() != "LORA":
        raise OptionError(f"{str(folder)!r} is an adapter of type {brief(config.get('peft_type'))}, no LoRA.")
    unfit = [key for key in _UNFIT if config.get(key) not in (None, False, "none", [], {})]
    if config.get("init_lora_weights") in _HARMLESS_STARTS:
        unfit.remove("init_lora_weights")
    if unfit:
        raise OptionError(
            f"{str(folder)!r} is an adapter {_UNFIT[unfit[0]]} ({unfit[0]} is {brief(config[unfit[0]])}); a knob is "
            "made of plain LoRA weights."
        )
    file = open_shard(folder / ADAPTER)
    names = set(file.keys())
    found: dict[str, LowRank] = {}
    patterns = _patterns(config)
    for name in sorted(names):
        module, side, rest = name.partition(".lora_A.")
        twin = f"{module}.lora_B.{rest}" if side else name.replace(".lora_B.", ".lora_A.")
        if ".base_layer." in name:
            raise OptionError(
                f"{str(folder)!r} holds {brief(name)}, a weight of the model itself, as PEFT adds it for embeddings "
                "and the output layer. Save the adapter with save_embedding_layers=False."
            )
        if twin == name or twin not in names:
            raise OptionError(f"{str(folder)!r} holds {brief(name)} alone, which is no part of a plain LoRA adapter.")
        if side:
            bare = module.removeprefix("base_model.model.")
            kinds = [file.get_slice(side).get_dtype() for side in (name, twin)]
            if any(kind not in _DTYPES for kind in kinds):
                raise OptionError(f"{str(folder)!r} holds {brief(name)} as {kinds[0]} and {kinds[1]}; floats are read.")
            a, b = file.get_tensor(name), file.get_tensor(twin)
            if not a.dim() == b.dim() == 2 or not 0 < a.shape[0] == b.shape[1] <= max(a.shape[1], b.shape[0]):
                raise OptionError(
                    f"{str(folder)!r} holds {brief(name)} as {list(a.shape)} and its other half as {list(b.shape)}, of "
                    f"{a.dtype}: no product of a rank."
                )
            product = LowRank(a.float(), b.float() * _scale(config, patterns, bare, a.shape[0]))
            if f"{bare}.weight" in found:
                raise OptionError(f"{str(folder)!r} holds {brief(bare)} twice.")
            if config.get("fan_in_fan_out"):  # the weight is stored [in, out], as in GPT-2
                product = LowRank(product.b.T.contiguous(), product.a.T.contiguous())
            found[f"{bare}.weight"] = product
    if not found:
        raise OptionError(f"{str(folder)!r} holds no LoRA weights.")
    return found


def adapter_base(folder: str | Path) -> str:
    """Return what an adapter says of the model beneath; empty where it says nothing."""
    base: object = _read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    return printable(base)[:200] if isinstance(base, str) else ""


def _patterns(config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], object]]:
    """Return the modules with an alpha of their own, as patterns of their names."""
    stored: object = config.get("alpha_pattern") or {}
    if not isinstance(stored, Mapping):
        raise OptionError(f"An adapter's alpha_pattern maps patterns to numbers; got {brief(stored)}.")
    patterns = cast(Mapping[str, object], stored)
    odd = [pattern for pattern in patterns if not PATTERN.fullmatch(pattern)]
    if odd or len(patterns) > PATTERNS_LIMIT:
        raise OptionError(
            f"An adapter's alpha_pattern names at most {PATTERNS_LIMIT} modules, without repetitions in the patterns; "
            f"got {len(patterns)}, {brief((odd or [*patterns])[0])} for one. Write their names out."
        )
    try:
        return [(re.compile(rf"(.*\.)?({pattern})"), alpha) for pattern, alpha in patterns.items()]
    except (re.error, RecursionError, OverflowError):
        raise OptionError(f"An adapter's alpha_pattern maps patterns to numbers; got {brief(stored)}.") from None


def _scale(
    config: Mapping[str, Any], patterns: Sequence[tuple[re.Pattern[str], object]], module: str, rank: int
) -> float:
    """Return alpha / r, or alpha / sqrt(r) where rank-stabilised; patterns name modules with an alpha of their own."""
    own = next((alpha for pattern, alpha in patterns if pattern.fullmatch(module)), config.get("lora_alpha"))
    try:
        return number(own, "alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except KnobError:
        raise OptionError(
            f"An adapter's lora_alpha is a number and its alpha_pattern maps patterns to numbers; got {brief(own)}."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: object = parse_json(read_bytes(path, _JSON_LIMIT))
    except (OSError, ValueError) as error:
        raise OptionError(f"Cannot read {brief(str(path), 240)}: {error}.") from None
    if not isinstance(value, dict):
        raise OptionError(f"{brief(str(path), 240)} holds no JSON object.")
    return cast(dict[str, Any], value)
