"""The sections of the Alignment Vectors report: plots before tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.reproduce import alignment_plots as plots
from trimtab.reproduce.alignment_recipe import LEVELS
from trimtab.reproduce.document import Report, Section, percent, points


def sections(report: Report) -> list[Section]:
    """Return the parts of the report: plots before tables."""
    ways = report["lambda"]
    made = [_lambda_section(found, way if len(ways) > 1 else "") for way, found in ways.items()]
    made += [*_combination_sections(report), _other_section(report), _stage_section(report), _time_section(report)]
    return [*made, _cost_section(report)]


def _lambda_section(domains: Mapping[str, Any], way: str) -> Section:
    rows = [
        [domain, *(f"{found['chosen'][level]:g}" for level in LEVELS), *_at_expert(found)]
        for domain, found in domains.items()
    ]
    heads = ("domain", *(f"lambda for {level}" for level in LEVELS), "expert % at the last", "sampled expert %")
    label = "Share of test questions by level along lambda: lines are the likeliest answers, dots the sampled ones."
    curves = {domain: found["rows"] for domain, found in domains.items()}
    return Section(_titled("Lambda", way), heads, rows, plot=plots.by_lambda(curves, LEVELS), label=label)


def _titled(title: str, way: str) -> str:
    return f"{title}, {way} vectors" if way else title


def _at_expert(found: Mapping[str, Any]) -> list[str]:
    """Return the shares of expert answers, likeliest and sampled, at the lambda that was chosen for them."""
    row = next(row for row in found["rows"] if row["lambda"] == found["chosen"]["expert"])
    return [percent(row[what][-1]) if row[what] else "" for what in ("likeliest", "sampled")]


def _span(values: Sequence[float], form: str = ".0f", unit: float = 1.0) -> str:
    first, low, high = (f"{unit * value:{form}}" for value in values)
    return f"{first} ({low} to {high})"


def _combination_sections(report: Report) -> list[Section]:
    found, domains = report["combinations"], report["domains"]
    heads = ("way", "combinations", "reached", "reached strictly", "PA, worst domain", "PA, mean")
    totals = [
        [
            name,
            str(row["combinations"]),
            *(_span(row[key]) for key in ("lenient", "strict")),
            *(_span(row[key], ".1f", 100) for key in ("worst", "mean")),
        ]
        for name, row in found["totals"].items()
    ]
    made = [Section("Combinations of levels", heads, totals)]
    for way, rows in found["rows"].items():
        made.append(_every_combination(rows, domains, found["base_rails"], way if len(found["rows"]) > 1 else ""))
    return made


def _every_combination(
    rows: Sequence[Mapping[str, Any]], domains: Sequence[str], base: Mapping[str, float], way: str
) -> Section:
    cells = [
        [", ".join(row["levels"]), ", ".join(f"{s:g}" for s in row["setting"]), percent(row["validation"])]
        + [*map(percent, row["by_domain"]), percent(row["prompt_worst"])]
        + ["strictly" if row["strict"] else "yes" if row["lenient"] else "no"]
        + [percent(row["rails"][rail]) for rail in base]
        for row in rows
    ]
    heads = ("levels", "strengths", "worst, validation", *domains, "worst by system line", "reached", *base)
    said = ["Without vectors: " + ", ".join(f"{rail} {percent(v)}" for rail, v in base.items()) + "."] if base else []
    label = "PA of the wanted level in the worst domain, on test questions, by combination."
    plot = plots.by_combination(rows, domains, LEVELS)
    return Section(_titled("Every combination", way), heads, cells, (0, 1), said, plot, label)


def _other_section(report: Report) -> Section:
    found, domains = report["others"], report["domains"]
    names = {"plain": "as learned", "orthogonal": "orthogonal to the others", "anchored": "anchored in the others"}
    names = {kind: name for kind, name in names.items() if kind in found}
    matrices = {name: np.array(found[kind]["matrix"]) for kind, name in names.items()}
    label = "Change of expert answers in points: rows are the questions' domains, columns the vectors'."
    rails = list(next(iter(found["plain"]["rails"].values())))
    rows = [
        [name, domain, ", ".join(f"{found[kind]['settings'][domain].get(d, 0.0):.2f}" for d in domains)]
        + [points(found[kind]["matrix"][i][domains.index(domain)]) for i in range(len(domains))]
        + [_span(found[kind]["rails"][domain][rail], "+.1f", 100) for rail in rails]
        for kind, name in names.items()
        for domain in domains
    ]
    said = [
        f"{name}: {points(found[kind]['off'])} points off the diagonal, {points(found[kind]['on'])} on it."
        for kind, name in names.items()
    ]
    said.append(
        "Cosines of the vectors: "
        + ", ".join(f"{v:.2f}" for v in np.array(found["cosines"])[np.triu_indices(len(domains), 1)])
        + "."
    )
    heads = ("vectors", "turned", "strengths", *domains, *rails)
    return Section("Other domains", heads, rows, (0, 1, 2), said, plots.by_domain(matrices, domains), label)


def _stage_section(report: Report) -> Section:
    rows = [
        [
            row["domain"],
            row["what"],
            "" if row["lambda"] is None else f"{row['lambda']:g}",
            *map(percent, row["shares"]),
        ]
        + [percent(value) for value in row["rails"].values()]
        for row in report["stage"]
    ]
    rails = list(report["stage"][0]["rails"]) if report["stage"] else []
    said = (
        "The other stage is the model after SFT on the recipe's sibling pairs. No earlier checkpoint of PrefWorld "
        "comes with the package, so that a transfer from or to an earlier stage of its own training was not measured."
    )
    return Section("Another fine-tuning stage", ("domain", "vector", "lambda", *LEVELS, *rails), rows, (0, 1), [said])


def _time_section(report: Report) -> Section:
    found = report["time"]
    if not found:
        return Section("Time", texts=["No joint training was asked for."])
    joint, k = found["joint_seconds"], found["combinations"]
    labels = {
        "choice_seconds": "a choice from the table",
        "merge_seconds": "merging",
        "search_seconds": "the search",
        "vector_seconds": "training the vectors, at the chosen rate",
        "vector_grid_seconds": "training the vectors, at every rate",
    }
    lines, said, rows = dict[str, tuple[float, float]](), list[str](), [["a joint DPO run", "", f"{joint:.1f}"]]
    for way, own in found["ways"].items():
        rows += [[what, way, f"{own[key]:.{1 if own[key] > 1 else 4}f}"] for key, what in labels.items()]
        setup, one = own["vector_seconds"] + own["search_seconds"], own["choice_seconds"] + own["merge_seconds"]
        lines[f"{way} vectors, one search, choices"] = setup, one
        even = (
            "never breaks even" if own["break_even"] is None else f"break-even at {own['break_even']:.1f} combinations"
        )
        said.append(
            f"{way.capitalize()} vectors: {own['settings']} settings searched; {even}; all {k} take "
            f"{setup + k * one:.0f} seconds, and {k * joint:.0f} by joint training."
        )
    label = "Seconds in all by the number of combinations, at one learning rate for either way."
    return Section("Time", ("what", "vectors", "seconds"), rows, (0, 1), said, plots.by_count(joint, lines, k), label)


def _cost_section(report: Report) -> Section:
    found = report["cost"]
    heads = ("way", "examples", "tokens before", "prefix cache", "expert %", "sampled expert %", "tokens of an answer")
    heads += ("ms to the first", "ms", "same length", "as they come")
    rows = [
        [row["way"], str(row["shots"]), f"{row['tokens']:.0f}", "yes" if row["prefix"] else "no"]
        + [percent(row["expert"]), percent(row["generated"]), f"{row['answer_tokens']:.1f}"]
        + [f"{1000 * row['first_seconds']:.1f}", f"{1000 * row['seconds']:.1f}"]
        + [_span([row[f"{what}{end}"] for end in ("", "_low", "_high")], ".2f") for what in ("equal", "own")]
        for row in found["rows"]
    ]
    prompted = [row for row in found["rows"] if row["way"] == "prompt"]
    said = f"The level prompt is {found['sentence']!r}; a question has {found['question_tokens']:.0f} tokens. Longer "
    said += f"prompts show answered questions after it. The vector is at lambda {found['lambda']:g}."
    label = "Seconds of an answer after a prompt over seconds with the vector, by the prompt's length."
    plot = plots.by_length(prompted, min(row["tokens"] for row in prompted))
    return Section("Cost of an answer", heads, rows, texts=[said], plot=plot, label=label)
