"""One training job: texts rendered once, and a copy of the model trained at one setting after another."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from trimtab.adapter import Adapter
from trimtab.artifact import LowRank
from trimtab.errors import PairsError
from trimtab.evals.cost import Cost, measured
from trimtab.evals.likelihood import Text, pair_margins, render_texts
from trimtab.pairs import Pairs
from trimtab.train.labels import bfpo_targets
from trimtab.train.loops import History, Loss, Rows, Settings, fit, lora, merge
from trimtab.weights.source import read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_IMPROVEMENT = 0.01
"""Nats per pair: a validation loss that falls by less has stopped falling."""


class Bench:
    """The rendered texts of a job, and how a setting of its grid is run; the model itself stays as it is.

    Raises `PairsError` for a pair that the model's context cannot hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Pairs,
        validation: Pairs,
        loss: Loss,
        options: Mapping[str, Any],
        score: Callable[[PreTrainedModel], float] | None,
    ) -> None:
        self._model, self._tokenizer, self._validation = model, tokenizer, validation
        self.loss: Loss = loss
        self._options, self._score = options, score
        self._rows = (self._render(pairs), self._render(validation))
        self.trainable = 0
        self.adapters: WeakKeyDictionary[PreTrainedModel, Mapping[str, LowRank]] = WeakKeyDictionary()

    def _render(self, pairs: Pairs) -> Rows:
        chosen, rejected = render_sides(self._model, self._tokenizer, pairs)
        if self.loss not in ("dpo", "bfpo"):
            return Rows(chosen, rejected)
        before = pair_margins(self._model, self._tokenizer, pairs, [{}])[0]
        targets = bfpo_targets(pairs) if self.loss == "bfpo" else None
        return Rows(chosen, rejected, (before.chosen, before.rejected), targets)

    def run(self, rate: float, beta: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train at one setting; return the model and its row of the table."""
        made, history, cost = self.fit(rate, beta)
        begun = time.perf_counter()
        margin = pair_margins(made, self._tokenizer, self._validation, [{}])[0].margin
        preferred = float(np.mean(margin > 0))
        best = min(history.validation_losses, key=lambda value: value if math.isfinite(value) else math.inf)
        finite = math.isfinite(best) and bool(np.isfinite(margin).all())
        own = -best if self.loss == "sft" else preferred
        score = None if not finite else own if self._score is None else float(self._score(made))
        row = {
            "learning_rate": rate,
            "beta": beta,
            "score": score,
            "preference": preferred,
            "margin": float(margin.mean()) if finite else None,
            "validation_losses": [value if math.isfinite(value) else None for value in history.validation_losses],
            "evaluated_at": history.evaluated_at,
            "best_step": history.best_step,
            "steps": history.steps,
            "first_loss": history.first_loss if math.isfinite(history.first_loss) else None,
            "starting_loss": history.starting_loss if math.isfinite(history.starting_loss) else None,
            "seconds": cost.seconds,
            "scoring_seconds": time.perf_counter() - begun,
            "peak_bytes": cost.peak_bytes,
        }
        return made, row

    def fit(self, rate: float, beta: float) -> tuple[PreTrainedModel, History, Cost]:
        """Train at one setting; return the model, how it came about, and what it cost."""
        o = self._options
        gamma = o.get("gamma_ratio", 0.0) * beta
        run = [o[name] for name in ("epochs", "patience", "batch_size", "seed")]
        settings = Settings(self.loss, rate, beta, gamma, *run, max_steps=o.get("max_steps"))
        with measured() as cost, tempfile.TemporaryDirectory(prefix="trimtab-train-") as folder:
            made, history = self._fit(settings, Path(folder))
        return made, history, cost

    def _fit(self, settings: Settings, folder: Path) -> tuple[PreTrainedModel, History]:
        student = copy.deepcopy(self._model)
        torch.nn.Module.float(student).train().requires_grad_(True)
        rank = self._options["lora_rank"]
        if rank is not None:
            student = lora(student, rank, settings.seed)
        self.trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
        history = fit(student, self._tokenizer, *self._rows, settings, folder, min_improvement=MIN_IMPROVEMENT)
        # A copy that no trainer has touched takes the weights: trainers patch the model that they are given.
        made = copy.deepcopy(self._model)
        if rank is not None:
            student.save_pretrained(folder / "adapter")
            self.adapters[made] = read_adapter(folder / "adapter")
        made.load_state_dict(merge(student) if rank is not None else student.state_dict())
        return made, history


def render_sides(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Pairs
) -> tuple[list[Text], list[Text]]:
    """Render every pair with its chosen and with its rejected answer.

    Raises `PairsError` for a pair that the model's context cannot hold.
    """
    prompts = [pair.prompt for pair in pairs]
    chosen = render_texts(tokenizer, prompts, [pair.chosen for pair in pairs])
    rejected = render_texts(tokenizer, prompts, [pair.rejected for pair in pairs])
    limit = Adapter(model).context_length
    for number, texts in enumerate(zip(chosen, rejected, strict=True), 1):
        longest = max(len(text.ids) for text in texts)
        if limit is not None and longest > limit:
            raise PairsError(
                f"Pair {number} is {longest} tokens long when rendered; this model's context holds {limit}. "
                "Leave long pairs out: nothing is cut."
            )
    return chosen, rejected
