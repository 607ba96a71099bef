"""Muon in 32-bit: the optimiser of the blocks' matrices, for processors without bf16 arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (K. Jordan, 2024).

    `torch.optim.Muon` computes the same in bf16, which a CPU without bf16 units emulates, many times slower.
    Matrices of one shape are orthogonalised together, and workers of a process group share that work.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix in place."""
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            updates: list[torch.Tensor] = []
            for p in members:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                updates.append(torch.lerp(p.grad, state["momentum"], group["momentum"]))
            for p, update in zip(members, orthogonalise_all(updates), strict=True):
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise_all(updates: list[torch.Tensor]) -> list[torch.Tensor]:
    """Orthogonalise matrices of any shapes; under `torch.distributed` every worker does its part for all."""
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    done = [torch.zeros_like(update) for update in updates]
    for shape in {update.shape for update in updates}:
        mine = [i for i, update in enumerate(updates) if update.shape == shape][rank::workers]
        if mine:
            for i, matrix in zip(mine, orthogonalise(torch.stack([updates[i] for i in mine])), strict=True):
                done[i] = matrix
    if workers == 1:
        return done
    flat = torch.cat([matrix.flatten() for matrix in done])
    dist.all_reduce(flat)
    return [x.view_as(m) for m, x in zip(done, flat.split([m.numel() for m in done]), strict=True)]


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
