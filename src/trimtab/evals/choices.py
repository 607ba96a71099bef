"""Tasks answered by likelihood: which of several given answers the model finds likelier, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from trimtab.errors import OptionError, unknown_name
from trimtab.evals.likelihood import log_likelihoods, render_texts
from trimtab.pairs import Pairs
from trimtab.runtime import Dose
from trimtab.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | tuple[Message, ...]
Rule = Literal["first", "mass"]
Per = Literal["answer", "token"]


@dataclass(frozen=True)
class ChoiceTask:
    """Prompts with given answers, of which some are right; the model says nothing, its likelihoods are compared.

    `rule`: "first" scores 1 where the likeliest answer is right (multiple choice, mc1); "mass" scores the probability
    of the right answers, renormalised over all given ones (mc2, P(A) of A/B questions). `per`: log-likelihoods are
    summed over an answer ("answer") or averaged over its tokens ("token", which takes the advantage from short
    answers). `closing`: the tokens that close the answer's turn count too, which asks whether the model would say this
    and no more; without them, whether it would begin so ("A" as in "A. Paris"). `side` and `target` are as for tasks
    that generate; there are none.
    """

    name: str
    prompts: tuple[Prompt, ...]
    choices: tuple[tuple[str, ...], ...]
    right: tuple[frozenset[int], ...]
    rule: Rule = "first"
    per: Per = "answer"
    closing: bool = True
    side: None = None
    target: None = None
    max_new_tokens: int = 0
    runs_code: bool = False

    def __post_init__(self) -> None:
        for what, name, known in (("rule", self.rule, Rule), ("per", self.per, Per)):
            if name not in get_args(known):
                raise unknown_name(what, name, get_args(known))
        if not len(self.prompts) == len(self.choices) == len(self.right):
            raise OptionError(
                f"{self.name!r} needs answers and the right ones for every prompt; got {len(self.prompts)} prompts, "
                f"answers for {len(self.choices)} and the right ones for {len(self.right)}."
            )
        for number, (choices, right) in enumerate(zip(self.choices, self.right, strict=True), 1):
            if len(choices) < 2 or not right or not right < set(range(len(choices))):
                raise OptionError(
                    f"Item {number} of {self.name!r} needs two answers or more, some of them right and some wrong; got "
                    f"{len(choices)} answers, of which {len(right)} are right."
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def margins(self, likelihoods: Sequence[Sequence[float]]) -> np.ndarray:
        """Return by how many nats the likeliest right answer of each item is likelier than any wrong one `[n]`."""
        with np.errstate(invalid="ignore"):  # a broken model's may be no numbers
            return np.array([chosen.max() - others.max() for chosen, others in self._parts(likelihoods)])

    def score(self, likelihoods: Sequence[Sequence[float]]) -> np.ndarray:
        """Return one score from 0 to 1 per item `[n]`, from log-likelihoods in nats.

        Equal ones count as wrong, and so do those of a broken model, which are no numbers.
        """
        if self.rule == "first":
            return (self.margins(likelihoods) > 0).astype(float)
        scores: list[float] = []
        with np.errstate(invalid="ignore"):
            for chosen, others in self._parts(likelihoods):
                top = max(chosen.max(), others.max())
                right, wrong = np.exp(chosen - top).sum(), np.exp(others - top).sum()
                scores.append(float(right / (right + wrong)))
        return np.nan_to_num(np.array(scores), nan=0.0)

    def _parts(self, likelihoods: Sequence[Sequence[float]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the log-likelihoods of each item's right answers, and of its wrong ones."""
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for values, right in zip(likelihoods, self.right, strict=True):
            at, chosen = np.asarray(values, dtype=float), np.isin(np.arange(len(values)), list(right))
            parts.append((at[chosen], at[~chosen]))
        return parts


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ChoiceTask,
    knobs: Dose | None = None,
    *,
    token_budget: int = 8192,
) -> list[list[float]]:
    """Return the log-likelihood of every item's every answer in nats, per answer or per token as the task says."""
    turns = [(Message("user", p),) if isinstance(p, str) else p for p in task.prompts]
    asked = [turn for turn, choices in zip(turns, task.choices, strict=True) for _ in choices]
    given = [choice for choices in task.choices for choice in choices]
    texts = render_texts(tokenizer, asked, given, closing=task.closing)
    found = log_likelihoods(model, tokenizer, [(text, knobs or {}) for text in texts], token_budget=token_budget)
    if task.per == "token":
        found = found / np.array([len(text.ids) - text.start for text in texts])
    ends = np.cumsum([len(choices) for choices in task.choices])[:-1]
    return [part.tolist() for part in np.split(found, ends)]


def pairs_task(pairs: Pairs, *, name: str = "pairs", per: Per = "answer") -> ChoiceTask:
    """Make a task of held-out pairs: right where the chosen answer is likelier than the rejected one.

    Closing tokens count, as in training on pairs; summed, the outcome's margins are those of `pair_margins`.
    """
    return ChoiceTask(
        name,
        tuple(pair.prompt for pair in pairs),
        tuple((pair.chosen, pair.rejected) for pair in pairs),
        (frozenset({0}),) * len(pairs),
        per=per,
    )


def levels_task(
    prompts: Sequence[Prompt], answers: Sequence[Mapping[str, str]], level: str, *, name: str = "level"
) -> ChoiceTask:
    """Make a task of answers at several levels: right where the wanted level's is the likeliest per token.

    This is the "preference accuracy" of Alignment Vectors (arXiv:2410.19206) as we read it: the share of questions for
    which the wanted level has the highest length-normalised likelihood. Raises `OptionError` where an item has no
    answer at that level.
    """
    right: list[frozenset[int]] = []
    for number, given in enumerate(answers, 1):
        if level not in given:
            raise OptionError(f"Item {number} of {name!r} has no answer at level {level!r}; it has {', '.join(given)}.")
        right.append(frozenset({list(given).index(level)}))
    choices = tuple(tuple(given.values()) for given in answers)
    return ChoiceTask(name, tuple(prompts), choices, tuple(right), per="token")
