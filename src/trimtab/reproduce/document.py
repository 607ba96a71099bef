"""The report of any reproduction: claims and their verdicts, sections of tables and plots, as Markdown and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.evals.page import figure, page, paragraph, table
from trimtab.evals.stats import Interval
from trimtab.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]
Unit = Literal["points", "times", "count", "seconds", "nats", "cosine"]
CLAIM_HEADS = ("claim", "published", "measured", "95 % interval", "holds", "rule", "n")


@dataclass(frozen=True)
class Claim:
    """`measured` with its 95 % interval; `holds` follows from it and the recipe's threshold, and may be false.

    The unit "points" is of shares of items, 0.01 each; "times" is a ratio; "count" counts; "seconds" are those of the
    clock; "nats" are of a divergence. `by_model` has the estimate of each model that could be measured: a claim holds
    only where every one is on the same side of the threshold as the interval over all of them. `n` counts the items of
    the latter side, of all its runs.
    """

    id: str
    statement: str
    published: str
    measured: float
    low: float
    high: float
    holds: bool
    rule: str
    n: int
    by_model: dict[str, float]
    command: str
    unit: Unit = "points"


@dataclass(frozen=True)
class Section:
    """A part of a report: a plot with its label, then a table whose columns `words` hold sentences, then paragraphs."""

    title: str
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    words: Sequence[int] = (0,)
    texts: Sequence[str] = ()
    plot: Figure | None = None
    label: str = ""


def judge(
    name: str,
    statement: str,
    published: str,
    interval: Interval,
    by_model: dict[str, float],
    n: int,
    command: str,
    *,
    above: float | None = None,
    below: float | None = None,
    unit: Unit = "points",
) -> Claim:
    """Return a claim that holds where the whole interval, and every model's estimate, lie beyond the threshold."""
    if above is not None:
        holds = interval.low > above and min(by_model.values()) > above
        rule = f"low > {above:g}, in every model the estimate too"
    else:
        assert below is not None
        holds = interval.high < below and max(by_model.values()) < below
        rule = f"high < {below:g}, in every model the estimate too"
    return Claim(name, statement, published, *interval, holds, rule, n, by_model, command, unit)


def claim_rows(report: Report) -> list[list[str]]:
    """Return the claims as texts."""
    return [
        [
            claim["statement"],
            claim["published"],
            shown(claim["measured"], claim["unit"]),
            f"{shown(claim['low'], claim['unit'])} to {shown(claim['high'], claim['unit'])}",
            "yes" if claim["holds"] else "no",
            claim["rule"],
            str(claim["n"]),
        ]
        for claim in report["claims"]
    ]


def shown(value: float, unit: Unit) -> str:
    """Return a claim's figure as text."""
    return {
        "points": f"{100 * value:+.1f}",
        "times": f"{value:.1f}x",
        "count": f"{value:.0f}",
        "seconds": f"{value:.2f} s",
        "nats": f"{value:+.3f}",
        "cosine": f"{value:.4f}",
    }[unit]


def percent(value: float | None) -> str:
    """Return a share as percent, and nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """Return a difference of shares in points with its sign, and nothing for None."""
    return "" if value is None else f"{100 * value:+.1f}"


def markdown(report: Report, sections: Sequence[Section], notes: str) -> str:
    """Return a report as Markdown; plots are left out."""
    lines = [f"# {report['title']}", "", report["summary"], "", "## Claims", ""]
    lines += _markdown_table(CLAIM_HEADS, claim_rows(report))
    for section in sections:
        if section.rows or section.texts:
            lines += ["", f"## {section.title}"]
            lines += ["", *_markdown_table(section.heads, section.rows)] if section.rows else []
            lines += [line for text in section.texts for line in ("", text)]
    lines += ["", notes, "", f"Command: `{report['command']}`. {_spent(report)}", ""]
    return "\n".join(lines)


def html(report: Report, sections: Sequence[Section], notes: str) -> str:
    """Return a report as one page: a sentence, the first plot, claims, and the rest; nothing loaded from elsewhere."""
    claims = ("Claims", table(CLAIM_HEADS, claim_rows(report), words=(0, 1, 5)))
    made = [(section.title, _body(section, f"plot{number}")) for number, section in enumerate(sections)]
    spent = f"Command: {report['command']}. {_spent(report)}"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    how = ("How to read this", paragraph(notes) + paragraph(f"{spent} {versions}."))
    return page(report["title"], report["summary"], [*made[:1], claims, *made[1:], how])


def write(report: Report, sections: Sequence[Section], notes: str, folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html`."""
    write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(folder / "report.md", markdown(report, sections, notes).encode())
    write_atomically(folder / "report.html", html(report, sections, notes).encode())


def text(report: Mapping[str, Any]) -> str:
    """Return summary and claims as lines for a terminal."""
    lines = [report["summary"], ""]
    for claim in report["claims"]:
        measured, low, high = (shown(claim[key], claim["unit"]) for key in ("measured", "low", "high"))
        verdict = "holds " if claim["holds"] else "fails "
        lines.append(f"{verdict} {claim['statement']}: {measured} ({low} to {high})")
    return "\n".join(lines)


def _body(section: Section, name: str) -> str:
    drawn = figure(section.plot, section.label, name) if section.plot is not None else ""
    rows = table(section.heads, section.rows, words=section.words) if section.rows else ""
    return drawn + rows + "".join(map(paragraph, section.texts))


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [list(heads), ["---"] * len(heads), *cells]]


def _spent(report: Report) -> str:
    kept = report["steps_kept"]
    return f"It took {report['seconds']:.0f} seconds" + (
        f", with {kept} of {report['steps']} steps kept from an earlier call." if kept else "."
    )
