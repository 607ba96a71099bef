"""Tensors from pickle files of others, without running what such a file may hold.

A pickle is a program for a small machine that looks up functions by their names and calls them. The machine here knows
a dozen names, calls nothing, and makes records of numbers, texts, dictionaries and tensors, which become tensors once
the file has been read to its end. It reads what `torch.save` writes, in its present form (a zip archive) and in that of
torch before 1.6, and what `pickle.dump` makes of tensors.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from trimtab.errors import KnobError, brief, printable
from trimtab.exchange.machine import Machine, SteeringVector, View
from trimtab.files import read_bytes, reason

SIZE_LIMIT = 2**30
"""Largest file that is read, in bytes."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading a damaged file can raise."""


def load_pickled(path: str | Path) -> object:
    """Return what `torch.save` or `pickle.dump` wrote: a tensor, a dictionary of tensors, or a `SteeringVector`.

    Raises `KnobError` for anything else, and for a pickle that names more than these are made of, of which nothing is
    run.
    """
    try:
        data = read_bytes(path, SIZE_LIMIT)
    except OSError as error:
        raise KnobError(f"Cannot read {brief(str(path), 240)}: {reason(error)}.") from None
    try:
        return _made(_archive(data) if data[:2] == b"PK" else _plain(data))
    except KnobError as error:
        raise KnobError(f"{brief(str(path), 240)} is not opened: {error}") from None
    except _ERRORS as error:
        said = printable(str(error).splitlines()[0])[:120] if str(error) else type(error).__name__
        raise KnobError(f"{brief(str(path), 240)} cannot be read as a pickle of tensors: {said}.") from None


# The three forms of files


def _archive(data: bytes) -> object:
    """Read what torch.save writes: a pickle, and a file for each storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise KnobError("it is an archive that holds two files of one name.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise KnobError("it is an archive that is compressed, which torch.save's are not.")
        if sum(entry.file_size for entry in entries.values()) > len(data):
            raise KnobError("it is an archive whose files lie over each other.")
        found = [name for name in entries if name.endswith("/data.pkl")]
        if len(found) != 1 or sum(name.endswith(".pkl") for name in entries) > 1:
            raise KnobError("it is an archive, but not one that torch.save wrote.")
        folder = found[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise KnobError("its numbers are not in the order of bytes of this machine.")
        machine = Machine(archive.read(found[0]))
        value = machine.run()
        for key, storage in machine.storages.items():
            storage.data = archive.read(f"{folder}data/{key}")
    return value


def _plain(data: bytes) -> object:
    """Read what pickle.dump wrote, or torch before 1.6."""
    machine = Machine(data, _legacy)
    value = machine.run()
    return _legacy(data) if value == _LEGACY_MAGIC else value


def _legacy(data: bytes) -> object:
    """Read five pickles (a number, a version, sizes, the value, names of storages) and the storages behind them."""
    machine = Machine(data)
    for _ in range(3):
        machine.run()
    value, keys = machine.run(), machine.run()
    if not isinstance(keys, list) or len(set(map(str, keys))) < len(keys):
        raise KnobError("it names no storages, or one of them twice.")
    for key in cast(list[object], keys):
        storage = machine.storages[str(key)]
        (count,) = struct.unpack("<q", machine.stream.read(8))
        if count != storage.count:
            raise KnobError("it holds another number of values than it says.")
        storage.data = machine.stream.read(count * storage.dtype.itemsize)
    return value


# What is made in the end


def _made(value: object) -> object:
    if isinstance(value, View):
        return _tensor(value)
    if isinstance(value, SteeringVector):
        return SteeringVector(_entries(value.layer_activations), value.layer_type)
    return _entries(value)


def _entries(value: object) -> dict[object, object]:
    if type(value) is not dict:
        raise KnobError(f"it holds {type(value).__name__} where tensors, or tensors by layer, are expected.")
    entries = cast(dict[object, object], value)
    return {key: _tensor(item) if isinstance(item, View) else item for key, item in entries.items()}


def _tensor(view: View) -> Tensor:
    """Make a tensor of its own numbers: no more of them than the file holds, and none from beyond their end."""
    storage, (offset, shape, stride) = view.storage, view[1:]
    size = storage.dtype.itemsize
    if storage.data is None or storage.count < 0 or len(storage.data) != storage.count * size:
        raise KnobError("it lacks the numbers of a tensor.")
    if len(shape) != len(stride) or len(shape) > 4 or min((*shape, *stride, offset), default=0) < 0:
        raise KnobError("it describes a tensor that cannot be.")
    count, last = 1, offset
    for length, step in zip(shape, stride, strict=True):
        count, last = count * length, last + (length - 1) * step
    if count and (count > storage.count or last >= storage.count):
        raise KnobError(f"it holds a tensor of shape {brief(list(shape))} that claims more numbers than there are.")
    if not count:
        return torch.zeros(shape, dtype=storage.dtype)
    return torch.frombuffer(bytearray(storage.data), dtype=storage.dtype).as_strided(shape, stride, offset).clone()


def tensors_by_layer(value: object) -> Mapping[object, object] | None:
    """Return the tensors of an object of steering-vectors, or of a dictionary; None for anything else."""
    if isinstance(value, SteeringVector):
        if value.layer_type != "decoder_block":
            raise KnobError(
                f"it is of layer type {brief(value.layer_type)}: read elsewhere than at the blocks' outputs."
            )
        value = value.layer_activations
    return cast(Mapping[object, object], value) if isinstance(value, dict) else None
