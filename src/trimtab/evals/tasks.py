"""A task: prompts, a grader for each answer, and which side of a preference an answer is on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trimtab.checkpoint import fingerprint
from trimtab.errors import OptionError, PairsError, TrimtabWarning, brief, unknown_name
from trimtab.evals.choices import ChoiceTask, Prompt, choose
from trimtab.evals.graders import degenerate, exact_answer, exact_match, is_refusal
from trimtab.evals.sandbox import Sandbox
from trimtab.formats import read_file
from trimtab.generate import Generation, generate
from trimtab.prompts import read_prompt
from trimtab.runtime import Dose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRADERS: dict[str, Callable[[str, str], bool]] = {
    "exact_answer": exact_answer,
    "exact_match": exact_match,
    "contains": lambda text, truth: truth.casefold() in text.casefold(),
    "refusal": lambda text, truth: is_refusal(text) == (truth.casefold() in ("true", "yes", "1")),
}


@dataclass(frozen=True)
class Task:
    """Prompts with a grader that looks at all answers at once, one score from 0 to 1 each.

    `grade` takes the answers in the order of `prompts`. `side`, where the task has one, names the side of the
    preference that answer number i is on (None: neither); `target` is the side that a positive strength should bring.
    """

    name: str
    prompts: tuple[Prompt, ...]
    grade: Callable[[Sequence[str]], Sequence[float]]
    side: Callable[[int, str], str | None] | None = None
    target: str | None = None
    max_new_tokens: int = 128
    runs_code: bool = False
    """Answers are run, in the sandbox."""

    def __len__(self) -> int:
        return len(self.prompts)


AnyTask = Task | ChoiceTask


@dataclass(frozen=True)
class Outcome:
    """The answers to a task and what they are worth: `scores` [n], `sides`, `degenerate` [n] as 0 or 1.

    Of a task by likelihood, `answers` are the likeliest ones, `likelihoods` those of all given ones, per item, and
    `margins` [n] by how many nats right ones are likelier than wrong ones. Where answers were run, `isolation` says
    what kept them apart.
    """

    answers: tuple[str, ...]
    scores: np.ndarray
    sides: tuple[str | None, ...]
    degenerate: np.ndarray
    likelihoods: Sequence[Sequence[float]] | None = None
    margins: np.ndarray | None = None
    isolation: str | None = None

    def said(self) -> dict[str, Any]:
        """Return what the model said as JSON values, which `grade_said` grades again."""
        if self.likelihoods is not None:
            return {"likelihoods": [list(values) for values in self.likelihoods]}
        return {"answers": list(self.answers), "broken": self.degenerate.tolist()}

    @property
    def accuracy(self) -> float:
        """The mean score."""
        return float(self.scores.mean())

    def share(self, side: str | None) -> float:
        """Return the share of answers on `side`."""
        return float(np.mean([s == side for s in self.sides]))

    def accuracy_within(self, side: str | None) -> float | None:
        """Return the mean score of the answers on `side`, or None where there are none."""
        inside = [score for score, s in zip(self.scores, self.sides, strict=True) if s == side]
        return float(np.mean(inside)) if inside else None


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: AnyTask,
    knobs: Dose | None = None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
) -> Outcome:
    """Generate an answer to every prompt of a task under one knob setting, and grade them.

    Of a task by likelihood nothing is generated: `temperature`, `seed` and `batch_size` have no effect there.
    """
    if isinstance(task, ChoiceTask):
        return grade_said(task, {"likelihoods": choose(model, tokenizer, task, knobs)})
    made: list[Generation] = generate(
        model,
        tokenizer,
        task.prompts,
        knobs=knobs,
        max_new_tokens=task.max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        strict=None,
    )
    return grade_answers(task, [g.text for g in made], [float(degenerate(g.text, g.finished)) for g in made])


def grade_said(task: AnyTask, said: Mapping[str, Any]) -> Outcome:
    """Grade what a model has said, in the form of `Outcome.said`."""
    if not isinstance(task, ChoiceTask):
        return grade_answers(task, said["answers"], said["broken"])
    likelihoods: list[list[float]] = said["likelihoods"]
    likeliest = (choices[int(np.argmax(row))] for choices, row in zip(task.choices, likelihoods, strict=True))
    n = len(task)
    scores, margins = task.score(likelihoods), task.margins(likelihoods)
    return Outcome(tuple(likeliest), scores, (None,) * n, np.zeros(n), likelihoods, margins)


def grade_answers(task: Task, answers: Sequence[str], broken: Sequence[float]) -> Outcome:
    """Grade the answers to a task's prompts; `broken` says of each with 0 or 1 whether it is degenerate."""
    sides = tuple(task.side(i, text) if task.side else None for i, text in enumerate(answers))
    said = tuple(answers)
    scores, isolation = np.asarray(task.grade(said), dtype=float), _isolation() if task.runs_code else None
    return Outcome(said, scores, sides, np.asarray(broken, dtype=float), isolation=isolation)


def what_is_asked(task: AnyTask) -> list[Any]:
    """Return what answers and likelihoods of a task depend on, as JSON; graders and rules look at them afterwards."""
    asked = [task.name, len(task), task.max_new_tokens, fingerprint(task.prompts)]
    return [*asked, fingerprint(task.choices), task.per, task.closing] if isinstance(task, ChoiceTask) else asked


@lru_cache(maxsize=1)
def _isolation() -> str:
    with Sandbox() as sandbox:
        return sandbox.isolation


def load_task(path: str | Path, *, grader: str = "exact_match", max_new_tokens: int = 128) -> Task:
    """Read a task from records with `prompt` (text or messages) and `answer` (text or a number).

    The file is JSON lines, JSON, CSV, TSV or Parquet, by its suffix, and read as strictly as one of pairs. `grader` is
    one of `GRADERS`; for "refusal" the answer says whether one is wanted, and may be left out where it is. A question
    that is asked again counts once, with a `TrimtabWarning`. Raises `OptionError` for a bad record, and for a question
    with two true answers, and `UnknownName` for another grader.
    """
    if grader not in GRADERS:
        raise unknown_name("grader", grader, GRADERS)
    try:
        records = read_file(path)
    except PairsError as error:
        raise OptionError(str(error)) from None
    prompts: list[Prompt] = []
    truths: list[str] = []
    told: dict[str, tuple[str, str]] = {}
    for place, record in records:
        fields = cast(Mapping[str, object], record) if isinstance(record, Mapping) else {}
        # Without a word on it, a refusal is what is wanted.
        prompt, answer = fields.get("prompt"), fields.get("answer", "true" if grader == "refusal" else None)
        if prompt is None or isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise OptionError(
                f"{path}: {place} needs a prompt (text or messages) and an answer (text or a number); got "
                f"{brief(record)}."
            )
        try:
            prompt = prompt if isinstance(prompt, str) else read_prompt(prompt)
        except OptionError as error:
            raise OptionError(f"{path}: {place}: {error}") from None
        truth = str(answer)
        if not truth.strip() or (isinstance(prompt, str) and not prompt.strip()):
            raise OptionError(f"{path}: {place}: the {'answer' if not truth.strip() else 'prompt'} is empty.")
        known = told.setdefault(fingerprint(read_prompt(prompt)), (place, truth))
        if known[1] != truth:
            raise OptionError(f"{path}: {known[0]} and {place} ask the same with two true answers.")
        if known[0] != place:
            continue
        prompts.append(prompt)
        truths.append(truth)
    if not prompts:
        raise OptionError(f"{path} holds no items.")
    if len(prompts) < len(records):
        again = len(records) - len(prompts)
        said = f"{path} asks {again} of its {len(records)} questions again; each counts once."
        warnings.warn(said, TrimtabWarning, stacklevel=2)
    judge = GRADERS[grader]
    return Task(
        name=Path(path).stem,
        prompts=tuple(prompts),
        grade=lambda answers: [float(judge(a, t)) for a, t in zip(answers, truths, strict=True)],
        max_new_tokens=max_new_tokens,
    )
