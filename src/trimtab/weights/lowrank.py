"""A weight difference as a product of two thin matrices, by singular value decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trimtab.artifact.delta import DeltaKnob
from trimtab.artifact.parts import LowRank, Part
from trimtab.errors import OptionError
from trimtab.seeds import seeded
from trimtab.weights.live import applied
from trimtab.weights.rows import is_linear

EXACT = 1024
"""Matrices whose smaller side is at most this long are decomposed whole; larger ones by a randomised method."""
OVERSAMPLING = 10
ROUNDS = 4


def truncate(delta: Tensor, *, rank: int | None = None, energy: float | None = None, seed: int = 0) -> LowRank:
    """Return the best product `B A` of a given rank for `delta [out, in]`, or of the smallest rank that keeps `energy`.

    `energy` is a share of the squared Frobenius norm, in 0..1. The product of rank R is the truncated singular value
    decomposition (Eckart and Young 1936), its singular values shared out evenly between the two. Matrices larger than
    `EXACT` are decomposed by randomised subspace iteration (Halko et al. 2011, algorithms 4.4 and 5.1, with `ROUNDS`
    rounds), which `seed` makes repeatable. Computed in float32. Raises `OptionError` for what is no matrix, and unless
    exactly one of rank and energy is given.
    """
    if delta.dim() != 2:
        raise OptionError(f"Only a matrix has a rank; got shape {list(delta.shape)}.")
    if (rank is None) == (energy is None):
        raise OptionError("Pass either a rank or an energy.")
    if rank is not None and rank < 1:
        raise OptionError(f"The rank counts from 1; got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"The energy is a share of the squared norm, above 0 and at most 1; got {energy:g}.")
    wide, most = delta.float(), min(delta.shape)
    if rank is not None:
        return _product(*_decompose(wide, min(rank, most), seed))
    assert energy is not None
    total, tried = float(wide.double().square().sum()), min(most, 16 if most > EXACT else most)
    while True:
        u, s, v = _decompose(wide, tried, seed)
        sums = s.double().square().cumsum(0)
        # Rounding leaves the sum of all squares a little short of the whole.
        enough = (sums >= energy * total * (1 - 1e-6)).nonzero()
        if len(enough) or tried == most:
            kept = int(enough[0]) + 1 if len(enough) else tried
            return _product(u[:, :kept], s[:kept], v[:, :kept])
        tried = min(most, 2 * tried)


def compress(
    knob: DeltaKnob,
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    probe: Sequence[Tensor] = (),
    seed: int = 0,
) -> DeltaKnob:
    """Return a knob of low rank, which can have another strength in every row of a batch; see `truncate`.

    Weights of `model` that are no linear layer's (embeddings, norms, biases) are left out. `diagnostics["fidelity"]`
    of the result holds the relative error of the whole difference, what was left out counted in, and by weight; and
    with `probe`, texts as token ids `[T]`, `kl`: KL(model under `knob` || model under the result), both at strength 1,
    in nats per token, over `kl_tokens` tokens.
    """
    knob.check_shapes(model)
    parts: dict[str, Part] = {}
    errors: dict[str, float] = {}
    lost, whole, left_out = 0.0, 0.0, list[str]()
    for name in knob.parts:
        delta = knob.dense(name)
        square = float(delta.double().square().sum())
        whole += square
        if not is_linear(model, name):
            left_out.append(name)
            lost += square
            continue
        low = truncate(delta, rank=rank, energy=energy, seed=seed)
        parts[name], errors[name] = low, relative_error(delta, low)
        lost += square * errors[name] ** 2
    if not parts:
        raise OptionError(f"Knob {knob.name!r} changes no linear layer of this model: there is nothing to compress.")
    fidelity = {
        "rank": rank,
        "energy": energy,
        "relative_error": math.sqrt(lost / whole) if whole else 0.0,
        "by_weight": errors,
        "left_out": left_out,
    }
    made = replace(knob, parts=parts, tuning=None)
    if probe:
        fidelity |= {"kl": divergence(model, knob, made, probe), "kl_tokens": sum(len(ids) for ids in probe)}
    return replace(made, diagnostics={**knob.diagnostics, "fidelity": fidelity})


@torch.no_grad()
def divergence(model: nn.Module, exact: DeltaKnob, other: DeltaKnob, probe: Sequence[Tensor]) -> float:
    """Return KL(model under `exact` || model under `other`) at strength 1, in nats per token of the texts `[T]`."""
    if model.training:
        raise OptionError("Dropout would pass for a divergence. Call model.eval() first.")
    device = next(model.parameters()).device
    inputs = [ids.to(device)[None] for ids in probe]
    with applied(model, {exact: 1.0}):
        wanted = [model(ids).logits[0].float().log_softmax(-1).cpu() for ids in inputs]
    with applied(model, {other: 1.0}):
        found = [model(ids).logits[0].float().log_softmax(-1).cpu() for ids in inputs]
    sums = [float((p.exp() * (p - q)).sum()) for p, q in zip(wanted, found, strict=True)]
    return max(sum(sums), 0.0) / sum(map(len, probe))  # rounding can leave a little less than 0


def relative_error(delta: Tensor, low: LowRank) -> float:
    """Return `||delta - B A|| / ||delta||` in Frobenius norms, 0 for a difference of zero.

    >>> relative_error(torch.diag(torch.tensor([3.0, 4.0])), LowRank(torch.tensor([[0.0, 4.0]]), torch.eye(2)[:, 1:]))
    0.6
    """
    length = float(delta.double().norm())
    return float((delta.double() - low.b.double() @ low.a.double()).norm()) / length if length else 0.0


def _decompose(wide: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `[out, R]`, S `[R]` and V `[in, R]`."""
    if min(wide.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    with seeded(seed, wide.device):
        u, s, v = torch.svd_lowrank(wide, q=min(rank + OVERSAMPLING, min(wide.shape)), niter=ROUNDS)
    return u[:, :rank], s[:rank], v[:, :rank]


def _product(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    half = s.clamp(min=0).sqrt()
    return LowRank((v * half).T.contiguous(), (u * half).contiguous())


def effective_rank(delta: Tensor) -> float:
    """Return `exp` of the entropy of the singular values' shares (Roy and Vetterli 2007): 1 to the smaller side."""
    values = torch.linalg.svdvals(delta.double())
    shares = values / values.sum() if float(values.sum()) else values
    return math.exp(-float((shares * shares.clamp(min=1e-300).log()).sum()))
