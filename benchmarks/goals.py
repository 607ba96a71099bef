"""The goals: what cases are to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.cases import MEMORY, SITES, STEPPED, WIDE_LAYERS, all_cases

CAPTURE = {0.0: 1.03, 0.5: 0.80, 0.8: 0.66}
"""Share of the prompt in a side's tokens: the most that reading may take of the bare forward pass.

Read once for both answers, prompts leave (2 - share) / 2 of the tokens: .75 and .60.
"""
PEERS = ("repeng", "steering-vectors", "steering-vectors, batch 32")
WITHIN = {"scaled": 1.1, "exact": 1.25}
"""How many times what the formula says a step may take."""
FLAT = 1.1
"""Most memory at ten thousand pairs, in multiples of that at a hundred."""
STEERED = 1.02
"""The upper end of the interval of what steering takes of plain generation."""


@dataclass(frozen=True)
class Goal:
    """What a case is to reach."""

    case: str
    about: str
    way: str
    most: float
    by: Literal["median", "high"] = "median"
    """Which figure is judged: the median, or the upper end of its interval."""
    of: Literal["ratio", "seconds", "peak"] = "ratio"
    against: str = ""
    """A way of the peers whose own ratio ours is divided by; for peaks another case."""


def goals() -> list[Goal]:
    """Return what is to be reached on a processor."""
    read = {
        f"capture-{pairs}-share-{100 * share:.0f}": (f"reading {pairs:,} pairs, {100 * share:.0f} % prompt", most)
        for pairs in (100, 1000)
        for share, most in CAPTURE.items()
    }
    found = [Goal(case, about, "trimtab", most) for case, (about, most) in read.items()]
    names = {case: about for case, (about, _) in read.items()}
    ways = {case.name: case.ways for case in all_cases()}
    names["capture-vocabulary-150k"] = "reading 25 pairs, vocabulary of 150,000"
    found += [
        Goal(case, f"learning (pca), {about}, beside {peer}", "trimtab, learn", 1.0, by="high", against=peer)
        for case, about in names.items()
        for peer in PEERS
        if not ways[case] or peer in ways[case]
    ]
    found.append(
        Goal(
            f"memory-{MEMORY[-1]}",
            f"most memory, {MEMORY[-1]:,} pairs beside {MEMORY[0]}",
            "trimtab",
            FLAT,
            of="peak",
            against=f"memory-{MEMORY[0]}",
        )
    )
    steered = ("trimtab", "trimtab, a setting per row", "trimtab, baked")
    found += [
        Goal(f"{case}-{rows}", f"generating{how} at batch {rows}: {way}", way, STEERED, by="high")
        for rows in STEPPED
        for case, how in (("generate", ""), ("steps", " step by step"))
        for way in steered
    ]
    found += [
        Goal(f"dense-float32-float32-{memory}", f"dense knob, {memory} memory", "put in and taken out", 2.0)
        for memory in ("fresh", "used")
    ]
    found += [
        Goal(
            f"lookahead-{work}",
            f"lookahead, {work}, {backend} up to layer {site}",
            f"{backend}, layer {site}, rank 16",
            (1 + (1 if backend == "scaled" else 2) * (site + 1) / WIDE_LAYERS) * within,
        )
        for work in ("decode-1", "decode-4", "prefill-1")
        for site in SITES
        for backend, within in WITHIN.items()
    ]
    found.append(Goal("start", "`trimtab --help`, seconds", "trimtab --help", 0.3, of="seconds"))
    found.append(Goal("load", "loading a knob, seconds", "load_knob", 0.05, of="seconds"))
    return found
