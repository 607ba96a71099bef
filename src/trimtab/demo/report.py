"""The demo's report as text: a table, what the table leaves out, two answers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

CONDITIONS = ("base", "knob", "knob_negative", "knob_half", "random", "shuffled")


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    for knob, tasks in report["results"].items():
        for task, entry in tasks.items():
            cells = [f"{100 * entry['base']['accuracy']:.1f}"]
            for condition in CONDITIONS[1:]:
                c = entry[condition]
                cells.append(
                    f"{100 * c['accuracy']:.1f} ({100 * c['difference']:+.1f}; {100 * c['difference_low']:+.1f} to "
                    f"{100 * c['difference_high']:+.1f})"
                )
            rows.append([knob, task, *cells])
    return rows


HEADS = ("knob", "task", "base", "strength 1", "strength -1", "strength 0.5", "random", "shuffled")


def _facts(report: Mapping[str, Any]) -> list[str]:
    """Say in sentences what the table leaves out."""
    lines: list[str] = []
    for name, chosen in report["chosen"].items():
        own = report["results"][name][name]
        sampled, share, within = own["sampled"], own["side_share"], own["accuracy_within_side"]
        lines.append(
            f"{name}: layer {chosen['layer']}, {chosen['position']}, steering {chosen['where']} tokens, gain "
            f"{chosen['gain']:g}. Sampled accuracy "
            f"{100 * sampled['base']['accuracy']:.1f} to {100 * sampled['knob']['accuracy']:.1f} percent "
            f"({100 * sampled['knob_negative']['accuracy']:.1f} at strength -1); share of the "
            f"preferred side {100 * share['base']:.1f} to {100 * share['knob']:.1f}; accuracy within that side "
            f"{_percent(within['base'])} to {_percent(within['knob'])}. Safe range of strengths "
            f"{report['tuning'][name]['safe_range'][0]:g} to {report['tuning'][name]['safe_range'][1]:g}."
        )
    s = report["seconds"]
    lines += [f"{name}: {note}" for name, notes in report["warnings"].items() for note in notes]
    lines.append(f"Learning took {s['learn']:.1f} s, tuning {s['tune']:.1f} s, everything {s['total']:.0f} s.")
    return lines


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}"


NOTE = (
    "Accuracy in percent on the test split, whose wordings neither training nor validation shows; in brackets the "
    "paired difference to base and its 95 % bootstrap interval. Of the control draws the one that gains most is shown; "
    "on tasks that are not the knob's own, controls have one draw. A control that tuning refuses counts as no "
    "difference."
)


def summary(report: Mapping[str, Any]) -> str:
    """Return the report as plain text for a terminal."""
    rows = [list(HEADS), *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines += ["", NOTE, "", *_facts(report)]
    for name, sample in report["samples"].items():
        lines += ["", f"[{name}] {sample['prompt']}", *_side_by_side(sample["base"], sample["knob"])]
    return "\n".join(lines)


def _side_by_side(base: str, steered: str) -> list[str]:
    """Set two answers in two columns, as wide as their longest lines."""
    left, right = ["base", "----", *base.splitlines()], ["strength 1", "----------", *steered.splitlines()]
    width = max(map(len, left))
    return [f"  {a:<{width}}  {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page beside its plots."""
    lines = ["# Trimtab demo", "", f"Model: {report['model']}, seed {report['seed']}.", ""]
    lines += ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(report)]
    lines += ["", NOTE, ""] + [f"- {fact}" for fact in _facts(report)] + [""]
    for name in report["chosen"]:
        lines += [f"## {name}", "", f"![dose-response](dose_response_{name}.png)", f"![sites](sites_{name}.png)", ""]
        sample = report["samples"][name]
        lines += ["```text", sample["prompt"], "", *_side_by_side(sample["base"], sample["knob"]), "```", ""]
    return "\n".join(lines)
