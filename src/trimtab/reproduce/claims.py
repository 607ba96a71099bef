"""What PaLRS claims, beside what was measured: an interval, a threshold of the recipe, and whether the claim holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from trimtab.evals.stats import Interval, bootstrap_runs
from trimtab.reproduce.recipe import Recipe, Sizes

Key = tuple[str, ...]
"""Model, kind of step, domain and what else tells it from others, as in `("prefworld", "steer", "math", "palrs", "100",
"0")`: way to steer, pairs, seed."""
Records = Mapping[Key, Any]
Matrix = np.ndarray
UNKNOWN = "numbers not available to us"


def grid_key(model: str, domain: str, name: str, count: int, sizes: Sizes) -> Key:
    """Return the key of the grid that chooses a training's settings: of many pairs, that of fewer may do."""
    own = count != sizes.many_pairs or sizes.many_grid
    return (model, "grid", domain, name, str(count if own else sizes.pairs))


@dataclass(frozen=True)
class Claim:
    """`measured` with its 95 % interval; `holds` follows from it and the recipe's threshold, and may be false.

    Differences are shares of items, ratios are of seconds. `by_model` has the estimate of each model: a claim holds
    only where every model's own estimate is on the same side of the threshold as the interval over all of them.
    """

    id: str
    statement: str
    published: str
    measured: float
    low: float
    high: float
    holds: bool
    rule: str
    n: int
    by_model: dict[str, float]
    command: str


class Evidence:
    """The records of a run, as scores `[S, N]` by model, domain and system."""

    def __init__(self, records: Records, recipe: Recipe, sizes: Mapping[str, Sizes], command: str) -> None:
        self.records = {key: records[key] for key in sorted(records, key=lambda key: (len(key), key[-1], key))}
        self.recipe, self.models, self.command = recipe, list(sizes), command
        self.sizes = sizes[self.models[0]]  # pairs are as many for every model
        self._sizes = sizes

    def found(self, model: str, kind: str, domain: str, *rest: object) -> list[Any]:
        """Return the records of all seeds of one system."""
        key = (model, kind, domain, *map(str, rest))
        return [record for at, record in self.records.items() if at[: len(key)] == key and len(at) <= len(key) + 1]

    def grid(self, model: str, domain: str, name: str, count: int) -> Any:
        """Return the record of the grid that chose the settings of a training."""
        return self.records[grid_key(model, domain, name, count, self._sizes[model])]

    def scores(self, what: Sequence[str], model: str, kind: str, domain: str, *rest: object) -> Matrix:
        """Return the scores at a path of the tests, such as `("greedy", "scores")`, of all seeds: `[S, N]`."""
        return np.array([_at(record["test"], what) for record in self.found(model, kind, domain, *rest)], dtype=float)

    def main(self, model: str, domain: str, what: Sequence[str], n: int | None = None) -> Matrix:
        """Return the scores of the way to steer that the claims speak of."""
        return self.scores(what, model, "steer", domain, self.recipe.main, n or self.sizes.pairs)


GREEDY = ("greedy", "scores")
RIGHT = ("preference", "right")


def _at(record: Any, path: Sequence[str]) -> Any:
    for name in path:
        record = record[name]
    return record


def claims(evidence: Evidence) -> list[dict[str, Any]]:
    """Return every claim, in the order of the report."""
    made: list[Claim] = []
    for domain in evidence.recipe.domains:
        made += _about(evidence, domain)
    return [asdict(claim) for claim in [*made, *_everywhere(evidence)]]


def _about(evidence: Evidence, domain: str) -> list[Claim]:
    """Compare the main way with everything else on one domain."""
    e, limits, n = evidence, evidence.recipe.thresholds, evidence.sizes.pairs
    many = evidence.sizes.many_pairs

    def main(model: str) -> Matrix:
        return e.main(model, domain, GREEDY)

    def against(other: str, statement: str, kind: str, *rest: object, above: float, published: str) -> Claim:
        groups = [(e.scores(GREEDY, model, kind, domain, *rest), main(model)) for model in e.models]
        return _difference(e, f"{other}-{domain}", statement, published, groups, above=above)

    made = [
        against(
            "gain",
            f"{n} pairs and no training raise accuracy on {domain} over the bare model",
            "base",
            above=limits.gain,
            published=f"consistent gains on maths and code ({UNKNOWN})",
        ),
        _difference(
            e,
            f"preference-{domain}",
            f"the {domain} knob makes more of the held-out preferred answers the likelier ones",
            "not reported",
            [(e.scores(RIGHT, m, "base", domain), e.main(m, domain, RIGHT)) for m in e.models],
            above=limits.gain,
        ),
    ]
    for name, way in e.recipe.training.items():
        for count, said in ((n, f"the same {n} pairs"), (many, f"{many} pairs")):
            better = "better than DPO on the same pairs (v1); than DPO and SimPO with more than 100 pairs (v2)"
            made.append(
                against(
                    f"beats-{name}-{count}",
                    f"PaLRS from {n} pairs scores higher on {domain} than {way.title} from {said}",
                    "train",
                    name,
                    count,
                    above=0.0,
                    published=f"{better}; {UNKNOWN}",
                )
            )
    made.append(
        against(
            "examples",
            f"PaLRS scores at least as high on {domain} as examples shown before the question",
            "examples",
            above=-limits.loss,
            published="not compared",
        )
    )
    for name in ("caa", "palrs-eq3"):
        if name in e.recipe.steering:
            caa = name == "caa"
            made.append(
                against(
                    name,
                    f"PaLRS's reading scores higher on {domain} than CAA's"
                    if caa
                    else f"choosing the site on validation scores higher on {domain} than Eq. 3's choice",
                    "steer",
                    name,
                    n,
                    above=0.0,
                    published="not compared; a reviewer calls it nearly identical" if caa else "not compared",
                )
            )
    largest = max(e.sizes.counts)
    groups = [(main(m), e.main(m, domain, GREEDY, largest)) for m in e.models]
    made.append(
        _difference(
            e,
            f"hundred-{domain}",
            f"{n} pairs are enough on {domain}: {largest} bring no more than {100 * limits.enough:g} points",
            "as few as one hundred pairs",
            groups,
            below=limits.enough,
        )
    )
    return [*made, _reversed(e, domain), _manner(e, domain)]


def _everywhere(evidence: Evidence) -> list[Claim]:
    made = [_guardrails(evidence), _controls(evidence)]
    n, many = evidence.sizes.pairs, evidence.sizes.many_pairs
    for name, way in evidence.recipe.training.items():
        for count, tuned in product((n, many), (False, True)):
            made.append(_faster(evidence, name, way.title, count, tuned=tuned))
    return made


# --- single claims --------------------------------------------------------------------------------------------------


def _reversed(e: Evidence, domain: str) -> Claim:
    groups: list[tuple[Matrix, Matrix]] = []
    for model in e.models:
        found = [r for r in e.found(model, "steer", domain, e.recipe.main, e.sizes.pairs) if "controls" in r]
        reverse = np.array([r["controls"]["reversed"]["sampled"]["scores"] for r in found], dtype=float)
        base = e.scores(("sampled", "scores"), model, "base", domain)
        groups.append((base, reverse if len(found) else base))
    return _difference(
        e,
        f"reversed-{domain}",
        f"strength -1 lowers accuracy on {domain} (sampled answers)",
        "not reported",
        groups,
        below=0.0,
    )


def _manner(e: Evidence, domain: str) -> Claim:
    """Compare sampled answers that are on the preferred side: a gain there would be more than a change of manner."""
    groups: list[tuple[Matrix, Matrix]] = []
    for model in e.models:
        sides: list[Matrix] = []
        for kind, rest in (("base", ()), ("steer", (e.recipe.main, e.sizes.pairs))):
            scores = e.scores(("sampled", "scores"), model, kind, domain, *rest)
            flags = e.scores(("sampled", "on_side"), model, kind, domain, *rest)
            sides.append(scores[flags > 0][None, :] if (flags > 0).any() else np.zeros((1, 1)))
        groups.append((sides[0], sides[1]))
    intervals = [_unpaired(a[0], b[0], seed=i) for i, (a, b) in enumerate(groups)]
    mean = Interval(*(float(np.mean([interval[k] for interval in intervals])) for k in range(3)))
    return _claim(
        e,
        f"manner-{domain}",
        f"the gain on {domain} is more than a change of manner: on the preferred side itself answers get better",
        "not separated",
        mean,
        [interval.estimate for interval in intervals],
        sum(b.size for _, b in groups),
        above=e.recipe.thresholds.gain,
    )


def _unpaired(a: Matrix, b: Matrix, *, seed: int) -> Interval:
    """Return the difference of two means with a bootstrap interval: other items are on the side with the knob."""
    random = np.random.default_rng(seed)
    means = [random.choice(x, size=(4000, x.size)).mean(axis=1) for x in (a, b)]
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return Interval(float(b.mean() - a.mean()), float(low), float(high))


def _guardrails(e: Evidence) -> Claim:
    """Take the guardrail that loses most, over all domains."""
    worst: Claim | None = None
    for domain in e.recipe.domains:
        base = e.found(e.models[0], "base", domain)[0]["test"]["guardrails"]
        for rail in base:
            what = ("guardrails", rail)
            groups = [(e.scores(what, m, "base", domain), e.main(m, domain, what)) for m in e.models]
            claim = _difference(
                e,
                "guardrails",
                f"no guardrail loses {100 * e.recipe.thresholds.loss:g} points (the worst: {rail}, {domain} knob)",
                f"guardrails roughly kept; a 3B model loses ({UNKNOWN})",
                groups,
                above=-e.recipe.thresholds.loss,
            )
            worst = claim if worst is None or claim.low < worst.low else worst
    assert worst is not None
    return worst


def _controls(e: Evidence) -> Claim:
    """Take the control that gains most, at the knob's own site and through the whole choice."""
    worst: Claim | None = None
    for domain in e.recipe.domains:
        kinds: dict[str, list[tuple[Matrix, Matrix]]] = {}
        for model in e.models:
            base = e.scores(GREEDY, model, "base", domain)
            for name, way in e.recipe.steering.items():
                if way.control:
                    chosen = e.scores(GREEDY, model, "steer", domain, name, e.sizes.pairs)
                    kinds.setdefault(f"{way.title}, chosen anew", []).append((base, chosen))
            found = [r for r in e.found(model, "steer", domain, e.recipe.main, e.sizes.pairs) if "controls" in r]
            for kind in ("random", "shuffled") if found else ():
                scores = np.array([r["controls"][kind] for r in found], dtype=float)
                kinds.setdefault(f"{kind} at the knob's site", []).append((base, scores))
        for kind, groups in kinds.items():
            claim = _difference(
                e,
                "controls",
                f"no control gains {100 * e.recipe.thresholds.loss:g} points (the highest: {kind}, {domain})",
                "not reported",
                groups,
                below=e.recipe.thresholds.loss,
            )
            worst = claim if worst is None or claim.high > worst.high else worst
    assert worst is not None
    return worst


def _faster(e: Evidence, name: str, title: str, count: int, *, tuned: bool) -> Claim:
    """Compare seconds: learning with a training run, stopped early; or either with all that chose its settings."""
    groups: list[tuple[Matrix, Matrix]] = []
    for model in e.models:
        for domain in e.recipe.domains:
            steer = e.found(model, "steer", domain, e.recipe.main, e.sizes.pairs)
            runs = e.found(model, "train", domain, name, count)
            mine = np.array([r["learn"]["seconds"] + tuned * r["tune"]["seconds"] for r in steer])
            search = e.grid(model, domain, name, count)["tune"]["seconds"] if tuned else 0.0
            theirs = np.array([r["learn"]["seconds"] + search for r in runs])
            groups.append((mine, theirs))
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
    both = "learning and tuning" if tuned else "learning"
    what = "one training run and its grid" if tuned else "one training run, stopped early"
    return _claim(
        e,
        f"faster-than-{name}-{count}{'-tuned' if tuned else ''}",
        f"{both} from {e.sizes.pairs} pairs is {e.recipe.thresholds.ratio:g} times faster than {title} from {count} "
        f"({what})",
        f"great savings of time ({UNKNOWN})",
        Interval(float(np.exp(np.mean(logs))), float(low), float(high)),
        [float(np.exp(np.mean(logs[i : i + per_model]))) for i in range(0, len(logs), per_model)],
        sum(a.size + b.size for a, b in groups),
        above=e.recipe.thresholds.ratio,
    )


def _difference(
    e: Evidence,
    name: str,
    statement: str,
    published: str,
    groups: Sequence[tuple[Matrix, Matrix]],
    *,
    above: float | None = None,
    below: float | None = None,
) -> Claim:
    interval, own = bootstrap_runs(groups), [float(b.mean() - a.mean()) for a, b in groups]
    return _claim(
        e, name, statement, published, interval, own, sum(b.size for _, b in groups), above=above, below=below
    )


def _claim(
    e: Evidence,
    name: str,
    statement: str,
    published: str,
    interval: Interval,
    own: Sequence[float],
    n: int,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Claim:
    if above is not None:
        holds, rule = interval.low > above and min(own) > above, f"low > {above:g}, in every model the estimate too"
    else:
        assert below is not None
        holds, rule = interval.high < below and max(own) < below, f"high < {below:g}, in every model the estimate too"
    by_model = dict(zip(e.models, own, strict=True))
    return Claim(name, statement, published, *interval, holds, rule, n, by_model, e.command)
