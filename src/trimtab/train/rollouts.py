"""TRL's trainers for rewards on our own token ids: RLOO and GRPO, the best weights by validation reward.

TRL would render the prompts and decode the answers itself: prompts are numbers to it, whose ids are our renderer's, and
rewards are given for the texts that our renderer makes of the answers' ids.
"""
# TRL is annotated in part, and its public names count as private imports.
# pyright: reportPrivateImportUsage=false, reportIncompatibleMethodOverride=false, reportMissingImports=false

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch

from trimtab.errors import OptionError, TrainError, brief
from trimtab.render import Renderer
from trimtab.train.loops import load_trainers, lora_config
from trimtab.train.process import undisturbed
from trimtab.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["rloo", "grpo"]
Conversation = tuple[Message, ...]
Reward = Callable[[Sequence[Conversation], Sequence[str]], Sequence[float]]
"""What answers are worth: the prompts, one for each answer, and the texts of the answers, to one finite number each."""


@dataclass(frozen=True)
class Run:
    """One run: every option of `reinforce` that the result depends on."""

    method: Method
    learning_rate: float
    kl: float
    steps: int
    batch_size: int
    answers: int
    max_new_tokens: int
    temperature: float
    lora_rank: int | None
    look_every: int
    patience: int | None
    seed: int


@dataclass(frozen=True)
class Rollouts:
    """Prompts with their token ids, the first `used` of them to train on and the others to look at, and the reward."""

    prompts: Sequence[Conversation]
    ids: Sequence[list[int]]
    used: int
    reward: Reward
    renderer: Renderer
    ends: Sequence[int]
    """Ids that end an answer."""

    def score(self, numbers: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each answer, given by its ids, to the prompt of a number."""
        cut = [next((i for i, token in enumerate(row) if token in self.ends), len(row)) for row in answers]
        texts = [self.renderer.decode(row[:end]) for row, end in zip(answers, cut, strict=True)]
        given = list(self.reward([self.prompts[number] for number in numbers], texts))
        if len(given) != len(texts):
            raise OptionError(f"The reward is one number for each answer; got {len(given)} for {len(texts)} answers.")
        for text, value in zip(texts, given, strict=True):
            if not math.isfinite(value):
                raise TrainError(f"The reward of {brief(text)} is {value!r}, which is not finite.")
        return [float(value) for value in given]


@dataclass(frozen=True)
class History:
    """What a run went through: validation rewards and after which steps, and each step's mean reward and divergence."""

    starting_reward: float
    validation_rewards: list[float]
    steps: list[int]
    best_step: int
    done: int
    rewards: list[float]
    divergences: list[float]


def load_rollouts() -> None:
    """Import TRL's trainers, which takes seconds that no run should be charged with; see `load_trainers`."""
    load_trainers()
    with undisturbed(0):
        for name in ("rloo", "grpo"):
            import_module(f"trl.trainer.{name}_trainer")


def roll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts,
    run: Run,
    folder: Path,
    progress: Callable[[int, int], None],
) -> tuple[PreTrainedModel, History]:
    """Train `model` **in place** and return it at its best weights, with its adapter around it if there is one.

    `tokenizer` may be changed. `folder` holds checkpoints meanwhile. Random state and logging of the process are as
    before afterwards.
    """
    with undisturbed(run.seed):
        trainer = _trainer(model, tokenizer, rollouts, run, folder, progress)
        starting = trainer.evaluate()["eval_reward"]
        trainer.train()
    log = trainer.state.log_history
    looks = {entry["step"]: entry["eval_reward"] for entry in log if "eval_reward" in entry}
    steps = [entry for entry in log if "reward" in entry]
    best = max(looks, key=lambda step: looks[step])
    divergences = [entry["kl"] for entry in steps if "kl" in entry]
    return trainer.model, History(
        starting,
        list(looks.values()),
        list(looks),
        best,
        trainer.state.global_step,
        [entry["reward"] for entry in steps],
        divergences,
    )


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts,
    run: Run,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.trainer.utils import add_fused_lm_head

    base: Any
    base, config = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[run.method]
    given: list[float] = []  # rewards since the latest look began

    class Trainer(base):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [list(rollouts.ids[int(prompt)]) for prompt in prompts], None, {}

        def evaluate(self, *arguments: Any, **options: Any) -> Any:
            given.clear()
            with torch.random.fork_rng():  # every look draws the same numbers, and none of the run's own
                torch.manual_seed(run.seed)
                return super().evaluate(*arguments, **options)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "eval_loss" in logs:  # TRL has the mean of the batches' means, and the last batch is smaller
                self._metrics["eval"]["reward"] = [fmean(given)]
            super().log(logs, start_time)

    def score(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        values = rollouts.score(list(map(int, prompts)), completion_ids)
        given.extend(values)
        return values

    order = _order(rollouts.used, run)
    held = range(rollouts.used, len(rollouts.prompts))
    reference = copy.deepcopy(model).eval() if run.kl and run.lora_rank is None else None
    trainer: Any = Trainer(
        model=model,
        reward_funcs=score,
        args=config(**_settings(model, rollouts, run, folder)),
        train_dataset=Dataset.from_list([{"prompt": str(number)} for number in order]),
        eval_dataset=Dataset.from_list([{"prompt": str(number)} for number in held]),
        processing_class=tokenizer,
        callbacks=_callbacks(run, progress),
        peft_config=None if run.lora_rank is None else lora_config(run.lora_rank),
    )
    trainer.remove_callback(PrinterCallback)  # which prints on stdout
    trainer.eos_token_ids = list(rollouts.ends)
    if reference is not None:  # TRL would load one from a folder or the hub: ours is the model as it was
        add_fused_lm_head(reference, temperature=run.temperature)
        trainer.ref_model = reference.requires_grad_(False)
    trainer.beta = run.kl
    return trainer


def _order(count: int, run: Run) -> list[int]:
    """Draw the prompts of all steps: each comes once before any comes again."""
    random, order = Random(run.seed), list[int]()
    while len(order) < run.steps * run.batch_size:
        order += random.sample(range(count), count)
    return order[: run.steps * run.batch_size]


def _settings(model: PreTrainedModel, rollouts: Rollouts, run: Run, folder: Path) -> dict[str, Any]:
    rows = run.batch_size * run.answers
    return {
        "output_dir": str(folder),
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": run.steps,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "num_generations": run.answers,
        "num_generations_eval": 1,
        "max_completion_length": run.max_new_tokens,
        "temperature": run.temperature,
        "generation_kwargs": {"eos_token_id": list(rollouts.ends), "pad_token_id": rollouts.renderer.pad_id},
        "beta": 0.0,  # until the reference is there
        "shuffle_dataset": False,  # the order is drawn
        "seed": run.seed,
        "eval_strategy": "steps",
        "eval_steps": run.look_every,
        "save_strategy": "steps",
        "save_steps": run.look_every,
        "save_only_model": True,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
        "greater_is_better": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,  # weights are float32 while they are trained
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "dataloader_pin_memory": False,
    }


def _callbacks(run: Run, progress: Callable[[int, int], None]) -> list[Any]:
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            progress(state.global_step, run.steps)

    class Stopping(EarlyStoppingCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **others: Any) -> None:
            if state.global_step:  # the look before the first step is not one of the run
                super().on_evaluate(args, state, control, metrics, **others)

    return [Progress(), *([] if run.patience is None else [Stopping(run.patience)])]
