"""Random directions as long as the mean difference: the control that any vector of that length must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.ops import mean_difference


def random(chosen: Tensor, rejected: Tensor, *, seed: int = 0) -> Tensor:
    """Return one isotropic random vector per site, `[S, D]` float64, with the norm of the mean difference there.

    `chosen` and `rejected` are `[N, S, D]` and give the norms only.
    """
    mean = mean_difference(chosen, rejected)
    generator = torch.Generator().manual_seed(seed)
    # Row by row, so that a site's draw does not depend on how many sites follow.
    drawn = torch.stack([torch.randn(len(row), generator=generator, dtype=torch.float64) for row in mean])
    return drawn / drawn.norm(dim=-1, keepdim=True) * mean.norm(dim=-1, keepdim=True)
