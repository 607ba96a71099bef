"""Tasks by likelihood: scores by hand, letters without their closing tokens, shared rows, tuning on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pico import knob, model, tokenizer
from trimtab.errors import OptionError, UnknownName
from trimtab.evals import likelihood
from trimtab.evals.choices import ChoiceTask, choose, pairs_task
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import Outcome, Task, grade_said, run_task
from trimtab.evals.trial import Trial
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.render import Renderer
from trimtab.runtime import steer
from trimtab.tune import tune
from trimtab.types import Message

PAIRS = Pairs.from_records([{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no, never"} for i in range(6)])
LETTERS = ("A", "B", "C", "D")


def letters(n: int = 5, **changes: Any) -> ChoiceTask:
    prompts = tuple(f"Which letter is number {i}?" for i in range(n))
    right = tuple(frozenset({i % 4}) for i in range(n))
    return ChoiceTask("letters", prompts, (LETTERS,) * n, right, **{"closing": False, **changes})


def next_tokens(lm: Any, words: Any, prompt: str, setting: dict[Any, float]) -> torch.Tensor:
    """Log-probabilities of the token after a prompt, from a forward call of the prompt alone."""
    ids = Renderer(words).prompt_ids([Message("user", prompt)])
    with torch.no_grad(), steer(lm, setting, prompt_lengths=[len(ids)]):
        return lm(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_scores_and_margins_equal_those_worked_out_by_hand() -> None:
    likelihoods = [[math.log(0.2), math.log(0.1), math.log(0.1)], [math.log(0.1), math.log(0.3), math.log(0.1)]]
    task = ChoiceTask("t", ("p", "q"), (("a", "b", "c"),) * 2, (frozenset({0, 2}), frozenset({0, 2})))
    assert list(task.score(likelihoods)) == [1.0, 0.0]  # mc1
    assert task.margins(likelihoods) == pytest.approx([math.log(2), -math.log(3)])
    assert replace(task, rule="mass").score(likelihoods) == pytest.approx([0.75, 0.4])  # mc2


@pytest.mark.quick
@pytest.mark.parametrize("rule", ["first", "mass"])
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_likelihoods_that_are_no_numbers_score_zero(rule: Any, broken: float) -> None:
    assert list(letters(2, rule=rule).score([[broken] * 4] * 2)) == [0.0, 0.0]


@pytest.mark.quick
def test_unknown_rules_and_missing_parts_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"Unknown rule 'mas'\. Known: first, mass\. Did you mean 'mass'"):
        letters(rule="mas")
    with pytest.raises(UnknownName, match="Unknown per 'tokens'"):
        letters(per="tokens")
    with pytest.raises(OptionError, match="got 3 prompts, answers for 1 and the right ones for 1"):
        ChoiceTask("t", ("a", "b", "c"), (("x", "y"),), (frozenset({0}),))


# --- likelihoods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dose", [0.0, 2.0])
def test_letters_without_closing_tokens_are_the_next_tokens_probabilities(dose: float) -> None:
    lm, words = model(), tokenizer()
    setting = {knob(where="completion"): dose}
    task = letters(rule="mass")
    outcome = run_task(lm, words, task, setting)
    assert outcome.likelihoods is not None
    ids = [words.convert_tokens_to_ids(letter) for letter in LETTERS]
    for i, prompt in enumerate(task.prompts):
        expected = next_tokens(lm, words, str(prompt), setting)[ids]
        assert outcome.likelihoods[i] == pytest.approx(expected.tolist(), abs=1e-4)
        assert outcome.scores[i] == pytest.approx(float(expected.softmax(-1)[i % 4]), abs=1e-4)
    assert not np.allclose(choose(lm, words, replace(task, closing=True), setting), outcome.likelihoods)


def test_answers_that_differ_in_their_last_token_are_run_once_and_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, words = model(), tokenizer()
    mixed = ("yes", "yet", "yas", "A", "no", "yes")  # "ye" and a token more are one row
    task = ChoiceTask("t", ("One?", "Two?"), (mixed, mixed), (frozenset({0}),) * 2, closing=False)
    alone = [
        [choose(lm, words, ChoiceTask("t", (p,), ((a, "?"),), (frozenset({0}),), closing=False))[0][0] for a in mixed]
        for p in task.prompts
    ]
    rows: list[int] = []
    forward = likelihood._forward  # pyright: ignore[reportPrivateUsage]

    def count(lm: Any, words: Any, batch: Sequence[Any]) -> Any:
        rows.append(len(batch))
        return forward(lm, words, batch)

    monkeypatch.setattr(likelihood, "_forward", count)
    assert np.allclose(choose(lm, words, task), alone, atol=1e-4)
    assert sum(rows) == 2 * 4


def test_rows_under_different_knobs_are_not_run_as_one() -> None:
    lm, words = model(), tokenizer()
    pairs = Pairs.from_records([{"prompt": "Q?", "chosen": "a", "rejected": "b"}])
    settings = [{}, {knob(): 2.0}, {knob(): -2.0}]
    margins = [float(found.margin[0]) for found in pair_margins(lm, words, pairs, settings)]
    assert margins == pytest.approx(
        [float(pair_margins(lm, words, pairs, [s])[0].margin[0]) for s in settings], abs=1e-4
    )
    assert len({round(m, 4) for m in margins}) == 3


def test_a_task_of_pairs_has_the_margins_of_pairs_in_nats() -> None:
    lm, words = model(), tokenizer()
    setting = {knob(gain=3.0): 1.0}
    outcome = run_task(lm, words, pairs_task(PAIRS), setting)
    assert outcome.margins == pytest.approx(pair_margins(lm, words, PAIRS, [setting])[0].margin, abs=1e-4)


# --- tuning ---------------------------------------------------------------------------------------------------------


def loops(answers: Sequence[str]) -> list[float]:
    return [0.0] * len(answers)


def test_broken_answers_do_not_hide_among_given_ones() -> None:
    lm, words = model(), tokenizer()  # a random model never ends an answer: all are broken
    said = Task("said", ("Hi",), loops, max_new_tokens=3)
    asked = [pair.prompt for pair in PAIRS]
    trial = Trial(lm, words, asked, [said], [letters(30)], 0.02, 0.05, 8)
    assert trial.base["broken"] == 1.0
    # Where nothing else is said, the answers to the pairs' prompts show it.
    prompts = Task("prompts", tuple(asked), loops, max_new_tokens=48)
    shown = run_task(lm, words, prompts).degenerate.mean()
    assert Trial(lm, words, asked, [letters(30)], [pairs_task(PAIRS)], 0.02, 0.05, 8).base["broken"] == shown > 0.5


@pytest.mark.filterwarnings("ignore::trimtab.errors.TrimtabWarning")  # a random direction need not help
def test_tuning_takes_tasks_by_likelihood_and_keeps_what_it_measured(tmp_path: Path) -> None:
    lm, words = model(), tokenizer()

    def tuned(task: ChoiceTask, folder: Path | None) -> dict[str, Any]:
        rails = [replace(letters(6), name="rail")]
        options: Any = {"gains": (0.5,), "budget": 1.0, "broken_budget": 1.0, "strengths": (0.5, 1.0)}
        found = tune(knob(), lm, words, PAIRS, task=task, guardrails=rails, checkpoint=folder, **options)
        return {**(found.tuning or {}), "seconds": 0}

    task = letters(8, rule="mass")
    found = tuned(task, tmp_path / "kept")
    assert found == tuned(task, tmp_path / "kept") == tuned(task, None)
    assert found["base"]["score"] == pytest.approx(run_task(lm, words, task).accuracy)
    assert found["base"]["guardrails"] == {"rail": run_task(lm, words, letters(6)).accuracy}
    # Another rule grades again what was kept; other answers are another job.
    first = replace(task, rule="first")
    assert tuned(first, tmp_path / "kept")["base"]["score"] == run_task(lm, words, first).accuracy
    with pytest.raises(OptionError, match="tasks"):
        tuned(replace(task, choices=(("a", "b", "c", "d"),) * 8), tmp_path / "kept")


def test_what_was_said_is_graded_again_to_the_same_outcome() -> None:
    lm, words = model(), tokenizer()
    first = run_task(lm, words, letters())
    second = grade_said(letters(), first.said())
    assert isinstance(second, Outcome)
    assert list(first.scores) == list(second.scores)
    assert first.answers == second.answers == tuple(LETTERS[int(np.argmax(row))] for row in first.likelihoods or [])
    assert not first.degenerate.any()


def test_where_answers_are_run_the_outcome_says_what_kept_them_apart() -> None:
    lm, words = model(), tokenizer()
    task = Task("code", ("Hi",), loops, max_new_tokens=2)
    assert run_task(lm, words, task).isolation is None
    found = run_task(lm, words, replace(task, runs_code=True)).isolation
    assert found
    assert "limits" in found or "process" in found
    trial = Trial(lm, words, ["Hi"], [letters()], [replace(task, runs_code=True)], 0.02, 0.05, 8)
    assert trial.isolation == found
    assert world.task("code", "validation", 2).runs_code


# --- PrefWorld ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_worlds_answers_are_choices_and_one_level_is_wanted() -> None:
    task = world.choices("medical", "test", 12)
    drawn = world.items("medical", "test", 12)
    assert task.per == "token"
    for choices, right, item in zip(task.choices, task.right, drawn, strict=True):
        assert [choices[i] for i in right] == [item.answers["expert"]]
        assert set(choices) == set(item.answers.values())
    other = world.choices("medical", "test", 12, side="avoidance")
    assert other.right[0] != task.right[0]
    with pytest.raises(UnknownName, match="side of medical"):
        world.choices("medical", "test", 2, side="best")
    with pytest.raises(OptionError, match="one side only"):
        world.choices("facts", "test", 2)
