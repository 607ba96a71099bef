"""The plots of the COLD-Steer reproduction: effect by number of pairs, and by dose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from trimtab.evals.page import COLOURS, GREY
from trimtab.reproduce.cold_recipe import SYSTEMS
from trimtab.reproduce.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = ("o", "s", "^", "D", "v", "P", "X")
ON_THE_STREAM = ("cold-fd", "cold-kernel", "cold-kernel-softmax", "diffmean", "diffmean-piecewise", "bipo", "random")


def by_pairs(samples: Mapping[str, Any]) -> Figure:
    """Draw the probability of the matching letter by number of pairs, every seed a dot."""
    drawn, (axis,) = new_figure(9, 4.6, 1)
    rows: Sequence[Mapping[str, Any]] = samples["rows"]
    for system, colour, mark in zip(
        dict.fromkeys(r["system"] for r in rows), cycle(COLOURS), cycle(MARKS), strict=False
    ):
        own = [row for row in rows if row["system"] == system]
        counts, means = [row["pairs"] for row in own], [100 * row["mean"] for row in own]
        axis.plot(counts, means, mark + "-", color=colour, label=SYSTEMS[system])
        for row in own:
            axis.plot(
                [row["pairs"]] * len(row["by_seed"]), [100 * s for s in row["by_seed"]], ".", color=colour, alpha=0.5
            )
    axis.axhline(100 * samples["base"], color=GREY, linestyle=":", label="the model as it is")
    axis.set_xscale("log")
    ticks = sorted({row["pairs"] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    title = f"Behaviours by letter: {', '.join(samples['behaviours'])}"
    axis.set(xlabel="pairs", ylabel="probability of the matching letter, percent", title=title, ylim=(-3, 103))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return drawn


def by_dose(doses: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw the validation score by alpha, of what moves the stream."""
    drawn, (axis,) = new_figure(9, 4.2, 1)
    systems = [system for system in ON_THE_STREAM if system in doses]
    for system, colour, mark in zip(systems, cycle(COLOURS), cycle(MARKS), strict=False):
        rows = doses[system]
        axis.plot(
            [r["dose"] for r in rows], [100 * r["score"] for r in rows], mark + "-", color=colour, label=SYSTEMS[system]
        )
    axis.set_xscale("log")
    ticks = sorted({row["dose"] for system in systems for row in doses[system]})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(
        xlabel="alpha (multiples of the mean residual norm)",
        ylabel="probability of the matching letter, percent",
        title="Validation questions, at the chosen layer",
        ylim=(-3, 103),
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return drawn
