"""Tensors plus one JSON header in one safetensors file, whatever the kind of knob.

There is no pickle: reading a file runs no code. Writing is atomic, and a checksum of the whole file finds any byte that
was altered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from trimtab.errors import KnobError, brief, printable
from trimtab.files import is_knob_file, parse_json, read_bytes, reason, write_atomically
from trimtab.types import check_strength

FORMAT_VERSION = 1
HEADER_LIMIT = 8 * 2**20
"""Longest header that is written or read, in bytes."""
SIZE_LIMIT = 2**30
"""Longest file that is written or read, in bytes."""

BLANK = "0" * 64
_FOREIGN = {
    b"\x80": "a pickle, which is never opened, since that could run code",
    b"PK": "a zip archive or a file of torch.save, which is never opened, since that could run code",
    b"GGUF": "a GGUF file; `trimtab import` makes a knob of a control vector",
    b"\x1f\x8b": "compressed with gzip",
    b"\x93NUMPY": "a NumPy array",
    b"{": "JSON text, as a panel is, which names knobs and is none",
}
"""What other files begin with."""


class KnobFile(NamedTuple):
    """What a knob file holds: named tensors, and the JSON header."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def write_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write float32 tensors and header, atomically: a reader sees the old file or the new one, never half of one.

    Missing folders are made. Raises `KnobError` for what could not be read back, where writing fails, and where another
    kind of file stands; that file is then as it was. See `write_atomically` for what a killed process leaves.
    """
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        text = json.dumps({"format_version": FORMAT_VERSION, "sha256": BLANK, **header}, allow_nan=False)
        data = to_bytes(stored, {"trimtab": text})
    except (TypeError, ValueError, RecursionError) as error:
        raise KnobError(f"The header of {brief(str(path), 240)} cannot be written as JSON: {error}.") from None
    data = data.replace(BLANK.encode(), _digest(data, BLANK).encode(), 1)  # the header comes first in the file
    try:
        _decode(data)
    except KnobError as error:
        raise KnobError(
            f"Nothing is written to {brief(str(path), 240)}, for it could not be read back: {error}"
        ) from None
    refuse_to_replace(path, "knob", is_knob_file)
    save_bytes(path, data)


def refuse_to_replace(path: str | Path, what: str, is_one: Callable[[Path], bool]) -> None:
    """Raise `KnobError` where another kind of file stands, or one that cannot be read and so may be of any kind."""
    try:
        if not Path(path).is_file():
            return
    except (OSError, ValueError):  # no such name, no such folder: writing says so
        return
    try:
        stranger = not is_one(Path(path))
    except OSError:
        stranger = True
    if stranger:
        raise KnobError(
            f"{brief(str(path), 240)} exists and is not known to be a {what}, so it is not replaced. Take another name."
        )


def save_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically; raises `KnobError` that says why it cannot be written."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise KnobError(f"Cannot write {brief(str(path), 240)}: {reason(error)}. Nothing there was changed.") from None


def read_file(path: str | Path) -> KnobFile:
    """Read tensors and header; raises `KnobError` that says what is wrong with a damaged or foreign file.

    Tensors come as they were saved, bit for bit; what the header's other fields mean is for the knob to check.
    """
    try:
        data = read_bytes(path, SIZE_LIMIT)
    except OSError as error:
        raise KnobError(f"{reason(error)}.") from None
    return _decode(data)


def text_field(header: Mapping[str, Any], name: str) -> str:
    """Return a header's field that must be text."""
    return cast(str, _typed(header, name, str))


def object_field(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a header's field that must be a JSON object."""
    return cast(dict[str, Any], _typed(header, name, dict))


def number(value: object, name: str) -> float:
    """Return a value of the header that must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KnobError(f"its {name} is {brief(value)}; expected a number.")
    try:
        return check_strength(value, name)
    except (ValueError, OverflowError):  # an integer beyond every float
        raise KnobError(f"its {name} is not a finite number.") from None


def _typed(header: Mapping[str, Any], name: str, kind: type) -> object:
    value: object = header.get(name)
    if not isinstance(value, kind):
        raise KnobError(f"its header's {name} is {type(value).__name__}; expected {kind.__name__}.")
    return value


def _decode(data: bytes) -> KnobFile:
    if len(data) > SIZE_LIMIT:
        raise KnobError(f"it has {len(data)} bytes; at most {SIZE_LIMIT} are read.")
    entries, header, said = read_header(data, len(data))
    if said != _digest(data, said):
        raise KnobError("it is not as it was saved (the checksum differs). Get the file again.")
    for name, entry in entries.items():
        dtype = cast(Mapping[str, object], entry).get("dtype") if isinstance(entry, Mapping) else None
        if dtype != "F32":
            raise KnobError(f"its tensor {brief(name)} has dtype {brief(dtype)}; a knob's are all F32.")
    try:
        tensors = dict(sorted(from_bytes(data).items()))  # safetensors gives them in any order
    except SafetensorError as error:
        raise _not_whole(printable(str(error))[:200]) from None
    return KnobFile(tensors, header)


def read_header(start: bytes, size: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return entries, knob header and the checksum that it states, of a file of `size` bytes that begins with `start`.

    Raises `KnobError` for what is no knob, and for a checksum that cannot be one.
    """
    entries = _safetensors_header(start, size)
    metadata: object = entries.pop("__metadata__", None)
    text = cast(Mapping[str, object], metadata).get("trimtab") if isinstance(metadata, Mapping) else None
    if not isinstance(text, str):
        raise KnobError("it is a safetensors file without Trimtab's header, so not a knob.")
    header = _header(text)
    whole = 8 + int.from_bytes(start[:8], "little") + max(map(_end_of, entries.values()), default=0)
    if size < whole:
        raise KnobError(f"it is cut short: {size} of its {whole} bytes are there. Get the file again.")
    said = text_field(header, "sha256")
    if len(said) != len(BLANK):
        raise KnobError("it is not as it was saved (the checksum differs). Get the file again.")
    return entries, header, said


def _end_of(entry: object) -> int:
    """Return where a tensor ends among the tensors; 0 for an entry that does not say, which reading it explains."""
    offsets: object = cast(Mapping[str, object], entry).get("data_offsets") if isinstance(entry, Mapping) else None
    end: object = cast(list[object], offsets)[-1] if isinstance(offsets, list) and offsets else 0
    return end if type(end) is int else 0


def _safetensors_header(data: bytes, size: int) -> dict[str, Any]:
    """Return the outer header. safetensors reads it too, but takes fields of one name and more nesting than we do."""
    length = int.from_bytes(data[:8], "little")
    if length > HEADER_LIMIT:  # then it is most likely no length, but what another kind of file begins with
        for start, kind in _FOREIGN.items():
            if data.startswith(start):
                raise _not_whole(f"it is {kind}")
    if len(data) < 8 or length > size - 8:
        claim = f", and its header alone would have {length}" if len(data) >= 8 else ""
        raise _not_whole(f"it has {size} bytes{claim}" if data else "it is empty")
    if length > HEADER_LIMIT:
        raise KnobError(f"its header has {length} bytes; at most {HEADER_LIMIT} are read.")
    try:
        entries: object = parse_json(data[8 : 8 + length])
    except ValueError as error:
        raise _not_whole(f"its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise _not_whole("its header is not a JSON object")
    return cast(dict[str, Any], entries)


def _not_whole(why: str) -> KnobError:
    return KnobError(f"it is not a whole safetensors file ({why}). A knob is a file that learn or Knob.save wrote.")


def _header(text: str) -> dict[str, Any]:
    try:
        header: object = parse_json(text)
    except ValueError as error:
        raise KnobError(f"its header is not JSON ({error}).") from None
    if not isinstance(header, dict):
        raise KnobError("its header is not a JSON object.")
    header = cast(dict[str, Any], header)
    version: object = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:  # True and 1.0 equal 1
        raise KnobError(f"it has format version {brief(version)}; this Trimtab reads version {FORMAT_VERSION}.")
    return header


def _digest(data: bytes, said: str) -> str:
    """Return the sha256 of the file as it is with a blank where the checksum `said` stands."""
    return hashlib.sha256(data.replace(said.encode("utf-8", "replace"), BLANK.encode(), 1)).hexdigest()
