"""What one worker of a reproduction holds, and how a system is measured there: everything once, on test items."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from trimtab.artifact import AnyKnob
from trimtab.evals.choices import ChoiceTask, Prompt
from trimtab.evals.graders import repetition
from trimtab.evals.likelihood import divergence, pair_margins, render_texts
from trimtab.evals.tasks import AnyTask, Outcome, Task, run_task
from trimtab.evals.trial import KL_ITEMS
from trimtab.pairs import Pairs
from trimtab.render import load
from trimtab.reproduce.data import Data, Split
from trimtab.reproduce.recipe import BenchRecipe, BenchSizes, Domain
from trimtab.runtime import Dose
from trimtab.types import Message, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class System:
    """What answers: a model, knobs turned on it, and turns that stand before every question."""

    model: PreTrainedModel
    knobs: Dose = field(default_factory=dict[AnyKnob, float])
    before: tuple[Message, ...] = ()


R = TypeVar("R", bound=BenchRecipe)
S = TypeVar("S", bound=BenchSizes)


class Bench(Generic[R, S]):
    """One model with the recipe's data; whatever is drawn is kept, since many systems are measured on it."""

    def __init__(self, name: str, recipe: R, sizes: S, root: Path) -> None:
        loaded = load(name, dtype=recipe.dtype)
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.recipe, self.sizes, self._data = recipe, sizes, Data(root, recipe.data_seed)
        self._tasks: dict[tuple[str, Split, int], AnyTask] = {}
        self._rails: list[float] | None = None
        self._base_answers: dict[Split, list[tuple[Prompt, str]]] = {}

    @property
    def base(self) -> System:
        """The model as it is."""
        return System(self.model)

    def pairs(self, domain: Domain, n: int, seed: int) -> Pairs:
        """Draw the pairs that one seed learns from."""
        return self._data.training_pairs(domain.pairs, n, seed=seed)

    def held_out(self, domain: Domain, split: Split) -> Pairs:
        """Draw the pairs that choose, or test."""
        n = self.sizes.validation_pairs if split == "validation" else self.sizes.test_pairs
        return self._data.held_out_pairs(domain.pairs, split, n)

    def task(self, source: str, split: Split, n: int) -> AnyTask:
        """Draw questions; a task is drawn once, since it remembers the programs that it has tested."""
        if (source, split, n) not in self._tasks:
            task = self._data.questions(source, split, n)
            limit = min(task.max_new_tokens, self.sizes.max_new_tokens)
            self._tasks[source, split, n] = replace(task, max_new_tokens=limit)
        return self._tasks[source, split, n]

    def training_task(self, source: str, n: int, seed: int) -> Task:
        """Draw questions to train on by their grader; raises `PairsError` for a source that keeps none for that."""
        return self._data.training_questions(source, n, seed=seed)

    def guardrails(self, split: Split) -> list[AnyTask]:
        """Draw the questions of every guardrail."""
        n = self.sizes.guard if split == "validation" else self.sizes.test_guard
        return [self.task(source, split, n) for source in self.recipe.guardrails]

    def run(self, system: System, task: AnyTask, *, temperature: float = 0.0, seed: int = 0) -> Outcome:
        """Let a system answer a task."""
        asked = tuple(after(system.before, prompt) for prompt in task.prompts)
        return run_task(
            system.model,
            self.tokenizer,
            replace(task, prompts=asked) if system.before else task,
            system.knobs,
            temperature=temperature,
            seed=seed,
            batch_size=self.sizes.batch_size,
        )

    # --- on validation questions ----------------------------------------------------------------------------------

    def validate(self, system: System, domain: Domain) -> dict[str, Any]:
        """Return what validation questions show: score, broken answers, guardrails, whether these keep the budget."""
        answered = self.run(system, self.task(domain.task, "validation", self.sizes.validation))
        rails = [self.run(system, rail).accuracy for rail in self.guardrails("validation")]
        if self._rails is None:
            self._rails = [self.run(self.base, rail).accuracy for rail in self.guardrails("validation")]
        drop = max((before - now for before, now in zip(self._rails, rails, strict=True)), default=0.0)
        return {
            "score": answered.accuracy,
            "broken": float(answered.degenerate.mean()),
            "guardrails": rails,
            "within_budget": drop <= self.recipe.budget + 1e-9,
        }

    # --- on test questions ----------------------------------------------------------------------------------------

    def measure(self, system: System, domain: Domain, *, seed: int = 0) -> dict[str, Any]:
        """Measure a system on everything; scores are lists of one number per test item.

        `greedy` and `sampled` (temperature 1) hold scores, the share of the preferred side, the score within it, broken
        answers, repetition and length in characters; `seconds_per_answer` is of the greedy answers, grading included;
        `guardrails` scores by name; `preference` 0 or 1 and the margin in nats per held-out pair; `kl` is
        KL(base || system) in nats per token over the base model's answers to guardrails.
        """
        task = self.task(domain.task, "test", self.sizes.test)
        sampled = first(task, self.sizes.sampled)
        rails = self.guardrails("test")
        margins = self.margins(system, domain)
        begun = time.perf_counter()
        answered = self.run(system, task)
        seconds = time.perf_counter() - begun
        return {
            "greedy": summary(task, answered),
            "seconds_per_answer": seconds / len(task),
            "sampled": summary(sampled, self.run(system, sampled, temperature=1.0, seed=seed)),
            "guardrails": {rail.name: self.run(system, rail).scores.tolist() for rail in rails},
            "preference": {"right": (margins > 0).astype(float).tolist(), "margin": margins.tolist()},
            "kl": self.kl(system),
        }

    def score(self, system: System, domain: Domain) -> list[float]:
        """Return the scores of the domain's test items, greedy."""
        return self.run(system, self.task(domain.task, "test", self.sizes.test)).scores.tolist()

    def margins(self, system: System, domain: Domain) -> np.ndarray:
        """Return the margins of the domain's test pairs, in nats, [N]."""
        pairs = Pairs(Pair((*system.before, *p.prompt), p.chosen, p.rejected) for p in self.held_out(domain, "test"))
        return pair_margins(system.model, self.tokenizer, pairs, [system.knobs])[0].margin

    def kl(self, system: System, split: Split = "test") -> float | None:
        """Return KL(base || system) in nats per token over the base model's answers to guardrails; None without any."""
        if split not in self._base_answers:
            rails = [first(rail, KL_ITEMS) for rail in self.guardrails(split)]
            told = [list(zip(rail.prompts, self.run(self.base, rail).answers, strict=True)) for rail in rails]
            self._base_answers[split] = [(prompt, answer) for items in told for prompt, answer in items if answer]
        if not self._base_answers[split]:
            return None
        said = [answer for _, answer in self._base_answers[split]]
        render = partial(render_texts, self.tokenizer, answers=said)
        bare = render([after((), prompt) for prompt, _ in self._base_answers[split]])
        asked = render([after(system.before, prompt) for prompt, _ in self._base_answers[split]])
        return divergence(self.model, self.tokenizer, bare, system.knobs, other=system.model, other_texts=asked)


def after(before: Sequence[Message], prompt: Prompt) -> tuple[Message, ...]:
    """Put turns before a prompt."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return (*before, *turns)


def first(task: AnyTask, n: int) -> AnyTask:
    """Return the task's first `n` questions."""
    if n >= len(task):
        return task
    if isinstance(task, ChoiceTask):
        return replace(task, prompts=task.prompts[:n], choices=task.choices[:n], right=task.right[:n])
    rest = [""] * (len(task) - n)
    return replace(task, prompts=task.prompts[:n], grade=lambda answers: task.grade([*answers, *rest])[:n])


def summary(task: AnyTask, outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain JSON values."""
    return {
        "scores": outcome.scores.tolist(),
        "on_side": [float(side == task.target) for side in outcome.sides] if task.target else None,
        "side_share": outcome.share(task.target) if task.target else None,
        "score_within_side": outcome.accuracy_within(task.target) if task.target else None,
        "broken": float(outcome.degenerate.mean()),
        "repetition": float(np.mean([repetition(answer) for answer in outcome.answers])),
        "characters": float(np.mean([len(answer) for answer in outcome.answers])),
    }
