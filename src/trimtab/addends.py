"""What knobs at their strengths do at each layer, row by row of a batch: computed once when they are set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, Knob, LookaheadKnob
from trimtab.errors import KnobError, OptionError, brief
from trimtab.positions import RowDose
from trimtab.types import LATER, Where, check_strength

Dose = Mapping[AnyKnob, float] | Mapping[Knob, float] | Mapping[DeltaKnob, float] | Mapping[LookaheadKnob, float]
"""Knobs with their strengths."""


@dataclass
class Ablation:
    """h - s (h . u) u on the tokens of `where`."""

    where: Where
    direction: Tensor  # [D] float32, unit
    strength: Tensor  # [] or [B, 1] float32


@dataclass
class Move:
    """h + alpha d on the tokens of the knob's `where`, with d what its second stream says of each token."""

    knob: LookaheadKnob
    alpha: Tensor  # [] or [B, 1, 1] float32


@dataclass
class LayerTable:
    """What happens at one layer. Addends are `[D]` where every row has the same, else `[B, 1, D]`."""

    adds: dict[Where, Tensor] = field(default_factory=dict[Where, Tensor])
    later: Tensor | None = None  # the addends of "all" and "completion" in one
    ablations: list[Ablation] = field(default_factory=list[Ablation])
    moves: list[Move] = field(default_factory=list[Move])

    def wheres(self) -> set[Where]:
        """Return which tokens are meant by anything at this layer."""
        return {*self.adds, *(ablation.where for ablation in self.ablations), *(m.knob.where for m in self.moves)}

    def repeat(self, times: int) -> LayerTable:
        """Give each row to `times` neighbours, as beam search and `num_return_sequences` lay them out."""
        return LayerTable(
            {where: addend.repeat_interleave(times, 0) for where, addend in self.adds.items()},
            None if self.later is None else self.later.repeat_interleave(times, 0),
            [Ablation(a.where, a.direction, a.strength.repeat_interleave(times, 0)) for a in self.ablations],
            [Move(m.knob, m.alpha.repeat_interleave(times, 0)) for m in self.moves],
        )


def check_dose(dose: Dose) -> dict[AnyKnob, float]:
    """Return a row's knobs with their strengths as numbers; raises `OptionError` for what is neither."""
    if not isinstance(dose, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"Settings map knobs to strengths, as in {{knob: 1.0}}; got {brief(dose)} for a row.")
    for knob in dose:
        if not isinstance(knob, AnyKnob):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"steer() takes knobs, not {knob!r}. Resolve names with Rack.resolve(setting).")
    return {knob: check_strength(value, f"strength of {knob.name!r}") for knob, value in dose.items()}


def turned_weights(row: Dose) -> dict[DeltaKnob, float]:
    """Return the weight knobs of a row with their strengths, those that do nothing left out."""
    return {knob: s for knob, s in row.items() if isinstance(knob, DeltaKnob) and knob.alpha(s)}


def build_tables(adapter: Adapter, doses: Sequence[Mapping[AnyKnob, float]], uniform: bool) -> dict[int, LayerTable]:
    """Sum what the knobs do at each layer; knobs at strength 0 in every row, and their layers, are left out."""
    rows = [{knob: s for knob, s in dose.items() if isinstance(knob, Knob)} for dose in doses]
    layers = {knob: _fitting_layer(adapter, knob) for row in rows for knob in row}
    tables: dict[int, LayerTable] = {}
    for (layer, where), addend in _sum_addends(rows, layers).items():
        addend = (addend[0] if uniform else addend[:, None]).to(adapter.device(layer))
        tables.setdefault(layer, LayerTable()).adds[where] = addend
    for knob, layer in sorted(layers.items(), key=lambda item: item[0].name):
        strengths = [row.get(knob, 0.0) for row in rows]
        if knob.operation == "ablate" and any(strengths):
            device = adapter.device(layer)
            strength = torch.tensor(strengths[0] if uniform else [[s] for s in strengths], device=device)
            if not bool(strength.isfinite().all()):
                raise OptionError(f"A strength is too large for float32; got {[*map(named, rows)]}.")
            ablation = Ablation(knob.where, knob.direction.to(device), strength)
            tables.setdefault(layer, LayerTable()).ablations.append(ablation)
    for knob, alpha in _moves(doses, uniform).items():
        for layer in knob.layers:
            move = Move(knob, alpha.to(adapter.device(adapter.layer(layer))))
            tables.setdefault(layer, LayerTable()).moves.append(move)
    for table in tables.values():
        later = [table.adds[where] for where in ("all", "completion") if where in table.adds]
        table.later = torch.stack(later).sum(0).to(adapter.dtype) if later else None
        table.adds = {where: addend.to(adapter.dtype) for where, addend in table.adds.items()}
        if not all(bool(addend.isfinite().all()) for addend in table.adds.values()):
            raise OptionError(f"A strength is too large for {adapter.dtype}; got {[*map(named, rows)]}.")
    return tables


def _moves(doses: Sequence[Mapping[AnyKnob, float]], uniform: bool) -> dict[LookaheadKnob, Tensor]:
    """Return the alphas of every lookahead knob that is turned in any row, `[]` or `[B, 1, 1]` float32."""
    moves: dict[LookaheadKnob, Tensor] = {}
    for knob in dict.fromkeys(knob for dose in doses for knob in dose if isinstance(knob, LookaheadKnob)):
        alphas = [knob.alpha(dose.get(knob, 0.0)) for dose in doses]
        if any(alphas):
            alpha = torch.tensor(alphas[0] if uniform else [[[a]] for a in alphas], dtype=torch.float32)
            if not bool(alpha.isfinite().all()):
                raise OptionError(f"A strength is too large for float32; got {[*map(named, doses)]}.")
            moves[knob] = alpha
    return moves


def _sum_addends(rows: Sequence[Mapping[Knob, float]], layers: Mapping[Knob, int]) -> dict[tuple[int, Where], Tensor]:
    """Sum each row's addends in its own order, `[B, D]` float32 per layer and `where`: neighbours change no bit."""
    sums: dict[tuple[int, Where], dict[int, Tensor]] = {}
    for b, row in enumerate(rows):
        for knob, strength in row.items():
            if strength != 0 and knob.operation == "add":
                group = sums.setdefault((layers[knob], knob.where), {})
                addend = knob.addend(strength)
                group[b] = group[b] + addend if b in group else addend
    return {
        key: torch.stack([group.get(b, torch.zeros_like(next(iter(group.values())))) for b in range(len(rows))])
        for key, group in sums.items()
    }


def row_doses(adapter: Adapter, rows: Sequence[Mapping[AnyKnob, float]]) -> list[RowDose]:
    """Tell what is done to each row from anything else, by the vectors themselves: names may be used again."""
    digests: dict[tuple[AnyKnob, float], bytes] = {}
    for knob, strength in {turned for row in rows for turned in row.items() if turned[1]}:
        if isinstance(knob, DeltaKnob):
            said, content = f"weights {knob.alpha(strength)!r}", knob.digest.encode()
        elif isinstance(knob, LookaheadKnob):
            said, content = f"{knob.alpha(strength)!r} {_way(knob)}", knob.digest.encode()
        else:
            vector = knob.addend(strength) if knob.operation == "add" else knob.direction * strength
            said = f"{_fitting_layer(adapter, knob)} {knob.where} {knob.operation}"
            content = vector.numpy().tobytes()
        digests[knob, strength] = hashlib.sha256(said.encode() + content).digest()
    doses: list[RowDose] = []
    for row in rows:
        active = [turned for turned in row.items() if turned[1]]
        digest = hashlib.sha256(b"".join(sorted(digests[turned] for turned in active))).hexdigest() if active else ""
        doses.append(RowDose(digest, all(knob.where in LATER for knob, _ in active)))
    return doses


def _way(knob: LookaheadKnob) -> str:
    """Say everything but the gradient and the alpha that a lookahead's displacement depends on."""
    reach = [(layer, knob.norms[layer], knob.scales[layer]) for layer in knob.layers]
    return f"lookahead {knob.where} {knob.backend} {knob.step} {knob.per_token} {reach}"


def named(row: Dose) -> dict[str, float]:
    """Return the strengths by the knobs' names, for messages."""
    return {knob.name: strength for knob, strength in row.items()}


def _fitting_layer(adapter: Adapter, knob: Knob) -> int:
    """Return the layer a knob writes to, after checking that its vector has the model's width."""
    width = int(knob.direction.shape[-1])
    if width != adapter.hidden_size:
        name = type(adapter.model).__name__
        raise KnobError(
            f"Knob {knob.name!r} has width {width}; this {name} has hidden size {adapter.hidden_size}. "
            "Use a knob learned on this model."
        )
    return adapter.layer(knob.site.layer)


def ablate(hidden: Tensor, ablation: Ablation, mask: Tensor | None) -> Tensor:
    """Remove a share of the component along a direction, in float32."""
    wide = hidden.float()
    direction = ablation.direction.to(wide)
    share = (ablation.strength.to(wide) * (wide @ direction))[..., None]  # [B, T, 1]
    if mask is not None:
        share = share * mask.to(share)
    return (wide - share * direction).to(hidden.dtype)
