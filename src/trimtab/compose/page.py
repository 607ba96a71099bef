"""What composing found as a page for people: the Pareto front, the cross-talk matrix, and the settings behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.evals.page import COLOURS, GREY, figure, page, paragraph, table
from trimtab.files import write_atomically
from trimtab.types import format_setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("compose.json", "compose.html")
PANELS = 6
"""Pairs of preferences that are drawn."""

Row = Mapping[str, Any]


def write_report(record: Row, folder: str | Path) -> None:
    """Write the record of `trimtab.compose.Composed` to a folder as `compose.json`, and as a page, `compose.html`."""
    folder = Path(folder)
    write_atomically(folder / FILES[0], (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(folder / FILES[1], compose_page(record).encode())


def compose_page(record: Row) -> str:
    """Return one HTML page that needs nothing else."""
    names, chosen = preferences_of(record), record["chosen"]
    sections = [
        ("The Pareto front", _front(record, names)),
        ("Cross-talk", _cross_talk(record)),
        ("The goal, and what it rests on", _basis(record)),
        ("Every setting", _table(record, list(range(len(record["trials"]))))),
    ]
    scores = ", ".join(f"{name} {record['base']['scores'][name]:.3g} to {chosen['scores'][name]:.3g}" for name in names)
    lead = f"Chosen of {len(record['trials'])} settings: {format_setting(chosen['setting'])}. From base: {scores}."
    return page(f"Composition of {', '.join(record['knobs'])}", lead, sections)


def preferences_of(record: Row) -> list[str]:
    """Return the preferences that count towards the goal."""
    goal = record["goal"]
    return [*(name for name, weight in goal["weights"].items() if weight), *goal["targets"]]


def _front(record: Row, names: Sequence[str]) -> str:
    parts = [
        paragraph(
            "Settings that keep all budgets and floors, and that no other beats on one preference without losing on "
            "another. The goal chooses one of them, or a milder one that the items cannot tell from it. Below, they "
            "stand beside the base model and the choice."
        ),
        figure(draw_front(record), "Scores of every measured setting, on validation items.", "front"),
        _table(record, sorted({0, record["trials"].index(record["chosen"]), *record["front"]})),
    ]
    return "\n".join(parts)


def _cross_talk(record: Row) -> str:
    rows: list[list[str]] = []
    for knob, found in record["cross_talk"].items():
        cells = [f"{c['estimate']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})" for c in found["changes"].values()]
        rows.append([knob, f"{found['strength']:g}", *cells])
    heads = ["knob", "strength", *next(iter(record["cross_talk"].values()))["changes"]]
    label = "Change of each score by each knob alone. Independent knobs move one preference each."
    note = "Scores lie in 0 to 1; 95 percent intervals by paired bootstrap over items."
    return "\n".join([figure(draw_cross_talk(record), label, "crosstalk"), paragraph(note), table(heads, rows)])


def _basis(record: Row) -> str:
    goal, bias, options = record["goal"], record["selection_bias"], record["options"]
    told = [f"weight {value:g} on {name}" for name, value in goal["weights"].items()]
    told += [f"target {value:g} for {name}" for name, value in goal["targets"].items()]
    told += [f"floor {value:g} under {name}" for name, value in goal["floors"].items()]
    asked = ", ".join(f"{task['task']} ({task['role']}, {task['n']} items)" for task in record["tasks"])
    ranges = ", ".join(f"{name} {k['bounds'][0]:g} to {k['bounds'][1]:g}" for name, k in record["knobs"].items())
    return "\n".join(
        paragraph(text)
        for text in (
            f"Goal ({goal['rule']}): {', '.join(told)}. Guardrails may lose {options['budget']:g} of their items, and "
            f"{options['broken_budget']:g} of the answers may break.",
            f"The choice gains {record['gain']:.3g} over the base model. The best of {bias['settings']} useless "
            f"settings would seem to gain {bias['expected']:.2g}: what was chosen here must be tested on other items.",
            f"Measured on {asked}. Strengths: {ranges}. Search: {options['search']}, seed {options['seed']}.",
            f"Model: {record['model']['model']}. It took {record['seconds']:.1f} seconds.",
        )
    )


def _table(record: Row, numbers: Sequence[int]) -> str:
    base, chosen = record["base"], record["chosen"]
    heads = ["setting", *base["scores"], *base["guardrails"], "broken", "KL", "value", "misses"]
    rows: list[list[str]] = []
    for row in (record["trials"][number] for number in numbers):
        mark = " (chosen)" if row["setting"] == chosen["setting"] else ""
        scores = [f"{value:.3f}" for value in (*row["scores"].values(), *row["guardrails"].values(), row["broken"])]
        kl = "" if row["kl"] is None else f"{row['kl']:.3g}"
        misses = ", ".join(f"{name} by {amount:.3g}" for name, amount in row["misses"].items())
        rows.append([format_setting(row["setting"]) + mark, *scores, kl, f"{row['value']:.3f}", misses])
    return table(heads, rows, words=[len(heads) - 1])


# Plots


def draw_front(record: Row) -> Figure:
    """Draw every setting, one panel per pair of preferences; of a single preference, its score over the dose."""
    names = preferences_of(record)
    pairs = list(combinations(names, 2))[:PANELS]
    drawn, axes = _new(len(pairs) or 1)
    trials, front = record["trials"], set(record["front"])
    for axis, pair in zip(axes, pairs or [(None, names[0])], strict=True):
        kinds = {
            "misses a budget or floor": (lambda i: bool(trials[i]["misses"]), "x", GREY),
            "qualifies": (lambda i: not trials[i]["misses"] and i not in front, "o", COLOURS[5]),
            "Pareto front": (lambda i: i in front, "D", COLOURS[1]),
        }
        for label, (wanted, mark, colour) in kinds.items():
            points = [_point(trials[i], pair) for i in range(len(trials)) if wanted(i)]
            if points:
                axis.plot(*zip(*points, strict=True), mark, color=colour, label=label, alpha=0.85, markersize=6)
        for label, row, mark in (("base model", record["base"], "s"), ("chosen", record["chosen"], "*")):
            size = 16 if mark == "*" else 9
            axis.plot(*_point(row, pair), mark, color="#000000", fillstyle="none", markersize=size, label=label)
        axis.set(xlabel=pair[0] or "sum of strengths, signs apart", ylabel=pair[1], ylim=(-0.06, 1.06))
        if pair[0] is not None:
            axis.set_xlim(-0.06, 1.06)
        axis.grid(color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return drawn


def draw_cross_talk(record: Row) -> Figure:
    """Draw the matrix of changes, knob by task, with the figures in the cells."""
    found = record["cross_talk"]
    knobs, tasks = list(found), list(next(iter(found.values()))["changes"])
    grid = np.array([[found[knob]["changes"][task]["estimate"] for task in tasks] for knob in knobs])
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2.6 + 1.3 * len(tasks), 1.6 + 0.6 * len(knobs)), layout="constrained")
    axis = drawn.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    for (y, x), value in np.ndenumerate(grid):
        colour = "white" if abs(value) > 0.6 else "black"
        axis.text(x, y, f"{value:+.2f}", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_yticks(range(len(knobs)), [f"{knob} at {found[knob]['strength']:g}" for knob in knobs])
    drawn.colorbar(image, label="change of score")
    return drawn


def _new(panels: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process

    columns = min(panels, 3)
    rows = -(-panels // columns)
    drawn = Figure(figsize=(max(6.5, 4 * columns), 4 * rows + 0.5), layout="constrained")
    axes = list(drawn.subplots(rows, columns, squeeze=False).ravel())
    for spare in axes[panels:]:
        spare.set_axis_off()
    return drawn, axes[:panels]


def _point(row: Row, pair: tuple[str | None, str]) -> tuple[float, float]:
    x = sum(map(abs, row["setting"].values())) if pair[0] is None else row["scores"][pair[0]]
    return x, row["scores"][pair[1]]
