"""Combine weight differences: one pure function per rule, and what speaks for or against combining them.

Every rule takes differences of one weight, all of one shape, with a weight for each, and returns one difference in
float32. None of them knows of models or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from trimtab.errors import OptionError
from trimtab.ops import cosine, unit

Rule = Literal["task-arithmetic", "linear", "ties", "dare", "slerp", "norm-matched"]


def task_arithmetic(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return `sum_i w_i d_i` (Ilharco et al. 2023, arXiv:2212.04089, section 2).

    >>> task_arithmetic([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])], [1.0, -1.0]).tolist()
    [0.0, 2.0]
    """
    _check(deltas, weights)
    total = torch.zeros_like(deltas[0], dtype=torch.float32)
    for delta, weight in zip(deltas, weights, strict=True):
        total += weight * delta.float()
    return total


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean `sum_i w_i d_i / sum_i w_i`; the weights must not add up to zero.

    >>> linear([torch.tensor([1.0]), torch.tensor([4.0])], [2.0, 1.0]).tolist()
    [2.0]
    """
    total = sum(weights)
    if abs(total) < 1e-12:
        raise OptionError(f"A mean needs weights that do not add up to zero; got {list(weights)}. Use task-arithmetic.")
    return task_arithmetic(deltas, weights) / total


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float = 0.2) -> Tensor:
    """Trim, elect signs, take the disjoint mean (Yadav et al. 2023, arXiv:2306.01708, algorithm 1).

    Of each difference the share `density` of largest magnitude stays. Per entry the sign with the larger weighted mass
    is elected, and the entries that have it are averaged by their weights' sizes. A negative weight turns its
    difference round.

    >>> deltas = [torch.tensor([3.0, 1.0]), torch.tensor([1.0, -2.0]), torch.tensor([-1.0, -4.0])]
    >>> ties(deltas, [1.0, 1.0, 1.0], density=1.0).tolist()
    [2.0, -3.0]
    """
    _check(deltas, weights)
    _check_density(density)
    turned = [weight * _trimmed(delta.float(), density) for delta, weight in zip(deltas, weights, strict=True)]
    elected = torch.stack(turned).sum(dim=0).sign()
    mass, share = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(turned, weights, strict=True):
        agrees = (delta.sign() == elected) & (elected != 0)
        mass += torch.where(agrees, delta, 0.0)
        share += agrees * abs(weight)
    return torch.where(share > 0, mass / share.clamp(min=1e-30), 0.0)


def dare(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float = 0.1, seed: int = 0) -> Tensor:
    """Drop entries at random, rescale by `1 / density`, and add (Yu et al. 2024, arXiv:2311.03099, eq. 2-4).

    The expected result is that of task arithmetic. One `seed` gives every weight of one shape the same mask.
    """
    _check(deltas, weights)
    _check_density(density)
    random = torch.Generator().manual_seed(seed)
    kept = [torch.rand(delta.shape, generator=random) < density for delta in deltas]
    return task_arithmetic([delta.float() * mask / density for delta, mask in zip(deltas, kept, strict=True)], weights)


def slerp(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Go along the arc between two differences, in proportion to the weights (Shoemake 1985; WARP, arXiv:2406.16768).

    Directions are interpolated on the sphere and lengths linearly. Differences that are parallel, opposed or zero have
    no arc between them, and get the weighted mean.
    """
    _check(deltas, weights)
    total = sum(weights)
    if len(deltas) != 2 or min(weights) < 0 or total <= 0:
        raise OptionError(f"An arc joins two differences with weights of 0 or more; got {list(weights)}.")
    share = weights[1] / total
    first, second = (delta.double().flatten() for delta in deltas)
    lengths = float(first.norm()), float(second.norm())
    angle = torch.arccos((unit(first) @ unit(second)).clamp(-1, 1))
    if min(lengths) == 0 or float(torch.sin(angle)) < 1e-6:
        return linear(deltas, weights)
    direction = torch.sin((1 - share) * angle) * unit(first) + torch.sin(share * angle) * unit(second)
    length = (1 - share) * lengths[0] + share * lengths[1]
    return (length * unit(direction)).float().reshape(deltas[0].shape)


def norm_matched(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum at the length that the parts have on average, `sum_i |w_i| ||d_i|| / sum_i |w_i|`.

    Differences that do not agree cancel in a sum, and what is left is short; this tells direction from length.
    """
    total = task_arithmetic(deltas, weights)
    mass = sum(map(abs, weights))
    wanted = sum(abs(w) * float(d.double().norm()) for d, w in zip(deltas, weights, strict=True)) / max(mass, 1e-30)
    length = float(total.double().norm())
    return total * (wanted / length) if length else total


class MergeRule(Protocol):
    """Differences of one weight and a weight for each, to one difference; options are keyword-only."""

    def __call__(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor: ...


MERGES: dict[Rule, MergeRule] = {
    "task-arithmetic": task_arithmetic,
    "linear": linear,
    "ties": ties,
    "dare": dare,
    "slerp": slerp,
    "norm-matched": norm_matched,
}


# --- diagnostics ----------------------------------------------------------------------------------------------------


def sign_conflict(a: Tensor, b: Tensor) -> float:
    """Return the share of entries whose signs are opposed, of those that are not zero in either; 0 where none is.

    >>> round(sign_conflict(torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 5.0, -3.0])), 6)
    0.666667
    """
    both = (a != 0) & (b != 0)
    count = int(both.sum())
    return float(((a.sign() != b.sign()) & both).sum() / count) if count else 0.0


class Interference(NamedTuple):
    """`raw` grows with the size of the differences; `normed` is of differences of length 1, and can be compared."""

    raw: float
    normed: float


def singular_task_interference(deltas: Sequence[Tensor], *, rank: int = 8) -> Interference:
    """Return `||(U^T U - I) S (V^T V - I)||_1` of one matrix (Gargiulo et al. 2025, arXiv:2412.00081, eq. 4).

    U and V hold the leading `rank` singular vectors of every difference `[out, in]` side by side, S their singular
    values; the norm is the sum of absolute entries. 0 for one difference, and for differences that share no direction.
    """
    _check(deltas, [1.0] * len(deltas))
    if deltas[0].dim() != 2 or rank < 1:
        raise OptionError(f"Interference is that of matrices, at a rank of 1 or more; got {list(deltas[0].shape)}.")

    def interference(matrices: list[Tensor]) -> float:
        parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
        kept = [(u[:, :rank], s[:rank], vh[:rank].T) for u, s, vh in parts]
        left, right = (torch.cat([part[i] for part in kept], dim=1) for i in (0, 2))
        sizes = torch.cat([part[1] for part in kept])
        one = torch.eye(len(sizes), dtype=sizes.dtype)
        return float(((left.T @ left - one) @ torch.diag(sizes) @ (right.T @ right - one)).abs().sum())

    wide = [delta.double() for delta in deltas]
    normed = [delta / delta.norm() if delta.any() else delta for delta in wide]
    return Interference(interference(wide), interference(normed))


def cosine_matrix(deltas: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the cosines `[K, K]` of K differences over all their tensors together, in float64."""
    flat = [torch.cat([tensor.double().flatten() for tensor in delta]) for delta in deltas]
    return torch.tensor([[cosine(a, b) for b in flat] for a in flat], dtype=torch.float64)


def layer_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """Add up the norms of weights, as `diagnostics["norms"]` holds them, within each block; others stand alone.

    >>> layer_norms({"model.layers.0.mlp.up.weight": 3.0, "model.layers.0.q.weight": 4.0, "lm_head.weight": 1.0})
    {'model.layers.0': 5.0, 'lm_head.weight': 1.0}
    """
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        block = re.match(r".*?\.\d+(?=\.)", name)  # the first number, so that an expert's is not taken for a layer's
        label = block[0] if block else name
        squares[label] = squares.get(label, 0.0) + norm**2
    return {label: math.sqrt(square) for label, square in squares.items()}


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """Keep the share of entries with the largest magnitude; entries as large as the smallest that stays, stay too."""
    keep = max(1, round(density * delta.numel()))
    if keep >= delta.numel():
        return delta
    smallest = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= smallest, delta, 0.0)


def _check(deltas: Sequence[Tensor], weights: Sequence[float]) -> None:
    if not deltas or len(deltas) != len(weights):
        raise OptionError(f"Every difference needs a weight; got {len(deltas)} and {len(weights)}.")
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) > 1:
        raise OptionError(f"Differences of one weight have one shape; got {sorted(map(list, shapes))}.")


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise OptionError(f"The density is a share of entries, above 0 and at most 1; got {density:g}.")
