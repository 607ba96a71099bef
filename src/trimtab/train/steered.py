"""A vector trained at one layer of a frozen model: how likely answers are under it, and the run with early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.adapter import Adapter, WriteFn
from trimtab.capture import evaluating, trainable
from trimtab.checkpoint import Checkpoint
from trimtab.evals.cost import measured
from trimtab.evals.likelihood import Text
from trimtab.losses import IGNORED, answer_likelihoods
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.train.bench import MIN_IMPROVEMENT, render_sides
from trimtab.types import Where

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEP_SHARES = (0.01, 0.03)
"""Lengths of a step, as shares of the layer's mean residual norm, whose learning rates are tried where none are given.
AdamW moves each of D coordinates by about the rate: the paper's 5e-4 makes steps of length 0.03 where D is 4096, and
takes thousands of them; a hundred pairs make hundreds, in which such steps would not arrive."""
WARM_UP = 100
"""Steps over which the rate rises, as in the paper's code, or a tenth of all steps where that is less."""
START = math.log(2)
"""The loss of the zero vector."""


@contextmanager
def frozen(model: PreTrainedModel) -> Generator[None]:
    """Let no weight have a gradient and switch dropout off, and record gradients of what is added; then as before.

    Blocks below the one where something is added record nothing: nothing in them has a gradient.
    """
    with evaluating(model), trainable(model, ()), torch.enable_grad():
        yield


class SteeredPairs:
    """Rendered pairs of a model, whose answers can be scored with a vector added on the tokens of `where`.

    Raises `PairsError` for a pair that the model's context cannot hold.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, where: Where) -> None:
        self.adapter, self._renderer = Adapter(model), Renderer(tokenizer)
        self._where: Where = where
        self._chosen, self._rejected = render_sides(model, tokenizer, pairs)
        for text in (*self._chosen, *self._rejected):
            self.adapter.check_ids(text.ids)

    def __len__(self) -> int:
        return len(self._chosen)

    def log_likelihoods(self, numbers: Sequence[int], layer: int = 0, addend: Tensor | None = None) -> Tensor:
        """Return the log-likelihoods of the chosen and the rejected answers of some pairs, `[2, n]` float32, one batch.

        In nats, summed over the answer's tokens, those that close it included. `addend [D]` is added to the output of
        block `layer`; None runs the model as it is.
        """
        texts = [side[i] for side in (self._chosen, self._rejected) for i in numbers]
        padded, device = self._renderer.pad([text.ids for text in texts], side="right"), self.adapter.input_device
        functions: dict[int, WriteFn] = {}
        if addend is not None:
            tokens = steered_tokens(texts, self._where)[..., None]  # [B, T, 1]
            # as the runtime adds a knob's vector
            functions[layer] = lambda hidden: torch.addcmul(hidden, tokens.to(hidden), addend.to(hidden))
        with self.adapter.write(functions):
            logits = self.adapter.model(
                **{name: value.to(device) for name, value in padded._asdict().items()}, use_cache=False
            ).logits  # [B, T, V]
        labels = torch.full(padded.input_ids.shape, IGNORED)
        for row, (ids, start) in enumerate(texts):
            labels[row, start - 1 : len(ids) - 1] = padded.input_ids[row, start : len(ids)]
        return answer_likelihoods(logits, labels.to(logits.device))[0].reshape(2, len(numbers))

    def all_log_likelihoods(self, batch_size: int, layer: int = 0, addend: Tensor | None = None) -> Tensor:
        """Return those of all pairs, `[2, N]` float32 on the CPU, without gradients, in batches that never change."""
        with torch.no_grad():
            batches = torch.arange(len(self)).split(batch_size)
            return torch.cat([self.log_likelihoods(b.tolist(), layer, addend).cpu() for b in batches], dim=1)


def steered_tokens(texts: Sequence[Text], where: Where) -> Tensor:
    """Return the tokens that `where` means, `[B, T]` bool for rows that are padded on the right; padding never is one.

    >>> steered_tokens([Text([7, 8, 9], 2), Text([7], 1)], "completion").tolist()
    [[False, True, True], [True, False, False]]
    """
    tokens = torch.zeros(len(texts), max(len(text.ids) for text in texts), dtype=torch.bool)
    for row, (ids, start) in enumerate(texts):
        first = start - 1 if where == "completion" else 0  # the prompt's last token predicts the answer's first
        end = {"prompt": start, "context": start - 1}.get(where, len(ids))
        tokens[row, first:end] = True
    return tokens


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training: where it is, and the best of what it has seen."""

    vector: Tensor  # [D] float32
    answers: Tensor  # [2, 2, N] log-likelihoods: under the vector and its opposite, of chosen and rejected answers
    loss: float = START
    epoch: int = 0
    steps: int = 0
    validation_losses: list[float | None] = field(default_factory=list[float | None])
    training_losses: list[float | None] = field(default_factory=list[float | None])


class Training:
    """The pairs of a call, the model's own margins, and how a vector is trained at a layer and a rate."""

    def __init__(
        self,
        pairs: SteeredPairs,
        held: SteeredPairs,
        norms: Mapping[int, float],
        options: Mapping[str, Any],
        kept: Checkpoint,
    ) -> None:
        self.pairs, self.held, self.norms, self.options, self._kept = pairs, held, norms, options, kept
        self.width = pairs.adapter.hidden_size
        size = options["batch_size"]
        # Validation pairs are always in the same batches: the zero vector's loss is log 2 to the last bit.
        reference = kept.tensors(
            "reference",
            lambda: {"pairs": pairs.all_log_likelihoods(size), "validation": held.all_log_likelihoods(size)},
        )
        self.reference, self.held_reference = reference["pairs"], reference["validation"]  # [2, N]

    def run(self, progress: Callable[[int, int], None]) -> tuple[dict[int, Tensor], list[dict[str, Any]]]:
        """Train at every layer and rate, or take what is kept; return the best vector per layer and all rows."""
        vectors: dict[int, Tensor] = {}
        table: list[dict[str, Any]] = []
        grid = [(layer, rate) for layer in self.norms for rate in self.rates(layer)]
        for layer, rate in grid:
            vector, row = self._kept_run(layer, rate)
            table.append(row)
            if best_row(table, layer) is row:
                vectors[layer] = vector
            progress(len(table), len(grid))
        return vectors, table

    def rates(self, layer: int) -> list[float]:
        """Return the learning rates to try at a layer, smallest first."""
        given = self.options["learning_rates"]
        whole = self.norms[layer] / math.sqrt(self.width)  # the rate whose first step is as long as the norm
        return [share * whole for share in STEP_SHARES] if given is None else given

    def base(self) -> dict[str, float]:
        """Return what the model itself makes of the validation pairs."""
        return _measures(self.held_reference)

    def _kept_run(self, layer: int, rate: float) -> tuple[Tensor, dict[str, Any]]:
        key = f"layer {layer} rate {rate!r}"

        @cache
        def trained() -> tuple[Run, dict[str, Any]]:
            with measured() as cost:
                run = self.train(layer, rate)
            length = float(run.vector.double().norm())
            return run, {
                "layer": layer,
                "learning_rate": rate,
                "validation_loss": run.loss,
                **_measures(run.answers[0]),
                "margin_reversed": _measures(run.answers[1])["margin"],
                "vector_norm": length,
                "alpha": length / self.norms[layer],
                "best_epoch": run.epoch,
                "steps": run.steps,
                "validation_losses": run.validation_losses,
                "training_losses": run.training_losses,
                "seconds": cost.seconds,
                "peak_bytes": cost.peak_bytes,
            }

        vector = self._kept.tensors(key, lambda: {"vector": trained()[0].vector})["vector"]
        return vector, self._kept.step(f"{key} record", lambda: trained()[1])

    def train(self, layer: int, rate: float) -> Run:
        """Train one vector, with early stopping."""
        o, draw = self.options, torch.Generator().manual_seed(self.options["seed"])
        vector = torch.zeros(
            self.width, dtype=torch.float32, device=self.pairs.adapter.device(layer), requires_grad=True
        )
        run = Run(torch.zeros(self.width, dtype=torch.float32), torch.stack([self.held_reference] * 2))
        optimizer = torch.optim.AdamW([vector], lr=rate, weight_decay=o["weight_decay"])
        total = o["epochs"] * -(-len(self.pairs) // o["batch_size"])
        warm_up, landmark, waited = min(WARM_UP, total // 10), START, 0
        for epoch in range(1, o["epochs"] + 1):
            losses: list[float] = []
            for batch in torch.randperm(len(self.pairs), generator=draw).split(o["batch_size"]):
                sign = 1 - 2 * int(torch.randint(2, (), generator=draw))
                optimizer.param_groups[0]["lr"] = rate * _schedule(run.steps, warm_up, total)
                optimizer.zero_grad()
                loss = self.loss(batch.tolist(), layer, vector, sign)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                run.steps += 1
            value = self._look(run, epoch, layer, vector.detach())
            run.validation_losses.append(value if math.isfinite(value) else None)
            mean = sum(losses) / len(losses)
            run.training_losses.append(mean if math.isfinite(mean) else None)
            if not math.isfinite(value):  # nor will it ever be again
                break
            if value < landmark - MIN_IMPROVEMENT:
                landmark, waited = value, 0
            elif run.steps > warm_up:  # a rate that has not risen yet says nothing about stopping
                waited += 1
            if waited == o["patience"]:
                break
        return run

    def loss(self, numbers: Sequence[int], layer: int, vector: Tensor, sign: int) -> Tensor:
        """Return BiPO's loss of some training pairs, `[]`, with a gradient for `vector [D]`."""
        answers = self.pairs.log_likelihoods(numbers, layer, sign * vector)
        return self._preference_loss(answers, self.reference[:, numbers].to(answers), sign)

    def _look(self, run: Run, epoch: int, layer: int, vector: Tensor) -> float:
        """Return the validation loss, and let the run keep the vector if it is its best."""
        size = self.options["batch_size"]
        answers = [self.held.all_log_likelihoods(size, layer, sign * vector) for sign in (1, -1)]
        losses = [self._preference_loss(a, self.held_reference, s) for a, s in zip(answers, (1, -1), strict=True)]
        loss = float(sum(losses)) / 2
        if loss < run.loss:
            run.vector, run.answers, run.loss, run.epoch = vector.cpu().clone(), torch.stack(answers), loss, epoch
        return loss

    def _preference_loss(self, answers: Tensor, reference: Tensor, sign: int) -> Tensor:
        chosen, rejected = answers - reference  # [2, n]
        return -logsigmoid(sign * self.options["beta"] * (chosen - rejected)).mean()


def _schedule(step: int, warm_up: int, total: int) -> float:
    """Return the share of the learning rate that a step has, counted from 0: a line up, then a half cosine down."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (total - warm_up))


def _measures(answers: Tensor) -> dict[str, float]:
    """Say what log-likelihoods `[2, N]` mean: the share of pairs that are preferred, and two means in nats."""
    margins = (answers[0] - answers[1]).double()
    return {
        "preference": float((margins > 0).double().mean()),
        "margin": float(margins.mean()),
        "chosen": float(answers[0].double().mean()),
    }


def best_row(table: Sequence[dict[str, Any]], layer: int) -> dict[str, Any]:
    """Return the row of a layer with the lowest loss; rates go up, so the mildest of equal ones."""
    return min((row for row in table if row["layer"] == layer), key=lambda row: row["validation_loss"])
