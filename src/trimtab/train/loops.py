"""TRL's trainers for pairs on our own token ids, with early stopping: DPO, SimPO, SFT, and BFPO in DPO's form.

The rows are rendered by `trimtab.render`, so that training sees token for token what learning, evaluation and
generation see. TRL would render them itself: the two steps that do so are overridden, and a test compares every id.
"""
# TRL is annotated in part, and its public names count as private imports.
# pyright: reportPrivateImportUsage=false, reportIncompatibleMethodOverride=false, reportMissingImports=false

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from trimtab.errors import MissingDependency
from trimtab.evals.likelihood import Text
from trimtab.train.process import THEIRS, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loss = Literal["dpo", "simpo", "sft", "bfpo"]
EVALUATED_EVERY = 16
"""Steps between two looks at the validation loss where an epoch has more: a thousand pairs need no whole epoch."""
WARM_UP = 5
"""Steps over which the rate rises from 0, which the first step has, where that is at most a tenth of all steps."""
INSTALL = 'Training needs TRL. Install it with: pip install "trimtab[train]"'


@dataclass(frozen=True)
class Rows:
    """Rendered pairs: the chosen and the rejected text of each, and the reference's log-likelihoods of their answers.

    `reference` is `(chosen [N], rejected [N])` in nats, summed over the answer's tokens; None where the loss has no
    reference. `targets` [N] are BFPO's, positive, and None for other losses.
    """

    chosen: Sequence[Text]
    rejected: Sequence[Text]
    reference: tuple[np.ndarray, np.ndarray] | None = None
    targets: np.ndarray | None = None


@dataclass(frozen=True)
class Settings:
    """One run: what is minimised, how fast, and when it stops."""

    loss: Loss
    learning_rate: float
    beta: float
    gamma: float
    epochs: int
    patience: int
    batch_size: int
    seed: int
    max_steps: int | None = None


@dataclass(frozen=True)
class History:
    """What a run went through: the validation losses, after which steps, and the step whose weights were kept."""

    validation_losses: list[float]
    evaluated_at: list[int]
    best_step: int
    steps: int
    first_loss: float
    starting_loss: float
    """The validation loss before any step."""


def lora_config(rank: int) -> Any:
    """Return PEFT's configuration of an adapter on all linear layers but the head, alpha twice the rank."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def lora(model: PreTrainedModel, rank: int, seed: int) -> PreTrainedModel:
    """Wrap a model with an adapter as in `lora_config`; the adapter alone is trained."""
    from peft import get_peft_model

    config = lora_config(rank)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=THEIRS)
        torch.manual_seed(seed)
        return cast("PreTrainedModel", get_peft_model(model, config))


def merge(wrapped: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights of a model with its adapter added, under the names of the bare model."""
    return cast(Any, wrapped).merge_and_unload().state_dict()


def load_trainers() -> None:
    """Import TRL's trainers, which takes seconds that no run should be charged with.

    Raises `MissingDependency` unless TRL, datasets and PEFT are there.
    """
    if any(find_spec(name) is None for name in ("trl", "datasets", "peft")):
        raise MissingDependency(INSTALL)
    with undisturbed(0):
        for name in ("trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "trl.experimental.cpo", "peft"):
            import_module(name)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    validation: Rows,
    settings: Settings,
    folder: Path,
    *,
    min_improvement: float,
) -> History:
    """Train `model` **in place** with early stopping, and leave it at its best weights.

    Validation loss is computed after every epoch, or every `EVALUATED_EVERY` steps where an epoch is longer; after
    `patience` times, past the warm-up, that lower it by less than `min_improvement` nats the run ends. `folder` holds
    checkpoints meanwhile. Random state and logging of the process are as before afterwards.
    """
    with undisturbed(settings.seed):
        trainer = _trainer(model, tokenizer, train, validation, settings, folder, min_improvement)
        if settings.loss in ("dpo", "bfpo"):
            starting = math.log(2)  # the reference is the model itself
        else:
            with torch.random.fork_rng():  # a look draws numbers, and the run's own are to stay the same
                starting = trainer.evaluate()["eval_loss"]
        trainer.train()
    state = trainer.state
    looks = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    first = next(entry["loss"] for entry in state.log_history if "loss" in entry)
    best = min(looks, key=lambda step: looks[step] if math.isfinite(looks[step]) else math.inf)
    return History(list(looks.values()), list(looks), best, state.global_step, first, starting)


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    validation: Rows,
    settings: Settings,
    folder: Path,
    min_improvement: float,
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback

    longest = max(len(text.ids) for rows in (train, validation) for text in (*rows.chosen, *rows.rejected))
    epoch = -(-len(train.chosen) // settings.batch_size)
    most = epoch * settings.epochs if settings.max_steps is None else min(settings.max_steps, epoch * settings.epochs)
    every, warm_up = min(epoch, EVALUATED_EVERY, most), warm_up_steps(most)
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "max_steps": -1 if settings.max_steps is None else most,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "seed": settings.seed,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_only_model": True,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": warm_up,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,  # weights are float32 while they are trained
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "dataloader_pin_memory": False,
        "max_length": longest,  # nothing is cut
    }
    callbacks = [_early_stopping(settings.patience, min_improvement, warm_up)]
    tables = [Dataset.from_list(_COLUMNS[settings.loss](rows)) for rows in (train, validation)]
    kind, config = {"dpo": _dpo, "simpo": _simpo, "sft": _sft, "bfpo": _bfpo}[settings.loss](settings, shared)
    trainer = kind(
        model=model,
        args=config,
        train_dataset=tables[0],
        eval_dataset=tables[1],
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # which prints every loss on stdout
    return trainer


def warm_up_steps(steps: int) -> int:
    """Return how many of a run's steps warm up: `WARM_UP`, or none where they would be more than a tenth.

    Nothing between: transformers gives the first step of any warm-up the rate 0, and a short run has no step to lose.
    """
    return WARM_UP if steps >= 10 * WARM_UP else 0


def _early_stopping(patience: int, min_improvement: float, warm_up: int) -> Any:
    from transformers import EarlyStoppingCallback

    class Stopping(EarlyStoppingCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **others: Any) -> None:
            if state.global_step > warm_up:  # a rate that has not risen yet says nothing about stopping
                super().on_evaluate(args, state, control, metrics, **others)

    return Stopping(patience, min_improvement)


# --- one trainer and its configuration per loss ----------------------------------------------------------------------


def _dpo(settings: Settings, shared: dict[str, Any]) -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the ids are there

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset  # and so are the reference's log-likelihoods

    return Trainer, DPOConfig(**shared, beta=settings.beta, precompute_ref_log_probs=True)


def _bfpo(settings: Settings, shared: dict[str, Any]) -> tuple[Any, Any]:
    base, config = _dpo(settings, shared)

    class Trainer(base):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            collate: Any = self.data_collator
            self.data_collator = lambda rows: collate(rows) | {"targets": torch.tensor([r["target"] for r in rows])}

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: Any) -> Any:
            others = dict(inputs)
            self.beta = config.beta / 2 / others.pop("targets")  # one for each row, [B], where TRL has one for all
            return super()._compute_loss(model, others, return_outputs)

    return Trainer, config


def _simpo(settings: Settings, shared: dict[str, Any]) -> tuple[Any, Any]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Trainer(CPOTrainer):
        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            return {}  # the ids are there

    # TRL divides gamma by beta within the sigmoid and multiplies the whole by beta: its gamma is the paper's.
    own: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": settings.beta, "simpo_gamma": settings.gamma}
    return Trainer, CPOConfig(**shared, **own)


def _sft(settings: Settings, shared: dict[str, Any]) -> tuple[Any, Any]:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer, SFTConfig(**shared, completion_only_loss=True)


# --- rows as the trainers' columns ----------------------------------------------------------------------------------


def _dpo_columns(rows: Rows) -> list[dict[str, Any]]:
    assert rows.reference is not None
    return [
        {
            "prompt_ids": chosen.ids[: chosen.start],
            "chosen_ids": chosen.ids[chosen.start :],
            "rejected_ids": rejected.ids[rejected.start :],
            "ref_chosen_logps": float(good),
            "ref_rejected_logps": float(bad),
        }
        for chosen, rejected, good, bad in zip(rows.chosen, rows.rejected, *rows.reference, strict=True)
    ]


def _bfpo_columns(rows: Rows) -> list[dict[str, Any]]:
    assert rows.targets is not None
    return [row | {"target": float(t)} for row, t in zip(_dpo_columns(rows), rows.targets, strict=True)]


def _simpo_columns(rows: Rows) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for chosen, rejected in zip(rows.chosen, rows.rejected, strict=True):
        row: dict[str, Any] = {"prompt": "", "chosen": "", "rejected": ""}  # texts that TRL looks at, and we do not use
        row |= {"prompt_input_ids": chosen.ids[: chosen.start], "prompt_attention_mask": [1] * chosen.start}
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            row[f"{name}_input_ids"] = text.ids
            row[f"{name}_attention_mask"] = [1] * len(text.ids)
            row[f"{name}_labels"] = [-100] * text.start + text.ids[text.start :]
        made.append(row)
    return made


def _sft_columns(rows: Rows) -> list[dict[str, Any]]:
    return [
        {"input_ids": text.ids, "completion_mask": [0] * text.start + [1] * (len(text.ids) - text.start)}
        for text in rows.chosen
    ]


_COLUMNS: Mapping[Loss, Callable[[Rows], list[dict[str, Any]]]] = {
    "dpo": _dpo_columns,
    "simpo": _simpo_columns,
    "sft": _sft_columns,
    "bfpo": _bfpo_columns,
}
