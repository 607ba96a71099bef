"""Addends at fixed addresses: one row for each thing that is done to a token anywhere, and a row's number per token.

An engine that packs the tokens of many requests, and captures its forward pass once, cannot be given new tensors. It
gathers from a table instead: `hidden + table[layer][rows]`. Row 0 is zero for ever and belongs to padding and to
requests without knobs. A setting has up to three rows, since a knob's `where` counts from the prompt's end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.artifact import Knob
from trimtab.errors import OptionError
from trimtab.types import Where

PLACES: tuple[frozenset[Where], ...] = (
    frozenset(("all", "prompt", "context")),
    frozenset(("all", "prompt", "completion")),
    frozenset(("all", "completion")),
)
"""Which knobs act on a prompt's tokens but the last, on its last one, and on those after it."""
ROWS = len(PLACES)


@dataclass(frozen=True)
class Plan:
    """What a setting does to tokens before, at and past the prompt's last one: addends `[D]` float32 by layer."""

    addends: tuple[Mapping[int, Tensor], ...]
    digests: tuple[str, ...]
    """What tells each of them from any other by content; empty where nothing is done."""


def plan(doses: Mapping[Knob, float]) -> Plan:
    """Sum what knobs at their strengths add at each layer, in their order, for each of `PLACES`."""
    found: list[dict[int, Tensor]] = []
    for wheres in PLACES:
        sums: dict[int, Tensor] = {}
        for knob, strength in doses.items():
            if strength and knob.where in wheres:
                addend, layer = knob.addend(strength), knob.site.layer
                sums[layer] = sums[layer] + addend if layer in sums else addend
        found.append(sums)
    return Plan(tuple(found), tuple(map(_digest, found)))


def _digest(addends: Mapping[int, Tensor]) -> str:
    if not addends:
        return ""
    state = hashlib.sha256()
    for layer, addend in sorted(addends.items()):
        state.update(f"{layer} {len(addend)} ".encode() + addend.contiguous().numpy().tobytes())
    return state.hexdigest()


class Slots:
    """The table of one worker, `[layers, rows, D]`, and who uses which of its rows.

    `layers` are the numbers of the blocks that this worker holds; `settings` how many different ones may be alive.
    """

    def __init__(
        self, layers: Sequence[int], width: int, settings: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._at = {layer: number for number, layer in enumerate(layers)}
        self.table = torch.zeros(len(layers), ROWS * settings + 1, width, dtype=dtype, device=device)
        self._free = list(range(ROWS * settings, 0, -1))
        self._rows: dict[str, tuple[int, int]] = {}  # by digest: the row, and how many use it
        self._held: dict[str, Plan] = {}  # by request

    @property
    def idle(self) -> bool:
        """Whether no request is steered."""
        return not self._rows

    def layer(self, number: int) -> Tensor:
        """Return the rows of one layer, a view `[rows, D]`."""
        return self.table[self._at[number]]

    def take(self, request: str, wanted: Plan) -> None:
        """Give a request the rows that its plan needs, writing those that are new; it keeps them until `drop`."""
        if request in self._held:
            return
        new = [digest for digest in dict.fromkeys(wanted.digests) if digest and digest not in self._rows]
        if len(new) > len(self._free):
            raise OptionError(f"All {self.table.shape[1] - 1} rows of addends are in use.")
        for digest, addends in zip(wanted.digests, wanted.addends, strict=True):
            if not digest:
                continue
            row, users = self._rows.get(digest, (0, 0))
            if not users:
                row = self._free.pop()
                for layer, addend in addends.items():
                    if layer in self._at:  # others are another worker's
                        self.table[self._at[layer], row] = addend.to(self.table)
            self._rows[digest] = row, users + 1
        self._held[request] = wanted

    def drop(self, request: str) -> None:
        """Take a request's rows back; those that nobody else uses are zero again. One that has none is ignored."""
        held = self._held.pop(request, None)
        for digest in filter(None, held.digests if held else ()):
            row, users = self._rows[digest]
            if users > 1:
                self._rows[digest] = row, users - 1
                continue
            self.table[:, row] = 0
            self._free.append(row)
            del self._rows[digest]

    def fill(self, rows: Tensor, request: str, begin: int, position: int, tokens: int, prompt: int) -> None:
        """Write the row of each of a request's tokens into `rows[begin : begin + tokens]`.

        `position` is that of the first of them in its text, `prompt` the number of its prompt's tokens.
        """
        held = self._held.get(request)
        before, last, after = (
            self._rows[digest][0] if digest else 0 for digest in (held.digests if held else ("", "", ""))
        )
        rows[begin : begin + tokens] = after
        edge = begin + prompt - 1 - position  # of the prompt's last token, which may be elsewhere
        rows[begin : max(begin, min(edge, begin + tokens))] = before
        if begin <= edge < begin + tokens:
            rows[edge] = last
