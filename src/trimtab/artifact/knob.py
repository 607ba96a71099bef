"""The steering knob: what it adds at which strength, arithmetic with knobs, saving and loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, float32

from trimtab.artifact.card import describe
from trimtab.artifact.checks import (
    OPERATIONS,
    Operation,
    check_alike,
    check_fields,
    check_vectors,
    norms_of,
    parse_site,
    refuse_other_kind,
    safe_range_of,
    sites_of,
)
from trimtab.artifact.file import KnobFile, number, object_field, read_file, text_field, write_file
from trimtab.artifact.identity import IDENTITY, check_identity
from trimtab.artifact.kernel import PARTS, KernelExamples
from trimtab.errors import KnobError, brief, unknown_name
from trimtab.ops import unit
from trimtab.types import WHERE, Site, Where, check_strength

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIELDS = frozenset(
    "format_version sha256 kind name method site gain norms where operation provenance diagnostics tuning".split()
)
"""What the header of a knob file holds: each of them, and where the knob has them "kernel" and "also"."""


@dataclass(frozen=True, eq=False)
class Knob:
    """A preference as a direction of the residual stream, with what it takes to apply and to explain it.

    Strength s adds `s * gain * norms[site.layer]` times the unit direction of the active site: `alpha = s * gain` is
    in multiples of the mean residual norm at that layer. At the sites of `also` it adds as much of each raw vector, in
    proportion. Other operations look at the residual stream h at the token:

    - "ablate": strength s removes the share s of the component along the direction u; the gain plays no part.
    - "piecewise" adds as much along u, but towards the side on which h lies: `sign(h . u) u` in place of `u`. It makes
      more of what is there, and a negative strength less (RepE, arXiv:2310.01405, section 3.2).
    - "kernel" weighs examples by how like h is to the states at which they were read, in place of `u`: `kernel`. Their
      sum has length 1 on average over the examples (COLD-Kernel, arXiv:2603.06495).

    Knobs are immutable and compare by identity.
    """

    name: str
    method: str
    vectors: Mapping[Site, Tensor]
    """Raw vector `[D]` float32 per candidate site; its length is what the method found, its direction is applied."""
    norms: Mapping[int, float]
    """Mean residual norm per layer, over response tokens of the pairs, the sequence's first token left out."""
    site: Site
    """The active site: the one that gain, alpha and `direction` speak of."""
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
    kernel: KernelExamples | None = None
    """The examples of operation "kernel", at the sites of the vectors, which are then what they have in common."""
    also: tuple[Site, ...] = ()
    """Sites at other layers where a knob that adds acts as well, as control vectors of other tools do at every layer:
    where the active site gets a multiple of its raw vector, each of these gets the same multiple of its own."""

    def __post_init__(self) -> None:
        check_fields(self)
        vectors = {site: v.detach().to("cpu", float32).clone() for site, v in sorted(self.vectors.items())}
        object.__setattr__(self, "vectors", vectors)
        check_vectors(self)

    # What it does

    @property
    def direction(self) -> Tensor:
        """Unit direction `[D]` float32 at the active site; zero if the vector is."""
        return self._unit.float()

    @cached_property
    def _unit(self) -> Tensor:
        return unit(self.vectors[self.site])  # float64; a batch asks for it row by row

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

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the knob acts: the active site, and those of `also`."""
        return (self.site, *self.also)

    def length(self, strength: float) -> float:
        """Return how long a vector `strength` adds at the active site, below 0 for one that is turned around."""
        return self.alpha(strength) * self.norms[self.site.layer]

    def addend(self, strength: float) -> Tensor:
        """Return what `strength` of operation "add" adds to the residual stream at the active site, `[D]` float32."""
        return (self.length(strength) * self._unit).float()

    def addends(self, strength: float) -> dict[int, Tensor]:
        """Return what `strength` of operation "add" adds at every layer where it acts, `[D]` float32 by layer."""
        found = {self.site.layer: self.addend(strength)}
        for site in self.also:
            share = self.length(strength) / self.raw_length(self.site)
            found[site.layer] = (share * self.vectors[site].double()).float()
        return found

    def raw_length(self, site: Site) -> float:
        """Return the length of what the method found at `site`: of the vector, or of weighted examples on average."""
        return float(self.vectors[site].double().norm()) if self.kernel is None else self.kernel.scales[site]

    def raw_gain(self, site: Site) -> float:
        """Return the gain at which strength 1 adds what the method found at `site`, over the mean residual norm."""
        return self.raw_length(site) / self.norms[site.layer]

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

        Another site without a gain sets the gain to the raw vector's length there, and leaves that site alone, without
        those of `also`. Tuning belongs to one site, gain, place and operation: replacing any of them drops it, unless a
        new `tuning` is passed along. Another operation than "kernel" drops its examples; raises `KnobError` for
        "kernel" where there are none.
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
            kernel=self.kernel if operation in (None, "kernel") else None,
            provenance=self.provenance if provenance is None else provenance,
            diagnostics=self.diagnostics if diagnostics is None else diagnostics,
            tuning=self.tuning if tuning is None else tuning,
            also=self.also if active == self.site else (),
        )
        same = all(getattr(self, part) == getattr(new, part) for part in ("site", "gain", "where", "operation"))
        return new if same or tuning is not None else replace(new, tuning=None)

    def pruned(self, site: Site | str | None = None) -> Knob:
        """Return a copy that keeps the sites where it acts only: those of the knob, or `site`, which becomes active."""
        new = self.with_(site=site)
        return replace(new.at(new.sites), norms={site.layer: new.norms[site.layer] for site in new.sites})

    def at(self, sites: Collection[Site]) -> Knob:
        """Return a copy that keeps these sites, those where it acts among them, and what is stored of each."""
        vectors = {site: self.vectors[site] for site in sites}
        return replace(self, vectors=vectors, kernel=self.kernel and self.kernel.at(sites))

    def __mul__(self, factor: float) -> Knob:
        """Scale the knob: strength 1 of `2 * knob` is strength 2 of `knob`; a negative factor turns every vector.

        Raises `KnobError` for a negative factor of a piece-wise knob, which is the same along a vector and against it,
        and for any but 1 of an ablation, in which neither gain nor sign play a part.
        """
        factor = check_strength(factor, "factor")
        if factor != 1 and self.operation == "ablate":
            raise KnobError(f"Knob {self.name!r} is an ablation, the same at any gain: set a strength.")
        if factor < 0 and self.operation == "piecewise":
            raise KnobError(
                f"Knob {self.name!r} is piece-wise, which is the same along a direction and against it: set a negative "
                "strength instead."
            )
        kernel = self.kernel.reversed() if self.kernel is not None and factor < 0 else self.kernel
        vectors = {site: vector if factor >= 0 else -vector for site, vector in self.vectors.items()}
        provenance = {**self.provenance, "scaled": factor * number(self.provenance.get("scaled", 1.0), "scale")}
        gain = self.gain * abs(factor)
        return replace(
            self, vectors=vectors, kernel=kernel, gain=gain, provenance=provenance, diagnostics={}, tuning=None
        )

    __rmul__ = __mul__

    def __neg__(self) -> Knob:
        return self * -1.0

    def __add__(self, other: Knob) -> Knob:
        """Return the knob whose strength 1 is strength 1 of both; they must act on the same tokens and layers."""
        if not isinstance(other, Knob):  # pyright: ignore[reportUnnecessaryIsInstance]
            refuse_other_kind(self, other)
            return NotImplemented
        check_alike(self, other)
        ours, theirs = self.addends(1.0), other.addends(1.0)
        vectors = {site: ours[site.layer].double() + theirs[site.layer].double() for site in self.sites}
        main = max(self.sites, key=lambda site: float(vectors[site].norm()) / self.norms[site.layer])
        shared = {key: self.provenance[key] for key in IDENTITY if key in self.provenance}
        parts = [{"name": knob.name, **knob.provenance} for knob in (self, other)]
        return Knob(
            name=f"{self.name}+{other.name}"[:100],  # as long as a name may be
            method="sum",
            vectors=vectors,
            norms={site.layer: self.norms[site.layer] for site in self.sites},
            site=main,
            gain=float(vectors[main].norm()) / self.norms[main.layer],
            where=self.where,
            provenance={**shared, "parts": parts},
            also=tuple(site for site in self.sites if site != main and vectors[main].any()),
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
        header: dict[str, Any] = {
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
        if self.also:
            header["also"] = list(map(str, self.also))
        tensors = {f"vector/{site}": vector for site, vector in self.vectors.items()}
        if self.kernel is not None:
            header["kernel"], tensors = self.kernel.header(), {**tensors, **self.kernel.tensors()}
        write_file(path, tensors, header)

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
    missing, unknown = sorted(FIELDS - header.keys()), sorted(header.keys() - FIELDS - {"kernel", "also"})
    if missing or unknown:
        wrong = f"lacks {brief(missing[0])}" if missing else f"has an unknown field {brief(unknown[0])}"
        raise KnobError(f"its header is wrong: it {wrong}.")
    parts = ("vector/", *PARTS) if "kernel" in header else ("vector/",)
    stray = [name for name in file.tensors if not name.startswith(parts)]
    if stray:
        raise KnobError(f"it holds a tensor {brief(stray[0])}, which a knob of kind 'steering' has not.")
    try:
        vectors, *examples = (
            {parse_site(name.removeprefix(part)): t for name, t in file.tensors.items() if name.startswith(part)}
            for part in parts
        )
        return Knob(
            name=text_field(header, "name"),
            method=text_field(header, "method"),
            vectors=vectors,
            norms=norms_of(object_field(header, "norms")),
            site=parse_site(text_field(header, "site")),
            gain=number(header["gain"], "gain"),
            where=where,
            operation=operation,
            provenance=object_field(header, "provenance"),
            diagnostics=object_field(header, "diagnostics"),
            tuning=None if header["tuning"] is None else object_field(header, "tuning"),
            kernel=KernelExamples.from_file(object_field(header, "kernel"), *examples) if examples else None,
            also=sites_of(header["also"]) if "also" in header else (),
        )
    except KnobError as error:
        raise KnobError(f"its content is wrong: {error}") from None
