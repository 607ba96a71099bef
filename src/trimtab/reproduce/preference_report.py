"""The report on Preference Vectors: what was measured as numbers, and its tables, plots and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trimtab.checkpoint import versions
from trimtab.evals.stats import bootstrap_mean
from trimtab.reproduce import preference_plots as plots
from trimtab.reproduce.document import Report, Section, percent, points
from trimtab.reproduce.preference_cells import COMPOSED
from trimtab.reproduce.preference_claims import Found, claims
from trimtab.reproduce.preference_recipe import Recipe, Sizes
from trimtab.reproduce.preference_systems import VECTOR, Rates, systems
from trimtab.reproduce.steps import Key

NOTES = (
    "Percent of test items, answers sampled at temperature 1 with the same random numbers for every system; guardrails "
    "greedy. Rates, and where it says composed strengths, were chosen on validation items, and test items were used "
    "once; of trained rivals the rate was chosen and the strength is 1. Intervals of differences resample seeds and "
    "items together, and with two seeds hold little of the luck of a training; those beside single figures resample "
    "items, and those at equal KL are of one seed. Refusals are of the first preference's requests, by phrases. "
    "Positive-only: trained on the pairs as they are, less the base, both at strength 1; norm-matched: the same at the "
    "vectors' length; random: random entries, as long in every weight; flipped: vectors from pairs of which exactly "
    "half are turned round. Guardrails hold up to a strength where, by their means, none loses more than the threshold "
    "on test items. dpo-soup averages the two DPO models; the Reward Soup averages two models trained on the graders. "
    "Safe-RLHF was not run: there is no trainer with a Lagrangian for the cost here. KL: to the bare model on "
    "its own guardrail answers, in nats per token."
)


def build(recipe: Recipe, sizes: Sizes, records: Mapping[Key, Any], rates: Mapping[str, Rates], command: str) -> Report:
    """Set everything out: claims, systems, the grid, the scale, geometry and costs, per model."""
    found = Found(recipe, sizes, records, list(rates))
    made = claims(found, command)
    report: Report = {
        "title": recipe.title,
        "models": found.models,
        "steps": len(records),
        "command": command,
        "versions": versions(),
        "recipe": asdict(recipe),
        "rates": {model: dict(chosen) for model, chosen in rates.items()},
        "claims": made,
        "systems": {model: _systems(found, model) for model in rates},
        "grid": {model: _grid(found, model) for model in rates},
        "selectivity": {model: _selectivity(found, model) for model in rates},
        "scale": {model: _scale(found, model) for model in rates},
        "composed": {
            model: {what: [records[model, "compose", what, s]["chosen"] for s in found.seeds] for what in COMPOSED}
            for model in rates
        },
        "equal": {model: {name: records[model, "equal", name] for name in recipe.preferences} for model in rates},
        "geometry": {model: records[model, "geometry"] for model in rates},
        "trained": {model: _trained(found, model, rates[model]) for model in rates},
        "usable": {model: found.usable(model) for model in rates},
    }
    report["summary"] = _summary(report, recipe)
    return report


def _mean(scores: np.ndarray) -> tuple[float, ...]:
    return tuple(bootstrap_mean(scores.mean(axis=0)))


def _systems(f: Found, model: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    names = list(f.recipe.preferences)
    listed = systems(f.recipe)
    composed = ["composed" if what == "vectors" else f"composed {what}" for what in COMPOSED]
    for system in [*listed[:2], *composed, *listed[2:]]:
        if not f.tests(model, system):
            rows.append({"system": system, "missing": True})
            continue
        tests = f.tests(model, system)
        rails = {
            rail: float(f.rail(model, system, rail).mean() - f.rail(model, "base", rail).mean())
            for rail in tests[0]["guardrails"]
        }
        worst = min(rails, key=lambda rail: rails[rail])
        rows.append(
            {
                "system": system,
                "scores": {name: _mean(f.scores(model, system, name)) for name in names},
                "refused": _mean(f.refused(model, system)),
                "worst_guardrail": worst,
                "worst_guardrail_change": rails[worst],
                "kl": float(np.mean([test["kl"] for test in tests])),
                "broken": float(np.mean([test["broken"] for test in tests])),
            }
        )
    return rows


def _grid(f: Found, model: str) -> dict[str, list[list[float]]]:
    levels = f.recipe.grid
    return {n: [[float(f.cell(model, n, a, b).mean()) for b in levels] for a in levels] for n in f.recipe.two}


def _selectivity(f: Found, model: str) -> dict[str, dict[str, float]]:
    """Return how far strength 1 of each knob moves each preference, by knob and preference."""
    first, second = f.recipe.two
    at = {first: (1.0, 0.0), second: (0.0, 1.0)}
    return {
        knob: {
            name: float(f.cell(model, name, *at[knob]).mean() - f.cell(model, name, 0, 0).mean())
            for name in f.recipe.two
        }
        for knob in f.recipe.two
    }


def _scale(f: Found, model: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for scale in f.recipe.scales:
        records = [f.records[model, "scale", seed][f"{scale:g}"] for seed in f.seeds]
        rows.append(
            {
                "strength": scale,
                **{
                    kind: {name: float(np.mean([r[kind][name] for r in records])) for name in records[0][kind]}
                    for kind in ("scores", "guardrails")
                },
                "broken": float(np.mean([r["broken"] for r in records])),
                "kl": float(np.mean([r["kl"] for r in records])),
            }
        )
    return rows


def _trained(f: Found, model: str, rates: Rates) -> list[dict[str, Any]]:
    """Return what validation showed at each chosen rate, with the first draw of pairs."""
    keys, rows = ("score", "drop", "norm", "cosine", "norm_plus", "norm_minus", "warnings"), list[dict[str, Any]]()
    for name, rate in rates.items():
        kind, own = ("plus", name.removesuffix(" plus")) if name.endswith(" plus") else ("train", name)
        record = {} if rate is None else f.records[model, kind, own, f"{rate:g}", "0"]
        if "score" in record:
            rows.append(
                {"name": name, "rate": rate, "seconds": record.get("cost", {}).get("seconds")}
                | {"kept": record["drop"] <= f.recipe.budget + 1e-9}
                | {key: record[key] for key in keys if key in record}
            )
    return rows


def _summary(report: Report, recipe: Recipe) -> str:
    first = report["models"][0]
    rows = {row["system"]: row for row in report["systems"][first] if "scores" in row}
    said: list[str] = []
    for system, words in (("base", "Without knobs"), (VECTOR, "with both at strength 1"), ("composed", "composed")):
        shares = [f"{percent(rows[system]['scores'][name][0])} percent {name}" for name in recipe.two]
        said.append(f"{words}: {' and '.join(shares)}")
    usable = report["usable"][first]
    held = sum(claim["holds"] for claim in report["claims"])
    said.append(f"guardrails hold up to strength {usable:g} of both")
    return f"{'; '.join(said)}. {held} of {len(report['claims'])} claims hold."


# --- the sections ---------------------------------------------------------------------------------------------------


def sections(report: Report) -> list[Section]:
    """Return the parts of the report, model by model."""
    made: list[Section] = []
    for model in report["models"]:
        on = f" on {model}" if len(report["models"]) > 1 else ""
        made += _grid_sections(report, model, on)
        made.append(_systems_section(report, model, on))
        made += _scale_sections(report, model, on)
        made.append(_equal_section(report, model, on))
        made += _training_sections(report, model, on)
    return made


def _two(report: Report) -> list[str]:
    return list(report["recipe"]["preferences"])[:2]


def _grid_sections(report: Report, model: str, on: str) -> list[Section]:
    grid, levels, (one, other) = report["grid"][model], report["recipe"]["grid"], _two(report)
    label = f"Test scores at every pair of strengths; {one} is turned upwards, {other} to the right."
    heads = ["score on", f"strength of {one}", *(f"{other} {level:g}" for level in levels)]
    rows = [
        [name, f"{a:g}", *map(percent, cells)]
        for name, found in grid.items()
        for a, cells in zip(levels, found, strict=True)
    ]
    moved = report["selectivity"][model]
    table = [[f"{knob} at 1", *(points(moved[knob][name]) for name in moved)] for knob in moved]
    return [
        Section(f"Two knobs{on}", heads, rows, plot=plots.by_strengths(grid, levels), label=label),
        Section(f"Which knob moves what{on}", ["knob", *(f"{name}, points" for name in moved)], table),
    ]


def _systems_section(report: Report, model: str, on: str) -> Section:
    names = list(report["recipe"]["preferences"])
    rows: list[list[str]] = []
    for row in report["systems"][model]:
        if "missing" in row:
            rows.append([row["system"], *[""] * (len(names) + 4)])
            continue
        cells = [_interval(row["scores"][name]) for name in names]
        rail = f"{row['worst_guardrail']} {points(row['worst_guardrail_change'])}"
        more = ["" if row["system"] == "base" else rail, _kl(row["kl"]), percent(row["broken"])]
        rows.append([row["system"], *cells, _interval(row["refused"]), *more])
    heads = ["system", *names, "benign refused", "worst guardrail", "KL", "broken"]
    shown = [row for row in report["systems"][model] if "scores" in row and not row["system"].startswith("only ")]
    label = "Every system by its scores on the two preferences, with 95 % intervals."
    texts: list[str] = []
    for what, draws in report["composed"][model].items():
        chosen = "; ".join(", ".join(f"{name} {strength:g}" for name, strength in one.items()) for one in draws)
        texts.append(f"Composed {what}: strengths by validation, for each draw of pairs: {chosen}.")
    return Section(f"Systems{on}", heads, rows, texts=texts, plot=plots.by_system(shown, _two(report)), label=label)


def _scale_sections(report: Report, model: str, on: str) -> list[Section]:
    found, two = report["scale"][model], _two(report)
    rails = list(found[0]["guardrails"])
    rows = [
        [
            f"{row['strength']:g}",
            *(percent(row["scores"][name]) for name in two),
            *(percent(row["guardrails"][rail]) for rail in rails),
            percent(row["broken"]),
            _kl(row["kl"]),
        ]
        for row in found
    ]
    label = "Scores, guardrails and broken answers along one strength for both knobs, on test items."
    heads = ["strength of both", *two, *rails, "broken", "KL"]
    return [Section(f"How strong{on}", heads, rows, plot=plots.by_scale(found, two), label=label)]


def _equal_section(report: Report, model: str, on: str) -> Section:
    found = report["equal"][model]
    rows: list[list[str]] = []
    for name, ways in found.items():
        for way, told in ways.items():
            for limit, at in told["at"].items():
                scores = _interval(tuple(bootstrap_mean(np.array(at["scores"]))))
                rows.append([name, way, limit, f"{at['strength']:.2f}", scores, _kl(at["kl"])])
    curves = {name: {way: told["curve"] for way, told in ways.items()} for name, ways in found.items()}
    label = "Validation scores over the side effect, of weight and steering knobs from the same pairs."
    heads = ["preference", "knob", "KL at most", "strength", "test score", "KL on test guardrails"]
    title = f"Weights or activations, at equal side effect{on}"
    return Section(title, heads, rows, words=(0, 1), plot=plots.by_kl(curves), label=label)


def _training_sections(report: Report, model: str, on: str) -> list[Section]:
    told = report["geometry"][model]
    names: Sequence[str] = told["names"]
    heads = ["cosine (sign conflicts)", *names]
    cells = zip(names, told["cosines"], told["sign_conflicts"], strict=True)
    rows = [[n, *(f"{c:.3f} ({s:.2f})" for c, s in zip(cos, signs, strict=True))] for n, cos, signs in cells]
    text = (
        "Singular task interference of the first two, mean over all matrices (the paper takes 32): "
        f"{told['interference']:.3g}, of unit-norm differences {told['interference_normed']:.3g}. The paper's cosine "
        "of help and harmlessness is .34 to .40."
    )
    trained = [
        [
            row["name"],
            f"{row['rate']:g}",
            percent(row["score"]),
            points(0.0 - row["drop"]),  # 0 has no sign here
            f"{row['norm']:.2f}",
            f"{row['cosine']:.3f}" if "cosine" in row else "",
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
        ]
        for row in report["trained"][model]
    ]
    what = ["trained", "rate", "validation score", "worst guardrail", "norm", "cosine of plus and minus", "seconds"]
    said = "The paper's cosines of plus and minus are -.47 to -.71."
    if broke := [row["name"] for row in report["trained"][model] if not row["kept"]]:
        said += f" No rate kept the guardrails' budget on validation for: {', '.join(broke)}; the mildest was taken."
    return [
        Section(f"How the vectors lie to each other{on}", heads, rows, texts=[text]),
        Section(f"Training{on}", what, trained, texts=[said]),
    ]


def _kl(value: float) -> str:
    """Return nats per token; far below a thousandth they are no side effect."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{percent(mean)} ({percent(low)} to {percent(high)})"
