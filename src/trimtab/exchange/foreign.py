"""What files of other tools hold: vectors by layer, numbered as here, and which tool seems to have written them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.errors import KnobError, OptionError, brief
from trimtab.exchange.gguf import read_control_vector
from trimtab.exchange.pickles import load_pickled, tensors_by_layer
from trimtab.files import open_regular, reason

KINDS = {
    "gguf": ("gguf", "repeng", "llama.cpp"),
    "steering-vectors": ("steering-vectors", "caa", "bipo"),
    "persona-vectors": ("persona-vectors",),
    **dict.fromkeys(("caa", "bipo"), ("caa", "bipo", "steering-vectors")),
}
"""Which sources a file may be said to be of, by the one it looks like."""


class Read(NamedTuple):
    """What a file holds: vectors by layer, in Trimtab's numbering, and which tool is likely to have written it."""

    vectors: dict[int, Tensor]
    source: str
    facts: Mapping[str, object] = {}


def read_vectors(path: Path, layer: int | None, adapter: Adapter) -> Read:
    """Read vectors for a model; `layer` is that of a lone one whose name does not tell.

    Raises `KnobError` for what is not read, and for vectors of another model.
    """
    read = _read(path, layer, adapter)
    _check(read.vectors, adapter, path)
    return read


def _read(path: Path, layer: int | None, adapter: Adapter) -> Read:
    start, count = _start(path), adapter.n_layers
    if start[:4] == b"GGUF" or path.suffix == ".gguf":
        read = read_control_vector(path)
        told = {key: value for key, value in read.fields.items() if len(key) <= 100 and len(str(value)) <= 200}
        facts = {key: value for key, value in told.items() if not isinstance(value, float) or math.isfinite(value)}
        return Read(read.vectors, "gguf", facts)
    if start[8:9] == b"{":
        raise KnobError(
            f"{brief(str(path), 240)} is a safetensors file: a knob is loaded as it is, and an adapter is imported by "
            "its folder, with adapter_config.json."
        )
    value = load_pickled(path)
    by_layer = tensors_by_layer(value)
    if by_layer is not None:
        return Read(_by_layer(by_layer, path, adapter), "steering-vectors")
    if not isinstance(value, Tensor):
        raise KnobError(
            f"{brief(str(path), 240)} holds {brief(value)}; expected a tensor, tensors by layer, or an object of "
            "steering-vectors."
        )
    if value.dim() == 2 and value.shape[0] > 1:
        if value.shape[0] != count + 1:
            raise KnobError(
                f"{brief(str(path), 240)} holds {value.shape[0]} rows; a stack of hidden_states of this "
                f"{type(adapter.model).__name__} has {count + 1}, one more than it has layers."
            )
        rows = {number - 1: _vector(value[number], path, adapter) for number in range(1, count)}
        return Read(rows, "persona-vectors", {"rows": count + 1})
    vector, told = _vector(value, path, adapter), _layer_in(path)
    number = told if layer is None else adapter.layer(layer)
    if number is None:
        raise OptionError(f"Neither {path.name!r} nor an option says which layer it is for. Pass layer=NUMBER.")
    facts = {} if told in (None, number) else {"layer_in_name": told}
    return Read({adapter.layer(number): vector}, "bipo" if re.match(r"vec_ep\d", path.name) else "caa", facts)


def _start(path: Path) -> bytes:
    try:
        with open_regular(path) as (file, _):
            return file.read(16)
    except OSError as error:
        raise KnobError(f"Cannot read {brief(str(path), 240)}: {reason(error)}.") from None


def _by_layer(entries: Mapping[object, object], path: Path, adapter: Adapter) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for key, value in entries.items():
        key = int(key) if isinstance(key, str) and re.fullmatch(r"[0-9]{1,4}", key) else key
        if not isinstance(key, int) or isinstance(key, bool) or key < 0:
            raise KnobError(f"{brief(str(path), 240)} maps {brief(key)} to something; expected numbers of layers.")
        if key >= adapter.n_layers:
            raise _of_another(path, f"a vector for layer {key}", adapter)
        found[key] = _vector(value, path, adapter)
    if not found:
        raise KnobError(f"{brief(str(path), 240)} holds no vectors.")
    return dict(sorted(found.items()))


def _vector(value: object, path: Path, adapter: Adapter) -> Tensor:
    """Return a vector `[D]` of the model's width in float32; `[1, D]` is one too.

    Sizes are looked at first: a tensor may claim more than the file holds.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_sparse or value.is_quantized:
        raise KnobError(f"{brief(str(path), 240)} holds {type(value).__name__} where a vector of floats is expected.")
    if value.dim() not in (1, 2) or value.numel() != value.shape[-1]:
        raise KnobError(f"{brief(str(path), 240)} holds a tensor of shape {brief(list(value.shape))}; a vector is [D].")
    if value.numel() != adapter.hidden_size:
        raise _of_another(path, f"a vector of width {value.numel()}", adapter)
    vector = value.detach().reshape(-1).float().clone()
    if not bool(torch.isfinite(vector).all()):
        raise KnobError(f"{brief(str(path), 240)} holds values that are not finite.")
    return vector


def _layer_in(path: Path) -> int | None:
    """Return the layer that a file's name tells, as CAA (`vec_layer_13_...`) and BiPO (`vec_ep5_layer13`) write it."""
    found = re.search(r"layer_?(\d{1,4})(?!\d)", path.stem)
    return int(found[1]) if found else None


def _check(vectors: Mapping[int, Tensor], adapter: Adapter, path: Path) -> None:
    """Raise `KnobError` for vectors that are not this model's, or do nothing."""
    width, top = len(next(iter(vectors.values()))), max(vectors)
    if width != adapter.hidden_size or top >= adapter.n_layers:
        raise _of_another(path, f"vectors of width {width} up to layer {top}", adapter)
    if not any(bool(vector.any()) for vector in vectors.values()):
        raise KnobError(f"{brief(str(path), 240)} holds zeros only: nothing would change at any strength.")


def _of_another(path: Path, what: str, adapter: Adapter) -> KnobError:
    return KnobError(
        f"{brief(str(path), 240)} holds {what}; this {type(adapter.model).__name__} has hidden size "
        f"{adapter.hidden_size} and layers 0 to {adapter.n_layers - 1}. They are of another model."
    )
