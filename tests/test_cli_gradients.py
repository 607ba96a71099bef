"""`trimtab learn` from gradients: every method, its options, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pico
from trimtab.artifact import DeltaKnob, Knob, LookaheadKnob, load_knob
from trimtab.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pico.model().save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and pairs in files."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(saved)
    rows = [
        {"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "options": ["yes", "no"], "shares": [0.8, 0.2]}
        for i in range(6)
    ]
    for name, some in (("pairs", rows), ("held", [row | {"prompt": f"h{i}"} for i, row in enumerate(rows[:3])])):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return tmp_path


def learn(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["learn", "model", "pairs.jsonl", "--out", "k.safetensors", *words.split()])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(
    ("words", "kind", "wanted"),
    [
        ("--method cold-kernel --loss sft --selection first_order", Knob, {"method": "cold-kernel"}),
        ("--method cold-kernel --option kernel=softmax", Knob, {"operation": "kernel"}),
        ("--method cold-kernel --loss distribution --positions all_prompt", Knob, {"method": "cold-kernel"}),
        ("--method icv", Knob, {"method": "icv"}),
        ("--method cold-fd --rank 2 --layers 0,1 --where completion", LookaheadKnob, {"where": "completion"}),
        ("--method cold-fd --backend scaled --per-token", LookaheadKnob, {"step": None, "per_token": True}),
        ("--method one-step --rank 3 --loss simpo:beta=1 --seed 1", DeltaKnob, {"method": "one-step"}),
        ("--method bipo --layers 1 --epochs 2 --betas 0.2 --validation held.jsonl", Knob, {"method": "bipo"}),
    ],
)
def test_every_method_writes_a_knob_that_the_other_verbs_take(
    words: str, kind: type, wanted: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = learn(f"{words} --json --name mine --licence CC0", capsys)
    assert status == 0, err
    record = json.loads(out)
    assert record["knob"] == "mine"
    knob = load_knob(folder / "k.safetensors")
    assert isinstance(knob, kind)
    assert knob.provenance["licence"] == "CC0"
    for name, value in wanted.items():
        assert getattr(knob, name) == value
    assert main(["inspect", "k.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == knob.kind
    assert main(["inspect", "k.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert ("cos_r_mu" in shown) == ("icv" in words)  # which compares two answers, where a gradient is one
    assert ("top5_share" in shown) == any(method in words for method in ("icv", "cold-kernel"))
    assert main(["eval", "model", "--knob", "k.safetensors", "--pairs", "held.jsonl"]) == 0
    assert "model" in capsys.readouterr().out
    assert main(["generate", "model", "q", "--knob", "k.safetensors", "--strength", "1", "--max-new-tokens", "2"]) == 0


def test_the_text_says_what_strength_one_is_and_what_to_do_next(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, said in (
        ("cold-fd", "the mean displacement"),
        ("one-step", "a hundredth of the length of the weights"),
        ("bipo --epochs 2", "in multiples of the mean residual norm"),
    ):
        status, out, err = learn(f"--method {method}", capsys)
        assert status == 0, err
        assert said in out
        assert "trimtab tune model --knob k.safetensors" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method cold-fd --epochs 2", "--epochs is of other methods than cold-fd. Leave it out."),
        ("--method cold-fd --scale raw", "--scale is of other methods than cold-fd. Leave it out."),
        ("--method one-step --layers 1", "--layers is of other methods than one-step"),
        ("--method bipo --loss dpo", "--loss is of other methods than bipo"),
        ("--method bipo --betas 0.1,0.2", "--betas takes one number for bipo; got 2."),
        ("--method palrs --backend scaled", "--backend is for methods that take a step"),
        ("--method palrs --loss dpo", "A loss is of methods whose evidence is gradients; got loss='dpo' for palrs."),
        ("--method cold-fd --loss dop", "Unknown loss 'dop'. Known: distribution, dpo, negative-sft, sft, simpo."),
        ("--method cold-fd --step 1", "A step is of backend='scaled'; got 1.0 for the exact one"),
        ("--method cold-fd --rank 0", "rank counts from 1; got 0."),
        ("--method cold-kernel --option kernel=wat", "Unknown kernel 'wat'"),
        ("--method cold-fb", "Did you mean 'cold-fd'?"),
        ("--method preference-vector --rank 2", "--rank is for other methods"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = learn(words, capsys)
    assert status != 0
    assert said in err
    assert "Traceback" not in err
    assert not (folder / "k.safetensors").exists()


def test_a_stopped_job_goes_on_from_its_gradient(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = learn("--method cold-fd --checkpoint kept --json", capsys)
    assert status == 0, err
    assert not (folder / "kept").exists()
