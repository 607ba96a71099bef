"""Weight knobs that are learned by training: what they hold, what they undo, and how they go on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pico import model, tokenizer
from trimtab import learn, learn_weights
from trimtab.artifact import DeltaKnob, LowRank
from trimtab.cli import main
from trimtab.errors import OptionError, PairsError, TrainError, UnknownName
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import Task
from trimtab.generate import generate
from trimtab.pairs import Pairs
from trimtab.runtime import steer
from trimtab.train import train
from trimtab.train import vectors as vectors_module
from trimtab.tune import WEIGHT_GAINS, tune
from trimtab.weights.live import applied

pytest.importorskip("trl", reason="training needs the train extra")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAIRS = Pairs.from_records([{"prompt": f"Ask {i}?", "chosen": "yes", "rejected": "no"} for i in range(6)])
HELD = Pairs.from_records([{"prompt": f"Held {i}?", "chosen": "yes", "rejected": "no"} for i in range(3)])
FAST: dict[str, Any] = {
    "validation": HELD,
    "learning_rates": (3e-3,),
    "epochs": 3,
    "batch_size": 2,
    "lora_rank": 2,
}


def made(pairs: Pairs = PAIRS, **options: Any) -> DeltaKnob:
    return learn_weights(model(), tokenizer(), pairs, **FAST | options)


def logits(lm: Any, ids: torch.Tensor = torch.tensor([[1, 2, 3, 4]])) -> torch.Tensor:  # noqa: B008
    with torch.no_grad():
        return lm(ids).logits


@pytest.mark.parametrize("rank", [2, None], ids=["adapter", "all weights"])
def test_a_preference_vector_moves_the_margin_both_ways_and_at_zero_not_at_all(rank: int | None) -> None:
    lm, words = model(), tokenizer()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    knob = learn_weights(lm, words, PAIRS, **FAST | {"lora_rank": rank})
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    minus, zero, plus = (float(m.margin.mean()) for m in pair_margins(lm, words, HELD, [{knob: s} for s in (-1, 0, 1)]))
    assert minus < zero < plus
    assert knob.low_rank == (rank is not None)
    assert {p["rank"] for p in knob.described()} == ({4} if rank else {None})
    assert knob.diagnostics["cosine_plus_minus"] < 0
    assert set(knob.diagnostics["training"]) == {"plus", "minus"}


def test_anchors_keep_margins_where_they_are_while_the_pairs_move() -> None:
    lm, words = model(), tokenizer()
    still = Pairs.from_records([{"prompt": f"{i} is blue. Go", "chosen": "yes", "rejected": "no"} for i in range(6)])
    before = pair_margins(lm, words, still, [{}])[0].margin
    moved: dict[str, float] = {}
    for name, anchors in (("free", None), ("anchored", still), ("turned", still.swapped())):
        knob = learn_weights(lm, words, PAIRS, **FAST | {"anchors": anchors, "epochs": 20, "patience": 50})
        own, other = (pair_margins(lm, words, pairs, [{knob: 1}])[0].margin for pairs in (HELD, still))
        moved[name] = float(abs(other - before).mean())
        assert float(own.mean()) > float(pair_margins(lm, words, HELD, [{}])[0].margin.mean()) + 0.5
    assert moved["anchored"] < moved["free"] / 2
    assert moved["turned"] < moved["free"] / 2  # which answer is chosen plays no part
    with pytest.raises(PairsError, match="3 of 3 anchors ask what pairs ask too"):
        made(anchors=Pairs([*PAIRS[:2], HELD[0]]))
    with pytest.raises(PairsError, match="6 of 12 anchors are given twice"):
        made(anchors=still + still)
    for wrong in (Pairs(()), "prefworld:legal"):
        with pytest.raises(PairsError, match="Anchors are Pairs, and at least one"):
            made(anchors=wrong)


def test_an_anchor_is_not_held_out_nor_counted_as_preferred() -> None:
    still = Pairs.from_records([{"prompt": f"{i} is blue. Go", "chosen": "yes", "rejected": "no"} for i in range(6)])
    knob = made(anchors=still, validation=None, epochs=1)
    record = knob.diagnostics["training"]["plus"]
    assert record["validation"]["count"] == 2  # three tenths of six, none of the anchors' twelve
    assert record["pairs"]["count"] == 4 + 12
    assert knob.provenance["pairs_count"] == 6
    assert knob.provenance["options"]["anchors"]["count"] == 6
    assert f"6, sha256 {still.hash()}" in knob.card()


def test_the_vector_is_theta_plus_minus_theta_minus() -> None:
    lm, words = model(), tokenizer()
    knob = made()
    settings: dict[str, Any] = {k: v for k, v in FAST.items() if k != "validation"} | {"betas": (0.1,)}
    plus = train(lm, words, PAIRS, validation=HELD, **settings).model.state_dict()
    minus = train(lm, words, PAIRS.swapped(), validation=HELD.swapped(), **settings).model.state_dict()
    for name in plus:
        wanted = plus[name] - minus[name]
        found = knob.dense(name) if name in knob.parts else torch.zeros_like(wanted)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_swapped_pairs_turn_the_vector_round_and_swapping_twice_gives_it_back() -> None:
    knob, turned, again = made(), made(PAIRS.swapped(), validation=HELD.swapped()), made(PAIRS.swapped().swapped())
    for name in knob.parts:
        torch.testing.assert_close(turned.dense(name), -knob.dense(name), atol=1e-6, rtol=0)
        assert torch.equal(again.dense(name), knob.dense(name))


def test_an_alignment_vector_at_strength_one_is_the_trained_model() -> None:
    lm, words = model(), tokenizer()
    knob = learn_weights(lm, words, PAIRS, method="alignment-vector", **FAST)
    settings: dict[str, Any] = {k: v for k, v in FAST.items() if k != "validation"} | {"betas": (0.1,)}
    aligned = logits(train(lm, words, PAIRS, validation=HELD, **settings).model)
    with steer(lm, {knob: 1.0}):
        torch.testing.assert_close(logits(lm), aligned, atol=1e-4, rtol=1e-4)
    with applied(lm, {knob: 1.0}):
        torch.testing.assert_close(logits(lm), aligned, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(lm), aligned, atol=1e-3)


@pytest.mark.parametrize(("most", "steps"), [(1, 1), (2, 2), (100, 9)])
def test_few_step_lora_ends_after_so_many_steps(most: int, steps: int) -> None:
    knob = learn_weights(model(), tokenizer(), PAIRS, method="alignment-vector", max_steps=most, **FAST)
    (row,) = knob.diagnostics["training"]["plus"]["table"]
    assert row["steps"] == steps
    assert row["evaluated_at"][-1] == steps
    assert knob.provenance["options"]["max_steps"] == most
    with pytest.raises(OptionError, match="max_steps counts from 1; got 0"):
        learn_weights(model(), tokenizer(), PAIRS, max_steps=0, **FAST)


def test_all_weights_of_a_16_bit_model_are_subtracted_before_rounding() -> None:
    lm = model().to(torch.bfloat16)
    knob = learn_weights(lm, tokenizer(), PAIRS, **FAST | {"lora_rank": None, "learning_rates": (1e-5,)})
    steps = torch.cat([knob.dense(name).flatten() for name in knob.parts])
    assert 0 < float(steps.abs().max()) < 1e-3  # far below what bfloat16 can tell around weights of about 0.02 to 1
    assert float((steps == 0).float().mean()) < 0.5
    stored = learn_weights(
        lm, tokenizer(), PAIRS, **FAST | {"lora_rank": None, "learning_rates": (1e-5,), "dtype": "bfloat16"}
    )
    for name, part in stored.parts.items():
        assert isinstance(part, torch.Tensor)
        assert torch.equal(part, knob.dense(name).bfloat16())


def test_a_killed_job_goes_on_and_gives_the_same_knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = made(learning_rates=(1e-3, 3e-3))
    real, calls = vectors_module.train, list[int]()

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(vectors_module, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        made(learning_rates=(1e-3, 3e-3), checkpoint=tmp_path / "kept")
    told: list[tuple[int, int]] = []
    found = made(
        learning_rates=(1e-3, 3e-3),
        checkpoint=tmp_path / "kept",
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(calls) == 3  # theta+ was kept
    for name in wanted.parts:
        assert torch.equal(found.dense(name), wanted.dense(name))
    assert found.diagnostics["training"]["plus"]["chosen"] == wanted.diagnostics["training"]["plus"]["chosen"]
    again = made(learning_rates=(1e-3, 3e-3), checkpoint=tmp_path / "kept")
    assert len(calls) == 3
    assert again.diagnostics["training"] == found.diagnostics["training"]
    with pytest.raises(OptionError, match="holds another job"):
        made(seed=1, checkpoint=tmp_path / "kept")


def test_a_knob_remembers_how_it_was_trained_and_progress_counts_settings(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    knob = learn_weights(
        model(),
        tokenizer(),
        PAIRS,
        method="preference-vector",
        name="yes",
        validation=HELD,
        lora_rank=2,
        learning_rates=(1e-3, 3e-3),
        betas=(0.1, 0.3),
        epochs=2,
        patience=1,
        batch_size=3,
        seed=5,
        dtype="float16",
        licence="CC0-1.0",
        checkpoint=tmp_path / "kept",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(number, 5) for number in range(1, 6)]
    assert knob.name == "yes"
    known = knob.provenance
    assert known["licence"] == "CC0-1.0"
    assert known["pairs_hash"] == PAIRS.hash()
    wanted: dict[str, Any] = {"lora_rank": 2, "learning_rates": [1e-3, 3e-3], "betas": [0.1, 0.3], "epochs": 2}
    wanted |= {"max_steps": None, "patience": 1, "batch_size": 3, "seed": 5, "dtype": "float16"}
    assert known["options"] == wanted
    sides = knob.diagnostics["training"]
    assert len(sides["plus"]["table"]) == 4
    assert len(sides["minus"]["table"]) == 1
    assert sides["minus"]["chosen"] == sides["plus"]["chosen"]
    assert {part.a.dtype for part in knob.parts.values() if isinstance(part, LowRank)} == {torch.float16}


def test_rows_of_one_batch_have_strengths_of_their_own() -> None:
    lm, knob = model(), made()
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    with torch.no_grad(), steer(lm, [{knob: 1.0}, {knob: -2.0}]):
        both = lm(ids).logits
    for row, strength in enumerate((1.0, -2.0)):
        with steer(lm, {knob: strength}):
            torch.testing.assert_close(both[row], logits(lm)[0], atol=1e-4, rtol=1e-4)


def test_dense_knobs_are_turned_one_setting_after_another() -> None:
    lm, words = model(), tokenizer()
    knob = made(lora_rank=None)
    prompts = ["Hi", "Hello there", "Hi"]
    settings: list[dict[Any, float]] = [{knob: 30.0}, {}, {knob: -30.0}]
    together = generate(lm, words, prompts, knobs=settings, max_new_tokens=8)
    alone = [generate(lm, words, [p], knobs=s, max_new_tokens=8)[0] for p, s in zip(prompts, settings, strict=True)]
    assert [g.text for g in together] == [g.text for g in alone]
    assert len({g.text for g in together}) > 1


def test_what_cannot_be_trained_says_so() -> None:
    with pytest.raises(UnknownName, match="preference-vector"):
        made(method="preference")
    with pytest.raises(UnknownName, match="bfloat16"):
        made(dtype="float8")
    with pytest.raises(PairsError, match=r"Pass Pairs\.from_records"):
        learn_weights(model(), tokenizer(), [], **FAST)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="lora_rank counts from 1"):
        made(lora_rank=0)
    with pytest.raises(OptionError, match=r"trimtab\.learn_weights"):
        learn(model(), tokenizer(), PAIRS, method="preference-vector")
    with pytest.warns(match="Training changed nothing"), pytest.raises(TrainError, match="changed no weight"):
        made(learning_rates=(1e-60,), lora_rank=None, method="alignment-vector")


@pytest.mark.parametrize("rank", [2, None], ids=["adapter", "all weights"])
def test_tuning_chooses_the_gain_of_weights_and_keeps_the_guardrails(rank: int | None) -> None:
    lm, words = model(), tokenizer()
    knob = made(lora_rank=rank)
    held = Pairs.from_records([{"prompt": f"Other {i}?", "chosen": "yes", "rejected": "no"} for i in range(3)])
    base = generate(lm, words, ["Hi"], max_new_tokens=4)[0].text
    # The answer is another one once the weights have gone far.
    rail = Task("same", ("Hi",) * 4, lambda answers: [float(said == base) for said in answers], max_new_tokens=4)
    options: dict[str, Any] = {"broken_budget": 1.0, "strengths": (0.5, 1.0, 2.0), "guardrails": [rail]}
    free = tune(knob, lm, words, held, gains=(0.5, 1.0), budget=1.0, **options)
    assert free.gain == 1.0  # the margin decides
    held_back = tune(knob, lm, words, held, gains=(1e-4, 40.0), budget=0.0, **options)
    assert held_back.gain == 1e-4
    assert held_back.tuning is not None
    assert [row["within_budget"] for row in held_back.tuning["table"]] == [True, False]
    assert held_back.safe_range == (0.0, 2.0)
    with pytest.raises(OptionError, match="leave where out"):
        tune(knob, lm, words, held, where="prompt")


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    lm, words = model(), tokenizer()
    lm.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    PAIRS.save(tmp_path / "pairs.jsonl")
    HELD.save(tmp_path / "held.jsonl")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status = main([*words, "--json"])
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out)


def test_the_verb_trains_a_knob_that_the_other_verbs_take(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = str(files / "base"), str(files / "yes.knob.safetensors")
    fast = "--learning-rates 3e-3 --epochs 2 --batch-size 2 --lora-rank 2".split()
    learned = said(
        capsys,
        *("learn", base, str(files / "pairs.jsonl"), "--method", "preference-vector", "--out", out),
        *("--validation", str(files / "held.jsonl"), "--checkpoint", str(files / "kept"), *fast),
    )
    assert learned["kind"] == "delta"
    assert learned["training"]["plus"]["validation"]["count"] == 3
    assert not (files / "kept").exists()
    assert said(capsys, "inspect", out)["provenance"]["paper"] == "arXiv:2504.20106"
    tuned = str(files / "tuned.knob.safetensors")
    chosen = said(
        capsys,
        "tune",
        base,
        "--knob",
        out,
        "--pairs",
        str(files / "held.jsonl"),
        "--out",
        tuned,
        "--broken-budget",
        "1",
    )
    assert chosen["site"] is None
    assert chosen["gain"] in WEIGHT_GAINS
    assert main(["inspect", tuned]) == 0
    assert "dose-response" in capsys.readouterr().out
    answers = said(capsys, "generate", base, "Hi", "--knob", out, "--strength", "1", "--max-new-tokens", "3")
    assert answers


def test_the_verb_subtracts_weights_that_were_trained_elsewhere(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model()
    with torch.no_grad():
        weight = other.model.layers[0].mlp.up_proj.weight
        weight += 0.5
    other.save_pretrained(files / "other")
    out = files / "av.knob.safetensors"
    found = said(
        capsys,
        *("learn", str(files / "base"), "--method", "alignment-vector", "--plus", str(files / "other")),
        *("--out", str(out), "--gain", "1.3"),
    )
    assert [part["name"] for part in found["weights"]] == ["model.layers.0.mlp.up_proj.weight"]
    knob = DeltaKnob.load(out)
    assert knob.gain == 1.3
    torch.testing.assert_close(knob.dense("model.layers.0.mlp.up_proj.weight"), torch.full_like(weight, 0.5))
    knob.check(model(), tokenizer())
    assert not any(isinstance(part, LowRank) for part in knob.parts.values())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--method preference-vector", "Pass either PAIRS"),
        ("PAIRS --method preference-vector --plus base", "Pass either PAIRS"),
        ("PAIRS --method preference-vector --site 1/last", "--site is for other methods"),
        ("PAIRS --method preference-vector --option a=1", "--option is for other methods"),
        ("PAIRS --lora-rank 3", "--lora-rank is for methods that train"),
        ("PAIRS --method palrs --plus base", "--plus is for methods that train"),
        ("PAIRS --method alignment-vector --minus base", "--minus is for a difference of given weights"),
        ("--method alignment-vector --plus base --epochs 2", "--epochs is for training"),
        ("--method preference-vector --plus base", "pass --minus too"),
        ("--method alignment-vector --plus nowhere", "--plus takes a folder"),
        ("--method alignment-vector --plus base", "the same weights"),
        ("PAIRS --method alignment-vector --all-weights --lora-rank 2", "Pass one of the two"),
        ("PAIRS --method alignment-vector --gain -1", "--gain is a positive number"),
        ("PAIRS --method preference-vektor", "preference-vector"),
        ("", "Pass the pairs"),
    ],
)
def test_the_verb_says_which_options_do_not_go_together(
    words: str, wanted: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    status = main(["learn", "base", *words.replace("PAIRS", "pairs.jsonl").split(), "--out", "k.safetensors"])
    assert status == 2
    assert wanted in capsys.readouterr().err
    assert not Path("k.safetensors").exists()
