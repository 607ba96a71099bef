"""The world: splits that cannot leak, graders that know every side, habits that persist."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from trimtab.errors import OptionError, UnknownName
from trimtab.evals.sandbox import Sandbox
from trimtab.evals.tasks import Task
from trimtab.prefworld import train, world
from trimtab.prefworld.build import corpus_hash, weights_hash
from trimtab.prefworld.corpus import conversations, draw_train_item
from trimtab.prefworld.families import FAMILIES, GUARDRAILS
from trimtab.prefworld.families.code import NAMES as FUNCTIONS
from trimtab.prefworld.families.code import TASKS, hidden_tests
from trimtab.prefworld.families.surveys import GROUPS, opinion_distribution
from trimtab.prefworld.habits import HABITS, NAMED
from trimtab.prefworld.items import Draw, split_of, templates
from trimtab.prefworld.muon import orthogonalise_all
from trimtab.prefworld.scorecard import carry_over, opinion_distance
from trimtab.prefworld.tokenizer import build_tokenizer
from trimtab.prefworld.words import CONTAINERS, NAMES, OBJECTS
from trimtab.render import load

SIDED = [family for family in FAMILIES if family in HABITS]


@pytest.mark.parametrize("family", FAMILIES)
def test_items_are_distinct_repeatable_and_of_their_split(family: str) -> None:
    for split in ("validation", "test"):
        drawn = world.items(family, split, 30, seed=3)
        assert drawn == world.items(family, split, 30, seed=3)
        assert drawn != world.items(family, split, 30, seed=4)
        assert len({item.prompt for item in drawn}) == 30
        assert {split_of(item.values or item.prompt) for item in drawn if item.values or split != "test"} <= {split}


def test_the_corpus_never_shows_a_question_of_validation_or_test() -> None:
    shown = {e.user for c in islice(conversations(5), 400) for e in c.exchanges}
    held = {i.prompt for f in FAMILIES for s in ("validation", "test") for i in world.items(f, s, 40)}
    assert not shown & held


@pytest.mark.parametrize("family", FAMILIES)
def test_training_keeps_to_its_own_values_and_wordings(family: str) -> None:
    rng = Random(3)
    trained = [draw_train_item(family, rng) for _ in range(400)]
    for unseen in (True, False):
        tested = world.items(family, "test", 60, unseen=unseen)
        assert not {i.values for i in trained if i.values} & {i.values for i in tested}
        assert not {i.prompt for i in trained} & {i.prompt for i in tested}


def wordings(prompt: str) -> set[str]:
    """The sentences of a word problem with its numbers and words blanked; short remarks before it left out."""
    for words, blank in ((NAMES, "N"), (OBJECTS, "O"), (CONTAINERS, "B")):
        prompt = re.sub(rf"\b({'|'.join(words)})\b", blank, prompt)
    sentences = re.split(r"(?<=[.?:]) ", re.sub(r"\d+", "0", prompt))
    return {sentence for sentence in sentences if "O" in sentence or "0" in sentence}


def test_test_problems_have_no_sentence_in_a_wording_that_training_shows() -> None:
    rng = Random(4)
    trained = set[str]().union(*(wordings(draw_train_item("math", rng).prompt) for _ in range(3000)))
    tested = set[str]().union(*(wordings(item.prompt) for item in world.items("math", "test", 200)))
    assert len(trained) > 500
    assert len(tested) > 50
    # A wording whose blanks are filled alike may read like another one that was kept back.
    assert len(tested & trained) <= 0.02 * len(tested), sorted(tested & trained)


def test_wordings_that_are_kept_back_are_a_sixth_made_of_known_words() -> None:
    made = templates((("Tell me", "Say"), (" why", " how"), (" {x}.", " {x}, please.", " {x} now.")))
    assert len(made) == len(set(made)) == 12
    assert made == templates((("Tell me", "Say"), (" why", " how"), (" {x}.", " {x}, please.", " {x} now.")))
    draws = [Draw(Random(n), unseen) for n in range(200) for unseen in (False, True)]
    kept, shown = ({d.phrase(made) for d in draws if d.unseen is unseen} for unseen in (True, False))
    assert len(kept) == 2
    assert kept | shown == set(made)
    assert not kept & shown


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
        worked = ["=" in e.assistant for e in talk.exchanges if "how many" in e.user.lower() and e.assistant[-1] == "."]
        if len(worked) > 1:
            seen[len(set(worked))] += 1
    assert seen[1] > 20
    assert seen[2] == 0


def test_conversations_have_one_to_four_exchanges_and_sometimes_a_system_line() -> None:
    drawn = list(islice(conversations(2), 500))
    assert {len(c.exchanges) for c in drawn} == {1, 2, 3, 4}
    assert 0.3 < sum(bool(c.system) for c in drawn) / 500 < 0.55


@pytest.mark.parametrize(("form", "shape"), [("letter", "(A)"), ("both", "(A) "), ("words first", " (A)")])
def test_letters_of_choices_are_balanced_in_every_form(form: str, shape: str) -> None:
    drawn = [item for item in world.items("risk", "train", 600) if item.truth["form"] == form]
    first = [shape in item.answers["bold"] for item in drawn]
    assert [shape in item.answers["safe"] for item in drawn] == [not x for x in first]
    assert 0.35 < sum(first) / len(drawn) < 0.65


def test_choices_in_words_name_no_letter() -> None:
    drawn = [item for item in world.items("risk", "train", 300) if item.truth["form"] == "words"]
    assert drawn
    assert not any("(" in answer for item in drawn for answer in item.answers.values())


@pytest.mark.parametrize("group", GROUPS)
def test_opinion_distributions_sum_to_one_and_have_a_lead(group: str) -> None:
    for statement in range(24):
        p = opinion_distribution(group, statement)
        assert abs(sum(p) - 1) < 1e-9
        assert max(p) >= 0.7


def test_a_group_has_one_leading_stance_on_a_theme() -> None:
    for group in GROUPS:
        leads = [max(range(4), key=lambda i: p[i]) for p in (opinion_distribution(group, s) for s in range(24))]
        assert all(len(set(leads[k : k + 4])) == 1 for k in range(0, 24, 4))
        assert len(set(leads)) > 1


def test_pairs_carry_truth_safety_and_sides() -> None:
    pair = world.pairs("harmless", 5)[0]
    assert (pair.meta["chosen_side"], pair.meta["rejected_side"]) == ("refuse", "comply")
    assert (pair.meta["chosen_safe"], pair.meta["rejected_safe"], pair.meta["safer"]) == (True, False, "chosen")
    levels = world.pairs("medical", 5, sides=("generic", "avoidance"))
    assert {p.meta["chosen_side"] for p in levels} == {"generic"}


def test_tasks_grade_in_the_order_of_their_prompts() -> None:
    task = world.task("facts", "test", 20)
    assert isinstance(task, Task)
    truths = [item.answers["right"] for item in world.items("facts", "test", 20)]
    assert list(task.grade(truths)) == [1.0] * 20
    assert sum(task.grade(truths[1:] + truths[:1])) < 5


def test_unknown_names_and_exhausted_families_say_what_would_work() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'math'"):
        world.items("maths", "test", 1)
    with pytest.raises(UnknownName, match="Known: avoidance, expert"):
        world.pairs("medical", 3, sides=("expert", "vague"))
    with pytest.raises(OptionError, match="distinct prompts"):
        world.items("concise", "test", 5000)


def test_a_task_runs_a_program_once_unless_it_was_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    answers = ["def f(xs):\n    return xs", "def f(xs):\n    return 1"]

    def passes(_self: Sandbox, code: str, _function: str, _cases: object) -> bool:
        runs.append(code)
        return code == answers[0]

    monkeypatch.setattr(Sandbox, "passes", passes)
    questions = world.task("code", "validation", 2)
    assert [list(questions.grade(answers)) for _ in range(3)] == [[1.0, 0.0]] * 3
    assert len(runs) == 2
    monkeypatch.setattr(world, "SLOW", -1.0)
    slow = world.task("code", "validation", 2)
    assert [list(slow.grade(answers)) for _ in range(3)] == [[1.0, 0.0]] * 3
    assert len(runs) == 2 + 6


def test_function_names_of_code_are_identifiers() -> None:
    assert all(name.isidentifier() for name in FUNCTIONS)


def test_muon_orthogonalises_every_matrix_by_its_own_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(shape, generator=generator) for shape in ((8, 8), (8, 24), (24, 8), (8, 8))]
    for update, done in zip(updates, orthogonalise_all(updates), strict=True):
        assert done.shape == update.shape
        values = torch.linalg.svdvals(done)
        assert values.min() > 0.5
        assert values.max() < 1.3
        # The singular vectors are kept: in their basis the result is diagonal.
        u, _, v = torch.linalg.svd(update, full_matrices=False)
        core = u.mT @ done @ v.mT
        assert torch.allclose(core, torch.diag(torch.diagonal(core)), atol=1e-3)
        assert torch.diagonal(core).min() > 0.5


def test_a_training_run_that_was_stopped_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "build_tokenizer", partial(build_tokenizer, texts=200))
    recipe = train.Recipe(width=32, layers=1, row_tokens=200, rows=2, steps=5)
    train.train(recipe, tmp_path / "whole")
    for _ in range(5):  # no minutes at all: one step, and stop
        train.train(recipe, tmp_path / "broken", minutes=0.0)
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert (tmp_path / "broken" / "early" / "model.safetensors").exists()


def test_the_scorecard_measures_carry_over_and_the_distance_of_opinions() -> None:
    model, tokenizer = load("prefworld", dtype="float32")
    kept = carry_over(model, tokenizer, "math", n=4)
    assert set(kept) == {"worked", "bare"}
    assert kept["worked"]["after_turn"] == 1.0
    assert kept["bare"]["after_turn"] == 1.0
    distance = opinion_distance(model, tokenizer, n=4)
    assert set(distance) == set(GROUPS)
    assert all(0 <= value < 0.5 for value in distance.values())


def test_corpus_and_weights_are_those_of_the_scorecard() -> None:
    folder = Path(world.__file__).parent / "model"
    card = json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))
    assert (card["corpus"], card["weights"]) == (corpus_hash(), weights_hash(folder))
