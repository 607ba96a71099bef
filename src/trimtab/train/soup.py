"""Soups: the weighted average of models that were trained from one base, as one weight knob."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

from trimtab.artifact.delta import DeltaKnob
from trimtab.errors import OptionError


def soup(knobs: Sequence[DeltaKnob], weights: Sequence[float] | None = None, *, name: str = "soup") -> DeltaKnob:
    """Return the knob that turns the base, at strength 1, into the weighted average of the models that `knobs` make.

    Rewarded Soups (arXiv:2306.04488, eq. 2): `sum_i w_i theta_i` with weights that add up to 1, which is the base plus
    `sum_i w_i (theta_i - theta)`: task arithmetic of the differences, exact for low-rank ones too. Weights are 0 or
    more and are divided by their sum; None weighs all alike. Knobs come from `trimtab.weights.delta.difference(trained,
    base)`, each at strength 1. A soup of two DPO models is no Reward Soup: call it "dpo-soup".

    Raises `OptionError` for weights that are no average, and `KnobError` for knobs of two models.
    """
    shares = [1.0] * len(knobs) if weights is None else list(weights)
    if not knobs or len(shares) != len(knobs):
        raise OptionError(f"Every knob has a weight, and there is one knob at least; got {len(knobs)}, {len(shares)}.")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
        raise OptionError(f"The weights of an average are 0 or more, and not all 0; got {shares}.")
    parts = [knob * (share / sum(shares)) for knob, share in zip(knobs, shares, strict=True) if share]
    told = {"soup": [{"name": k.name, "weight": s / sum(shares)} for k, s in zip(knobs, shares, strict=True)]}
    total = reduce(add, parts)
    return total.with_(name=name, method="soup", provenance={**total.provenance, **told})
