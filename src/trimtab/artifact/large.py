"""Knob files of any length: written tensor by tensor, read where and when a tensor is needed.

The same safetensors format as small knobs, header and checksum alike; only whole copies in memory are avoided. Tensors
that are read are views of the file: a file that another program cuts short meanwhile ends the process.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.artifact.file import BLANK, FORMAT_VERSION, HEADER_LIMIT, read_header, refuse_to_replace
from trimtab.errors import KnobError, brief, printable
from trimtab.files import is_knob_file, open_regular, reason, refuse_special_target, replacing

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What a weight difference may be stored in."""
PIECE = 1 << 24


class Entry(NamedTuple):
    """A tensor that is made while it is written: name, dtype, shape, and what makes it, flat piece by flat piece."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[Tensor]]


def entries_of(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return tensors in memory as entries of a file, in their dtype where a file can hold it, else in float32."""
    entries: list[Entry] = []
    for label, tensor in tensors.items():
        kept = tensor if tensor.dtype in DTYPES.values() else tensor.float()
        entries.append(Entry(label, kept.dtype, tuple(kept.shape), lambda kept=kept: [kept.reshape(-1)]))
    return entries


def write_large(path: str | Path, entries: Sequence[Entry], header: Mapping[str, Any]) -> None:
    """Write tensors one after another, and a header; a reader sees the old file or the whole new one.

    No more than one piece of a tensor is in memory. Raises `KnobError` as `write_file` does; see `replacing` for what a
    killed process leaves.
    """
    check_target(path)
    try:
        with replacing(path) as file:
            _write(file, entries, header)
    except OSError as error:
        raise KnobError(f"Cannot write {brief(str(path), 240)}: {reason(error)}. Nothing there was changed.") from None


def check_target(path: str | Path) -> None:
    """Raise `KnobError` where no knob could be written; for those who are about to compute for long."""
    refuse_to_replace(path, "knob", is_knob_file)
    try:
        refuse_special_target(path)
    except OSError as error:
        raise KnobError(f"Cannot write {brief(str(path), 240)}: {reason(error)}. Nothing there was changed.") from None


def _write(file: BinaryIO, entries: Sequence[Entry], header: Mapping[str, Any]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    offset, places = 0, dict[str, Any]()
    for entry in entries:
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        places[entry.name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    try:
        text = json.dumps({"format_version": FORMAT_VERSION, "sha256": BLANK, **header}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise KnobError(f"The knob's header cannot be written as JSON: {error}.") from None
    outer = json.dumps({"__metadata__": {"trimtab": text}, **places}).encode()
    if len(outer) > HEADER_LIMIT:
        raise KnobError(f"The knob's header has {len(outer)} bytes; at most {HEADER_LIMIT} are written.")
    outer = outer.ljust(8 * math.ceil(len(outer) / 8))  # tensors begin at a multiple of 8
    start = len(outer).to_bytes(8, "little") + outer
    file.write(start)
    for entry in entries:
        for flat in entry.make():
            assert flat.dtype == entry.dtype, entry.name
            data = flat.detach().cpu().contiguous().view(torch.uint8)
            for at in range(0, len(data), PIECE):
                file.write(data[at : at + PIECE].numpy().data)
        assert file.tell() == len(start) + places[entry.name]["data_offsets"][1], entry.name
    digest = _digest(file, start)
    file.seek(0)
    file.write(start.replace(BLANK.encode(), digest.encode(), 1))


def _digest(file: BinaryIO, start: bytes) -> str:
    """Return the sha256 of the file whose first bytes, with the blank in the checksum's place, are `start`."""
    state = hashlib.sha256(start)
    file.seek(len(start))
    while piece := file.read(PIECE):
        state.update(piece)
    return state.hexdigest()


class LargeFile(Mapping[str, Tensor]):
    """The tensors of a knob file by name, in their stored dtype, each a view of the file; `header` is the JSON header.

    Raises `KnobError` that says what is wrong with a damaged or foreign file; opening reads the file once, for the
    checksum.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            with open_regular(path) as (file, size):
                start = _start(file)
                entries, self.header, said = read_header(start, size)
                if said != _digest(file, start.replace(said.encode(), BLANK.encode(), 1)):
                    raise KnobError("it is not as it was saved (the checksum differs). Get the file again.")
        except OSError as error:
            raise KnobError(f"{reason(error)}.") from None
        for name, entry in entries.items():
            if entry.get("dtype") not in DTYPES:
                raise KnobError(f"its tensor {brief(name)} has dtype {brief(entry.get('dtype'))}; known: {[*DTYPES]}.")
        try:
            self._file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise KnobError(f"it is not a whole safetensors file ({printable(str(error))[:200]}).") from None
        self._names = dict.fromkeys(sorted(entries))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stored_kind(path: str | Path) -> str | None:
    """Return the kind of knob that a file says it holds; None where it says none, which reading it explains."""
    try:
        with open_regular(path) as (file, size):
            kind: object = read_header(_start(file), size)[1].get("kind")
    except (OSError, ValueError):  # KnobError is one
        return None
    return kind if isinstance(kind, str) else None


def _start(file: BinaryIO) -> bytes:
    """Return length and header, or as much as a header may have."""
    length = int.from_bytes(file.read(8), "little")
    file.seek(0)
    return file.read(8 + min(length, HEADER_LIMIT))
