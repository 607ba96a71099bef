"""Steer a live model: knobs at strengths, per row of a batch, at no cost that can be measured.

Everything that depends on the knobs is computed when they are set: one addend per steered layer and row. A forward
adds it to the block's output, and a decode step does nothing else. Positions are absolute, so runs with and without a
KV cache agree; padding is never steered; nothing is left on the model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter, CallInfo
from trimtab.artifact import Knob
from trimtab.errors import KnobError, OptionError
from trimtab.types import Where, check_strength

Dose = Mapping[Knob, float]
"""Knobs with their strengths."""


_Masks = dict[Where, Tensor | None]
"""The tokens of one call that a `where` means, as a mask, or None for all of them; one left out means no token."""


@dataclass
class _Ablation:
    """h - s (h . u) u on the tokens of `where`."""

    where: Where
    direction: Tensor  # [D] float32, unit
    strength: Tensor  # [] or [B, 1] float32


@dataclass
class _Layer:
    """What happens at one layer. Addends are `[D]` where every row has the same, else `[B, 1, D]`."""

    adds: dict[Where, Tensor] = field(default_factory=dict[Where, Tensor])
    later: Tensor | None = None  # the addends of "all" and "completion" in one
    ablations: list[_Ablation] = field(default_factory=list[_Ablation])

    def wheres(self) -> set[Where]:
        return {*self.adds, *(ablation.where for ablation in self.ablations)}

    def repeat(self, times: int) -> _Layer:
        """Give each row to `times` neighbours, as beam search and `num_return_sequences` lay them out."""
        return _Layer(
            {where: addend.repeat_interleave(times, 0) for where, addend in self.adds.items()},
            None if self.later is None else self.later.repeat_interleave(times, 0),
            [_Ablation(a.where, a.direction, a.strength.repeat_interleave(times, 0)) for a in self.ablations],
        )


@dataclass
class _Prompt:
    """The prompt being continued: where it ends, in columns of the KV cache (padding included)."""

    lengths: Tensor  # [B] or [1], tokens of each row's prompt
    pads: Tensor  # [B] or [1], padding so far
    end: int  # from this column on, every row is past its prompt


class Steering:
    """A model being steered; `set` changes the knobs without leaving the context."""

    def __init__(self, adapter: Adapter, prompt_lengths: Sequence[int] | None = None) -> None:
        self._adapter = adapter
        self._lengths = None if prompt_lengths is None else _check_lengths(prompt_lengths)
        self._hooks = ExitStack()
        self._rows: int | None = None
        self._tables: dict[int, _Layer] = {}
        self._expanded: tuple[int, dict[int, _Layer]] = (1, {})
        self._prompt: _Prompt | None = None
        self._needs_prompt = False
        self._masks: _Masks = {}
        self._unmasked = False  # every token of this call takes the addends of "all" and "completion", whole

    def set(self, settings: Dose | Sequence[Dose]) -> None:
        """Steer with these knobs from the next forward on; an error leaves the model unsteered.

        `settings` maps knobs to strengths, or is a sequence of such mappings, one per row of the batch. Ablations come
        first, then additions. Raises `OptionError` for strengths that are not finite numbers, and `KnobError` for a
        knob of another width.
        """
        self.clear()
        if not isinstance(settings, Mapping | Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"Settings map knobs to strengths, as in {{knob: 1.0}}; got {settings!r}.")
        uniform = isinstance(settings, Mapping)
        rows = [_check_dose(row) for row in ([settings] if isinstance(settings, Mapping) else settings)]
        if not rows:
            raise OptionError("Got no knob settings; pass one mapping for all rows, or one per row of the batch.")
        if not uniform and self._lengths is not None and len(self._lengths) != len(rows):
            raise OptionError(f"Got {len(rows)} knob settings but {len(self._lengths)} prompt lengths.")
        self._rows = None if uniform else len(rows)
        self._tables = _build(self._adapter, rows, uniform)
        self._expanded = (1, self._tables)
        self._needs_prompt = any(layer.wheres() != {"all"} for layer in self._tables.values())
        if self._tables:
            functions = {layer: partial(self._apply, layer) for layer in self._tables}
            self._hooks.enter_context(self._adapter.write(functions, self._before))

    def clear(self) -> None:
        """Take every hook off the model."""
        self._hooks.close()

    def _before(self, call: CallInfo) -> None:
        """Work out, once per forward, which tokens each knob may touch."""
        self._match_rows(call.batch)
        if self._needs_prompt:
            past, prompt = call.past, self._prompt
            if prompt is None or past < prompt.end:
                real = call.real_tokens()
                if past == 0 or prompt is None:
                    prompt = self._prompt = self._start_prompt(call, past, real)
                self._set_masks(_place(prompt, past, call.tokens, real))
                self._unmasked = False
                return
        real = None if call.tokens == 1 else call.real_tokens()  # a decode step has no padding: do not look
        self._set_masks({"all": real, "completion": real})
        self._unmasked = real is None

    def _set_masks(self, masks: _Masks) -> None:
        dtype = self._adapter.dtype
        self._masks = {where: None if mask is None else mask[..., None].to(dtype) for where, mask in masks.items()}

    def _match_rows(self, batch: int) -> None:
        """Repeat the rows' addends if the model runs a multiple of them."""
        if self._lengths is not None and batch % len(self._lengths):
            raise OptionError(f"The model got {batch} rows, not a multiple of the {len(self._lengths)} prompt lengths.")
        if self._rows is None:
            return
        times, left = divmod(batch, self._rows)
        if left or not times:
            raise OptionError(f"The model got {batch} rows, not a multiple of the {self._rows} knob settings.")
        if times != self._expanded[0]:
            tables = self._tables
            self._expanded = (times, {layer: table.repeat(times) for layer, table in tables.items()})

    def _start_prompt(self, call: CallInfo, past: int, real: Tensor | None) -> _Prompt:
        """Note where the prompt ends that begins with this call."""
        if self._lengths is None and (past or not call.caching):
            why = "this call continues a KV cache made elsewhere" if past else "this call uses no KV cache"
            raise OptionError(
                "A knob that steers a part of the tokens (where='prompt', 'context' or 'completion') needs to know "
                f"where the prompt ends, and {why}. "
                "Pass prompt_lengths to steer(), or use_cache=True to the model if the whole input is the prompt."
            )
        pads = torch.zeros(1, dtype=torch.long, device=call.device)
        if self._lengths is None:
            return _Prompt(torch.full_like(pads, call.tokens) if real is None else real.sum(1), pads, call.tokens)
        mask, end = call.attention_mask, max(self._lengths)
        if past and mask is not None and mask.dim() == 2 and mask.shape[1] > past:
            pads = (mask[:, :past] == 0).sum(1)
            end += int(pads.max())
        lengths = torch.tensor(self._lengths, device=call.device).repeat_interleave(call.batch // len(self._lengths))
        return _Prompt(lengths, pads, end)

    def _apply(self, layer: int, hidden: Tensor) -> Tensor:
        """Steer a block's output `[B, T, D]`; the hot path is the one addition of a decode step."""
        table = self._expanded[1][layer]
        for ablation in table.ablations:
            if ablation.where in self._masks:
                hidden = _ablate(hidden, ablation, self._masks[ablation.where])
        if self._unmasked:
            return hidden if table.later is None else hidden + table.later.to(hidden)
        for where, addend in table.adds.items():
            if where not in self._masks:
                continue
            mask = self._masks[where]
            if mask is None:
                hidden = hidden + addend.to(hidden)
            else:
                hidden = torch.addcmul(hidden, mask.to(hidden), addend.to(hidden))
        return hidden


@contextmanager
def steer(
    model: nn.Module | Adapter, settings: Dose | Sequence[Dose], *, prompt_lengths: Sequence[int] | None = None
) -> Generator[Steering]:
    """Steer `model` inside the context, with its ordinary API: `model.generate(...)`, `model(...)`.

    `settings` maps knobs to strengths, for all rows or (a sequence of mappings) row by row; the model may run a
    multiple of these rows, as beam search does. Strength 0 everywhere is bitwise the plain model. Pass an `Adapter` as
    `model` to name the layers of an unusual model, or to save the search for them.

    A knob's `where` counts from the prompt's end. The prompt is the first call with an empty KV cache; for calls
    without a cache, for prompts fed in pieces and for assisted decoding (whose first call holds guesses as well), give
    the number of prompt tokens per row in `prompt_lengths`, padding not counted. A call with one new token per row is
    taken to decode real tokens, whatever its mask says.

    Example: `with steer(model, {knob: 1.0}): model.generate(**inputs)`.
    """
    steering = Steering(model if isinstance(model, Adapter) else Adapter(model), prompt_lengths)
    try:
        steering.set(settings)
        yield steering
    finally:
        steering.clear()


def _place(prompt: _Prompt, past: int, tokens: int, real: Tensor | None) -> _Masks:
    """Compare the absolute positions of the tokens in one call with the ends of the prompts, `[B or 1, T]` bool."""
    columns = torch.arange(past, past + tokens, device=prompt.pads.device)
    pads = prompt.pads[:, None]  # [B or 1, T or 1], padding before each column
    if real is not None:
        pads = pads + (~real).cumsum(1)
        prompt.pads = pads[:, -1]
        prompt.end = int((prompt.lengths + prompt.pads).max())
    positions, lengths = columns - pads, prompt.lengths[:, None]
    in_prompt, in_context, in_completion = positions < lengths, positions < lengths - 1, positions >= lengths - 1
    if real is None:
        return {"all": None, "prompt": in_prompt, "context": in_context, "completion": in_completion}
    return {"all": real, "prompt": in_prompt & real, "context": in_context & real, "completion": in_completion & real}


def _check_lengths(lengths: Sequence[int]) -> list[int]:
    whole = isinstance(lengths, Sequence) and all(type(length) is int for length in lengths)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not whole or not lengths or min(lengths) < 1:
        raise OptionError(f"Prompt lengths are a list of whole numbers, 1 or more, one per row; got {lengths!r}.")
    return list(lengths)


def _check_dose(dose: Dose) -> dict[Knob, float]:
    for knob in dose:
        if not isinstance(knob, Knob):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"steer() takes knobs, not {knob!r}. Resolve names with Rack.resolve(setting).")
    return {knob: check_strength(value, f"strength of {knob.name!r}") for knob, value in dose.items()}


def _build(adapter: Adapter, rows: Sequence[Mapping[Knob, float]], uniform: bool) -> dict[int, _Layer]:
    """Sum what the knobs do at each layer; knobs at strength 0 in every row, and their layers, are left out."""
    layers = {knob: _fitting_layer(adapter, knob) for row in rows for knob in row}
    tables: dict[int, _Layer] = {}
    for (layer, where), addend in _sum_addends(rows, layers).items():
        addend = (addend[0] if uniform else addend[:, None]).to(adapter.device(layer))
        tables.setdefault(layer, _Layer()).adds[where] = addend
    for knob, layer in sorted(layers.items(), key=lambda item: item[0].name):
        strengths = [row.get(knob, 0.0) for row in rows]
        if knob.operation == "ablate" and any(strengths):
            device = adapter.device(layer)
            strength = torch.tensor(strengths[0] if uniform else [[s] for s in strengths], device=device)
            ablation = _Ablation(knob.where, knob.direction.to(device), strength)
            tables.setdefault(layer, _Layer()).ablations.append(ablation)
    for table in tables.values():
        later = [table.adds[where] for where in ("all", "completion") if where in table.adds]
        table.later = torch.stack(later).sum(0).to(adapter.dtype) if later else None
        table.adds = {where: addend.to(adapter.dtype) for where, addend in table.adds.items()}
        if not all(bool(addend.isfinite().all()) for addend in table.adds.values()):
            raise OptionError(f"A strength is too large for {adapter.dtype}; got {[*map(_named, rows)]}.")
    return tables


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


def _named(row: Mapping[Knob, float]) -> dict[str, float]:
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


def _ablate(hidden: Tensor, ablation: _Ablation, mask: Tensor | None) -> Tensor:
    """Remove a share of the component along a direction, in float32."""
    wide = hidden.float()
    direction = ablation.direction.to(wide)
    share = (ablation.strength.to(wide) * (wide @ direction))[..., None]  # [B, T, 1]
    if mask is not None:
        share = share * mask.to(share)
    return (wide - share * direction).to(hidden.dtype)
