"""The plots of a reproduction: accuracy by system, by pairs, by dose, by site, and against seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.evals.page import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_KIND_COLOURS = {"base": GREY, "steer": COLOURS[0], "examples": COLOURS[2], "train": COLOURS[1]}
_KINDS = {"base": "bare model", "steer": "steered", "examples": "shown examples", "train": "trained"}
_MARKS = ("o", "s", "^", "D", "v")


def new_figure(width: float, height: float, columns: int, *, share: bool = False) -> tuple[Figure, list[Any]]:
    """Return a figure of so many inches, and its panels side by side; `share` gives them one vertical axis."""
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process

    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, list(np.atleast_1d(drawn.subplots(1, columns, squeeze=False, sharey=share)[0]))


def by_system(tables: Mapping[str, Mapping[str, Sequence[Row]]]) -> Figure:
    """Draw every system's test accuracy, one panel per domain, one mark per model; `tables[model][domain]` are rows."""
    first = next(iter(tables.values()))
    drawn, axes = new_figure(11, 0.36 * max(map(len, first.values())) + 1.9, len(first))
    for panel, (axis, domain) in enumerate(zip(axes, first, strict=True)):
        titles = [row["system"] for row in first[domain]]
        for number, domains in enumerate(tables.values()):
            for row in domains[domain]:
                if row["system"] not in titles:
                    continue
                y = titles.index(row["system"]) + (number - (len(tables) - 1) / 2) * 0.22
                colour = _KIND_COLOURS[row["kind"]]
                shift = row["greedy"] - row["gain"]
                low, high = 100 * (shift + row["gain_low"]), 100 * (shift + row["gain_high"])
                axis.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.6)
                axis.plot(100 * row["greedy"], y, _MARKS[number % len(_MARKS)], color=colour, markersize=6)
        axis.set_yticks(range(len(titles)), titles if panel == 0 else [])
        axis.invert_yaxis()
        axis.set(xlabel="percent right (greedy)", title=domain, xlim=(-3, 103))
        axis.grid(axis="x", color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    handles = [_mark(axes[0], _KIND_COLOURS[kind], "o", name) for kind, name in _KINDS.items()]
    if len(tables) > 1:
        handles += [_mark(axes[0], "#000000", _MARKS[i % len(_MARKS)], model) for i, model in enumerate(tables)]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _mark(axis: Any, colour: str, mark: str, label: str) -> Any:
    return axis.plot([], [], mark, color=colour, label=label)[0]


def by_pairs(rows: Mapping[str, Sequence[Row]], before: Mapping[str, float]) -> Figure:
    """Draw accuracy by number of pairs, every seed a dot; `before` is the bare model's accuracy by domain."""
    drawn, axes = new_figure(10, 4.2, len(rows))
    for axis, (domain, found) in zip(axes, rows.items(), strict=True):
        names = list(dict.fromkeys(row["system"] for row in found))
        for name, colour, mark in zip(names, cycle(COLOURS), cycle(_MARKS), strict=False):
            own = [row for row in found if row["system"] == name]
            axis.plot([r["pairs"] for r in own], [100 * r["mean"] for r in own], mark + "-", color=colour, label=name)
            for row in own:
                dots = [100 * score for score in row["by_seed"]]
                axis.plot([row["pairs"]] * len(dots), dots, ".", color=colour, alpha=0.5, markersize=5)
        axis.axhline(100 * before[domain], color=GREY, linestyle=":", label="bare model")
        axis.set_xscale("log")
        ticks = sorted({row["pairs"] for row in found})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="pairs", ylabel="percent right (greedy)", title=domain, ylim=(-3, 103))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, loc="center right")
    return drawn


def by_dose(curves: Mapping[str, Row], rails: Sequence[str]) -> Figure:
    """Draw score, guardrails and broken answers over alpha, on validation questions."""
    drawn, axes = new_figure(10, 4.4, len(curves))
    for axis, (domain, curve) in zip(axes, curves.items(), strict=True):
        rows = curve["rows"]
        alphas = [row["alpha"] for row in rows]
        axis.plot(alphas, [100 * row["score"] for row in rows], "o-", color=COLOURS[0], linewidth=2, label="score")
        for i, (rail, colour) in enumerate(zip(rails, cycle(COLOURS[2:]), strict=False)):
            axis.plot(alphas, [100 * row["guardrails"][i] for row in rows], "--", color=colour, label=rail)
        axis.plot(alphas, [100 * row["broken"] for row in rows], ":", color="#000000", label="broken answers")
        axis.axvline(curve["chosen_alpha"], color=COLOURS[0], alpha=0.35, linewidth=5, label="chosen alpha")
        axis.axvline(curve["paper_alpha_1"], color=GREY, alpha=0.5, linewidth=5, label="the paper's alpha 1")
        axis.set(xlabel="alpha (multiples of the mean residual norm)", ylabel="percent", ylim=(-3, 103), title=domain)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return drawn


def by_site(maps: Mapping[str, Row]) -> Figure:
    """Draw the score of every layer and position on validation questions, with the figures in the cells."""
    drawn, axes = new_figure(10, 4.0, len(maps))
    image: Any = None
    for axis, (domain, found) in zip(axes, maps.items(), strict=True):
        rows = found["rows"]
        layers, places = sorted({r["layer"] for r in rows}), sorted({r["position"] for r in rows})
        grid = np.full((len(places), len(layers)), np.nan)
        for row in rows:
            grid[places.index(row["position"]), layers.index(row["layer"])] = 100 * row["score"]
        image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=100)
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "black" if value > 55 else "white"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set_yticks(range(len(places)), places if axis is axes[0] else [])
        axis.set(xlabel="layer", title=f"{domain}, {found['where']} tokens, alpha {found['alpha']:g}")
    drawn.colorbar(image, ax=axes, label="percent right", shrink=0.8)
    return drawn


def by_seconds(tables: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw accuracy against the seconds of learning and tuning together, which differ by orders of magnitude."""
    drawn, axes = new_figure(10, 4.2, len(tables))
    spent = [_seconds(row) for rows in tables.values() for row in rows if _seconds(row)]
    decades = [math.floor(math.log10(min(spent, default=1))), math.ceil(math.log10(max(spent, default=10)))]
    ticks = [10.0**decade for decade in range(decades[0], max(decades[1], decades[0] + 1) + 1)]
    for axis, (domain, rows) in zip(axes, tables.items(), strict=True):
        for row in rows:
            seconds = _seconds(row)
            if not seconds or row["kind"] == "base" or row["control"]:
                continue
            axis.plot(seconds, 100 * row["greedy"], "o", color=_KIND_COLOURS[row["kind"]])
            label = row["name"] + (f" {row['pairs']}" if row["kind"] == "train" else "")
            at = (seconds, 100 * row["greedy"])
            axis.annotate(label, at, xytext=(4, 3), textcoords="offset points", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(ticks[0], ticks[-1])
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="seconds, learning and tuning", ylabel="percent right (greedy)", title=domain, ylim=(-3, 106))
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def _seconds(row: Row) -> float:
    return (row["learn_seconds"] or 0.0) + (row["tune_seconds"] or 0.0)
