"""Pairs through a model to activations: what the residual stream holds at the candidate sites, per pair."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.checkpoint import Checkpoint, describe_model, fingerprint
from trimtab.errors import AdapterError, OptionError, PairsError
from trimtab.ops import Moments, Side
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.team import ALONE, Team
from trimtab.texts import Format, Text, check_context, expand_positions, render_pairs
from trimtab.types import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the model's residual stream holds for the two answers of every pair, in the order of the pairs."""

    sites: tuple[Site, ...]
    """S sites, layers in order, positions of a layer together."""
    chosen: Tensor
    """`[N, S, D]` float32."""
    rejected: Tensor
    """`[N, S, D]` float32."""
    norms: dict[int, float]
    """Mean residual norm per layer over the answers' tokens as the assistant's turn, a sequence's first left out."""
    lengths: Tensor
    """Tokens of the chosen and the rejected answer, `[N, 2]` int64."""
    format: Format
    norm_tokens: int
    """Number of tokens behind each of `norms`."""


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    positions: Sequence[str],
    layers: Sequence[int] | None = None,
    format: Format,
    token_budget: int = 8192,
    padding: Side = "right",
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
) -> Evidence:
    """Read the residual stream of every pair's answers at every candidate site, layers x positions.

    A position is a token of the rendered answer: `post_instruction[-k]` (the template's tokens after the user's slot,
    format "response_as_user"), `response_end[-k]` (the tokens that close the answer, format "question_response"),
    `last` (the answer's last token), `response_mean` (the mean over the answer's tokens), and `demonstrated` (last
    prompt token of another pair's question after one turn that shows the answer; the format does not matter). A name
    without an index stands for all its tokens. `layers` None means all; negative ones count from the end.

    Batches hold at most `token_budget` tokens, padding included, and are halved when memory runs out. Blocks above the
    highest layer and the LM head are not run. No gradients; dropout is off; the model is left as it was. `progress` is
    called with the number of texts that are done and that of all.

    `checkpoint` is a folder that keeps finished batches: the same call takes them from there after it was stopped or
    killed, bit for bit, so the result is that of a run in one go. It is left in place; see `trimtab.checkpoint`.

    `team`: several processes, each with the model, make the same call and share its batches out; all of them return
    the whole evidence, whose norms differ in their last bits from those of one process. They share the checkpoint.
    """
    if not len(pairs):
        raise PairsError("There are no pairs to read.")
    adapter, renderer = Adapter(model), Renderer(tokenizer)
    adapter.check_plain("learning")
    wanted = adapter.layers(range(adapter.n_layers) if layers is None else layers)
    if token_budget < 1:
        raise OptionError(f"The token budget must be at least 1; got {token_budget}.")
    names = expand_positions(renderer, positions, format)
    texts = render_pairs(renderer, pairs, names, format)
    for text in texts:
        adapter.check_ids(text.ids)
    check_context(adapter.context_length, texts)
    store = torch.zeros(2, len(pairs), len(wanted), len(names), adapter.hidden_size)
    norms = {layer: Moments() for layer in wanted}
    run = _Run(adapter, renderer, wanted, padding, store, norms)
    job = {
        "work": "reading pairs",
        "pairs": pairs.hash(),
        "format": format,
        "positions": names,
        "layers": wanted,
        "token budget": token_budget,
        "padding": padding,
        "tokens": fingerprint(texts),
    }
    kept = team.first(lambda: Checkpoint(checkpoint, lambda: {**job, **describe_model(model, tokenizer)}))
    done = 0
    with torch.no_grad(), evaluating(model):
        for number, batch in enumerate(_batches(texts, token_budget)):
            if team.takes(number):
                run.keep(batch, kept.tensors(f"batch {number}", partial(run.forward, batch)))
            done += len(batch)
            progress(done, len(texts))
    team.add(store)
    norms = _merged(team.collect(norms))
    answers = {(text.side, text.pair): text.norms.stop - text.norms.start for text in texts if text.norms.stop}
    return Evidence(
        sites=tuple(Site(layer, name) for layer in wanted for name in names),
        chosen=store[0].flatten(1, 2),
        rejected=store[1].flatten(1, 2),
        norms={layer: float(moments.mean) for layer, moments in norms.items()},
        lengths=torch.tensor([[answers[side, n] for side in (0, 1)] for n in range(len(pairs))]),
        format=format,
        norm_tokens=norms[wanted[0]].count,
    )


def _merged(parts: Sequence[dict[int, Moments]]) -> dict[int, Moments]:
    """Merge the moments of several processes, layer by layer; those of one are as they were."""
    first, *others = parts
    for other in others:
        for layer, moments in first.items():
            moments.merge(other[layer])
    return first


# Running


def _batches(texts: Iterable[Text], budget: int) -> list[list[Text]]:
    """Group texts of like length: at most `budget` tokens with padding, or one text; the longest come first."""
    batches: list[list[Text]] = []
    width = 0
    for text in sorted(texts, key=lambda text: -len(text.ids)):
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(text)
        else:
            batches.append([text])
            width = len(text.ids)
    return batches


class _Kept(NamedTuple):
    """Positions of a batch that are kept: rows, and the tokens `[R, T]` bool whose mean each one is."""

    rows: Tensor  # [R] int64
    tokens: Tensor  # [R, T] bool


@dataclass
class _Run:
    adapter: Adapter
    renderer: Renderer
    layers: list[int]
    padding: Side
    store: Tensor  # [2, N, L, P, D]
    norms: dict[int, Moments] = field(default_factory=dict[int, Moments])

    def forward(self, batch: list[Text]) -> dict[str, Tensor]:
        """Run a batch, in halves when memory runs out; return what `keep` takes.

        `means` `[L, R, D]` float32 of what the texts read, in their order; `norms` `[L, tokens]` float32.
        """
        try:
            return self._forward(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        # outside the handler, whose traceback would keep the failed batch alive
        torch.cuda.empty_cache()
        halves = [self.forward(batch[: len(batch) // 2]), self.forward(batch[len(batch) // 2 :])]
        return {name: torch.cat([half[name] for half in halves], dim=1) for name in halves[0]}

    def keep(self, batch: list[Text], found: dict[str, Tensor]) -> None:
        """Put a batch's share of the evidence where it belongs."""
        spots = [(text.side, text.pair, p) for text in batch for p in text.reads]
        for (side, pair, p), mean in zip(spots, found["means"].unbind(1), strict=True):
            self.store[side, pair, :, p] = mean
        for layer, norms in zip(self.layers, found["norms"], strict=True):
            self.norms[layer].add(norms)

    def _forward(self, batch: list[Text]) -> dict[str, Tensor]:
        padded = self.renderer.pad([text.ids for text in batch], side=self.padding)
        device = self.adapter.input_device
        inputs = {name: value.to(device) for name, value in padded._asdict().items()}
        with self.adapter.read(self.layers) as reading:
            self.adapter.run_to(max(self.layers), **inputs)
        width = padded.input_ids.shape[1]
        check_blocks(tuple(reading.acts[self.layers[0]].shape[:2]), len(batch), width)
        offsets = [width - len(text.ids) if self.padding == "left" else 0 for text in batch]
        reads = [(b, _shift(span, offsets[b])) for b, text in enumerate(batch) for span in text.reads.values()]
        kept = _kept(reads, width)
        counted = _kept([(b, _shift(text.norms, offsets[b])) for b, text in enumerate(batch)], width)
        return {
            "means": torch.stack([_means(reading.acts[layer], kept) for layer in self.layers]),
            "norms": torch.stack([_norms(reading.acts[layer], counted) for layer in self.layers]),
        }


def check_blocks(held: tuple[int, ...], rows: int, tokens: int) -> None:
    """Raise `AdapterError` where a model holds other rows or tokens than it was given."""
    if held != (rows, tokens):
        raise AdapterError(
            f"The blocks hold {held[0]} rows of {held[1]} tokens where the texts have {rows} of {tokens}, so "
            "that positions are not known: this model adds tokens of its own, or turns rows into columns."
        )


def _kept(spans: Sequence[tuple[int, slice]], width: int) -> _Kept:
    tokens = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, (_, span) in enumerate(spans):
        tokens[row, span] = True
    return _Kept(torch.tensor([b for b, _ in spans], dtype=torch.long), tokens)


def _means(acts: Tensor, kept: _Kept) -> Tensor:
    """Return the mean of `acts [B, T, D]` over the kept tokens of each row, `[R, D]` float32 on the CPU.

    Only kept tokens are touched, so that nothing in the padding, not even NaN, reaches a mean; one token is copied.
    """
    tokens = kept.tokens.to(acts.device)
    owner, column = tokens.nonzero(as_tuple=True)
    values = acts[kept.rows.to(acts.device)[owner], column].float()  # [sum of tokens, D]
    sums = torch.zeros(len(tokens), acts.shape[-1], device=acts.device).index_add_(0, owner, values)
    return (sums / tokens.sum(dim=1, keepdim=True)).cpu()


def _norms(acts: Tensor, kept: _Kept) -> Tensor:
    owner, column = kept.tokens.to(acts.device).nonzero(as_tuple=True)
    return acts[owner, column].float().norm(dim=-1).cpu()  # rows of `kept` are rows of the batch


def _shift(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Switch dropout and the like off; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
