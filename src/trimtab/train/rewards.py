"""Train on a reward instead of pairs, with RLOO or GRPO: any function of prompt and answer, such as an exact grader.

`reinforce` is what `train` is for pairs: a copy is trained, stopped by validation, and comes back with its record. Two
models of two rewards make a Rewarded Soup (arXiv:2306.04488) with `trimtab.train.soup`.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.checkpoint import Checkpoint, describe_model, fingerprint, versions
from trimtab.errors import OptionError, TrainError, TrimtabWarning, unknown_name
from trimtab.evals.cost import measured
from trimtab.evals.tasks import Task
from trimtab.pairs import prompt_hash
from trimtab.prompts import Prompt, end_ids, read_prompt
from trimtab.render import Renderer
from trimtab.train import Trained, check_model
from trimtab.train.loops import merge
from trimtab.train.rollouts import Conversation, Method, Reward, Rollouts, Run, load_rollouts, roll
from trimtab.types import check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD = 0.3
"""Share of prompts that is held out where no validation prompts are given."""


def task_reward(*tasks: Task) -> Reward:
    """Return the graders of tasks as a reward: an answer to one of their prompts is worth what its task gives for it.

    A grader looks at all answers of its task at once: other answers are empty meanwhile. The reward raises
    `OptionError` for a prompt of none of the tasks; of two tasks that ask the same, the first one grades.
    """
    places: dict[Conversation, tuple[int, int]] = {}
    for number, task in enumerate(tasks):
        for place, prompt in enumerate(task.prompts):
            places.setdefault(read_prompt(prompt), (number, place))

    def reward(prompts: Sequence[Conversation], answers: Sequence[str]) -> list[float]:
        scores = [0.0] * len(answers)
        rounds: list[dict[tuple[int, int], int]] = []  # in each, an answer at most to every prompt
        for row, prompt in enumerate(prompts):
            if prompt not in places:
                raise OptionError(f"None of the {len(tasks)} tasks of the reward asks {prompt[-1].content!r}.")
            where = places[prompt]
            free = next((one for one in rounds if where not in one), None)
            if free is None:
                rounds.append(free := {})
            free[where] = row
        for one in rounds:
            for number in {number for number, _ in one}:
                own = {place: row for (task, place), row in one.items() if task == number}
                texts = [answers[own[place]] if place in own else "" for place in range(len(tasks[number]))]
                graded = tasks[number].grade(texts)
                for place, row in own.items():
                    scores[row] = float(graded[place])
        return scores

    return reward


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    method: Method = "rloo",
    validation: Sequence[Prompt] | None = None,
    learning_rate: float = 1e-5,
    kl: float = 0.05,
    steps: int = 100,
    batch_size: int = 8,
    answers: int = 8,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    lora_rank: int | None = None,
    look_every: int = 10,
    patience: int | None = None,
    seed: int = 0,
    rewarded_by: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train a copy of `model` to give answers that `reward` is high for; `model` itself stays as it is.

    `method`: "rloo" (arXiv:2402.14740: a sampled answer counts by its reward over the mean of its siblings, with `kl`
    times the log ratio to `model` taken off the reward) or "grpo" (arXiv:2402.03300 with TRL's defaults: rewards are
    normalised within a prompt, and `kl` weighs a term of the loss). Both are TRL's. A step samples `answers` to each of
    `batch_size` prompts at `temperature`, of at most `max_new_tokens` tokens, and updates once. `reward` gets the
    prompts as messages, one for each answer, and the texts of the answers, and returns as many finite numbers;
    `task_reward` makes one of a task's grader.

    After every `look_every` steps the mean reward of one sampled answer to each of the `validation` prompts is taken,
    with the same random numbers each time; the weights of the best look count. After `steps`, or after `patience` looks
    in a row without a better one, the run ends. Without `validation` three tenths of the prompts are held out. A
    `TrimtabWarning` says so where no look was better than `model`.

    Weights are float32 while they are trained and have the model's dtype afterwards; the rate is constant. `lora_rank`:
    as in `trimtab.train.train`. All weights of a model of some billion parameters want rates about 1e-6, adapters ten
    times that, small models up to 1e-3.

    `Trained.record` holds every option, the validation reward at each look, the mean reward and the divergence from
    `model` in nats per token at each step (none with `kl` 0), and what it cost. `checkpoint` is a folder that keeps the
    finished run, which the same call then returns; it wants `rewarded_by`, a text that tells this reward from others.
    `progress` is called with the steps that are done and their number.

    Raises `MissingDependency` without TRL, `TrainError` for weights or rewards that are not finite, and `OptionError`
    for other options, and for prompts that leave no room in the model's context or that are in `validation` too.
    """
    run = Run(
        method=method,
        learning_rate=learning_rate,
        kl=kl,
        steps=steps,
        batch_size=batch_size,
        answers=answers,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        lora_rank=lora_rank,
        look_every=look_every,
        patience=patience,
        seed=check_seed(seed),
    )
    _check(run)
    if checkpoint is not None and rewarded_by is None:
        raise OptionError(
            "A checkpoint keeps what was rewarded: say in rewarded_by, a text, what tells it from others."
        )
    load_rollouts()
    check_model(model)
    used, held = _split([read_prompt(prompt) for prompt in prompts], validation, seed)
    rollouts = _render(model, tokenizer, used, held, reward, max_new_tokens)
    kept = Checkpoint(
        checkpoint,
        lambda: (
            {"work": "rewards", **describe_model(model, tokenizer), **asdict(run), "prompts": fingerprint(used)}
            | {"validation": fingerprint(held), "rewarded by": rewarded_by}
        ),
    )
    made: list[dict[str, Tensor]] = []

    def compute() -> dict[str, Any]:
        weights, history = _train(model, tokenizer, rollouts, run, progress)
        made[:] = [weights]
        return history

    history = kept.step("history", compute)
    weights = kept.tensors("weights", lambda: made[0] if made else (compute() and made[0]))
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(weights[name])
    _warn_of_nothing(history)
    record: dict[str, Any] = {
        "method": method,
        "options": asdict(run),
        "rewarded_by": rewarded_by,
        "prompts": {"count": len(used), "hash": fingerprint(used)},
        "validation": {"count": len(held), "hash": fingerprint(held), "held_out_of_prompts": validation is None},
        **history,
        "versions": versions(),
    }
    return Trained(trained, record)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts,
    run: Run,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train a copy; return its weights by name, tied ones once, and how it went."""
    with measured() as cost, tempfile.TemporaryDirectory(prefix="trimtab-reward-") as folder:
        student = copy.deepcopy(model)
        torch.nn.Module.float(student).train().requires_grad_(True)
        student, history = roll(student, copy.deepcopy(tokenizer), rollouts, run, Path(folder), progress)
        trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
        made = copy.deepcopy(model)  # a copy that no trainer has touched takes the weights
        made.load_state_dict(merge(student) if run.lora_rank is not None else student.state_dict())
    weights = {name: parameter.detach().contiguous() for name, parameter in made.named_parameters()}
    if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        raise TrainError("Training ended in weights that are not finite. Try a smaller learning_rate.")
    best = history.steps.index(history.best_step)
    return weights, {
        "starting_reward": history.starting_reward,
        "validation_rewards": history.validation_rewards,
        "looked_at": history.steps,
        "best_step": history.best_step,
        "best_reward": history.validation_rewards[best],
        "steps": history.done,
        "rewards": history.rewards,
        "divergences": history.divergences,
        "run": {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes},
        "trainable_parameters": trainable,
    }


def _warn_of_nothing(history: Mapping[str, Any]) -> None:
    if history["best_reward"] <= history["starting_reward"]:
        warnings.warn(
            f"The validation reward never rose above the {history['starting_reward']:.4g} that it started from (at "
            f"best {history['best_reward']:.4g}): the trained model may be no better than the base model. Try more "
            "steps, another learning_rate, or a smaller kl.",
            TrimtabWarning,
            stacklevel=3,
        )


def _render(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    used: list[Conversation],
    held: list[Conversation],
    reward: Reward,
    max_new_tokens: int,
) -> Rollouts:
    renderer, adapter = Renderer(tokenizer), Adapter(model)
    everything = [*used, *held]
    ids = [renderer.prompt_ids(messages) for messages in everything]
    longest, limit = max(map(len, ids)), adapter.context_length
    if limit is not None and longest + max_new_tokens > limit:
        raise OptionError(
            f"The longest prompt has {longest} tokens, and this model's context holds {limit}: there is no room for "
            f"{max_new_tokens} new ones. Lower max_new_tokens, or leave long prompts out."
        )
    for row in ids:
        adapter.check_ids(row)
    return Rollouts(everything, ids, len(used), reward, renderer, end_ids(model, tokenizer))


def _split(
    prompts: list[Conversation], validation: Sequence[Prompt] | None, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the prompts to train on and those to look at; prompts that differ in system lines alone stay together."""
    names = [prompt_hash(prompt) for prompt in prompts]
    if validation is not None:
        held = [read_prompt(prompt) for prompt in validation]
        if not prompts or not held:
            raise OptionError(f"Training needs prompts, and validation too; got {len(prompts)} and {len(held)}.")
        shared = set(names) & {prompt_hash(prompt) for prompt in held}
        if shared:
            raise OptionError(f"{len(shared)} of the validation prompts are training prompts too. Hold out other ones.")
        return prompts, held
    known = sorted(set(names))
    if len(known) < 2:
        raise OptionError(f"Holding prompts out needs at least 2 different ones; there are {len(known)}.")
    aside = set(Random(seed).sample(known, min(max(round(HELD * len(known)), 1), len(known) - 1)))
    both = list(zip(prompts, names, strict=True))
    return [p for p, name in both if name not in aside], [p for p, name in both if name in aside]


def _check(run: Run) -> None:
    if run.method not in get_args(Method):
        raise unknown_name("method", str(run.method), get_args(Method))
    for name, least in (("steps", 1), ("batch_size", 1), ("answers", 2), ("max_new_tokens", 1), ("look_every", 1)):
        _check_count(name, getattr(run, name), least)
    for name in ("lora_rank", "patience"):
        if getattr(run, name) is not None:
            _check_count(name, getattr(run, name), 1)
    if not 0 < run.learning_rate < 1:
        raise OptionError(f"The learning rate lies between 0 and 1; got {run.learning_rate!r}.")
    if not (math.isfinite(run.kl) and run.kl >= 0):
        raise OptionError(f"kl is 0 or more; got {run.kl!r}.")
    if not (math.isfinite(run.temperature) and run.temperature > 0):
        raise OptionError(f"Answers are sampled at a temperature above 0; got {run.temperature!r}.")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} counts from {least}; got {value!r}.")
