"""What the records of a run say, set out: one row per system, and the curves of pairs, dose and site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trimtab.evals.stats import bootstrap_runs, holm, mcnemar
from trimtab.reproduce.evidence import GREEDY, RIGHT, Evidence

Row = dict[str, Any]


def systems(e: Evidence) -> Iterator[tuple[str, str, tuple[object, ...], int]]:
    """Yield title, kind of step, the rest of its key, and the pairs that it has seen, of every system compared."""
    n, many = e.sizes.pairs, e.sizes.many_pairs
    yield "bare model", "base", (), 0
    for name, way in e.recipe.steering.items():
        yield way.title, "steer", (name, n), n
    yield "examples before the question", "examples", (), n
    for name, way in e.recipe.training.items():
        for count in (n, many):
            yield f"{way.title}, {count} pairs", "train", (name, count), count


def compare(e: Evidence, model: str, domain: str) -> list[Row]:
    """Return one row per system on one domain: every figure with what it was compared to."""
    base = e.scores(GREEDY, model, "base", domain)
    rails = list(e.found(model, "base", domain)[0]["test"]["guardrails"])
    rows: list[Row] = []
    for title, kind, rest, pairs in systems(e):
        found = e.found(model, kind, domain, *rest)
        if not found:
            continue
        greedy = e.scores(GREEDY, model, kind, domain, *rest)
        gained = bootstrap_runs([(base, greedy)])
        losses = {rail: _mean(e, ("guardrails", rail), model, kind, domain, rest) for rail in rails}
        before = {rail: _mean(e, ("guardrails", rail), model, "base", domain, ()) for rail in rails}
        worst = min(rails, key=lambda rail: losses[rail] - before[rail], default="")
        rows.append(
            {
                "system": title,
                "kind": kind,
                "name": str(rest[0]) if rest else kind,
                "pairs": pairs,
                "control": kind == "steer" and e.recipe.steering[str(rest[0])].control,
                "seeds": len(found),
                "greedy": float(greedy.mean()),
                "by_seed": greedy.mean(axis=1).tolist(),
                "gain": gained.estimate,
                "gain_low": gained.low,
                "gain_high": gained.high,
                "sampled": _mean(e, ("sampled", "scores"), model, kind, domain, rest),
                "side_share": _over(found, ("sampled", "side_share")),
                "within_side": _over(found, ("sampled", "score_within_side")),
                "guardrails": losses,
                "worst_guardrail": worst,
                "worst_guardrail_change": losses[worst] - before[worst] if worst else None,
                "preference": _mean(e, RIGHT, model, kind, domain, rest),
                "kl": _over(found, ("kl",)),
                "luck": _luck(found),
                "seconds_per_answer": _over(found, ("seconds_per_answer",)),
                "broken": _over(found, ("greedy", "broken")),
                "characters": _over(found, ("greedy", "characters")),
                **_costs(e, model, kind, domain, rest, found),
                "chosen": _chosen(e, rest, found),
                "refused": sum("refused" in record for record in found),
            }
        )
    return rows


def _mean(e: Evidence, what: tuple[str, ...], model: str, kind: str, domain: str, rest: tuple[object, ...]) -> float:
    return float(e.scores(what, model, kind, domain, *rest).mean())


def _over(found: list[Any], path: tuple[str, ...]) -> float | None:
    """Return the mean over seeds of a figure that may be missing."""
    values: list[float] = []
    for record in found:
        value = record["test"]
        for name in path:
            value = value[name]
        if value is not None:
            values.append(value)
    return float(np.mean(values)) if values else None


def _costs(e: Evidence, model: str, kind: str, domain: str, rest: tuple[object, ...], found: list[Any]) -> Row:
    """Return the median seconds and the largest memory of learning and of tuning, apart."""
    costs: Row = dict.fromkeys(("learn_seconds", "tune_seconds", "learn_bytes", "tune_bytes"))
    for part in ("learn", "tune"):
        records = found
        if kind == "train" and part == "tune":
            records = [e.grid(model, domain, str(rest[0]), int(str(rest[1])))]
        parts = [record[part] for record in records if part in record]
        if parts:
            costs[f"{part}_seconds"] = float(np.median([cost["seconds"] for cost in parts]))
            known = [cost["peak_bytes"] for cost in parts if cost["peak_bytes"] is not None]
            costs[f"{part}_bytes"] = max(known) if known else None
    return costs


def _luck(found: list[Any]) -> float | None:
    """Return what the best of as many useless settings would have seemed to gain on validation, mean over seeds."""
    known = [record["validation"]["selection_bias"]["expected"] for record in found if "validation" in record]
    return float(np.mean(known)) if known else None


def _chosen(e: Evidence, rest: tuple[object, ...], found: list[Any]) -> list[str]:
    """Say of each seed what validation chose; the best rate of a grid may lie beyond its edge."""
    said: list[str] = []
    for record in found:
        if "refused" in record:
            said.append("refused")
        elif "chosen" in record:
            chosen = record["chosen"]
            said.append(f"{chosen['site']}, {chosen['where']}, alpha {chosen['gain']:g}")
        elif "shots" in record:
            said.append(f"{record['shots']} examples")
        elif "record" in record:
            row = record["record"]["table"][0]
            rates = e.recipe.training[str(rest[0])].learning_rates
            edge = " (the grid's edge)" if row["learning_rate"] in (min(rates), max(rates)) else ""
            said.append(f"rate {row['learning_rate']:g}{edge}, beta {row['beta']:g}, step {row['best_step']}")
    return said


def tests(e: Evidence, model: str, domain: str) -> list[Row]:
    """Return McNemar's p of the main way against the bare model on every task, seed 0, adjusted over the tasks."""
    record = e.found(model, "steer", domain, e.recipe.main, e.sizes.pairs)[0]["test"]
    base = e.found(model, "base", domain)[0]["test"]
    tasks = {domain: (base["greedy"]["scores"], record["greedy"]["scores"])}
    tasks |= {rail: (scores, record["guardrails"][rail]) for rail, scores in base["guardrails"].items()}
    whole = {name: pair for name, pair in tasks.items() if set(pair[0]) | set(pair[1]) <= {0.0, 1.0}}
    p_values = [mcnemar(*pair) for pair in whole.values()]
    return [
        {"task": name, "difference": float(np.mean(pair[1]) - np.mean(pair[0])), "p": p, "p_holm": adjusted}
        for (name, pair), p, adjusted in zip(whole.items(), p_values, holm(p_values), strict=True)
    ]


def counts(e: Evidence, model: str, domain: str) -> list[Row]:
    """Return accuracy by number of pairs, of the main way and of training."""
    ways: list[tuple[str, str, str, tuple[int, ...]]] = [
        ("PaLRS", "steer", e.recipe.main, tuple(sorted({*e.sizes.counts, e.sizes.pairs})))
    ]
    ways += [(way.title, "train", name, (e.sizes.pairs, e.sizes.many_pairs)) for name, way in e.recipe.training.items()]
    rows: list[Row] = []
    for title, kind, name, numbers in ways:
        for n in numbers:
            if not e.found(model, kind, domain, name, n):  # models after the first see fewer counts
                continue
            means = e.scores(GREEDY, model, kind, domain, name, n).mean(axis=1)
            rows.append({"system": title, "pairs": n, "mean": float(means.mean()), "by_seed": means.tolist()})
    return rows


def curve(e: Evidence, model: str, domain: str, kind: str) -> Mapping[str, Any] | None:
    """Return the record of a curve; None where tuning refused the knob."""
    return e.records.get((model, kind, domain, e.recipe.main))
