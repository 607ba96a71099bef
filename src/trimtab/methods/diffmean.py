"""Difference of means, as in contrastive activation addition (CAA).

Paper: N. Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", arXiv:2312.06681, section 3.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.ops import mean_difference


def diffmean(chosen: Tensor, rejected: Tensor, *, equal_weight: bool = False) -> Tensor:
    """Return the mean over pairs of `chosen - rejected` per site, `[S, D]` float64, from `[N, S, D]` activations.

    The paper reads the answer's letter and adds the raw vector at the tokens after the prompt. The same vector as
    PaLRS's for the same activations: the methods differ in what is read and where. `equal_weight` is ours, see
    `trimtab.ops.mean_difference`.

    >>> import torch
    >>> diffmean(torch.tensor([[[1.0, 4.0]], [[3.0, 0.0]]]), torch.ones(2, 1, 2)).tolist()
    [[1.0, 1.0]]
    """
    return mean_difference(chosen, rejected, equal_weight=equal_weight)
