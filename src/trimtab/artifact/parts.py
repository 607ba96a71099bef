"""The parts of a weight knob: the difference of one parameter, dense or as a product of two thin matrices."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.errors import KnobError, brief

ADDABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights to which a difference can be added."""
SAMPLE = 2**14
"""Values of a tensor that `digest_of` looks at: all of a small tensor, and this many, evenly spaced, of a large one."""


class LowRank(NamedTuple):
    """The product `b @ a`, `[out, in]`, as a LoRA adapter holds it."""

    a: Tensor  # [R, in]
    b: Tensor  # [out, R]

    @property
    def shape(self) -> torch.Size:
        """Shape of the product."""
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def rank(self) -> int:
        """Length of the side that the two share."""
        return self.a.shape[0]

    def dense(self) -> Tensor:
        """Return the product in float32."""
        return self.b.float() @ self.a.float()

    def norm(self) -> float:
        """Return the Frobenius norm of the product, without multiplying it out: ||b a||^2 = tr(b^T b a a^T)."""
        a, b = self.a.double(), self.b.double()
        return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


Part = Tensor | LowRank


def check_parameter_name(name: str) -> None:
    """Raise `KnobError` for a name that a terminal could not show."""
    if not name or not name.isprintable() or len(name) > 400:
        raise KnobError(f"A parameter's name is 1 to 400 printable characters; got {brief(name)}.")


def check_part(name: str, part: Part) -> None:
    """Raise `KnobError` for a name that a terminal could not show, and for two sides that have no product."""
    check_parameter_name(name)
    if isinstance(part, LowRank) and not (part.a.dim() == part.b.dim() == 2 and part.a.shape[0] == part.b.shape[1] > 0):
        raise KnobError(
            f"A low-rank difference is b [out, R] times a [R, in]; that of {name!r} has {list(part.b.shape)} and "
            f"{list(part.a.shape)}."
        )


def norm(part: Part) -> float:
    """Return the Frobenius norm."""
    if isinstance(part, LowRank):
        return part.norm()
    return float(torch.linalg.vector_norm(part.detach(), dtype=torch.float64))


def scaled(part: Part, factor: float) -> Part:
    """Multiply; 1 changes nothing, and a low-rank part is scaled on one side."""
    if factor == 1:
        return part
    return LowRank(part.a, factor * part.b) if isinstance(part, LowRank) else factor * part


def joined(one: Part, two: Part) -> Part:
    """Add; low-rank parts are put side by side, `[b1 b2] [a1; a2]`, so that nothing is left out."""
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return LowRank(torch.cat([one.a.float(), two.a.float()]), torch.cat([one.b.float(), two.b.float()], dim=1))
    first, second = (part.dense() if isinstance(part, LowRank) else part.float() for part in (one, two))
    return first + second


def labelled(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Return the tensors of parts as a file labels them; see `parts_of`."""
    return {
        label: tensor
        for name, part in parts.items()
        for label, tensor in (
            {f"a/{name}": part.a, f"b/{name}": part.b} if isinstance(part, LowRank) else {f"dense/{name}": part}
        ).items()
    }


def without_zeros(parts: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Leave out what changes nothing, as what an adapter holds of a layer that the model never calls, and so trains."""
    return {name: part for name, part in parts.items() if bool(part.a.any()) and bool(part.b.any())}


def digest_of(parts: Mapping[str, Part], *, whole: bool = False) -> str:
    """Return the sha256 of names, shapes and some values of every part, which tells their content from another's.

    `whole` takes every value.
    """
    state = hashlib.sha256()
    for name, part in parts.items():
        for tensor in part if isinstance(part, LowRank) else (part,):
            flat = tensor.detach().reshape(-1)
            stride = 1 if whole else -(-len(flat) // SAMPLE) | 1  # an odd stride meets every column
            some = flat[::stride].cpu().contiguous()
            state.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            state.update(some.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def check_fit(knob: str, parts: Mapping[str, Part], model: nn.Module, *, loaded: bool = True) -> None:
    """Raise `KnobError` for a parameter that the model has not, has in another shape, quantised or elsewhere.

    `loaded=False` takes a model without weights, made for comparing.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in parts if name not in known]
    if missing:
        raise KnobError(
            f"Knob {knob!r} changes {len(parts)} weights; this {type(model).__name__} lacks "
            f"{len(missing)} of them, {missing[0]!r} for one. Where transformers renames weights as it loads, take "
            "the difference of loaded models, not of folders; else use a knob made for this model"
            + (", and model.compile() in place of torch.compile(model)." if hasattr(model, "_orig_mod") else ".")
        )
    for name, part in parts.items():
        own = known[name]
        if own.dtype not in ADDABLE:
            raise KnobError(
                f"Knob {knob!r} changes {name!r}, which this {type(model).__name__} holds as {own.dtype}: "
                "nothing can be added to quantised weights. Load the model without quantisation."
            )
        if own.is_meta and loaded:
            raise KnobError(
                f"Knob {knob!r} changes {name!r}, which is off-loaded in this {type(model).__name__}, so that "
                "it cannot be changed. Load the model on one device."
            )
        if part.shape != own.shape:
            raise KnobError(
                f"Knob {knob!r} changes {name!r} in shape {list(part.shape)}; this {type(model).__name__} "
                f"has it in shape {list(own.shape)}. Use a knob made for this model."
            )


def parts_of(tensors: Mapping[str, Tensor], kind: str = "delta") -> dict[str, Part]:
    """Return the parts that labelled tensors of a kind of knob hold: `dense/NAME`, or `a/NAME` with `b/NAME`.

    Raises `KnobError` for a label of another form, and for a difference that is there twice.
    """
    parts: dict[str, Part] = {}
    for label in tensors:
        side, _, name = label.partition("/")
        if side != "b" and name in parts:
            raise KnobError(f"it holds the difference of {brief(name)} twice, dense and as a product.")
        if side == "dense":
            parts[name] = tensors[label]
        elif side == "a" and f"b/{name}" in tensors:
            parts[name] = LowRank(tensors[label], tensors[f"b/{name}"])
        elif not (side == "b" and f"a/{name}" in tensors):
            raise KnobError(f"it holds a tensor {brief(label)}, which a knob of kind {kind!r} has not.")
    return parts
