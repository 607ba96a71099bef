"""A knob setting beside the base model on validation items: scores, guardrails, broken answers, budgets kept or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab.artifact import AnyKnob
from trimtab.checkpoint import NO_CHECKPOINT, Checkpoint
from trimtab.evals.choices import ChoiceTask, Prompt
from trimtab.evals.effects import own_answers
from trimtab.evals.likelihood import divergence
from trimtab.evals.tasks import AnyTask, Outcome, Task, grade_said, run_task
from trimtab.runtime import Dose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KL_ITEMS = 16
BROKEN = "broken answers"
"""What their excess is called, beside those of the guardrails."""


class Measured(NamedTuple):
    """What a trial found under a setting: a row of plain values, and the scores `[n]` of every task's items."""

    row: dict[str, Any]
    items: list[np.ndarray]
    rail_items: list[np.ndarray]
    """Those of the guardrails."""


class Trial:
    """Measures knob settings against the base model, on the same validation items.

    `tasks` should get better and `guardrails` stay as they are. Without a task, or where all of both are decided by
    likelihood, the answers to `prompts` still show where a dose begins to break the model. `budget` is the share of
    items that a guardrail may lose, `broken_budget` the share of answers that may break (empty, cut, repeating). `base`
    holds the base model's score (the mean over the tasks), guardrails and broken share, `base_items` and
    `base_rail_items` its scores of items, `isolation` what kept answers apart that were run. `kept` keeps what the
    model says, and not what a grader makes of it: answers that are taken from there are graded again, so another
    grader counts at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        tasks: Sequence[AnyTask],
        guardrails: Sequence[AnyTask],
        budget: float,
        broken_budget: float,
        batch_size: int,
        kept: Checkpoint = NO_CHECKPOINT,
    ) -> None:
        self._model, self._tokenizer, self._batch, self._kept = model, tokenizer, batch_size, kept
        stand_in = Task("prompts", tuple(prompts[:KL_ITEMS]), lambda answers: [0.0] * len(answers), max_new_tokens=48)
        self._tasks: list[AnyTask] = [*(tasks or [stand_in]), *guardrails]
        if all(isinstance(one, ChoiceTask) for one in self._tasks):
            self._tasks.append(stand_in)
        self._scored = range(len(tasks))
        first = max(len(tasks), 1)
        self._rails = range(first, first + len(guardrails))
        self.budget, self.broken_budget = budget, broken_budget
        outcomes = self._run({})
        self.base: dict[str, Any] = self._summary(outcomes)
        self.base_items, self.base_rail_items = self._items(outcomes)
        self.isolation = next((o.isolation for _, o in outcomes if o.isolation), None)
        # What must stay as it is shows damage; without guardrails, what the knobs do to any answer.
        held = [list(zip(t.prompts, o.answers, strict=True))[:KL_ITEMS] for t, o in outcomes[first:] or outcomes]
        told = [item for items in held for item in items]
        self._texts = own_answers(model, tokenizer, [prompt for prompt, _ in told], [answer for _, answer in told])

    def measure(self, setting: Dose) -> Measured:
        """Return score, guardrails, broken share, KL and whether the budgets are kept; and the items' scores.

        `kl` is KL(base || steered) in nats per token over the base model's own answers to the first `KL_ITEMS` prompts
        of every guardrail (of the tasks where there are none); it is left out where all of them are empty.
        """
        outcomes = self._run(setting)
        row = self._summary(outcomes)
        row["within_budget"] = max(self.excess(row).values()) <= 1e-9
        if self._texts:
            compare = partial(divergence, self._model, self._tokenizer, self._texts, setting)
            row["kl"] = self._kept.step(f"kl {_spell(setting)}", compare)
        return Measured(row, *self._items(outcomes))

    def excess(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Return by how much a row exceeds the budget of each guardrail, and of broken answers; 0 or less is kept."""
        drops = {g: self.base["guardrails"][g] - value - self.budget for g, value in row["guardrails"].items()}
        return {**drops, BROKEN: row["broken"] - self.base["broken"] - self.broken_budget}

    def curve(
        self, knob: AnyKnob, strengths: Sequence[float], at_one: Mapping[str, Any], advance: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Measure a knob's dose-response, strength 0 included, in the order of the strengths.

        `at_one` is what `measure` said of strength 1.
        """
        rows = [{"strength": 0.0, "alpha": 0.0, **self.base, "within_budget": True, "kl": 0.0}]
        for s in strengths:
            if s != 0:
                measured = at_one if s == 1 else self.measure({knob: s}).row
                rows.append({"strength": s, "alpha": knob.alpha(s), **measured})
            advance()
        return sorted(rows, key=lambda row: row["strength"])

    def _run(self, setting: Dose) -> list[tuple[AnyTask, Outcome]]:
        return [(t, self._outcome(f"answers {i} {_spell(setting)}", t, setting)) for i, t in enumerate(self._tasks)]

    def _outcome(self, key: str, task: AnyTask, setting: Dose) -> Outcome:
        fresh: list[Outcome] = []

        def answer() -> dict[str, Any]:
            fresh.append(run_task(self._model, self._tokenizer, task, setting, batch_size=self._batch))
            return fresh[0].said()

        said = self._kept.step(key, answer)
        return fresh[0] if fresh else grade_said(task, said)

    def _summary(self, outcomes: list[tuple[AnyTask, Outcome]]) -> dict[str, Any]:
        scores = [outcomes[i][1].accuracy for i in self._scored]
        # Given answers cannot break, and must not hide among their number those that did.
        broken = float(np.mean(np.concatenate([o.degenerate for t, o in outcomes if not isinstance(t, ChoiceTask)])))
        rails = {outcomes[i][0].name: outcomes[i][1].accuracy for i in self._rails}
        return {"score": float(np.mean(scores)) if scores else None, "guardrails": rails, "broken": broken}

    def _items(self, outcomes: list[tuple[AnyTask, Outcome]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return [outcomes[i][1].scores for i in self._scored], [outcomes[i][1].scores for i in self._rails]


def _spell(setting: Dose) -> str:
    """Write a setting so that two that differ never read alike: knobs of one setting have names of their own."""
    spelled = (
        f"{k.name} {getattr(k, 'site', 'weights')} {k.where} gain {float(k.gain)!r} strength {float(s)!r}"
        for k, s in setting.items()
    )
    return ", ".join(spelled) or "base"


def safe_range(curve: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the largest unbroken range of measured strengths around 0 that keeps the budgets, from `Trial.curve`."""
    low = high = 0.0
    for row in curve:
        if row["strength"] > 0:
            if not row["within_budget"]:
                break
            high = row["strength"]
    for row in reversed(curve):
        if row["strength"] < 0:
            if not row["within_budget"]:
                break
            low = row["strength"]
    return low, high
