"""Tensors from pickle files of others, without running what such a file may hold.

A pickle is a program: it names functions and calls them. Here the names are read off first, without running anything,
and a file that names more than tensors are made of is refused. What is then opened is opened by readers that look up
nothing but these names: torch's own with `weights_only`, and Python's with a closed list.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2  # pyright: ignore[reportPrivateUsage]

from trimtab.errors import KnobError, brief, printable
from trimtab.files import read_bytes, reason

SIZE_LIMIT = 2**30
"""Largest file that is read, in bytes, also once unpacked."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}
_STORES = {"MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"}
_LOADS = {"BINGET", "LONG_BINGET", "GET"}
_QUIET = {"PROTO", "FRAME", *_STORES}
_ERRORS = (
    pickle.UnpicklingError,
    OSError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    EOFError,
    OverflowError,
    MemoryError,
    ImportError,
    UnicodeDecodeError,
)
"""What readers of pickles raise on files that are damaged, or made to be."""


class SteeringVector:
    """Stands for the class of steering-vectors in its users' files: fields, and nothing that could be run."""

    layer_activations: object
    layer_type: object


_STUBS = {"steering_vectors.steering_vector SteeringVector": SteeringVector}
_TENSORS = {
    "collections OrderedDict",
    "_codecs encode",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage _load_from_bytes",
    "torch.storage UntypedStorage",
    "torch.serialization _get_layout",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch DoubleStorage",
    "torch float32",
    "torch float16",
    "torch bfloat16",
    "torch float64",
}
ALLOWED = frozenset(_STUBS) | _TENSORS
"""What a pickle may name, as `module name`: what tensors, dictionaries of them and parameters are made of."""


def load_pickled(path: str | Path) -> object:
    """Return what `torch.save` or `pickle.dump` wrote, if it is tensors; raises `KnobError` before anything is opened.

    Objects of steering-vectors come back as `SteeringVector`, a class of this module with the same fields.
    """
    try:
        data = read_bytes(path, SIZE_LIMIT)
    except OSError as error:
        raise KnobError(f"Cannot read {brief(str(path), 240)}: {reason(error)}.") from None
    try:
        return _load(data)
    except KnobError as error:
        raise KnobError(f"{brief(str(path), 240)} is not opened: {error}") from None
    except _ERRORS as error:
        said = printable(str(error).splitlines()[0])[:120] if str(error) else type(error).__name__
        raise KnobError(f"{brief(str(path), 240)} cannot be read as a pickle of tensors: {said}.") from None


def _load(data: bytes) -> object:
    if data[:2] == b"PK":
        _check_names(_inside(data))
        return _torch_load(data)
    first = _first_value(data)
    _check_names(data, 1 if first != _LEGACY_MAGIC else _LEGACY_PICKLES)
    return _torch_load(data) if first == _LEGACY_MAGIC else _Closed(io.BytesIO(data)).load()


def _torch_load(data: bytes) -> object:
    with torch.serialization.safe_globals([(stub, name.replace(" ", ".")) for name, stub in _STUBS.items()]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _inside(data: bytes) -> bytes:
    """Return the pickle inside a file of `torch.save`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > SIZE_LIMIT:
            raise KnobError(f"unpacked it would have more than {SIZE_LIMIT} bytes.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise KnobError("it is an archive that is compressed, which torch.save's are not.")
        found = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len(found) != 1 or found[0].filename.rpartition("/")[2] != "data.pkl":
            raise KnobError("it is an archive, but not one that torch.save wrote.")
        return archive.read(found[0])


class _Closed(pickle.Unpickler):
    """Python's reader, for which nothing exists but what is allowed.

    What it finds are functions and classes of its own, made for one file: a pickle may set attributes of whatever it
    holds, and those of torch would stay set.
    """

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name} {global_name}"
        if name not in ALLOWED:
            raise _named(name)
        if name in _STUBS:
            return type(global_name, (_STUBS[name],), {})
        if name == "collections OrderedDict":
            return type(global_name, (OrderedDict,), {})
        if name not in _CALLED:
            raise KnobError(f"it names {brief(name.replace(' ', '.'))} where no tensor does.")
        function = _CALLED[name]
        return lambda *args: function(*args)  # another object for every file


def _storage(data: bytes) -> object:
    _check_names(data, _LEGACY_PICKLES)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _latin(text: str, encoding: str) -> bytes:
    """Return bytes that an old protocol wrote as text."""
    if encoding != "latin1":
        raise KnobError(f"it holds bytes as text in {brief(encoding)}.")
    return text.encode("latin1")


_CALLED: dict[str, Callable[..., object]] = {
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch.storage _load_from_bytes": _storage,  # torch's own opens any pickle
    "_codecs encode": _latin,
}
"""What makes tensors where Python's own pickle wrote them."""


# Names


def _check_names(data: bytes, pickles: int = 1) -> None:
    stream = io.BytesIO(data)
    for _ in range(pickles):
        for name in sorted(_names(stream)):
            if name not in ALLOWED:
                raise _named(name)


def _named(name: str) -> KnobError:
    said = brief(name.replace(" ", ".") if name.count(" ") == 1 else name)
    if name.startswith("numpy") or (name.startswith("torch ") and name.endswith("Storage")):
        return KnobError(f"it holds {said}, and tensors of floats are taken. Save the vectors as such.")
    return KnobError(
        f"it is a pickle that would run {said}, and only tensors are taken. If you trust its source, load it with the "
        "tool that wrote it, and save the tensors alone."
    )


def _names(stream: io.BytesIO) -> set[str]:
    """Return all that one pickle looks up, as `module name`, without running it."""
    found: set[str] = set()
    pushed: list[str | None] = [None, None]
    memo: dict[int, str | None] = {}
    for operation, argument, _ in pickletools.genops(stream):
        kind = operation.name
        if kind in ("GLOBAL", "INST"):
            found.add(str(argument))
        elif kind == "STACK_GLOBAL":
            found.add(f"{pushed[0]} {pushed[1]}" if None not in pushed else "what cannot be told")
        elif kind.startswith("EXT"):
            found.add(f"extension {argument}")
        elif kind in _STORES:
            memo[len(memo) if kind == "MEMOIZE" else int(str(argument))] = pushed[1]
        if kind not in _QUIET:
            value = str(argument) if kind in _STRINGS else memo.get(int(str(argument))) if kind in _LOADS else None
            pushed = [pushed[1], value]
    return found


def _first_value(data: bytes) -> object:
    """Return the first value that a pickle pushes, which tells a file of an old torch."""
    for operation, argument, _ in pickletools.genops(io.BytesIO(data)):
        if operation.name not in _QUIET:
            return argument
    return None


def tensors_by_layer(value: object) -> Mapping[object, object] | None:
    """Return the tensors of an object of steering-vectors, or of a dictionary; None for anything else."""
    if isinstance(value, SteeringVector):
        kind = getattr(value, "layer_type", "decoder_block")
        if kind != "decoder_block":
            raise KnobError(f"it is of layer type {brief(kind)}: read elsewhere than at the blocks' outputs.")
        value = getattr(value, "layer_activations", None)
    return value if isinstance(value, Mapping) else None
