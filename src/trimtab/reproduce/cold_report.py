"""The report of a COLD-Steer reproduction: its figures, as plain JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trimtab.checkpoint import versions
from trimtab.prefworld.families.surveys import GROUPS
from trimtab.reproduce.cold_claims import COLD, best_baseline, claims, headline_counts
from trimtab.reproduce.cold_data import EVERYBODY
from trimtab.reproduce.cold_evidence import Evidence
from trimtab.reproduce.cold_recipe import CURVES, POLLS, SYSTEMS, WRITING, Recipe, Sizes
from trimtab.reproduce.document import Report, percent
from trimtab.reproduce.steps import Key


def notes(recipe: Recipe, sizes: Sizes) -> str:
    """Return how to read the report of a recipe."""
    budget = "without any budget, since the recipe has no guardrails"
    if recipe.guardrails:
        limit = f"{recipe.kl_budget:g} nats per token"
        budget = f"within a budget of KL to the base model on its own answers to guardrails ({limit})"
    told = [
        "A behaviour's questions come in the form of CAA: two options, and the answer is (A) or (B). Each is asked "
        "with its options both ways round, so that always saying (A) scores exactly one half; the score is the "
        "probability of the matching letter of the two.",
        f"All systems choose on the same {sizes.validation} validation questions. What moves the stream acts on all "
        f"tokens; the middle dose ranks the candidate layers, and the best layer is tried at every dose, {budget}. "
        "Examples are shown as far as the context has room beside the longest question. Trained vectors have the "
        "highest candidate layer alone; examples and weights have no layer.",
        f"Test questions were used once. Intervals are from a bootstrap of questions and of {sizes.seeds} seeds, which "
        "makes it somewhat narrow.",
    ]
    if recipe.groups:
        told.append(
            "Opinions are of statements that nothing was learned from; KL is from the group's shares to the "
            "model's, over four options."
        )
    told.append("Seconds are of this machine with whatever else ran on it; on a small model a step is mostly overhead.")
    return " ".join(told)


def build(recipe: Recipe, sizes: Sizes, model: str, records: Mapping[Key, Any], command: str, *, quick: bool) -> Report:
    """Return everything that the page shows, as JSON values."""
    e = Evidence(records, recipe, sizes, model, command)
    report: Report = {
        "title": recipe.title,
        "paper": "arXiv:2603.06495",
        "quick": quick,
        "models": [model],
        "claims": claims(e),
        "behaviours": list(_behaviours(e)),
        "doses": _doses(e),
        "samples": _samples(e),
        "writing": list(_writing(e)),
        "opinions": list(_opinions(e)),
        "facts": e.of("facts"),
        "speed": e.of("speed"),
        "sizes": {"pairs": sizes.pairs, "seeds": sizes.seeds, "validation": sizes.validation, "test": sizes.test},
        "steps": len(records),
        "command": command,
        "versions": versions(),
    }
    return report | {"summary": _summary(report, e)}


def _behaviours(e: Evidence) -> Iterator[dict[str, Any]]:
    """Yield a row per system: by behaviour, on average with interval, side effects, place, cost."""
    bare, n = e.of("base"), e.sizes.pairs
    names = list(e.recipe.behaviours)
    yield {
        "system": "base",
        "title": "the model as it is",
        "by_behaviour": {b: float(np.mean(bare["test"][b]["probability"])) for b in names},
        "right": float(np.mean([np.mean(bare["test"][b]["right"]) for b in names])),
        "letter_a": float(np.mean([bare["test"][b]["letter_a"] for b in names])),
        "rails": _mean_of(bare["side"]["rails"]),
        "kl": 0.0,
    }
    yield {"system": "always-a", "title": "always (A)", "by_behaviour": dict.fromkeys(names, 0.5), "right": 0.5}
    for system in e.recipe.systems:
        records = {b: e.seeds("behaviour", b, system, n) for b in names}
        every = [record for found in records.values() for record in found]
        sides = [record["side"] for record in every]
        shifts = [
            np.mean(side["others"][o]) - np.mean(bare["side"]["others"][o]) for side in sides for o in side["others"]
        ]
        moved = [side["moved"] for side in sides if side["moved"] is not None]
        yield {
            "system": system,
            "title": SYSTEMS[system],
            "by_behaviour": {b: float(e.behaviour(b, system, n).mean()) for b in names},
            "right": float(np.mean([e.behaviour(b, system, n, "right").mean() for b in names])),
            "gain": e.gain(system, n),
            "letter_a": float(np.mean([record["test"]["letter_a"] for record in every])),
            "others": float(np.mean(np.abs(shifts))) if shifts else None,
            "rails": _mean([_mean_of(side["rails"]) for side in sides]),
            "kl": _mean([side["kl"] for side in sides]),
            "moved": float(np.mean(moved)) if moved else None,
            "refused": sum("refused" in record for record in every),
            "converged": [record["converged"] for record in every if "converged" in record],
            "doses": [record["chosen"]["dose"] for record in every if "chosen" in record],
            "sites": sorted({str(record["chosen"]["site"]) for record in every if "chosen" in record}),
            "learn_seconds": float(np.median([record["learn"]["seconds"] for record in every])),
            "tune_seconds": float(np.median([record["tune"]["seconds"] for record in every])),
            "peak_bytes": max((r["learn"]["peak_bytes"] for r in every if r["learn"]["peak_bytes"]), default=None),
        }


def _mean_of(rails: Mapping[str, Any]) -> float | None:
    return float(np.mean([np.mean(scores) for scores in rails.values()])) if rails else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _doses(e: Evidence) -> dict[str, list[dict[str, float]]]:
    """Return the validation score by dose at the chosen layer, over behaviours and seeds, of what moves the stream."""
    found: dict[str, list[dict[str, float]]] = {}
    for system in e.recipe.systems:
        rows: dict[float, list[float]] = {}
        for name in e.recipe.behaviours:
            for record in e.seeds("behaviour", name, system, e.sizes.pairs):
                place = record.get("chosen", {}).get("site")
                for row in record["table"]:
                    if place is not None and row["site"] == place:
                        rows.setdefault(row["dose"], []).append(row["score"])
        if rows:
            found[system] = [{"dose": dose, "score": float(np.mean(scores))} for dose, scores in sorted(rows.items())]
    return found


def _samples(e: Evidence) -> dict[str, Any]:
    """Return the effect by number of pairs, and the best baseline of the headline."""
    systems = [system for system in CURVES if system in e.recipe.systems]
    counts = sorted(e.sizes.counts)
    bare = float(np.mean([e.behaviour(b, "base", 0).mean() for b in e.curved]))
    rows = [
        {
            "system": system,
            "pairs": n,
            "mean": float(np.mean([e.behaviour(b, system, n).mean() for b in e.curved])),
            "by_seed": np.mean([e.behaviour(b, system, n).mean(axis=1) for b in e.curved], axis=0).tolist(),
            "gain": e.gain(system, n, names=e.curved),
        }
        for system in systems
        for n in counts
    ]
    headline = [
        {"system": system, "few": few, "many": many, "best": best, "share": e.share(system, few, best, many)}
        for few, many in headline_counts(e)
        if (best := best_baseline(e, many)) is not None
        for system in COLD
        if system in e.recipe.systems
    ]
    return {"behaviours": e.curved, "base": bare, "rows": rows, "headline": headline}


def _writing(e: Evidence) -> Iterator[dict[str, Any]]:
    for name in e.recipe.writing:
        for system in ("base", *(s for s in WRITING if s in e.recipe.systems)):
            found = e.written(name, system)
            records = [e.of("writing", name, "base", 0)] if system == "base" else e.seeds("writing", name, system)
            yield {
                "domain": name,
                "system": system,
                "title": SYSTEMS.get(system, "the model as it is"),
                "on_side": float(found.mean()),
                "by_seed": found.mean(axis=1).tolist(),
                "broken": float(np.mean([record["test"]["broken"] for record in records])),
                "kl": _mean([record["test"]["kl"] for record in records]),
                "seconds_per_answer": float(np.median([record["test"]["seconds_per_answer"] for record in records])),
                "learn_seconds": float(np.median([r["learn"]["seconds"] for r in records]))
                if system != "base"
                else 0.0,
            }


def _opinions(e: Evidence) -> Iterator[dict[str, Any]]:
    """Yield a row per system: distance to the group it was turned to, to the others, and of the pooled one."""
    if not e.recipe.groups:
        return
    for system in ("base", *(s for s in POLLS if s in e.recipe.systems)):
        own = {g: float(e.opinions(g, system, g).mean()) for g in GROUPS}
        others = [e.opinions(g, system, o).mean() for g in GROUPS for o in GROUPS if o != g]
        bare = [e.of("opinions", EVERYBODY, "base", 0)]
        records = bare if system == "base" else [r for g in GROUPS for r in e.seeds("opinions", g, system)]
        yield {
            "system": system,
            "title": SYSTEMS.get(system, "the model as it is"),
            "own": own,
            "kl": float(np.mean(list(own.values()))),
            "tv": float(np.mean([e.opinions(g, system, g, "tv").mean() for g in GROUPS])),
            "others": float(np.mean(others)),
            "pooled": float(np.mean([e.opinions(EVERYBODY, system, g).mean() for g in GROUPS])),
            "spread": float(np.mean([record["test"]["spread"] for record in records])),
        }


def _summary(report: Report, e: Evidence) -> str:
    """Say in a sentence or two what came out."""
    rows = {row["system"]: row for row in report["behaviours"]}
    means = {name: float(np.mean(list(row["by_behaviour"].values()))) for name, row in rows.items()}
    shown = ("cold-fd", "one-step", "few-step-lora", "bipo", "cold-kernel", "diffmean")
    told = [f"{rows[name]['title']} {percent(means[name])}" for name in shown if name in rows]
    held = sum(claim["holds"] for claim in report["claims"])
    quick = "A quick run, whose figures mean nothing. " if report["quick"] else ""
    return (
        f"{quick}On {e.model}, from {e.sizes.pairs} pairs and with options both ways round, the matching letter has "
        f"{percent(means['base'])} of the probability without steering; with it: {'; '.join(told)}. "
        f"{held} of {len(report['claims'])} claims hold."
    )
