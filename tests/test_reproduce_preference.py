"""Reproducing Preference Vectors: recipes, rates, claims on invented records, and the whole on a random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pico import tokenizer
from trimtab.check import default_config, twin
from trimtab.cli import main
from trimtab.errors import OptionError, TrainError, TrimtabError
from trimtab.reproduce.document import html, markdown
from trimtab.reproduce.preference import (
    choose_rate,
    choose_rates,
    first_steps,
    last_steps,
    load_recipe,
    reproduce,
    second_steps,
)
from trimtab.reproduce.preference_cells import PreferenceBench
from trimtab.reproduce.preference_claims import Found, claims
from trimtab.reproduce.preference_recipe import Recipe, Sizes
from trimtab.reproduce.preference_report import NOTES, build, sections
from trimtab.reproduce.preference_systems import flipped_names, plus_names, systems, trained_names
from trimtab.reproduce.recipe import Domain
from trimtab.reproduce.steps import Key

pytest.importorskip("trl", reason="reproducing needs the train extra")

RECIPE = load_recipe("preference-vector")

# --- recipes and steps ----------------------------------------------------------------------------------------------


def test_the_recipe_asks_for_what_the_paper_does() -> None:
    assert RECIPE.grid == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert min(RECIPE.scales) == 0
    assert max(RECIPE.scales) == 4
    assert len(RECIPE.preferences) == 4
    assert RECIPE.two == ("helpful", "harmless")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("grid = [-1, 1]", "grid rises, and has"),
        ("scales = [1, 0]", "scales rises, and has"),
        ("guardrails = []", "name one at least"),
        ("kls = [0.03, 0]", "kls are positive numbers"),
        ("kls = [0.1]", "thresholds.kl is one of kls"),
        ("composed = [1]", "composed rises, and has"),
        ("thresholds = { gain = -1 }", "thresholds.gain is finite"),
        ("strenghts = [1]", "strenghts"),
        ("sizes = { seeds = 0 }", "seeds counts from 1"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(tmp_path: Path, line: str, said: str) -> None:
    rails = "" if line.startswith("guardrails") else 'guardrails = ["prefworld:facts"]\n'
    one = '[preferences.NAME]\npairs = "prefworld:NAME"\ntask = "prefworld:NAME"\n'
    both = one.replace("NAME", "helpful") + one.replace("NAME", "harmless")
    (tmp_path / "own.toml").write_text(f'title = "Own"\nmodels = ["prefworld"]\n{rails}{line}\n{both}')
    with pytest.raises(TrimtabError, match=said):
        load_recipe(tmp_path / "own.toml")


def test_a_recipe_of_one_preference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('title = "Own"\nmodels = ["prefworld"]\n')
    with pytest.raises(OptionError, match="two preferences at least"):
        load_recipe(tmp_path / "own.toml")


def test_a_preference_that_is_called_as_a_baseline_is_refused(tmp_path: Path) -> None:
    one = '[preferences.NAME]\npairs = "prefworld:math"\ntask = "prefworld:math"\n'
    text = 'title = "Own"\nmodels = ["prefworld"]\nguardrails = ["prefworld:facts"]\n'
    (tmp_path / "own.toml").write_text(text + one.replace("NAME", "helpful") + one.replace("NAME", "bfpo"))
    with pytest.raises(OptionError, match="cannot be called 'bfpo'"):
        load_recipe(tmp_path / "own.toml")


def test_a_source_that_is_not_there_is_an_error_before_any_model_is_loaded(tmp_path: Path) -> None:
    two = dict(list(RECIPE.preferences.items())[:2])
    wrong = replace(RECIPE, preferences=two | {"third": Domain("prefworld:math", "prefworld:maths")})
    with pytest.raises(TrimtabError, match="Did you mean 'math'"):
        reproduce(wrong, out=tmp_path, models=["missing"])


def test_rates_are_chosen_among_those_that_keep_the_budget() -> None:
    tried = {
        1e-5: {"score": 0.5, "drop": 0.0},
        1e-4: {"score": 0.8, "drop": 0.02},
        3e-5: {"score": 0.8, "drop": 0.01},
        1e-3: {"score": 1.0, "drop": 0.5},
    }
    assert choose_rate(tried, 0.02) == 3e-5  # the smaller of two that are equal
    assert choose_rate({rate: tried[rate] for rate in (1e-3, 1e-4)}, 0.0) == 1e-4  # none keeps it: the mildest

    refused: dict[float, dict[str, Any]] = {3e-5: {"refused": "no answer had a reward"}}
    assert choose_rate(refused | {1e-4: {"score": 0.1, "drop": 0.9}}, 0.02) == 1e-4  # what was not trained never wins
    assert choose_rate(refused, 0.02) is None


def all_rates() -> dict[str, dict[str, float | None]]:
    every = [*trained_names(RECIPE), *plus_names(RECIPE), *flipped_names(RECIPE)]
    return {"m": dict.fromkeys(every, 3e-5)}


def test_a_preference_that_no_rate_trains_ends_the_run_with_its_reason() -> None:
    done: dict[Key, Any] = {key: {"refused": "too few pairs"} for key, _ in first_steps(RECIPE, ["m"])}
    with pytest.raises(TrainError, match="helpful could not be trained at any rate: too few pairs"):
        choose_rates(RECIPE, ["m"], done)


def test_every_training_comes_before_what_is_measured_of_it() -> None:
    rates = all_rates()
    early = [key for key, _ in first_steps(RECIPE, ["m"])]
    assert len(early) == len(set(early)) == 7 * 3 + 2 * 2 + 4
    second = [key for key, _ in second_steps(RECIPE, replace(RECIPE.sizes, seeds=3), rates)]
    anew = [("m", "train", name, "3e-05", seed) for name in trained_names(RECIPE) for seed in "12"]
    flipped = [("m", "train", name, "3e-05", seed) for name in flipped_names(RECIPE) for seed in "012"]
    assert sorted(second) == sorted([*anew, *flipped])
    apart = {"m": rates["m"] | {"helpful plus": 1e-4, "bfpo": None}}
    keys = {key for key, _ in second_steps(RECIPE, RECIPE.sizes, apart)}
    assert {rate for _, _, name, rate, _ in keys if name == "helpful"} == {"3e-05", "0.0001"}
    assert not any(name == "bfpo" for _, _, name, _, _ in keys)
    last = [key for key, _ in last_steps(RECIPE, RECIPE.sizes, rates)]
    assert not {key[1] for key in last} & {"train", "steer"}
    assert {key[2] for key in last if key[1] == "test"} == set(systems(RECIPE))


# --- claims on records whose answers are known ----------------------------------------------------------------------

N = 40


def share(of: float) -> list[float]:
    return [1.0] * round(of * N) + [0.0] * (N - round(of * N))


def invented(*, fall: float = 0.0, flat: bool = False, lack: str = "", control: float = 0.0) -> dict[Key, Any]:
    """Records in which each knob moves its own preference by .2 per half step and the other by nothing."""
    names = list(RECIPE.preferences)

    def told(up: float, refused: float = 0.1, **others: float) -> dict[str, Any]:
        scores = {name: share(others.get(name, 0.4 + up)) for name in names}
        rails = {rail: share(0.9) for rail in ("facts", "copying")}
        record = {"scores": scores, "refused": share(refused), "broken": 0.0, "kl": 0.01}
        return {**record, "guardrails": rails, "ready_seconds": [0.1, 0.2], "knobs": 2}

    records: dict[Key, Any] = {}
    for name in trained_names(RECIPE):
        record = {"score": 0.9, "drop": 0.0, "kl": 0.0, "norm": 1.0, "cost": {"seconds": 9.0}}
        records["m", "train", name, "3e-05", "0"] = record
    for name in RECIPE.two:
        records["m", "plus", name, "3e-05", "0"] = {"score": 0.9, "drop": 0.1, "kl": 0.0, "norm": 1.0}
        records["m", "train", f"{name} flipped", "3e-05", "0"] = {"score": 0.4, "drop": 0.0, "norm": 1.0}
    for seed in "01":
        rows = {
            "helpful": [[share(0.4 + 0.3 * a) for _ in RECIPE.grid] for a in RECIPE.grid],
            "harmless": [[share(0.4 + 0.3 * b) for b in RECIPE.grid] for _ in RECIPE.grid],
        }
        if fall:
            rows["helpful"][3][2] = share(0.55 - fall)  # between .4 and .7
        if flat:
            rows["helpful"] = [[share(0.4) for _ in RECIPE.grid] for _ in RECIPE.grid]
        records["m", "grid", seed] = rows
        records["m", "scale", seed] = {
            f"{scale:g}": told(0.2) | {"guardrails": {"facts": share(0.9 if scale <= 1.5 else 0.2)}}
            for scale in RECIPE.scales
        }
        for what, up in (("vectors", 0.3), ("positive-only", 0.2), ("random", 0.0)):
            records["m", "compose", what, seed] = told(up) | {"chosen": {"helpful": 1.0, "harmless": 0.5}}
        for system in systems(RECIPE):
            up = (
                0.0
                if system == "base"
                else control
                if system in ("random", "flipped")
                else 0.2
                if system.startswith("preference")
                else 0.1
            )
            added = {name: 0.8 for name in names[2:] if system.endswith((f"+{name}", "+all"))}
            refused = 0.5 if system == "base" else 0.1
            records["m", "test", system, seed] = {"refused": "no"} if system == lack else told(up, refused, **added)
    for name in names:
        ways = {
            way: {
                "curve": [[1.0, 0.01, s]],
                "at": {f"{k:g}": {"strength": 1.0, "kl": 0.01, "scores": share(s)} for k in RECIPE.kls},
            }
            for way, s in (("weights", 0.8), ("activations", 0.5))
        }
        records["m", "equal", name] = ways
    square = np.eye(4).tolist()
    geometry = {"names": names, "cosines": square, "sign_conflicts": square, "norms": {}}
    records["m", "geometry"] = geometry | {"interference": 1.0, "interference_normed": 0.1}
    return records


def by_id(records: dict[Key, Any], recipe: Recipe = RECIPE) -> dict[str, dict[str, Any]]:
    made = claims(Found(recipe, Sizes(seeds=2), records, ["m"]), "command")
    assert len({claim["id"] for claim in made}) == len(made)
    return {claim["id"]: claim for claim in made}


def test_claims_say_what_the_records_hold() -> None:
    found = by_id(invented())
    assert found["up-helpful"]["measured"] == pytest.approx(0.3)
    assert found["down-harmless"]["measured"] == pytest.approx(-0.3)
    assert found["spares-harmless"]["measured"] == 0
    assert found["monotone-helpful"]["holds"]
    assert found["preference-vector-beats-bfpo"]["measured"] == pytest.approx(0.1)
    assert found["composed-beats-joint-dpo"]["measured"] == pytest.approx(0.2)
    assert found["composed-beats-composed positive-only"]["measured"] == pytest.approx(0.1)
    assert all(found[f"control-{control}"]["holds"] for control in ("random", "flipped", "composed random"))
    assert found["refusals-base"]["measured"] == pytest.approx(-0.4)
    assert found["adds-concise"]["measured"] == pytest.approx(0.2)
    assert found["seconds-sycophancy"]["holds"]
    assert found["weights-at-equal-kl-helpful"]["measured"] == pytest.approx(0.3)
    strict = replace(RECIPE, thresholds=replace(RECIPE.thresholds, gain=0.5, seconds=0.01))
    again = by_id(invented(), strict)
    assert not again["up-helpful"]["holds"]
    assert not by_id(invented(control=0.1))["control-flipped"]["holds"]
    assert not again["seconds-sycophancy"]["holds"]


def test_a_grid_rises_where_falls_are_few_and_within_their_intervals_and_the_ends_apart() -> None:
    small = by_id(invented(fall=0.025 * 7))["monotone-helpful"]  # .375 after .4: one question of forty
    assert small["measured"] == 1
    assert small["low"] == 0
    assert small["holds"]
    sure = by_id(invented(fall=0.5))["monotone-helpful"]
    assert sure["measured"] == sure["low"] == 1
    assert not sure["holds"]
    assert not by_id(invented(flat=True))["monotone-helpful"]["holds"]
    assert by_id(invented(fall=0.5))["monotone-harmless"]["measured"] == 0


def test_guardrails_hold_up_to_the_strength_that_breaks_one() -> None:
    assert Found(RECIPE, Sizes(seeds=2), invented(), ["m"]).usable("m") == 1.5


def test_the_report_is_drawn_and_a_baseline_that_could_not_be_trained_is_left_out() -> None:
    rates = all_rates()
    report = build(RECIPE, Sizes(seeds=2), invented(lack="bfpo"), rates, "trimtab reproduce")
    report |= {"quick": False, "seconds": 1.0, "steps_kept": 0}
    assert not any("bfpo" in claim["id"] for claim in report["claims"])
    assert json.loads(json.dumps(report))["selectivity"]["m"]["helpful"]["helpful"] == pytest.approx(0.3)
    page, text = html(report, sections(report), NOTES), markdown(report, sections(report), NOTES)
    assert page.count("<svg") == 4
    assert "No rate kept the guardrails' budget on validation for: helpful plus, harmless plus" in text
    assert "40.0 percent helpful" in report["summary"]
    assert "Safe-RLHF was not run" in text


# --- the whole ------------------------------------------------------------------------------------------------------

SMALL = """
title = "Small"
models = ["unused"]
guardrails = ["prefworld:facts"]
dtype = "float32"
grid = [-1, 0, 1]
scales = [0, 1]
composed = [0, 1]
strengths = [1]
alphas = [0.2]
kls = [1]
thresholds = { kl = 1 }

[preferences.helpful]
pairs = "prefworld:helpful"
task = "prefworld:helpful"

[preferences.harmless]
pairs = "prefworld:harmless"
task = "prefworld:harmless"

[training]
learning_rates = [1e-3]

[rewards]
learning_rates = [1e-3]
prompts = 8
held = 2

[quick]
seeds = 1
pairs = 4
validation = 2
validation_pairs = 2
guard = 2
test_guard = 2
test_pairs = 2
sampled = 2
epochs = 1
reward_steps = 1
max_new_tokens = 3
"""


def test_the_protocol_runs_on_a_random_model_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = twin(default_config("llama"), max_position_embeddings=4096)
    lm.float().save_pretrained(tmp_path / "model")
    words = tokenizer(units="bytes")
    words.model_max_length = 4096
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "small.toml").write_text(SMALL)
    out = tmp_path / "out"
    command = ["reproduce", "preference-vector", str(tmp_path / "model"), "--recipe", str(tmp_path / "small.toml")]
    command += ["--out", str(out), "--quick", "--workers", "1", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert "no figure counts" in report["summary"]
    rows = {row["system"]: row for row in report["systems"][str(tmp_path / "model")]}
    composed = {"composed", "composed positive-only", "composed random"}
    assert set(rows) == {*systems(load_recipe(tmp_path / "small.toml")), *composed}
    assert rows["preference-vector"]["kl"] > 0
    assert rows["dpo-safe-first"] == rows["joint-dpo"] | {"system": "dpo-safe-first"}  # the same pairs, on PrefWorld
    assert rows["reward-soup"] == {"system": "reward-soup", "missing": True}  # no answer got a reward
    monkeypatch.setattr(PreferenceBench, "train", None)
    monkeypatch.setattr(PreferenceBench, "test", None)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["claims"] == report["claims"]
    text = (tmp_path / "small.toml").read_text()
    (tmp_path / "small.toml").write_text(text.replace("{ kl = 1 }", "{ kl = 1, gain = 0.5 }"))
    assert main(command) == 2
    assert "thresholds: gain (0.02 there, 0.5 here)" in capsys.readouterr().err
