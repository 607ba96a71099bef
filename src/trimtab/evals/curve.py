"""The dose-response that tuning stored, as a table and as points to draw.

Knob files come from others, so nothing is assumed of their tables: what is not there, or not a row, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

LARGEST = 1e6
"""Beyond it a number is not drawn: no strength is so large, and a scale for it would show nothing else."""

Row = Mapping[str, Any]


class Table(NamedTuple):
    """Heads, and rows of as many values."""

    heads: list[str]
    rows: list[list[object]]


class Curve(NamedTuple):
    """Lines over strengths, NaN where nothing was measured; all but `kl` are shares, from 0 to 1."""

    strengths: list[float]
    score: list[float]
    guardrails: dict[str, list[float]]
    broken: list[float]
    kl: list[float]


def dose_table(tuning: Row) -> Table | None:
    """Return the dose-response, a row for each strength, or None where tuning stored none."""
    rails, rows = guardrails(tuning), as_rows(tuning.get("dose_response"))
    heads = ["strength", "alpha", "score", *rails, "broken", kl_head(tuning), "within budget"]
    cells = [
        [row.get("strength"), row.get("alpha"), *measures(row, rails), row.get("kl"), row.get("within_budget")]
        for row in rows
    ]
    return Table(heads, cells) if cells else None


def curve_of(tuning: Row) -> Curve | None:
    """Return the points of the dose-response, lowest strength first, or None where there are not two of them."""
    rows = [row for row in as_rows(tuning.get("dose_response")) if math.isfinite(_number(row, "strength"))]
    rows.sort(key=lambda row: _number(row, "strength"))
    if len(rows) < 2:
        return None
    rails = {name: [_number(as_object(row.get("guardrails")), name) for row in rows] for name in guardrails(tuning)}
    strengths, score, broken, kl = (
        [_number(row, key) for row in rows] for key in ("strength", "score", "broken", "kl")
    )
    return Curve(strengths, score, rails, broken, kl)


def guardrails(tuning: Row) -> list[str]:
    """Return the names of the guardrails."""
    return [str(name) for name in as_list(tuning.get("guardrails"))]


def kl_head(tuning: Row) -> str:
    """Say what the KL was measured on."""
    return f"KL on {'guardrails' if guardrails(tuning) else 'answers'}"


def measures(row: Row, rails: Sequence[str]) -> list[object]:
    """Return score, guardrails and broken share of a row."""
    kept = as_object(row.get("guardrails"))
    return [row.get("score"), *(kept.get(rail) for rail in rails), row.get("broken")]


def as_object(value: object) -> Row:
    """Return a JSON object, or an empty one for anything else."""
    return cast(Row, value) if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[object]:
    """Return a list, or an empty one for anything else."""
    return cast(list[object], value) if isinstance(value, list) else []


def as_rows(value: object) -> list[Row]:
    """Return the objects in a list."""
    return [cast(Row, row) for row in as_list(value) if isinstance(row, Mapping)]


def _number(row: Row, name: str) -> float:
    """Return a number that can be drawn, NaN for anything else."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else math.nan
