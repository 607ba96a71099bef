"""What PaLRS claims, beside what was measured: an interval, a threshold of the recipe, and whether the claim holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

from trimtab.evals.stats import Interval, bootstrap_runs
from trimtab.reproduce.document import Claim, judge
from trimtab.reproduce.evidence import GREEDY, RIGHT, Evidence, Matrix

UNKNOWN = "numbers not available to us"
RIVALS = {
    "palrs-eq3": "not compared",
    "caa": "not compared; a reviewer calls it nearly identical",
}
"""Ways to steer that the main one is compared with where a recipe has them, and what the paper says of it."""
Groups = Mapping[str, tuple[Matrix, Matrix]]
"""By model, what is compared: scores `[S, N]` before and after, of the same items. Models without any are left out."""


def claims(evidence: Evidence) -> list[dict[str, Any]]:
    """Return every claim that could be measured, in the order of the report."""
    made: list[Claim] = []
    for domain in evidence.recipe.domains:
        made += _about(evidence, domain)
    return [asdict(claim) for claim in [*made, *_everywhere(evidence)]]


def _about(e: Evidence, domain: str) -> Iterator[Claim]:
    """Compare the main way with everything else on one domain."""
    yield from _gains(e, domain)
    yield from _against_training(e, domain)
    yield from _against_others(e, domain)
    yield from _with_more_pairs(e, domain)
    yield from _reversed(e, domain)
    yield from _manner(e, domain)


def _everywhere(e: Evidence) -> Iterator[Claim]:
    yield from _guardrails(e)
    yield from _controls(e)
    for name in e.recipe.training:
        for count, tuned in product((e.sizes.pairs, e.sizes.many_pairs), (False, True)):
            yield _faster(e, name, count, tuned=tuned)


# --- one domain -----------------------------------------------------------------------------------------------------


def _gains(e: Evidence, domain: str) -> Iterator[Claim]:
    gain, n = e.recipe.thresholds.gain, e.sizes.pairs
    yield _difference(
        e,
        f"gain-{domain}",
        f"{n} pairs and no training raise accuracy on {domain} over the bare model",
        f"consistent gains on maths and code ({UNKNOWN})",
        {m: (e.scores(GREEDY, m, "base", domain), e.main(m, domain, GREEDY)) for m in e.models},
        above=gain,
    )
    yield _difference(
        e,
        f"preference-{domain}",
        f"the {domain} knob makes more of the held-out preferred answers the likelier ones",
        "not reported",
        {m: (e.scores(RIGHT, m, "base", domain), e.main(m, domain, RIGHT)) for m in e.models},
        above=gain,
    )


def _against_training(e: Evidence, domain: str) -> Iterator[Claim]:
    n = e.sizes.pairs
    for name, way in e.recipe.training.items():
        for count, said in ((n, f"the same {n} pairs"), (e.sizes.many_pairs, f"{e.sizes.many_pairs} pairs")):
            yield _difference(
                e,
                f"beats-{name}-{count}-{domain}",
                f"{_main(e)} from {n} pairs scores higher on {domain} than {way.title} from {said}",
                f"better than DPO on the same pairs (v1); than DPO and SimPO with more than 100 pairs (v2); {UNKNOWN}",
                {m: (e.scores(GREEDY, m, "train", domain, name, count), e.main(m, domain, GREEDY)) for m in e.models},
                above=0.0,
            )


def _against_others(e: Evidence, domain: str) -> Iterator[Claim]:
    loss = e.recipe.thresholds.loss
    yield _difference(
        e,
        f"examples-{domain}",
        f"{_main(e)} scores at most {100 * loss:g} points lower on {domain} than examples shown before the question",
        "not compared",
        {m: (e.scores(GREEDY, m, "examples", domain), e.main(m, domain, GREEDY)) for m in e.models},
        above=-loss,
    )
    for name, published in RIVALS.items():
        if name in e.recipe.steering and name != e.recipe.main:
            others = {m: e.scores(GREEDY, m, "steer", domain, name, e.sizes.pairs) for m in e.models}
            yield _difference(
                e,
                f"{name}-{domain}",
                f"{_main(e)} scores higher on {domain} than {e.recipe.steering[name].title}",
                published,
                {m: (scores, e.main(m, domain, GREEDY)) for m, scores in others.items()},
                above=0.0,
            )


def _with_more_pairs(e: Evidence, domain: str) -> Iterator[Claim]:
    enough, largest = e.recipe.thresholds.enough, max(e.sizes.counts)
    if largest > e.sizes.pairs:
        yield _difference(
            e,
            f"hundred-{domain}",
            f"{e.sizes.pairs} pairs are enough on {domain}: {largest} bring no more than {100 * enough:g} points",
            "as few as one hundred pairs",
            {m: (e.main(m, domain, GREEDY), e.main(m, domain, GREEDY, largest)) for m in e.models},
            below=enough,
        )


def _reversed(e: Evidence, domain: str) -> Iterator[Claim]:
    groups: dict[str, tuple[Matrix, Matrix]] = {}
    for model in e.models:
        if found := e.controls(model, domain):
            reverse = np.array([record["reversed"]["sampled"]["scores"] for record in found], dtype=float)
            groups[model] = e.scores(("sampled", "scores"), model, "base", domain), reverse
    if groups:
        statement = f"strength -1 lowers accuracy on {domain} (sampled answers)"
        yield _difference(e, f"reversed-{domain}", statement, "not reported", groups, below=0.0)


def _manner(e: Evidence, domain: str) -> Iterator[Claim]:
    """Compare sampled answers that are on the preferred side: a gain there would be more than a change of manner."""
    groups: dict[str, tuple[Matrix, Matrix]] = {}
    flags: dict[str, tuple[Matrix, Matrix]] = {}
    for model in e.models:
        if e.found(model, "base", domain)[0]["test"]["sampled"]["on_side"] is None:
            continue  # a task without sides
        sides = ("sampled", "on_side")
        before, after = e.scores(sides, model, "base", domain), e.main(model, domain, sides)
        if before.any() and after.any():
            what = ("sampled", "scores")
            groups[model] = e.scores(what, model, "base", domain), e.main(model, domain, what)
            flags[model] = before, after
    if groups:
        yield _difference(
            e,
            f"manner-{domain}",
            f"the gain on {domain} is more than a change of manner: on the preferred side itself answers get better",
            "not separated",
            groups,
            within=flags,
            above=e.recipe.thresholds.gain,
        )


# --- all domains together -------------------------------------------------------------------------------------------


def _guardrails(e: Evidence) -> Iterator[Claim]:
    """Yield the guardrail that fails, or comes closest to failing, over all domains."""
    loss, made = e.recipe.thresholds.loss, list[Claim]()
    for domain, rail in product(e.recipe.domains, e.found(e.models[0], "base", _first(e))[0]["test"]["guardrails"]):
        what = ("guardrails", rail)
        claim = _difference(
            e,
            "guardrails",
            f"no guardrail loses {100 * loss:g} points (the worst: {rail}, {domain} knob)",
            f"guardrails roughly kept; a 3B model loses ({UNKNOWN})",
            {m: (e.scores(what, m, "base", domain), e.main(m, domain, what)) for m in e.models},
            above=-loss,
        )
        made.append(claim)
    if made:
        yield min(made, key=lambda claim: (claim.holds, claim.low))


def _controls(e: Evidence) -> Iterator[Claim]:
    """Yield the control that gains, or comes closest to it, at the knob's own site and through the whole choice."""
    loss, made = e.recipe.thresholds.loss, list[Claim]()
    for domain in e.recipe.domains:
        kinds: dict[str, dict[str, tuple[Matrix, Matrix]]] = {}
        for model in e.models:
            base = e.scores(GREEDY, model, "base", domain)
            for name, way in e.recipe.steering.items():
                if way.control:
                    chosen = e.scores(GREEDY, model, "steer", domain, name, e.sizes.pairs)
                    kinds.setdefault(f"{way.title}, chosen anew", {})[model] = base, chosen
            found = e.controls(model, domain)
            for kind in ("random", "shuffled") if found else ():
                scores = np.array([record[kind] for record in found], dtype=float)
                kinds.setdefault(f"{kind} at the knob's site", {})[model] = base, scores
        for kind, groups in kinds.items():
            statement = f"no control gains {100 * loss:g} points (the highest: {kind}, {domain})"
            made.append(_difference(e, "controls", statement, "not reported", groups, below=loss))
    if made:
        yield min(made, key=lambda claim: (claim.holds, -claim.high))


def _faster(e: Evidence, name: str, count: int, *, tuned: bool) -> Claim:
    """Compare seconds: learning with a training run, stopped early; or either with all that chose its settings."""
    groups: list[tuple[Matrix, Matrix]] = []
    for model, domain in product(e.models, e.recipe.domains):
        steer = e.found(model, "steer", domain, e.recipe.main, e.sizes.pairs)
        mine = [r["learn"]["seconds"] + tuned * r["tune"]["seconds"] for r in steer]
        runs = [r["learn"]["seconds"] for r in e.found(model, "train", domain, name, count)]
        theirs = e.tuned_seconds(model, domain, name, count) if tuned else runs
        groups.append((np.array(mine), np.array(theirs)))
    random = np.random.default_rng(0)
    logs = [np.log(b.mean()) - np.log(a.mean()) for a, b in groups]
    draws = np.mean(
        [
            np.log(random.choice(b, (4000, b.size)).mean(axis=1))
            - np.log(random.choice(a, (4000, a.size)).mean(axis=1))
            for a, b in groups
        ],
        axis=0,
    )
    low, high = np.exp(np.quantile(draws, [0.025, 0.975]))
    per_model = len(e.recipe.domains)
    ratio, pairs, title = e.recipe.thresholds.ratio, e.sizes.pairs, e.recipe.training[name].title
    both = "learning and tuning" if tuned else "learning"
    what = "its grid" if tuned else "one training run, stopped early"
    return judge(
        f"faster-than-{name}-{count}{'-tuned' if tuned else ''}",
        f"{both} from {pairs} pairs is {ratio:g} times faster than {title} from {count} ({what})",
        f"great savings of time ({UNKNOWN})",
        Interval(float(np.exp(np.mean(logs))), float(low), float(high)),
        {m: float(np.exp(np.mean(logs[i * per_model : (i + 1) * per_model]))) for i, m in enumerate(e.models)},
        sum(a.size + b.size for a, b in groups),
        e.command,
        above=ratio,
        unit="times",
    )


# --- one claim ------------------------------------------------------------------------------------------------------


def _main(e: Evidence) -> str:
    return e.recipe.steering[e.recipe.main].title


def _first(e: Evidence) -> str:
    return next(iter(e.recipe.domains))


def _difference(
    e: Evidence,
    name: str,
    statement: str,
    published: str,
    groups: Groups,
    *,
    within: Groups | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Claim:
    flags = [within[model] for model in groups] if within else None
    interval = bootstrap_runs(list(groups.values()), within=flags)
    own = {m: bootstrap_runs([groups[m]], within=[within[m]] if within else None, draws=1).estimate for m in groups}
    n = sum(b.size for _, b in groups.values()) if within is None else int(sum(b.sum() for _, b in within.values()))
    if missing := [model for model in e.models if model not in groups]:
        statement += f" (not measured on {', '.join(missing)})"
    return judge(name, statement, published, interval, own, n, e.command, above=above, below=below)
