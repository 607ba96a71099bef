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
    curves = {domain: found["rows"] for domain, found in report["lambda"].items()}
    label = "Share of test questions by level along lambda: lines are the likeliest answers, dots the sampled ones."
    rows = [
        [domain, *(f"{found['chosen'][level]:g}" for level in LEVELS), *map(percent, _at(found, "expert"))]
        for domain, found in report["lambda"].items()
    ]
    heads = ("domain", *(f"lambda for {level}" for level in LEVELS), *(f"{level} %, at the last" for level in LEVELS))
    made = [Section("Lambda", heads, rows, plot=plots.by_lambda(curves, LEVELS), label=label)]
    made += [*_combination_sections(report), _other_section(report), _stage_section(report), _time_section(report)]
    return [*made, _cost_section(report)]


def _at(found: Mapping[str, Any], level: str) -> list[float]:
    return next(row["likeliest"] for row in found["rows"] if row["lambda"] == found["chosen"][level])


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
    label = "PA of the wanted level in the worst domain, on test questions, by combination."
    plot = plots.by_combination(found["rows"], domains, LEVELS)
    first = Section("Combinations of levels", heads, totals, plot=plot, label=label)
    rails = list(found["base_rails"])
    rows = [
        [", ".join(row["levels"]), ", ".join(f"{s:g}" for s in row["setting"]), percent(row["validation"])]
        + [*map(percent, row["by_domain"]), percent(row["prompt_worst"])]
        + ["strictly" if row["strict"] else "yes" if row["lenient"] else "no"]
        + [percent(row["rails"][rail]) for rail in rails]
        for row in found["rows"]
    ]
    heads = ("levels", "strengths", "worst, validation", *domains, "worst by system line", "reached", *rails)
    said = "Without vectors: " + ", ".join(f"{rail} {percent(v)}" for rail, v in found["base_rails"].items()) + "."
    return [first, Section("Every combination", heads, rows, words=(0, 1), texts=[said])]


def _other_section(report: Report) -> Section:
    found, domains = report["others"], report["domains"]
    names = {"plain": "as learned", "orthogonal": "orthogonal to the others"}
    matrices = {name: np.array(found[kind]["matrix"]) for kind, name in names.items()}
    label = "Change of expert answers in points: rows are the questions' domains, columns the vectors'."
    rails = list(next(iter(found["plain"]["rails"].values())))
    rows = [
        [name, domain, ", ".join(f"{found[kind]['settings'][domain][d]:.2f}" for d in domains)]
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
    setup, one = found["vector_seconds"] + found["search_seconds"], found["choice_seconds"] + found["merge_seconds"]
    heads = ("what", "seconds")
    rows = [
        ["a joint DPO run", f"{found['joint_seconds']:.1f}"],
        ["a choice from the table", f"{found['choice_seconds']:.4f}"],
        ["merging", f"{found['merge_seconds']:.4f}"],
        [f"the search, {found['settings']} settings", f"{found['search_seconds']:.1f}"],
        ["training the vectors, at the chosen rate", f"{found['vector_seconds']:.1f}"],
        ["training the vectors, at every rate", f"{found['vector_grid_seconds']:.1f}"],
    ]
    k = found["combinations"]
    said = f"Break-even is at {found['break_even']:.1f} combinations; all {k} take {k * found['joint_seconds']:.0f} "
    said += f"seconds of joint training, or {setup + k * one:.0f} with vectors and one search."
    label = "Seconds in all by the number of combinations, at one learning rate for either way."
    plot = plots.by_count(found["joint_seconds"], setup, one, max(k, int(1.2 * found["break_even"])))
    return Section("Time", heads, rows, texts=[said], plot=plot, label=label)


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
