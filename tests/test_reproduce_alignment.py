"""Alignment Vectors re-measured: recipes with mistakes, what counts as reached, and what the curves and costs mean."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import OptionError, UnknownName
from trimtab.reproduce.alignment import step_count, waves
from trimtab.reproduce.alignment_bench import tried
from trimtab.reproduce.alignment_cells import apart
from trimtab.reproduce.alignment_evidence import (
    apart_and_together,
    equal_seconds,
    handed_over,
    on_target,
    reached,
    resampled,
    spread,
)
from trimtab.reproduce.alignment_recipe import LevelData, load_recipe, thinned

# --- recipes and data -----------------------------------------------------------------------------------------------


def test_the_recipe_holds_the_papers_lambdas_and_every_level_is_asked_for() -> None:
    recipe = load_recipe("alignment-vectors")
    assert thinned(recipe.lambdas, 1) == [round(0.1 * i, 1) for i in range(-10, 16)]
    assert list(recipe.domains) == ["medical", "legal", "financial"]
    assert {len(levels) for levels in recipe.instructions.values()} == {3}
    assert thinned([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5], 2) == [-1.0, 0.0, 1.0, 1.5]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('joint = ["expert avoidance generic"', 'joint = ["expert avoidance"', "a level for each domain"),
        ('joint = ["expert avoidance generic"', 'joint = ["expert avoidance genric"', "Did you mean 'generic'"),
        ("grid = [-2.0, -1.5, -1.0, -0.5, 0.0,", "grid = [-2.0,", "rise and hold 0"),
        ("shots = [0,", "shots = [-1,", "shots count from 0"),
        ("learning_rates = [1e-4,", "learning_rates = [0.0,", "learning_rates must be positive"),
        ("[instructions.medical]", "[instructions.dental]", "instructions.medical needs sentences"),
        ("answers = 12", "answers = 0", "answers counts from 1"),
    ],
)
def test_a_recipe_with_a_mistake_says_where(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = (resources.files("trimtab.reproduce") / "recipes" / "alignment-vectors.toml").read_text()
    assert old in text
    (tmp_path / "r.toml").write_text(text.replace(old, new, 1))
    with pytest.raises((OptionError, UnknownName), match=words):
        load_recipe(tmp_path / "r.toml")


def test_questions_of_a_file_are_in_one_split_each(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "avoidance": "no", "generic": "so", "expert": "yes"} for i in range(20)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = LevelData(tmp_path, seed=0)
    parts = [{q.prompt for q in data.questions("q.jsonl", split, 99)} for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert len(set.union(*parts)) == 20
    pairs = data.pairs("q.jsonl", "train", 5)
    assert [(p.chosen, p.rejected) for p in pairs][::5] == [("yes", "so"), ("yes", "no"), ("so", "no")]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q"}')
    with pytest.raises(OptionError, match="line 1 needs texts"):
        data.questions("bad.jsonl", "test", 1)


def test_as_many_steps_are_yielded_as_are_announced() -> None:
    recipe = load_recipe("alignment-vectors")
    done: dict[tuple[str, ...], object] = {}
    count = 0
    for steps in waves(recipe, recipe.sizes, "m", done):
        for key, _ in steps:
            count += 1
            done[key] = {
                "learning_rate": 1e-4,
                "chosen": {"expert": 1.0},
                "rows": [],
                "sentences": {d: {"expert": "x"} for d in recipe.domains},
            }
    assert count == len(done) == step_count(recipe, recipe.sizes)


# --- what is counted ------------------------------------------------------------------------------------------------


def test_a_measured_setting_scores_each_level_of_each_domain() -> None:
    row = tried({"medical": 1.0}, {"medical": [2, 2, 0, -1]})
    assert row.scores == {"medical: avoidance": 0.25, "medical: generic": 0.0, "medical: expert": 0.5}


def test_a_combination_is_reached_where_its_level_leads_in_every_domain() -> None:
    targets = np.array([[2, 0]])
    ahead = np.array([[[2, 2, 1, 0, 2], [0, 0, 1, 2, 0]]])
    assert reached(ahead, targets, strict=False).all()
    assert reached(ahead, targets, strict=True).all()
    barely = np.array([[[2, 2, 1, 0, -1], [0, 0, 1, 2, 0]]])
    assert reached(barely, targets, strict=False).all()
    assert not reached(barely, targets, strict=True).any()
    shared = np.array([[[2, 2, 1, 1], [0, 0, 0, 0]]])
    assert not reached(shared, targets, strict=False).any()
    assert on_target(shared, targets).tolist() == [[0.5, 1.0]]


def test_levels_that_come_in_another_order_are_not_handed_over() -> None:
    strengths = np.array([-1.0, 0.0, 1.0])
    assert not handed_over(np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]), strengths)
    assert not handed_over(np.array([[0.4, 0.6, 0], [0, 1, 0], [0, 0, 1]]), strengths)  # avoidance never leads


def test_an_interval_of_equal_questions_is_a_point() -> None:
    assert resampled(lambda at: float(np.ones(5)[at].mean()), 5) == (1.0, 1.0, 1.0)


def test_vectors_apart_are_orthogonal_to_the_others() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 7))
    gram = rows @ rows.T
    for i in range(3):
        found = apart(gram, i) @ rows
        assert np.allclose([found @ rows[j] for j in range(3) if j != i], 0)


def test_the_matrix_has_questions_in_rows_and_vectors_in_columns() -> None:
    base = {"test": {"a": [1, 1], "b": [1, 2]}}
    record = {
        "base": base,
        "plain": {"a": {"test": {"a": [2, 2], "b": [2, 2]}}, "b": {"test": {"a": [1, 1], "b": [2, 2]}}},
    }
    matrix = spread(record, "plain", ["a", "b"])
    assert matrix.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert apart_and_together(matrix) == (0.25, 0.75)


def test_equal_lengths_take_the_prompts_pace_over_the_vectors_tokens() -> None:
    vector = {"answers": [[[1.0, 4.0, 5]]]}
    prompt = {"answers": [[[3.0, 20.0, 11]]]}  # two seconds a token after the first
    assert equal_seconds(prompt, vector).tolist() == [3.0 + 4 * 2.0]
    assert equal_seconds(vector, vector).tolist() == [5.0]
