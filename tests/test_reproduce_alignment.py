"""Alignment Vectors re-measured: recipes with mistakes, what counts as reached, and what the curves and costs mean."""

from __future__ import annotations

import json
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pico import tokenizer
from trimtab.check import default_config, twin
from trimtab.cli import main
from trimtab.errors import OptionError, UnknownName
from trimtab.reproduce import alignment_cells as cells
from trimtab.reproduce.alignment import step_count, waves
from trimtab.reproduce.alignment_bench import tried
from trimtab.reproduce.alignment_cells import apart
from trimtab.reproduce.alignment_claims import claims
from trimtab.reproduce.alignment_evidence import (
    Evidence,
    apart_and_together,
    equal_seconds,
    handed_over,
    on_target,
    reached,
    resampled,
    spread,
)
from trimtab.reproduce.alignment_recipe import LEVELS, LevelData, load_recipe, thinned
from trimtab.reproduce.alignment_report import NOTES, build
from trimtab.reproduce.alignment_sections import sections
from trimtab.reproduce.document import html, markdown
from trimtab.reproduce.steps import Key

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
        ("plain = [-1.0, -0.7, -0.5, -0.25, 0.0,", "plain = [-1.0,", "rise and hold 0"),
        ("anchored = [", "ankered = [", "needs the strengths of anchored"),
        ("data_seed = 70", "budget = -1", "budget is finite"),
        ("data_seed = 70", "lora_rank = 0", "lora_rank counts from 1"),
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


def test_an_interval_of_a_share_is_that_of_its_binomial() -> None:
    found = resampled(lambda at: float((np.arange(100) < 30)[at].mean()), 100)
    assert found.estimate == 0.3
    assert found.low == pytest.approx(0.3 - 1.96 * 0.0458, abs=0.02)
    assert found.high == pytest.approx(0.3 + 1.96 * 0.0458, abs=0.02)


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


# --- claims on records whose answers are known ----------------------------------------------------------------------

RECIPE = load_recipe("alignment-vectors")
DOMAINS = list(RECIPE.domains)
N = 40


def at(level: str) -> list[int]:
    return [LEVELS.index(level)] * N


def invented(*, stage: str = "medical", broken: str = "", wrecked: bool = False) -> dict[Key, Any]:
    """Records in which anchored vectors reach everything and plain ones drag the other domains along.

    The vector of `stage` alone works at the other fine-tuning stage; `broken` is a domain whose plain vector, and with
    `wrecked` every combination, costs a guardrail.
    """
    base = {"test": {d: at("generic") for d in DOMAINS}, "rails": {"facts": [1.0] * N}}
    lost = {"facts": [0.0] * N}
    records: dict[Key, Any] = {}
    for domain in DOMAINS:
        for kind in RECIPE.vectors:
            trained = {"learning_rate": 1e-4, "seconds": 10.0, "grid_seconds": 20.0, "norm": 1.0}
            records["m", "vector", domain, kind] = trained
        for way in RECIPE.ways:
            rows = [
                {"lambda": x, "test": at(level), "generated": at(level)}
                for x, level in ((-1.0, "avoidance"), (0.0, "generic"), (1.0, "expert"))
            ]
            chosen = {"avoidance": -1.0, "generic": 0.0, "expert": 1.0}
            records["m", "sweep", domain, way] = {"rows": rows, "chosen": chosen}
        works = {"test": at("expert"), "rails": base["rails"], "lambda": 1.0}
        records["m", "stage", domain] = {
            "base": {"test": at("generic"), "rails": base["rails"]},
            "native": works,
            "transferred": works if domain == stage else works | {"test": at("generic")},
            "native_seconds": 10.0,
        }
    targets = list(product(LEVELS, repeat=3))
    reach = {"plain": lambda wanted: ("expert",) * 3, "anchored": lambda wanted: wanted}
    reach["random"] = lambda wanted: ("generic",) * 3
    for way, says in reach.items():
        records["m", "grid", way] = {"rows": [{}] * 9, "seconds": 90.0, "merge_seconds": 0.01}
        rows = [
            {
                "levels": list(wanted),
                "setting": [0.5, 0.5, 0.5],
                "validation": 1.0,
                "choice_seconds": 0.01,
                "test": {d: at(level) for d, level in zip(DOMAINS, says(wanted), strict=True)},
                "rails": lost if wrecked else base["rails"],
            }
            for wanted in targets
        ]
        records["m", "combine", way] = {"rows": rows, "base": base}
    asked = [{"levels": list(wanted), "test": base["test"]} for wanted in targets]
    sentences = {d: dict.fromkeys(LEVELS, "Please.") for d in DOMAINS}
    records["m", "prompts"] = {"rows": asked, "sentences": sentences}
    for combination in RECIPE.joint[:2]:
        levels = combination.split()
        told = {"test": {d: at(level) for d, level in zip(DOMAINS, levels, strict=True)}, "rails": base["rails"]}
        records["m", "joint", combination] = {"levels": levels, "seconds": 100.0, **told}
    turned: dict[str, Any] = {"base": base, "cosines": np.eye(3).tolist(), "kept": dict.fromkeys(DOMAINS, 1.0)}
    for kind in ("plain", "orthogonal", "anchored"):
        turned[kind] = {}
        for domain in DOMAINS:
            raised = DOMAINS if kind == "plain" else [] if kind == "orthogonal" else [domain]
            test = {d: at("expert" if d in raised else "generic") for d in DOMAINS}
            rails = lost if kind == "plain" and domain == broken else base["rails"]
            turned[kind][domain] = {"setting": {domain: 1.0}, "test": test, "rails": rails}
    records["m", "matrix"] = turned
    ways = [("vector", 0, False), ("prompt", 0, False), ("prompt", 0, True), ("prompt", 4, False), ("prompt", 4, True)]
    rows = [
        {
            "way": way,
            "shots": shots,
            "prefix": cached,
            "prompt_tokens": [12 + 40 * shots] * 3,
            "question_tokens": [9] * 3,
            "answers": [[[0.1 if way == "vector" or cached else 0.5, 0.4, 5]] * 3] * 2,
            "test": at("expert"),
            "generated": at("expert"),
        }
        for way, shots, cached in ways
    ]
    records["m", "cost", DOMAINS[0]] = {"rows": rows, "lambda": 1.0, "sentence": "Please."}
    records["m", "sibling"] = {}
    return records


def by_id(records: dict[Key, Any]) -> dict[str, dict[str, Any]]:
    made = claims(Evidence(records, RECIPE, RECIPE.sizes, "m", "command"))
    assert len({claim["id"] for claim in made}) == len(made)
    return {claim["id"]: claim for claim in made}


def test_claims_say_what_the_records_hold() -> None:
    found = by_id(invented())
    assert found["hand-over"]["holds"]
    assert (found["as-many"]["measured"], found["all-anchored"]["measured"]) == (1, 27)
    assert not found["as-many"]["holds"]
    assert found["all-anchored"]["holds"]
    assert found["control-random"]["holds"]
    assert found["below-joint"]["measured"] == 1.0
    assert found["over-generalises"]["measured"] == 1.0
    assert found["faster-marginal"]["measured"] == pytest.approx(100 / 0.02)
    assert found["faster-search"]["measured"] == pytest.approx(100 / 90.02)
    assert found["faster-all-27-anchored"]["measured"] == pytest.approx(100 / ((60 + 90) / 27 + 0.02))
    assert found["cost-own-without-prefix"]["measured"] == pytest.approx(0.9 / 0.5)


def test_a_vector_that_does_nothing_spares_the_others_and_that_is_said() -> None:
    found = by_id(invented())
    assert found["orthogonal"]["holds"]
    assert not found["orthogonal-own"]["holds"]
    assert found["anchored"]["holds"]
    assert found["anchored-own"]["holds"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_another_stage_is_told_of_the_domain_that_was_measured(domain: str) -> None:
    records = invented(stage=domain)
    found = by_id(records)
    assert [d for d in DOMAINS if found[f"transfers-{d}"]["holds"]] == [domain]
    assert [d for d in DOMAINS if found[f"transferred-gains-{d}"]["holds"]] == [domain]
    rows = build(RECIPE, RECIPE.sizes, "m", records, "command", quick=False)["stage"]
    expert = {row["domain"]: row["shares"][2] for row in rows if row["what"] == "base model's vector"}
    assert expert == {d: float(d == domain) for d in DOMAINS}


def test_one_vector_that_breaks_a_guardrail_fails_the_claim() -> None:
    assert by_id(invented())["keeps-plain"]["holds"]
    found = by_id(invented(broken="legal", wrecked=True))
    assert not found["keeps-plain"]["holds"]
    assert "legal" in found["keeps-plain"]["statement"]
    assert found["keeps-anchored"]["holds"]
    assert not found["combinations-keep-anchored"]["holds"]


def test_the_report_is_drawn() -> None:
    report = build(RECIPE, RECIPE.sizes, "m", invented(), "command", quick=False)
    report |= {"seconds": 1.0, "steps_kept": 0}
    assert json.loads(json.dumps(report))["combinations"]["totals"]["random vectors"]["lenient"][0] == 1
    page, text = html(report, sections(report), NOTES), markdown(report, sections(report), NOTES)
    assert page.count("<svg") == 7
    assert "27 (27 strictly) by anchored vectors" in report["summary"]
    assert "| medical | base model's vector | 1 |" in text


# --- the whole ------------------------------------------------------------------------------------------------------


def test_the_protocol_runs_on_a_random_model_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="reproducing needs the train extra")
    twin(default_config("llama"), max_position_embeddings=4096).float().save_pretrained(tmp_path / "model")
    words = tokenizer(units="bytes")
    words.model_max_length = 4096
    words.save_pretrained(tmp_path / "model")
    text = (resources.files("trimtab.reproduce") / "recipes" / "alignment-vectors.toml").read_text()
    for old, new in (
        ('"prefworld:facts", "prefworld:copying"', '"prefworld:facts"'),
        ("learning_rates = [1e-4, 3e-4]", "learning_rates = [1e-3]"),
        ('"prefworld:math", "prefworld:code", "prefworld:concise"', '"prefworld:concise"'),
        ("shots = [0, 1, 2, 4, 6, 8, 10]", "shots = [0, 1]"),
        ("pairs = 12", "pairs = 3"),
        ("anchors = 6", "anchors = 2"),
        ("validation = 6", "validation = 2"),
        ("validation_pairs = 4", "validation_pairs = 2"),
        ("test = 8", "test = 3"),
        ("sampled = 4\nguard = 4", "sampled = 2\nguard = 2\nmax_new_tokens = 3"),
        ("lambda_every = 5", "lambda_every = 20"),
        ("grid_every = 4", "grid_every = 8"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "small.toml").write_text(text)
    out = tmp_path / "out"
    command = ["reproduce", "alignment-vectors", str(tmp_path / "model"), "--recipe", str(tmp_path / "small.toml")]
    command += ["--out", str(out), "--quick", "--workers", "1", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    recipe = load_recipe(tmp_path / "small.toml")
    assert report["steps"] == step_count(recipe, recipe.quick)
    assert {row["domain"] for row in report["stage"]} == set(DOMAINS)
    assert report["combinations"]["totals"]["anchored vectors"]["combinations"] == 27
    assert (out / "knobs" / "vector-anchored-avoidance-legal.knob.safetensors").is_file()
    for name in ("vector", "grid", "combine", "matrix", "stage"):
        monkeypatch.setattr(cells, name, None)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["claims"] == report["claims"]
