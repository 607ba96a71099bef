"""The difference of two sets of weights as a knob, subtracted in float32 and never two models in memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.artifact.delta import DeltaKnob
from trimtab.artifact.large import Entry, check_target, write_large
from trimtab.artifact.parts import LowRank, Part, check_parameter_name, without_zeros
from trimtab.errors import KnobError, OptionError, TrimtabWarning
from trimtab.weights.source import Source, Weights, is_adapter, read_adapter

BLOCK = 1 << 22
"""Entries that are subtracted at once."""
EXPO_GAIN = 1.3
"""The gain with which an Alignment Vector is ExPO (arXiv:2404.16792): beyond the aligned model by 0.3 (to 0.5)."""
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Stats(NamedTuple):
    norm: float
    zero: float
    """Share of entries that are exactly zero."""


def difference(
    plus: Source,
    minus: Source | None = None,
    *,
    name: str,
    method: str = "delta",
    gain: float = 1.0,
    dtype: str = "float32",
    out: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> DeltaKnob:
    """Return the knob `plus - minus`: of two models or checkpoint folders, or of two LoRA adapters of one base.

    A Preference Vector is theta+ minus theta-, of training with labels and with labels swapped (arXiv:2504.20106, eq.
    2); an Alignment Vector is aligned minus base (arXiv:2410.19206), and with gain `EXPO_GAIN` it is ExPO. Adapters are
    put side by side: `[s+ B+, -s- B-]` times `[A+; A-]` is their difference exactly, of twice the rank; one adapter
    alone is a difference to its base.

    Weights are subtracted in float32, in blocks, and only then rounded to `dtype`: float32; bfloat16, whose error of at
    most 1/512 is small beside the rounding of 16-bit weights; float16, which has few digits left below 6e-5. With `out`
    the knob is written there as it is made, atomically, and its tensors stay in the file. What is the same in both is
    left out. Two 16-bit checkpoints bring a `TrimtabWarning`: small changes were rounded away when they were saved.
    Raises `OptionError` that names the tensors where names or shapes do not match.
    """
    if dtype not in STORED:
        raise OptionError(f"Unknown dtype {dtype!r}. Known: {', '.join(STORED)}.")
    if out is not None:
        check_target(out)
    shell = DeltaKnob(name, method, {"weight": torch.zeros(1)}, gain, provenance=dict(provenance or {}))
    if is_adapter(plus) or (minus is not None and is_adapter(minus)):
        knob = replace(shell, parts=_adapters(plus, minus, STORED[dtype]))
        knob = knob.with_(diagnostics={"norms": knob.norms()})
        if out is None:
            return knob
        knob.save(out)
        return DeltaKnob.load(out)
    if minus is None:
        raise OptionError("A model alone is no difference. Pass the model to subtract, or a LoRA adapter.")
    pair = _Pair(Weights(plus), Weights(minus))
    stats = {label: pair.stats(label) for label in pair.names}
    changed = [label for label in pair.names if stats[label].norm > 0]
    if not changed:
        raise OptionError(f"{pair.plus.said} and {pair.minus.said} hold the same weights: there is no difference.")
    pair.warn(stats)
    diagnostics = {
        "norms": {label: stats[label].norm for label in changed},
        "zero": {label: stats[label].zero for label in changed},
        "unchanged": len(pair.names) - len(changed),
    }
    made = {label: partial(pair.subtract, label, STORED[dtype]) for label in changed}
    if out is None:
        parts = {label: torch.cat([*make()]).reshape(pair.plus.shapes[label]) for label, make in made.items()}
        return replace(shell, parts=parts, diagnostics=diagnostics)
    entries = [Entry(f"dense/{n}", STORED[dtype], pair.plus.shapes[n], make) for n, make in made.items()]
    write_large(out, entries, replace(shell, diagnostics=diagnostics).header())
    return DeltaKnob.load(out)


def random_like(knob: DeltaKnob, *, seed: int = 0) -> DeltaKnob:
    """Return a control: a dense knob of random normal entries, as long as `knob` in every tensor, at its gain."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Part] = {}
    for name in knob.parts:
        like = knob.dense(name).float()
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        drawn[name] = noise * (like.norm() / noise.norm())
    return DeltaKnob("random", "random", drawn, knob.gain)


class _Pair:
    """Two sets of weights with the same names and shapes."""

    def __init__(self, plus: Weights, minus: Weights) -> None:
        self.plus, self.minus = plus, minus
        for here, there in ((plus, minus), (minus, plus)):
            lone = sorted(here.shapes.keys() - there.shapes.keys())
            if lone:
                tied = (
                    " One of the two ties its output layer to its embedding."
                    if lone[0].endswith("lm_head.weight")
                    else ""
                )
                raise OptionError(
                    f"{len(lone)} weights of {here.said} are not in {there.said}: {_some(lone)}.{tied} A difference "
                    "needs two sets of weights of one model."
                )
        other = [name for name in sorted(plus.shapes) if plus.shapes[name] != minus.shapes[name]]
        if other:
            first = other[0]
            rows = len(plus.shapes[first]) == 2 and plus.shapes[first][1:] == minus.shapes[first][1:]
            raise OptionError(
                f"{len(other)} weights differ in shape: {_some(other)} ({list(plus.shapes[first])} and "
                f"{list(minus.shapes[first])})."
                + (" The vocabularies differ in size: resize the smaller one first." if rows else "")
            )
        self.names = sorted(plus.shapes)
        for name in self.names:
            check_parameter_name(name)

    def blocks(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return flat views of both sides, block by block."""
        sides = [side.get(name).reshape(-1) for side in (self.plus, self.minus)]
        return [(sides[0][i : i + BLOCK], sides[1][i : i + BLOCK]) for i in range(0, len(sides[0]), BLOCK)]

    def subtract(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the difference of one parameter as flat blocks, in main memory."""
        for a, b in self.blocks(name):
            block = (a.float() - b.float().to(a.device)).to(dtype)
            if not torch.isfinite(block).all():
                raise KnobError(f"The difference of {name!r} holds values that are not finite in {dtype}.")
            yield block.cpu()

    def stats(self, name: str) -> _Stats:
        square, zero, count = 0.0, 0, 0
        for a, b in self.blocks(name):
            block = a.float() - b.float().to(a.device)
            square += float(block.double().square().sum())
            if not math.isfinite(square):  # nothing compares with NaN: the weight would pass for unchanged
                raise KnobError(f"{name!r} holds values that are not finite, in {self.plus.said} or {self.minus.said}.")
            zero += int((block == 0).sum())
            count += len(block)
        return _Stats(square**0.5, zero / max(count, 1))

    def warn(self, stats: Mapping[str, _Stats]) -> None:
        short = [n for n in self.names if max(self.plus.dtypes[n].itemsize, self.minus.dtypes[n].itemsize) <= 2]
        if not short:
            return
        sizes = [torch.Size(self.plus.shapes[name]).numel() for name in short]
        zero = sum(stats[n].zero * size for n, size in zip(short, sizes, strict=True)) / sum(sizes)
        warnings.warn(
            "Both sets of weights are stored in 16 bits, so that small changes were rounded away when they were saved: "
            f"{zero:.0%} of the differences are exactly zero. Subtract float32 checkpoints if there are any.",
            TrimtabWarning,
            stacklevel=3,
        )


def _adapters(plus: Source, minus: Source | None, dtype: torch.dtype) -> dict[str, Part]:
    if not is_adapter(plus) or (minus is not None and not is_adapter(minus)):
        raise OptionError("One of the two is a LoRA adapter, the other is not. Pass two adapters of one base model.")
    assert not isinstance(plus, torch.nn.Module)
    assert not isinstance(minus, torch.nn.Module)
    first = read_adapter(plus)
    second = read_adapter(minus) if minus is not None else {}
    if first.keys() == second.keys() and all(map(torch.equal, *(_sides(parts) for parts in (first, second)))):
        raise OptionError(f"{plus} and {minus} hold the same adapter: there is no difference.")
    parts: dict[str, LowRank] = {}
    for name in sorted({*first, *second}):
        own = [(sign, part[name]) for sign, part in ((1.0, first), (-1.0, second)) if name in part]
        if len({part.shape for _, part in own}) > 1:
            raise OptionError(f"The adapters change {name!r} in two shapes: they are of two models.")
        a = torch.cat([part.a for _, part in own])
        b = torch.cat([sign * part.b for sign, part in own], dim=1)
        parts[name] = LowRank(a.to(dtype), b.to(dtype))
        if not all(bool(side.isfinite().all()) for side in parts[name]):
            raise KnobError(f"The difference of {name!r} holds values that are not finite in {dtype}.")
    return {**(without_zeros(parts) or parts)}


def _sides(parts: Mapping[str, LowRank]) -> list[Tensor]:
    return [side for name in sorted(parts) for side in parts[name]]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
