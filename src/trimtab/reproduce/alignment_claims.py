"""What Alignment Vectors claim, beside what was measured: an interval, a threshold, and whether the claim holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from trimtab.evals.stats import Interval, bootstrap_mean, bootstrap_ratio, paired_bootstrap
from trimtab.reproduce.alignment_evidence import (
    DRAWS,
    EXPERT,
    Evidence,
    apart_and_together,
    curves,
    equal_seconds,
    handed_over,
    hits,
    on_target,
    reached,
    resampled,
    seconds,
    spread,
    wanted,
)
from trimtab.reproduce.document import Claim, Unit, judge

MOST = 0.5


def claims(evidence: Evidence) -> list[dict[str, Any]]:
    """Return every claim, in the order of the report."""
    parts = (_lambda, _combinations, _others, _stages, _time, _cost)
    return [asdict(claim) for part in parts for claim in part(evidence)]


def _claim(
    e: Evidence,
    name: str,
    statement: str,
    published: str,
    interval: Interval,
    n: int,
    above: float,
    unit: Unit = "points",
) -> Claim:
    by_model = {e.model: interval.estimate}
    return judge(name, statement, published, interval, by_model, n, e.command, above=above, unit=unit)


def _lambda(e: Evidence) -> Iterator[Claim]:
    rows = {domain: e.of("sweep", domain, "plain")["rows"] for domain in e.domains}
    strengths = np.array([row["lambda"] for row in rows[e.domains[0]]])
    found = {domain: curves(rows[domain], "test") for domain in e.domains}
    n = min(curve.shape[2] for curve in found.values())

    def ordered(at: np.ndarray) -> float:
        return sum(handed_over(curve[..., at].mean(axis=2), strengths) for curve in found.values())

    yield _claim(
        e,
        "hand-over",
        f"along lambda the likeliest level goes from avoidance over generic to expert in all {len(found)} domains",
        "levels follow lambda; tables not available to us",
        resampled(ordered, n),
        n * len(found),
        len(found) - 0.5,
        "count",
    )
    for domain in e.domains:
        strength = e.of("sweep", domain, "plain")["chosen"]["expert"]
        levels = np.array(e.at(domain, strength)["test"])
        yield _claim(
            e,
            f"expert-{domain}",
            f"at the lambda that validation chose ({strength:g}) the expert answer is the likeliest to most "
            f"{domain} questions",
            "95 % medical at .5, 85 % financial and 100 % legal at .3",
            bootstrap_mean((levels == EXPERT).astype(float)),
            len(levels),
            MOST,
        )
        if made := e.at(domain, strength)["generated"]:
            yield _claim(
                e,
                f"generated-{domain}",
                f"there most sampled answers to {domain} questions are expert answers too",
                "judged answers; numbers not available to us",
                bootstrap_mean((np.array(made) == EXPERT).astype(float)),
                len(made),
                MOST,
            )


def _combinations(e: Evidence) -> Iterator[Claim]:
    for way in e.recipe.ways:
        yield from _reached(e, way)
    yield from _against_joint(e)


def _reached(e: Evidence, way: str) -> Iterator[Claim]:
    rows = e.of("combine", way)["rows"]
    suffix, of = ("", "") if way == "plain" else (f"-{way}", " by vectors that are anchored in the other domains")
    levels, targets = hits(rows, e.domains), wanted(rows)
    n, limits, total = levels.shape[2], e.recipe.thresholds, len(rows)

    def count(found: np.ndarray, *, strict: bool) -> Interval:
        return resampled(lambda at: float(reached(found[..., at], targets, strict=strict).sum()), n)

    said = f"combinations of levels are reached{of}: their level leads in every domain"
    items, many, every = n * len(e.domains), min(limits.reached, total) - 0.5, min(limits.goal, total - 0.5)
    for name, words, strict, least in (
        ("as-many", f"as many {said}", False, many),
        ("as-many-strict", f"as many {said}, on half of the questions or more", True, many),
        ("all", f"all {total} {said}", False, every),
    ):
        published = "22 of 27" if way == "plain" else "-"
        yield _claim(e, name + suffix, words, published, count(levels, strict=strict), items, least, "count")
    asked = hits(e.of("prompts")["rows"], e.domains)
    more = resampled(
        lambda at: float(
            reached(levels[..., at], targets, strict=False).sum() - reached(asked[..., at], targets, strict=False).sum()
        ),
        n,
    )
    yield _claim(
        e,
        f"more-than-prompts{suffix}",
        f"more combinations are reached{of} than by asking in a system line",
        "-",
        more,
        items,
        0.0,
        "count",
    )


def _against_joint(e: Evidence) -> Iterator[Claim]:
    trained = e.all("joint")
    own = {tuple(row["levels"]): row for row in e.of("combine", "plain")["rows"]}
    rows = [own[tuple(record["levels"])] for record in trained]
    if not rows:
        return
    targets, ours, joint = wanted(rows), hits(rows, e.domains), hits(trained, e.domains)

    def behind(at: np.ndarray) -> float:
        worst = [on_target(found[..., at], targets).min(axis=1).mean() for found in (ours, joint)]
        return float(worst[1] - worst[0])

    yield _claim(
        e,
        "below-joint",
        f"joint DPO is more accurate in the worst domain, over {len(rows)} combinations",
        "46 % against 100 %",
        resampled(behind, ours.shape[2]),
        ours.shape[2] * len(e.domains) * len(rows),
        0.0,
    )


def _others(e: Evidence) -> Iterator[Claim]:
    record, limits = e.of("matrix"), e.recipe.thresholds
    n = len(record["base"]["test"][e.domains[0]])

    def off(kind: str, at: np.ndarray) -> float:
        return apart_and_together(spread(record, kind, e.domains, at))[0]

    if len(e.domains) > 1:
        yield _claim(
            e,
            "over-generalises",
            "one domain's vector raises the share of expert answers in the other domains",
            "seen in the paper; numbers not available to us",
            resampled(lambda at: off("plain", at), n),
            n * len(e.domains),
            limits.loss,
        )
        for kind, those in (
            ("orthogonal", "vectors without their projections onto each other"),
            ("anchored", "vectors that are anchored in the other domains"),
        ):
            yield _claim(
                e,
                kind,
                f"{those} raise it less there",
                "-",
                resampled(lambda at, kind=kind: off("plain", at) - off(kind, at), n),
                n * len(e.domains),
                limits.loss,
            )
    for rail, before in record["base"]["rails"].items():
        after = np.mean([record["plain"][d]["rails"][rail] for d in e.domains], axis=0)
        yield _claim(
            e,
            f"keeps-{rail}",
            f"the vectors, each alone, cost at most {100 * limits.loss:g} points of {rail}",
            "safety kept",
            paired_bootstrap(before, after),
            len(before) * len(e.domains),
            -limits.loss,
        )


def _stages(e: Evidence) -> Iterator[Claim]:
    for record, domain in zip(e.all("stage"), e.domains, strict=False):
        native, given = ((np.array(record[kind]["test"]) == EXPERT).astype(float) for kind in ("native", "transferred"))
        limit = e.recipe.thresholds.transferred
        yield _claim(
            e,
            f"transfers-{domain}",
            f"on another fine-tuning stage the base model's {domain} vector makes expert answers the likeliest on at "
            f"most {100 * limit:g} points fewer questions than that stage's own",
            "a vector of one stage works at another",
            paired_bootstrap(native, given),
            len(given),
            -limit,
        )
        for rail, before in record["base"]["rails"].items():
            yield _claim(
                e,
                f"transfer-keeps-{rail}",
                f"there it costs at most {100 * e.recipe.thresholds.loss:g} points of {rail}",
                "safety kept",
                paired_bootstrap(before, record["transferred"]["rails"][rail]),
                len(before),
                -e.recipe.thresholds.loss,
            )


def _time(e: Evidence) -> Iterator[Claim]:
    trained = [record["seconds"] for record in e.all("joint")]
    if not trained:
        return
    grid, limits = e.of("grid", "plain"), e.recipe.thresholds
    choices = [row["choice_seconds"] + grid["merge_seconds"] for row in e.of("combine", "plain")["rows"]]
    random = np.random.default_rng(0)
    joint = random.choice(trained, (DRAWS, len(trained))).mean(axis=1)
    choice = random.choice(choices, (DRAWS, len(choices))).mean(axis=1)
    n = k = len(choices)
    search = f"so it is when it pays for the whole search, {len(grid['rows'])} settings"
    kinds = [
        ("marginal", "a new combination, chosen and merged, is faster than a joint DPO run", 0.0, limits.much_faster),
        ("search", search, grid["seconds"], limits.faster),
    ]
    for way in e.recipe.ways:
        setup = sum(e.of("vector", domain, way)["seconds"] for domain in e.domains) + e.of("grid", way)["seconds"]
        name, of = (f"all-{k}", "all vectors'") if way == "plain" else (f"all-{k}-{way}", f"all {way} vectors'")
        said = f"{k} combinations are faster than {k} joint DPO runs, with {of} trainings and the search paid"
        kinds.append((name, said, setup / k, limits.faster))
    for name, said, paid, limit in kinds:
        low, high = np.quantile(joint / (choice + paid), [0.025, 0.975])
        interval = Interval(float(np.mean(trained) / (np.mean(choices) + paid)), float(low), float(high))
        yield _claim(e, f"faster-{name}", said, "12x", interval, n, limit, "times")


def _cost(e: Evidence) -> Iterator[Claim]:
    rows = e.all("cost")[0]["rows"]
    vector, prompted = rows[0], [row for row in rows if row["way"] == "prompt"]
    shortest = min(row["shots"] for row in prompted)
    for row in (row for row in prompted if row["shots"] == shortest):
        both = [float(np.mean(np.array(r["test"]) == EXPERT)) for r in (vector, row)]
        matched = both[0] > both[1] - e.recipe.thresholds.matched
        how = "with" if row["prefix"] else "without"
        tokens = float(np.mean(row["prompt_tokens"]))
        said = f"{'as' if matched else 'less'} accurate: {100 * both[1]:.0f} percent expert after the prompt, "
        said += f"{100 * both[0]:.0f} with the vector"
        for name, parts in (("equal", equal_seconds(row, vector)), ("own", seconds(row))):
            of = "of the same length" if name == "equal" else "of each one's own length"
            claim = _claim(
                e,
                f"cost-{name}-{how}-prefix",
                f"answers {of} after the level prompt ({tokens:.0f} tokens, {how} its keys and values kept) take twice "
                f"as long as with the vector ({said})",
                "half the cost of prompting",
                bootstrap_ratio(parts, seconds(vector)),
                len(parts),
                e.recipe.thresholds.cheaper,
                "times",
            )
            rule = f"{claim.rule}; the vector as accurate"
            yield replace(claim, holds=claim.holds and matched, rule=rule)
