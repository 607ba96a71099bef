"""Control vectors as llama.cpp and repeng keep them: GGUF files with a tensor `direction.L` per layer L.

The layer of a tensor is that of Trimtab: `direction.L` is added to the output of block L, 0-based. llama.cpp reads
L >= 1 only: the output of block 0 cannot be steered there. Written by the `gguf` package; read here, strictly, since
that package trusts the counts in a file's header, and a file from elsewhere may claim any.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.artifact.file import refuse_to_replace, save_bytes
from trimtab.errors import KnobError, MissingDependency, brief
from trimtab.files import read_bytes, reason

ARCHITECTURE = "controlvector"
PREFIX = "direction."
SIZE_LIMIT = 2**30
"""Largest file that is read, in bytes."""
_FIELDS_LIMIT, _TENSORS_LIMIT, _TEXT_LIMIT, _NESTING_LIMIT = 10_000, 10_000, 2**20, 4
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


class ControlVector(NamedTuple):
    """What a file holds."""

    vectors: dict[int, Tensor]  # [D] float32 by layer
    fields: dict[str, object]
    """The header's fields; lists are left out."""


def write_control_vector(path: str | Path, addends: Mapping[int, Tensor], *, architecture: str) -> None:
    """Write one vector per layer, atomically, as repeng does, and as llama.cpp's `--control-vector` reads it.

    Layers stand in repeng's order, from the top down, so that a file of repeng comes out as it went in.

    `addends` are `[D]` by layer, of one width; `architecture` is what transformers calls the model (`model_type`).
    Raises `KnobError` for layer 0, which llama.cpp does not steer, where writing fails, and where a file stands that is
    no control vector; `MissingDependency` without the package `gguf`.
    """
    if find_spec("gguf") is None:
        raise MissingDependency('Writing GGUF needs gguf. Install it with: pip install "gguf>=0.17"')
    if 0 in addends:
        raise KnobError(
            "llama.cpp does not steer the output of layer 0, and its control vectors begin with layer 1. Choose "
            "another layer, or try an adapter or a checkpoint, which hold a vector where a block has room for a bias."
        )
    import gguf

    refuse_to_replace(path, "control vector", _is_control_vector)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(part, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", architecture)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(addends))
        for layer, addend in sorted(addends.items(), reverse=True):
            writer.add_tensor(f"{PREFIX}{layer}", addend.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = part.read_bytes()
    back = _read(data).vectors
    assert back.keys() == addends.keys()
    assert all(torch.equal(back[layer], addend.float()) for layer, addend in addends.items())
    save_bytes(path, data)


def _is_control_vector(path: Path) -> bool:
    try:
        _read(read_bytes(path, SIZE_LIMIT))
    except KnobError:
        return False
    return True


def read_control_vector(path: str | Path) -> ControlVector:
    """Read a control vector; raises `KnobError` that names what is wrong with a damaged, hostile or foreign file."""
    try:
        data = read_bytes(path, SIZE_LIMIT)
        return _read(data)
    except OSError as error:
        raise KnobError(f"Cannot read {brief(str(path), 240)}: {reason(error)}.") from None
    except KnobError as error:
        raise KnobError(f"{brief(str(path), 240)} is no control vector: {error}") from None


class _Reader:
    """Reads from bytes, never beyond their end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.data):
            raise KnobError("it ends in the middle of its header.")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def count(self, limit: int, what: str) -> int:
        value = int(self.number("Q"))
        if value > limit:
            raise KnobError(f"it claims {value} {what}; at most {limit} are read.")
        return value

    def text(self) -> str:
        length = self.count(_TEXT_LIMIT, "bytes of text")
        if self.at + length > len(self.data):
            raise KnobError("it ends in the middle of its header.")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise KnobError("its header holds text that is not UTF-8.") from None

    def value(self, kind: int, depth: int = 0) -> object:
        """Read a value of the header; None stands for a list, which is read and left."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST or depth >= _NESTING_LIMIT:
            raise KnobError(f"its header holds a value of type {kind}, nested {depth} times.")
        inner = int(self.number("I"))
        for _ in range(self.count(len(self.data) - self.at, "values")):  # each takes a byte at least
            self.value(inner, depth + 1)
        return None


def _read(data: bytes) -> ControlVector:
    if data[:4] != b"GGUF":
        raise KnobError("it does not begin as a GGUF file does.")
    reader = _Reader(data)
    reader.at = 4
    version = int(reader.number("I"))
    if version not in (2, 3):
        raise KnobError(f"it is of GGUF version {version}; versions 2 and 3 are read.")
    tensors, fields = reader.count(_TENSORS_LIMIT, "tensors"), reader.count(_FIELDS_LIMIT, "fields")
    header: dict[str, object] = {}
    for _ in range(fields):
        name = reader.text()
        if name in header:
            raise KnobError(f"its header holds {brief(name)} twice.")
        header[name] = reader.value(int(reader.number("I")))
    places: dict[int, tuple[torch.dtype, int, int]] = {}
    for _ in range(tensors):
        layer, place = _tensor(reader)
        if layer in places:
            raise KnobError(f"it holds a vector for layer {layer} twice.")
        places[layer] = place
    if not places:
        raise KnobError("it holds no tensors.")
    alignment: object = header.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise KnobError(f"its alignment is {brief(alignment)}.")
    start = -(-reader.at // alignment) * alignment
    claimed = sum(width * dtype.itemsize for dtype, width, _ in places.values())
    there = max(0, len(data) - start)
    if claimed > there:  # of tensors that lie over each other too
        raise KnobError(f"it ends before its vectors do, which claim {claimed} bytes where {there} are.")
    vectors = {layer: _vector(data, start, layer, place) for layer, place in sorted(places.items())}
    widths = sorted({len(vector) for vector in vectors.values()})
    if len(widths) > 1:
        raise KnobError(f"its vectors have widths {brief(widths)}; those of a model have one.")
    return ControlVector(vectors, {name: value for name, value in header.items() if value is not None})


def _tensor(reader: _Reader) -> tuple[int, tuple[torch.dtype, int, int]]:
    """Read what the header says of a tensor: its layer; its dtype, width and place."""
    name = reader.text()
    layer = name.removeprefix(PREFIX)
    if layer == name or not re.fullmatch(r"0|[1-9][0-9]{0,3}", layer):
        raise KnobError(f"it holds a tensor {brief(name)}; those of a control vector are named {PREFIX}LAYER.")
    sizes = [int(reader.number("Q")) for _ in range(min(int(reader.number("I")), 5))]
    kind = int(reader.number("I"))
    if len(sizes) != 1 or not 0 < sizes[0] <= SIZE_LIMIT:
        raise KnobError(f"{brief(name)} has shape {sizes[:5]}; a vector has one size.")
    if kind not in _DTYPES:
        raise KnobError(f"{brief(name)} is stored in GGUF's type {kind}; float32, float16 and bfloat16 are read.")
    return int(layer), (_DTYPES[kind], sizes[0], int(reader.number("Q")))


def _vector(data: bytes, start: int, layer: int, place: tuple[torch.dtype, int, int]) -> Tensor:
    dtype, width, offset = place
    begin, size = start + offset, width * dtype.itemsize
    if begin + size > len(data):
        raise KnobError(f"it ends before the vector of layer {layer} does.")
    vector = torch.frombuffer(bytearray(data[begin : begin + size]), dtype=dtype).float()
    if not bool(torch.isfinite(vector).all()):
        raise KnobError(f"the vector of layer {layer} holds values that are not finite.")
    return vector
