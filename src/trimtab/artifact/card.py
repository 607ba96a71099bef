"""A knob as a person reads it: what it does at which strength, where it comes from, and what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from trimtab.artifact.identity import IDENTITY
from trimtab.errors import printable
from trimtab.ops import multiplier_from_alpha, palrs_from_alpha

if TYPE_CHECKING:
    from trimtab.artifact.delta import DeltaKnob
    from trimtab.artifact.knob import Knob
    from trimtab.artifact.lookahead import LookaheadKnob


SHOWN = 8
"""Candidate layers that are named one by one."""


def describe(knob: Knob) -> str:
    """Describe a knob in a few lines, each a name and what is known under it."""
    known = knob.provenance
    layers = sorted({site.layer for site in knob.vectors})
    lines = {
        "knob": f"{knob.name} ({knob.kind}, {knob.method})",
        "site": f"{knob.site}, one of {len(knob.vectors)} in layers {layers[0]} to {layers[-1]}",
        "acts at": _acts_at(knob),
        "strength 1": "removes the component along the direction" if knob.operation == "ablate" else _dose(knob),
        "kernel": knob.kernel and str(knob.kernel),
        "where": f"{knob.operation} at {knob.where} tokens",
        "safe range": describe_safe_range(knob),
        "imported": _origin(known),
        **{IDENTITY[key]: known.get(key) for key in IDENTITY},
        "pairs": f"{known.get('pairs_count')}, sha256 {known.get('pairs_hash')}" if known.get("pairs_hash") else None,
        "paper": known.get("paper"),
        "options": _pairs(known.get("options")),
        **{key: known.get(key) for key in ("licence", "created", "tool")},
    }
    return _card(lines, knob.diagnostics)


def _acts_at(knob: Knob) -> str | None:
    """Name the layers of a knob that acts at several."""
    if not knob.also:
        return None
    layers = sorted(site.layer for site in knob.sites)
    shown = ", ".join(map(str, layers)) if len(layers) <= SHOWN else f"{layers[0]} to {layers[-1]}"
    return f"{len(layers)} layers at once: {shown}"


def describe_delta(knob: DeltaKnob) -> str:
    """Describe a weight knob in a few lines."""
    known, parts = knob.provenance, knob.described()
    ranks = sorted({part["rank"] for part in parts if part["rank"] is not None})
    dense = sum(part["rank"] is None for part in parts)
    shapes = [f"{dense} dense"] if dense else []
    shapes += [f"{len(parts) - dense} of rank {' to '.join(map(str, sorted({ranks[0], ranks[-1]})))}"] if ranks else []
    stored: object = knob.diagnostics.get("fidelity")
    fidelity = cast(Mapping[str, object], stored) if isinstance(stored, Mapping) else {}
    error, kl = fidelity.get("relative_error"), fidelity.get("kl")
    lines = {
        "knob": f"{knob.name} ({knob.kind}, {knob.method})",
        "weights": f"{len(parts)}: {', '.join(shapes)}",
        "strength 1": f"{knob.gain:.4g} times the difference",
        "where": "every token, and in its dense form every row of a batch" if dense else "every token",
        "left out": f"{error:.2%} of the difference's length, by compression" if isinstance(error, float) else None,
        "divergence": f"{kl:.3g} nats a token from the difference before compression"
        if isinstance(kl, float)
        else None,
        "safe range": describe_safe_range(knob),
        "imported": _origin(known),
        **{IDENTITY[key]: known.get(key) for key in IDENTITY},
        "pairs": f"{known.get('pairs_count')}, sha256 {known.get('pairs_hash')}" if known.get("pairs_hash") else None,
        "anchors": _anchors(known),
        "paper": known.get("paper"),
        "options": _pairs(known.get("options")),
        **{key: known.get(key) for key in ("licence", "created", "tool")},
    }
    return _card(lines, knob.diagnostics)


def describe_lookahead(knob: LookaheadKnob) -> str:
    """Describe a lookahead knob in a few lines."""
    known, made = knob.provenance, knob.described()
    energy: object = knob.diagnostics.get("energy")
    layers, every = ", ".join(map(str, knob.layers)), sorted(knob.norms)
    candidates = ", ".join(map(str, every)) if len(every) <= SHOWN else f"{len(every)}, {every[0]} to {every[-1]}"
    others = f", of {candidates}" if len(every) > len(knob.layers) else ""
    lines = {
        "knob": f"{knob.name} ({knob.kind}, {knob.method})",
        "layers": layers + others,
        "strength 1": f"alpha {knob.gain:.4g}" + (" at every token alike" if knob.per_token else " on average"),
        "where": f"lookahead at {knob.where} tokens",
        "derivative": "exact, in forward mode" if knob.backend == "exact" else _step(knob),
        "gradient": f"{made['weights']} weights, {made['values']} values"
        + (f", of rank {made['rank']} at most" if made["rank"] else ""),
        "energy kept": f"{energy:.2%} of the gradient that was learned" if isinstance(energy, float) else None,
        "safe range": describe_safe_range(knob),
        **{IDENTITY[key]: known.get(key) for key in IDENTITY},
        "pairs": f"{known.get('pairs_count')}, sha256 {known.get('pairs_hash')}" if known.get("pairs_hash") else None,
        "paper": known.get("paper"),
        "options": _pairs(known.get("options")),
        **{key: known.get(key) for key in ("licence", "created", "tool")},
    }
    return _card(lines, knob.diagnostics)


def _step(knob: LookaheadKnob) -> str:
    return "by a step of " + ("a length that the dtype resolves" if knob.step is None else f"{knob.step:g} times it")


def _origin(known: Mapping[str, object]) -> str | None:
    """Say which file of which tool a knob was made of; a foreign file may hold anything there."""
    told = known.get("imported")
    if not isinstance(told, Mapping):
        return None
    held = cast(Mapping[str, object], told)
    return f"from {held.get('from')}, file {held.get('file')}, sha256 {held.get('sha256')}"


def _anchors(known: Mapping[str, object]) -> str | None:
    """Return what the pairs were that a training held still; a foreign file may hold anything there."""
    options = known.get("options")
    told = cast(Mapping[str, object], options).get("anchors") if isinstance(options, Mapping) else None
    if not isinstance(told, Mapping):
        return None
    held = cast(Mapping[str, object], told)
    return f"{held.get('count')}, sha256 {held.get('hash')}"


def _card(lines: Mapping[str, object], diagnostics: Mapping[str, object]) -> str:
    rows = [f"{key:<22}{printable(str(value))}" for key, value in lines.items() if value not in (None, "")]
    notes: object = diagnostics.get("warnings")
    for note in cast(list[object], notes) if isinstance(notes, list) else []:
        rows.append(f"{'warning':<22}{printable(str(note))}")
    return "\n".join(rows)


def describe_safe_range(knob: Knob | DeltaKnob | LookaheadKnob) -> str:
    """Say which strengths tuning found safe, and whether anything but broken answers could have spoken against them."""
    if knob.safe_range is None:
        return "not tuned"
    low, high = knob.safe_range
    tuning = knob.tuning or {}
    doubts = [] if tuning.get("guardrails") else ["no guardrail"]
    broken, more = _share(tuning.get("base"), "broken"), _share(tuning.get("options"), "broken_budget")
    if broken + more >= 1:  # any dose keeps within that
        doubts.append(f"{broken:.0%} of the bare model's answers are broken, and {more:.0%} more were allowed to be")
    return f"{low:g} to {high:g}" + (f" ({'; '.join(doubts)})" if doubts else "")


def _share(part: object, name: str) -> float:
    share = cast(Mapping[str, object], part).get(name) if isinstance(part, Mapping) else None
    return float(share) if isinstance(share, int | float) else 0.0


def _dose(knob: Knob) -> str:
    """Say what strength 1 adds, in our unit and in those of PaLRS and CAA."""
    norm, length = knob.norms[knob.site.layer], knob.raw_length(knob.site)
    mean = " on average over the examples" if knob.kernel else ""
    said = f"alpha {knob.gain:.4g}: length {knob.gain * norm:.4g}{mean} where the mean residual norm is {norm:.4g}"
    if knob.operation == "piecewise":
        said += "; towards the side of the direction on which the token lies"
    if length:
        times = multiplier_from_alpha(knob.gain, length, norm)
        raw = "their weighted sum (COLD-Steer's eta)" if knob.kernel else "the raw vector (CAA's multiplier)"
        said += f"; {times:.4g} times {raw}"
    sites: object = knob.diagnostics.get("sites")
    here = cast(Mapping[str, object], sites).get(str(knob.site)) if isinstance(sites, Mapping) else None
    chosen = cast(Mapping[str, object], here).get("mu_plus_norm") if isinstance(here, Mapping) else None
    if isinstance(chosen, float) and chosen > 0 and not knob.kernel:
        said += f"; {palrs_from_alpha(knob.gain, chosen, norm):.4g} in PaLRS's unit (Eq. 4)"
    return said


def _pairs(options: object) -> str:
    items = cast(Mapping[str, object], options).items() if isinstance(options, Mapping) else ()
    return ", ".join(f"{key}={value}" for key, value in items if key != "anchors")
