"""Training through TRL: our token ids, the papers' losses, early stopping, the grid, and a model left as it was."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pico import model, tokenizer
from trimtab.cli import main
from trimtab.cli.terminal import as_options
from trimtab.errors import MissingDependency, OptionError, PairsError, TrainError, TrimtabWarning, UnknownName
from trimtab.evals.likelihood import pair_margins, render_texts
from trimtab.generate import generate
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.train import GRIDS, train
from trimtab.train import loops as loops_module

pytest.importorskip("trl", reason="training needs the train extra")

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TURNS = [*QUESTION, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And now?"}]
RECORDS: list[dict[str, Any]] = [
    {"prompt": "One?", "chosen": "yes", "rejected": "no"},
    {"prompt": "Two, and longer?", "chosen": "yes indeed", "rejected": "n"},
    {"prompt": QUESTION, "chosen": [{"role": "assistant", "content": "yes"}], "rejected": "never"},
    {"prompt": TURNS, "chosen": "y", "rejected": "not at all"},
]
PAIRS = Pairs.from_records(RECORDS)
HELD = Pairs.from_records([{"prompt": f"Held {i}?", "chosen": "yes", "rejected": "no"} for i in range(3)])
FAST: dict[str, Any] = {"validation": HELD, "learning_rates": (3e-3,), "epochs": 3, "batch_size": 2}


def one_beta(loss: str) -> dict[str, Any]:
    return {} if loss == "sft" else {"betas": (GRIDS[loss][1][0],)}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("loss", ["dpo", "simpo", "sft"])
@pytest.mark.parametrize("chat", [True, False], ids=["template", "no template"])
def test_every_batch_holds_the_renderers_ids_and_its_split(
    loss: str, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tokenizer(chat=chat)
    pairs = PAIRS if chat else Pairs.from_records(RECORDS[:2])
    seen: list[dict[str, torch.Tensor]] = []
    make = loops_module._trainer

    def spied(*arguments: Any) -> Any:
        trainer = make(*arguments)
        collate = trainer.data_collator

        def watch(rows: Any) -> Any:
            seen.append(collate(rows))
            return seen[-1]

        trainer.data_collator = watch
        return trainer

    monkeypatch.setattr(loops_module, "_trainer", spied)
    train(model(), words, pairs, loss=loss, **FAST | {"epochs": 1}, **one_beta(loss))  # pyright: ignore[reportArgumentType]
    found = {row for batch in seen for row in rows_of(batch)}
    expected: set[tuple[tuple[int, ...], int]] = set()
    for pair in (*pairs, *HELD):
        for answer in (pair.chosen, pair.rejected) if loss != "sft" else (pair.chosen,):
            full = Renderer(words).full(pair.prompt, answer)
            expected.add((tuple(full.ids), full.response_start))
    assert found == expected


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], int]]:
    """The texts of a TRL batch, each with the place where its answer starts."""
    if "completion_mask" in batch:  # DPO
        parts = [(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])]
    elif "labels" in batch:  # SFT
        parts = [(batch["input_ids"], batch["attention_mask"], batch["labels"] != -100)]
    else:
        names = ("chosen", "rejected")
        parts = [(batch[f"{n}_input_ids"], batch[f"{n}_attention_mask"], batch[f"{n}_labels"] != -100) for n in names]
    rows: list[tuple[tuple[int, ...], int]] = []
    for ids, mask, answer in parts:
        for row, keep, told in zip(ids, mask.bool(), answer.bool(), strict=True):
            start = int(told[keep].long().argmax())
            assert told[keep][start:].all()  # to the end, closing tokens included
            rows.append((tuple(row[keep].tolist()), start))
    return rows


@pytest.mark.filterwarnings("ignore:Training changed nothing", "ignore:The validation loss never fell")
def test_dpo_starts_at_ln_2_and_simpo_and_sft_where_their_formulae_say() -> None:
    lm, words = model(), tokenizer()
    one_batch: dict[str, Any] = {"validation": HELD, "learning_rates": (1e-9,), "epochs": 1, "batch_size": 8}
    first = {
        loss: train(lm, words, PAIRS, loss=loss, **one_batch, **one_beta(loss)).record["table"][0]["first_loss"]
        for loss in ("dpo", "simpo", "sft")
    }
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-4)
    margins = pair_margins(lm, words, PAIRS, [{}])[0]
    texts = [
        render_texts(words, [p.prompt for p in PAIRS], [getattr(p, n) for p in PAIRS]) for n in ("chosen", "rejected")
    ]
    lengths = [np.array([len(t.ids) - t.start for t in side]) for side in texts]
    beta = GRIDS["simpo"][1][0]
    gap = beta * (margins.chosen / lengths[0] - margins.rejected / lengths[1]) - 0.5 * beta
    assert first["simpo"] == pytest.approx(float(np.log1p(np.exp(-gap)).mean()), abs=1e-3)
    assert first["sft"] == pytest.approx(float(-margins.chosen.sum() / lengths[0].sum()), abs=1e-3)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "sft"])
@pytest.mark.parametrize("rank", [None, 2], ids=["all weights", "adapter"])
def test_training_prefers_what_was_chosen_and_leaves_model_and_process_alone(loss: str, rank: int | None) -> None:
    lm, words = model(), tokenizer()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trained = train(lm, words, PAIRS, loss=loss, lora_rank=rank, **FAST | {"epochs": 6}, **one_beta(loss))  # pyright: ignore[reportArgumentType]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert not lm.training
    assert "forward" not in vars(trained.model)  # nothing that a trainer patches
    assert type(trained.model) is type(lm)
    untrained, after = (pair_margins(m, words, HELD, [{}])[0] for m in (lm, trained.model))
    assert (after.chosen if loss == "sft" else after.margin).mean() > (
        untrained.chosen if loss == "sft" else untrained.margin
    ).mean()
    assert len(generate(trained.model, words, ["One?"], max_new_tokens=3)) == 1
    assert json.loads(json.dumps(trained.record)) == trained.record


def test_half_precision_comes_back_and_runs_repeat() -> None:
    lm, words = model(dtype=torch.bfloat16), tokenizer()
    one, two = (train(lm, words, PAIRS, betas=(0.1,), **FAST) for _ in range(2))
    assert one.model.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert one.record["table"][0]["validation_losses"] == two.record["table"][0]["validation_losses"]
    other = train(lm, words, PAIRS, betas=(0.1,), seed=5, **FAST)
    assert other.record["table"][0]["validation_losses"] != one.record["table"][0]["validation_losses"]


def test_a_run_stops_when_validation_does_not_improve_and_keeps_its_best_weights() -> None:
    lm, words = model(), tokenizer()
    wrong = Pairs.from_records([{"prompt": f"Held {i}?", "chosen": "no", "rejected": "yes"} for i in range(3)])
    options = FAST | {"validation": wrong, "epochs": 9, "patience": 2}
    with pytest.warns(TrimtabWarning, match="never fell below the 0.6931"):
        trained = train(lm, words, PAIRS, betas=(0.5,), **options)
    row = trained.record["table"][0]
    assert (row["evaluated_at"], row["steps"]) == ([2, 4, 6], 6)  # the first is the best, and two more bring nothing
    assert row["best_step"] == 2
    assert row["validation_losses"][0] == min(row["validation_losses"])
    with pytest.warns(TrimtabWarning, match="never fell below"):
        alone = train(lm, words, PAIRS, betas=(0.5,), **options | {"epochs": 1, "patience": 1})
    kept, last = (pair_margins(t.model, words, wrong, [{}])[0].margin.mean() for t in (trained, alone))
    assert kept > -20
    assert abs(kept - last) < 0.5 * abs(last) + 1  # the first epoch's weights (under another schedule of the rate)


def test_a_long_epoch_is_looked_at_on_the_way() -> None:
    pairs = Pairs.from_records([{"prompt": f"Q {i}?", "chosen": "yes", "rejected": "no"} for i in range(40)])
    row = train(model(), tokenizer(), pairs, betas=(0.5,), **FAST | {"batch_size": 1, "epochs": 1}).record["table"][0]
    assert row["evaluated_at"] == [16, 32, 40]
    assert len(row["validation_losses"]) == 3
    best = int(np.argmin(row["validation_losses"]))
    assert row["best_step"] == row["evaluated_at"][best]


def test_the_grid_goes_by_the_score_and_of_equal_settings_takes_the_mildest() -> None:
    lm, words = model(), tokenizer()
    options = FAST | {"learning_rates": (3e-3, 1e-3), "epochs": 1}
    asked: list[Any] = []

    def second_best(made: Any) -> float:
        asked.append(made)
        return float(len(asked) == 3)

    trained = train(lm, words, PAIRS, betas=(0.1, 0.5), score=second_best, **options)
    grid = [(row["learning_rate"], row["beta"]) for row in trained.record["table"]]
    assert grid == [(1e-3, 0.5), (1e-3, 0.1), (3e-3, 0.5), (3e-3, 0.1)]
    assert trained.record["chosen"] == {"learning_rate": 3e-3, "beta": 0.5}
    assert trained.model is asked[2]
    equal = train(lm, words, PAIRS, betas=(0.1, 0.5), score=lambda _: 1.0, **options)
    assert equal.record["chosen"] == {"learning_rate": 1e-3, "beta": 0.5}
    assert (trained.record["tied"], equal.record["tied"]) == (1, 4)
    assert equal.record["run"]["seconds"] < equal.record["grid"]["seconds"]


def test_a_grid_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    lm, words = model(), tokenizer()
    options = FAST | {"learning_rates": (1e-3, 3e-3), "epochs": 1, "betas": (0.1,)}
    whole = train(lm, words, PAIRS, **options)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(lm, words, PAIRS, checkpoint=tmp_path / "kept", progress=stop, **options)
    seen: list[tuple[int, int]] = []
    again = train(lm, words, PAIRS, checkpoint=tmp_path / "kept", progress=lambda *p: seen.append(p), **options)
    assert seen == [(1, 2), (2, 2)]
    clocks = ("seconds", "scoring_seconds", "peak_bytes")
    timeless, expected = (
        [{k: v for k, v in row.items() if k not in clocks} for row in t.record["table"]] for t in (again, whole)
    )
    assert timeless == expected
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    with pytest.raises(OptionError, match="holds another job"):
        train(lm, words, PAIRS, checkpoint=tmp_path / "kept", **options | {"epochs": 2})


def test_what_a_grid_cost_counts_the_settings_of_every_call(tmp_path: Path) -> None:
    options = FAST | {"learning_rates": (1e-3, 3e-3), "epochs": 1, "betas": (0.1,), "checkpoint": tmp_path / "kept"}
    first = train(model(), tokenizer(), PAIRS, **options).record
    again = train(model(), tokenizer(), PAIRS, **options).record
    assert again["grid"] == first["grid"]  # though one setting alone was run anew
    rows = first["table"]
    assert first["grid"]["seconds"] == pytest.approx(sum(row["seconds"] + row["scoring_seconds"] for row in rows))
    assert first["grid"]["peak_bytes"] in [row["peak_bytes"] for row in rows]


def test_a_checkpoint_keeps_the_scores_of_one_score_only(tmp_path: Path) -> None:
    options = FAST | {"epochs": 1, "betas": (0.1,), "score": lambda _: 1.0, "checkpoint": tmp_path / "kept"}
    with pytest.raises(OptionError, match="say in scored_by"):
        train(model(), tokenizer(), PAIRS, **options)
    assert train(model(), tokenizer(), PAIRS, scored_by="one", **options).record["scored_by"] == "one"
    with pytest.raises(OptionError, match=r"another job: scored by \(one there, other here\)"):
        train(model(), tokenizer(), PAIRS, scored_by="other", **options)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "sft"])
def test_a_run_of_few_steps_trains_from_its_first_step_on(loss: str) -> None:
    lm = model()
    options = FAST | {"epochs": 1, "batch_size": 4}
    trained = train(lm, tokenizer(), PAIRS, loss=loss, **options, **one_beta(loss))  # pyright: ignore[reportArgumentType]
    row = trained.record["table"][0]
    assert row["steps"] == 1
    assert row["validation_losses"][0] < row["starting_loss"]
    assert not all(torch.equal(a, b) for a, b in zip(trained.model.parameters(), lm.parameters(), strict=True))


def test_the_warm_up_is_five_steps_or_none_and_early_stopping_waits_for_its_end() -> None:
    assert [loops_module.warm_up_steps(steps) for steps in (1, 7, 49, 50, 70, 1000)] == [0, 0, 0, 5, 5, 5]
    wrong = Pairs.from_records([{"prompt": f"Held {i}?", "chosen": "no", "rejected": "yes"} for i in range(3)])
    options = FAST | {"validation": wrong, "epochs": 50, "patience": 2, "batch_size": 4}
    with pytest.warns(TrimtabWarning, match="changed nothing: the weights are the base model's, bit for bit. Try more"):
        row = train(model(), tokenizer(), PAIRS, betas=(0.5,), **options).record["table"][0]
    assert (row["best_step"], row["steps"]) == (1, 7)  # the step at rate 0, and two looks past the warm-up


def test_steps_that_half_precision_rounds_away_bring_a_warning() -> None:
    lm = model(dtype=torch.bfloat16)
    with pytest.warns(TrimtabWarning, match="too small for bfloat16 are rounded away"):
        train(lm, tokenizer(), PAIRS, betas=(0.1,), **FAST | {"learning_rates": (1e-12,), "epochs": 1})


def test_gamma_is_of_simpo_alone() -> None:
    options = FAST | {"epochs": 1, "betas": (2.0,)}
    assert "gamma_ratio" not in train(model(), tokenizer(), PAIRS, **options).record["options"]
    assert train(model(), tokenizer(), PAIRS, loss="simpo", **options).record["options"]["gamma_ratio"] == 0.5


def test_without_validation_prompts_are_held_out() -> None:
    lm, words = model(), tokenizer()
    pairs = Pairs.from_records([{"prompt": f"Q {i}?", "chosen": "yes", "rejected": "no"} for i in range(10)])
    record = train(lm, words, pairs, learning_rates=(1e-3,), betas=(0.1,), epochs=1).record
    assert record["pairs"]["count"] + record["validation"]["count"] == 10
    assert record["validation"]["held_out_of_pairs"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "dpos"}, UnknownName, "Did you mean 'dpo'"),
        ({"learning_rates": ()}, OptionError, "at least one"),
        ({"learning_rates": (-1.0,)}, OptionError, "between 0 and 1"),
        ({"betas": (0.0,)}, OptionError, "positive"),
        ({"loss": "sft", "betas": (0.1,)}, OptionError, "SFT has no beta"),
        ({"gamma_ratio": 0.5}, OptionError, "gamma_ratio is of SimPO alone; got 0.5 for dpo"),
        ({"loss": "sft", "gamma_ratio": 1.0}, OptionError, "gamma_ratio is of SimPO alone; got 1.0 for sft"),
        ({"loss": "simpo", "gamma_ratio": -1.0}, OptionError, "gamma_ratio lies between 0 and 100; got -1.0"),
        ({"epochs": 0}, OptionError, "epochs counts from 1; got 0"),
        ({"lora_rank": 0}, OptionError, "lora_rank counts from 1"),
        ({"patience": 1.5}, OptionError, "patience counts from 1"),
        ({"validation": PAIRS}, PairsError, "validation prompts are training prompts too"),
        ({"validation": Pairs()}, PairsError, "at least one"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train(model(), tokenizer(), PAIRS, **{"validation": HELD} | options)


def test_a_loss_that_is_not_finite_is_an_error_and_never_the_best_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = model()
    with torch.no_grad():
        next(broken.parameters())[5:] = float("nan")
    with pytest.raises(TrainError, match="not finite, at any of 1 settings"):
        train(broken, tokenizer(), PAIRS, betas=(0.1,), **FAST)
    fit = loops_module.fit

    def lost(*arguments: Any, **options: Any) -> Any:
        history = fit(*arguments, **options)
        spoiled = arguments[4].learning_rate == 1e-3
        return replace(history, validation_losses=[float("nan")] * 3) if spoiled else history

    monkeypatch.setattr("trimtab.train.bench.fit", lost)
    options = FAST | {"learning_rates": (1e-3, 3e-3), "betas": (0.1,), "score": lambda _: -1.0}
    record = train(model(), tokenizer(), PAIRS, **options).record
    assert [row["score"] for row in record["table"]] == [None, -1.0]
    assert record["chosen"]["learning_rate"] == 3e-3
    assert "NaN" not in json.dumps(record)


def test_sft_goes_by_its_loss_on_validation() -> None:
    record = train(model(), tokenizer(), PAIRS, loss="sft", **FAST | {"learning_rates": (1e-5, 3e-3)}).record
    assert record["chosen_by"] == "validation loss"
    assert record["chosen"]["learning_rate"] == 3e-3


def test_a_pair_beyond_the_context_is_refused_by_its_number() -> None:
    long = Pairs.from_records([RECORDS[0], {"prompt": "Long?", "chosen": "yes " * 200, "rejected": "no"}])
    with pytest.raises(PairsError, match=r"Pair 2 is \d+ tokens long when rendered; this model's context holds 64"):
        train(model(max_position_embeddings=64), tokenizer(), long, validation=HELD)


def test_a_missing_package_prints_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops_module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r'pip install "trimtab\[train\]"'):
        train(model(), tokenizer(), PAIRS, validation=HELD)


def test_the_verb_writes_a_model_that_the_other_verbs_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data, out = tmp_path / "pico", tmp_path / "pairs.jsonl", tmp_path / "trained"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    Pairs.from_records([{"prompt": f"Q {i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]).save(data)
    words = ["train", "dpo", str(folder), str(data), "--out", str(out), "--epochs", "1", "--learning-rates", "1e-3"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["out"] == str(out)
    assert json.loads((out / "training.json").read_text())["chosen"] == record["chosen"]
    again = [out.with_name("other") if word == str(out) else word for word in words]
    assert main([str(word) for word in again]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"rate +beta +score +preference +margin +best loss +best step +steps +seconds\n\* +0\.001 ", shown)
    shutil.rmtree(out.with_name("other"))
    assert main([*words]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["generate", str(out), "Hi", "--max-new-tokens", "2"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pico", "trained"]
    assert main(["train", "dop", str(folder), str(data), "--out", str(tmp_path / "x")]) == 2
    assert "Did you mean 'dpo'" in capsys.readouterr().err


def test_the_verb_names_ties_other_tasks_and_options_that_a_loss_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, kept = tmp_path / "pico", tmp_path / "pairs.jsonl", tmp_path / "kept"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    Pairs.from_records([{"prompt": f"Q {i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]).save(data)
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"prompt": "One?", "answer": "never said"}) + "\n")
    words = ["train", "dpo", str(folder), str(data), "--epochs", "1", "--learning-rates", "1e-3,2e-3", "--betas", "0.1"]
    asked = [*words, "--task", str(task), "--checkpoint", str(kept)]
    monkeypatch.setattr("trimtab.checkpoint.remove", lambda folder: None)  # as if the run had been killed
    assert main([*asked, "--out", str(tmp_path / "one")]) == 0
    assert "by score on validation; a tie of 2 settings: the mildest is taken" in capsys.readouterr().out
    task.write_text(json.dumps({"prompt": "One?", "answer": "another answer"}) + "\n")
    assert main([*asked, "--out", str(tmp_path / "two")]) == 2
    assert "holds another job: scored by (task" in capsys.readouterr().err
    for option, value, said in (
        ("--gamma-ratio", "0.5", "trimtab: --gamma-ratio is of SimPO alone; got 0.5 for dpo."),
        ("--lora-rank", "0", "trimtab: --lora-rank counts from 1; got 0."),
        ("--patience", "0", "trimtab: --patience counts from 1; got 0."),
    ):
        assert main([*words, option, value, "--out", str(tmp_path / "two")]) == 2
        assert said in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "simpo alone: gamma over beta" in shown
    assert "sft has none" in shown


@pytest.mark.quick
def test_only_words_that_name_options_become_options() -> None:
    assert as_options("epochs counts from 1; kl_items is 0.") == "--epochs counts from 1; --kl-items is 0."
    for plain in (
        "Give it patience, and more epochs.",
        "r.toml: epochs counts from 1.",
        "training.x: betas are positive",
    ):
        assert as_options(plain) == plain
