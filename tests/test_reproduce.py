"""Reproductions: recipes, claims that may fail, reports for people, and the whole protocol on random models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invented import write_all
from pico import tokenizer
from trimtab.check import default_config, twin
from trimtab.cli import main
from trimtab.errors import OptionError, UnknownName
from trimtab.evals.benchmarks import load_benchmark
from trimtab.evals.tasks import Task
from trimtab.pairs import Pairs
from trimtab.reproduce import cells
from trimtab.reproduce.claims import claims
from trimtab.reproduce.data import Data, overlap
from trimtab.reproduce.document import Claim, html, markdown
from trimtab.reproduce.evidence import Evidence
from trimtab.reproduce.palrs import first_steps, later_steps, reproduce, sizes_of
from trimtab.reproduce.recipe import Recipe, load_recipe
from trimtab.reproduce.report import NOTES, build, sections
from trimtab.reproduce.toml import recipe_names

pytest.importorskip("trl", reason="reproducing needs the train extra")

# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("palrs")])
def test_every_recipe_is_read_and_holds_what_fairness_asks_for(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.main in recipe.steering
    assert {"palrs-eq3", "caa", "pca", "random", "shuffled", "length-matched"} <= set(recipe.steering)
    assert all(len(way.learning_rates) * len(way.betas) >= 4 for way in recipe.training.values())
    assert recipe.sizes.seeds == 5
    assert recipe.sizes.many_seeds == 2
    assert {10, 25, 50, 400} == set(recipe.sizes.counts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('titel = "x"', "Unknown key of .*'titel'.*Did you mean 'title'"),
        ("[sizes]\npairs = 0", "pairs counts from 1; got 0"),
        ('[sizes]\npairs = "many"', "pairs is a number; got 'many'"),
        ("[sizes]\npairs = true", "pairs is a number; got True"),
        ('gains = "0.1"', "gains is a list"),
        ('main = "palr"', "Did you mean 'palrs'"),
        ('[steering.x]\ntitle = "x"\nwhere = ["all", "nowhere"]', "nowhere"),
        ('[steering.x]\nmethod = "palrs"', "x lacks title"),
        ("title = ", "is no TOML"),
        ('[steering.x]\ntitle = "x"\nmethod = "diffmeans"', "Did you mean 'diffmean'"),
        ("gains = [0.1, -1.0]", "gains are positive numbers"),
        ("shots = []", "shots are positive numbers, at least one"),
        ("last = 9.0", "last is a share of the layers"),
        ("[thresholds]\ngain = -7", "thresholds.gain is finite and not negative"),
        ("[sizes]\ncounts = []", "counts counts from 1"),
        ("[others]\npairs = 50", "compared at the same pairs; got 100 and, for others, 50"),
        ("[others]\ncounts = [10]", "others.counts needs the largest of counts, 400"),
        ('[training.x]\ntitle = "x"\nloss = "dpo"\nbetas = [0.1]\nlearning_rates = []', "learning_rates are positive"),
        ('[training.x]\ntitle = "x"\nloss = "dpo"\nbetas = [0.0]\nlearning_rates = [1e-5]', "betas are positive"),
        ('[training.x]\ntitle = "x"\nloss = "sft"\nbetas = [0.1]\nlearning_rates = [1e-5]', "SFT has no beta"),
        ("[thresholds]\ngain = []", "gain is a number"),
    ],
)
def test_a_recipe_with_a_mistake_says_where(change: str, words: str, tmp_path: Path) -> None:
    text = 'title = "T"\nmodels = ["m"]\n' if not change.startswith("title") else 'models = ["m"]\n'
    body = '[domains.d]\npairs = "p"\ntask = "t"\n[steering.palrs]\ntitle = "P"\n[training]\n'
    top, table = ("", change) if change.startswith("[") else (change, "")
    (tmp_path / "r.toml").write_text(f"{text}{top}\n{body}{table}\n")
    with pytest.raises((OptionError, UnknownName), match=words):
        load_recipe(tmp_path / "r.toml")


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(UnknownName, match="palrs-llama3"):
        load_recipe("palrs-lama3")
    with pytest.raises(OptionError, match=r"Recipes that come along: alignment-vectors, cold-steer,"):
        load_recipe("missing.toml")


def test_a_file_that_is_no_toml_and_sizes_that_are_left_out(tmp_path: Path) -> None:
    text = 'title = "T"\nmodels = ["m"]\n[domains.d]\npairs = "p"\ntask = "t"\n[steering.palrs]\ntitle = "P"\n'
    (tmp_path / "r.txt").write_text(text)
    with pytest.raises(OptionError, match=r"ends in \.toml"):
        load_recipe(tmp_path / "r.txt")
    (tmp_path / "r.toml").write_text(f"{text}[training]\n[sizes]\ntest = 7\n[others]\nseeds = 1\n")
    recipe = load_recipe(tmp_path / "r.toml")
    assert (recipe.sizes.test, recipe.others.test, recipe.quick.test) == (7, 7, 7)
    assert (recipe.sizes.seeds, recipe.others.seeds) == (5, 1)


# --- claims ---------------------------------------------------------------------------------------------------------


def evidence(
    *,
    models: tuple[str, ...] = ("one", "two"),
    gain: float = 0.3,
    dpo: float = 0.3,
    seconds: float = 10.0,
    unlucky: bool = False,
) -> Evidence:
    """Records of a run in which everything is known: PaLRS gains `gain`, DPO `dpo`, which takes `seconds` to 1."""
    recipe = replace(load_recipe("palrs"), domains={"math": load_recipe("palrs").domains["math"]})
    sizes = sizes_of(recipe, models, quick=False)
    random = np.random.default_rng(0)
    base = (random.random(300) < 0.2).astype(float)

    def test(gained: float, model: str, kind: str) -> dict[str, Any]:
        if unlucky and model == "two" and kind == "steer":
            gained = 0.0
        better = np.maximum(base, random.random(300) < gained / 0.8)
        run = {"scores": better.tolist(), "on_side": [1.0] * 300, "side_share": 1.0, "score_within_side": 0.5}
        run |= {"broken": 0.0, "repetition": 0.0, "characters": 30.0}
        rails = {"facts": [1.0] * 100}
        right = {"right": [1.0] * 50, "margin": [1.0] * 50}
        return {
            "greedy": run,
            "sampled": run,
            "guardrails": rails,
            "preference": right,
            "kl": 0.1,
            "seconds_per_answer": 0.01,
        }

    cost = {"seconds": 1.0, "peak_bytes": 1 << 20}
    records: dict[tuple[str, ...], Any] = {}
    done: dict[tuple[str, ...], Any] = {}
    for key, _ in first_steps(recipe, sizes):
        model, kind = key[:2]
        way = recipe.steering.get(key[3]) if kind == "steer" else None
        gained = 0.0 if kind == "base" or (way and way.control) else gain
        record: dict[str, Any] = {"test": test(gained, model, kind), "learn": cost, "tune": cost, "overlap": 0}
        if kind == "grid":
            chosen = {"learning_rate": 1e-4, "beta": 0.1}
            record = {"record": {"chosen": chosen}, "tune": {"seconds": 6 * seconds, "peak_bytes": None}}
        elif kind == "steer":
            record["chosen"] = {"site": "3/last", "where": "prompt", "gain": 0.4}
            record["validation"] = {"selection_bias": {"expected": 0.1}}
            reversed_run = test(0.0, model, "reversed")
            reversed_run["sampled"]["scores"] = [0.0] * 300
            record["controls"] = {"random": base.tolist(), "shuffled": base.tolist(), "reversed": reversed_run}
        elif kind == "naive":
            numbers = (
                "alpha",
                "items",
                "settings",
                "base",
                "score",
                "base_elsewhere",
                "score_elsewhere",
                "selection_bias",
            )
            record = {"site": "3/last", **dict.fromkeys(numbers, 1)}
        records[key] = done[key] = record
    for key, _ in later_steps(recipe, sizes, done):
        kind, model = key[1], key[0]
        rows = [{"learning_rate": 1e-4, "beta": 0.1, "best_step": 14}]
        if kind == "train":
            records[key] = {
                "test": test(dpo, model, kind),
                "record": {"table": rows},
                "learn": {**cost, "seconds": seconds},
            }
        elif kind == "dose":
            row = {"score": 0.5, "guardrails": [1.0, 1.0, 1.0], "broken": 0.0}
            doses = [{"alpha": a, **row} for a in (-0.4, 0.0, 0.4)]
            records[key] = {"rows": doses, "chosen_alpha": 0.4, "paper_alpha_1": 0.9}
        else:
            cells_of = [{"layer": layer, "position": "last", "score": 0.5} for layer in range(3)]
            records[key] = {"rows": cells_of, "where": "prompt", "alpha": 0.4}
    return Evidence(records, recipe, sizes, "trimtab reproduce palrs")


def held(found: Evidence) -> dict[str, bool]:
    return {claim["id"]: claim["holds"] for claim in claims(found)}


def test_claims_hold_where_the_interval_says_so_and_fail_where_it_does_not() -> None:
    better, worse, equal = held(evidence(dpo=0.1)), held(evidence(dpo=0.6)), held(evidence(gain=0.0, dpo=0.0))
    assert better["gain-math"]
    assert better["beats-dpo-100-math"]
    assert not worse["beats-dpo-100-math"]
    assert not worse["beats-simpo-1000-math"]
    assert worse["gain-math"]
    assert not equal["gain-math"]
    assert equal["guardrails"]
    assert equal["controls"]
    assert not equal["preference-math"]
    assert better["reversed-math"]
    assert set(better) == set(worse)


def test_a_ratio_of_seconds_holds_above_its_threshold_only() -> None:
    fast, slow = evidence(seconds=10.0), evidence(seconds=2.0)
    assert held(fast)["faster-than-dpo-100"]
    assert held(fast)["faster-than-dpo-100-tuned"]
    assert not held(slow)["faster-than-dpo-100"]
    claim = next(c for c in claims(fast) if c["id"] == "faster-than-dpo-100-tuned")
    assert claim["measured"] == pytest.approx(60 / (1 + 1))  # the grid holds the chosen run


def test_many_pairs_take_their_own_grids_setting_or_that_of_fewer_pairs() -> None:
    recipe = load_recipe("palrs")
    sizes = sizes_of(recipe, ("one", "two"), quick=False)
    assert [size.many_grid for size in sizes.values()] == [True, False]
    done: dict[tuple[str, ...], Any] = {key: {"refused": ""} for key, _ in first_steps(recipe, sizes)}
    assert ("two", "grid", "math", "dpo", "100") in done
    assert ("two", "grid", "math", "dpo", "1000") not in done
    for key in done:
        if key[1] == "grid":
            done[key] = {"record": {"chosen": {"learning_rate": float(key[-1]), "beta": 1.0}}}
    settings = {key: arguments["setting"] for key, arguments in later_steps(recipe, sizes, done) if key[1] == "train"}
    assert settings["one", "train", "math", "dpo", "1000", "0"] == (1000.0, 1.0)
    assert settings["two", "train", "math", "dpo", "1000", "0"] == (100.0, 1.0)
    assert settings["two", "train", "math", "dpo", "100", "0"] == (100.0, 1.0)
    claim = next(c for c in claims(evidence()) if c["id"] == "faster-than-dpo-1000-tuned")
    assert claim["by_model"] == pytest.approx({"one": 60 / 2, "two": (60 + 10) / 2})


def test_one_unlucky_model_is_enough_for_a_claim_to_fail() -> None:
    assert held(evidence())["gain-math"]
    found = claims(evidence(unlucky=True))[0]
    assert found["low"] > 0.02  # over both models it would hold
    assert found["by_model"]["two"] == pytest.approx(0.0, abs=0.01)
    assert not found["holds"]


def changed(found: Evidence, change: Callable[[tuple[str, ...], Any], None]) -> Evidence:
    """The same run with every record changed in place."""
    records = json.loads(json.dumps([[list(key), record] for key, record in found.records.items()]))
    made = {tuple(key): record for key, record in records}
    for key, record in made.items():
        change(key, record)
    return Evidence(made, found.recipe, sizes_of(found.recipe, found.models, quick=False), found.command)


def test_a_guardrail_that_one_model_loses_fails_the_claim_though_another_loses_more_on_average() -> None:
    def lose(key: tuple[str, ...], record: Any) -> None:
        if "test" in record:
            steered = key[1] == "steer"
            both = [0.0 if steered and i < 20 else 1.0 for i in range(1600)]
            one = [0.0 if steered and key[0] == "two" and i < 35 else 1.0 for i in range(1600)]
            record["test"]["guardrails"] = {"both": both, "one": one}

    claim = next(c for c in claims(changed(evidence(), lose)) if c["id"] == "guardrails")
    assert not claim["holds"]
    assert "one" in claim["statement"]


def test_what_was_not_measured_is_no_claim() -> None:
    def no_sides(key: tuple[str, ...], record: Any) -> None:
        if "test" in record:
            record["test"]["sampled"]["on_side"] = None

    def never_on_side(key: tuple[str, ...], record: Any) -> None:
        if "test" in record and key[1] == "base":
            record["test"]["sampled"]["on_side"] = [0.0] * 300

    assert "manner-math" in held(evidence())
    assert "manner-math" not in held(changed(evidence(), no_sides))
    assert "manner-math" not in held(changed(evidence(), never_on_side))


def test_a_model_whose_knobs_were_all_refused_is_left_out_and_named() -> None:
    def refuse(key: tuple[str, ...], record: Any) -> None:
        if key[0] == "two" and key[1] == "steer":
            record.pop("controls", None)
            record["refused"] = "no setting keeps the budget"

    found = {c["id"]: c for c in claims(changed(evidence(), refuse))}
    assert "not measured on two" in found["reversed-math"]["statement"]
    assert found["reversed-math"]["by_model"].keys() == {"one"}
    assert "controls" in found

    def refuse_all(key: tuple[str, ...], record: Any) -> None:
        record.pop("controls", None)

    assert "reversed-math" not in held(changed(evidence(), refuse_all))


def test_every_claim_names_what_it_rests_on() -> None:
    found = claims(evidence())
    assert len({claim["id"] for claim in found}) == len(found)
    for claim in found:
        keys = {field.name for field in fields(Claim)}
        assert set(claim) == keys
        assert claim["low"] <= claim["measured"] <= claim["high"]
        assert claim["n"] > 0
    assert json.loads(json.dumps(found)) == found


# --- reports --------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_says_in_a_sentence_what_came_out() -> None:
    report = build(evidence(), quick=False, seconds=1.0)
    page = html(report, sections(report), NOTES)
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert "<script" not in page
    assert page.index("<svg") < page.index("<table")  # the figure before the table
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in re.findall(r"(?:url\(#|xlink:href=\"#)([^\")]+)", page):
        assert used in ids
    assert report["summary"] in page.replace("&#x27;", "'")
    assert re.search(r"On math, 100 pairs steer the model from \d+\.\d to \d+\.\d percent right", report["summary"])
    assert html(report, sections(report), NOTES) == page
    text = markdown(report, sections(report), NOTES)
    assert all(line.count("|") == text.split("\n")[6].count("|") for line in text.split("\n")[6:9])
    assert "McNemar" in text


def test_a_report_of_one_model_is_drawn_as_well() -> None:
    report = build(evidence(models=("one",)), quick=True, seconds=1.0)
    assert "<svg" in html(report, sections(report), NOTES)


# --- data -----------------------------------------------------------------------------------------------------------


def test_a_files_pairs_are_never_on_two_sides(tmp_path: Path) -> None:
    write_all(tmp_path)
    data = Data(tmp_path, 0)
    train = data.training_pairs("math_pairs.jsonl", 24, seed=0)
    validation, test = (data.held_out_pairs("math_pairs.jsonl", split, 100) for split in ("validation", "test"))
    assert (len(train), len(validation), len(test)) == (24, 8, 8)
    prompts = [set(part.prompt_hashes()) for part in (train, validation, test)]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    few = [data.training_pairs("math_pairs.jsonl", 10, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    whole = {split: data.questions("gsm8k:gsm8k.jsonl", split, 100) for split in ("validation", "test")}  # pyright: ignore[reportArgumentType]
    assert not set(whole["validation"].prompts) & set(whole["test"].prompts)
    with pytest.raises(UnknownName, match="Did you mean 'gsm8k'"):
        data.questions("gsm8:gsm8k.jsonl", "test", 3)


def test_test_questions_that_pairs_ask_too_are_counted(tmp_path: Path) -> None:
    write_all(tmp_path)
    task = load_benchmark("gsm8k", tmp_path / "gsm8k.jsonl")
    asked = [str(prompt).partition("\n")[0] for prompt in task.prompts[:3]]
    pairs = Pairs.from_records([{"prompt": f"Question: {q}\nAnswer:", "chosen": "a", "rejected": "b"} for q in asked])
    assert overlap(pairs, task) == 3
    assert overlap(Pairs.load(tmp_path / "math_pairs.jsonl"), task) == 0


def test_an_instruction_that_all_questions_share_is_no_question() -> None:
    told = "Complete this Python function, and give the whole of it.\n\n"
    prompts = tuple(f"{told}def f{i}(x):\n    ...\n" for i in range(3))
    task = Task("code", prompts, lambda answers: [0.0] * len(answers))

    def pairs(*prompts: str) -> Pairs:
        return Pairs.from_records([{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts])

    assert overlap(pairs(f"{told}def g(y):\n    ...\n", told), task) == 0
    assert overlap(pairs(f"{told}def f1(x):\n    ...\n"), task) == 1
    assert overlap(pairs("def f1(x): ..."), replace(task, prompts=("def f1(x):\n    ...", "What is 2 + 2?"))) == 1


# --- the whole protocol ----------------------------------------------------------------------------------------------


def random_model(folder: Path, architecture: str) -> Path:
    """A random twin of an architecture, with a tokenizer that knows every character, as a folder."""
    lm = twin(default_config(architecture), max_position_embeddings=4096)
    lm.to(torch.float32).save_pretrained(folder)
    words = tokenizer(units="bytes")
    words.model_max_length = 4096
    words.save_pretrained(folder)
    return folder


SMALL = """
title = "Small"
models = ["unused"]
guardrails = ["mmlu:mmlu.zip"]
gains = [0.5, 50.0]
curve = [-0.5, 0.5]
shots = [1]
budget = 1.0

[domains.math]
pairs = "math_pairs.jsonl"
task = "gsm8k:gsm8k.jsonl"

[steering.palrs]
title = "PaLRS"
positions = ["post_instruction"]
where = ["prompt"]

[steering.shuffled]
title = "shuffled pairs"
shuffled = true
control = true

[training.dpo]
title = "DPO"
loss = "dpo"
learning_rates = [1e-3]
betas = [0.1]

[thresholds]
gain = 0.05
"""


def small_recipe(folder: Path) -> Path:
    """A recipe with one domain and few ways, at the quick sizes of the recipes for real models."""
    quick = (Path(cells.__file__).parent / "recipes/palrs-llama3.toml").read_text().partition("[quick]")[2]
    (folder / "small.toml").write_text(f"{SMALL}\n[quick]{quick}")
    return folder / "small.toml"


def test_the_protocol_runs_on_a_random_model_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_all(tmp_path / "data"), tmp_path / "out"
    recipe, folder = small_recipe(tmp_path), random_model(tmp_path / "model", "llama")
    words = ["reproduce", "palrs", str(folder), "--recipe", str(recipe), "--data", str(data), "--out", str(out)]
    words += ["--quick", "--workers", "1", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["quick"]
    assert "its figures mean nothing" in report["summary"]
    for name in ("report.md", "report.html"):
        assert (out / name).stat().st_size > 1000
    rows = {row["system"]: row for row in report["tables"][str(folder)]["math"]}
    assert set(rows) == {
        "bare model",
        "PaLRS",
        "shuffled pairs",
        "examples before the question",
        "DPO, 8 pairs",
        "DPO, 12 pairs",
    }
    assert rows["PaLRS"]["learn_seconds"] > 0
    # Once more: nothing is computed anew.
    monkeypatch.setattr(cells, "steered", None)
    monkeypatch.setattr(cells, "trained", None)
    monkeypatch.setattr(cells, "base", None)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["claims"] == report["claims"]
    # Another recipe in the same folder is another run.
    recipe.write_text(recipe.read_text().replace("gain = 0.05", "gain = 0.9"))
    assert main(words) == 2
    assert "holds another job: recipe: thresholds: gain (0.05 there, 0.9 here)" in capsys.readouterr().err


def test_files_of_others_and_too_few_pairs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    data, folder = write_all(tmp_path / "data"), random_model(tmp_path / "model", "llama")
    recipe = load_recipe(small_recipe(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="holds other files, 'notes"):
        reproduce(recipe, out=tmp_path / "theirs", data=data, models=(str(folder),), quick=True)
    with pytest.raises(OptionError, match=r"learns from 1000 pairs of 'math_pairs\.jsonl', and the file leaves 24"):
        reproduce(recipe, out=tmp_path / "new", data=data, models=(str(folder),))
    wrong = replace(recipe, guardrails=("prefworld:nosuch",))
    with pytest.raises(UnknownName, match="nosuch"):
        reproduce(wrong, out=tmp_path / "new", data=data, models=(str(folder),), quick=True)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new").exists()


def test_a_missing_file_and_a_wrong_paper_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_model(tmp_path / "model", "llama")
    assert main(["reproduce", "palrs", str(folder), "--recipe", "palrs-llama3", "--out", str(tmp_path / "out")]) == 2
    assert "Name its folder by --data" in capsys.readouterr().err
    assert main(["reproduce", "palr"]) == 2
    assert "Did you mean 'palrs'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "palrs", "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    with pytest.raises(OptionError, match="named twice"):
        reproduce(load_recipe("palrs"), out=tmp_path / "o", models=("a", "a"))
    with pytest.raises(OptionError, match="workers counts from 1"):
        reproduce(load_recipe("palrs"), out=tmp_path / "o", workers=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "architecture"),
    [("palrs-llama3", "llama"), ("palrs-mistral", "mistral"), ("palrs-olmo", "olmo2"), ("palrs-qwen", "qwen3")],
)
def test_every_recipe_for_real_models_runs_on_a_random_twin(recipe: str, architecture: str, tmp_path: Path) -> None:
    data, folder = write_all(tmp_path / "data"), random_model(tmp_path / architecture, architecture)
    loaded: Recipe = load_recipe(recipe)
    report = reproduce(loaded, out=tmp_path / "out", data=data, models=(str(folder),), quick=True, workers=1)
    assert set(report["tables"][str(folder)]) == {"math", "code"}
    assert (tmp_path / "out/report.html").exists()
