"""The report of an Alignment Vectors reproduction: its figures, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.checkpoint import versions
from trimtab.evals.stats import Interval, bootstrap_ratio, paired_bootstrap
from trimtab.reproduce.alignment_claims import claims
from trimtab.reproduce.alignment_evidence import (
    EXPERT,
    Evidence,
    apart_and_together,
    equal_seconds,
    hits,
    on_target,
    reached,
    resampled,
    seconds,
    spread,
    wanted,
)
from trimtab.reproduce.alignment_recipe import LEVELS, Recipe, Sizes
from trimtab.reproduce.document import Report, points
from trimtab.reproduce.steps import Key

NOTES = (
    "Preference accuracy (PA) of a level: the share of questions where its reference answer has the highest mean "
    "log-probability per token of the three. Lambda, sentences and strengths were chosen on validation questions; test "
    "questions were used once. Intervals are from a bootstrap of questions; one vector was learned for each domain, so "
    "that they do not cover the luck of a training. A combination is reached where its level leads in every domain, "
    "strictly where it also has half of the questions. Seconds are of this machine with whatever else ran on it. "
    "Timed answers come one at a time, as one user waits for them; throughput in batches was not measured. With the "
    "vector the weights already hold it: merging is not in the time of an answer."
)

KINDS = ("plain", "orthogonal", "anchored")
"""Vectors whose effect on other domains is measured; see `alignment_cells.matrix`."""


def build(recipe: Recipe, sizes: Sizes, model: str, records: Mapping[Key, Any], command: str, *, quick: bool) -> Report:
    """Return everything that the page shows, as JSON values."""
    e = Evidence(records, recipe, sizes, model, command)
    report: Report = {
        "title": recipe.title,
        "paper": "arXiv:2410.19206",
        "quick": quick,
        "models": [model],
        "domains": e.domains,
        "claims": claims(e),
        "vectors": {kind: {d: e.of("vector", d, kind) for d in e.domains} for kind in recipe.vectors},
        "lambda": {way: {d: _along(e, d, way) for d in e.domains} for way in recipe.ways},
        "combinations": _combinations(e),
        "sentences": e.of("prompts")["sentences"],
        "others": _others(e),
        "stage": _stage(e),
        "time": _time(e),
        "cost": _cost(e),
        "sizes": {name: getattr(sizes, name) for name in ("pairs", "validation", "test", "sampled", "guard")},
        "steps": len(records),
        "command": command,
        "versions": versions(),
    }
    return report | {"summary": _summary(report)}


def _along(e: Evidence, domain: str, way: str) -> dict[str, Any]:
    record = e.of("sweep", domain, way)
    rows = [
        {"lambda": row["lambda"], "likeliest": _shares(row["test"]), "sampled": _shares(row["generated"])}
        for row in record["rows"]
    ]
    return {"chosen": record["chosen"], "rows": rows}


def _shares(levels: Sequence[int]) -> list[float]:
    return [float(np.mean(np.array(levels) == i)) for i in range(len(LEVELS))] if levels else []


def _combinations(e: Evidence) -> dict[str, Any]:
    """Return every combination with what was chosen and tested, and each way's totals."""
    records = {way: e.of("combine", way) for way in (*e.recipe.ways, "random")}
    asked, base = e.of("prompts")["rows"], records["plain"]["base"]
    targets = wanted(asked)
    found = {f"{way} vectors": hits(record["rows"], e.domains) for way, record in records.items()}
    found["system line"] = hits(asked, e.domains)
    found["lambda 0"] = np.broadcast_to(np.array([base["test"][d] for d in e.domains]), found["system line"].shape)
    totals = {name: _totals(levels, targets) for name, levels in found.items()}
    if trained := e.all("joint"):
        some = [tuple(row["levels"]) for row in trained]
        at = [next(i for i, row in enumerate(asked) if tuple(row["levels"]) == levels) for levels in some]
        totals |= {
            f"{name}, the {len(at)} of joint DPO": _totals(levels[at], targets[at]) for name, levels in found.items()
        }
        totals["joint DPO"] = _totals(hits(trained, e.domains), targets[at])
    prompted = on_target(found["system line"], targets).min(axis=1)
    rows = {way: _combined(records[way]["rows"], e.domains, prompted) for way in e.recipe.ways}
    return {"totals": totals, "rows": rows, "base_rails": _means(base["rails"])}


def _combined(rows: Sequence[Any], domains: Sequence[str], prompted: np.ndarray) -> list[dict[str, Any]]:
    levels, targets = hits(rows, domains), wanted(rows)
    accuracy = on_target(levels, targets)
    flags = {strict: reached(levels, targets, strict=strict) for strict in (False, True)}
    return [
        {
            "levels": row["levels"],
            "setting": row["setting"],
            "validation": row["validation"],
            "by_domain": accuracy[i].tolist(),
            "worst": float(accuracy[i].min()),
            "lenient": bool(flags[False][i]),
            "strict": bool(flags[True][i]),
            "prompt_worst": float(prompted[i]),
            "rails": _means(row["rails"]),
        }
        for i, row in enumerate(rows)
    ]


def _means(rails: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.mean(scores)) for name, scores in rails.items()}


def _totals(found: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    n = found.shape[2]
    return {
        "combinations": len(targets),
        "lenient": resampled(lambda at: float(reached(found[..., at], targets, strict=False).sum()), n),
        "strict": resampled(lambda at: float(reached(found[..., at], targets, strict=True).sum()), n),
        "worst": resampled(lambda at: float(on_target(found[..., at], targets).min(axis=1).mean()), n),
        "mean": resampled(lambda at: float(on_target(found[..., at], targets).mean()), n),
    }


def _others(e: Evidence) -> dict[str, Any]:
    record = e.of("matrix")
    found: dict[str, Any] = {"cosines": record["cosines"], "kept": record["kept"]}
    for kind in (kind for kind in KINDS if kind in record):
        matrix = spread(record, kind, e.domains)
        off, on = apart_and_together(matrix)
        rails = {
            d: {rail: paired_bootstrap(before, record[kind][d]["rails"][rail]) for rail, before in _rails(record)}
            for d in e.domains
        }
        settings = {d: record[kind][d]["setting"] for d in e.domains}
        found[kind] = {"matrix": matrix.tolist(), "off": off, "on": on, "ratio": off / on if on else None}
        found[kind] |= {"rails": rails, "settings": settings}
    return found


def _rails(record: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    return list(record["base"]["rails"].items())


def _stage(e: Evidence) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    names = {"base": "the stage itself", "transferred": "base model's vector", "native": "own vector"}
    for domain, record in e.stages().items():
        for kind, name in names.items():
            row = record[kind]
            told = {"lambda": row.get("lambda"), "shares": _shares(row["test"]), "rails": _means(row["rails"])}
            found.append({"domain": domain, "what": name, **told})
    return found


def _time(e: Evidence) -> dict[str, Any] | None:
    trained = [record["seconds"] for record in e.all("joint")]
    if not trained:
        return None
    joint, ways = float(np.mean(trained)), dict[str, dict[str, float | None]]()
    for way in e.recipe.ways:
        grid, seconds = e.of("grid", way), e.vector_seconds(way)
        choice = float(np.mean([row["choice_seconds"] for row in e.of("combine", way)["rows"]]))
        saved = joint - choice - grid["merge_seconds"]
        ways[way] = {
            "choice_seconds": choice,
            "merge_seconds": grid["merge_seconds"],
            "search_seconds": grid["seconds"],
            "settings": len(grid["rows"]),
            "vector_seconds": seconds,
            "vector_grid_seconds": e.vector_seconds(way, "grid_seconds"),
            "break_even": (seconds + grid["seconds"]) / saved if saved > 0 else None,
        }
    return {"joint_seconds": joint, "combinations": len(e.of("prompts")["rows"]), "ways": ways}


def _cost(e: Evidence) -> dict[str, Any]:
    record = e.all("cost")[0]
    vector, rows = record["rows"][0], list[dict[str, Any]]()
    for row in record["rows"]:
        found: dict[str, Any] = {
            "way": row["way"],
            "shots": row["shots"],
            "prefix": row["prefix"],
            "tokens": float(np.mean(row["prompt_tokens"])),
            "answer_tokens": float(np.mean(np.array(row["answers"])[..., 2])),
            "seconds": float(seconds(row).mean()),
            "first_seconds": float(np.mean(np.array(row["answers"])[..., 0])),
            "expert": float(np.mean(np.array(row["test"]) == EXPERT)),
            "generated": float(np.mean(np.array(row["generated"]) == EXPERT)) if row["generated"] else None,
        }
        for name, parts in (("equal", equal_seconds(row, vector)), ("own", seconds(row))):
            ratio: Interval = bootstrap_ratio(parts, seconds(vector))
            found |= {name: ratio.estimate, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
        rows.append(found)
    question = float(np.mean(vector["question_tokens"]))
    return {"rows": rows, "lambda": record["lambda"], "sentence": record["sentence"], "question_tokens": question}


def _summary(report: Report) -> str:
    totals, others = report["combinations"]["totals"], report["others"]
    held = sum(claim["holds"] for claim in report["claims"])
    said: list[str] = []
    if report["quick"]:
        said.append("A quick run, which shows that everything works: its figures mean nothing.")
    ways = [f"{way} vectors" for way in report["lambda"]]
    counts = " and ".join(f"{totals[n]['lenient'][0]:.0f} ({totals[n]['strict'][0]:.0f} strictly) by {n}" for n in ways)
    said.append(
        f"One vector for each of {len(report['domains'])} domains, one grid of strengths: of "
        f"{totals[ways[0]]['combinations']} combinations of levels {counts} are reached on test questions, and "
        f"{totals['system line']['lenient'][0]:.0f} by asking for them in a system line."
    )
    raised = [f"{points(others[kind]['off'])} as {kind} vectors" for kind in KINDS if kind in others]
    said.append(
        f"A vector raises expert answers by {points(others['plain']['on'])} points in its own domain, and in the "
        f"others by {', '.join(raised)}."
    )
    return " ".join([*said, f"{held} of {len(report['claims'])} claims hold."])
