"""The weight knob: a difference of weights, dense or of low rank, that strength scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from trimtab.artifact.base import PartsKnob
from trimtab.artifact.card import describe_delta
from trimtab.artifact.checks import refuse_other_kind
from trimtab.artifact.parts import LowRank, Part, joined, labelled, norm, scaled
from trimtab.errors import KnobError
from trimtab.types import Where, check_strength


@dataclass(frozen=True, eq=False)
class DeltaKnob(PartsKnob):
    """A preference as a difference of weights: strength s adds `s * gain * difference` to every weight it names.

    Preference Vectors (arXiv:2504.20106) and Alignment Vectors (arXiv:2410.19206) are such differences. Knobs are
    immutable and compare by identity.
    """

    KIND = "delta"

    name: str
    method: str
    parts: Mapping[str, Part] = field(repr=False)
    """The difference of each parameter, by its name in the model: dense, of the parameter's shape, or low rank."""
    gain: float = 1.0
    """Multiples of the difference at strength 1."""
    kind: Literal["delta"] = "delta"
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    diagnostics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tuning: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._settle("difference")

    # What it does

    @property
    def low_rank(self) -> bool:
        """Whether every part is of low rank, so that each row of a batch can have a strength of its own."""
        return all(isinstance(part, LowRank) for part in self.parts.values())

    def alpha(self, strength: float) -> float:
        """Convert a strength to multiples of the difference."""
        return check_strength(strength) * self.gain

    def dense(self, name: str) -> Tensor:
        """Return the difference of one parameter in float32, before gain and strength."""
        part = self.parts[name]
        return part.dense() if isinstance(part, LowRank) else part.float()

    def norms(self) -> dict[str, float]:
        """Return the Frobenius norm of each part, before gain and strength."""
        return {name: norm(part) for name, part in self.parts.items()}

    def norm(self) -> float:
        """Return the Frobenius norm of the whole difference at strength 1."""
        return self.gain * math.hypot(*self.norms().values())

    @property
    def where(self) -> Where:
        """Tokens that are touched: all, since weights know of no positions."""
        return "all"

    @property
    def operation(self) -> str:
        """What is done: "weights"."""
        return "weights"

    # Other knobs from this one

    def dense_copy(self) -> DeltaKnob:
        """Return the same difference with every part multiplied out, in float32."""
        return replace(self, parts={name: self.dense(name) for name in self.parts})

    def with_(
        self,
        *,
        name: str | None = None,
        method: str | None = None,
        gain: float | None = None,
        provenance: Mapping[str, Any] | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> DeltaKnob:
        """Return a copy with some fields replaced; another gain drops the tuning, unless a new one is passed along."""
        new = replace(
            self,
            name=self.name if name is None else name,
            method=self.method if method is None else method,
            gain=self.gain if gain is None else gain,
            provenance=self.provenance if provenance is None else provenance,
            diagnostics=self.diagnostics if diagnostics is None else diagnostics,
            tuning=self.tuning if tuning is None else tuning,
        )
        return new if new.gain == self.gain or tuning is not None else replace(new, tuning=None)

    def __mul__(self, factor: float) -> DeltaKnob:
        """Scale the knob: strength 1 of `2 * knob` is strength 2 of `knob`; a negative factor turns it round."""
        factor = check_strength(factor, "factor")
        parts = self.parts if factor >= 0 else {name: scaled(part, -1.0) for name, part in self.parts.items()}
        return replace(self, parts=parts, gain=self.gain * abs(factor), diagnostics={}, tuning=None)

    __rmul__ = __mul__

    def __neg__(self) -> DeltaKnob:
        return self * -1.0

    def __add__(self, other: DeltaKnob) -> DeltaKnob:
        """Return the knob whose strength 1 is strength 1 of both; low-rank parts are put side by side, exactly.

        Two parts `b1 a1` and `b2 a2` are `[b1 b2] [a1; a2]`: ranks add up, and nothing is left out. (Adding the a's and
        the b's apart, as PEFT's combination "linear" does, is another matrix.)
        """
        if not isinstance(other, DeltaKnob):  # pyright: ignore[reportUnnecessaryIsInstance]
            refuse_other_kind(self, other)
            return NotImplemented
        parts: dict[str, Part] = {}
        for name in {**self.parts, **other.parts}:
            own = [scaled(k.parts[name], k.gain) for k in (self, other) if name in k.parts]
            if len({tuple(part.shape) for part in own}) > 1:
                raise KnobError(
                    f"Knobs {self.name!r} and {other.name!r} change {name!r} in two shapes, "
                    f"{list(own[0].shape)} and {list(own[1].shape)}: they are of two models."
                )
            parts[name] = own[0] if len(own) == 1 else joined(own[0], own[1])
        told = [{"name": knob.name, **knob.provenance} for knob in (self, other)]
        shared = {key: value for key, value in self.provenance.items() if other.provenance.get(key) == value}
        return DeltaKnob(f"{self.name}+{other.name}"[:100], "sum", parts, provenance={**shared, "parts": told})

    def __sub__(self, other: DeltaKnob) -> DeltaKnob:
        return replace(self + -other, name=f"{self.name}-{other.name}"[:100])

    def described(self) -> list[dict[str, Any]]:
        """Return name, shape and rank (None where dense) of every part."""
        return [
            {"name": name, "shape": list(part.shape), "rank": part.rank if isinstance(part, LowRank) else None}
            for name, part in self.parts.items()
        ]

    def card(self) -> str:
        """Describe the knob in a few readable lines."""
        return describe_delta(self)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all parts as a file labels them; see `parts_of`."""
        return labelled(self.parts)
