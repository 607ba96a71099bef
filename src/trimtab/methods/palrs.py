"""PaLRS: the mean difference of the answers' activations; what is PaLRS's own is where it reads and how it chooses.

Paper: L. La Cava, A. Tagarelli, "Toward Preference-aligned Large Language Models via Residual-based Model Steering",
arXiv:2509.23982, Eqs. 1 and 2.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.errors import OptionError
from trimtab.ops import mean_difference


def palrs(chosen: Tensor, rejected: Tensor, *, equal_weight: bool = False) -> Tensor:
    """Return `mu+ - mu-` per site, `[S, D]` float64, from `[N, S, D]` activations.

    No sparsity, whitening or threshold. PaLRS rescales it to the norm of `mu+` (Eq. 4), which is a change of unit and
    left to the gain. Response-only texts say nothing about whether an answer is right for its question.
    `equal_weight` is ours, see `trimtab.ops.mean_difference`.

    >>> import torch
    >>> palrs(torch.tensor([[[1.0, 4.0]], [[3.0, 0.0]]]), torch.zeros(2, 1, 2)).tolist()
    [[2.0, 2.0]]
    """
    return mean_difference(chosen, rejected, equal_weight=equal_weight)


def palrs_layer(layer: int) -> int:
    """Return the Trimtab layer for the paper's layer `l`: it reads the *input* of block l, the output of block l - 1.

    >>> palrs_layer(3)
    2
    """
    if layer == 0:
        raise OptionError(
            "PaLRS's layer 0 is the embedding, and has no Trimtab layer: the tokens read there are the same for chosen "
            "and rejected, so their difference is exactly zero. Use layer 1 or higher."
        )
    if layer < 0:
        raise OptionError(f"PaLRS counts layers from 0; got {layer}.")
    return layer - 1
