"""The lookahead knob: a gradient of the weights, and how far along it the residual stream is moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from trimtab.artifact.base import PartsKnob
from trimtab.artifact.card import describe_lookahead
from trimtab.artifact.checks import norms_of
from trimtab.artifact.file import number, object_field, text_field
from trimtab.artifact.parts import Part, labelled, norm, scaled
from trimtab.errors import KnobError, OptionError, brief, unknown_name
from trimtab.types import WHERE, Site, Where, check_strength, check_where

Backend = Literal["exact", "scaled"]
POSITION = "lookahead"
"""The position of a lookahead's sites: it reads every token."""


@dataclass(frozen=True, eq=False)
class LookaheadKnob(PartsKnob):
    """A preference as the effect that a step down a gradient would have on the residual stream (COLD-FD).

    With G the gradient of a loss on examples by the weights up to a layer, strength s adds
    `-s * gain * norms[layer] / scales[layer] * J G` at every active layer, where `J G` is the derivative of that
    layer's output along G, for the tokens at hand: `alpha = s * gain` is in multiples of the mean residual norm. Paper:
    arXiv:2603.06495. Knobs are immutable and compare by identity.
    """

    KIND = "lookahead"
    OWN = frozenset("layers blocks norms scales where backend step per_token".split())

    name: str
    method: str
    parts: Mapping[str, Part] = field(repr=False)
    """The gradient of each parameter up to the highest candidate layer, by its name in the model."""
    norms: Mapping[int, float]
    """Mean residual norm per candidate layer, over response tokens of the pairs."""
    scales: Mapping[int, float]
    """Mean norm of `J G` per candidate layer, over the same tokens."""
    layers: tuple[int, ...]
    """The active layers. Displacements are those of the prompt without this knob, at every one of them."""
    blocks: str
    """Path of the list of decoder blocks, in the parameters' names."""
    gain: float
    """alpha at strength 1."""
    where: Where = "all"
    backend: Backend = "exact"
    """"exact" is the forward-mode derivative; "scaled" runs the model a small step away, and divides."""
    step: float | None = None
    """Length of the scaled step, in multiples of G (the paper's epsilon); None takes one that the dtype can resolve."""
    per_token: bool = False
    """Whether every token is moved by the same length, rather than by its own."""
    kind: Literal["lookahead"] = "lookahead"
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    diagnostics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tuning: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._settle("gradient")
        check_where(self.where)
        if self.backend not in get_args(Backend):
            raise unknown_name("backend", str(self.backend), get_args(Backend))
        if not isinstance(self.per_token, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise KnobError(f"per_token of a lookahead is true or false; got {self.per_token!r}.")
        if self.step is not None and not (math.isfinite(self.step) and self.step > 0):
            raise KnobError(f"The step of a lookahead is above 0; got {self.step!r}.")
        if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise KnobError(f"Active layers are several numbers, as in (3,) or (3, 4); got {brief(self.layers)}.")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.norms.keys() != self.scales.keys():
            raise KnobError(f"Knob {self.name!r} knows norms of layers {[*self.norms]} and scales of {[*self.scales]}.")
        for what, values in (("norm", self.norms), ("scale", self.scales)):
            for layer, value in values.items():
                if not (math.isfinite(value) and value > 0):
                    raise KnobError(f"Layer {layer} needs a positive {what}; got {value!r}.")
        if not self.layers or not set(self.layers) <= self.norms.keys():
            raise KnobError(f"Active layers are of {sorted(self.norms)}, and at least one; got {list(self.layers)}.")

    # What it does

    @property
    def operation(self) -> str:
        """What is done: "lookahead"."""
        return "lookahead"

    @property
    def top(self) -> int:
        """The highest active layer, up to which the second stream runs."""
        return max(self.layers)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The candidate layers as sites."""
        return tuple(Site(layer, POSITION) for layer in sorted(self.norms))

    @property
    def site(self) -> Site:
        """The highest active layer as a site."""
        return Site(self.top, POSITION)

    def alpha(self, strength: float) -> float:
        """Convert a strength to alpha, in multiples of the mean residual norm at the active layers."""
        return check_strength(strength) * self.gain

    def norm(self) -> float:
        """Return the Frobenius norm of the whole gradient."""
        return math.hypot(*(norm(part) for part in self.parts.values()))

    # Other knobs from this one

    def with_(
        self,
        *,
        name: str | None = None,
        site: Site | str | None = None,
        layers: tuple[int, ...] | None = None,
        gain: float | None = None,
        where: Where | None = None,
        backend: Backend | None = None,
        step: float | Literal["kept"] | None = "kept",
        per_token: bool | None = None,
        provenance: Mapping[str, Any] | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> LookaheadKnob:
        """Return a copy with some fields replaced; `site` names one active layer, as in "4/lookahead".

        A `step` of None is the one that the dtype resolves.

        Tuning belongs to one choice of layers, gain, place and way: replacing any of them drops it, unless a new
        `tuning` is passed along.
        """
        if site is not None:
            if layers is not None:
                raise OptionError("Pass either a site or layers.")
            active = Site.parse(site) if isinstance(site, str) else site
            if active not in self.sites:
                raise unknown_name("site", str(active), map(str, self.sites))
            layers = (active.layer,)
        new = replace(
            self,
            name=self.name if name is None else name,
            layers=self.layers if layers is None else layers,
            gain=self.gain if gain is None else gain,
            where=self.where if where is None else where,
            backend=self.backend if backend is None else backend,
            step=self.step if step == "kept" else step,
            per_token=self.per_token if per_token is None else per_token,
            provenance=self.provenance if provenance is None else provenance,
            diagnostics=self.diagnostics if diagnostics is None else diagnostics,
            tuning=self.tuning if tuning is None else tuning,
        )
        settled = ("layers", "gain", "where", "backend", "step", "per_token")
        same = all(getattr(self, part) == getattr(new, part) for part in settled)
        return new if same or tuning is not None else replace(new, tuning=None)

    def pruned(self, site: Site | str | None = None) -> LookaheadKnob:
        """Return a copy that keeps the active layers only, and no gradient of blocks above them."""
        new = self.with_(site=site)
        top = new.top
        return replace(
            new,
            parts={name: part for name, part in new.parts.items() if block_of(name, new.blocks) <= top},
            norms={layer: new.norms[layer] for layer in new.layers},
            scales={layer: new.scales[layer] for layer in new.layers},
        )

    def __mul__(self, factor: float) -> LookaheadKnob:
        """Scale the knob: strength 1 of `2 * knob` is strength 2 of `knob`; a negative factor turns it round."""
        factor = check_strength(factor, "factor")
        parts = self.parts if factor >= 0 else {name: scaled(part, -1.0) for name, part in self.parts.items()}
        told = {**self.provenance, "scaled": factor * number(self.provenance.get("scaled", 1.0), "scale")}
        return replace(self, parts=parts, gain=self.gain * abs(factor), provenance=told, diagnostics={}, tuning=None)

    __rmul__ = __mul__

    def __neg__(self) -> LookaheadKnob:
        return self * -1.0

    def __add__(self, other: object) -> LookaheadKnob:
        raise KnobError(
            "How far two gradients move the stream together is not known without a model, so that lookahead knobs have "
            "no sum. Steer with both at once: steer(model, {a: 1, b: 1})."
        )

    __radd__ = __sub__ = __rsub__ = __add__

    def described(self) -> dict[str, Any]:
        """Return what the gradient is made of: parameters, values that are stored, the largest rank."""
        tensors = labelled(self.parts)
        ranks = [len(tensor) for label, tensor in tensors.items() if label.startswith("a/")]
        return {
            "weights": len(self.parts),
            "values": sum(tensor.numel() for tensor in tensors.values()),
            "rank": max(ranks, default=None),
        }

    def card(self) -> str:
        """Describe the knob in a few readable lines."""
        return describe_lookahead(self)

    # File and model

    def header(self) -> dict[str, Any]:
        """Return what a file holds beside the tensors."""
        return {
            **super().header(),
            "layers": list(self.layers),
            "blocks": self.blocks,
            "norms": {str(layer): value for layer, value in sorted(self.norms.items())},
            "scales": {str(layer): value for layer, value in sorted(self.scales.items())},
            "where": self.where,
            "backend": self.backend,
            "step": self.step,
            "per_token": self.per_token,
        }

    @classmethod
    def _own_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        where, backend = text_field(header, "where"), text_field(header, "backend")
        if where not in WHERE or backend not in get_args(Backend):
            raise KnobError(f"where={brief(where)}, backend={brief(backend)}.")
        layers, per_token, step = header["layers"], header["per_token"], header["step"]
        whole = isinstance(layers, list) and all(type(layer) is int for layer in cast(list[object], layers))
        if not whole or not isinstance(per_token, bool):
            raise KnobError(f"layers={brief(layers)}, per_token={brief(per_token)}.")
        return {
            "norms": norms_of(object_field(header, "norms")),
            "scales": norms_of(object_field(header, "scales")),
            "layers": tuple(cast(list[int], layers)),
            "blocks": text_field(header, "blocks"),
            "where": where,
            "backend": backend,
            "step": None if step is None else number(step, "step"),
            "per_token": per_token,
        }


def block_of(name: str, blocks: str) -> int:
    """Return the number of the block that a parameter belongs to; -1 where it comes before them.

    >>> block_of("model.layers.3.mlp.up_proj.weight", "model.layers"), block_of("model.embed.weight", "model.layers")
    (3, -1)
    """
    inside = name.removeprefix(f"{blocks}.")
    first = inside.partition(".")[0]
    return int(first) if inside != name and first.isdigit() else -1
