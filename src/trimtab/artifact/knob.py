"""The steering knob: what it adds at which strength, arithmetic with knobs, saving and loading."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from trimtab.artifact.card import describe
from trimtab.artifact.file import KnobFile, number, object_field, read_file, text_field, write_file
from trimtab.artifact.identity import IDENTITY, check_identity, said
from trimtab.errors import KnobError, brief, unknown_name
from trimtab.ops import unit
from trimtab.types import WHERE, Site, Where, check_strength, check_where, is_knob_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Operation = Literal["add", "ablate"]
OPERATIONS: tuple[Operation, ...] = ("add", "ablate")
FIELDS = frozenset(
    "format_version sha256 kind name method site gain norms where operation provenance diagnostics tuning".split()
)
"""What the header of a knob file holds: each of them, and nothing else."""

_LAYER = r"0|[1-9][0-9]{0,3}"
_SITE = rf"({_LAYER})/[A-Za-z0-9_-]{{1,60}}(\[-?[0-9]{{1,6}}\])?"


@dataclass(frozen=True, eq=False)
class Knob:
    """A preference as a direction of the residual stream, with what it takes to apply and to explain it.

    Strength s adds `s * gain * norms[site.layer]` times the unit direction of the active site: `alpha = s * gain` is
    in multiples of the mean residual norm at that layer. With operation "ablate", strength s removes the share s of
    the component along the direction, and the gain plays no part. Knobs are immutable and compare by identity.
    """

    name: str
    method: str
    vectors: Mapping[Site, Tensor]
    """Raw vector `[D]` float32 per candidate site; its length is what the method found, its direction is applied."""
    norms: Mapping[int, float]
    """Mean residual norm per layer, over response tokens of the pairs, the sequence's first token left out."""
    site: Site
    """The active site: the one that `addend` and `direction` speak of."""
    gain: float
    """alpha at strength 1."""
    where: Where = "all"
    operation: Operation = "add"
    kind: Literal["steering"] = "steering"
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Method, paper, options passed and defaulted, identity of the model, hash of the pairs, tool version, licence."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tuning: Mapping[str, Any] | None = None
    """What tuning measured: its table, the dose-response, `safe_range`; None before tuning."""

    def __post_init__(self) -> None:
        _check_fields(self)
        vectors = {site: v.detach().to("cpu", torch.float32).clone() for site, v in sorted(self.vectors.items())}
        object.__setattr__(self, "vectors", vectors)
        _check_vectors(self)

    # What it does

    @property
    def direction(self) -> Tensor:
        """Unit direction `[D]` float32 at the active site; zero if the vector is."""
        return unit(self.vectors[self.site]).float()

    @property
    def width(self) -> int:
        """Hidden width D of the model the knob is for."""
        return len(self.vectors[self.site])

    @property
    def safe_range(self) -> tuple[float, float] | None:
        """Strengths that tuning found safe, lowest and highest; None before tuning."""
        return safe_range_of(self.tuning)

    def alpha(self, strength: float) -> float:
        """Convert a strength to alpha, in multiples of the mean residual norm at the active site."""
        return check_strength(strength) * self.gain

    def addend(self, strength: float) -> Tensor:
        """Return what `strength` adds to the residual stream at the active site, `[D]` float32."""
        return (self.alpha(strength) * self.norms[self.site.layer] * unit(self.vectors[self.site])).float()

    def raw_gain(self, site: Site) -> float:
        """Return the gain at which strength 1 adds the raw vector of `site`: its norm over the mean residual norm."""
        return float(self.vectors[site].double().norm()) / self.norms[site.layer]

    # Other knobs from this one

    def with_(
        self,
        *,
        name: str | None = None,
        site: Site | str | None = None,
        gain: float | None = None,
        where: Where | None = None,
        operation: Operation | None = None,
        provenance: Mapping[str, Any] | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> Knob:
        """Return a copy with some fields replaced.

        Another site without a gain sets the gain to the raw vector's length there. Tuning belongs to one site, gain,
        place and operation: replacing any of them drops it, unless a new `tuning` is passed along.
        """
        active = Site.parse(site) if isinstance(site, str) else site or self.site
        if active not in self.vectors:
            raise unknown_name("site", str(active), map(str, self.vectors))
        if gain is None:
            gain = self.gain if active == self.site else self.raw_gain(active)
        new = replace(
            self,
            name=self.name if name is None else name,
            site=active,
            gain=gain,
            where=self.where if where is None else where,
            operation=self.operation if operation is None else operation,
            provenance=self.provenance if provenance is None else provenance,
            diagnostics=self.diagnostics if diagnostics is None else diagnostics,
            tuning=self.tuning if tuning is None else tuning,
        )
        same = all(getattr(self, part) == getattr(new, part) for part in ("site", "gain", "where", "operation"))
        return new if same or tuning is not None else replace(new, tuning=None)

    def pruned(self, site: Site | str | None = None) -> Knob:
        """Return a copy that keeps one site only: the active one, or `site`, which becomes active."""
        new = self.with_(site=site)
        return replace(
            new, vectors={new.site: new.vectors[new.site]}, norms={new.site.layer: new.norms[new.site.layer]}
        )

    def __mul__(self, factor: float) -> Knob:
        """Scale the knob: strength 1 of `2 * knob` is strength 2 of `knob`; a negative factor turns every vector."""
        factor = check_strength(factor, "factor")
        vectors = {site: vector if factor >= 0 else -vector for site, vector in self.vectors.items()}
        provenance = {**self.provenance, "scaled": factor * number(self.provenance.get("scaled", 1.0), "scale")}
        gain = self.gain * abs(factor)
        return replace(self, vectors=vectors, gain=gain, provenance=provenance, diagnostics={}, tuning=None)

    __rmul__ = __mul__

    def __neg__(self) -> Knob:
        return self * -1.0

    def __add__(self, other: Knob) -> Knob:
        """Return the knob whose strength 1 is strength 1 of both; they must act on the same tokens of one layer."""
        if not isinstance(other, Knob):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        _check_alike(self, other)
        norm = self.norms[self.site.layer]
        vector = self.addend(1.0).double() + other.addend(1.0).double()
        shared = {key: self.provenance[key] for key in IDENTITY if key in self.provenance}
        parts = [{"name": knob.name, **knob.provenance} for knob in (self, other)]
        return Knob(
            name=f"{self.name}+{other.name}"[:100],  # as long as a name may be
            method="sum",
            vectors={self.site: vector},
            norms={self.site.layer: norm},
            site=self.site,
            gain=float(vector.norm()) / norm,
            where=self.where,
            provenance={**shared, "parts": parts},
        )

    def __sub__(self, other: Knob) -> Knob:
        return replace(self + -other, name=f"{self.name}-{other.name}"[:100])

    # File and model

    def save(self, path: str | Path) -> None:
        """Write the knob to one safetensors file, atomically: whatever happens, the old file or the new one is there.

        Missing folders are made, and a link is replaced. Raises `KnobError` for what JSON cannot hold, where writing
        fails, and where a file stands that is no knob. A process that is killed meanwhile may leave
        `.NAME.XXXXXXXX.part`, which can be deleted.
        """
        header = {
            "kind": self.kind,
            "name": self.name,
            "method": self.method,
            "site": str(self.site),
            "gain": self.gain,
            "norms": {str(layer): norm for layer, norm in sorted(self.norms.items())},
            "where": self.where,
            "operation": self.operation,
            "provenance": dict(self.provenance),
            "diagnostics": dict(self.diagnostics),
            "tuning": None if self.tuning is None else dict(self.tuning),
        }
        write_file(path, {f"vector/{site}": vector for site, vector in self.vectors.items()}, header)

    @staticmethod
    def load(path: str | Path) -> Knob:
        """Read a knob file, which runs no code.

        Raises `KnobError` that names what is wrong with a damaged or foreign file, or with a knob of another kind.
        """
        try:
            return _from_file(read_file(path))
        except KnobError as error:
            raise KnobError(f"Cannot load a knob from {brief(str(path), 240)}: {error}") from None

    def check(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        strict: bool = True,
        hashes: bool = True,
    ) -> None:
        """Compare the knob with a model, and with its tokenizer if given; what the knob does not know is not compared.

        Raises `KnobError` for another width, a layer the model does not have, another architecture or another chat
        template; `strict=False` turns the last two into warnings. Another configuration, number of layers, revision or
        vocabulary is always a warning; `hashes=False` leaves configuration and vocabulary out, whose hashes take time.
        """
        top = max(site.layer for site in self.vectors)
        check_identity(self.name, self.width, top, self.provenance, model, tokenizer, strict=strict, hashes=hashes)

    def card(self) -> str:
        """Describe the knob in a few readable lines."""
        return describe(self)


def _from_file(file: KnobFile) -> Knob:
    header = file.header
    kind = text_field(header, "kind")
    if kind != "steering":
        raise KnobError(f"it is a knob of kind {brief(kind)}; trimtab.load_knob reads every kind there is.")
    where, operation = (text_field(header, name) for name in ("where", "operation"))
    if where not in WHERE or operation not in OPERATIONS:
        raise KnobError(f"its header is wrong: where={brief(where)}, operation={brief(operation)}.")
    missing, unknown = sorted(FIELDS - header.keys()), sorted(header.keys() - FIELDS)
    if missing or unknown:
        wrong = f"lacks {brief(missing[0])}" if missing else f"has an unknown field {brief(unknown[0])}"
        raise KnobError(f"its header is wrong: it {wrong}.")
    stray = [name for name in file.tensors if not name.startswith("vector/")]
    if stray:
        raise KnobError(f"it holds a tensor {brief(stray[0])}, which a knob of kind 'steering' has not.")
    try:
        return Knob(
            name=text_field(header, "name"),
            method=text_field(header, "method"),
            vectors={_site(name.removeprefix("vector/")): tensor for name, tensor in file.tensors.items()},
            norms=norms_of(object_field(header, "norms")),
            site=_site(text_field(header, "site")),
            gain=number(header["gain"], "gain"),
            where=where,
            operation=operation,
            provenance=object_field(header, "provenance"),
            diagnostics=object_field(header, "diagnostics"),
            tuning=None if header["tuning"] is None else object_field(header, "tuning"),
        )
    except KnobError as error:
        raise KnobError(f"its content is wrong: {error}") from None


def norms_of(stored: Mapping[str, object]) -> dict[int, float]:
    """Return a number for each layer, as a header holds them."""
    for layer in stored:
        if re.fullmatch(_LAYER, layer) is None:
            raise KnobError(f"A norm is that of a layer, 0 to 9999; got {brief(layer)}.")
    return {int(layer): number(norm, "norm") for layer, norm in stored.items()}


def _site(text: str) -> Site:
    """Read a site, in the one way in which it is written: two texts of one site would hide a vector."""
    if re.fullmatch(_SITE, text) is None:
        raise KnobError(f"A site is written layer/position, e.g. 4/last or 4/post_instruction[-1]; got {brief(text)}.")
    return Site.parse(text)


def safe_range_of(tuning: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """Return the lowest and the highest safe strength that tuning stored; raises `KnobError` for what is no range."""
    bounds: object = (tuning or {}).get("safe_range")
    if bounds is None:
        return None
    values = cast(list[object], bounds) if isinstance(bounds, list | tuple) else []
    low, high = (number(value, "safe range") for value in values) if len(values) == 2 else (1.0, -1.0)
    if low > high:
        raise KnobError(f"Its safe range is {brief(bounds)}; expected the lowest and the highest strength.")
    return low, high


def check_knob_name(name: str) -> None:
    """Raise `KnobError` for a name that a setting could not spell or a terminal not show."""
    if not is_knob_name(name):
        raise KnobError(
            f"A knob's name is 1 to 100 printable characters, no space, comma or equals sign; got {brief(name)}."
        )


def _check_fields(knob: Knob) -> None:
    check_knob_name(knob.name)
    if not (0 < len(knob.method) <= 100 and knob.method.isprintable()):
        raise KnobError(f"A method's name is 1 to 100 printable characters; got {brief(knob.method)}.")
    check_where(knob.where)
    if knob.kind != "steering":
        raise unknown_name("kind of knob", str(knob.kind), ("steering",))
    if knob.operation not in OPERATIONS:
        raise unknown_name("operation", str(knob.operation), OPERATIONS)
    if not math.isfinite(knob.gain) or knob.gain < 0:
        raise KnobError(f"The gain must be finite and not negative; got {knob.gain!r}. Turn a knob around with -knob.")
    _ = knob.safe_range  # raises if there is one that makes no sense
    for site in (knob.site, *knob.vectors):
        _site(str(site))
    if knob.site not in knob.vectors:
        known = ", ".join(map(str, list(knob.vectors)[:3])) or "none"
        raise KnobError(
            f"The active site {knob.site} has no vector; there are {len(knob.vectors)}: {known}"
            f"{', ...' if len(knob.vectors) > 3 else ''}."
        )


def _check_vectors(knob: Knob) -> None:
    shape = knob.vectors[knob.site].shape
    for site, vector in knob.vectors.items():
        if vector.dim() != 1 or not len(vector):
            raise KnobError(f"Every vector must have shape [D]; that of site {site} has {brief(list(vector.shape))}.")
        if vector.shape != shape:
            raise KnobError(
                f"Every vector must have one shape; that of site {site} has {list(vector.shape)}, not {list(shape)}."
            )
        if not torch.isfinite(vector).all():
            raise KnobError(f"The vector of site {site} holds values that are not finite.")
    for layer in sorted({site.layer for site in knob.vectors} | set(knob.norms)):
        norm = knob.norms.get(layer)
        if norm is None or not math.isfinite(norm) or norm <= 0:
            raise KnobError(f"Layer {layer} needs a positive mean residual norm; got {norm!r}.")
    length = knob.gain * knob.norms[knob.site.layer]
    if length > torch.finfo(torch.float32).max:
        raise KnobError(f"Strength 1 would add a vector of length {length:.4g}, which float32 cannot hold.")


def _check_alike(a: Knob, b: Knob) -> None:
    if (a.operation, b.operation) != ("add", "add"):
        raise KnobError("Only knobs that add can be summed; ablation is not linear. Steer with both at once.")
    if (a.site.layer, a.where) != (b.site.layer, b.where):
        raise KnobError(
            f"Knobs are summed at one layer on the same tokens; got {a.name!r} at {a.site} ({a.where}) and {b.name!r} "
            f"at {b.site} ({b.where}). Steer with both at once: steer(model, {{a: 1, b: 1}})."
        )
    if a.width != b.width:
        raise KnobError(f"Knob {a.name!r} has width {a.width} and knob {b.name!r} {b.width}: they are of two models.")
    for key in ("architecture", "n_layers", "template_hash"):
        ours, theirs = a.provenance.get(key), b.provenance.get(key)
        if None not in (ours, theirs) and ours != theirs:
            raise KnobError(
                f"Knobs {a.name!r} and {b.name!r} were learned with another {IDENTITY[key]}: {said(ours)} and "
                f"{said(theirs)}."
            )
