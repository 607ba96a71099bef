"""Train on the same pairs that a knob is learned from: DPO, SimPO, SFT and BFPO, tuned on validation, as a baseline."""

from __future__ import annotations

import copy
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch

from trimtab.adapter import Adapter
from trimtab.artifact import LowRank
from trimtab.checkpoint import Checkpoint, describe_model, versions
from trimtab.errors import OptionError, PairsError, TrainError, TrimtabWarning, unknown_name
from trimtab.evals.cost import Cost, measured
from trimtab.evals.likelihood import pair_margins, render_texts
from trimtab.pairs import Pairs
from trimtab.train.labels import bfpo_targets, relabel
from trimtab.train.loops import History, Loss, Rows, Settings, fit, load_trainers, lora, merge
from trimtab.types import check_seed
from trimtab.weights.source import read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GRIDS", "Loss", "Trained", "train"]

GRIDS: Mapping[Loss, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "dpo": ((1e-6, 1e-5), (0.1, 0.3)),
    "simpo": ((1e-6, 1e-5), (2.0, 10.0)),
    "sft": ((1e-5, 1e-4), ()),
    "bfpo": ((1e-6, 1e-5), (0.1, 0.3)),
}
"""Learning rates and betas that are tried where none are given, for models of some billion parameters: around DPO's
5e-7 to 1e-6 with beta 0.1 and SimPO's 3e-7 to 1e-6 with beta 2 to 10 (their papers), upwards because pairs are few.
Small models, and adapters, want rates ten to a hundred times larger."""
GAMMA_RATIO = 0.5
"""SimPO's gamma over its beta where none is given."""
MIN_IMPROVEMENT = 0.01
"""Nats per pair: a validation loss that falls by less has stopped falling."""


@dataclass(frozen=True)
class Trained:
    """A trained model, and the record of how it came about, as plain JSON values."""

    model: PreTrainedModel
    record: dict[str, Any]
    adapter: Mapping[str, LowRank] | None = None
    """What LoRA added to each weight, in float32; None where all weights were trained."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    loss: Loss = "dpo",
    validation: Pairs | None = None,
    learning_rates: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    gamma_ratio: float | None = None,
    lora_rank: int | None = None,
    epochs: int = 10,
    patience: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    score: Callable[[PreTrainedModel], float] | None = None,
    scored_by: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train a copy of `model` on pairs, at the best of a grid of settings; `model` itself stays as it is.

    `loss`: "dpo" (arXiv:2305.18290, Eq. 7; the reference is `model`), "simpo" (arXiv:2405.14734, Eq. 6, with gamma =
    `gamma_ratio` x beta), "sft" (the chosen answers alone, no beta) or "bfpo" (arXiv:2408.15313 in DPO's form: pairs
    are put in the order `trimtab.train.labels.relabel(pairs, "bfpo")`, and each has `beta / 2 / target`). Texts are
    rendered as for learning and generating, and the answer's closing tokens count. None of `learning_rates` or `betas`
    stands for `GRIDS`, and of `gamma_ratio` for `GAMMA_RATIO`.

    Early stopping: after every epoch (every `EVALUATED_EVERY` steps where an epoch is longer) the loss on `validation`
    is taken; after `patience` times, past the warm-up, that lower it by less than `MIN_IMPROVEMENT` the run ends, and
    its best weights count. Without `validation` three tenths of the prompts are held out of `pairs`. Of several
    settings the one counts with the largest `score(trained model)`, such as accuracy on validation questions; without
    `score`, the one that prefers most chosen answers of `validation` by log-likelihood (SFT: the one with the lowest
    validation loss); of equal ones the smallest rate with the largest beta. A setting whose loss is not finite counts
    for nothing. A `TrimtabWarning` says so where training changed no weight, or never lowered the validation loss.

    Weights are float32 while they are trained and have the model's dtype afterwards. `lora_rank` trains an adapter of
    that rank on all linear layers (alpha twice the rank), which is merged into the model that is returned.

    `Trained.record` holds every option, the grid with what validation said of each setting, the validation loss at each
    look, how many settings are `tied` for the choice, and what it cost: `run` is the chosen setting alone, `grid` all
    of them with their scores, by whichever call they were run. `checkpoint` is a folder that keeps finished settings of
    the grid; the chosen one is trained anew if it was finished by an earlier call. With `score` it wants `scored_by`, a
    text that tells this score from others. `progress` is called with the settings that are done and their number.

    Raises `TrainError` where no setting has a finite loss, `MissingDependency` without TRL, `PairsError` for pairs that
    the model's context cannot hold, that share prompts with `validation` or that lack BFPO's flags, and `OptionError`
    for other options.
    """
    grid = _grid(loss, learning_rates, betas)
    options = {
        **_gamma(loss, gamma_ratio),
        "lora_rank": lora_rank,
        "epochs": epochs,
        "patience": patience,
        "batch_size": batch_size,
        "seed": check_seed(seed),
    }
    _check(options)
    if checkpoint is not None and score is not None and scored_by is None:
        raise OptionError("A checkpoint keeps scores: say in scored_by, a text, what tells this score from others.")
    load_trainers()
    check_model(model)
    used, held = _split(pairs, validation, seed)
    if loss == "bfpo":
        used, held = relabel(used, "bfpo"), relabel(held, "bfpo")
    kept = Checkpoint(
        checkpoint,
        lambda: (
            {"work": "training", **describe_model(model, tokenizer), "loss": loss, **options}
            | {"pairs": used.hash(), "validation": held.hash(), "scored by": scored_by if score else None}
        ),
    )
    bench = _Bench(model, tokenizer, used, held, loss, options, score)
    table, made = _search(bench, grid, kept, progress)
    row = table[_best(table)]
    _warn_of_nothing(model, made, row)
    record: dict[str, Any] = {
        "loss": loss,
        "options": options | {"learning_rates": [r for r, _ in grid], "betas": [b for _, b in grid]},
        "pairs": {"count": len(used), "hash": used.hash()},
        "validation": {"count": len(held), "hash": held.hash(), "held_out_of_pairs": validation is None},
        "chosen": {"learning_rate": row["learning_rate"], "beta": row["beta"]},
        "chosen_by": "score" if score else "validation loss" if loss == "sft" else "preference",
        "scored_by": scored_by if score else None,
        "tied": sum(other["score"] == row["score"] for other in table),
        "table": table,
        "run": {"seconds": row["seconds"], "peak_bytes": row["peak_bytes"]},
        "grid": _cost(table),
        "trainable_parameters": bench.trainable,
        "versions": versions(),
    }
    return Trained(made, record, bench.adapters.get(made))


def _search(
    bench: _Bench, grid: Sequence[tuple[float, float]], kept: Checkpoint, progress: Callable[[int, int], None]
) -> tuple[list[dict[str, Any]], PreTrainedModel]:
    """Run every setting of the grid that is not kept; return the table and the model of its best row."""
    table: list[dict[str, Any]] = []
    best: tuple[PreTrainedModel, int] | None = None
    for number, (rate, beta) in enumerate(grid):
        fresh: list[PreTrainedModel] = []

        def run(rate: float = rate, beta: float = beta, fresh: list[PreTrainedModel] = fresh) -> dict[str, Any]:
            made, row = bench.run(rate, beta)
            fresh.append(made)
            return row

        table.append(kept.step(f"rate {rate!r} beta {beta!r}", run))
        if _best(table) == number:
            best = (fresh[0], number) if fresh else None
        progress(number + 1, len(grid))
    chosen = _best(table)
    if table[chosen]["score"] is None:
        raise TrainError(
            f"The {bench.loss} loss on the validation pairs is not finite, at any of {len(grid)} settings. Try smaller "
            "learning rates, check the model with trimtab check, or load it with dtype='float32'."
        )
    if best is None or best[1] != chosen:  # it was trained by an earlier call, which kept its row alone
        return table, bench.fit(*grid[chosen])[0]
    return table, best[0]


def _warn_of_nothing(model: PreTrainedModel, made: PreTrainedModel, row: Mapping[str, Any]) -> None:
    """Warn where the chosen weights are the base model's, or no better by the loss that they were trained for."""
    before, after = model.state_dict(), made.state_dict()
    best = min(value for value in row["validation_losses"] if value is not None)
    if all(torch.equal(value, before[name]) for name, value in after.items()):
        said = "Training changed nothing: the weights are the base model's, bit for bit"
        if model.dtype != torch.float32:
            said += f" (steps too small for {str(model.dtype).removeprefix('torch.')} are rounded away)"
    elif row["starting_loss"] is not None and best >= row["starting_loss"]:
        said = (
            f"The validation loss never fell below the {row['starting_loss']:.4g} that it started from (at best "
            f"{best:.4g}): the trained model may be no better than the base model"
        )
    else:
        return
    warnings.warn(f"{said}. Try more pairs, or other learning_rates, larger ones first.", TrimtabWarning, stacklevel=3)


def _cost(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up what the rows took, whichever call ran them; memory is the largest peak that is known."""
    peaks = [row["peak_bytes"] for row in table if row["peak_bytes"] is not None]
    seconds = sum(row["seconds"] + row["scoring_seconds"] for row in table)
    return {"seconds": seconds, "peak_bytes": max(peaks, default=None)}


def _gamma(loss: Loss, gamma_ratio: float | None) -> dict[str, float]:
    """Return SimPO's option; the other losses have none."""
    if loss != "simpo":
        if gamma_ratio is not None:
            raise OptionError(f"gamma_ratio is of SimPO alone; got {gamma_ratio!r} for {loss}. Leave it out.")
        return {}
    ratio = GAMMA_RATIO if gamma_ratio is None else gamma_ratio
    if not 0 <= ratio <= 100:
        raise OptionError(f"gamma_ratio lies between 0 and 100; got {ratio!r}.")
    return {"gamma_ratio": ratio}


def _grid(
    loss: Loss, learning_rates: Sequence[float] | None, betas: Sequence[float] | None
) -> list[tuple[float, float]]:
    if loss not in GRIDS:
        raise unknown_name("loss", str(loss), get_args(Loss))
    rates = sorted(set(GRIDS[loss][0] if learning_rates is None else learning_rates))
    strengths = sorted(set(GRIDS[loss][1] if betas is None else betas), reverse=True)
    if loss == "sft":
        if betas:
            raise OptionError(f"SFT has no beta; got {list(betas)}.")
        strengths = [0.0]
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise OptionError(f"Learning rates lie between 0 and 1, and there is at least one; got {rates}.")
    if not strengths or (loss != "sft" and not all(0 < beta < 1000 for beta in strengths)):
        raise OptionError(f"Betas are positive, and there is at least one; got {strengths}.")
    return list(product(map(float, rates), map(float, strengths)))


def _check(options: Mapping[str, Any]) -> None:
    for name in ("epochs", "patience", "batch_size", "lora_rank"):
        value = options[name]
        if (isinstance(value, bool) or not isinstance(value, int) or value < 1) and (name, value) != (
            "lora_rank",
            None,
        ):
            raise OptionError(f"{name} counts from 1; got {value!r}.")


def _split(pairs: Pairs, validation: Pairs | None, seed: int) -> tuple[Pairs, Pairs]:
    for given in (pairs, *([] if validation is None else [validation])):
        if not isinstance(given, Pairs) or not len(given):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PairsError(f"Training needs Pairs, and at least one; got {given!r}.")
    if validation is None:
        return pairs.split(seed=seed)
    shared = set(pairs.prompt_hashes()) & set(validation.prompt_hashes())
    if shared:
        raise PairsError(
            f"{len(shared)} of the {len(validation.prompt_hashes())} validation prompts are training prompts too, so "
            "early stopping would not notice learning by heart. Hold out other prompts."
        )
    return pairs, validation


def _best(table: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of the best row; the grid goes from mild to strong, so the first of equal ones."""
    scores = [-math.inf if row["score"] is None else row["score"] for row in table]
    return scores.index(max(scores))


def check_model(model: PreTrainedModel) -> None:
    """Raise `OptionError` for a model that cannot be copied and trained as it is."""
    Adapter(model).check_plain("training")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise OptionError(
            f"Training takes a model on one device; this one is on {', '.join(devices)}. Load it with device='cpu' or "
            "device='cuda'."
        )
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise OptionError("Quantised weights cannot be trained. Load the model in float32, bfloat16 or float16.")


class _Bench:
    """One training job: the rendered texts, and how a setting of the grid is run on a copy of the model."""

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
        prompts = [pair.prompt for pair in pairs]
        chosen = render_texts(self._tokenizer, prompts, [pair.chosen for pair in pairs])
        rejected = render_texts(self._tokenizer, prompts, [pair.rejected for pair in pairs])
        limit = Adapter(self._model).context_length
        for number, texts in enumerate(zip(chosen, rejected, strict=True), 1):
            longest = max(len(text.ids) for text in texts)
            if limit is not None and longest > limit:
                raise PairsError(
                    f"Pair {number} is {longest} tokens long when rendered; this model's context holds {limit}. "
                    "Leave long pairs out: nothing is cut."
                )
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
        settings = Settings(self.loss, rate, beta, gamma, o["epochs"], o["patience"], o["batch_size"], o["seed"])
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
