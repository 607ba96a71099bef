"""COLD-Kernel: minus the mean gradient of a loss at the residual stream; kernels weigh the examples by the input.

Paper: K. Sharma, S. Trivedi, "COLD-Steer: Steering Large Language Models via In-Context One-step Learning Dynamics",
arXiv:2603.06495. What one gradient step on the examples would do to the residual, where the tangent kernel between two
prompts is replaced by a simple one.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from trimtab.errors import OptionError, unknown_name

Kernel = Literal["unit", "cosine", "softmax", "linear"]


def cold_kernel(gradients: Tensor, activations: Tensor, *, kernel: Kernel = "unit", temperature: float = 1.0) -> Tensor:
    """Return `-(1/N) sum_j g_j` per site, `[S, D]` float64, from gradients and activations `[N, S, D]`.

    With kernel "unit" that is all there is: exactly one step of gradient descent, from zero, of an additive vector at
    the tokens where the gradients were read. The other kernels keep the examples and weigh them by the stream's state
    at every token, see `kernel_weights`; the mean is then what they have in common.

    >>> import torch
    >>> cold_kernel(torch.tensor([[[1.0, 4.0]], [[3.0, 0.0]]]), torch.ones(2, 1, 2)).tolist()
    [[-2.0, -2.0]]
    """
    if kernel not in get_args(Kernel):
        raise unknown_name("kernel", kernel, get_args(Kernel))
    if temperature <= 0:
        raise OptionError(f"The temperature of a softmax kernel is above 0; got {temperature:g}.")
    return -gradients.mean(dim=0, dtype=torch.float64)
