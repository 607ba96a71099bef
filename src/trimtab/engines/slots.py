"""A table of addends and a row number per token: how engines that pack many requests into one step are steered.

A step of such an engine holds tokens of many requests, `[T, D]`, each request under a setting of its own. One layer's
table has a row for each distinct sum of addends that is needed, and row 0, which is zero for ever; a number per token
says which row it takes: `h + table[layer][rows]`. Table and numbers keep their addresses, so that graphs recorded once
stay right whatever is in flight.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.addends import sum_addends
from trimtab.artifact import Knob
from trimtab.errors import OptionError
from trimtab.types import Where

PLACES: dict[Where, tuple[bool, bool, bool]] = {
    "all": (True, True, True),
    "context": (True, False, False),
    "prompt": (True, True, False),
    "completion": (False, True, True),
}
"""Whether a knob of this `where` touches the tokens before a prompt's last one, the last one, and those after it."""

Turned = tuple[Knob, float]
"""A knob with its strength."""


class Sum(NamedTuple):
    """What is added to the tokens of one place."""

    key: str
    """Digest of the vectors, layers and strengths; empty where nothing is added."""
    addends: dict[int, Tensor]  # [D] float32 by layer


@dataclass(frozen=True)
class Plan:
    """What is added to one request's tokens: before the prompt's last one, on it, and after it."""

    before: Sum
    last: Sum
    after: Sum

    @property
    def sums(self) -> tuple[Sum, Sum, Sum]:
        """The three, in the order of the tokens."""
        return self.before, self.last, self.after

    @property
    def keys(self) -> tuple[str, str, str]:
        """Their digests."""
        return self.before.key, self.last.key, self.after.key


def knob_digest(knob: Knob) -> str:
    """Say in 64 hexadecimal digits what an added knob does: its layers, its tokens, and its vectors at strength 1."""
    addends = knob.addends(1.0)
    said = f"{[*addends]} {knob.where} {knob.length(1.0)!r} ".encode()
    return hashlib.sha256(said + b"".join(addend.numpy().tobytes() for addend in addends.values())).hexdigest()


def plan_request(turned: Mapping[str, Turned], dtype: torch.dtype) -> Plan:
    """Sum what knobs, by their digests, add to each place of a request's tokens.

    Sums are formed in float32 in the order of the digests, so that equal settings give equal bits. Raises `OptionError`
    for sums that `dtype` cannot hold.
    """
    active = [(digest, *turned[digest]) for digest in sorted(turned) if turned[digest][1]]
    sums: dict[str, Sum] = {"": Sum("", {})}
    keys: list[str] = []
    for place in range(3):
        own = [(digest, knob, strength) for digest, knob, strength in active if PLACES[knob.where][place]]
        said = " ".join(f"{digest}={strength!r}" for digest, _, strength in own)
        keys.append(hashlib.sha256(said.encode()).hexdigest() if own else "")
        if keys[-1] not in sums:
            sums[keys[-1]] = Sum(keys[-1], _add_up([(knob, strength) for _, knob, strength in own], dtype))
    return Plan(*(sums[key] for key in keys))


def _add_up(own: Sequence[Turned], dtype: torch.dtype) -> dict[int, Tensor]:
    addends = sum_addends(own)
    if not all(bool(addend.to(dtype).isfinite().all()) for addend in addends.values()):
        named = {knob.name: strength for knob, strength in own}
        raise OptionError(f"A strength is too large for {dtype}; got {named}.")
    return addends


def block_key(keys: Sequence[str], prompt: int, start: int, end: int) -> str:
    """Say what is added to the tokens `start..end-1` of a request, for the key under which a cache keeps them.

    `keys` are those of its plan, `prompt` is the prompt's number of tokens. Empty where nothing is added, so that all
    requests share what no knob touches.

    >>> block_key(("", "x", "x"), prompt=20, start=0, end=16), block_key(("", "x", "x"), prompt=20, start=16, end=32)
    ('', '3:x')
    """
    bounds = (0, prompt - 1, prompt)
    runs: list[tuple[int, str]] = []
    for key, begin, stop in zip(keys, bounds, (*bounds[1:], end), strict=True):
        if max(begin, start) < min(stop, end) and (runs[-1][1] if runs else "") != key:
            runs.append((max(begin, start) - start, key))
    return " ".join(f"{at}:{key}" for at, key in runs)


class Slots:
    """The addends of the settings that are alive, at the layers of one worker.

    `layers` are the steered layers, `width` is D, `settings` how many requests can be in a step at once, and `tokens`
    the most tokens of a step, padding included. `table [L, 3 * settings + 1, D]` is in the model's `dtype`,
    `rows [tokens]` int64.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        *,
        settings: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = {layer: i for i, layer in enumerate(layers)}
        self.table = torch.zeros(len(layers), 3 * settings + 1, width, dtype=dtype, device=device)
        self.rows = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.idle = True  # no token of this step takes any row but 0
        self.busy: frozenset[int] = frozenset()  # layers whose tables this step's requests have rows in
        self._layers: dict[int, frozenset[int]] = {0: frozenset()}  # by row
        self._free = list(range(3 * settings, 0, -1))
        self._used: dict[str, int] = {"": 0}  # rows by the keys of their sums
        self._counts: Counter[str] = Counter()
        self._plans: dict[str, Plan] = {}
        self._filled = 0  # rows beyond are 0

    def sync(self, live: Mapping[str, Plan]) -> None:
        """Hold the addends of the requests of this step.

        Those of others stay while there is room: a request may miss a step, as every other one does in a pipeline, and
        the next one may have the same setting. A request that comes again under its old name is another one. Raises
        `OptionError` for more requests than there are `settings`.
        """
        for request in [name for name in live if name in self._plans and self._plans[name].keys != live[name].keys]:
            self._drop(request)
        absent = [name for name in self._plans if name not in live]
        for request in live.keys() - self._plans.keys():
            plan = live[request]
            needed = {total.key for total in plan.sums} - self._used.keys()
            while len(needed) > len(self._free) and absent:
                self._drop(absent.pop(0))  # the one that came first
            if len(needed) > len(self._free):
                raise OptionError(
                    f"The table of addends is full: it holds {self.table.shape[1] - 1} sums, three for every request "
                    "of a step."
                )
            self._plans[request] = plan
            for total in plan.sums:
                self._hold(total)

    def _hold(self, total: Sum) -> None:
        if not total.key:
            return
        self._counts[total.key] += 1
        if total.key not in self._used:
            row = self._used[total.key] = self._free.pop()
            self.table[:, row].zero_()
            self._layers[row] = frozenset(total.addends)
            for layer, addend in total.addends.items():
                if layer in self.layers:  # others belong to another stage of the pipeline
                    self.table[self.layers[layer], row].copy_(addend)

    def _drop(self, request: str) -> None:
        for total in self._plans.pop(request).sums:
            if total.key:
                self._counts[total.key] -= 1
                if not self._counts[total.key]:
                    del self._counts[total.key]
                    self._free.append(self._used.pop(total.key))

    def fill(
        self, requests: Sequence[str], counts: Sequence[int], begins: Sequence[int], prompts: Sequence[int]
    ) -> None:
        """Give every token of a step its row: `counts` tokens of each request, from absolute position `begins` on.

        All four are of one length, the number of requests. `prompts` are their prompt lengths, so that a prompt that
        comes in pieces, or is computed again, is steered as one that comes whole. Requests without a plan, and padding,
        take row 0.
        """
        places = np.array([self._places(request) for request in requests], dtype=np.int64).reshape(-1, 3)
        sizes = np.asarray(counts, dtype=np.int64)
        total = int(sizes.sum())
        if total > len(self.rows):
            raise OptionError(f"A step holds {total} tokens; the table of rows was made for {len(self.rows)}.")
        self.busy = frozenset[int]().union(*(self._layers[row] for row in set(places.ravel().tolist())))
        if not places.any():
            self._fill(np.zeros(0, dtype=np.int64))
            return
        owner = np.repeat(np.arange(len(sizes)), sizes)
        offsets = np.arange(total) - np.repeat(sizes.cumsum() - sizes, sizes)
        ahead = np.asarray(begins)[owner] + offsets - (np.asarray(prompts)[owner] - 1)  # 0 on the prompt's last token
        self._fill(places[owner, 1 + np.sign(ahead)])

    def _places(self, request: str) -> tuple[int, ...]:
        plan = self._plans.get(request)
        return (0, 0, 0) if plan is None else tuple(self._used[total.key] for total in plan.sums)

    def _fill(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        count, host = len(rows), torch.from_numpy(rows)
        if self.rows.device.type == "cuda":
            host = host.pin_memory()  # of its own: the last step's may still be on its way
        self.rows[:count].copy_(host, non_blocking=True)
        self.rows[count : max(count, self._filled)].zero_()
        self._filled, self.idle = count, not rows.any()
