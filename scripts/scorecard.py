"""Write docs/prefworld.md from the scorecard that is committed beside the weights, or check that it is up to date."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "src" / "trimtab" / "prefworld" / "model" / "scorecard.json"
PAGE = ROOT / "docs" / "prefworld.md"
HEAD = """# PrefWorld, and what its model has learned

Written by `scripts/scorecard.py` from `src/trimtab/prefworld/model/scorecard.json`, which
`python -m trimtab.prefworld.build` measures. The sha256 of the weights begins with
`{weights}`, that of the corpus files with `{corpus}`.

PrefWorld is a generator of conversations whose truth is known, and a Llama of 3 M parameters trained on them. A speaker
has one side of every habit and keeps it through the conversation; system lines name it now and then. Test questions
come in wordings that neither training nor validation shows, with numbers, words and options kept from training too
where a family has enough of them; "known wordings" stand beside. {n} questions each, 50 where wordings are known.
Shares are of sampled answers (temperature 1) unless a section says otherwise.

## Guardrails

Greedy answers that are exactly right.

{guardrails}

## Quality

Of the greedy answers that keep to the side that one earlier turn showed, the share that is right, by exact result
(maths) and hidden tests (code).

{quality}

## Carry-over

The share of next answers on the side that one earlier turn showed, or that a system line named.

{carry}

## Steerability

A plain difference of means of 100 pairs, added at the first turn: the share of the first side at -alpha, 0 and +alpha,
and facts at the worse of the two signs. Site and alpha are the best of three that keep facts within two points, on
validation questions.

{steer}

Opinions: total variation between a named group's true answer distribution and the model's: {opinions}.
"""
TABLE = """
## Positions, layers and doses: {family}

On 50 validation questions, first turn, steering every token, plain means; facts on 25. `greedy` and `sampled` are
scores, `share` is the sampled share of {side} answers. (The bare model on {n} test questions, which come in new
wordings: greedy {greedy}, sampled {sampled}. That is not the zero of this table.)

{rows}
"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Lay out a table in Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def share(value: float | None) -> str:
    """Write a share with two digits, `none` where there was nothing to measure."""
    return "none" if value is None else f"{value:.2f}".removeprefix("0") if value < 1 else "1.00"


def page(card: Mapping[str, Any]) -> str:
    """Return the whole page."""
    families: Mapping[str, Any] = card["families"]
    habits = {name: entry for name, entry in families.items() if "carry_over" in entry}
    guardrails = [
        [name, share(entry["unseen"]), share(entry["seen"])] for name, entry in families.items() if "seen" in entry
    ]
    quality = [
        [name, side, share(row["quality"]), share(entry["carry_over_seen"][side]["quality"])]
        for name, entry in habits.items()
        for side, row in entry["carry_over"].items()
        if "quality" in row
    ]
    carry = [
        [name, side, *(share(entry[key][side][how]) for key in ("carry_over", "carry_over_seen") for how in HOW)]
        for name, entry in habits.items()
        for side in entry["carry_over"]
    ]
    steer: list[list[str]] = []
    for name, entry in habits.items():
        found = entry["steerability"]
        best = found["best"] or {"minus": None, "plus": None, "facts": None, "site": "none", "alpha": float("nan")}
        shares = [share(best["minus"]), share(found["base"]), share(best["plus"]), share(best["facts"])]
        steer.append([name, found["side"], *shares, best["site"], f"{best['alpha']:.3g}"])
    distances = families.get("opinions", {}).get("total_variation", {})
    text = HEAD.format(
        weights=card["weights"][:16],
        corpus=card["corpus"][:16],
        n=card["n"],
        guardrails=table(["family", "new wordings", "known wordings"], guardrails),
        quality=table(["family", "side", "new wordings", "known wordings"], quality),
        carry=table(
            ["family", "side", "after a turn", "after a system line", "known: turn", "known: system line"], carry
        ),
        steer=table(["family", "side", "-alpha", "0", "+alpha", "facts", "site", "alpha"], steer),
        opinions=", ".join(f"{group} {share(value)}" for group, value in distances.items()) or "not measured",
    )
    for name, entry in habits.items():
        if "table" in entry:
            rows = [
                [row["position"], str(row["layer"]), f"{row['alpha']:g}"]
                + [share(row[key]) for key in ("greedy", "sampled", "share", "facts")]
                for row in entry["table"]
            ]
            first = {key: share(value) for key, value in entry["first_turn"].items()}
            heads = ["position", "layer", "alpha", "greedy", "sampled", "share", "facts"]
            text += TABLE.format(
                family=name, side=entry["steerability"]["side"], rows=table(heads, rows), n=card["n"], **first
            )
    return text


HOW = ("after_turn", "after_system")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check: bool = parser.parse_args().check
    text = page(json.loads(CARD.read_text(encoding="utf-8")))
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date. Run: python scripts/scorecard.py")


if __name__ == "__main__":
    main()
