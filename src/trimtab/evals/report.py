"""Plots of what tuning measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_tuning(tuning: Mapping[str, Any], name: str, folder: Path) -> None:
    """Write `dose_response_NAME.png` and `sites_NAME.png` (margin by site and gain) from a knob's tuning record."""
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process

    curve: Sequence[Mapping[str, Any]] = tuning["dose_response"]
    x = [row["strength"] for row in curve]
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot(x, [100 * row["score"] for row in curve], "o-", label=name, linewidth=2)
    for rail in tuning["guardrails"]:
        top.plot(x, [100 * row["guardrails"][rail] for row in curve], ".--", label=rail)
    top.plot(x, [100 * row["broken"] for row in curve], ":", color="grey", label="broken answers")
    top.axvspan(*tuning["safe_range"], alpha=0.1, color="green", label="safe range")
    top.set(ylabel="percent of validation items", title=f"Dose-response of the {name} knob", ylim=(-3, 103))
    top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    bottom.plot(x, [row["kl"] for row in curve], "k.-")
    bottom.set(xlabel="strength (1 is the calibrated dose)", ylabel="KL to base\n(nats per token)")
    figure.savefig(folder / f"dose_response_{name}.png", dpi=130)
    ranking: Sequence[Mapping[str, Any]] = tuning["ranking"]
    sites = sorted({r["site"] for r in ranking}, key=lambda s: (s.split("/")[1], int(s.split("/")[0])))
    gains = sorted({r["gain"] for r in ranking})
    grid = np.full((len(sites), len(gains)), np.nan)
    for r in ranking:
        grid[sites.index(r["site"]), gains.index(r["gain"])] = r["margin"]
    bound = float(np.nanpercentile(np.abs(grid), 90))
    figure = Figure(figsize=(6.5, 0.32 * len(sites) + 1.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(gains)), [f"{g:g}" for g in gains])
    axes.set_yticks(range(len(sites)), [f"layer {s.replace('/', ', ')}" for s in sites], fontsize=8)
    tested = {(row["site"], row["gain"]): row["score"] for row in tuning["table"]}
    for (site, gain), score in tested.items():
        spot = sites.index(site), gains.index(gain)
        dark = abs(grid[spot]) > 0.5 * bound
        colour = "white" if dark else "black"
        axes.text(spot[1], spot[0], f"{100 * score:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="alpha (multiples of the mean residual norm)", title=f"{name}: margin gained by site and gain")
    figure.colorbar(image, label="nats (teacher-forced)\nnumbers: score of finalists, percent")
    figure.savefig(folder / f"sites_{name}.png", dpi=130)
