"""What makes a steering knob sound, whoever made it: names, sites, numbers, vectors, and which knobs go together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from trimtab.artifact.file import number
from trimtab.artifact.identity import IDENTITY, said
from trimtab.errors import KnobError, OptionError, brief, unknown_name
from trimtab.types import Site, check_where, is_knob_name

if TYPE_CHECKING:
    from trimtab.artifact.knob import Knob

Operation = Literal["add", "ablate", "piecewise", "kernel"]
OPERATIONS: tuple[Operation, ...] = ("add", "ablate", "piecewise", "kernel")
KINDS = ("steering", "delta", "lookahead")
_LAYER = r"0|[1-9][0-9]{0,3}"
_SITE = rf"({_LAYER})/[A-Za-z0-9_-]{{1,60}}(\[-?[0-9]{{1,6}}\])?"


def norms_of(stored: Mapping[str, object]) -> dict[int, float]:
    """Return a number for each layer, as a header holds them."""
    for layer in stored:
        if re.fullmatch(_LAYER, layer) is None:
            raise KnobError(f"A norm is that of a layer, 0 to 9999; got {brief(layer)}.")
    return {int(layer): number(norm, "norm") for layer, norm in stored.items()}


def parse_site(text: str) -> Site:
    """Read a site, in the one way in which it is written: two texts of one site would hide a vector."""
    if re.fullmatch(_SITE, text) is None:
        raise KnobError(f"A site is written layer/position, e.g. 4/last or 4/post_instruction[-1]; got {brief(text)}.")
    return Site.parse(text)


def sites_of(stored: object) -> tuple[Site, ...]:
    """Read further sites, as a header holds them."""
    texts = cast(list[object], stored) if isinstance(stored, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise KnobError(f'Further sites are a list such as ["4/last", "5/last"]; got {brief(stored)}.')
    return tuple(parse_site(text) for text in cast(list[str], texts))


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


def check_gain(gain: object) -> None:
    """Raise `KnobError` for a gain that is no number, not finite, or negative."""
    if isinstance(gain, bool) or not isinstance(gain, Real) or not 0 <= float(gain) < math.inf:
        raise KnobError(f"The gain must be finite and not negative; got {brief(gain)}. Turn a knob around with -knob.")


def check_knob_name(name: str) -> None:
    """Raise `KnobError` for a name that a setting could not spell or a terminal not show."""
    if not isinstance(name, str) or not is_knob_name(name):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise KnobError(
            f"A knob's name is 1 to 100 printable characters, no space, comma or equals sign; got {brief(name)}."
        )


def check_labels(name: str, licence: str | None) -> None:
    """Raise `KnobError` or `OptionError` for labels that no knob can have, before it is learned rather than after."""
    check_knob_name(name)
    if licence is not None and not isinstance(licence, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"A licence is text, such as 'apache-2.0'; got {brief(licence)}.")


def check_fields(knob: Knob) -> None:
    """Raise `KnobError` or `UnknownName` for a field that no knob can have, tensors aside."""
    check_knob_name(knob.name)
    if not (0 < len(knob.method) <= 100 and knob.method.isprintable()):
        raise KnobError(f"A method's name is 1 to 100 printable characters; got {brief(knob.method)}.")
    check_where(knob.where)
    if knob.kind != "steering":
        raise unknown_name("kind of knob", str(knob.kind), ("steering",))
    if knob.operation not in OPERATIONS:
        raise unknown_name("operation", str(knob.operation), OPERATIONS)
    check_gain(knob.gain)
    if (knob.operation == "kernel") != (knob.kernel is not None):
        has = "none" if knob.kernel is None else f"a {knob.kernel}"
        raise KnobError(
            f"Operation 'kernel' goes with examples, and examples with it alone; knob {knob.name!r} has operation "
            f"{knob.operation!r}, and examples: {has}. Learn a kernel with options={{'kernel': 'softmax'}}."
        )
    _ = knob.safe_range  # raises if there is one that makes no sense
    for site in (knob.site, *knob.vectors):
        parse_site(str(site))
    if knob.site not in knob.vectors:
        known = ", ".join(map(str, list(knob.vectors)[:3])) or "none"
        raise KnobError(
            f"The active site {knob.site} has no vector; there are {len(knob.vectors)}: {known}"
            f"{', ...' if len(knob.vectors) > 3 else ''}."
        )
    _check_further(knob)


def _check_further(knob: Knob) -> None:
    """Raise `KnobError` for further sites that a knob cannot have."""
    if knob.also and knob.operation != "add":
        raise KnobError(f"Only a knob that adds acts at several sites; {knob.name!r} has operation {knob.operation!r}.")
    layers = [site.layer for site in knob.sites]
    if len(set(layers)) < len(layers):
        raise KnobError(f"A knob acts once at a layer; got sites {', '.join(map(str, knob.sites[:8]))}.")
    for site in knob.also:
        if site not in knob.vectors:
            raise KnobError(f"Knob {knob.name!r} has no vector for its further site {site}.")


def check_vectors(knob: Knob) -> None:
    """Raise `KnobError` for vectors of several shapes, values that are not finite, and a layer without its norm."""
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
    if knob.kernel is not None:
        odd = sorted(knob.kernel.keys.keys() ^ knob.vectors.keys())
        if odd:
            raise KnobError(f"A kernel has examples where there are vectors, and nowhere else; {odd[0]} has one only.")
        if knob.kernel.width != shape[0]:
            raise KnobError(f"The vectors have width {shape[0]}, and the examples of the kernel {knob.kernel.width}.")
    for layer in sorted({site.layer for site in knob.vectors} | set(knob.norms)):
        norm = knob.norms.get(layer)
        if norm is None or not math.isfinite(norm) or norm <= 0:
            raise KnobError(f"Layer {layer} needs a positive mean residual norm; got {norm!r}.")
    length = knob.gain * knob.norms[knob.site.layer]
    if length > torch.finfo(torch.float32).max:
        raise KnobError(f"Strength 1 would add a vector of length {length:.4g}, which float32 cannot hold.")
    if knob.also and not knob.vectors[knob.site].any():
        raise KnobError(
            f"The vector of the active site {knob.site} is zero, so that nothing is in proportion to it at "
            f"{len(knob.also)} further sites. Make a site active whose vector is not."
        )
    if not all(bool(addend.isfinite().all()) for addend in knob.addends(1.0).values()):
        raise KnobError(f"Strength 1 of {knob.name!r} would add values that float32 cannot hold.")


def refuse_other_kind(knob: Any, other: object) -> None:
    """Raise `KnobError` for a knob of another kind, with which there is no arithmetic; anything else is let pass."""
    kind = getattr(other, "kind", None)
    if isinstance(kind, str) and kind in KINDS and kind != knob.kind:
        raise KnobError(
            f"Arithmetic is within a kind of knob: {knob.name!r} is of kind {knob.kind!r}, and the other of kind "
            f"{kind!r}. Steer with both at once: steer(model, {{a: 1, b: 1}})."
        )


def check_alike(a: Knob, b: Knob) -> None:
    """Raise `KnobError` for two knobs that have no sum."""
    if (a.operation, b.operation) != ("add", "add"):
        raise KnobError(
            "Only knobs that add can be summed; ablation is not linear, and what is piece-wise or a kernel depends on "
            "the stream. Steer with both at once."
        )
    layers = [{site.layer for site in knob.sites} for knob in (a, b)]
    if (layers[0], a.where) != (layers[1], b.where):
        raise KnobError(
            f"Knobs are summed at one layer, or at the same ones, on the same tokens; got {a.name!r} at {a.site} "
            f"({a.where}) and {b.name!r} at {b.site} ({b.where}). Steer with both: steer(model, {{a: 1, b: 1}})."
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
