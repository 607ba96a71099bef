"""First principal component of the pairs' differences, as in representation engineering (RepE).

Paper: A. Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency", arXiv:2310.01405, section
3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pca(chosen: Tensor, rejected: Tensor, *, center: bool = False) -> Tensor:
    """Return the first principal component of the differences per site, `[S, D]` float64, from `[N, S, D]` activations.

    The sign is that of the mean difference, and the length is the mean difference's component along it: what the
    pairs differ by in this direction. RepE draws random signs for the differences before it centres them, which makes
    their mean vanish; without the draw that is the component about zero (`center=False`). `center=True` takes it about
    the mean difference, and so finds how pairs differ from each other rather than what they share.

    Same directions elsewhere (`docs/parity.md`): steering-vectors' `pca_aggregator` and repeng's `pca_center` for
    `center=False`; repeng's `pca_diff`, its default, for `center=True`. All theirs have length 1, and repeng's sign is
    that of most pairs, which is the mean difference's unless a few pairs differ far the other way.
    """
    return torch.stack([component((c.double() - r.double()), center=center) for c, r in _by_site(chosen, rejected)])


def _by_site(chosen: Tensor, rejected: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(chosen.unbind(dim=1), rejected.unbind(dim=1), strict=True))


def component(differences: Tensor, *, center: bool) -> Tensor:
    """Return the first principal component of `[N, D]` about zero, or about the mean, as long as the mean along it."""
    mean = differences.mean(dim=0)
    rows = differences - mean if center else differences  # [N, D]
    if len(rows) <= rows.shape[1]:  # the smaller of the two Gram matrices has the same leading component
        _, vectors = torch.linalg.eigh(rows @ rows.T)
        direction = rows.T @ vectors[:, -1]
    else:
        _, vectors = torch.linalg.eigh(rows.T @ rows)
        direction = vectors[:, -1]
    length = direction.norm()
    direction = direction / length if length > 0 else torch.zeros_like(mean)
    return (direction @ mean) * direction  # turns it along the mean and gives it its length
