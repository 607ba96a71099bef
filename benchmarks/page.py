"""The page docs/benchmarks.md: goals met and missed, and a table for each section, from records of measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, THEIRS, all_cases
from benchmarks.goals import Goal, goals
from benchmarks.machine import slug
from benchmarks.plots import draw
from benchmarks.ratios import Spread, beside, ratios, seconds, spread
from benchmarks.state import State

MET, MISSED, UNJUDGED = "met", "**missed**", "not judged"
HEAD = """# Benchmarks

Written by `make bench` (`benchmarks/`). Every way of a case is run once in each round, one after another, forwards and
backwards in turn, and only ratios within a round are compared. Ways of the peers are divided by the bare way *of their
own environment*, which has an older transformers. A ratio is the median over rounds, with its 95 % interval by
bootstrap over rounds, and the quartiles. With one thread seconds are those of the processor, which other programs
disturb least; with several threads, on accelerators, and of what is waited for, those of the clock on the wall.
Models are random Llamas: of 27 million parameters (width 512, eight layers) where nothing else is said. A token is a
character.

- **bare** is the decoder on the same texts, rendered beforehand, sorted by length, at most 8,192 tokens a batch,
  without LM head, KV cache or anything kept; **bare, less padding** is the same in batches cut as `capture` cuts them.
  **trimtab** is the whole call of `capture`, rendering included, which runs a prompt once for both answers; **trimtab,
  learn** makes a knob of it too (by principal components), as the peers' calls, at their defaults, make vectors.
- **plain** is the unsteered model. Turning a setting on and off counts as part of every steered way. A **baked**
  model's weights are copied out of its file into memory, as the plain model's are. **Step by step** all ways generate
  at once, each on a copy of the model, one token in turn, and a round is the second run of a new process: what slows
  the machine down, and where things lie in memory, then favours no way. Weights come from main memory at every token.
- **out** has the same letter where ways came to the same tokens.

Goals are judged on processors only; [the log](log.md) says why what is missed is missed, and what the limit is.
"""
FOOT = """## Again

```sh
make bench                                  # everything; a run that was stopped is taken up again
make bench ARGS="--quick"                   # tiny models, two rounds: shows that all runs
make bench ARGS="--only generate-*,start --fresh"
make bench ARGS="--profile generate-1"      # where the time goes
make bench ARGS="--device cuda --model-size 7b"
```
"""


def write_page(records: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the page and its plots into a folder."""
    parts = [HEAD]
    for record in records:
        states = [State(**state) for state in record["cases"]]
        device = record["device"]
        plots = draw(states, folder / "benchmarks", slug(f"{device['name']} {device['model']}"))
        parts += [about(record, states), *([judged(states)] if device["kind"] == "cpu" else []), *tables(states)]
        if plots:
            parts.append("\n".join(f"![{title}](benchmarks/{name})" for name, title in plots))
    if not any(record["device"]["kind"] != "cpu" for record in records):
        parts.append("## Accelerators\n\nNot measured: no machine with one has run `make bench` yet.")
    page = folder / "benchmarks.md"
    page.write_text("\n\n".join(part.strip() for part in [*parts, FOOT]) + "\n", encoding="utf-8")
    return page


def about(record: Mapping[str, Any], states: Sequence[State]) -> str:
    """Say what was measured where, and with what."""
    machine, device = record["machine"], record["device"]
    model = "" if device["model"] == "small" else f", a model of {device['model']} in {record['arguments']['dtype']}"
    lines = [
        f"## {device['name']}{model}",
        *(["**A smoke run on tiny models: no figure here says anything.**"] if record["arguments"]["quick"] else []),
        f"{record['date']}; {machine['processor']}, {machine['cores']} cores, {machine['memory, GB']} GB, "
        f"{machine['system']}. Processes that wanted to run before a round: {loads(states)}.",
    ]
    for side, title in ((OURS, "Trimtab"), (THEIRS, "Peers")):
        found: dict[str, set[str]] = {}
        for state in states:
            for package, version in state.versions.get(side, {}).items():
                found.setdefault(package, set()).add(version)
        if found:
            named = ", ".join(f"{package} {' / '.join(sorted(versions))}" for package, versions in found.items())
            lines.append(f"{title}: {named}.")
    return "\n\n".join(lines)


def loads(states: Sequence[State]) -> str:
    """Say how busy the machine was."""
    found = [load for state in states for load in state.load]
    return f"{statistics.median(found):.1f} (at most {max(found):.1f})" if found else "not known"


# Goals


def judged(states: Sequence[State]) -> str:
    """Lay out the goals: met, missed, or not judged, those that go by an interval where there is none."""
    by_name: dict[str, list[State]] = {}
    for state in states:
        by_name.setdefault(state.case, []).append(state)
    rows = [row for goal in goals() for state in by_name.get(goal.case, []) for row in judge(goal, state, by_name)]
    if not rows:
        return ""
    met, missed = (sum(row.endswith(f"| {verdict} |") for row in rows) for verdict in (MET, MISSED))
    apart = len(rows) - met - missed
    lone = f", {apart} not judged: a single round has no interval" if apart else ""
    head = f"### Goals\n\n{met} met, {missed} missed{lone}.\n\n"
    titles = "| | threads | found | 95 % interval | quartiles | at most | judged by | |"
    return "\n".join([head + titles, "|" + "---|" * 8, *rows])


def judge(goal: Goal, state: State, by_name: Mapping[str, Sequence[State]]) -> Iterator[str]:
    """Yield the row of a goal, or nothing where it was not measured."""
    values = found_for(goal, state, by_name)
    if not values:
        return
    found = spread(values)
    value = found.high if goal.by == "high" else found.median
    verdict = MET if value <= goal.most else MISSED
    if goal.by == "high" and found.rounds == 1:
        verdict = UNJUDGED
    judged_by = "upper end" if goal.by == "high" else "median"
    cells = [goal.about, str(state.threads), *shown(found, 4), f"{goal.most:.2f}", judged_by, verdict]
    yield "| " + " | ".join(cells) + " |"


def found_for(goal: Goal, state: State, by_name: Mapping[str, Sequence[State]]) -> list[float]:
    """Return the values that a goal is judged by, one for each round."""
    if goal.of == "seconds":
        return [value for value in seconds(state.rounds, OURS, goal.way, "wall") if value == value]
    if goal.of == "peak":
        others = by_name.get(goal.against, [])
        peaks = [seconds(one.rounds, OURS, goal.way, "peak_mb") for one in (state, *others[:1])]
        found = peaks[0][0] / peaks[1][0] if len(peaks) == 2 else math.nan
        return [found] if math.isfinite(found) else []
    base = state.bases.get(OURS)
    if base is None:
        return []
    if not goal.against:
        return ratios(state.rounds, OURS, goal.way, base, state.clock)
    if THEIRS not in state.bases:
        return []
    theirs = goal.against, state.bases[THEIRS]
    return beside(state.rounds, (goal.way, base), theirs, state.clock, (OURS, THEIRS))


def shown(found: Spread, digits: int = 3) -> list[str]:
    """Write a spread in three cells."""
    if found.rounds == 1:
        return [f"{found.median:.{digits}f}", "one round", ""]
    pairs = (found.low, found.high), (found.lower, found.upper)
    return [f"{found.median:.{digits}f}", *(f"{low:.{digits}f} to {high:.{digits}f}" for low, high in pairs)]


# Tables


def tables(states: Sequence[State]) -> Iterator[str]:
    """Yield a table for each section."""
    for section in dict.fromkeys(state.about["section"] for state in in_order(states)):
        own = [state for state in in_order(states) if state.about["section"] == section]
        yield memory(section, own) if section.startswith("Memory") else times(section, own)


def in_order(states: Sequence[State]) -> list[State]:
    """Sort states as the cases are; those that are cases no more come last."""
    order = {case.name: number for number, case in enumerate(all_cases())}
    return sorted(states, key=lambda state: (order.get(state.case, len(order)), state.threads))


def times(section: str, states: Sequence[State]) -> str:
    """Lay out a section: seconds and ratios of every way."""
    accelerated = any("device_mb" in way for state in states for way in all_of(state))
    heads = ["case", "threads", "way", "seconds", "ratio", "95 % interval", "quartiles", "rounds", "out"]
    heads += ["most memory, MB"] if accelerated else []
    lines = [f"### {section}\n", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for state in states:
        first = [f"`{state.case}`: {state.about['about']}", str(state.threads)]
        for cells in rows_of(state, accelerated):
            lines.append("| " + " | ".join([*first, *cells]) + " |")
            first = ["", ""]
    return "\n".join(lines)


def all_of(state: State) -> list[Mapping[str, Any]]:
    """Return every measurement of a case."""
    return [way for done in state.rounds for side in done.values() for way in side.values()]


def rows_of(state: State, accelerated: bool) -> Iterator[list[str]]:
    """Yield the cells of each way of a case."""
    letters: dict[str, str] = {}
    for side, base in state.bases.items():
        owner = "" if side == OURS else " (peers' environment)"
        names = dict.fromkeys(way for done in state.rounds for way in done.get(side, {}))
        for way in sorted(names, key=lambda name: name != base):
            measured = [done[side][way] for done in state.rounds if way in done.get(side, {})]
            values = ratios(state.rounds, side, way, base, state.clock)
            found = ["1", "", ""] if way == base else shown(spread(values)) if values else ["", "", ""]
            mark = measured[-1].get("check")
            letter = letters.setdefault(mark, chr(ord("A") + len(letters))) if mark else ""
            median = statistics.median(one[state.clock] for one in measured)
            most = [f"{max(one['device_mb'] for one in measured):.0f}"] if accelerated else []
            title = way + (owner if way == base else "")
            yield [title, f"{median:.3g}", *found, str(len(measured)), letter, *most]
    blank = [""] * (6 + accelerated)
    for side, ways in state.cannot.items():
        for way, why in ways.items():
            title = f"{'Trimtab' if side == OURS else 'peers'}, {way}" if way == "all" else way
            yield [f"{title}: cannot, `{why}`", *blank]


def memory(section: str, states: Sequence[State]) -> str:
    """Lay out the most memory that processes held."""
    lines = [f"### {section}\n", "| case | model and pairs alone, MB | bare | trimtab |", "|---|---|---|---|"]
    for state in states:
        peaks = [seconds(state.rounds, OURS, way, "peak_mb")[0] for way in ("bare", "trimtab")]
        cells = [f"{peak:.0f}" if peak == peak else "" for peak in (state.before.get(OURS, float("nan")), *peaks)]
        lines.append(f"| `{state.case}`: {state.about['about']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
