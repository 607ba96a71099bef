"""Gradients of a loss on pairs: at the residual stream of every layer, or of weights, by one backward pass per batch.

Chosen and rejected answers are rows of one batch and meet in one loss. Parameters are frozen but for those whose
gradient is wanted, and nothing below the lowest layer that is read is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.capture.activations import capture, evaluating
from trimtab.capture.running import check_blocks
from trimtab.checkpoint import Checkpoint, describe_model, fingerprint
from trimtab.errors import OptionError, PairsError, TrainError, unknown_name
from trimtab.losses import IGNORED, Loss, LossFn, read_loss
from trimtab.ops import Side
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.team import ALONE, Team
from trimtab.texts import check_context, render_items
from trimtab.types import Site, check_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trimtab.texts import Item

GRADIENT_POSITIONS = ("last_prompt", "all_prompt", "response_mean")
"""Where gradients are read: the prompt's last token, the sum over its tokens, the mean over an answer's tokens."""


@dataclass(frozen=True, eq=False)
class GradientEvidence:
    """The gradient of each pair's loss at every site, in the order of the pairs; float32."""

    sites: tuple[Site, ...]
    """S sites, layers in order, positions of a layer together."""
    gradients: Tensor
    """`[N, S, D]`, of one pair's loss and not of the mean; the sum over the answers that the loss looks at."""
    first: Tensor
    """`[N, S, D]`, the share of the first answer (the chosen one, unless the loss looks at the rejected one alone)."""
    activations: Tensor
    """`[N, S, D]`, what the stream holds at the prompt's last token."""
    losses: Tensor
    """`[B]` sums of the loss, one for each batch."""


class Backward(NamedTuple):
    """A batch after its forward pass: the loss, and how the rows lie."""

    loss: Tensor  # []
    starts: list[int]  # of each row's answer, in columns
    stops: list[int]
    begins: list[int]  # of each row's first token, in columns


def capture_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    loss: str | LossFn | Loss = "dpo",
    positions: Sequence[str] = ("last_prompt",),
    layers: Sequence[int] | None = None,
    token_budget: int = 8192,
    padding: Side = "right",
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
) -> GradientEvidence:
    """Return the gradient of every pair's loss at the residual stream, at every candidate site, layers x positions.

    `loss`: see `trimtab.losses.read_loss`. The answers of a pair share their prompt, so that the derivative at a token
    of it is the sum of the rows' gradients, each found at its own row's columns. `positions` are of
    `GRADIENT_POSITIONS`; `layers`, `token_budget`, `padding`, `checkpoint`, `progress`, `team` as for `capture`, the
    budget over the rows of whole pairs. The model is left as it was, `requires_grad` of its parameters included.

    Raises `OptionError`, `PairsError` and `UnknownName` for what cannot be read, and `TrainError` where a gradient is
    not finite.
    """
    adapter = Adapter(model)
    for position in positions:
        if position not in GRADIENT_POSITIONS:
            raise unknown_name("position of gradients", position, GRADIENT_POSITIONS)
    if not positions:
        raise OptionError(f"There are no positions to read. Known: {', '.join(GRADIENT_POSITIONS)}.")
    wanted = adapter.layers(range(adapter.n_layers) if layers is None else layers)
    run = _Run(model, tokenizer, pairs, read_loss(loss), token_budget, padding)
    run.loss.check_checkpoint(checkpoint)
    job = {"positions": list(positions), "layers": wanted}
    kept = team.first(lambda: Checkpoint(checkpoint, lambda: run.job("reading gradients") | job))
    names = list(dict.fromkeys(positions))
    with evaluating(model), trainable(model, ()):
        losses = torch.zeros(len(run.batches), dtype=torch.float32)
        shape = 3, len(pairs), len(wanted), len(names), adapter.hidden_size
        found = torch.zeros(shape, dtype=torch.float32)
        for number, batch in enumerate(run.batches):
            if team.takes(number):
                step = partial(run.halving, partial(run.at_stream, wanted, names), batch)
                tensors = kept.tensors(f"batch {number}", step)
                at = [item.pair for item in batch]
                for part, name in zip(found, ("gradients", "first", "activations"), strict=True):
                    part[at] = tensors[name]
                losses[number] = tensors["loss"]
            progress(sum(map(len, run.batches[: number + 1])), len(pairs))
    team.add(found)
    team.add(losses)
    if not bool(found[0].isfinite().all()):
        raise TrainError(
            f"The gradient of the loss {run.loss} is not finite for some of these pairs. Check the loss if it is "
            "yours, and the model with trimtab check, or load it with dtype='float32'."
        )
    sites = tuple(Site(layer, name) for layer in wanted for name in names)
    gradients, first, activations = (part.flatten(1, 2) for part in found)
    return GradientEvidence(sites, gradients, first, activations, losses)


def weight_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    names: Collection[str],
    *,
    loss: str | LossFn | Loss = "dpo",
    token_budget: int = 8192,
    padding: Side = "right",
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over pairs by parameter, float32, on the parameters' devices.

    `names` are parameters of the model; other ones are frozen. Memory: these gradients in float32, and those of one
    batch in the weights' dtype. Batches add up in float32. A tied weight's gradient is that of all its uses. Other
    arguments and errors: see `capture_gradients`.
    """
    known = dict(model.named_parameters())
    run = _Run(model, tokenizer, pairs, read_loss(loss), token_budget, padding)
    sums: dict[str, Tensor] = {}
    done, fresh = 0, dict[str, Tensor]()

    def collect(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            fresh[name] = parameter.grad
            parameter.grad = None

    def one(batch: list[Item]) -> dict[str, Tensor]:
        fresh.clear()  # of a batch that ran out of memory half way
        result = run.at_weights(batch)
        for name, gradient in fresh.items():  # all memory first: a batch that is run again must not count twice
            if name not in sums:
                sums[name] = torch.zeros_like(gradient, dtype=torch.float32)
        for name, gradient in fresh.items():
            sums[name] += gradient
        return result

    kept = {name: known[name].grad for name in names}  # of a training that goes on afterwards
    with evaluating(model), trainable(model, names):
        handles = [known[name].register_post_accumulate_grad_hook(partial(collect, name)) for name in names]
        try:
            for name in names:
                known[name].grad = None
            for number, batch in enumerate(run.batches):
                if team.takes(number):
                    run.halving(one, batch)
                done += len(batch)
                progress(done, len(pairs))
        finally:
            for handle in handles:
                handle.remove()
            for name, gradient in kept.items():
                known[name].grad = gradient
    means: dict[str, Tensor] = {}
    for name in names:
        zeros = torch.zeros_like(known[name], dtype=torch.float32)
        means[name] = team.add(sums.pop(name, zeros)) / len(pairs)
    for name, mean in means.items():
        if not bool(mean.isfinite().all()):
            raise TrainError(
                f"The gradient of the loss {run.loss} is not finite at {name!r}. Check the loss if it is yours, and "
                "the model with trimtab check, or load it with dtype='float32'."
            )
    return means


def residual_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    layers: Sequence[int],
    *,
    token_budget: int = 8192,
    team: Team = ALONE,
) -> dict[int, float]:
    """Return the mean residual norm per layer over the pairs' answers, as every knob has it; see `capture`."""
    found = capture(
        model,
        tokenizer,
        pairs,
        positions=("response_mean",),
        layers=layers,
        format="question_response",
        token_budget=token_budget,
        team=team,
        keep=1,
    )
    return found.norms


@contextmanager
def trainable(model: nn.Module, names: Collection[str]) -> Generator[None]:
    """Let autograd see these parameters and no others; afterwards all of them are as they were."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {parameter for name, parameter in model.named_parameters() if name in names}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in wanted)
        with torch.inference_mode(False):  # which records nothing at all
            yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


class _Run:
    """The items of one job, in batches, and how one of them is run forward and backward."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Pairs,
        loss: Loss,
        token_budget: int,
        padding: Side,
    ) -> None:
        if not len(pairs):
            raise PairsError("There are no pairs to read.")
        check_count(token_budget, "token_budget")
        self._model, self._tokenizer, self._pairs = model, tokenizer, pairs
        self.loss, self._budget = loss, token_budget
        self._padding: Side = padding
        self._adapter, self._renderer = Adapter(model), Renderer(tokenizer)
        self._adapter.check_plain("learning")
        self._items = render_items(self._renderer, pairs, loss)
        texts = [text for item in self._items for text in item.texts]
        for text in texts:
            self._adapter.check_ids(text.ids)
        check_context(self._adapter.context_length, texts)
        self.batches = _batches(self._items, token_budget)

    def job(self, work: str) -> dict[str, object]:
        """Return what the results depend on, for a checkpoint."""
        return {
            "work": work,
            **describe_model(self._model, self._tokenizer),
            "pairs": self._pairs.hash(),
            "loss": str(self.loss),
            "token budget": self._budget,
            "padding": self._padding,
            "tokens": fingerprint(self._items),
        }

    def halving(self, work: Callable[[list[Item]], dict[str, Tensor]], batch: list[Item]) -> dict[str, Tensor]:
        """Do work on a batch, in halves when memory runs out."""
        try:
            return work(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, whose traceback would keep the failed batch alive
        halves = [self.halving(work, batch[: len(batch) // 2]), self.halving(work, batch[len(batch) // 2 :])]
        return {
            name: torch.cat([half[name] for half in halves]) if halves[0][name].dim() else halves[0][name] + one
            for name, one in halves[1].items()
        }

    def at_weights(self, batch: list[Item]) -> dict[str, Tensor]:
        """Add a batch's gradient to the parameters."""
        with torch.enable_grad():
            loss = self._forward(batch).loss
            loss.backward()
        return {"loss": loss.detach()}

    def at_stream(self, layers: list[int], positions: list[str], batch: list[Item]) -> dict[str, Tensor]:
        """Return gradients and activations of a batch, `[items, layers, positions, D]` float32 on the CPU."""
        held: dict[int, Tensor] = {}

        def hold(layer: int, hidden: Tensor) -> Tensor:
            held[layer] = hidden.detach().requires_grad_() if layer == layers[0] else hidden
            return held[layer]

        with torch.enable_grad(), self._adapter.write({layer: partial(hold, layer) for layer in layers}):
            run = self._forward(batch)
            gradients = torch.autograd.grad(run.loss, [held[layer] for layer in layers])
        rows = [self._read(g.float(), run, positions) for g in gradients]  # each [K * B, positions, D]
        here = torch.arange(len(batch))
        last = torch.tensor(run.starts)[here] - 1
        at = [held[layer].detach()[here, last].float().cpu() for layer in layers]  # each [B, D]
        by_answer = torch.stack(rows, 1).unflatten(0, (-1, len(batch)))  # [K, B, layers, positions, D]
        return {
            "gradients": by_answer.sum(0),
            "first": by_answer[0].contiguous(),
            "activations": torch.stack(at, 1)[:, :, None].expand(-1, -1, len(positions), -1).contiguous(),
            "loss": run.loss.detach().cpu(),
        }

    @staticmethod
    def _read(gradient: Tensor, run: Backward, positions: list[str]) -> Tensor:
        """Read a layer's gradient `[R, T, D]` at every position, row by row at its own columns: `[R, P, D]`."""
        rows: list[Tensor] = []
        for row, begin, start, stop in zip(gradient, run.begins, run.starts, run.stops, strict=True):
            found = {
                "last_prompt": row[start - 1],
                "all_prompt": row[begin:start].sum(0),
                "response_mean": row[start:stop].mean(0),
            }
            rows.append(torch.stack([found[name] for name in positions]))
        return torch.stack(rows).cpu()

    def _forward(self, batch: list[Item]) -> Backward:
        """Run the rows of a batch, first answers first, and take the loss."""
        texts = [text for answer in zip(*(item.texts for item in batch), strict=True) for text in answer]
        padded = self._renderer.pad([text.ids for text in texts], side=self._padding)
        inputs = {name: value.to(self._adapter.input_device) for name, value in padded._asdict().items()}
        logits: Tensor = self._model(**inputs, use_cache=False).logits
        width = padded.input_ids.shape[1]
        check_blocks(tuple(logits.shape[:2]), len(texts), width)
        begins = [width - len(text.ids) if self._padding == "left" else 0 for text in texts]
        starts = [begin + text.start for begin, text in zip(begins, texts, strict=True)]
        stops = [begin + len(text.ids) for begin, text in zip(begins, texts, strict=True)]
        labels = torch.full((len(texts), width), IGNORED)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            labels[row, start - 1 : stop - 1] = padded.input_ids[row, start:stop]
        shares = torch.tensor([item.shares for item in batch], dtype=torch.float32)
        loss = self.loss(logits, labels.to(logits.device), shares.to(logits.device))
        return Backward(loss, starts, stops, begins)


def _batches(items: Sequence[Item], budget: int) -> list[list[Item]]:
    """Group items of like length: at most `budget` tokens over all their rows with padding, or one item."""
    batches: list[list[Item]] = []
    width = 0
    for item in sorted(items, key=lambda item: (len(item.texts), -item.longest)):
        same = bool(batches) and len(batches[-1][0].texts) == len(item.texts)
        width = max(width, item.longest) if same else item.longest
        if same and (len(batches[-1]) + 1) * width * len(item.texts) <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
            width = item.longest
    return batches
