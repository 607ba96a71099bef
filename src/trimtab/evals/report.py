"""Plots of what tuning measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import printable
from trimtab.evals.curve import Curve, curve_of
from trimtab.types import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_tuning(tuning: Mapping[str, Any], name: str, folder: Path) -> None:
    """Write a tuning record's `dose_response_NAME.png` and `sites_NAME.png` (margin by site, tokens and gain)."""
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process

    curve = curve_of(tuning)
    assert curve is not None
    drawn = draw_dose_response(curve, name, tuning["safe_range"])
    drawn.savefig(folder / f"dose_response_{name}.png", dpi=130)
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


def draw_dose_response(curve: Curve, name: str, safe_range: Sequence[float] | None) -> Figure:
    """Draw score, guardrails and broken answers over the strength, and KL to the bare model below them."""
    from matplotlib.figure import Figure

    x = curve.strengths
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if np.isfinite(curve.score).any():  # what is tuned on margins alone has none
        top.plot(x, 100 * np.array(curve.score), "o-", label=_label(name), linewidth=2)
    for rail, line in curve.guardrails.items():
        top.plot(x, 100 * np.array(line), ".--", label=_label(rail))
    top.plot(x, 100 * np.array(curve.broken), ":", color="grey", label="broken answers")
    if safe_range is not None:
        top.axvspan(*np.clip(safe_range, min(x), max(x)), alpha=0.1, color="green", label="safe range")
    top.set(ylabel="percent of validation items", title=f"Dose-response of the {_label(name)} knob", ylim=(-3, 103))
    top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    bottom.plot(x, curve.kl, "k.-")
    measured = "guardrails" if curve.guardrails else "answers"
    bottom.set(xlabel="strength (1 is the calibrated dose)", ylabel=f"KL to base on\n{measured} (nats/token)")
    return figure


def _label(name: str) -> str:
    """Write a name as it may stand in a plot: a dollar sign would begin a formula, an underscore hide the line."""
    short = printable(name if len(name) <= 40 else f"{name[:37]}...").replace("$", r"\$")
    return f" {short}" if short.startswith("_") else short


def _by_position(spot: tuple[str, str]) -> tuple[str, str, int]:
    site = Site.parse(spot[0])
    return site.position, spot[1], site.layer
