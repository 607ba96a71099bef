"""The plots of Preference Vectors: the grid of strengths, systems, the scale, and both kinds of knob at equal KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.evals.page import COLOURS, GREY
from trimtab.reproduce.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def by_strengths(grid: Mapping[str, Sequence[Sequence[float]]], strengths: Sequence[float]) -> Figure:
    """Draw two heat maps of `grid[name][first][second]`: the first knob turned upwards, the second to the right."""
    drawn, axes = new_figure(10, 4.4, len(grid))
    one, other = grid
    image: Any = None
    for axis, (name, rows) in zip(axes, grid.items(), strict=True):
        image = axis.imshow(100 * np.array(rows), origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=100)
        for (y, x), value in np.ndenumerate(100 * np.array(rows)):
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 55 else "white")
        axis.set_xticks(range(len(strengths)), [f"{s:g}" for s in strengths])
        axis.set_yticks(range(len(strengths)), [f"{s:g}" for s in strengths])
        axis.set(xlabel=f"strength of {other}", ylabel=f"strength of {one}", title=f"score on {name}")
    drawn.colorbar(image, ax=axes, label="percent of test answers", shrink=0.8)
    return drawn


def by_system(rows: Sequence[Mapping[str, Any]], two: Sequence[str]) -> Figure:
    """Draw every system by its scores on the two preferences, with intervals."""
    drawn, (axis,) = new_figure(9, 6, 1)
    for row, colour, mark in zip(rows, cycle(COLOURS[:7]), cycle("osD^vPX*"), strict=False):
        (x, x_low, x_high), (y, y_low, y_high) = (row["scores"][name] for name in two)
        axis.plot([100 * x_low, 100 * x_high], [100 * y] * 2, color=colour, alpha=0.5)
        axis.plot([100 * x] * 2, [100 * y_low, 100 * y_high], color=colour, alpha=0.5)
        axis.plot(100 * x, 100 * y, mark, color=colour, label=row["system"], markersize=8)
    axis.set(xlabel=f"{two[0]}, percent", ylabel=f"{two[1]}, percent", xlim=(-3, 103), ylim=(-3, 103))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return drawn


def by_scale(rows: Sequence[Mapping[str, Any]], two: Sequence[str]) -> Figure:
    """Draw scores, guardrails and broken answers along one strength for both."""
    drawn, (axis,) = new_figure(9, 4.4, 1)
    scales = [row["strength"] for row in rows]
    for name, colour in zip(two, COLOURS, strict=False):
        axis.plot(scales, [100 * row["scores"][name] for row in rows], "o-", color=colour, linewidth=2, label=name)
    for rail, colour in zip(rows[0]["guardrails"], COLOURS[2:], strict=False):
        axis.plot(scales, [100 * row["guardrails"][rail] for row in rows], "--", color=colour, label=rail)
    axis.plot(scales, [100 * row["broken"] for row in rows], ":", color="#000000", label="broken answers")
    axis.axvline(1, color=GREY, linewidth=1)
    axis.set(xlabel="strength of both", ylabel="percent of test items", ylim=(-3, 103))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return drawn


def by_kl(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """Draw validation scores over KL; `curves[preference][way]` are strengths, KLs and scores of one kind of knob."""
    drawn, axes = new_figure(11, 3.8, len(curves))
    for axis, (name, ways) in zip(axes, curves.items(), strict=True):
        for (way, curve), colour, mark in zip(ways.items(), COLOURS, "os", strict=False):
            points = sorted((max(kl, 1e-5), 100 * score) for _, kl, score in curve)
            axis.plot([p[0] for p in points], [p[1] for p in points], mark + "-", color=colour, label=way)
        axis.set_xscale("log")
        axis.set(xlabel="KL, nats per token", title=name, ylim=(-3, 103))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("percent (validation)")
    axes[-1].legend(frameon=False, loc="lower right", fontsize=9)
    return drawn
