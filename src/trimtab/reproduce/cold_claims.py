"""What COLD-Steer claims, beside what was measured: an interval, a threshold, and whether the claim holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from trimtab.evals.stats import Interval, bootstrap_runs
from trimtab.prefworld.families.surveys import GROUPS
from trimtab.reproduce.cold_data import EVERYBODY
from trimtab.reproduce.cold_evidence import Evidence, fall
from trimtab.reproduce.cold_facts import TEXTS
from trimtab.reproduce.cold_recipe import BASELINES, SYSTEMS
from trimtab.reproduce.document import Claim, Unit, judge

COLD = ("cold-fd", "cold-kernel", "one-step")
"""What the headline is measured for."""


def claims(evidence: Evidence) -> list[dict[str, Any]]:
    """Return every claim, in the order of the report."""
    parts = (_headline, _behaviours, _more, _writing, _opinions, _controls, _numerics)
    return [asdict(claim) for part in parts for claim in part(evidence)]


def _claim(
    e: Evidence,
    name: str,
    statement: str,
    published: str,
    interval: Interval,
    n: int,
    *,
    above: float | None = None,
    below: float | None = None,
    unit: Unit = "points",
) -> Claim:
    own = {e.model: interval.estimate}
    return judge(name, statement, published, interval, own, n, e.command, above=above, below=below, unit=unit)


def best_baseline(e: Evidence, n: int) -> str | None:
    """Return the baseline with the best validation score of those learned from `n` pairs; None without any."""
    known = [system for system in BASELINES if system in e.recipe.systems]
    return max(known, key=lambda system: e.validated(system, n), default=None)


def headline_counts(e: Evidence) -> list[tuple[int, int]]:
    """Return the numbers of pairs that are fifty-fold apart: 10 and 500, 20 and 1000 where both were learned from."""
    return [(n, 50 * n) for n in (10, 20) if {n, 50 * n} <= set(e.sizes.counts)]


def _headline(e: Evidence) -> Iterator[Claim]:
    n, limit = len(e.curved) * e.sizes.seeds * e.sizes.test, e.recipe.thresholds.share
    among = ", ".join(SYSTEMS[system] for system in BASELINES if system in e.recipe.systems)
    for few, many in headline_counts(e):
        if (best := best_baseline(e, many)) is None:
            return
        gains = e.gain(best, many, names=e.curved).low > 0
        for system in (s for s in COLD if s in e.recipe.systems):
            claim = _claim(
                e,
                f"share-{system}-{few}-{many}",
                f"{SYSTEMS[system]} from {few} pairs, and {e.sizes.validation} questions that choose, has "
                f"{100 * limit:g} % "
                f"or more of the effect of {SYSTEMS[best]} from {many}, the best of: {among}",
                "not compared" if system == "one-step" else "up to 95 % of the effect with 50 times fewer samples",
                e.surplus(system, few, best, many, limit),
                n,
                above=0.0,
            )
            yield replace(claim, holds=claim.holds and gains, rule=f"{claim.rule}, and the baseline gains")


def _behaviours(e: Evidence) -> Iterator[Claim]:
    n, size, gain = e.sizes.pairs, e.sizes.test * e.sizes.seeds * len(e.recipe.behaviours), e.recipe.thresholds.gain
    said = {
        "cold-fd": "best of all; up to 96 points",
        "cold-kernel": "equal to the bare model",
        "one-step": "not compared",
        "diffmean": "second to COLD-FD",
    }
    for system, published in said.items():
        if system in e.recipe.systems:
            yield _claim(
                e,
                f"gain-{system}",
                f"{SYSTEMS[system]} from {n} pairs makes the matching letter likelier, options both ways round",
                published,
                e.gain(system, n),
                size,
                above=gain,
            )
    rivals = [s for s in SYSTEMS if s not in ("cold-fd", "random") and s in e.recipe.systems]
    for rival in rivals if "cold-fd" in e.recipe.systems else []:
        published = {"diffmean": "better", "cold-kernel": "better"}.get(rival)
        yield _claim(
            e,
            f"fd-over-{rival}",
            f"COLD-FD from {n} pairs does better than {SYSTEMS[rival]}",
            published or "not compared",
            e.gain("cold-fd", n, over=rival),
            size,
            above=0.0,
        )


def _more(e: Evidence) -> Iterator[Claim]:
    most, fewer = max(e.sizes.counts), e.sizes.pairs
    if most <= fewer or "diffmean" not in e.recipe.systems:
        return
    for system in (s for s in ("diffmean", "cold-fd") if s in e.recipe.systems):
        groups = [(e.behaviour(b, system, fewer), e.behaviour(b, system, most)) for b in e.curved]
        yield _claim(
            e,
            f"more-hurts-{system}",
            f"{most} pairs make {SYSTEMS[system]} worse than {fewer}, doses chosen anew",
            "contrastive methods fall with more samples" if system == "diffmean" else "-",
            bootstrap_runs(groups),
            sum(b.size for _, b in groups),
            below=0.0,
        )


def _writing(e: Evidence) -> Iterator[Claim]:
    for name in e.recipe.writing:
        base = e.written(name, "base")
        for system in (s for s in ("cold-fd", "cold-kernel", "one-step") if s in e.recipe.systems):
            found = e.written(name, system)
            yield _claim(
                e,
                f"written-{name}-{system}",
                f"{SYSTEMS[system]} brings generated answers to {name} onto the target side",
                {"cold-fd": "judged better (2.98 to 3.32 of hallucination)", "cold-kernel": "about the bare model"}.get(
                    system, "not compared"
                ),
                bootstrap_runs([(base, found)]),
                found.size,
                above=e.recipe.thresholds.gain,
            )


def _opinions(e: Evidence) -> Iterator[Claim]:
    if not e.recipe.groups:
        return
    systems = [s for s in ("cold-kernel", "cold-kernel-softmax", "cold-fd", "one-step") if s in e.recipe.systems]
    bare = [e.opinions(g, "base", g) for g in GROUPS]
    limit = e.recipe.thresholds.divergence
    size = len(GROUPS) * e.sizes.seeds * 2 * e.sizes.polls
    said = {"cold-kernel": "nearer in every group", "cold-fd": "poor"}
    for system in systems:
        own = [e.opinions(g, system, g) for g in GROUPS]
        yield _claim(
            e,
            f"opinions-{system}",
            f"{SYSTEMS[system]} brings the model nearer to a group's answers (KL, statements not learned from)",
            said.get(system, "not compared"),
            fall(bare, own),
            size,
            above=limit,
            unit="nats",
        )
        pooled = [e.opinions(EVERYBODY, system, g) for g in GROUPS]
        yield _claim(
            e,
            f"opinions-own-{system}",
            f"nearer than when it learns from everybody's answers ({SYSTEMS[system]})",
            "not measured",
            fall(pooled, own),
            size,
            above=limit,
            unit="nats",
        )
    if {"cold-kernel", "cold-fd"} <= set(systems):
        kernel, ahead = ([e.opinions(g, s, g) for g in GROUPS] for s in ("cold-kernel", "cold-fd"))
        words = "COLD-Kernel comes nearer to a group's answers than COLD-FD"
        yield _claim(e, "opinions-kernel-over-fd", words, "yes", fall(ahead, kernel), size, above=limit, unit="nats")


def _controls(e: Evidence) -> Iterator[Claim]:
    if "random" not in e.recipe.systems:
        return
    size = e.sizes.test * e.sizes.seeds * len(e.recipe.behaviours)
    words = "a random direction, chosen in the same way, gains nothing on behaviours"
    yield _claim(e, "control-random", words, "-", e.gain("random", e.sizes.pairs), size, below=e.recipe.thresholds.loss)
    for name in e.recipe.writing:
        found = e.written(name, "random")
        yield _claim(
            e,
            f"control-random-{name}",
            f"a random direction, chosen in the same way, gains nothing on {name}",
            "-",
            bootstrap_runs([(e.written(name, "base"), found)]),
            found.size,
            below=e.recipe.thresholds.loss,
        )


def _numerics(e: Evidence) -> Iterator[Claim]:
    record = e.of("facts")
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in record["steps"] if row["dtype"] == dtype and row["epsilon"] == 1e-6]
        best = float(np.max([row["cosine"] for row in rows]))
        yield _claim(
            e,
            f"epsilon-{dtype}",
            f"the released step of 1e-6 gives the direction of the derivative in {dtype} (cosine, the better loss)",
            "assumed",
            Interval(best, best, best),
            TEXTS,
            above=0.99,
            unit="cosine",
        )
    alike = float(np.min(list(record["agreement"].values())))
    yield _claim(
        e,
        "back-ends",
        "the exact derivative and the step that the dtype resolves have one direction (cosine, the worse loss)",
        "-",
        Interval(alike, alike, alike),
        TEXTS,
        above=0.999,
        unit="cosine",
    )
