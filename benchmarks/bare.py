"""The ways without any library, which each environment divides its others by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Sides, model_of, prompts, sides, token_ids
from benchmarks.ways import Way, directly

BUDGET = 8192
"""Tokens of a batch, padding included: what `trimtab.capture` takes by default."""


def texts_of(options: dict[str, Any]) -> list[Sides]:
    """Draw the texts that a case of reading names."""
    return sides(options["pairs"], options["tokens"], options["share"])


def joined(texts: list[Sides]) -> list[tuple[str, str]]:
    """Return prompt and answer as one text, for both answers."""
    return [(text.prompt + text.chosen, text.prompt + text.rejected) for text in texts]


def batches(rows: list[list[int]], budget: int, *, even: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Pad rows of ids to batches of like length, the longest first: ids and mask `[B, T]`.

    With `even` a batch of a quarter of the budget ends before a row that is an eighth shorter than its first, which is
    how `trimtab.capture` saves padding.
    """
    groups: list[list[list[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        width = len(groups[-1][0]) if groups else 0
        full = not groups or (len(groups[-1]) + 1) * width > budget
        if not full and not (even and len(row) < 7 / 8 * width and 4 * len(groups[-1]) * width >= budget):
            groups[-1].append(row)
        else:
            groups.append([row])
    found: list[tuple[Tensor, Tensor]] = []
    for group in groups:
        width = len(group[0])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in group])
        found.append((ids, mask))
    return found


def reading(options: dict[str, Any], *, even: bool = False) -> Way:
    """Run the decoder on all texts, sorted by length, without LM head, KV cache or anything kept.

    The batches are made beforehand, so that neither rendering nor padding counts. The ids of the first one are the
    mark, by which both environments are seen to read the same.
    """
    model = model_of(options)
    pairs = joined(texts_of(options))
    made = batches(token_ids([text for pair in pairs for text in pair]), options.get("budget", BUDGET), even=even)

    @torch.no_grad()
    def run() -> Tensor:
        for ids, mask in made:
            model.model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        return made[0][0]

    return directly(run)


def generate(model: Any, ids: Tensor, new: int) -> Tensor:
    """Generate exactly `new` tokens for each row, greedily, with a KV cache."""
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


@torch.no_grad()
def score(model: Any, ids: Tensor) -> Tensor:
    """Compute the logits of all tokens, without a KV cache; return the likeliest token after each row."""
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[:, -1].argmax(-1)


def ids_of(options: dict[str, Any]) -> Tensor:
    """Draw the rows that a case of generating or scoring names."""
    return prompts(options["rows"], options["prompt"], options["device"])


def generating(options: dict[str, Any]) -> Way:
    """Generate without steering."""
    model, ids = model_of(options), ids_of(options)
    return directly(lambda: generate(model, ids, options["new"]))


def scoring(options: dict[str, Any]) -> Way:
    """Score without steering."""
    model, ids = model_of(options), ids_of(options)
    return directly(lambda: score(model, ids))


def weights(model: nn.Module) -> int:
    """Count the bytes of a model's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
