"""The report of a reproduction: JSON for programs, Markdown, and one HTML page for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trimtab.checkpoint import versions
from trimtab.reproduce import plots, tables
from trimtab.reproduce.claims import claims
from trimtab.reproduce.document import Report, Section, percent, points
from trimtab.reproduce.evidence import Evidence


def build(evidence: Evidence, *, quick: bool, seconds: float, kept: int = 0) -> Report:
    """Set everything out: claims, one table per model and domain, curves, and what the run depended on.

    `seconds` are those of this call, in which `kept` steps of an earlier one were not run again.
    """
    e = evidence
    models, domains = list(e.models), list(e.recipe.domains)
    report: Report = {
        "title": e.recipe.title,
        "models": models,
        "quick": quick,
        "seconds": seconds,
        "steps": len(e.records),
        "steps_kept": kept,
        "command": e.command,
        "versions": versions(),
        "recipe": asdict(e.recipe),
        "claims": claims(e),
        "tables": {m: {d: tables.compare(e, m, d) for d in domains} for m in models},
        "tests": {m: {d: tables.tests(e, m, d) for d in domains} for m in models},
        "counts": {m: {d: tables.counts(e, m, d) for d in domains} for m in models},
    }
    for kind in ("dose", "map", "naive"):
        report[kind] = {m: {d: tables.curve(e, m, d, kind) for d in domains} for m in models}
    report["overlap"] = {m: {d: e.found(m, "base", d)[0]["overlap"] for d in domains} for m in models}
    report["summary"] = _summary(report, e)
    return report


def _summary(report: Report, e: Evidence) -> str:
    """Say in two or three sentences of plain words what came out."""
    first = report["models"][0]
    said: list[str] = []
    for domain, rows in report["tables"][first].items():
        base = rows[0]["greedy"]
        main = _row(rows, e.recipe.main, e.sizes.pairs)
        trained = [
            f"{way.title} {percent(_row(rows, name, e.sizes.pairs)['greedy'])} from the same pairs and "
            f"{percent(_row(rows, name, e.sizes.many_pairs)['greedy'])} from {e.sizes.many_pairs}"
            for name, way in e.recipe.training.items()
        ]
        said.append(
            f"On {domain}, {e.sizes.pairs} pairs steer the model from {percent(base)} to {percent(main['greedy'])} "
            f"percent right" + (f"; {', '.join(trained)}" if trained else "") + "."
        )
        shared = report["overlap"][first][domain]
        if shared:
            said.append(f"Mind that {shared} test questions of {domain} are asked by pairs too: it was not held out.")
    held = sum(claim["holds"] for claim in report["claims"])
    said.append(f"{held} of {len(report['claims'])} claims hold.")
    if report["quick"]:
        said.insert(0, "A quick run, which shows that everything works: its figures mean nothing.")
    return " ".join(said)


def _row(rows: Sequence[Mapping[str, Any]], name: str, pairs: int) -> Mapping[str, Any]:
    return next(row for row in rows if row["name"] == name and row["pairs"] == pairs)


# --- text -----------------------------------------------------------------------------------------------------------

SYSTEM_HEADS = (
    "system",
    "seeds",
    "greedy",
    "gain (95 % interval)",
    "luck",
    "sampled",
    "side",
    "within side",
    "worst guardrail",
    "preference",
    "KL",
    "broken",
    "ms/answer",
    "learn s",
    "tune s",
    "learn MB",
    "tune MB",
)


def system_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a comparison as texts, in percent."""
    return [
        [
            row["system"] + (f" ({row['refused']} refused)" if row["refused"] else ""),
            str(row["seeds"]),
            percent(row["greedy"]),
            ""
            if row["kind"] == "base"
            else f"{points(row['gain'])} ({points(row['gain_low'])} to {points(row['gain_high'])})",
            percent(row["luck"]),
            percent(row["sampled"]),
            percent(row["side_share"]),
            percent(row["within_side"]),
            "" if row["kind"] == "base" else f"{row['worst_guardrail']} {points(row['worst_guardrail_change'])}",
            percent(row["preference"]),
            _number(row["kl"], ".3f"),
            percent(row["broken"]),
            _number(row["seconds_per_answer"], ".1f", 1e-3),
            _number(row["learn_seconds"], ".1f"),
            _number(row["tune_seconds"], ".1f"),
            _number(row["learn_bytes"], ".0f", 1 << 20),
            _number(row["tune_bytes"], ".0f", 1 << 20),
        ]
        for row in rows
    ]


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:{form}}"


NOTES = (
    "Percent of test questions; differences are paired, in points, with intervals from a bootstrap of seeds and items "
    "together. Everything was chosen on validation questions and test questions were used once, except where it says "
    "otherwise. Luck: what the best of as many useless settings would have seemed to gain on the validation questions. "
    "Side: share of sampled answers in the preferred manner; within side: how many of those are right. "
    "Guardrails: the one that changes for the worst. KL: to the bare model on its own guardrail answers, in nats per "
    "token. Learning is reading activations, or one training run stopped early; tuning is all that chose its settings."
)


def _tested(rows: Sequence[Mapping[str, Any]]) -> str:
    said = [f"{row['task']} {points(row['difference'])} (p {row['p_holm']:.2g})" for row in rows]
    return f"McNemar's test against the bare model, seed 0, adjusted over tasks (Holm): {'; '.join(said)}."


def _naive(found: Mapping[str, Any]) -> str:
    return (
        f"Choosing the best of {found['settings']} settings on {found['items']} test questions and reporting those "
        f"would claim {percent(found['base'])} to {percent(found['score'])} percent ({found['site']}, alpha "
        f"{found['alpha']:g}); on the other test questions the same setting goes from "
        f"{percent(found['base_elsewhere'])} to {percent(found['score_elsewhere'])}. The best of as many useless "
        f"settings would seem to gain {percent(found['selection_bias'])} points."
    )


# --- the sections ---------------------------------------------------------------------------------------------------


def sections(report: Report) -> list[Section]:
    """Return the parts of the report: plots before tables."""
    first = report["models"][0]
    domains = list(report["tables"][first])
    rails = list(report["tables"][first][domains[0]][0]["guardrails"])
    many = "; marks are models" if len(report["models"]) > 1 else ""
    label = f"Test accuracy of every system with its 95 % interval{many}. Blue is steered, orange is trained."
    made = [Section("What came out", plot=plots.by_system(report["tables"]), label=label)]
    before = {d: report["tables"][first][d][0]["greedy"] for d in domains}
    label = f"Accuracy by number of pairs on {first}; a dot is one draw of pairs, lines join means."
    made.append(Section("How many pairs", plot=plots.by_pairs(report["counts"][first], before), label=label))
    doses = {d: report["dose"][first][d] for d in domains if report["dose"][first][d]}
    if doses:
        label = (
            f"Validation questions over the dose on {first}. The paper's alpha 1 (Eq. 4) adds a "
            "vector as long as the mean chosen activation."
        )
        made.append(Section("How strong", plot=plots.by_dose(doses, rails), label=label))
    maps = {d: report["map"][first][d] for d in domains if report["map"][first][d]}
    if maps:
        label = f"Validation score by layer and position read, on {first}, at the tuned knob's tokens and dose."
        made.append(Section("Where", plot=plots.by_site(maps), label=label))
    label = f"Accuracy against seconds on {first}, on a logarithmic axis."
    made.append(Section("What it costs", plot=plots.by_seconds(report["tables"][first]), label=label))
    for model in report["models"]:
        for domain in domains:
            rows = report["tables"][model][domain]
            said = [_tested(report["tests"][model][domain]), _naive(report["naive"][model][domain])]
            title = f"All figures: {domain} on {model}"
            made.append(Section(title, SYSTEM_HEADS, system_rows(rows), texts=said))
    return made
