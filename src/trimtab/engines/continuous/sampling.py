"""Tokens from logits, request by request: what one draws does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from trimtab.engines.continuous.requests import Sampling


class Draw:
    """How one request draws, and its own source of random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = Random(sampling.seed)  # None seeds from the system

    def next(self) -> float:
        """Return the next number from 0 to 1, one for each token."""
        return self._random.random()


def choose(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Choose a token for each row of `logits [N, V]`, finite and float32; returns `[N]` int64."""
    chosen = logits.argmax(-1)
    warm = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if warm:
        chosen[warm] = _sample(logits[warm], [draws[i] for i in warm])
    return chosen


def _sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw by the inverse of the cumulative probabilities, of the likeliest tokens that hold the share `top_p`."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    temperatures = column([draw.sampling.temperature for draw in draws])
    share = column([draw.sampling.top_p for draw in draws])
    scores = logits.double() - logits.max(-1, keepdim=True).values  # before dividing: nothing overflows
    probabilities = (scores / temperatures).softmax(-1)
    order = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices if bool((share < 1).any()) else None
    if order is not None:
        probabilities = probabilities.gather(-1, order)
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = 0  # the likeliest one stays, whatever the share
        probabilities = probabilities.where(before < share, 0.0)
    heights = probabilities.cumsum(-1)
    target = column([draw.next() for draw in draws]) * heights[:, -1:] * (1 - 1e-15)  # never rounded up to the end
    places = torch.searchsorted(heights, target, right=True).clamp(max=logits.shape[-1] - 1)
    return (places if order is None else order.gather(-1, places))[:, 0]


def log_probabilities(row: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return a token's log-probability and the `count` likeliest with theirs, of logits `[V]` at temperature 1."""
    found = row.log_softmax(-1)
    top = found.topk(min(count, len(found)))
    return float(found[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
