"""Ways to bring the same tokens to a model, and the positions that each `where` means in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.check.bench import LENGTHS, NEW, Bench
from trimtab.ops import Side
from trimtab.types import Where


class Way(NamedTuple):
    """A way to bring the same tokens to the model."""

    run: Callable[[], object]
    rows: list[list[int]]  # what is padded at first
    lengths: list[int]  # tokens of each prompt
    totals: list[int]  # tokens of each row that the model sees
    side: Side = "left"


def all_ways(bench: Bench) -> dict[str, Way]:
    """Return every way by its name."""
    eight = [bench.rows[i % len(LENGTHS)] for i in range(8)]
    forced = [row + bench.new[i].tolist() for i, row in enumerate(bench.rows)]
    second = [row + bench.rows[0][:2] for row in forced]  # what a second turn brings along

    def generated(rows: list[list[int]], **options: Any) -> Way:
        lengths = [len(row) for row in rows]
        # the last new token is never fed back
        return Way(partial(bench.generate, rows, **options), rows, lengths, [n + NEW - 1 for n in lengths])

    def whole(side: Side) -> Way:
        totals = [len(row) for row in forced]
        return Way(partial(bench.logits, forced, side), forced, list(LENGTHS), totals, side)

    return {
        "KV cache": generated(bench.rows),
        "no KV cache": generated(bench.rows, use_cache=False),
        "alone": generated(bench.rows[:1]),
        "batch of 8": generated(eight),
        "beams": generated(bench.rows, num_beams=2),
        "second turn": generated(second),
        "prompt in pieces": generated(bench.rows[:2], prefill_chunk_size=3),
        "left padding": whole("left"),
        "right padding": whole("right"),
    }


def possible(way: Way) -> bool:
    """Tell whether the model itself, without any knob, can run this way."""
    try:
        way.run()
    except Exception:  # noqa: BLE001  # whatever somebody's model raises
        return False
    return True


def span(where: Where, prompt: int, total: int) -> list[int]:
    """Return the positions of `where` in a row of `total` tokens whose first `prompt` are the prompt."""
    spans = {"all": (0, total), "prompt": (0, prompt), "context": (0, prompt - 1)}
    return list(range(*spans.get(where, (prompt - 1, total))))


def mask_of(lengths: Sequence[int], side: Side) -> Tensor:
    """Return the attention mask `[B, T]` bool of rows of these lengths, padded on one side."""
    width = max(lengths)
    columns = torch.arange(width)
    return torch.stack([columns >= width - n if side == "left" else columns < n for n in lengths])
