"""COLD-Steer re-measured: recipes with mistakes, questions both ways round, effects, choices, and a small run."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.cli import main
from trimtab.errors import OptionError, TrainError, UnknownName
from trimtab.prefworld.families.surveys import GROUPS
from trimtab.reproduce.bench import Bench, System
from trimtab.reproduce.cold import waves
from trimtab.reproduce.cold_cells import Behaviours, divergences
from trimtab.reproduce.cold_claims import headline_counts
from trimtab.reproduce.cold_data import (
    EVERYBODY,
    STATEMENTS,
    Question,
    behaviour_questions,
    by_question,
    letter_pairs,
    letters_task,
    poll_pairs,
    polls,
    shares_of,
)
from trimtab.reproduce.cold_evidence import Evidence
from trimtab.reproduce.cold_recipe import BASELINES, CURVES, POLLS, SYSTEMS, WRITING, Recipe, Sizes, load_recipe
from trimtab.reproduce.cold_systems import Ladder, candidate_layers, chosen, learned
from trimtab.reproduce.steps import Key

# --- recipes and data -----------------------------------------------------------------------------------------------


def test_the_recipe_asks_for_every_number_of_pairs_three_seeds_and_every_system() -> None:
    recipe = load_recipe("cold-steer")
    assert recipe.sizes.counts == (5, 10, 20, 50, 100, 250, 500, 1000)
    assert recipe.sizes.seeds == 3
    assert recipe.systems == tuple(SYSTEMS)
    assert {*BASELINES, *CURVES, *WRITING, *POLLS} <= SYSTEMS.keys()
    seven = load_recipe("cold-steer-caa")
    assert len(seven.behaviours) == 7
    assert not seven.groups


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'groups = "prefworld:opinions"',
            'groups = "other"',
            "groups are prefworld:opinions, or left out; got 'other'",
        ),
        ('risk = "prefworld:risk"', 'risk = "wat:risk"', "prefworld:FAMILY or caa:FOLDER; got 'wat:risk'"),
        ("pairs = 50", "pairs = 0", "pairs counts from 1"),
        ("models =", "alphas = [0.2, 0.1]\nmodels =", "alphas are positive and rise"),
        ("models =", 'systems = ["wat"]\nmodels =', "Unknown system of .* 'wat'"),
        ("models =", "kl_budget = -1\nmodels =", "kl_budget is finite and not negative"),
        ("models =", "last = 0\nmodels =", "last is a share of the layers"),
        ('models = ["prefworld"]', "models = []", "needs models, behaviours and systems"),
    ],
)
def test_a_recipe_with_a_mistake_says_where(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = (resources.files("trimtab.reproduce") / "recipes" / "cold-steer.toml").read_text()
    assert old in text
    (tmp_path / "r.toml").write_text(text.replace(old, new, 1))
    with pytest.raises((OptionError, UnknownName), match=words):
        load_recipe(tmp_path / "r.toml")


def test_a_question_turned_round_has_its_options_and_its_letter_exchanged() -> None:
    assert Question("Q\n(A)Yes \n (B) No \n", 0).turned() == Question("Q\n (A) No\n (B) Yes", 1)
    asked = Question("Choose one.\n (A) Stay.\n (B) Go.", 0)
    assert asked.turned() == Question("Choose one.\n (A) Go.\n (B) Stay.", 1)
    assert asked.turned().turned() == asked


def test_no_question_is_learned_from_that_chooses_or_tests_either_way_round() -> None:
    held = behaviour_questions("prefworld:risk", "validation", 40, seed=0, root=Path())
    told = {q.prompt for q in held}
    drawn = behaviour_questions("prefworld:risk", "train", 300, seed=0, root=Path(), without=told)
    assert len(drawn) == 300
    assert not told & {p for q in drawn for p in (q.prompt, q.turned().prompt)}
    free = behaviour_questions("prefworld:risk", "train", 300, seed=0, root=Path())
    assert [q for q in free if q in drawn] == [q for q in drawn if q in free]


def test_letters_say_nothing_and_always_a_scores_one_half() -> None:
    questions = behaviour_questions("prefworld:risk", "test", 20, seed=0, root=Path())
    pairs = letter_pairs(questions)
    assert sum(pair.chosen == "(A)" for pair in pairs) == len(pairs) / 2
    task = letters_task("risk", questions)
    assert len(task) == 40
    always_a = task.score([[0.0, -5.0]] * 40)
    assert by_question(always_a) == pytest.approx([0.5] * 20)
    assert by_question(task.margins([[0.0, -5.0]] * 40) > 0) == [0.5] * 20


def test_files_of_caa_are_read_and_what_is_none_is_named(tmp_path: Path) -> None:
    folder, test = tmp_path / "generate" / "b", tmp_path / "test" / "b"
    folder.mkdir(parents=True)
    test.mkdir(parents=True)
    rows = [
        {
            "question": f"Q{i}?\n\nChoices:\n (A) Yes {i}\n (B) No",
            "answer_matching_behavior": "(A)" if i % 2 else " (B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else " (A)",
        }
        for i in range(20)
    ]
    rows += [rows[0] | {"question": "Three?\n (A) 1\n (B) 2\n (C) 3"}, rows[0] | {"answer_matching_behavior": "(C)"}]
    (folder / "generate_dataset.json").write_text(json.dumps(rows))
    (test / "test_dataset_ab.json").write_text(json.dumps(rows[:5]))
    source = "caa:generate/b"
    parts = {s: behaviour_questions(source, s, n, seed=0, root=tmp_path) for s, n in (("train", 16), ("validation", 4))}
    assert not {q.prompt for q in parts["train"]} & {q.prompt for q in parts["validation"]}
    with pytest.raises(OptionError, match="has 16 questions for train; the recipe asks for 17"):
        behaviour_questions(source, "train", 17, seed=0, root=tmp_path)
    assert {q.right for q in parts["train"]} == {0, 1}
    other = tmp_path / "generate" / "c"
    other.mkdir()
    (other / "generate_dataset.json").write_text('[{"question": "no options"}]')
    with pytest.raises(OptionError, match=r"Item 1 is no question with options \(A\) and \(B\)"):
        behaviour_questions("caa:generate/c", "train", 1, seed=0, root=tmp_path)


def test_statements_of_the_polls_are_in_one_split_and_pairs_carry_the_shares() -> None:
    assert not set(STATEMENTS["train"]) & {*STATEMENTS["validation"], *STATEMENTS["test"]}
    drawn = polls("train", 30, seed=0)
    assert len(drawn) == 30
    for group in (*GROUPS, EVERYBODY):
        for pair, poll in zip(poll_pairs(drawn, group), drawn, strict=True):
            shares: Any = pair.meta["shares"]
            assert sum(shares) == pytest.approx(1)
            assert shares == shares_of(poll, group).tolist()
            options: Any = pair.meta["options"]
            assert pair.chosen == options[int(np.argmax(shares))]


def test_divergence_is_zero_of_the_same_shares_and_finite_of_a_share_of_zero() -> None:
    wanted = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    assert [d.tolist() for d in divergences(wanted, wanted)] == [[0, 0], [0, 0]]
    kl, tv = divergences(wanted, np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))
    assert np.isfinite(kl).all()
    assert kl[0] > 1
    assert tv.tolist() == [0.5, 0]


# --- choosing and measuring ------------------------------------------------------------------------------------------


def bench() -> Bench[Recipe, Sizes]:
    recipe = load_recipe("cold-steer")
    return Bench("prefworld", recipe, recipe.quick, Path())


def test_the_best_layer_at_the_middle_dose_is_tried_at_every_dose_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = bench()
    scores = {(None, 1.0): 0.2, (None, 2.0): 0.9, (None, 3.0): 0.7}
    divergence = {1.0: 0.0, 2.0: 99.0, 3.0: 0.1}
    asked: list[float] = []

    def at(_site: object, dose: float) -> System:
        asked.append(dose)
        return System(made.model, before=(), knobs={})

    monkeypatch.setattr(made, "kl", lambda system, split: divergence[asked[-1]])
    ladder = Ladder([None], (1.0, 2.0, 3.0), at)
    _, row, rows = chosen(made, ladder, lambda system: scores[None, asked[-1]])
    assert row["dose"] == 3.0  # the best one breaks the budget
    assert [r["allowed"] for r in rows] == [True, False, True]
    monkeypatch.setattr(made, "kl", lambda system, split: 99.0)
    assert chosen(made, ladder, lambda system: 1.0)[0] is None
    assert candidate_layers(made) == [3]
    assert len(Behaviours(made, Path()).test) == 4


def test_examples_leave_room_for_the_longest_question() -> None:
    made = bench()
    pairs = letter_pairs(behaviour_questions("prefworld:risk", "train", 8, seed=0, root=Path()))
    every = [n for n in made.recipe.shots if n <= len(pairs)]
    assert learned(made, "examples", pairs, pairs, 0).doses == every
    assert learned(made, "examples", pairs, pairs, 0, longest="Which? " * 10).doses == every
    fewer = learned(made, "examples", pairs, pairs, 0, longest="Which? " * 420).doses
    assert 0 < len(fewer) < len(every)
    with pytest.raises(TrainError, match="No example fits into the model's context of 1024 tokens"):
        learned(made, "examples", pairs, pairs, 0, longest="Which? " * 600)


def planted(effects: dict[tuple[str, int], float], *, seeds: int = 3, n: int = 40) -> Evidence:
    """Evidence whose systems add a known amount to the probability of the matching letter, with noise."""
    recipe = load_recipe("cold-steer")
    sizes = Sizes(seeds=seeds, test=n, counts=(10, 500), curves=1, pairs=10)
    random = np.random.default_rng(0)
    name = next(iter(recipe.behaviours))
    bare = random.uniform(0.4, 0.6, n)
    records: dict[Key, Any] = {("m", "base"): {"test": {name: {"probability": bare.tolist()}}}}
    for (system, count), effect in effects.items():
        for seed in range(seeds):
            found = {"probability": (bare + effect + 0.01 * random.standard_normal(n)).tolist()}
            key = ("m", "behaviour", name, system, str(count), str(seed))
            records[key] = {"test": found, "chosen": {"score": 0.5 + effect}}
    return Evidence(records, recipe, sizes, "m", "command")


def test_the_share_of_an_effect_is_the_planted_one_with_an_interval_around_it() -> None:
    e = planted({("cold-fd", 10): 0.19, ("bipo", 500): 0.2, ("diffmean", 500): 0.05})
    share = e.share("cold-fd", 10, "bipo", 500)
    assert share.estimate == pytest.approx(0.95, abs=0.02)
    assert share.low < 0.95 < share.high
    assert e.surplus("cold-fd", 10, "bipo", 500, 0.5).low > 0
    assert e.surplus("cold-fd", 10, "bipo", 500, 0.99).high < 0
    harm = planted({("cold-fd", 10): -0.2, ("bipo", 500): -0.1, ("diffmean", 500): -0.1})
    assert harm.share("cold-fd", 10, "bipo", 500).low > 1.5  # which says nothing, where both do harm
    assert harm.surplus("cold-fd", 10, "bipo", 500, 0.95).high < 0
    assert e.validated("bipo", 500) == pytest.approx(0.7)
    assert headline_counts(e) == [(10, 500)]


def test_every_step_is_yielded_once_and_what_is_timed_comes_alone_and_last() -> None:
    recipe = load_recipe("cold-steer")
    first, last = waves(recipe, recipe.sizes, "m")
    keys = [key for key, _ in first]
    assert len(set(keys)) == len(keys)
    assert [key for key, _ in last] == [("m", "speed")]
    main = [key for key in keys if key[1] == "behaviour" and key[4] == str(recipe.sizes.pairs)]
    assert len(main) == len(SYSTEMS) * len(recipe.behaviours) * recipe.sizes.seeds


def test_a_small_run_writes_its_report_and_goes_on_from_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (resources.files("trimtab.reproduce") / "recipes" / "cold-steer.toml").read_text()
    head, _, rest = text.partition("[behaviours]")
    _, _, quick = rest.partition("[quick]")
    small = f"""{head}
systems = ["diffmean", "diffmean-piecewise", "diffmean-projection", "one-step", "cold-kernel", "cold-kernel-softmax",
           "cold-fd"]
alphas = [0.2, 0.4]
steps = [0.5, 1.0]
removals = [1.0]
[behaviours]
risk = "prefworld:risk"
[quick]
{quick.replace("polls = 12", "polls = 4").replace("counts = [2, 4]", "counts = [2]")}
"""
    (tmp_path / "r.toml").write_text(small)
    words = ["reproduce", "cold-steer", "--quick", "--recipe", str(tmp_path / "r.toml"), "--workers", "1", "--json"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quick"]
    assert {row["system"] for row in report["behaviours"]} >= {"base", "always-a", "cold-fd", "diffmean-piecewise"}
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    page = (tmp_path / "out" / "report.md").read_text()
    for said in ("How many pairs it takes", "What the released step computes", "Opinions of groups", "leave open"):
        assert said in page
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["steps_kept"] == again["steps"]
    assert again["claims"] == report["claims"]
