"""Muon in 32-bit: the optimiser of the blocks' matrices, for processors without bf16 arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (K. Jordan, 2024).

    `torch.optim.Muon` computes the same in bf16, which a CPU without bf16 units emulates, many times slower.
    Matrices of one shape are orthogonalised together.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix in place."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, members in shapes.items():
                updates: list[torch.Tensor] = []
                for p in members:
                    state, gradient = self.state[p], p.grad
                    assert gradient is not None
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(torch.lerp(gradient, state["momentum"], group["momentum"]))
                stacked = orthogonalise(torch.stack(updates))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(members, stacked, strict=True):
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """Push the singular values of every matrix of `g` [M, rows, columns] towards 1 (0.7 to 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
