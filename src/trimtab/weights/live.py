"""Weight knobs on a live model: dense differences in its weights for a while, and the very bits back afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trimtab.artifact.delta import DeltaKnob
from trimtab.artifact.parts import LowRank, Part
from trimtab.errors import KnobError
from trimtab.types import check_strength

BLOCK, LARGE_BLOCK = 1 << 19, 1 << 24
"""Entries that are computed at once: on a processor few enough to stay in its cache, elsewhere many for each launch."""

Setting = Mapping[DeltaKnob, float]


class Live:
    """A model's weights with knobs in them; the originals are set aside untouched, and every change starts from them.

    A changed parameter points to memory of its own, which costs one pass, and pointing back costs nothing. Copying the
    original away and back would cost two more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        names = Counter(self._parameters.values())
        self._tied = {name for name, parameter in self._parameters.items() if names[parameter] > 1}
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
        wanted = self._sort(turned)
        try:
            for parameter in [*self._kept]:
                if parameter not in wanted:
                    _point(parameter, self._kept.pop(parameter))
            for parameter, parts in wanted.items():
                self._write(parameter, parts)
        except BaseException:
            self.restore()
            raise

    def _sort(self, turned: Mapping[DeltaKnob, float]) -> dict[nn.Parameter, list[tuple[str, Part, float]]]:
        """Return what is to be added to each parameter; tied weights are one parameter under two names."""
        wanted: dict[nn.Parameter, list[tuple[str, Part, float]]] = {}
        for knob, alpha in turned.items():
            seen: dict[nn.Parameter, str] = {}
            for name, part in knob.parts.items():
                parameter = self._parameters[name]
                if name in self._tied and isinstance(part, LowRank):
                    raise KnobError(
                        f"This model ties {name!r} to other weights, and a difference of low rank is of one of their "
                        "uses alone, which changed weights cannot tell apart. Steer with a knob that is of low rank "
                        "throughout, or take knob.dense_copy() to change all uses."
                    )
                if parameter in seen:
                    raise KnobError(
                        f"{seen[parameter]!r} and {name!r} are one tensor in this model, which ties them: its "
                        "difference would count twice. Use a knob that names one of them."
                    )
                seen[parameter] = name
                wanted.setdefault(parameter, []).append((name, part, alpha))
        return wanted

    def _write(self, parameter: nn.Parameter, parts: Sequence[tuple[str, Part, float]]) -> None:
        original = self._kept.get(parameter)
        if original is None:
            source, changed = parameter.data, torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
        else:
            source, changed = original, parameter.data
        added = [(part.dense() if isinstance(part, LowRank) else part, alpha) for _, part, alpha in parts]
        if not _add(source, added, changed):
            raise KnobError(
                f"At these strengths {parts[0][0]!r} would hold values that are not finite. Take smaller ones."
            )
        self._kept[parameter] = source
        _point(parameter, changed)

    def restore(self) -> None:
        """Put the original weights back, bit for bit: the same memory, which nothing has written to."""
        while self._kept:
            _point(*self._kept.popitem())


@contextmanager
def applied(model: nn.Module, setting: Setting) -> Generator[Live]:
    """Turn weight knobs inside the context: dense ones, several at once, at any strength; undone however it ends.

    The model is changed, for every thread and every row. Strength 0 everywhere touches nothing. Memory: a copy of the
    weights that are changed. Parameters stay the objects they are, but lie elsewhere meanwhile: what holds their memory
    itself, as a view of a weight or a captured CUDA graph does, keeps the originals. Raises `KnobError` for a knob made
    for another model.
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


def _point(parameter: nn.Parameter, data: Tensor) -> None:
    """Let a parameter hold other values; a graph that saved the earlier ones will refuse to go backward."""
    countless = parameter.is_inference() or data.is_inference()  # made in inference mode: there are no versions
    parameter.data = data
    if not countless:
        torch.autograd.graph.increment_version(parameter)


def _add(source: Tensor, added: Sequence[tuple[Tensor, float]], result: Tensor) -> bool:
    """Write `source + sum alpha delta` to `result`, which is contiguous; False if any of it is not finite.

    One pass over memory: block by block, all that is done to a block before the next.
    """
    before, after = source.reshape(-1), result.reshape(-1)
    deltas = [(delta.reshape(-1), alpha) for delta, alpha in added]
    wide = torch.promote_types(result.dtype, torch.float32)
    size = BLOCK if result.device.type == "cpu" else LARGE_BLOCK
    buffer = torch.empty(0 if result.dtype == wide else min(size, len(after)), dtype=wide, device=result.device)
    sums: list[Tensor] = []
    for start in range(0, len(after), size):
        old, new = before[start : start + size], after[start : start + size]
        total = new if new.dtype == wide else buffer[: len(new)]
        base = old if old.dtype == wide else total.copy_(old)
        for delta, alpha in deltas:
            base = torch.add(base, delta[start : start + size].to(total), alpha=alpha, out=total)
        if total is not new:
            new.copy_(total)
        sums.append(new.sum())
    # Sums are a fast look at all values; one may overflow where no value does, and then each value is looked at.
    return not sums or bool(torch.stack(sums).isfinite().all()) or bool(result.isfinite().all())
