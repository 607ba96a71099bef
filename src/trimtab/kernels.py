"""How alike two states of the residual stream are: the weights of examples under an input-dependent kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trimtab.errors import OptionError, unknown_name

Kernel = Literal["unit", "cosine", "softmax", "linear"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
COLDEST, WARMEST = 1e-6, 1e6
"""Temperatures between which float32 tells weights apart."""


@dataclass(frozen=True)
class Weigher:
    """What of N examples' states it takes to weigh them by another state; made once by `make_weigher`."""

    kernel: Kernel
    centre: Tensor  # [D]
    rows: Tensor  # [N, D]

    def weights(self, states: Tensor) -> Tensor:
        """Return the weights of the examples at each state, `[..., D]` to `[..., N]` in the rows' dtype."""
        if self.kernel == "unit":
            return self.rows.new_ones(*states.shape[:-1], len(self.rows))
        states = states.to(self.rows) - self.centre
        likeness = (states if self.kernel == "linear" else _unit(states)) @ self.rows.mT
        return likeness.softmax(-1) * len(self.rows) if self.kernel == "softmax" else likeness

    def to(self, states: Tensor) -> Weigher:
        """Return it on the device of `states`, in float32."""
        centre, rows = (tensor.to(states.device, torch.float32) for tensor in (self.centre, self.rows))
        return Weigher(self.kernel, centre, rows)


def check_kernel(kernel: object, temperature: float) -> None:
    """Raise `UnknownName` or `OptionError` for a kernel or a temperature that there is not."""
    if kernel not in KERNELS:
        raise unknown_name("kernel", str(kernel), KERNELS)
    if not COLDEST <= temperature <= WARMEST:
        raise OptionError(
            f"The temperature of a softmax kernel is above 0, from {COLDEST:g} to {WARMEST:g}; got {temperature:g}."
        )


def make_weigher(keys: Tensor, kernel: Kernel, temperature: float) -> Weigher:
    """Prepare examples with states `keys [N, D]` for a kernel, in float64; see `kernel_weights`."""
    check_kernel(kernel, temperature)
    rows = keys.double()
    centre = torch.zeros_like(rows[0])
    if kernel == "cosine":
        rows = _unit(rows)
    elif kernel == "linear":
        square = rows.square().sum(-1).mean()
        rows = rows / torch.where(square > 0, square, 1.0)
    elif kernel == "softmax":
        centre = rows.mean(0)
        rows = _unit(rows - centre)
        rows = rows * (_dimensions(rows) ** 0.5 / temperature)
    return Weigher(kernel, centre, rows)


def kernel_weights(states: Tensor, keys: Tensor, kernel: Kernel, temperature: float = 1.0) -> Tensor:
    """Return how much each example counts at each state: `[..., D]` and `keys [N, D]` to `[..., N]`, float32 or 64.

    - "unit": 1, whatever the state.
    - "cosine": `cos(h, z_j)`, from -1 to 1.
    - "linear": `h . z_j` over the mean of `|z_j|^2`, the kernel of a linear map: about 1 at the examples' own states,
      and longer where h is, as at the first token of many models.
    - "softmax": `N softmax_j(sqrt(E) cos(h - m, z_j - m) / temperature)`, which sums to N. Around the mean m of the
      examples, since what all states share tells no two of them apart; E is the number of dimensions that the examples
      fill (their participation ratio), so that at temperature 1 the scores of the examples among themselves have a
      root mean square of 1, whatever width and norms. Colder, one example decides; warmer, it is the unit kernel.

    >>> keys = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    >>> kernel_weights(torch.tensor([1.0, 0.0]), keys, "cosine").tolist()
    [1.0, 0.0]
    >>> weights = kernel_weights(torch.tensor([3.0, 0.0]), keys, "softmax")
    >>> [round(weight, 3) for weight in weights.tolist()]
    [1.762, 0.238]
    """
    weigher = make_weigher(keys, kernel, temperature)
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    return weigher.weights(states.double()).to(wide)


def kernel_sums(states: Tensor, keys: Tensor, values: Tensor, kernel: Kernel, temperature: float = 1.0) -> Tensor:
    """Return `sum_j w_j(h) v_j` at each state, `[..., D]` float64, with the weights of `kernel_weights`."""
    return kernel_weights(states.double(), keys, kernel, temperature) @ values.double()


def _unit(states: Tensor) -> Tensor:
    length = states.norm(dim=-1, keepdim=True)
    return states / torch.where(length > 0, length, torch.ones_like(length))


def _dimensions(rows: Tensor) -> float:
    """Return how many dimensions unit rows `[N, D]` fill, from 1 to the smaller of N and D; zero rows do not count."""
    count = float(rows.square().sum())
    gram = rows @ rows.mT if len(rows) <= rows.shape[1] else rows.mT @ rows
    return count**2 / float(gram.square().sum()) if count > 0 else 1.0
