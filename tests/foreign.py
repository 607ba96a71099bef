"""Write the files that other tools write, byte by byte as they do, where those tools are not installed."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def steering_vectors() -> Iterator[type]:
    """Give the class of steering-vectors under the name that pickles of it carry; afterwards nobody knows it."""
    module = types.ModuleType("steering_vectors.steering_vector")

    class SteeringVector:
        def __init__(self, layer_activations: dict[int, Tensor], layer_type: str = "decoder_block") -> None:
            self.layer_activations, self.layer_type = layer_activations, layer_type

    SteeringVector.__module__, SteeringVector.__qualname__ = module.__name__, "SteeringVector"
    module.SteeringVector = SteeringVector  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["steering_vectors"], sys.modules[module.__name__] = types.ModuleType("steering_vectors"), module
    try:
        yield SteeringVector
    finally:
        del sys.modules["steering_vectors"], sys.modules[module.__name__]


def gguf_bytes(
    vectors: Mapping[str, tuple[list[int], int, bytes]],
    *,
    fields: Mapping[str, tuple[int, bytes]] | None = None,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    offsets: Mapping[str, int] | None = None,
) -> bytes:
    """Return a GGUF file of tensors (shape, type, data), whatever they and the header claim."""
    fields = {"general.architecture": (8, text("controlvector"))} if fields is None else fields
    out, data = io.BytesIO(), io.BytesIO()
    out.write(b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(vectors), len(fields)))))
    for name, (kind, value) in fields.items():
        out.write(text(name) + struct.pack("<I", kind) + value)
    for name, (shape, kind, raw) in vectors.items():
        at = (offsets or {}).get(name, data.tell())
        out.write(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at))
        data.write(raw + b"\0" * (-len(raw) % 32))
    out.write(b"\0" * (-out.tell() % 32))
    return out.getvalue() + data.getvalue()


def text(value: str) -> bytes:
    """Return text as GGUF has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def floats(width: int = 32, value: float = 1.0) -> tuple[list[int], int, bytes]:
    """Return a vector of one value."""
    return [width], 0, struct.pack(f"<{width}f", *[value] * width)


class Bomb:
    """A pickle of this writes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def write_bombs(folder: Path, mark: Path) -> dict[str, Path]:
    """Write pickles of several makes that all would touch `mark`."""
    bomb, vector = Bomb(mark), torch.ones(32)
    paths = {
        name: folder / f"{name}.layer1.pt"
        for name in ("torch", "old torch", "pickle", "protocol 0", "hidden", "storage")
    }
    torch.save({1: vector, 2: bomb}, paths["torch"])
    torch.save([bomb, vector], paths["old torch"], _use_new_zipfile_serialization=False)
    paths["pickle"].write_bytes(pickle.dumps(bomb))
    paths["protocol 0"].write_bytes(pickle.dumps({1: bomb}, protocol=0))
    # the names come from the memo, behind other values
    paths["hidden"].write_bytes(
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c"
        + bytes([len(f"touch {mark}")])
        + f"touch {mark}".encode()
        + b"\x85R."
    )
    inner = io.BytesIO()
    torch.save(bomb, inner, _use_new_zipfile_serialization=False)
    paths["storage"].write_bytes(
        b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93B"
        + struct.pack("<I", len(inner.getvalue()))
        + inner.getvalue()
        + b"\x85R."
    )
    return paths
