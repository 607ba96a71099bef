"""COLD-Kernel: minus the mean gradient of a loss at the residual stream; kernels weigh the examples by the input.

Paper: K. Sharma, S. Trivedi, "COLD-Steer: Steering Large Language Models via In-Context One-step Learning Dynamics",
arXiv:2603.06495. What one gradient step on the examples would do to the residual, where the tangent kernel between two
prompts is replaced by a simple one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import OptionError
from trimtab.kernels import Kernel, check_kernel


def cold_kernel(gradients: Tensor, activations: Tensor, *, kernel: Kernel = "unit", temperature: float = 1.0) -> Tensor:
    """Return `-(1/N) sum_j g_j` per site, `[S, D]` float64, from gradients and activations `[N, S, D]`.

    With kernel "unit" that is all there is: exactly one step of gradient descent, from zero, of an additive vector at
    the tokens where the gradients were read. The other kernels keep the examples and weigh them by the stream's state
    at every token, see `trimtab.kernels.kernel_weights`; the mean is then what they have in common.

    >>> import torch
    >>> cold_kernel(torch.tensor([[[1.0, 4.0]], [[3.0, 0.0]]]), torch.ones(2, 1, 2)).tolist()
    [[-2.0, -2.0]]
    """
    check_kernel(kernel, temperature)
    if temperature != 1.0 and kernel != "softmax":
        raise OptionError(f"A temperature is of the softmax kernel; got {temperature:g} for {kernel}. Leave it out.")
    return -gradients.mean(dim=0, dtype=torch.float64)


def example_values(gradients: Tensor) -> Tensor:
    """Return what each example adds to that sum, `-g_j / N` float64 from gradients `[N, ...]`.

    >>> example_values(torch.tensor([[1.0, 4.0], [3.0, 0.0]])).tolist()
    [[-0.5, -2.0], [-1.5, -0.0]]
    """
    return -gradients.double() / len(gradients)
