"""What a step's knobs do to the model: addends and low-rank weights by token, and projections where tokens are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, Knob
from trimtab.engines.continuous.batching import Scheduled
from trimtab.engines.slots import Plan, Slots
from trimtab.errors import AdapterError, KnobError
from trimtab.weights.rows import RowAddend, row_addends


@dataclass(frozen=True)
class Turned:
    """What a request's knobs come to, looked up once."""

    plan: Plan | None
    prompt: int
    """The prompt's number of tokens."""
    weights: Mapping[DeltaKnob, float]
    """Alphas of weight knobs."""
    projections: bool


class Steering:
    """Stands beside one model, which packs the tokens of a step into one row, `[1, T, D]`.

    `requests` is the most requests of a step, `tokens` the most tokens.
    """

    def __init__(self, adapter: Adapter, *, requests: int, tokens: int) -> None:
        self._adapter = adapter
        layers = range(adapter.n_layers)
        device = adapter.input_device
        self.slots = Slots(
            layers, adapter.hidden_size, settings=requests, tokens=tokens, dtype=adapter.dtype, device=device
        )
        self._hooks, self._weights = ExitStack(), ExitStack()
        self._hooks.enter_context(adapter.steered())
        self._hooks.enter_context(adapter.write({layer: partial(self._apply, layer) for layer in layers}))
        self._hooks.callback(self._weights.close)
        self._shares: list[_Share] = []
        self._directions: dict[int, tuple[list[str], Tensor]] = {}  # [K, D] by layer, over the norm there
        self._predicting: Tensor | None = None  # places of the tokens that predict, while some request wants to know
        self._seen: dict[int, Tensor] = {}

    def close(self) -> None:
        """Take every hook off the model."""
        self._hooks.close()

    def set_knobs(self, knobs: Mapping[str, AnyKnob], kept: Sequence[DeltaKnob]) -> None:
        """Prepare for knobs by their names: which weights there are, those that are `kept` too, and what to project on.

        Not during a step.
        """
        self._weights.close()
        low = list(dict.fromkeys([*(knob for knob in knobs.values() if isinstance(knob, DeltaKnob)), *kept]))
        self._shares = []
        for path, addend in row_addends(self._adapter.model, [dict.fromkeys(low, 1.0)] if low else []).items():
            own = [(knob, knob.parts[addend.name].rank) for knob in low if addend.name in knob.parts]  # pyright: ignore[reportAttributeAccessIssue]
            share = _Share(addend, [knob for knob, rank in own for _ in range(rank)])
            self._shares.append(share)
            self._weights.enter_context(self._adapter.extend({path: share}))
        self._directions = self._find_directions(knobs)

    def _find_directions(self, knobs: Mapping[str, AnyKnob]) -> dict[int, tuple[list[str], Tensor]]:
        found: dict[int, tuple[list[str], list[Tensor]]] = {}
        for name, knob in knobs.items():
            if projects(knob):
                assert isinstance(knob, Knob)
                names, rows = found.setdefault(knob.site.layer, ([], []))
                names.append(name)
                rows.append(knob.direction / knob.norms[knob.site.layer])
        device = self._adapter.input_device
        return {layer: (names, torch.stack(rows).to(device)) for layer, (names, rows) in found.items()}

    def prepare(self, step: Sequence[Scheduled], turned: Mapping[str, Turned]) -> None:
        """Get ready for the next step; requests that `turned` does not know are not steered."""
        known = [turned.get(part.id) for part in step]
        counts = [part.tokens for part in step]
        self.slots.sync(
            {p.id: k.plan for p, k in zip(step, known, strict=True) if k is not None and k.plan is not None}
        )
        self.slots.fill(
            [part.id for part in step],
            counts,
            [part.begin for part in step],
            [1 if k is None else k.prompt for k in known],
        )
        weights = [{} if k is None else k.weights for k in known]
        for share in self._shares:
            share.fill(weights, counts)
        self._seen = {}
        self._predicting = None
        if self._directions and any(k is not None and k.projections for k in known):
            ends = np.cumsum(counts) - 1
            places = [int(end) for end, part in zip(ends, step, strict=True) if part.predicts]
            self._predicting = torch.tensor(places, device=self._adapter.input_device)

    def projections(self) -> dict[str, list[float]]:
        """Return what was seen in this step by the names of knobs, a number for every request that predicts."""
        found: dict[str, list[float]] = {}
        for layer, seen in self._seen.items():
            found.update(zip(self._directions[layer][0], seen.T.tolist(), strict=True))
        return found

    def _apply(self, layer: int, hidden: Tensor) -> Tensor:
        if layer in self.slots.busy:
            rows = self.slots.rows[: hidden.shape[1]]
            hidden = hidden + self.slots.table[layer].to(hidden.device)[rows.to(hidden.device)]
        if self._predicting is not None and layer in self._directions:
            directions = self._directions[layer][1]
            here = hidden[0, self._predicting.to(hidden.device)].to(directions)
            self._seen[layer] = here @ directions.T
        return hidden


class _Share:
    """What low-rank weight knobs add to one linear layer's output, token by token."""

    def __init__(self, addend: RowAddend, owners: Sequence[DeltaKnob]) -> None:
        self._addend, self._owners = addend, owners  # the knob of each rank
        self._idle = True
        self._strengths = torch.zeros(0, len(owners))

    def fill(self, alphas: Sequence[Mapping[DeltaKnob, float]], counts: Sequence[int]) -> None:
        """Take the alphas of each request of a step, and its number of tokens."""
        rows = np.array([[row.get(knob, 0.0) for knob in self._owners] for row in alphas])
        self._idle = not rows.any()
        if not self._idle:
            self._strengths = torch.from_numpy(np.repeat(rows, counts, axis=0)).to(self._addend.a)  # [T, R]

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        if self._idle:
            return output
        tokens, rank = self._strengths.shape
        if inputs.numel() != tokens * inputs.shape[-1]:
            raise AdapterError(f"{self._addend.name!r} gets some tokens of a step only; knobs cannot change it here.")
        return self._addend.add(inputs, output, self._strengths.view(*inputs.shape[:-1], rank))


def check_place(adapter: Adapter, knob: DeltaKnob) -> None:
    """Raise `KnobError` for a weight that cannot differ from token to token.

    Such are those of no linear layer, and matrices that see some tokens of a step only: of experts, and of the output
    head, which is asked for the tokens that predict.
    """
    row_addends(adapter.model, [{knob: 1.0}])
    head = cast(Any, adapter.model).get_output_embeddings()
    for name in knob.parts:
        if head is not None and adapter.model.get_submodule(name.rpartition(".")[0]) is head:
            raise KnobError(
                f"Knob {knob.name!r} changes {name!r}, the output head, which sees some tokens of a step only. Turn it "
                "by trimtab.generate, or merge it into a checkpoint."
            )
        inside = name.removeprefix(f"{adapter.path}.").partition(".")[2]  # behind the block's number
        if name.startswith(f"{adapter.path}.") and any(part.isdigit() for part in inside.split(".")):
            raise KnobError(
                f"Knob {knob.name!r} changes {name!r}, which belongs to one expert of several and sees some tokens of "
                "a step only. Turn it by trimtab.generate, or merge it into a checkpoint."
            )


def projects(knob: AnyKnob) -> bool:
    """Tell whether there is a direction to project the stream on."""
    return isinstance(knob, Knob) and bool(knob.direction.any())
