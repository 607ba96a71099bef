"""Which tokens are a model's thoughts, by the markers that open and close them, from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapter import CallInfo, generating
from trimtab.errors import OptionError
from trimtab.types import Markers


@dataclass
class Thoughts:
    """Whether each row is thinking after its last token."""

    open: Tensor  # [B] bool
    tail: Tensor  # [B, M - 1], the last tokens, for markers of M tokens

    def follow(self, call: CallInfo, markers: Markers) -> Tensor:
        """Tell which tokens of a call are thoughts, `[B, T]` bool, by the last marker up to each; **moves on**."""
        if call.ids is None:
            raise OptionError("where='thinking' and 'answer' need token ids; the decoder got embeddings.")
        joined = torch.cat([self.tail, call.ids], 1)
        width, events = self.tail.shape[1], torch.zeros_like(call.ids)
        for event, marker in enumerate(markers, 1):
            windows = joined.unfold(1, len(marker), 1)[:, -call.tokens :]  # those that end at each token
            events[(windows == torch.tensor(list(marker), device=call.device)).all(-1)] = event
        steps = torch.arange(call.tokens, device=call.device).expand_as(events)
        last = torch.where(events > 0, steps, -1).cummax(1).values
        thinking = torch.where(last < 0, self.open[:, None], events.gather(1, last.clamp(min=0)) == 1)
        self.open, self.tail = thinking[:, -1], joined[:, joined.shape[1] - width :]
        return thinking


def start_thoughts(call: CallInfo, markers: Markers) -> Thoughts:
    """Begin at the first call of a prompt, outside of any thought; raises `OptionError` where rows will not stay."""
    around = generating()
    if around is not None and (around.beams or around.assisted):
        what = "beam search, which moves rows" if around.beams else "guesses, which are taken back"
        raise OptionError(f"where='thinking' and 'answer' cannot follow {what}. Sample, or decode greedily.")
    off = torch.zeros(call.batch, dtype=torch.bool, device=call.device)
    return Thoughts(off, torch.full((call.batch, max(map(len, markers)) - 1), -1, device=call.device))
