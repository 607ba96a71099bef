"""Weight knobs on a live model: dense differences in its weights for a while, and the very bits back afterwards."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import EllipsisType

import torch
from torch import Tensor, nn

from trimtab.artifact.delta import DeltaKnob, LowRank
from trimtab.errors import KnobError
from trimtab.types import check_strength

BLOCK = 1 << 18
"""Entries that are computed at once where weights are not float32: the float32 copies stay in a processor's cache."""

Setting = Mapping[DeltaKnob, float]


class Live:
    """A model's weights with knobs in them.

    Changed weights lie in memory of their own, and the originals are never written to: they are what every change
    starts from, and what comes back, bit for bit, whatever happened meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._kept: dict[nn.Parameter, Tensor] = {}

    def set(self, setting: Setting) -> None:
        """Put `weights + sum_k strength_k gain_k difference_k` in place, computed in float32 and rounded once.

        What earlier calls put there is replaced, not added to, so that no rounding piles up. Raises `KnobError` where a
        weight would not be finite; the model then has its own weights.
        """
        turned = {knob: alpha for knob, strength in setting.items() if (alpha := knob.alpha(strength))}
        for knob, alpha in turned.items():
            if abs(alpha) > torch.finfo(torch.float32).max:
                raise KnobError(f"Strength {setting[knob]:g} of {knob.name!r} is too large for float32.")
        wanted = self._wanted(sorted({name for knob in turned for name in knob.parts}))
        with torch.no_grad():
            for parameter in [p for p in self._kept if p not in wanted]:
                parameter.data = self._kept.pop(parameter)
            try:
                for parameter, name in wanted.items():
                    self._write(parameter, name, turned)
            except BaseException:
                self.restore()
                raise

    def _wanted(self, names: Sequence[str]) -> dict[nn.Parameter, str]:
        """Return the parameters of these names; raises `KnobError` for one that cannot be changed, or goes by two."""
        wanted: dict[nn.Parameter, str] = {}
        for name in names:
            parameter = self._parameters[name]
            if parameter in wanted:
                raise KnobError(
                    f"{wanted[parameter]!r} and {name!r} are one tensor in this model, which ties them: its difference "
                    "would count twice. Use a knob that names one of them."
                )
            if parameter.is_meta:
                raise KnobError(f"{name!r} is off-loaded, so that it cannot be changed. Load the model on one device.")
            wanted[parameter] = name
        return wanted

    def _write(self, parameter: nn.Parameter, name: str, turned: Mapping[DeltaKnob, float]) -> None:
        if parameter not in self._kept:
            self._kept[parameter] = parameter.data
            parameter.data = torch.empty_like(parameter.data)
        original, changed = self._kept[parameter], parameter.data
        parts = [(knob.parts[name], alpha) for knob, alpha in turned.items() if name in knob.parts]
        deltas = [(p.dense() if isinstance(p, LowRank) else p, alpha) for p, alpha in parts]
        for rows in _row_blocks(changed):
            _add(changed[rows], original[rows], [(delta[rows], alpha) for delta, alpha in deltas])
        # A sum is one pass, and not finite where an entry is not; one that only overflowed is looked at entry by entry.
        if not bool(torch.isfinite(changed.sum())) and not bool(torch.isfinite(changed).all()):
            raise KnobError(f"At these strengths {name!r} would hold values that are not finite. Take smaller ones.")

    def restore(self) -> None:
        """Give the model its own weights back."""
        for parameter, original in self._kept.items():
            parameter.data = original
        self._kept.clear()


def _row_blocks(tensor: Tensor) -> Iterator[slice | EllipsisType]:
    """Yield what to compute at once: everything, or on a CPU in 16 bits rows of `BLOCK` entries together."""
    if tensor.dtype == torch.float32 or tensor.device.type != "cpu" or not tensor.dim():
        yield ...
        return
    step = max(1, BLOCK * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), step):
        yield slice(start, start + step)


def _add(target: Tensor, source: Tensor, deltas: Sequence[tuple[Tensor, float]]) -> None:
    """Write `source + sum alpha delta` into `target`, in float32 throughout and rounded once."""
    if target.dtype == torch.float32:
        for number, (delta, alpha) in enumerate(deltas):
            torch.add(target if number else source, delta.to(target), alpha=alpha, out=target)
        return
    wide = source.float()
    for delta, alpha in deltas:
        wide.add_(delta.to(wide), alpha=alpha)
    target.copy_(wide)


@contextmanager
def applied(model: nn.Module, setting: Setting) -> Generator[Live]:
    """Turn weight knobs inside the context: dense ones, several at once, at any strength; undone however it ends.

    The model is changed for every thread and every row. Strength 0 everywhere touches nothing. Memory: once more the
    weights that are changed. Raises `KnobError` for a knob made for another model.
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
