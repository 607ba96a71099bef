"""Pure tensor maths: padded rows, means and norms in float64, units of strength, statistics of a set of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import OptionError

TINY = 1e-6
"""A difference shorter than this share of the activations it comes from is rounding, not signal."""


Side = Literal["left", "right"]


class Batch(NamedTuple):
    """Padded rows; padding has mask 0, and position ids count from each row's first real token."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64


def pad_rows(rows: Sequence[Sequence[int]], *, side: Side, value: int) -> Batch:
    """Stack rows of token ids, with `value` where one side has to be filled up.

    >>> pad_rows([[5, 6, 7], [8]], side="left", value=0).position_ids.tolist()
    [[0, 1, 2], [0, 0, 0]]
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, span] = torch.tensor(list(row))
        mask[b, span] = 1
    return Batch(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0))


def unit(vector: Tensor) -> Tensor:
    """Scale `vector [..., D]` to length 1 along its last dimension, in float64; a zero vector stays zero.

    >>> unit(torch.tensor([3.0, 4.0])).tolist()
    [0.6, 0.8]
    """
    wide = vector.double()
    length = wide.norm(dim=-1, keepdim=True)
    return wide / torch.where(length > 0, length, torch.ones_like(length))


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two vectors `[D]`; 0 where one of them is zero and the cosine has no value.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    0.0
    """
    return float((unit(a) @ unit(b)).clamp(-1.0, 1.0))


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between two vectors `[D]`, in degrees.

    Half the chord between the unit vectors, so that small angles keep their digits, which the arc cosine loses.
    """
    chord = float((unit(a) - unit(b)).norm()) / 2.0
    return math.degrees(2.0 * math.asin(min(1.0, chord)))


def top_share(vector: Tensor, k: int = 5) -> float:
    """Return the share of the squared norm of `vector [D]` that lies in its `k` largest coordinates.

    Above one half a handful of massive activations carries the vector.

    >>> top_share(torch.tensor([3.0, 4.0, 0.0, 0.0]), k=1)
    0.64
    """
    squares = vector.double().square()
    total = float(squares.sum())
    return float(squares.topk(min(k, squares.numel())).values.sum()) / total if total > 0 else 0.0


class Moments:
    """Count, mean and sum of squared deviations of a stream of `[...]` tensors, in float64.

    Batches may come in any order and size, and two streams merge exactly (parallel variance formula, Chan et al. 1979).

    >>> moments = Moments()
    >>> moments.add(torch.tensor([1.0, 2.0]))
    >>> moments.add(torch.tensor([6.0]))
    >>> moments.count, moments.mean.item(), moments.variance.item()
    (3, 3.0, 7.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """Take in `batch [n, ...]`: n more observations; an empty batch changes nothing."""
        if not len(batch):
            return
        other = Moments()
        wide = batch.detach().to("cpu", torch.float64)
        other.count = len(wide)
        other._mean = wide.mean(dim=0)
        other._squares = (wide - other._mean).square().sum(dim=0)
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Take in everything that `other` has seen; `other` is left as it is."""
        if other._mean is None or other._squares is None:
            return
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = other.count, other._mean, other._squares
            return
        total = self.count + other.count
        step = other._mean - self._mean
        self._squares = self._squares + other._squares + step.square() * (self.count * other.count / total)
        self._mean = self._mean + step * (other.count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean so far, `[...]` float64."""
        if self._mean is None:
            raise OptionError("These moments have seen no observation, so they have no mean.")
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Unbiased variance so far, `[...]` float64; needs two observations."""
        if self._squares is None or self.count < 2:
            raise OptionError(f"A variance needs at least 2 observations; these moments have seen {self.count}.")
        return self._squares / (self.count - 1)


# Units of strength: all meet in alpha, multiples of the mean residual norm `n_bar` at the layer.


def alpha_from_multiplier(multiplier: float, vector_norm: float, residual_norm: float) -> float:
    """Convert a multiplier on the raw vector (CAA's) to alpha: `m * |v| / n_bar`.

    >>> alpha_from_multiplier(2.0, vector_norm=3.0, residual_norm=12.0)
    0.5
    """
    return multiplier * vector_norm / _positive(residual_norm, "mean residual norm")


def multiplier_from_alpha(alpha: float, vector_norm: float, residual_norm: float) -> float:
    """Convert alpha to a multiplier on the raw vector (CAA's): `alpha * n_bar / |v|`."""
    return alpha * residual_norm / _positive(vector_norm, "vector norm")


def alpha_from_palrs(palrs: float, chosen_norm: float, residual_norm: float) -> float:
    """Convert PaLRS's alpha to ours: `alpha_palrs * |mu+| / n_bar`; its unit is the norm of the mean chosen activation.

    >>> alpha_from_palrs(0.8, chosen_norm=10.0, residual_norm=16.0)
    0.5
    """
    return palrs * chosen_norm / _positive(residual_norm, "mean residual norm")


def palrs_from_alpha(alpha: float, chosen_norm: float, residual_norm: float) -> float:
    """Convert our alpha to PaLRS's: `alpha * n_bar / |mu+|`."""
    return alpha * residual_norm / _positive(chosen_norm, "norm of the mean chosen activation")


def _positive(value: float, name: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"The {name} must be a positive number to convert strengths; got {value!r}.")
    return value


# Statistics of the pairs at one site.


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that a score of `positive [n]` exceeds one of `negative [m]`; ties count one half.

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    order = torch.sort(negative.double()).values
    high = positive.double()
    below = torch.searchsorted(order, high, right=False) + torch.searchsorted(order, high, right=True)
    return float(below.double().mean()) / (2 * len(order))


def pairwise_cosine(differences: Tensor) -> float | None:
    """Return the mean cosine over all pairs of rows of `[N, D]`, zero rows left out; None for fewer than 2 rows.

    Uses |sum of units|^2 = n + sum of cosines, so memory does not grow with N squared.
    """
    lengths = differences.norm(dim=-1, dtype=torch.float64)
    known = lengths > 0
    n = int(known.sum())
    total = torch.where(known, 1 / lengths, 0.0) @ differences.double()  # [D], the sum of the units
    return (float(total.square().sum()) - n) / (n * (n - 1)) if n > 1 else None


def split_half_cosine(differences: Tensor, *, draws: int = 16, seed: int = 0) -> float | None:
    """Return the mean cosine between the means of two random halves of `[N, D]`; None for fewer than 2 rows.

    Near 1: the direction does not depend on which pairs were drawn. Near 0: it is noise.
    """
    n = len(differences)
    if n < 2:
        return None
    # sums in place of means, whose length is divided out: what cancels in a half cancels exactly (float32 in float64)
    one, other = unit(_halves(n, draws, seed).to(differences) @ differences)
    return float((one * other).sum(dim=-1).clamp(-1.0, 1.0).mean())


def probe_auc(chosen: Tensor, rejected: Tensor, *, draws: int = 4, seed: int = 0) -> float | None:
    """Return how well the mean difference of one half of the pairs separates the answers of the other half.

    `chosen` and `rejected` are `[N, D]`. Cross-fitted both ways over `draws` random halves: on its own pairs a mean
    difference in many dimensions separates anything. None for fewer than 4 pairs.
    """
    n = len(chosen)
    if n < 4:
        return None
    fitted = _halves(n, draws, seed).flatten(0, 1)  # [2 draws, N]
    directions = fitted.to(chosen) @ (chosen - rejected)
    scores = [(acts @ directions.T).T for acts in (chosen, rejected)]  # this way round equal rows score equally
    values = [auc(plus[judged], minus[judged]) for plus, minus, judged in zip(*scores, ~fitted, strict=True)]
    return sum(values) / len(values)


def _halves(n: int, draws: int, seed: int) -> Tensor:
    """Draw halves of `n` rows, and the others: masks `[2, draws, n]`."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.zeros(draws, n, dtype=torch.bool)
    for row in one:
        row[torch.randperm(n, generator=generator)[: n // 2]] = True
    return torch.stack([one, ~one])


def mean_difference(chosen: Tensor, rejected: Tensor, *, equal_weight: bool = False) -> Tensor:
    """Return the mean over pairs of `chosen - rejected` per site, `[S, D]` float64, from `[N, S, D]` activations.

    With `equal_weight` every pair counts alike, however far apart its answers lie: the differences are scaled to length
    1 before the mean, which then gets back the length of the plain one. Where pairs differ in how far rather than in
    which way, the direction stays what it was, but what is left of *shuffled* pairs no longer points along it: balanced
    flips cancel directions, while lengths that differ leave a remainder. Differences shorter than `TINY` times their
    activations are rounding and have no vote.

    >>> chosen, rejected = torch.tensor([[[8.0, 0.0]], [[0.0, 6.0]]]), torch.zeros(2, 1, 2)
    >>> mean_difference(chosen, rejected).tolist()
    [[4.0, 3.0]]
    >>> mean_difference(chosen, rejected, equal_weight=True).round(decimals=3).tolist()
    [[3.536, 3.536]]
    """
    # Accumulated in float64 without a float64 copy of [N, S, D].
    plain = chosen.mean(dim=0, dtype=torch.float64) - rejected.mean(dim=0, dtype=torch.float64)
    if not equal_weight:
        return plain
    sides = zip(chosen.unbind(dim=1), rejected.unbind(dim=1), strict=True)
    mean = torch.stack([_vote(plus.double(), minus.double()).mean(dim=0) for plus, minus in sides])
    return unit(mean) * plain.norm(dim=-1, keepdim=True)


def _vote(plus: Tensor, minus: Tensor) -> Tensor:
    """Scale the differences `[N, D]` to length 1, and those that are rounding to 0."""
    difference, longer = plus - minus, torch.maximum(plus.norm(dim=-1), minus.norm(dim=-1))
    return unit(difference) * (difference.norm(dim=-1) > TINY * longer)[:, None]


def describe_site(
    chosen: Tensor, rejected: Tensor, *, seed: int = 0, whole: tuple[Tensor, Tensor] | None = None
) -> dict[str, float | None]:
    """Return the diagnostics of the pairs' activations `[N, D]` at one site, computed in float64.

    `whole`: the means `[2, D]` of more pairs than are given here, and those of equal parts of them `[2, parts, D]`; all
    that can be told from these is told of all those pairs.

    `cos_r_mu` is Eq. 3 of PaLRS (arXiv:2509.23982) as we read it, None where the difference is rounding. With theta the
    angle between the means it is sin(theta/2) when the means are equally long, and tends to 1 when `mu-` is only a
    shorter `mu+`; `norm_gap` = cos^2 - sin^2(theta/2) says how much of it is that.
    """
    plus, minus = chosen.double(), rejected.double()
    differences = plus - minus
    mu_plus, mu_minus, r, halved = plus.mean(dim=0), minus.mean(dim=0), differences.mean(dim=0), differences
    if whole is not None:
        (mu_plus, mu_minus), (parts_plus, parts_minus) = whole
        r, halved = mu_plus - mu_minus, parts_plus - parts_minus
    norm_plus, norm_minus, norm_r = (float(v.norm()) for v in (mu_plus, mu_minus, r))
    theta = angle(mu_plus, mu_minus)
    signal = norm_r > TINY * max(norm_plus, norm_minus)
    cos = cosine(r, mu_plus) if signal else None
    return {
        "mu_plus_norm": norm_plus,
        "mu_minus_norm": norm_minus,
        "angle": theta,
        "r_norm": norm_r,
        "relative_norm": norm_r / norm_plus if norm_plus > 0 else None,
        "cos_r_mu": cos,
        "norm_gap": None if cos is None else cos * abs(cos) - math.sin(math.radians(theta) / 2) ** 2,
        "top5_share": top_share(mu_plus),
        "pairwise_cosine": pairwise_cosine(differences) if signal else None,
        "split_half_cosine": split_half_cosine(halved, seed=seed) if signal else None,
        "probe_auc": probe_auc(plus, minus, seed=seed) if signal else None,
    }


def lengths_vary(lengths: Tensor) -> bool:
    """Tell whether `lengths [N, 2]` of chosen and rejected answers differ within either side.

    >>> lengths_vary(torch.tensor([[9, 4], [9, 4]]))
    False
    """
    return bool((lengths != lengths[:1]).any())


def regress_out_lengths(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the part of `chosen` and `rejected` `[N, S, D]` that a straight line in length explains.

    `lengths [N, 2]` counts tokens of the chosen and the rejected answer. The slope is taken *within* each side
    (analysis of covariance): a slope over both sides would also remove the preference itself, which goes along with
    length. Where lengths do not vary within the sides nothing is removed.
    """
    x = lengths.double()
    deviation = x - x.mean(dim=0)  # [N, 2], within each side
    if not lengths_vary(lengths):
        return chosen, rejected
    spread = float(deviation.square().sum())
    covariance = torch.einsum("n,nsd->sd", deviation[:, 0], chosen.double())
    covariance += torch.einsum("n,nsd->sd", deviation[:, 1], rejected.double())
    slope = covariance / spread  # [S, D] per token
    centred = x - x.mean()
    adjusted = (acts.double() - centred[:, i, None, None] * slope for i, acts in enumerate((chosen, rejected)))
    plus, minus = (acts.float() for acts in adjusted)
    return plus, minus
