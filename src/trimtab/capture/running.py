"""Texts through the decoder, up to the highest layer that is read: what they begin with alike once, then each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.adapter import Adapter, cache_name, full_cache, shared_rows
from trimtab.capture.batches import Group, parts_of, smaller
from trimtab.errors import AdapterError
from trimtab.ops import Side
from trimtab.render import Renderer
from trimtab.texts import Text

NEAR = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference, as a share of a token's norm, that rounding explains; of other dtypes `NEAR_HALF`."""
NEAR_HALF = 0.05


class Read(NamedTuple):
    """What texts hold, on the CPU in float32."""

    means: Tensor  # [R, L, D], row by row in the order of the texts and of what each of them reads
    norms: Tensor  # [n, L], of the tokens whose norms count, in no order


class Runner:
    """Runs texts through a model and reads `layers`; no gradients, no hook is left, the LM head is never run."""

    def __init__(self, adapter: Adapter, renderer: Renderer, layers: Sequence[int], padding: Side) -> None:
        self._adapter, self._renderer, self._layers = adapter, renderer, list(layers)
        self._padding: Side = padding
        self._cache_name = cache_name(adapter)

    def can_share(self, groups: Sequence[Group]) -> bool:
        """Tell whether this model reads texts behind a shared head as it reads them whole, by trying a few tokens.

        Rounding may part the two readings of a text, but by far less than what tells it from another text. Whatever an
        unusual model does with a cache that it did not make itself, the worst that follows is that texts are run whole.
        """
        shared = sorted((g for g in groups if g.head), key=lambda g: g.head)
        if not shared or self._cache_name is None:
            return False
        trial = [_shortened(shared[0], 3), _shortened(shared[-1], 5)]
        try:
            ours = self._behind_heads(trial, budget=10**6).means
        except (AttributeError, IndexError, NotImplementedError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        whole = self._whole([text for g in trial for text in g.texts]).means
        near = NEAR.get(self._adapter.dtype, NEAR_HALF) * whole.norm(dim=-1)
        apart = (whole - whole.roll(1, dims=0)).norm(dim=-1) / 4
        return bool(((ours - whole).norm(dim=-1) <= torch.minimum(near, apart)).all())

    def run(self, batch: list[Group], budget: int) -> Read:
        """Run a batch, in halves when memory runs out."""
        try:
            if batch[0].head:
                return self._behind_heads(batch, budget)
            return self._whole([text for g in batch for text in g.texts])
        except torch.OutOfMemoryError:
            parts = smaller(batch)
            if not parts:
                raise
        # outside the handler, whose traceback would keep the failed batch alive
        torch.cuda.empty_cache()
        reads = [self.run(part, max(1, budget // 2)) for part in parts]
        return Read(torch.cat([read.means for read in reads]), torch.cat([read.norms for read in reads]))

    def _whole(self, texts: list[Text]) -> Read:
        padded = self._renderer.pad([text.ids for text in texts], side=self._padding)
        width = padded.input_ids.shape[1]
        starts = [width - len(text.ids) if self._padding == "left" else 0 for text in texts]
        with self._adapter.watch(self._layers, reading := _Reading(texts, starts, width)):
            self._adapter.run_to(max(self._layers), **self._on_device(padded._asdict()))
        return reading.read()

    def _behind_heads(self, batch: list[Group], budget: int) -> Read:
        """Run the heads once, and then the tails in parts, each behind a copy of its head's keys and values.

        Heads are padded on the left and tails on the right, so that the tokens of a row stand side by side: a sliding
        window counts columns.
        """
        top, name = max(self._layers), self._cache_name
        assert name is not None  # else `can_share` has said no
        heads = self._renderer.pad([g.texts[0].ids[: g.head] for g in batch], side="left")
        width, cache = heads.input_ids.shape[1], full_cache()
        self._adapter.run_to(top, **self._on_device(heads._asdict()), **{name: cache}, use_cache=True)
        texts = [text for g in batch for text in g.texts]
        owners = [row for row, g in enumerate(batch) for _ in g.texts]
        parts = parts_of(texts, [batch[owner].head for owner in owners], width, budget)
        found: list[Read] = []
        for part in parts:
            rows = torch.tensor([owners[i] for i in part])
            counts = [batch[owners[i]].head for i in part]
            own = [texts[i] for i in part]
            tails = self._renderer.pad([t.ids[n:] for t, n in zip(own, counts, strict=True)], side="right")
            inputs = {
                "input_ids": tails.input_ids,
                "attention_mask": torch.cat([heads.attention_mask[rows], tails.attention_mask], dim=1),
                "position_ids": tails.position_ids + torch.tensor(counts)[:, None],
            }
            reading = _Reading(own, [-n for n in counts], tails.input_ids.shape[1])
            with self._adapter.watch(self._layers, reading):
                self._adapter.run_to(top, **self._on_device(inputs), **{name: shared_rows(cache, rows)}, use_cache=True)
            found.append(reading.read())
        return _in_order(found, parts, texts)

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self._adapter.input_device
        return {name: value.to(device) for name, value in inputs.items()}


def _shortened(whole: Group, head: int) -> Group:
    """Return a group with a head of a few tokens and tails of as many, of which the last is read."""
    texts: list[Text] = []
    for text in whole.texts[:2]:
        ids = text.ids[whole.head - head : whole.head + head]
        texts.append(text._replace(ids=ids, reads={0: slice(len(ids) - 1, len(ids))}, norms=slice(0, 0)))
    return Group(head, texts)


def _in_order(found: Sequence[Read], parts: Sequence[Sequence[int]], texts: Sequence[Text]) -> Read:
    """Put together what parts of a batch read, in the order of the texts."""
    rows: dict[int, Tensor] = {}
    for read, part in zip(found, parts, strict=True):
        rows |= zip(part, read.means.split([len(texts[i].reads) for i in part]), strict=True)
    return Read(torch.cat([rows[i] for i in range(len(texts))]), torch.cat([read.norms for read in found]))


class _Spots(NamedTuple):
    """Tokens of a batch, `n` in all."""

    rows: Tensor  # [n] int64
    columns: Tensor  # [n] int64

    def of(self, acts: Tensor) -> Tensor:
        """Return what `acts [B, T, D]` hold there, `[n, D]` float32; padding is not touched, whatever it holds."""
        return acts[self.rows, self.columns].float()

    def on(self, device: torch.device) -> _Spots:
        """Return the same there."""
        return _Spots(self.rows.to(device), self.columns.to(device))


class _Reading:
    """Looks at the blocks of one forward, and keeps the means and norms that its texts ask for.

    `starts` are the columns of the texts' first tokens, negative where those were run before. `width` counts columns.
    """

    def __init__(self, texts: Sequence[Text], starts: Sequence[int], width: int) -> None:
        spans = [(b, s, at) for b, (t, at) in enumerate(zip(texts, starts, strict=True)) for s in t.reads.values()]
        counted = [(b, t.norms, at) for b, (t, at) in enumerate(zip(texts, starts, strict=True))]
        self._shape = len(texts), width
        self._sizes = torch.tensor([s.stop - s.start for _, s, _ in spans], dtype=torch.long)
        self._single = bool((self._sizes == 1).all())
        self._read, self._counted = _spots(spans), _spots(counted)
        self._device = torch.device("cpu")
        self._means: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}

    def __call__(self, layer: int, acts: Tensor) -> None:
        """Look at a block's output `[B, T, D]`."""
        check_blocks(tuple(acts.shape[:2]), *self._shape)
        if acts.device != self._device:  # once, and not at every layer: it waits for an accelerator
            self._device, self._sizes = acts.device, self._sizes.to(acts.device)
            self._read, self._counted = self._read.on(acts.device), self._counted.on(acts.device)
        values = self._read.of(acts)
        if not self._single:  # some reads are means over tokens; single tokens are copied
            sizes, count = self._sizes, len(values)
            owners = torch.repeat_interleave(torch.arange(len(sizes), device=acts.device), sizes, output_size=count)
            sums = values.new_zeros(len(sizes), acts.shape[-1]).index_add_(0, owners, values)
            values = sums / sizes[:, None]
        self._means[layer] = values
        self._norms[layer] = self._counted.of(acts).norm(dim=-1)

    def read(self) -> Read:
        """Return what was seen, in order of layer; it comes to the CPU at once, after the last block."""
        seen = ([kept[layer].to(self._device) for layer in sorted(kept)] for kept in (self._means, self._norms))
        means, norms = (torch.stack(kept, dim=1).cpu() for kept in seen)
        return Read(means, norms)


def _spots(spans: Sequence[tuple[int, slice, int]]) -> _Spots:
    places = [(b, column) for b, s, at in spans for column in range(s.start + at, s.stop + at)]
    both = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
    return _Spots(both[:, 0].contiguous(), both[:, 1].contiguous())


def check_blocks(held: tuple[int, ...], rows: int, tokens: int) -> None:
    """Raise `AdapterError` where a model holds other rows or tokens than it was given."""
    if held != (rows, tokens):
        raise AdapterError(
            f"The blocks hold {held[0]} rows of {held[1]} tokens where the texts have {rows} of {tokens}, so "
            "that positions are not known: this model adds tokens of its own, or turns rows into columns."
        )
