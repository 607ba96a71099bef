"""Weight knobs on a live model: dense differences in its weights for a while, and the very bits back afterwards."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trimtab.artifact.delta import DeltaKnob
from trimtab.errors import KnobError
from trimtab.types import check_strength

BLOCK = 1 << 22
"""Entries that are computed at once: the float32 copies stay in the cache of a processor."""

Setting = Mapping[DeltaKnob, float]


class Live:
    """A model's weights with knobs in them; the originals are kept, and every change starts from them."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._kept: dict[str, Tensor] = {}

    def set(self, setting: Setting) -> None:
        """Put `weights + sum_k strength_k gain_k difference_k` in place, computed in float32 and rounded once.

        What earlier calls put there is replaced, not added to, so that no rounding piles up. Raises `KnobError` where a
        weight would not be finite; the model then has its own weights.
        """
        turned = {knob: alpha for knob, strength in setting.items() if (alpha := knob.alpha(strength))}
        for knob, alpha in turned.items():
            if abs(alpha) > torch.finfo(torch.float32).max:
                raise KnobError(f"Strength {setting[knob]:g} of {knob.name!r} is too large for float32.")
        wanted = {name for knob in turned for name in knob.parts}
        with torch.no_grad():
            for name in [*self._kept]:
                if name not in wanted:
                    self._parameters[name].copy_(self._kept.pop(name))
            try:
                for name in sorted(wanted):
                    self._write(name, turned)
            except BaseException:
                self.restore()
                raise

    def _write(self, name: str, turned: Mapping[DeltaKnob, float]) -> None:
        parameter = self._parameters[name]
        original = self._kept.setdefault(name, parameter.detach().clone())
        parts = [(knob.dense(name), alpha) for knob, alpha in turned.items() if name in knob.parts]
        flat, source = parameter.detach().reshape(-1), original.reshape(-1)
        finite = True
        for start in range(0, len(flat), BLOCK):
            piece = source[start : start + BLOCK].to(torch.float32, copy=True)  # never the original itself
            for delta, alpha in parts:
                piece.add_(delta.reshape(-1)[start : start + BLOCK].to(piece), alpha=alpha)
            rounded = piece.to(flat.dtype)
            finite = finite and bool(torch.isfinite(rounded).all())
            flat[start : start + BLOCK] = rounded
        if not finite:
            raise KnobError(f"At these strengths {name!r} would hold values that are not finite. Take smaller ones.")

    def restore(self) -> None:
        """Put the original weights back, bit for bit."""
        with torch.no_grad():
            for name, original in self._kept.items():
                self._parameters[name].copy_(original)
        self._kept.clear()


@contextmanager
def applied(model: nn.Module, setting: Setting) -> Generator[Live]:
    """Turn weight knobs inside the context: dense ones, several at once, at any strength; undone however it ends.

    The model is changed in place, for every thread and every row. Strength 0 everywhere touches nothing. Memory: a copy
    of the weights that are changed. Raises `KnobError` for a knob made for another model.
    """
    for knob, strength in setting.items():
        check_strength(strength, f"strength of {knob.name!r}")
        knob.check_shapes(model)
    live = Live(model)
    try:
        live.set(setting)
        yield live
    finally:
        live.restore()
