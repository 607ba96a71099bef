"""Plots of what tuning measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.types import Site


def plot_tuning(tuning: Mapping[str, Any], name: str, folder: Path) -> None:
    """Write a tuning record's `dose_response_NAME.png` and `sites_NAME.png` (margin by site, tokens and gain)."""
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
    measured = "guardrails" if tuning["guardrails"] else "answers"
    bottom.set(xlabel="strength (1 is the calibrated dose)", ylabel=f"KL to base on\n{measured} (nats/token)")
    figure.savefig(folder / f"dose_response_{name}.png", dpi=130)
    ranking: Sequence[Mapping[str, Any]] = tuning["ranking"]
    spots = sorted({(r["site"], r["where"]) for r in ranking}, key=_by_position)
    gains = sorted({r["gain"] for r in ranking})
    grid = np.full((len(spots), len(gains)), np.nan)
    for r in ranking:
        grid[spots.index((r["site"], r["where"])), gains.index(r["gain"])] = r["margin"]
    bound = float(np.nanpercentile(np.abs(grid), 90))
    figure = Figure(figsize=(6.5, 0.28 * len(spots) + 1.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(gains)), [f"{g:g}" for g in gains])
    labels = [f"layer {site.replace('/', ', ')}; {where}" for site, where in spots]
    axes.set_yticks(range(len(spots)), labels, fontsize=8)
    for row in tuning["table"]:
        y, x = spots.index((row["site"], row["where"])), gains.index(row["gain"])
        colour = "white" if abs(grid[y, x]) > 0.5 * bound else "black"
        axes.text(x, y, f"{100 * row['score']:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(
        xlabel="alpha (multiples of the mean residual norm)", title=f"{name}: margin gained by site, tokens and gain"
    )
    figure.colorbar(image, label="nats (teacher-forced)\nnumbers: score of finalists, percent")
    figure.savefig(folder / f"sites_{name}.png", dpi=130)


def _by_position(spot: tuple[str, str]) -> tuple[str, str, int]:
    site = Site.parse(spot[0])
    return site.position, spot[1], site.layer
