"""What a knob went through, as text: the candidate sites of learning, the tables of tuning.

Knob files come from others, so nothing is assumed of their tables: what is not there, or not a row, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from trimtab.errors import printable
from trimtab.evals.curve import Row, as_list, as_object, as_rows, dose_table, guardrails, kl_head, measures

SHOWN_SITES = 8
_STATISTICS = ("relative_norm", "cos_r_mu", "angle", "pairwise_cosine", "probe_auc", "top5_share")
_OF_GRADIENTS = ("pairwise_cosine", "probe_auc", "top5_share")
"""The rest compares two answers, where a gradient is one."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "pair"), counted(20, "pair")
    ('1 pair', '20 pairs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def columns(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Align rows under their heads, in text; columns without a value in any row are left out.

    >>> print(columns(["site", "gain", "score"], [["4/last", 0.5, None], ["12/last", 1.25, None]]))
    site     gain
    4/last   0.5
    12/last  1.25
    """
    kept = [i for i in range(len(heads)) if any(row[i] is not None for row in rows)]
    lines = [[heads[i] for i in kept], *([_cell(row[i]) for i in kept] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write the same table in Markdown.

    >>> print(markdown(["site", "score"], [["4/last", None], ["a|b", 0.5]]))
    | site | score |
    |---|---|
    | 4/last |  |
    | a\\|b | 0.5 |
    """
    kept = [i for i in range(len(heads)) if any(row[i] is not None for row in rows)]
    lines = [[heads[i] for i in kept], *([_cell(row[i]) for i in kept] for row in rows)]
    first, *rest = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    return "\n".join([first, "|" + "---|" * len(kept), *rest])


def facts(entries: Mapping[str, object]) -> str:
    """Write named facts, one per line; those that are None are left out."""
    return "\n".join(f"{key:<12}{value}" for key, value in entries.items() if value is not None)


def sites_text(diagnostics: Row) -> str | None:
    """Return the best candidate sites of learning with their diagnostics, or None where there are none."""
    selection, statistics = as_object(diagnostics.get("selection")), as_object(diagnostics.get("sites"))
    ranking = [pair for pair in as_list(selection.get("table")) if isinstance(pair, list) and len(cast(Any, pair)) == 2]
    rows: list[list[object]] = []
    gradients = any("first_order" in as_object(about) for about in statistics.values())
    names = _OF_GRADIENTS if gradients else _STATISTICS
    for site, score in cast(list[list[object]], ranking[:SHOWN_SITES]):
        about = as_object(statistics.get(str(site)))
        rows.append([site, score, *(about.get(name) for name in names)])
    if not rows:
        return None
    more = f", {SHOWN_SITES} of {len(ranking)}" if len(ranking) > SHOWN_SITES else ""
    return f"candidate sites, best first by {_cell(selection.get('rule'))}{more}\n" + columns(
        ["site", "score", *names], rows
    )


def tuning_text(tuning: Row | None, site: object, where: str, gain: float) -> str | None:
    """Return the finalists and the dose-response of tuning, the chosen setting marked, or None before tuning."""
    if tuning is None:
        return None
    rails, kl = guardrails(tuning), kl_head(tuning)
    parts: list[str] = []
    finalists = as_rows(tuning.get("table"))
    if finalists:
        own = (str(site), where, gain)
        chosen = [(row.get("site"), row.get("where", where), row.get("gain")) == own for row in finalists]
        base = as_object(tuning.get("base"))
        rows = [["", "base", None, None, None, *measures(base, rails), None, None]]
        for row, mark in zip(finalists, chosen, strict=True):
            place = ["*" if mark else "", row.get("site"), row.get("where"), row.get("gain"), row.get("margin")]
            rows.append([*place, *measures(row, rails), row.get("kl"), row.get("within_budget")])
        heads = ["", "site", "steers", "gain", "margin", "score", *rails, "broken", kl, "within budget"]
        judged = _cell(tuning.get("task")) if tuning.get("task") else "margin of the pairs"
        parts.append(f"finalists, judged by {judged} (* chosen)\n{columns(heads, rows)}")
        bias = as_object(tuning.get("selection_bias"))
        if bias:
            parts.append(
                f"selection bias: of {_cell(bias.get('settings'))} useless settings the best would seem to gain "
                f"{_cell(bias.get('expected'))} on these {_cell(bias.get('items'))} items"
            )
    curve = dose_table(tuning)
    if curve is not None:
        parts.append(f"dose-response\n{columns(*curve)}")
    return "\n\n".join(parts) or None


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return printable(text)
