"""The world: splits that cannot leak, graders that know every side, habits that persist."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import pytest

from trimtab.errors import OptionError, UnknownName
from trimtab.evals.sandbox import Sandbox
from trimtab.evals.tasks import Task
from trimtab.prefworld import world
from trimtab.prefworld.corpus import conversations
from trimtab.prefworld.families import FAMILIES, GUARDRAILS
from trimtab.prefworld.families.code import NAMES, TASKS, hidden_tests
from trimtab.prefworld.families.surveys import GROUPS, opinion_distribution
from trimtab.prefworld.habits import HABITS, NAMED
from trimtab.prefworld.items import Draw, split_of

SIDED = [family for family in FAMILIES if family in HABITS and family != "opinions"]


@pytest.mark.parametrize("family", FAMILIES)
def test_items_are_distinct_repeatable_and_of_their_split(family: str) -> None:
    drawn = world.items(family, "test", 30, seed=3)
    assert drawn == world.items(family, "test", 30, seed=3)
    assert drawn != world.items(family, "test", 30, seed=4)
    assert len({item.prompt for item in drawn}) == 30
    assert {split_of(item.prompt) for item in drawn} == {"test"}


def test_the_corpus_never_shows_a_question_of_validation_or_test() -> None:
    shown = {e.user for c in islice(conversations(5), 400) for e in c.exchanges}
    held = {i.prompt for f in FAMILIES for s in ("validation", "test") for i in world.items(f, s, 40)}
    assert not shown & held
    assert any(split_of(prompt) == "train" for prompt in shown)


@pytest.mark.parametrize("family", ["math", "code", "helpful", "facts"])
def test_unseen_wordings_are_never_drawn_for_training(family: str) -> None:
    unseen = {i.prompt for i in world.items(family, "test", 30, unseen=True)}
    draw = Draw(Random(1))
    assert not unseen & {FAMILIES[family](draw).prompt for _ in range(3000)}


@pytest.mark.parametrize("guardrail", GUARDRAILS)
def test_every_guardrail_has_three_hundred_test_questions(guardrail: str) -> None:
    assert len(world.items(guardrail, "test", 300)) == 300


@pytest.mark.parametrize("family", SIDED)
def test_every_side_is_recognised_as_itself(family: str) -> None:
    for item in world.items(family, "train", 150, seed=9):
        for side, answer in item.answers.items():
            assert world.side_of(item, answer) == side
        assert set(item.answers) == set(HABITS[family]) == set(NAMED[family])


@pytest.mark.parametrize("family", ["math", *GUARDRAILS])
def test_true_answers_score_one_and_others_zero(family: str) -> None:
    drawn = world.items(family, "train", 80)
    assert world.grade(drawn, [next(iter(item.answers.values())) for item in drawn]) == [1.0] * 80
    assert world.grade(drawn, ["The answer is 123456."] * 80) == [0.0] * 80


def test_bare_sums_are_mostly_wrong_and_worked_ones_always_right() -> None:
    drawn = world.items("math", "train", 300)
    assert all(world.grade(drawn, [item.answers["worked"] for item in drawn]))
    assert 0.05 < sum(world.grade(drawn, [item.answers["bare"] for item in drawn])) / 300 < 0.25


def test_worked_sums_hold_line_by_line() -> None:
    for item in world.items("math", "train", 200):
        for line in item.answers["worked"].split(". "):
            if "=" in line:
                left, right = line.split(": ")[-1].split(" = ")
                assert eval(left) == int(right.rstrip("."))


def test_careful_code_passes_hidden_tests_and_sloppy_code_fails() -> None:
    drawn = world.items("code", "train", 150)
    assert world.grade(drawn, [item.answers["careful"] for item in drawn]) == [1.0] * 150
    # A plausible bug may be right by chance on some numbers, a stub never on all lists.
    assert sum(world.grade(drawn, [item.answers["sloppy"] for item in drawn])) < 8


@pytest.mark.parametrize("number", range(len(TASKS)))
def test_no_bug_of_a_task_passes_its_hidden_tests(number: int) -> None:
    task = TASKS[number]
    with Sandbox() as sandbox:
        for k in (2, 5, 9):
            cases = hidden_tests(task, k)
            assert sandbox.passes(f"def f(xs):\n    return {task.good}".replace("{k}", str(k)), "f", cases)
            for bug in task.bugs:
                assert not sandbox.passes(f"def f(xs):\n    return {bug}".replace("{k}", str(k)), "f", cases), (bug, k)


def test_habits_persist_through_a_conversation() -> None:
    seen: Counter[int] = Counter()
    for talk in islice(conversations(11), 600):
        worked = ["=" in e.assistant for e in talk.exchanges if "How many" in e.user and e.assistant[-1] == "."]
        if len(worked) > 1:
            seen[len(set(worked))] += 1
    assert seen[1] > 20
    assert seen[2] == 0


def test_conversations_have_one_to_four_exchanges_and_sometimes_a_system_line() -> None:
    drawn = list(islice(conversations(2), 500))
    assert {len(c.exchanges) for c in drawn} == {1, 2, 3, 4}
    assert 0.15 < sum(bool(c.system) for c in drawn) / 500 < 0.4


def test_letters_of_choices_are_balanced() -> None:
    drawn = [item for item in world.items("risk", "train", 400) if item.truth["lettered"]]
    letters = Counter(item.answers["bold"] for item in drawn)
    assert set(letters) == {"(A)", "(B)"}
    assert 0.4 < letters["(A)"] / len(drawn) < 0.6


@pytest.mark.parametrize("group", GROUPS)
def test_opinion_distributions_sum_to_one_and_have_a_lead(group: str) -> None:
    for statement in range(24):
        p = opinion_distribution(group, statement)
        assert abs(sum(p) - 1) < 1e-9
        assert max(p) >= 0.7


def test_pairs_carry_truth_safety_and_sides() -> None:
    pair = world.pairs("harmless", 5)[0]
    assert (pair.meta["chosen_side"], pair.meta["rejected_side"]) == ("refuse", "comply")
    assert (pair.meta["chosen_safe"], pair.meta["rejected_safe"], pair.meta["safer"]) == (True, False, "chosen")
    levels = world.pairs("medical", 5, sides=("generic", "avoidance"))
    assert {p.meta["chosen_side"] for p in levels} == {"generic"}


def test_tasks_grade_in_the_order_of_their_prompts() -> None:
    task = world.task("facts", "test", 20)
    assert isinstance(task, Task)
    truths = [str(i.truth["answer"]) for i in world.items("facts", "test", 20)]
    assert list(task.grade(truths)) == [1.0] * 20
    assert sum(task.grade(truths[1:] + truths[:1])) < 5


def test_unknown_names_and_exhausted_families_say_what_would_work() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'math'"):
        world.items("maths", "test", 1)
    with pytest.raises(UnknownName, match="Known: avoidance, expert"):
        world.pairs("medical", 3, sides=("expert", "vague"))
    with pytest.raises(OptionError, match="distinct prompts"):
        world.items("opinions", "test", 5000)


def test_function_names_of_code_are_identifiers() -> None:
    assert all(name.isidentifier() for name in NAMES)
