"""Knobs as the servers of engines list them: what a client needs to know in order to turn one, as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from trimtab.artifact import AnyKnob, Knob
from trimtab.engines.admission import Admission
from trimtab.evals.curve import curve_of


def listed(admission: Admission, directions: Collection[str] = ()) -> dict[str, Any]:
    """Return the knobs of an engine as `GET /v1/knobs` shows them; `directions` names those that it projects on."""
    entries = [describe(name, knob, projects=name in directions) for name, knob in admission.knobs.items()]
    return {"object": "list", "dose": admission.dose, "data": entries}


def describe(name: str, knob: AnyKnob, *, projects: bool = False) -> dict[str, Any]:
    """Return a knob's entry in a list; `projects` says whether an engine reads components along its direction."""
    return {
        "id": name,
        "object": "knob",
        "kind": knob.kind,
        "method": knob.method,
        "where": knob.where,
        "layer": knob.site.layer if isinstance(knob, Knob) else None,
        "layers": sorted(site.layer for site in knob.sites) if isinstance(knob, Knob) else None,
        "gain": knob.gain,
        "safe_range": None if knob.safe_range is None else list(knob.safe_range),
        "projects": projects,
    }


def explain(knob: AnyKnob) -> dict[str, Any]:
    """Return what is worth showing of a single knob beside its entry: its card, and what tuning measured of it."""
    return {"card": knob.card(), "dose_response": dose_response(knob)}


def dose_response(knob: AnyKnob) -> dict[str, Any] | None:
    """Return the dose-response as lists of one length, lowest strength first; None where tuning stored none.

    What was not measured is None; so is, where a share from 0 to 1 is expected, any other number.
    """
    curve = curve_of(knob.tuning or {})
    if curve is None:
        return None
    return {
        "strengths": curve.strengths,
        "score": _shares(curve.score),
        "guardrails": {name: _shares(values) for name, values in curve.guardrails.items()},
        "broken": _shares(curve.broken),
        "kl": [value if math.isfinite(value) else None for value in curve.kl],
    }


def _shares(values: Sequence[float]) -> list[float | None]:
    return [value if 0 <= value <= 1 else None for value in values]
