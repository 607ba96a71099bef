"""The plots of the Alignment Vectors reproduction: lambda, the combinations, other domains, time and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.evals.page import COLOURS, GREY
from trimtab.reproduce.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL_COLOURS = (COLOURS[1], GREY, COLOURS[0])


def by_lambda(curves: Mapping[str, Sequence[Mapping[str, Any]]], levels: Sequence[str]) -> Figure:
    """Draw the share of questions at each level over lambda: likeliest answers as lines, sampled answers as dots."""
    drawn, axes = new_figure(11, 4.2, len(curves), share=True)
    for axis, (domain, rows) in zip(axes, curves.items(), strict=True):
        at = [row["lambda"] for row in rows]
        for i, level in enumerate(levels):
            colour = LEVEL_COLOURS[i]
            axis.plot(at, [100 * row["likeliest"][i] for row in rows], "-", color=colour, linewidth=2, label=level)
            if rows[0]["sampled"]:
                axis.plot(at, [100 * row["sampled"][i] for row in rows], "o", color=colour, markersize=3.5, alpha=0.7)
        axis.axvline(0, color="#bbbbbb", linewidth=1)
        axis.set(xlabel="lambda", title=domain, ylim=(-3, 103))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("percent of test questions")
    handles, names = axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def by_combination(rows: Sequence[Mapping[str, Any]], domains: Sequence[str], levels: Sequence[str]) -> Figure | None:
    """Draw the accuracy of the worst domain for every combination of three domains; a frame marks what is reached."""
    if len(domains) != 3:
        return None
    drawn, axes = new_figure(10.5, 3.9, len(levels), share=True)
    image: Any = None
    for axis, first in zip(axes, levels, strict=True):
        grid = np.zeros((len(levels), len(levels)))
        for row in rows:
            if row["levels"][0] != first:
                continue
            y, x = levels.index(row["levels"][1]), levels.index(row["levels"][2])
            grid[y, x] = 100 * row["worst"]
            mark = "" if row["lenient"] else "\nmissed"
            colour = "black" if grid[y, x] > 55 else "white"
            axis.text(x, y, f"{grid[y, x]:.0f}{mark}", ha="center", va="center", color=colour, fontsize=10)
        image = axis.imshow(grid, cmap="cividis", vmin=0, vmax=100)
        axis.set_xticks(range(len(levels)), levels)
        axis.set_yticks(range(len(levels)), levels)
        axis.set(xlabel=domains[2], title=f"{domains[0]}: {first}")
    axes[0].set_ylabel(domains[1])
    drawn.colorbar(image, ax=axes, label="percent, worst domain", shrink=0.85)
    return drawn


def by_domain(matrices: Mapping[str, np.ndarray], domains: Sequence[str]) -> Figure:
    """Draw by how many points each vector (columns) raises the expert share of each domain (rows)."""
    drawn, axes = new_figure(9.5, 3.9, len(matrices), share=True)
    image: Any = None
    for axis, (kind, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(100 * matrix, cmap="RdBu", vmin=-100, vmax=100)
        for (y, x), value in np.ndenumerate(100 * matrix):
            axis.text(x, y, f"{value:+.0f}", ha="center", va="center", color="white" if abs(value) > 60 else "black")
        axis.set_xticks(range(len(domains)), domains)
        axis.set_yticks(range(len(domains)), domains)
        axis.set(xlabel="vector of", title=kind)
    axes[0].set_ylabel("questions of")
    drawn.colorbar(image, ax=axes, label="points of expert answers", shrink=0.85)
    return drawn


def by_count(joint: float, lines: Mapping[str, tuple[float, float]], most: int) -> Figure:
    """Draw the seconds that combinations take in all, one joint training each, or vectors and one search first.

    `lines` are seconds beforehand, and for each combination, by name.
    """
    drawn, axes = new_figure(7.5, 4.0, 1)
    ends = [int(1.2 * setup / (joint - one)) for setup, one in lines.values() if joint > one]
    most = min(max([most, *ends]), 10 * most)
    at = np.arange(1, most + 1)
    axes[0].plot(at, joint * at, "-", color=COLOURS[1], linewidth=2, label="joint DPO for each")
    for (name, (setup, one)), colour in zip(lines.items(), (COLOURS[0], COLOURS[2]), strict=False):
        axes[0].plot(at, setup + one * at, "-", color=colour, linewidth=2, label=name)
    axes[0].set(xlabel="combinations", ylabel="seconds in all", xlim=(0, most), ylim=(0, None))
    axes[0].spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return drawn


def by_length(rows: Sequence[Mapping[str, Any]], real: float) -> Figure:
    """Draw how much longer an answer takes after a prompt than with the vector, over the prompt's tokens."""
    drawn, axes = new_figure(10, 4.2, 2, share=True)
    for axis, what in zip(axes, ("equal", "own"), strict=True):
        for cached, colour, mark in ((False, COLOURS[1], "o"), (True, COLOURS[2], "s")):
            own = [row for row in rows if row["prefix"] == cached]
            at = [row["tokens"] for row in own]
            label = "prefix cache" if cached else "no cache"
            axis.plot(at, [row[what] for row in own], mark + "-", color=colour, label=label)
            axis.fill_between(
                at, [r[f"{what}_low"] for r in own], [r[f"{what}_high"] for r in own], color=colour, alpha=0.15
            )
        axis.axvline(real, color=GREY, linestyle=":", label="the level prompt itself")
        axis.axhline(1, color="#bbbbbb", linewidth=1)
        axis.axhline(2, color="#bbbbbb", linewidth=1, linestyle="--")
        title = "answers of the same length" if what == "equal" else "answers as they come"
        axis.set(xlabel="tokens of the prompt before the question", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds over those with the vector")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="lower right")
    return drawn
