"""What texts held, put together: the activations of some pairs, and the means of all, also in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.capture.running import Read
from trimtab.ops import Moments
from trimtab.team import Team
from trimtab.texts import Text

PARTS = 16
"""Into how many parts the pairs are drawn, whose means show how far halves of all pairs agree."""


def spread(count: int, most: int | None) -> Tensor:
    """Return at most `most` numbers below `count`, evenly spread and in order.

    >>> spread(7, 3).tolist()
    [0, 2, 4]
    """
    if most is None or count <= most:
        return torch.arange(count)
    return torch.arange(most) * count // most


class Gathered:
    """The activations of the pairs whose numbers are `kept`, and sums over all `count` pairs, in float64."""

    def __init__(self, kept: Tensor, count: int, layers: int, positions: int, width: int) -> None:
        self.store = torch.zeros(2, len(kept), layers, positions, width, dtype=torch.float32)
        self.norms = Moments()  # of [L]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self._part: list[int] = (order.argsort() % PARTS).tolist()
        self._sums = torch.zeros(min(PARTS, count), 2, positions, layers, width, dtype=torch.float64)
        self._places = {pair: place for place, pair in enumerate(kept.tolist())}

    def add(self, texts: Sequence[Text], found: Read) -> None:
        """Take in a batch."""
        self.norms.add(found.norms)
        spots = [(text.side, text.pair, p) for text in texts for p in text.reads]
        # row by row: a copy of a batch in float64 takes longer than its sums
        for (side, pair, position), mean in zip(spots, found.means, strict=True):
            self._sums[self._part[pair], side, position] += mean
            place = self._places.get(pair)
            if place is not None:
                self.store[side, place, :, position] = mean

    def meet(self, team: Team) -> None:
        """Put together what the processes of a team have read; all of them hold the whole then."""
        team.add(self.store)
        team.add(self._sums)
        whole = Moments()
        for norms in team.collect(self.norms):
            whole.merge(norms)
        self.norms = whole

    def means(self) -> Tensor:
        """Return the means of chosen and rejected answers, `[2, L, P, D]` float64."""
        return (self._sums.sum(dim=0) / len(self._part)).transpose(1, 2)

    def parts(self) -> Tensor:
        """Return the same of each part of the pairs, `[2, parts, L, P, D]` float64."""
        sizes = (torch.arange(len(self._part)) % PARTS).bincount(minlength=len(self._sums))
        return (self._sums / sizes[:, None, None, None, None]).permute(1, 0, 3, 2, 4)
