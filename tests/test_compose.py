"""Strengths for a goal: planted truth with steering and weight knobs, brute force, resumption, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pico
from trimtab.artifact import AnyKnob, DeltaKnob, Knob, LowRank, load_panel
from trimtab.cli import main
from trimtab.cli.compose import REPORT
from trimtab.compose import Composed, Goal, Tried, choose_setting, compose, pareto_front
from trimtab.compose.goal import goal_bias, undominated
from trimtab.compose.page import FILES
from trimtab.compose.search import Answer, ask_optuna
from trimtab.errors import KnobError, MissingDependency, OptionError, TrimtabWarning, TuneError, UnknownName
from trimtab.evals.choices import ChoiceTask, Rule
from trimtab.evals.stats import selection_bias
from trimtab.evals.tasks import Task, run_task
from trimtab.pairs import prompt_hash
from trimtab.types import Message, Site

PROMPTS = tuple(f"Ask {i}" for i in range(8))


class Planted(NamedTuple):
    """A model with two steering knobs and a dense weight knob, each of which raises one letter over another."""

    lm: Any
    words: Any
    knobs: dict[str, AnyKnob]
    tasks: dict[str, ChoiceTask]
    keep: Task


def letters(right: str, wrong: str, name: str, rule: Rule = "mass") -> ChoiceTask:
    """How likely the one letter is as a beginning, beside the other."""
    return ChoiceTask(
        name, PROMPTS, ((right, wrong),) * len(PROMPTS), (frozenset({0}),) * len(PROMPTS), rule, closing=False
    )


def steering(lm: Any, words: Any, raised: str, *apart_from: str, name: str = "planted") -> Knob:
    """A knob that raises the first of two letters over the second, and leaves those of other pairs as they are."""
    head = lm.get_output_embeddings().weight.detach().float()

    def between(pair: str) -> torch.Tensor:
        first, second = words.convert_tokens_to_ids(list(pair))
        return head[first] - head[second]

    vector = between(raised)
    if apart_from:
        others = torch.stack([between(pair) for pair in apart_from], dim=1)
        vector = vector - others @ torch.linalg.lstsq(others, vector[:, None]).solution[:, 0]
    site = Site(pico.LAYERS - 1, "last")
    return Knob(name, "planted", {site: vector}, {site.layer: 2.0}, site, 1.0)


def weighing(lm: Any, words: Any, right: str, *, low_rank: bool = False) -> DeltaKnob:
    """A knob in the output weights: it raises one letter's logit after every prompt, and touches no other."""
    head = lm.get_output_embeddings().weight
    with torch.no_grad():
        inputs = words(
            [f"<s><|user|>\n{p}<|end|>\n<|assistant|>\n" for p in PROMPTS],
            return_tensors="pt",
            add_special_tokens=False,
        )
        hidden = (
            lm.model(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).last_hidden_state[:, -1].mean(0)
        )
    row = torch.zeros(len(head), 1)
    row[words.convert_tokens_to_ids(right)] = 1.0
    column = (2.5 * hidden / (hidden @ hidden))[None]
    part = LowRank(column, row) if low_rank else row @ column
    return DeltaKnob("weights", "planted", {"lm_head.weight": part})


@pytest.fixture(scope="module")
def planted() -> Planted:
    lm, words = pico.model(), pico.tokenizer()
    knobs: dict[str, AnyKnob] = {
        "yes": steering(lm, words, "yn", "pq", "rs"),
        "pea": steering(lm, words, "pq", "yn", "rs"),
        "are": weighing(lm, words, "r"),
    }
    tasks = {"y": letters("y", "n", "y"), "p": letters("p", "q", "p"), "r": letters("r", "s", "r")}
    keep = Task("keep", PROMPTS[:2], lambda answers: [1.0] * len(answers), max_new_tokens=2)
    return Planted(lm, words, knobs, tasks, keep)


def composed(planted: Planted, **options: Any) -> Composed:
    """Compose all knobs for all tasks, unless told otherwise; what a model of random weights says is broken anyhow."""
    given: dict[str, Any] = {"guardrails": [planted.keep], "broken_budget": 1.0, **options}
    knobs, tasks = given.pop("knobs", planted.knobs), given.pop("tasks", planted.tasks)
    return compose(
        knobs,
        planted.lm,
        planted.words,
        tasks,
        batch_size=given.pop("batch_size", 128),
        checkpoint=given.pop("checkpoint", None),
        progress=given.pop("progress", lambda done, total: None),
        **given,
    )


def test_batches_of_one_lead_to_the_same_choice(planted: Planted) -> None:
    options: dict[str, Any] = {"search": "grid", "grid": (-1.0, 0.0, 1.0), "weights": {"y": 1, "p": -1}}
    whole, single = composed(planted, **options), composed(planted, **options, batch_size=1)
    assert single.panel.setting == whole.panel.setting
    for one, other in zip(single.table, whole.table, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


# --- planted truth --------------------------------------------------------------------------------------------------


TARGETS = {"y": 0.3, "p": 0.8, "r": 0.6}


@pytest.mark.parametrize("search", ["tpe", "nsga2"])
def test_steering_and_weight_knobs_together_come_to_the_targets(planted: Planted, search: str) -> None:
    found = composed(planted, targets=TARGETS, search=search, trials=60, seed=1)
    before, after = found.record["base"], found.record["chosen"]
    missed = sum(abs(after["scores"][name] - target) for name, target in TARGETS.items())
    assert missed < 0.3 < 1.2 < sum(abs(before["scores"][name] - target) for name, target in TARGETS.items())
    assert found.panel.setting["yes"] < -0.1
    assert found.panel.setting["pea"] > 0.1
    assert found.panel.setting["are"] < -0.1
    # What is reported is what the panel does.
    dose = found.panel.rack.resolve(found.panel.setting)
    for name, task in planted.tasks.items():
        assert run_task(planted.lm, planted.words, task, dose).accuracy == pytest.approx(after["scores"][name])
    assert found.record["trials"][0]["setting"] == {"yes": 0, "pea": 0, "are": 0}


def test_cross_talk_of_independent_knobs_is_diagonal_and_measured_at_one(planted: Planted) -> None:
    found = composed(planted, search="grid", grid=(0.0, 1.0), bounds=None)
    for (name, row), own in zip(found.record["cross_talk"].items(), "ypr", strict=True):
        assert row["strength"] == 1.0
        alone = {planted.knobs[name]: 1.0}
        for task, change in row["changes"].items():
            if task == "keep":
                continue
            base = run_task(planted.lm, planted.words, planted.tasks[task])
            turned = run_task(planted.lm, planted.words, planted.tasks[task], alone)
            assert change["estimate"] == pytest.approx(turned.accuracy - base.accuracy)
            assert change["low"] <= change["estimate"] <= change["high"]
            if task == own:
                assert change["low"] > 0.08
            else:
                assert abs(change["estimate"]) < 0.05


def test_a_knob_stands_alone_at_the_bound_where_one_lies_beyond_it(planted: Planted) -> None:
    bounds = {"yes": (-1.0, 0.4), "pea": (-2.0, 0.0), "are": (0.0, 3.0)}
    found = composed(planted, bounds=bounds, trials=5)
    assert [row["strength"] for row in found.record["cross_talk"].values()] == [0.4, -1.0, 1.0]
    tuned = planted.knobs["yes"].with_(tuning={"safe_range": [-0.5, 0.75]})
    found = composed(planted, knobs={"yes": tuned, "are": planted.knobs["are"]}, trials=4)
    assert [knob["bounds"] for knob in found.record["knobs"].values()] == [[-0.5, 0.75], [-1.0, 1.5]]
    assert found.record["cross_talk"]["yes"]["strength"] == 0.75


def test_a_grid_equals_brute_force(planted: Planted) -> None:
    grid, weights = (-0.5, 0.0, 1.0), {"y": -1.0, "r": 0.5}
    knobs = {name: planted.knobs[name] for name in ("yes", "are")}
    found = composed(planted, knobs=knobs, search="grid", grid=grid, weights=weights)
    assert len(found.table) == len(found.record["trials"]) == 9
    by_hand: dict[tuple[float, ...], float] = {}
    for strengths in product(grid, repeat=2):
        dose = dict(zip(knobs.values(), strengths, strict=True))
        scores = {name: run_task(planted.lm, planted.words, planted.tasks[name], dose).accuracy for name in weights}
        by_hand[strengths] = sum(weight * scores[name] for name, weight in weights.items())
    for row in found.table:
        assert Goal(weights).value(row.scores) == pytest.approx(by_hand[tuple(row.setting.values())])
    best = choose_setting(found.table, Goal(weights), mildest=False)
    assert tuple(best.setting.values()) == max(by_hand, key=lambda strengths: by_hand[strengths]) == (-0.5, 1.0)
    assert dict(best.setting) == found.panel.setting


def test_a_grid_may_differ_by_knob_and_keeps_to_the_bounds_by_default(planted: Planted) -> None:
    both = {name: planted.knobs[name] for name in ("yes", "are")}
    found = composed(planted, knobs=both, search="grid", grid={"yes": [0.0, 0.5], "are": [0.0, 2.0]})
    own = {tuple(tried.setting.values()) for tried in found.table}
    assert own == {(0, 0), (1, 0), (0, 1), (0.5, 0), (0, 2), (0.5, 2)}  # each knob alone at 1 as well
    found = composed(planted, knobs=both, search="grid", bounds={"yes": (-0.5, 0.5), "are": (0.0, 1.0)})
    assert {tried.setting["yes"] for tried in found.table} == {-0.5, 0.0, 0.5}
    assert {tried.setting["are"] for tried in found.table} == {0.0, 0.5, 1.0}


def test_rows_share_one_setting_whatever_the_kind_of_weight_knob(planted: Planted) -> None:
    thin = weighing(planted.lm, planted.words, "r", low_rank=True)
    options: Any = {"search": "grid", "grid": (0.0, 1.0), "tasks": [planted.tasks["r"]]}
    dense = composed(planted, knobs={"are": planted.knobs["are"]}, **options)
    low = composed(planted, knobs={"are": thin}, **options)
    assert dense.record["chosen"]["scores"]["r"] == pytest.approx(low.record["chosen"]["scores"]["r"], abs=1e-5)
    assert dense.panel.setting == {"are": 1.0}


# --- budgets and floors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_guardrail_or_a_floor_that_binds_limits_the_strengths(planted: Planted, search: str) -> None:
    lm, words = planted.lm, planted.words
    site = Site(pico.LAYERS - 1, "last")
    both = steering(lm, words, "yn").vectors[site] + steering(lm, words, "qp").vectors[site]
    torn = Knob("torn", "planted", {site: both}, {site.layer: 2.0}, site, 1.0)
    grid = {"grid": tuple(round(0.1 * i, 1) for i in range(11))} if search == "grid" else {"trials": 30}
    rail = letters("p", "q", "rail")
    options: dict[str, Any] = {"knobs": {"torn": torn}, "tasks": [planted.tasks["y"]], "search": search, **grid}
    free = composed(planted, **options, guardrails=[planted.keep])
    held = composed(planted, **options, guardrails=[rail, planted.keep], budget=0.1)
    base = run_task(lm, words, rail).accuracy
    assert run_task(lm, words, rail, {torn: free.panel.setting["torn"]}).accuracy < base - 0.15
    assert base - 0.1 <= held.record["chosen"]["guardrails"]["rail"] < base
    assert 0 < held.panel.setting["torn"] < free.panel.setting["torn"]
    wide = composed(
        planted, **options, guardrails=[rail, planted.keep], budget=1.0, floors={"rail": base - 0.15, "y": 0.1}
    )
    assert base - 0.15 <= wide.record["chosen"]["guardrails"]["rail"] < base - 0.05
    with pytest.raises(TuneError, match=r"The closest, torn=.*, misses rail by 0\.\d+"):
        composed(
            planted,
            **{**options, "search": "grid", "trials": None, "grid": [0.8, 1.0]},
            guardrails=[rail, planted.keep],
        )
    with pytest.raises(TuneError, match="misses floor of y by"):
        composed(planted, **options, guardrails=[planted.keep], floors={"y": 1.0})


def test_answers_that_break_rule_a_setting_out(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str, finished: bool) -> bool:
        return text.startswith("yy")

    monkeypatch.setattr("trimtab.evals.tasks.degenerate", broken)
    asked = Task("said", PROMPTS, lambda answers: [float(a[:1] == "y") for a in answers], max_new_tokens=2)
    strong = {"yes": planted.knobs["yes"].with_(gain=6.0)}
    options: dict[str, Any] = {"knobs": strong, "tasks": [asked], "guardrails": [], "search": "grid"}
    with pytest.raises(TuneError, match=r"The closest, yes=1, misses broken answers by 0\.7\."):
        composed(planted, **options, grid=[0.0, 1.0], broken_budget=0.3)
    found = composed(planted, **options, grid=[0.0, 1.0], broken_budget=1.0)
    assert found.panel.setting == {"yes": 1.0}
    assert found.record["chosen"]["broken"] == 1.0


# --- resumption -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("search", ["tpe", "nsga2", "grid"])
def test_a_search_that_was_killed_goes_on_to_the_same_result(
    planted: Planted, search: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"targets": TARGETS, "search": search, "seed": 3}
    options |= {"grid": (-0.5, 0.0, 1.0)} if search == "grid" else {"trials": 26}
    whole = composed(planted, **options)
    asked: list[int] = []

    def kill(done: int, total: int) -> None:
        if done == 15:
            raise Killed

    with pytest.raises(Killed):
        composed(planted, **options, checkpoint=tmp_path / "kept", progress=kill)

    held = len(list((tmp_path / "kept").glob("step-answers-0-*")))
    assert 10 < held <= 15

    def counted(*args: Any, **words: Any) -> Any:
        asked.append(1)
        return run_task(*args, **words)

    monkeypatch.setattr("trimtab.evals.trial.run_task", counted)
    seen: list[tuple[int, int]] = []
    again = composed(planted, **options, checkpoint=tmp_path / "kept", progress=lambda *now: seen.append(now))
    assert {**again.record, "seconds": 0} == {**whole.record, "seconds": 0}
    assert again.panel.setting == whole.panel.setting
    assert seen == [(n, seen[-1][1]) for n in range(1, seen[-1][1] + 1)]
    assert 0 < len(asked) == 4 * (len(whole.table) - held)  # four tasks, and nothing of the settings before the kill
    asked.clear()
    other = composed(planted, **{**options, "targets": None, "weights": {"y": 1}}, checkpoint=tmp_path / "kept")
    assert search != "grid" or not asked  # a goal is no part of the job
    assert other.record["goal"]["weights"] == {"y": 1}
    with pytest.raises(OptionError, match="holds another job: knobs"):
        composed(
            planted, **options, knobs={**planted.knobs, "yes": -planted.knobs["yes"]}, checkpoint=tmp_path / "kept"
        )


def test_a_seed_decides_what_is_tried(planted: Planted) -> None:
    one, same, other = (composed(planted, targets=TARGETS, trials=14, seed=seed) for seed in (5, 5, 2**40))
    assert one.record["trials"] == same.record["trials"] != other.record["trials"]
    first = [tuple(row["setting"].values()) for row in one.record["trials"][:5]]
    assert first == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]


def test_optuna_is_told_what_was_measured_and_keeps_to_what_exceeds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, float]] = []
    measured: list[dict[str, float]] = []
    tell = optuna.study.Study.tell

    def listen(study: Any, trial: Any, values: Any) -> Any:
        told.append(trial.params)
        return tell(study, trial, values)

    def measure(setting: dict[str, float]) -> Answer:
        measured.append(setting)
        return Answer([setting["a"] + setting["b"]], {"rail": setting["a"] - 0.25})

    monkeypatch.setattr(optuna.study.Study, "tell", listen)
    first = [{"a": 0.0, "b": 0.0}, {"a": 0.333, "b": 0.0}]
    bounds = {"a": (-1.0, 1.5), "b": (-1.0, 0.333)}
    ask_optuna("tpe", bounds, first, measure, objectives=1, trials=40, seed=0)
    assert measured[:2] == first
    for setting, params in zip(measured, told, strict=True):
        assert setting == pytest.approx(params, abs=0.0051)
        assert -1 <= setting["b"] <= 0.333
    assert all(value == round(value, 2) for setting in measured[2:] for value in setting.values())
    # Without the rail the best is a = 1.5.
    assert np.mean([setting["a"] <= 0.25 for setting in measured[20:]]) > 0.5


# --- the choice, without a model ------------------------------------------------------------------------------------


def tried(
    setting: dict[str, float], rails: dict[str, float] | None = None, kl: float | None = None, **scores: Any
) -> Tried:
    """A row of a table; a number stands for ten items that score it each."""
    items = {n: np.array(s, dtype=float) if isinstance(s, list) else np.full(10, s) for n, s in scores.items()}
    return Tried(setting, items, {n: np.full(10, s) for n, s in (rails or {}).items()}, kl=kl)


DOMAINS, LEVELS = ("medical", "financial", "legal"), ("avoidance", "generic", "expert")


def test_one_grid_serves_all_27_targets_and_the_reached_ones_are_counted_right() -> None:
    table: list[Tried] = []
    for strengths in product((0.0, 0.5, 1.0), repeat=3):
        medical, financial, legal = (int(2 * s) for s in strengths)
        medical = max(medical, 1) if legal == 2 else medical  # an expert of law does not avoid medicine,
        financial = min(financial, 1) if medical == 2 else financial  # and one of medicine is none of finance
        levels = (medical, financial, legal)
        scores = {
            f"{d} {level}": float(LEVELS[at] == level)
            for d, at in zip(DOMAINS, levels, strict=True)
            for level in LEVELS
        }
        table.append(tried(dict(zip(DOMAINS, strengths, strict=True)), **scores))
    reached: set[tuple[str, ...]] = set()
    for wanted in product(LEVELS, repeat=3):
        goal = Goal({f"{d} {level}": 1.0 for d, level in zip(DOMAINS, wanted, strict=True)}, rule="worst")
        best = choose_setting(table, goal)
        highest = [max(LEVELS, key=lambda level, d=d: best.scores[f"{d} {level}"]) for d in DOMAINS]
        if tuple(highest) == wanted:
            reached.add(wanted)
    unreached = {
        w for w in product(LEVELS, repeat=3) if w[::2] == ("avoidance", "expert") or w[:2] == ("expert", "expert")
    }
    assert len(unreached) == 6
    assert reached == set(product(LEVELS, repeat=3)) - unreached


def test_rule_worst_sacrifices_nothing_and_rule_sum_what_costs_least() -> None:
    lopsided, even = tried({"a": 1.0}, x=1.0, y=0.1), tried({"a": 2.0}, x=0.5, y=0.5)
    table = [tried({"a": 0.0}, x=0.0, y=0.0), lopsided, even]
    weights = {"x": 1.0, "y": 1.0}
    assert choose_setting(table, Goal(weights)) is lopsided
    assert choose_setting(table, Goal(weights, rule="worst")) is even
    assert choose_setting(table, Goal({"y": 1.0}, floors={"x": 0.6})) is lopsided
    assert choose_setting(table, Goal({"x": -1.0})) is table[0]
    assert choose_setting(table, Goal({"y": 0.0}, {"x": 0.45})) is even  # missed from above or below alike
    assert choose_setting(table, Goal({"y": 0.001}, {"x": 0.8})) is lopsided


def test_the_mildest_of_settings_that_the_items_cannot_tell_apart_is_chosen() -> None:
    base = tried({"a": 0.0}, x=[0, 0, 0, 0, 0, 0, 0, 0])
    strong = tried({"a": 1.0}, x=[1, 1, 1, 1, 1, 1, 1, 1])
    nearly = tried({"a": 0.5}, x=[1, 1, 1, 1, 1, 1, 1, 0])  # within one standard error, 0.125
    weak = tried({"a": 0.25}, x=[1, 1, 1, 1, 1, 1, 0, 0])  # 0.25 with an error of 0.16
    table, goal = [base, strong, nearly, weak], Goal({"x": 1.0})
    assert choose_setting(table, goal) is nearly
    assert choose_setting(table, goal, mildest=False) is strong
    assert choose_setting([base, strong, weak], goal) is strong
    # Beside what else counts, an item weighs as much as its preference does.
    assert choose_setting(table, Goal({"x": 3.0})) is nearly
    # KL on guardrails, where there are some, says what is mild.
    kept = {"keep": 1.0}
    by_kl = [
        tried({"a": 1.0}, kept, 0.1, x=strong.items["x"].tolist()),
        tried({"a": 0.5}, kept, 0.2, x=nearly.items["x"].tolist()),
    ]
    assert choose_setting([base, *by_kl], goal) is by_kl[0]
    without = [replace(row, rails={}) for row in by_kl]  # then KL would speak against the effect itself
    assert choose_setting([base, *without], goal) is without[1]


def test_two_tasks_are_compared_by_the_error_of_their_sum() -> None:
    flat, base = [0.5] * 8, tried({"a": 0.0}, x=[0] * 8, y=[0] * 8)
    best = tried({"a": 2.0}, x=[1, 1, 1, 1, 1, 1, 1, 1], y=flat)
    other = tried({"a": 1.0}, x=[1, 1, 1, 1, 1, 1, 0, 0], y=[0.75, 0.25] * 4)
    error = math.hypot(np.std([0, 0, 0, 0, 0, 0, 1, 1], ddof=1), np.std([0.25, -0.25] * 4, ddof=1)) / math.sqrt(8)
    assert error < 0.25  # which the sum of both errors is not
    assert choose_setting([base, best, other], Goal({"x": 1.0, "y": 1.0})) is best
    noisy = tried({"a": 1.0}, x=other.items["x"].tolist(), y=[1, 0] * 4)  # the error is now 0.25
    assert choose_setting([base, best, noisy], Goal({"x": 1.0, "y": 1.0})) is noisy


def test_a_setting_that_gains_is_taken_though_the_items_cannot_tell_it_from_the_base_model() -> None:
    base, better = tried({"a": 0.0}, x=[0] * 8), tried({"a": 1.0}, x=[1, 0, 0, 0, 0, 0, 0, 0])
    useless = tried({"a": 0.5}, x=[0] * 8)
    assert choose_setting([base, useless, better], Goal({"x": 1.0})) is better


def test_the_base_model_is_chosen_where_nothing_is_better() -> None:
    base = tried({"a": 0.0}, x=0.5)
    assert choose_setting([tried({"a": 0.1}, x=0.5), base], Goal({"x": 1.0})) is base
    better = tried({"a": 0.1}, x=0.4)  # the base model has no claim where it misses a floor
    assert choose_setting([base, better], Goal({"x": -1.0}, floors={"x": 0.45})) is base
    assert choose_setting([base, better], Goal({"x": 1.0}, floors={"x": 0.4})) is base


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=25))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, ...]]) -> None:
    front = undominated(np.array(points, dtype=float))

    def beats(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    assert front
    for i, point in enumerate(points):
        beaten = [other for other in points if beats(other, point)]
        assert (i in front) == (not beaten)
        assert i in front or any(beats(points[j], point) for j in front)


def test_the_front_holds_qualifying_settings_and_the_mildest_of_equals() -> None:
    goal = Goal({"x": 1.0, "y": -1.0}, {"z": 0.5}, {"x": 0.2})
    kept = [tried({"a": 1.0}, x=0.3, y=0.1, z=0.5), tried({"a": 2.0}, x=0.9, y=0.6, z=0.4)]
    others = [
        tried({"a": 5.0}, x=0.9, y=0.6, z=0.4),  # the same scores, with more
        tried({"a": 0.0}, x=0.1, y=0.0, z=0.5),  # under the floor
        tried({"a": 3.0}, x=0.2, y=0.2, z=0.7),  # beaten
    ]
    assert pareto_front([*others, *kept], goal) == kept


def test_the_bias_of_one_preference_is_that_of_tuning() -> None:
    draws = np.random.default_rng(0)
    rows = [tried({"a": float(i)}, x=draws.integers(0, 2, 40).tolist()) for i in range(6)]
    goal, expected = Goal({"x": 1.0}), selection_bias(rows[0].items["x"], [row.items["x"] for row in rows[1:]])
    assert goal_bias(rows[0], rows, goal) == pytest.approx(expected)
    assert goal_bias(rows[0], rows, Goal({"x": -2.0})).expected == pytest.approx(2 * expected.expected)
    ruled_out = [replace(row, excess={"rail": 0.1}) for row in rows[3:]]  # what cannot be chosen brings no luck
    assert goal_bias(rows[0], [*rows[:3], *ruled_out], goal).settings == 2


# --- what is warned of and refused ----------------------------------------------------------------------------------


def test_a_choice_without_a_gain_is_warned_of(planted: Planted) -> None:
    options: Any = {"tasks": {"y": planted.tasks["y"]}, "search": "grid"}
    with pytest.warns(TrimtabWarning, match="leaves every knob at 0"):
        found = composed(planted, **options, grid=[0.0], weights={"y": -1.0}, knobs={"yes": planted.knobs["yes"]})
    assert found.panel.setting == {"yes": 0.0}


def test_a_gain_that_useless_settings_would_seem_to_have_is_warned_of(planted: Planted) -> None:
    prompts = tuple(f"Toss {i}" for i in range(40))

    def toss(answers: Sequence[str]) -> list[float]:
        said = zip(prompts, answers, strict=True)
        return [float(hashlib.sha256(f"{prompt} {answer}".encode()).digest()[0] & 1) for prompt, answer in said]

    useless: dict[str, AnyKnob] = {"noise": pico.knob(0, norm=2.0)}
    coin = Task("coin", prompts, toss, max_new_tokens=4)
    with pytest.warns(TrimtabWarning, match=r"of as many useless ones would seem to gain 0\.\d+"):
        found = composed(planted, tasks=[coin], knobs=useless, trials=12, guardrails=[])
    assert 0 < found.record["gain"] <= found.record["selection_bias"]["expected"]


def test_prompts_that_a_knob_was_learned_from_are_warned_of(planted: Planted) -> None:
    hashes = [prompt_hash((Message("user", prompt),)) for prompt in PROMPTS[:3]]
    known = planted.knobs["yes"].with_(provenance={"prompt_hashes": hashes})
    with pytest.warns(TrimtabWarning, match="'mine' was learned from 3 of the 8 prompts of y"):
        composed(planted, knobs={"mine": known}, tasks=[planted.tasks["y"]], guardrails=[], search="grid", grid=[0, 1])


EMPTY = Task("none", (), lambda answers: [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knobs": {}}, "no knobs to compose"),
        ({"knobs": pico.knob()}, "Knobs come by name"),
        ({"knobs": {"a b": pico.knob()}}, "name"),
        ({"knobs": {"x": 3}}, "A rack holds knobs"),
        ({"tasks": []}, "no preferences to compose for"),
        ({"tasks": ["math"]}, "are tasks; got 'math'"),
        ({"tasks": {"math": "math"}}, "tasks by name"),
        ({"tasks": [EMPTY]}, "'none' is empty"),
        ({"tasks": [letters("a", "b", "keep")]}, "names of their own; got keep, keep"),
        ({"weights": {"z": 1.0}}, "Unknown preference 'z'. Known: p, r, y."),
        ({"targets": {"keep": 1.0}}, "Unknown preference 'keep'. Known: p, r, y."),
        ({"floors": {"z": 1.0}}, "Unknown preference or guardrail 'z'. Known: keep, p, r, y."),
        ({"targets": {"y": 1.5}}, "The target of 'y' is a score, from 0 to 1; got 1.5."),
        ({"floors": {"y": -0.1}}, "The floor of 'y' is a score, from 0 to 1; got -0.1."),
        ({"weights": {"y": math.nan}}, "weight of 'y' must be finite"),
        ({"weights": {"y": 0.0}}, "The goal weighs nothing"),
        ({"weights": {"y": 1.0}, "targets": {"y": 1.0}}, "'y' has a weight and a target"),
        ({"rule": "mean"}, "Unknown rule 'mean'. Known: sum, worst."),
        ({"search": "cma"}, "Unknown search 'cma'. Known: grid, nsga2, tpe."),
        ({"search": "grid", "trials": 9}, "Leave it out"),
        ({"search": "grid", "grid": []}, "The grid of 'yes' is empty"),
        ({"search": "grid", "grid": {"yes": [1.0]}}, "no strengths for pea, are"),
        ({"search": "grid", "grid": {"no": [1.0]}}, "Unknown knob 'no'"),
        ({"search": "grid", "grid": [math.inf]}, "strength of 'yes' must be finite"),
        ({"search": "grid", "grid": [1.0], "bounds": {"yes": (0.0, 1.0)}}, "Pass one of the two"),
        ({"grid": [1.0]}, "The grid is that of search='grid'"),
        ({"trials": 4}, "Trials must be at least 5"),
        ({"bounds": {"no": (0.0, 1.0)}}, "Unknown knob 'no'"),
        ({"bounds": {"yes": (0.5, 1.0)}}, "The bounds of 'yes' must hold 0"),
        ({"bounds": {"yes": (0.0, 0.0)}}, "The bounds of 'yes' must hold 0"),
        ({"knobs": {"k": pico.knob().with_(tuning={"safe_range": [0.0, 0.0]})}}, "The safe range of 'k' must hold 0"),
        ({"budget": -1.0}, "Budgets are finite and not negative; got -1"),
        ({"broken_budget": math.nan}, "Budgets are finite and not negative"),
        ({"seed": -1}, "The seed is a whole number"),
    ],
)
def test_what_cannot_be_composed_is_an_error_before_any_work(
    planted: Planted, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.evals.trial.run_task", None)
    with pytest.raises((OptionError, UnknownName, KnobError)) as error:
        composed(planted, **options)
    assert message in str(error.value)


def test_a_goal_of_other_preferences_is_refused_by_a_table() -> None:
    table = [tried({"a": 0.0}, x=0.5)]
    with pytest.raises(UnknownName, match=r"Unknown preference 'y'\. Known: x"):
        choose_setting(table, Goal({"y": 1.0}))
    with pytest.raises(UnknownName, match="Unknown preference or guardrail 'y'"):
        choose_setting(table, Goal({"x": 1.0}, floors={"y": 1.0}))
    with pytest.raises(OptionError, match="table is empty"):
        choose_setting([], Goal({"x": 1.0}))


def test_without_optuna_a_grid_works_and_the_rest_says_how_to_install_it(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("trimtab.compose.search"), "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r'pip install "trimtab\[compose\]"'):
        composed(planted)
    assert composed(planted, search="grid", grid=[0.0, 1.0]).panel.setting["yes"] == 1.0


def test_optunas_logging_is_quiet_and_as_it_was_afterwards(planted: Planted, capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    composed(planted, trials=6)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr() == ("", "")


# --- panels and pages -----------------------------------------------------------------------------------------------


def test_a_panel_is_written_with_the_knobs_that_have_no_file(planted: Planted, tmp_path: Path) -> None:
    planted.knobs["yes"].save(tmp_path / "mine.safetensors")
    knobs: dict[str, Any] = {"a/b": planted.knobs["yes"], "are": planted.knobs["are"]}
    tasks = {name: planted.tasks[name] for name in "yr"}
    found = composed(planted, knobs=knobs, tasks=tasks, targets={"y": 0.9, "r": 0.95}, search="grid", grid=[0, 0.5])
    found.save(tmp_path / "panel.json", {"a/b": tmp_path / "mine.safetensors"})
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.safetensors",
        "panel.json",
        "panel.are.knob.safetensors",
    }
    panel = load_panel(tmp_path / "panel.json")
    assert panel.setting == found.panel.setting == {"a/b": 0.5, "are": 0.5}
    dose = panel.rack.resolve(panel.setting)
    for name in "yr":
        assert run_task(planted.lm, planted.words, planted.tasks[name], dose).accuracy == pytest.approx(
            found.record["chosen"]["scores"][name]
        )
    with pytest.raises(UnknownName, match="Unknown knob 'no'"):
        found.save(tmp_path / "panel.json", {"no": "x"})


def test_knobs_whose_names_make_one_file_name_are_written_apart(planted: Planted, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"a/b": planted.knobs["yes"], "a_b": planted.knobs["are"]}
    found = composed(planted, knobs=knobs, tasks={"y": planted.tasks["y"]}, search="grid", grid=[0, 0.5])
    found.save(tmp_path / "panel.json")
    rack = load_panel(tmp_path / "panel.json").rack
    assert {name: knob.kind for name, knob in rack.items()} == {name: knob.kind for name, knob in knobs.items()}


@pytest.fixture(scope="module")
def saved(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    planted.lm.save_pretrained(folder)
    planted.words.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(planted: Planted, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, two knobs and tasks in files."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(saved)
    planted.knobs["yes"].with_(name="yes", gain=6.0).save("yes.safetensors")
    planted.knobs["are"].save("delta.safetensors")
    for name, letter in (("y", "y"), ("r", "r"), ("rail", "|")):
        lines = [json.dumps({"prompt": prompt, "answer": letter}) for prompt in PROMPTS]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


WORDS = "--knob yes.safetensors --knob are=delta.safetensors --max-new-tokens 2 --grader contains --broken-budget 1"


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(line.split())
    return status, *capsys.readouterr()


def test_the_verb_writes_a_panel_and_a_report_that_other_verbs_take(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = "--prefer y.jsonl=2 --target r.jsonl=0.0 --guardrail rail.jsonl --floor rail=0 --out p.json --report page"
    line = f"compose model {WORDS} {goal} --trials 6 --bounds yes=-1,1 --seed 1 --rule sum --checkpoint kept"
    status, out, err = run(capsys, f"{line} --json")
    assert status == 0, err
    record = json.loads(out)
    assert not Path("kept").exists()
    assert record["goal"] == {"weights": {"y": 2.0}, "targets": {"r": 0.0}, "floors": {"rail": 0.0}, "rule": "sum"}
    assert record["chosen"]["scores"]["y"] > record["base"]["scores"]["y"]
    panel = json.loads(Path("p.json").read_text())["knobs"]
    assert {name: entry["path"] for name, entry in panel.items()} == {
        "yes": "yes.safetensors",
        "are": "delta.safetensors",
    }
    assert {name: entry["strength"] for name, entry in panel.items()} == record["chosen"]["setting"]
    stored = json.loads(Path("page/compose.json").read_text())
    assert {**stored, "out": "p.json", "report": "page"} == record
    page = Path("page/compose.html").read_text()
    assert page.count("<svg") == 2
    assert "http-equiv" not in page
    assert "<script" not in page
    assert sorted(path.name for path in Path("page").iterdir()) == sorted(FILES) == sorted(REPORT)
    # The panel stands where a knob does, and does there what was measured.
    status, out, err = run(
        capsys, "eval model --knob p.json --task y.jsonl --grader contains --max-new-tokens 2 --json"
    )
    assert status == 0, err
    assert json.loads(out)["settings"][0]["tasks"][0]["accuracy"]["estimate"] == pytest.approx(
        record["chosen"]["scores"]["y"]
    )
    assert run(capsys, "generate model Hi --knob p.json --max-new-tokens 2")[0] == 0
    # Again, over what was written; in text, and by a grid.
    status, out, err = run(capsys, f"compose model {WORDS} {goal} --search grid --grid 0,1 --grid yes=0,0.5,1")
    assert status == 0, err
    assert "the Pareto front" in out
    assert "cross-talk" in out
    assert "yes at 1" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "There is no goal."),
        ("--prefer y.jsonl --out x.safetensors", "Let it end in .json."),
        ("--prefer y.jsonl --out y.json", "is not known to be a panel"),
        ("--prefer y.jsonl --report .", "holds other files"),
        ("--prefer y.jsonl --report y.jsonl", "--report is a folder"),
        ("--prefer none.jsonl", "There is no file 'none.jsonl'"),
        ("--prefer y.jsonl=much", "number of 'y.jsonl' must be a number"),
        ("--target y.jsonl", "--target takes TASK=SCORE"),
        ("--target y.jsonl=2", "The target of 'y' is a score, from 0 to 1; got 2."),
        ("--prefer y.jsonl --target y.jsonl=1", "y.jsonl has a weight and a target. Leave its --prefer out."),
        ("--prefer y.jsonl --floor z=1", "Unknown preference or guardrail 'z'. Known: y."),
        ("--prefer y.jsonl --floor z", "A knob setting is written"),
        ("--prefer y.jsonl --bounds yes=1", "--bounds takes NAME=LOW,HIGH"),
        ("--prefer y.jsonl --bounds yes=a,b", "expected numbers"),
        ("--prefer y.jsonl --bounds no=-1,1", "Unknown knob 'no'. Known: are, yes."),
        ("--prefer y.jsonl --grid 0,1", "The grid is that of --search grid"),
        ("--prefer y.jsonl --search grid --trials 5", "Leave it out"),
        ("--prefer y.jsonl --search best", "Unknown search 'best'. Known: grid, nsga2, tpe."),
        ("--prefer y.jsonl --knob yes.safetensors", "Two knobs are named 'yes'."),
        ("--prefer y.jsonl --knob p=panel.json", "is a panel. Pass its knobs"),
        ("--prefer y.jsonl --grader best", "Unknown grader 'best'."),
        ("--prefer y.jsonl --max-new-tokens 0", "--max-new-tokens is 1 or more"),
    ],
)
def test_the_verb_says_what_is_wrong_before_any_work(
    folder: Path, line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("panel.json").write_text('{"knobs": {}}')
    Path("y.json").write_text('{"mine": 1}')
    monkeypatch.setattr("trimtab.evals.trial.run_task", None)
    words = WORDS.split()
    for option in ("--grader", "--max-new-tokens"):
        if option in line:
            at = words.index(option)
            words[at : at + 2] = []
    out = "" if "--out" in line else "--out p.json"
    status, _, err = run(capsys, f"compose model {' '.join(words)} {line} {out}")
    assert (status, "Traceback" in err) == (2, False)
    assert message in err
    assert not Path("p.json").exists()
