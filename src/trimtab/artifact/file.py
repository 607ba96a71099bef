"""Tensors plus one JSON header in one safetensors file, whatever the kind of knob.

There is no pickle: reading a file runs no code. Writing is atomic, and a checksum finds tensors that were altered.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from trimtab.errors import KnobError
from trimtab.types import check_strength

FORMAT_VERSION = 1
HEADER_LIMIT = 16 * 2**20
"""Longest JSON header that is parsed, in characters."""


class KnobFile(NamedTuple):
    """What a knob file holds: named tensors, and the JSON header."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def write_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header, atomically: a reader sees the old file or the new one, never half of one.

    Missing folders are made.
    """
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    fixed = {"format_version": FORMAT_VERSION, "sha256": _fingerprint(stored)}
    try:
        text = json.dumps({**fixed, **header}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise KnobError(f"The header of {str(path)!r} cannot be written as JSON: {error}.") from None
    _write_atomically(Path(path), to_bytes(stored, {"trimtab": text}))


def read_file(path: str | Path) -> KnobFile:
    """Read tensors and header; raises `KnobError` that says what is wrong with a damaged or foreign file.

    Tensors come as they were saved, bit for bit; what the header's other fields mean is for the knob to check.
    """
    if not Path(path).is_file():
        raise KnobError("there is no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("trimtab")
            if text is None:
                raise KnobError("it is a safetensors file without Trimtab's header, so not a knob.")
            header = _header(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise KnobError(f"it is not a whole safetensors file ({error}).") from None
    if header.get("sha256") != _fingerprint(tensors):
        raise KnobError("its tensors are not those it was saved with (the checksum differs).")
    return KnobFile(tensors, header)


def text_field(header: Mapping[str, Any], name: str) -> str:
    """Return a header's field that must be text."""
    return cast(str, _typed(header, name, str))


def object_field(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a header's field that must be a JSON object."""
    return cast(dict[str, Any], _typed(header, name, dict))


def number(value: object, name: str) -> float:
    """Return a value of the header that must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KnobError(f"its {name} is {value!r}; expected a number.")
    try:
        return check_strength(value, name)
    except (ValueError, OverflowError):  # an integer beyond every float
        raise KnobError(f"its {name} is not a finite number.") from None


def _typed(header: Mapping[str, Any], name: str, kind: type) -> object:
    value: object = header.get(name)
    if not isinstance(value, kind):
        raise KnobError(f"its header's {name} is {type(value).__name__}; expected {kind.__name__}.")
    return value


def _header(text: str) -> dict[str, Any]:
    if len(text) > HEADER_LIMIT:
        raise KnobError(f"its header has {len(text)} characters; at most {HEADER_LIMIT} are read.")
    try:
        header: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KnobError(f"its header is not JSON ({error}).") from None
    if not isinstance(header, dict):
        raise KnobError("its header is not a JSON object.")
    header = cast(dict[str, Any], header)
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise KnobError(f"it has format version {version!r}; this Trimtab reads version {FORMAT_VERSION}.")
    return header


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        state.update(to_bytes({"": tensor}))  # the bytes of any dtype; NumPy has no bfloat16
    return state.hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    if path.is_dir():
        raise KnobError(f"{str(path)!r} is a folder; pass the name of a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
