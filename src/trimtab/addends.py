"""What knobs at their strengths do at each layer, row by row of a batch: computed once when they are set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, Knob, LookaheadKnob
from trimtab.errors import KnobError, OptionError, brief
from trimtab.kernels import Weigher
from trimtab.positions import RowDose
from trimtab.types import LATER, WHERE, Site, Where, check_strength

Dose = Mapping[AnyKnob, float] | Mapping[Knob, float] | Mapping[DeltaKnob, float] | Mapping[LookaheadKnob, float]
"""Knobs with their strengths."""


ALPHAS = 1000.0
"""Largest alpha, in mean residual norms or in multiples of a difference: beyond it there is nothing but overflow."""


@dataclass(frozen=True)
class Ablation:
    """h - s (h . u) u on the tokens of `where`."""

    where: Where
    strength: Tensor  # [] or [B, 1, 1] float32
    direction: Tensor  # [D] float32, unit

    def delta(self, hidden: Tensor) -> Tensor:
        """Return what is added to a block's output `[B, T, D]` float32."""
        direction = self.direction.to(hidden)
        return -(self.strength.to(hidden) * (hidden @ direction)[..., None]) * direction


@dataclass(frozen=True)
class Push:
    """h + a sign(h . u) u on the tokens of `where`."""

    where: Where
    strength: Tensor  # [] or [B, 1, 1] float32, as a length
    direction: Tensor  # [D] float32, unit

    def delta(self, hidden: Tensor) -> Tensor:
        """Return what is added to a block's output `[B, T, D]` float32."""
        direction = self.direction.to(hidden)
        return self.strength.to(hidden) * (hidden @ direction).sign()[..., None] * direction


@dataclass(frozen=True)
class Pull:
    """h + a sum_j w_j(h) v_j on the tokens of `where`, towards what examples like h ask for."""

    where: Where
    strength: Tensor  # [] or [B, 1, 1] float32, as a length
    weigher: Weigher
    values: Tensor  # [N, D] float32

    def delta(self, hidden: Tensor) -> Tensor:
        """Return what is added to a block's output `[B, T, D]` float32."""
        weights = self.weigher.to(hidden).weights(hidden)  # [B, T, N]
        return self.strength.to(hidden) * (weights @ self.values.to(hidden))


Reaction = Ablation | Push | Pull
"""What a knob does that depends on the stream at the token itself."""


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
    ablations: list[Ablation] = field(default_factory=list[Ablation])  # one upon the other
    reactions: list[Push | Pull] = field(default_factory=list[Push | Pull])  # each to the block's own output
    moves: list[Move] = field(default_factory=list[Move])

    @property
    def adds_only(self) -> bool:
        """Whether nothing is done here that looks at the stream, or ahead."""
        return not (self.ablations or self.reactions or self.moves)

    def wheres(self) -> set[Where]:
        """Return which tokens are meant by anything at this layer."""
        reactions = (*self.ablations, *self.reactions)
        return {*self.adds, *(reaction.where for reaction in reactions), *(m.knob.where for m in self.moves)}

    def repeat(self, times: int) -> LayerTable:
        """Give each row to `times` neighbours, as beam search and `num_return_sequences` lay them out."""
        return LayerTable(
            {where: addend.repeat_interleave(times, 0) for where, addend in self.adds.items()},
            None if self.later is None else self.later.repeat_interleave(times, 0),
            [replace(a, strength=a.strength.repeat_interleave(times, 0)) for a in self.ablations],
            [replace(r, strength=r.strength.repeat_interleave(times, 0)) for r in self.reactions],
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
    layers = {
        knob: {site.layer: _fitting_layer(adapter, knob, site) for site in knob.sites} for row in rows for knob in row
    }
    tables: dict[int, LayerTable] = {}
    for (layer, where), addend in _sum_addends(rows, layers).items():
        addend = (addend[0] if uniform else addend[:, None]).to(adapter.device(layer))
        tables.setdefault(layer, LayerTable()).adds[where] = addend
    for layer, reaction in _reactions(adapter, rows, layers, uniform):
        table = tables.setdefault(layer, LayerTable())
        if isinstance(reaction, Ablation):
            table.ablations.append(reaction)
        else:
            table.reactions.append(reaction)
    for knob, alpha in _moves(doses, uniform).items():
        for layer in knob.layers:
            move = Move(knob, alpha.to(adapter.device(adapter.layer(layer))))
            tables.setdefault(layer, LayerTable()).moves.append(move)
    dtype = adapter.dtype
    for table in tables.values():
        later = [table.adds[where] for where in ("all", "completion") if where in table.adds]
        table.later = torch.stack(later).sum(0).to(dtype) if later else None
        table.adds = {where: addend.to(dtype) for where, addend in table.adds.items()}
        if not all(bool(addend.isfinite().all()) for addend in table.adds.values()):
            raise OptionError(f"A strength is too large for {dtype}; got {[*map(named, rows)]}.")
    return tables


def _reactions(
    adapter: Adapter, rows: Sequence[Mapping[Knob, float]], layers: Mapping[Knob, Mapping[int, int]], uniform: bool
) -> Iterator[tuple[int, Reaction]]:
    """Return what knobs do that looks at the stream, and at which layer, in the order of their names."""
    for knob, resolved in sorted(layers.items(), key=lambda item: item[0].name):
        layer = resolved[knob.site.layer]
        strengths = [row.get(knob, 0.0) for row in rows]
        share = knob.operation == "ablate"
        doses = strengths if share else [knob.length(strength) for strength in strengths]
        if knob.operation == "add" or not any(doses):
            continue
        dtype, device = torch.float32 if share else adapter.dtype, adapter.device(layer)
        dose = torch.tensor(doses[0] if uniform else [[[dose]] for dose in doses], dtype=torch.float32, device=device)
        if not bool(dose.to(dtype).isfinite().all()):
            raise OptionError(f"A strength is too large for {dtype}; got {[*map(named, rows)]}.")
        if knob.kernel is not None:
            weigher, values = knob.kernel.weigher(knob.site).to(dose), knob.kernel.scaled(knob.site)
            yield layer, Pull(knob.where, dose, weigher, values.to(device))
        else:
            yield layer, (Ablation if share else Push)(knob.where, dose, knob.direction.to(device))


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


def sum_addends(added: Iterable[tuple[Knob, float]]) -> dict[int, Tensor]:
    """Sum what knobs that add do at their strengths, in this order, `[D]` float32 by layer."""
    sums: dict[int, Tensor] = {}
    for knob, strength in added:
        for layer, addend in knob.addends(strength).items():
            sums[layer] = sums[layer] + addend if layer in sums else addend
    return sums


def _sum_addends(
    rows: Sequence[Mapping[Knob, float]], layers: Mapping[Knob, Mapping[int, int]]
) -> dict[tuple[int, Where], Tensor]:
    """Sum each row's addends in its own order, `[B, D]` float32 per layer and `where`: neighbours change no bit."""
    sums: dict[tuple[int, Where], dict[int, Tensor]] = {}
    for b, row in enumerate(rows):
        added = [(knob, strength) for knob, strength in row.items() if strength != 0 and knob.operation == "add"]
        for where in WHERE:
            own = [(knob, strength) for knob, strength in added if knob.where == where]
            resolved = {number: layer for knob, _ in own for number, layer in layers[knob].items()}
            for number, addend in sum_addends(own).items():
                sums.setdefault((resolved[number], where), {})[b] = addend
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
            said, content = (
                f"{_fitting_layer(adapter, knob, knob.site)} {knob.where} {knob.operation}",
                _content(knob, strength),
            )
        digests[knob, strength] = hashlib.sha256(said.encode() + content).digest()
    doses: list[RowDose] = []
    for row in rows:
        active = [turned for turned in row.items() if turned[1]]
        digest = hashlib.sha256(b"".join(sorted(digests[turned] for turned in active))).hexdigest() if active else ""
        doses.append(RowDose(digest, all(knob.where in LATER for knob, _ in active)))
    return doses


def _content(knob: Knob, strength: float) -> bytes:
    """Say all that a knob does at its layer, and how strongly."""
    if knob.operation == "add":
        return b"".join(layer.to_bytes(4) + v.numpy().tobytes() for layer, v in knob.addends(strength).items())
    if knob.operation == "ablate":
        return (knob.direction * strength).numpy().tobytes()
    what = knob.direction.numpy().tobytes() if knob.kernel is None else knob.kernel.digest(knob.site)
    return repr(knob.length(strength)).encode() + what


def _way(knob: LookaheadKnob) -> str:
    """Say everything but the gradient and the alpha that a lookahead's displacement depends on."""
    reach = [(layer, knob.norms[layer], knob.scales[layer]) for layer in knob.layers]
    return f"lookahead {knob.where} {knob.backend} {knob.step} {knob.per_token} {reach}"


def named(row: Dose) -> dict[str, float]:
    """Return the strengths by the knobs' names, for messages."""
    return {knob.name: strength for knob, strength in row.items()}


def _fitting_layer(adapter: Adapter, knob: Knob, site: Site) -> int:
    """Return the layer a knob writes to at a site, after checking that its vectors have the model's width."""
    width = knob.width
    if width != adapter.hidden_size:
        name = type(adapter.model).__name__
        raise KnobError(
            f"Knob {knob.name!r} has width {width}; this {name} has hidden size {adapter.hidden_size}. "
            "Use a knob learned on this model."
        )
    return adapter.layer(site.layer)


def react(hidden: Tensor, reaction: Reaction, seen: Tensor, mask: Tensor | None) -> Tensor:
    """Add what a reaction to `seen` is, rounded once; tokens out of the mask and rows at strength 0 keep every bit."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with _exact(hidden):
        moved = (hidden.to(wide) + reaction.delta(seen.float())).to(hidden.dtype)
    if mask is None and not reaction.strength.dim():
        return moved
    touched = reaction.strength.to(hidden.device) != 0  # [] or [B, 1, 1]
    return torch.where(touched if mask is None else touched & (mask.to(hidden.device) != 0), moved, hidden)


def _exact(hidden: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from computing likenesses in 16 bits."""
    kind = hidden.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
