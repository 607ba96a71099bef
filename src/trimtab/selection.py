"""Which layers are candidates, which site a selection rule takes from the pairs alone, and what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trimtab.errors import OptionError, PairsError
from trimtab.types import Site, check_strength

SCORES = {
    "eq3_cosine": "cos_r_mu",
    "max_relative_norm": "relative_norm",
    "probe_auc": "probe_auc",
    "first_order": "first_order",
}
"""Selection rules, and the diagnostic whose largest value each of them looks for."""

Statistics = Mapping[Site, Mapping[str, float | None]]
"""What `ops.describe_site` says of each candidate site."""


def layers_between(n_layers: int, first: float, last: float) -> list[int]:
    """Return the layers that lie between two fractions of the depth; layer i reaches from i/n to (i + 1)/n.

    >>> layers_between(10, 0.0, 0.8)
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    first, last = check_strength(first, "first"), check_strength(last, "last")
    if not 0.0 <= first < last <= 1.0:
        raise OptionError(f"Layers lie between fractions 0 <= first < last <= 1; got first={first}, last={last}.")
    slack = 1e-9  # 0.8 * 10 is not exactly 8
    kept = [i for i in range(n_layers) if first * n_layers <= i + slack and i + 1 <= last * n_layers + slack]
    if not kept:
        raise OptionError(
            f"No layer of {n_layers} lies between first={first} and last={last}; widen them, or pass layers=[...]."
        )
    return kept


class Ranked(NamedTuple):
    """A candidate site and its score under the selection rule; None where the difference is rounding."""

    site: Site
    score: float | None


def rank_sites(statistics: Statistics, selection: str, site: Site | None = None) -> list[Ranked]:
    """Order the candidate sites by a selection rule, best first; equal scores by layer, then position.

    Sites whose difference is rounding come last: at the tokens a template puts after the answer, chosen and rejected
    are alike before the first block, and their cosine is 0/0. With selection "fixed", `site` comes first and the rest
    is in order of layer. Raises `PairsError` when no site is left.
    """
    if selection == "fixed":
        rest = [Ranked(other, None) for other in sorted(statistics) if other != site]
        return [Ranked(site, None), *rest] if site is not None else rest
    scores = {
        s: values[SCORES[selection]] if values["cos_r_mu"] is not None else None for s, values in statistics.items()
    }
    if all(values["cos_r_mu"] is None for values in statistics.values()):
        raise PairsError(
            f"Chosen and rejected answers leave the same activations at all {len(scores)} candidate sites. "
            "Check that the pairs differ in what is read there."
        )
    if all(score is None for score in scores.values()):
        raise PairsError(f"selection={selection!r} has no score for these pairs; probe_auc needs at least 4 of them.")
    ranked = sorted(scores, key=lambda s: (scores[s] is None, -(scores[s] or 0.0), s))
    return [Ranked(s, scores[s]) for s in ranked]


def doubts(
    at: Mapping[str, float | None], selection: str, width: int, lengths: Sequence[float] | None, count: int
) -> list[str]:
    """Say what may make the knob mean something else than it seems to, from the chosen site's diagnostics.

    `lengths` are the mean tokens of chosen and rejected answers, None where they are accounted for; `count` the pairs.
    """
    notes = doubts_of_one(count)
    notes += [] if lengths is None else doubts_of_lengths(lengths, "length_match='bucket' or 'regress'")
    gap, share = at["norm_gap"], at["top5_share"]
    if selection == "eq3_cosine" and gap is not None and gap > 0.5:
        notes.append(
            f"Eq. 3 chose a site where the difference is mostly a rescaling of the mean activation (norms "
            f"{at['mu_plus_norm']:.3g} and {at['mu_minus_norm']:.3g}, {at['angle']:.1f} degrees apart), which a norm "
            "layer largely removes. Choose the site by tuning, or with selection='max_relative_norm'."
        )
    if share is not None and share > 0.5 and width >= 100:  # in a narrow model five coordinates are no handful
        notes.append(
            f"Five coordinates hold {share:.0%} of the squared norm of the mean chosen activation at this site: "
            "strengths in units of that norm are destructive. Choose another position."
        )
    return notes


def doubts_of_one(count: int) -> list[str]:
    """Say so where there is a single pair."""
    if count != 1:
        return []
    return [
        "There is one pair, so no halves of the pairs can agree: the knob may hold this pair's wording and not a "
        "preference. Add pairs; about a hundred do."
    ]


def doubts_of_lengths(lengths: Sequence[float], remedy: str) -> list[str]:
    """Say so where chosen and rejected answers, of so many tokens on average, differ much; compare with `remedy`."""
    if max(lengths) <= 1.5 * min(lengths):
        return []
    return [
        f"Chosen answers have {lengths[0]:.1f} tokens on average and rejected ones {lengths[1]:.1f}: the knob may "
        f"steer length. Compare with {remedy}."
    ]
