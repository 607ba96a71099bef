"""A report as one HTML file that needs nothing else: plots as SVG within, tables that scroll, readable from a disk."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart with every common kind of colour vision; black and grey beside them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#767676"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 72rem;
  padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 46rem; }
.lead { font-size: 1.15rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { height: auto; max-width: 100%; min-width: 34rem; }
figcaption { color: #555; font-size: .9rem; max-width: 46rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; vertical-align: top; }
th { background: #f4f4f4; white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; }
td.words { min-width: 14rem; }
pre { background: #f4f4f4; overflow-x: auto; padding: .75rem; }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return a page: a title, a sentence that says what came out, and sections of a heading with HTML.

    `title`, `lead` and headings are text; what `figure`, `table` and `paragraph` return is HTML.
    """
    body = "\n".join(f"<section>\n<h2>{escape(heading)}</h2>\n{html}\n</section>" for heading, html in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def paragraph(text: str) -> str:
    """Return text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    """Return a table of texts; `words` are the columns that hold sentences and not numbers."""
    kinds = [' class="words"' if i in words else "" for i in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, heads, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def figure(drawn: Figure, label: str, name: str) -> str:
    """Return a plot as SVG with a caption, which a screen reader reads as its label; `name` is unique on the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # text stays text; ids repeat from run to run
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)  # two plots of a page share no ids
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label, quote=True)}" ', 1)
    return f"<figure>\n{svg}\n<figcaption>{escape(label)}</figcaption>\n</figure>"
