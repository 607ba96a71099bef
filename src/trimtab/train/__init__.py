"""Train on the same pairs that a knob is learned from: DPO, SimPO, SFT and BFPO, tuned on validation, as a baseline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from trimtab.adapter import Adapter
from trimtab.artifact import LowRank
from trimtab.checkpoint import Checkpoint, describe_model, versions
from trimtab.errors import OptionError, PairsError, TrainError, TrimtabWarning, unknown_name
from trimtab.pairs import Pairs
from trimtab.train.bench import Bench
from trimtab.train.labels import relabel
from trimtab.train.loops import Loss, load_trainers
from trimtab.types import check_seed, check_several

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
    max_steps: int | None = None,
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

    `max_steps` ends a run after so many steps, however many `epochs` that is; with `lora_rank` that is few-step LoRA.

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
        "max_steps": max_steps,
        "patience": patience,
        "batch_size": batch_size,
        "seed": check_seed(seed),
    }
    _check(options)
    if checkpoint is not None and score is not None and scored_by is None:
        raise OptionError("A checkpoint keeps scores: say in scored_by, a text, what tells this score from others.")
    load_trainers()
    check_model(model)
    used, held = split_pairs(pairs, validation, seed)
    if loss == "bfpo":
        used, held = relabel(used, "bfpo"), relabel(held, "bfpo")
    kept = Checkpoint(
        checkpoint,
        lambda: (
            {"work": "training", **describe_model(model, tokenizer), "loss": loss, **options}
            | {"pairs": used.hash(), "validation": held.hash(), "scored by": scored_by if score else None}
        ),
    )
    bench = Bench(model, tokenizer, used, held, loss, options, score)
    table, made = _search(bench, grid, kept, progress)
    row = table[_best(table)]
    _warn_of_nothing(model, made, row)
    record: dict[str, Any] = {
        "loss": loss,
        "options": options | {"learning_rates": [r for r, _ in grid], "betas": [b for _, b in grid]},
        "pairs": {"count": len(used), "hash": used.hash()},
        "validation": {"count": len(held), "hash": held.hash(), "held_out_of_pairs": validation is None},
        "chosen_by": "score" if score else "validation loss" if loss == "sft" else "preference",
        "scored_by": scored_by if score else None,
        "trainable_parameters": bench.trainable,
        "versions": versions(),
    }
    return Trained(made, record | _told(table, row), bench.adapters.get(made))


def _told(table: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that says what was tried, what was chosen, and what it took."""
    return {
        "chosen": {"learning_rate": row["learning_rate"], "beta": row["beta"]},
        "tied": sum(other["score"] == row["score"] for other in table),
        "table": table,
        "run": {"seconds": row["seconds"], "peak_bytes": row["peak_bytes"]},
        "grid": _cost(table),
    }


def _search(
    bench: Bench, grid: Sequence[tuple[float, float]], kept: Checkpoint, progress: Callable[[int, int], None]
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
    rates = sorted(set(GRIDS[loss][0] if learning_rates is None else check_several(learning_rates, "learning_rates")))
    strengths = sorted(set(GRIDS[loss][1] if betas is None else check_several(betas, "betas")), reverse=True)
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
    for name in ("epochs", "max_steps", "patience", "batch_size", "lora_rank"):
        value = options[name]
        if value is None and name in ("max_steps", "lora_rank"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} counts from 1; got {value!r}.")


def split_pairs(pairs: Pairs, validation: Pairs | None, seed: int) -> tuple[Pairs, Pairs]:
    """Return the pairs to train on and those to validate on, three tenths of the prompts where none are given."""
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
