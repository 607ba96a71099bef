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
            e.recipe.thresholds.most,
        )
        if made := e.at(domain, strength)["generated"]:
            yield _claim(
                e,
                f"generated-{domain}",
                f"there most sampled answers to {domain} questions are expert answers too",
                "judged answers; numbers not available to us",
                bootstrap_mean((np.array(made) == EXPERT).astype(float)),
                len(made),
                e.recipe.thresholds.most,
            )


def _combinations(e: Evidence) -> Iterator[Claim]:
    for way in e.recipe.ways:
        yield from _reached(e, way)
    yield _control(e)
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


def _control(e: Evidence) -> Claim:
    """Random vectors, chosen by the same search of a coarser grid, reach no more than the model as it is."""
    record = e.of("combine", "random")
    targets, found = wanted(record["rows"]), hits(record["rows"], e.domains)
    base = np.broadcast_to(np.array([record["base"]["test"][domain] for domain in e.domains]), found.shape)
    more = resampled(
        lambda at: float(
            sum(sign * reached(v[..., at], targets, strict=False).sum() for sign, v in ((1, found), (-1, base)))
        ),
        found.shape[2],
    )
    said = "the control, random vectors of the same length, reaches no more combinations than the model as it is"
    own, items = {e.model: more.estimate}, found.shape[2] * len(e.domains)
    return judge("control-random", said, "-", more, own, items, e.command, below=0.5, unit="count")


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
    items = n * len(e.domains)

    def means(kind: str, at: np.ndarray) -> tuple[float, float]:
        return apart_and_together(spread(record, kind, e.domains, at))

    if len(e.domains) > 1:
        yield _claim(
            e,
            "over-generalises",
            "one domain's vector raises the share of expert answers in the other domains",
            "seen in the paper; numbers not available to us",
            resampled(lambda at: means("plain", at)[0], n),
            items,
            limits.spread,
        )
        for kind, those in (
            ("orthogonal", "vectors without their projections onto each other"),
            ("anchored", "vectors that are anchored in the other domains"),
        ):
            less = resampled(lambda at, kind=kind: means("plain", at)[0] - means(kind, at)[0], n)
            yield _claim(e, kind, f"{those} raise it less there", "-", less, items, limits.spread)
            still = resampled(lambda at, kind=kind: means(kind, at)[1] - means("plain", at)[1], n)
            said = f"{those} raise it as much in their own domains, to {100 * limits.transferred:g} points"
            yield _claim(e, f"{kind}-own", said, "-", still, items, -limits.transferred)
    for way in e.recipe.ways:
        yield from _kept(e, way, record["base"]["rails"], record[way])


def _kept(e: Evidence, way: str, before: Any, turned: Any) -> Iterator[Claim]:
    """The worst of the vectors of a way, each alone, and the worst of the settings that combinations chose."""
    limit = e.recipe.thresholds.loss
    chosen = {", ".join(row["levels"]): row for row in e.of("combine", way)["rows"]}
    for name, rows, what in (
        (f"keeps-{way}", turned, f"{way} vector, each alone at its lambda for experts,"),
        (f"combinations-keep-{way}", chosen, f"setting of {way} vectors that a combination chose"),
    ):
        found = {
            (rail, which): paired_bootstrap(scores, row["rails"][rail])
            for rail, scores in before.items()
            for which, row in rows.items()
        }
        if found:
            rail, which = min(found, key=lambda key: (found[key].low, found[key].estimate))
            said = f"no {what} costs more than {100 * limit:g} points of a guardrail (the worst: {rail}, {which})"
            yield _claim(e, name, said, "safety kept", found[rail, which], len(before[rail]), -limit)


def _stages(e: Evidence) -> Iterator[Claim]:
    limits = e.recipe.thresholds
    for domain, record in e.stages().items():
        base, native, given = (
            (np.array(record[kind]["test"]) == EXPERT).astype(float) for kind in ("base", "native", "transferred")
        )
        yield _claim(
            e,
            f"transferred-gains-{domain}",
            f"on another fine-tuning stage the base model's {domain} vector raises the share of expert answers",
            "a vector of one stage works at another",
            paired_bootstrap(base, given),
            len(given),
            limits.spread,
        )
        yield _claim(
            e,
            f"transfers-{domain}",
            f"there it brings them on at most {100 * limits.transferred:g} points fewer questions than that stage's "
            f"own {domain} vector",
            "a vector of one stage works at another",
            paired_bootstrap(native, given),
            len(given),
            -limits.transferred,
        )
        for rail, before in record["base"]["rails"].items():
            yield _claim(
                e,
                f"transfer-keeps-{domain}-{rail}",
                f"there the {domain} vector costs at most {100 * limits.loss:g} points of {rail}",
                "safety kept",
                paired_bootstrap(before, record["transferred"]["rails"][rail]),
                len(before),
                -limits.loss,
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
    one = "a new combination, chosen and merged, is more than {limit:g} times faster than a joint DPO run"
    search = f"with the whole search of {len(grid['rows'])} settings paid it is more than {{limit:g}} times faster"
    kinds = [("marginal", one, 0.0, limits.much_faster), ("search", search, grid["seconds"], limits.faster)]
    every = f"{k} combinations are more than {{limit:g}} times faster than {k} joint DPO runs, with the trainings of"
    for way in e.recipe.ways:
        setup = e.vector_seconds(way) + e.of("grid", way)["seconds"]
        kinds.append((f"all-{k}-{way}", f"{every} {way} vectors and the search paid", setup / k, limits.faster))
    for name, said, paid, limit in kinds:
        low, high = np.quantile(joint / (choice + paid), [0.025, 0.975])
        interval = Interval(float(np.mean(trained) / (np.mean(choices) + paid)), float(low), float(high))
        yield _claim(e, f"faster-{name}", said.format(limit=limit), "12x", interval, n, limit, "times")


def _cost(e: Evidence) -> Iterator[Claim]:
    rows = e.all("cost")[0]["rows"]
    limits = e.recipe.thresholds
    vector, prompted = rows[0], [row for row in rows if row["way"] == "prompt"]
    shortest = min(row["shots"] for row in prompted)
    for row in (row for row in prompted if row["shots"] == shortest):
        both = [float(np.mean(np.array(r["test"]) == EXPERT)) for r in (vector, row)]
        matched = both[0] > max(both[1] - limits.matched, limits.most)
        how = "with" if row["prefix"] else "without"
        tokens = float(np.mean(row["prompt_tokens"]))
        said = f"{'as' if matched else 'less'} accurate: {100 * both[1]:.0f} percent expert after the prompt, "
        said += f"{100 * both[0]:.0f} with the vector"
        for name, parts in (("equal", equal_seconds(row, vector)), ("own", seconds(row))):
            of = "of the same length" if name == "equal" else "of each one's own length"
            claim = _claim(
                e,
                f"cost-{name}-{how}-prefix",
                f"answers {of} after the level prompt ({tokens:.0f} tokens, {how} its keys and values kept) take "
                f"{limits.cheaper:g} times as long as with the vector, or longer ({said})",
                "half the cost of prompting",
                bootstrap_ratio(parts, seconds(vector)),
                len(parts),
                limits.cheaper,
                "times",
            )
            rule = f"{claim.rule}; the vector as accurate, and above {limits.most:g}"
            yield replace(claim, holds=claim.holds and matched, rule=rule)
