"""The plots of the page: ratios, and seconds, along pairs, layers, knobs and batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS
from benchmarks.ratios import ratios, seconds, spread
from benchmarks.state import State

TITLES = {
    "pairs": "Reading, by pairs",
    "layers": "Reading, by layers that are read",
    "knobs": "Generating, by knobs turned at once",
    "batch": "Generating, by batch",
}
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f", "#edae49")
GREY = "#777777"


def draw(states: Sequence[State], folder: Path, prefix: str) -> list[tuple[str, str]]:
    """Write an SVG for each axis with three points or more, on the fewest threads; return names and titles."""
    import matplotlib

    found: list[tuple[str, str]] = []
    fewest = min((state.threads for state in states), default=1)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9}):
        for axis, title in TITLES.items():
            points = {x_of(s): s for s in states if s.about["curve"] == axis and s.threads == fewest}
            if len(points) < 3:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{prefix}-{axis}.svg"
            figure = plot(dict(sorted(points.items())), axis, title)
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
            found.append((name, title))
    return found


def x_of(state: State) -> int:
    """Return where a case stands on its axis: the number its name ends with, or what a smoke run made of it."""
    names = {"pairs": "pairs", "layers": "read", "knobs": "knobs", "batch": "rows"}
    return int(state.spec["options"][names[state.about["curve"]]])


def plot(points: dict[int, State], axis: str, title: str) -> Any:
    """Draw seconds and ratios of every way; the bands are the quartiles over rounds."""
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sides = dict.fromkeys((side, base) for state in points.values() for side, base in state.bases.items())
    colours = cycle(COLOURS)
    for side, base in sides:
        ways = dict.fromkeys(way for s in points.values() for done in s.rounds for way in done.get(side, {}))
        for way in ways:
            if way == base and side != OURS:
                continue
            colour = GREY if way == base else next(colours)
            curve(left, {x: seconds(s.rounds, side, way, s.clock) for x, s in points.items()}, colour, way)
            if way != base:
                curve(right, {x: ratios(s.rounds, side, way, base, s.clock) for x, s in points.items()}, colour, way)
    right.axhline(1, color=GREY, linewidth=1)
    shown = [value for line in left.get_lines() for value in line.get_ydata()]
    if max(shown) > 10 * min(shown):
        left.set_yscale("log")
    else:  # less than a decade, of which a logarithmic axis has no labels
        left.set_ylim(bottom=0)
    left.set_ylabel("seconds")
    right.set(ylabel="ratio to bare" if axis in ("pairs", "layers") else "ratio to plain")
    for panel in (left, right):
        panel.set(xscale="log", xlabel=axis)
        panel.set_xticks([*points], [f"{x:,}" for x in points])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def curve(panel: Any, values: dict[int, list[float]], colour: str, label: str) -> None:
    """Draw medians with a band from quartile to quartile."""
    found = {x: spread(own) for x, own in values.items() if own and all(value == value for value in own)}
    panel.plot([*found], [one.median for one in found.values()], "o-", color=colour, label=label, markersize=4)
    low, high = ([getattr(one, end) for one in found.values()] for end in ("lower", "upper"))
    panel.fill_between([*found], low, high, color=colour, alpha=0.2, linewidth=0)
