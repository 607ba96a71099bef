"""Baselines that are trained: relabelled pairs, BFPO's betas, rewards through TRL, and soups of what comes out."""

from __future__ import annotations

import json
import math
import os
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pico import model, tokenizer
from trimtab.artifact.delta import DeltaKnob, LowRank
from trimtab.cli import main
from trimtab.errors import OptionError, PairsError, TrainError, TrimtabWarning, UnknownName
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import Task
from trimtab.generate import generate
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.prompts import read_prompt
from trimtab.render import Renderer
from trimtab.train import loops as loops_module
from trimtab.train import rollouts as rollouts_module
from trimtab.train import train
from trimtab.train.labels import Flags, bfpo_target, bfpo_targets, relabel
from trimtab.train.rewards import reinforce, task_reward
from trimtab.train.soup import soup
from trimtab.weights.delta import difference
from trimtab.weights.live import applied

pytest.importorskip("trl", reason="training needs the train extra")


def flagged(better: str, safer: str, chosen_safe: bool, rejected_safe: bool, **more: Any) -> dict[str, Any]:
    return {"better": better, "safer": safer, "chosen_safe": chosen_safe, "rejected_safe": rejected_safe, **more}


def pairs_of(*flags: dict[str, Any]) -> Pairs:
    """A pair for each set of flags; every fourth has the same two answers."""
    return Pairs.from_records(
        {"prompt": f"Question {i}?", "chosen": 3 * "aceg"[i % 4], "rejected": 4 * "bdfh"[i % 4], **own}
        for i, own in enumerate(flags)
    )


# --- labels ---------------------------------------------------------------------------------------------------------

# (chosen_safe, rejected_safe) with the chosen answer the better one and the rejected one the safer one: a conflict.
TABLE = [
    # safe-first goes by help where both are harmless, and by harm otherwise
    ((True, True), {"helpful": True, "harmless": False, "safe-first": True, "bfpo": True}, 0.5),
    ((False, True), {"helpful": True, "harmless": False, "safe-first": False, "bfpo": False}, -1.0),
    ((False, False), {"helpful": True, "harmless": False, "safe-first": False, "bfpo": False}, -0.5),
    ((True, False), {"helpful": True, "harmless": False, "safe-first": False, "bfpo": True}, 1.0),
]


@pytest.mark.parametrize("swapped", [False, True], ids=["as told", "told the other way round"])
@pytest.mark.parametrize(("safe", "stays", "target"), TABLE, ids=lambda value: str(value))
def test_conflicts_are_decided_as_the_table_says(
    safe: tuple[bool, bool], stays: dict[str, bool], target: float, swapped: bool
) -> None:
    own = flagged("chosen", "rejected", *safe)
    first, second = "good", "bad"
    if swapped:  # the same two answers, listed in the other order
        own, first, second = flagged("rejected", "chosen", *reversed(safe)), second, first
    pairs = Pairs.from_records([{"prompt": "Well?", "chosen": first, "rejected": second, **own}])
    for label, better_wins in stays.items():
        made = relabel(pairs, label)[0]  # pyright: ignore[reportArgumentType]
        assert made.chosen == ("good" if better_wins else "bad"), label
        assert made.meta["better"] == ("chosen" if better_wins else "rejected"), label
        assert made.meta["safer"] == ("rejected" if better_wins else "chosen"), label
        expected = safe if better_wins else (safe[1], safe[0])
        assert (made.meta["chosen_safe"], made.meta["rejected_safe"]) == expected, label
    assert bfpo_targets(pairs)[0] == pytest.approx(-target if swapped else target)
    assert bfpo_targets(relabel(pairs, "bfpo"))[0] == abs(target)


def test_relabelling_takes_what_is_told_of_each_answer_along_and_can_be_undone() -> None:
    told = flagged("chosen", "rejected", True, False, chosen_side="full", rejected_side="thin", task="t", chosen_n=1)
    pairs = pairs_of(told)
    turned = relabel(pairs, "harmless")
    assert dict(turned[0].meta) == flagged(
        "rejected", "chosen", False, True, rejected_side="full", chosen_side="thin", task="t", rejected_n=1
    )
    assert relabel(turned, "helpful") == pairs
    assert relabel(turned, "harmless") == turned
    assert relabel(pairs, "helpful") == pairs


def test_a_pair_without_flags_and_an_unknown_label_are_named() -> None:
    good = flagged("chosen", "chosen", True, True)
    for name, wrong in (("better", 0), ("safer", "both"), ("chosen_safe", 1), ("rejected_safe", "true")):
        with pytest.raises(PairsError, match=rf"Pair 2 .*'{name}'"):
            relabel(pairs_of(good, good | {name: wrong}), "safe-first")
    with pytest.raises(UnknownName, match=r"safe-first"):
        relabel(pairs_of(good), "safe")  # pyright: ignore[reportArgumentType]


def test_the_default_shift_leaves_no_target_zero_and_others_are_refused() -> None:
    every = [Flags("chosen", "chosen", *safe) for safe in product((True, False), repeat=2)]
    assert sorted(bfpo_target(flags) for flags in every) == [-1.0, -0.5, 0.5, 1.0]
    pairs = pairs_of(flagged("chosen", "chosen", True, False), flagged("chosen", "chosen", True, True))
    assert bfpo_targets(pairs, shift=0.25).tolist() == [1.25, 0.75]
    with pytest.raises(OptionError, match="pair 2 is 0 at the shift 1"):
        bfpo_targets(pairs, shift=1.0)


def test_prefworld_pairs_conflict_where_the_request_is_harmful_and_not_elsewhere() -> None:
    joint = world.pairs("helpful", 12) + world.pairs("harmless", 12)
    by_help = relabel(joint, "helpful")
    assert {pair.meta["chosen_side"] for pair in by_help} == {"full", "comply"}
    assert {pair.meta["chosen_side"] for pair in relabel(by_help, "harmless")} == {"full", "refuse"}
    assert relabel(by_help, "safe-first") == joint == relabel(by_help, "bfpo")
    assert bfpo_targets(joint).tolist() == [0.5] * 12 + [1.0] * 12
    turned = world.pairs("helpful", 12, sides=("thin", "full"))
    assert relabel(turned, "safe-first") == world.pairs("helpful", 12)  # the flags follow the answers, not their order


# --- BFPO in DPO's form ---------------------------------------------------------------------------------------------

KINDS = [
    flagged("chosen", "chosen", True, True),
    flagged("chosen", "rejected", False, True),
    flagged("chosen", "rejected", False, False),
    flagged("chosen", "chosen", True, False),
]
HELD = pairs_of(*KINDS, *KINDS)[4:]
FAST: dict[str, Any] = {"validation": HELD, "learning_rates": (3e-3,), "epochs": 2, "batch_size": 2}


def test_each_row_of_bfpo_has_its_own_tau_by_the_formula() -> None:
    """The loss of moved weights, by hand: -log sigma(tau' h) in the order (better, other), tau' with its sign."""
    lm, words, tau = model(), tokenizer(), 0.2
    pairs = pairs_of(*KINDS)
    trained = train(lm, words, pairs, loss="bfpo", betas=(tau,), **FAST)
    row = trained.record["table"][0]
    assert row["starting_loss"] == math.log(2)
    # The validation loss at the kept weights, recomputed from log-likelihoods alone.
    before, after = (pair_margins(m, words, HELD, [{}])[0].margin for m in (lm, trained.model))
    signed = [tau / 2 / (1.5 * s["chosen_safe"] - 0.5 * s["rejected_safe"] - 0.5) for s in KINDS]
    assert signed == pytest.approx([0.2, -0.1, -0.2, 0.1])
    by_hand = np.log1p(np.exp(-np.array(signed) * (after - before))).mean()
    assert by_hand != pytest.approx(np.log1p(np.exp(-tau * (after - before))).mean(), abs=1e-3)  # DPO's is another
    assert min(row["validation_losses"]) == pytest.approx(by_hand, abs=1e-5)


def test_bfpo_of_harmless_pairs_is_dpo_bit_for_bit_and_of_others_is_not() -> None:
    lm, words = model(), tokenizer()
    safe, mixed = pairs_of(*[KINDS[0]] * 4), pairs_of(*KINDS)
    own = FAST | {"validation": pairs_of(*[KINDS[0]] * 6)[4:], "betas": (0.3,)}
    dpo, bfpo = (train(lm, words, safe, loss=loss, **own) for loss in ("dpo", "bfpo"))
    assert all(torch.equal(a, b) for a, b in zip(dpo.model.parameters(), bfpo.model.parameters(), strict=True))
    assert dpo.record["table"][0]["validation_losses"] == bfpo.record["table"][0]["validation_losses"]
    other = train(lm, words, mixed, loss="bfpo", **own | {"validation": HELD})
    assert not all(torch.equal(a, b) for a, b in zip(dpo.model.parameters(), other.model.parameters(), strict=True))


def test_bfpo_gets_the_ids_that_dpo_gets_and_learns_its_own_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    make, seen = loops_module._trainer, []

    def spied(*arguments: Any) -> Any:
        trainer = make(*arguments)
        collate = trainer.data_collator

        def watch(rows: Any) -> Any:
            seen.append(collate(rows))
            return dict(seen[-1])

        trainer.data_collator = watch
        return trainer

    monkeypatch.setattr(loops_module, "_trainer", spied)
    lm, words, pairs = model(), tokenizer(), pairs_of(*KINDS)
    own = FAST | {"betas": (0.3,), "epochs": 6}
    trained = train(lm, words, pairs, loss="bfpo", **own)
    batches, seen[:] = list(seen), []
    train(lm, words, relabel(pairs, "bfpo"), loss="dpo", **own | {"validation": relabel(HELD, "bfpo")})
    ids = [{tuple(row.tolist()) for b in some for row in b["input_ids"]} for some in (batches, seen)]
    assert ids[0] == ids[1]
    assert {float(t) for b in batches for t in b["targets"]} == {0.5, 1.0}
    margins = [pair_margins(m, words, HELD, [{}])[0].margin for m in (lm, trained.model)]
    assert ((margins[1] - margins[0]) * np.array([1, -1, -1, 1]) > 0).all()  # unsafe better answers are unlearned
    assert trained.record["pairs"]["hash"] == relabel(pairs, "bfpo").hash()


def test_bfpo_wants_the_flags_and_the_verb_reads_them_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Pairs.from_records([{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(4)])
    with pytest.raises(PairsError, match="Pair 1 does not say which answer is better"):
        train(model(), tokenizer(), bare, loss="bfpo", **FAST)
    folder, pairs = tmp_path / "pico", pairs_of(*KINDS * 2)
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    bare.save(tmp_path / "bare.jsonl")
    pairs.save(tmp_path / "pairs.jsonl")
    words = ["--out", str(tmp_path / "made"), "--epochs", "2", "--learning-rates", "3e-3", "--betas", "0.2", "--json"]
    assert main(["train", "bfpo", str(folder), str(tmp_path / "bare.jsonl"), *words]) == 2
    assert "does not say which answer is better" in capsys.readouterr().err
    assert main(["train", "bfpo", str(folder), str(tmp_path / "pairs.jsonl"), *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["loss"], record["chosen"]["beta"]) == ("bfpo", 0.2)
    assert record["pairs"]["hash"] == relabel(pairs.split(seed=0).train, "bfpo").hash()


# --- rewards --------------------------------------------------------------------------------------------------------

PROMPTS = [f"Ask {i}?" for i in range(6)]
LOOK = ["Look 1?", "Look 2, which is longer?"]
QUICK: dict[str, Any] = {
    "validation": LOOK,
    "learning_rate": 1e-2,
    "steps": 6,
    "batch_size": 3,
    "answers": 4,
    "max_new_tokens": 6,
    "look_every": 3,
}
LOOKS = [f"Look {i}?" for i in range(30)]  # 24 rows a batch: the last one is smaller
LONG = QUICK | {"validation": LOOKS, "answers": 8, "steps": 12, "look_every": 4, "kl": 0.01}


def lower(prompts: Any, answers: Any) -> list[float]:
    """The share of an answer's characters in the lower half of the vocabulary: about a half at first."""
    return [sum(ord(letter) < 0xE0 for letter in text) / max(len(text), 1) for text in answers]


@pytest.mark.parametrize("rank", [None, 8], ids=["all weights", "adapter"])
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_planted_reward_rises_and_model_and_process_stay_as_they_were(method: str, rank: int | None) -> None:
    lm, words = model(), tokenizer()
    words.padding_side = "right"
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), dict(os.environ)
    looked: list[list[float]] = []

    def reward(prompts: Any, answers: Any) -> list[float]:
        if prompts[0][-1].content in LOOKS:
            looked.append(lower(prompts, answers))
        return lower(prompts, answers)

    trained = reinforce(lm, words, PROMPTS, reward, method=method, lora_rank=rank, **LONG)  # pyright: ignore[reportArgumentType]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert dict(os.environ) == states[3]
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert (words.padding_side, words.pad_token) == ("right", "<pad>")
    assert not lm.training
    assert type(trained.model) is type(lm)
    assert "forward" not in vars(trained.model)  # nothing that a trainer patches
    record = trained.record
    assert json.loads(json.dumps(record)) == record
    assert record["looked_at"] == [4, 8, 12]
    assert len(record["rewards"]) == len(record["divergences"]) == record["steps"] == 12
    means = [np.mean(looked[i] + looked[i + 1]) for i in range(0, len(looked), 2)]
    assert [record["starting_reward"], *record["validation_rewards"]] == pytest.approx(means, abs=1e-6)
    assert record["best_reward"] == max(record["validation_rewards"]) > record["starting_reward"] + 0.05
    assert record["looked_at"][int(np.argmax(record["validation_rewards"]))] == record["best_step"]
    assert record["run"]["seconds"] > 0
    assert record["divergences"][0] == pytest.approx(0, abs=1e-6)  # the reference is the model as it was
    assert record["divergences"][-1] > 1e-3
    if rank is None:
        more = [f"New {i}?" for i in range(60)]
        texts = [generate(m, words, more, temperature=1.0, max_new_tokens=6) for m in (lm, trained.model)]
        before_it, after_it = (np.mean(lower(more, [g.text for g in made])) for made in texts)
        assert after_it > before_it + 0.1


def test_trl_samples_from_our_ids_and_rewards_the_texts_that_we_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    words, seen, asked = tokenizer(), [], []
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
    ]
    make = rollouts_module._trainer

    def spied(*arguments: Any) -> Any:
        trainer = make(*arguments)
        sample = trainer._generate_and_score_completions

        def watch(inputs: Any) -> Any:
            seen.append(sample(inputs))
            return seen[-1]

        trainer._generate_and_score_completions = watch
        return trainer

    def reward(prompts: Any, answers: Any) -> list[float]:
        asked.append((list(prompts), list(answers)))
        return lower(prompts, answers)

    monkeypatch.setattr(rollouts_module, "_trainer", spied)
    reinforce(model(), words, [*PROMPTS[:2], turns], reward, **QUICK | {"steps": 3})
    renderer = Renderer(words)
    expected = {tuple(renderer.prompt_ids(read_prompt(p))) for p in (*PROMPTS[:2], turns, *LOOK)}
    found = set[tuple[int, ...]]()
    for batch, (prompts, answers) in zip(seen, asked, strict=True):
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = tuple(batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist())
            found.add(ids)
            made = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            if batch["completion_ids"].shape[0] == 2:  # a look, in order; a step's rows are shuffled afterwards
                assert ids == tuple(renderer.prompt_ids(prompt))
                assert answer == renderer.decode([token for token in made if token != words.eos_token_id])
    assert found == expected


def test_kl_holds_the_model_back() -> None:
    lm, words = model(), tokenizer()
    free, held = (
        reinforce(lm, words, PROMPTS, lower, method="grpo", **LONG | {"kl": kl, "validation": LOOK}).record[
            "divergences"
        ]
        for kl in (0.01, 3.0)
    )
    assert held[-1] < 0.5 * free[-1]
    assert not reinforce(lm, words, PROMPTS, lower, **QUICK | {"kl": 0.0}).record["divergences"]


def test_runs_repeat_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    lm, words = model(dtype=torch.bfloat16), tokenizer()
    own = QUICK | {"checkpoint": tmp_path / "kept", "rewarded_by": "lower half"}
    first = reinforce(lm, words, PROMPTS, lower, **own)
    assert first.model.dtype == torch.bfloat16

    def never(prompts: Any, answers: Any) -> list[float]:
        raise AssertionError

    kept = reinforce(lm, words, PROMPTS, never, **own)
    again = reinforce(lm, words, PROMPTS, lower, **QUICK)
    for other in (kept, again):
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))
        assert other.record["validation_rewards"] == first.record["validation_rewards"]
    assert not all(torch.equal(a, b) for a, b in zip(first.model.parameters(), lm.parameters(), strict=True))
    with pytest.raises(OptionError, match=r"another job: rewarded by"):
        reinforce(lm, words, PROMPTS, lower, **own | {"rewarded_by": "other"})
    with pytest.raises(OptionError, match="say in rewarded_by"):
        reinforce(lm, words, PROMPTS, lower, **own | {"rewarded_by": None})


def test_a_run_ends_when_looks_bring_nothing_and_says_so() -> None:
    seen: list[tuple[int, int]] = []
    own = QUICK | {"steps": 9, "look_every": 1, "patience": 2, "progress": lambda *done: seen.append(done)}
    with pytest.warns(TrimtabWarning, match="never rose above the 0.5"):
        record = reinforce(model(), tokenizer(), PROMPTS, lambda prompts, answers: [0.5] * len(answers), **own).record
    assert (record["steps"], record["best_step"], record["looked_at"]) == (3, 1, [1, 2, 3])
    assert seen == [(1, 9), (2, 9), (3, 9)]


def test_prompts_are_held_out_without_validation_and_never_shared() -> None:
    asked: list[str] = []

    def reward(prompts: Any, answers: Any) -> list[float]:
        asked.extend(prompt[-1].content for prompt in prompts)
        return lower(prompts, answers)

    own = QUICK | {"validation": None, "steps": 4, "look_every": 4}
    record = reinforce(model(), tokenizer(), PROMPTS, reward, **own).record
    assert (record["prompts"]["count"], record["validation"]["count"]) == (4, 2)
    looked = set(asked[:2])
    assert looked == set(asked[-2:])
    assert set(asked[2:-2]) == set(PROMPTS) - looked
    with pytest.raises(OptionError, match="1 of the validation prompts are training prompts too"):
        reinforce(model(), tokenizer(), PROMPTS, lower, **QUICK | {"validation": PROMPTS[:1]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": 1}, "answers counts from 2"),
        ({"steps": 0}, "steps counts from 1"),
        ({"lora_rank": True}, "lora_rank counts from 1"),
        ({"patience": 0}, "patience counts from 1"),
        ({"learning_rate": 0.0}, "learning rate lies between"),
        ({"kl": -0.1}, "kl is 0 or more"),
        ({"kl": math.nan}, "kl is 0 or more"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"max_new_tokens": 10**6}, "no room for 1000000 new ones"),
        ({"validation": []}, "validation too"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        reinforce(model(), tokenizer(), PROMPTS, lower, **QUICK | change)


def test_rewards_that_are_none_are_named() -> None:
    with pytest.raises(UnknownName, match="rloo"):
        reinforce(model(), tokenizer(), PROMPTS, lower, **QUICK | {"method": "ppo"})
    with pytest.raises(OptionError, match="got 1 for 2 answers"):
        reinforce(model(), tokenizer(), PROMPTS, lambda prompts, answers: [0.0], **QUICK)
    with pytest.raises(TrainError, match="which is not finite"):
        reinforce(model(), tokenizer(), PROMPTS, lambda prompts, answers: [math.nan] * len(answers), **QUICK)


def test_the_reward_of_a_task_is_its_grader() -> None:
    graded: list[list[str]] = []

    def grade(answers: Any) -> list[float]:
        graded.append(list(answers))
        return [float(text == f"right {i}") for i, text in enumerate(answers)]

    one, two = (Task(name, (f"{name} 0?", f"{name} 1?"), grade) for name in ("one", "two"))
    asked = ["two 1?", "one 0?", "two 1?", "two 0?"]
    reward = task_reward(one, two)
    texts = ["right 1", "right 0", "right 0", "right 1"]
    assert list(reward([read_prompt(p) for p in asked], texts)) == [1.0, 1.0, 0.0, 0.0]
    assert ["right 1", "right 1"] in graded  # two answers to one task's prompts, graded together
    with pytest.raises(OptionError, match="None of the 2 tasks"):
        reward([read_prompt("three?")], [""])
    items = world.items("harmless", "train", 5)
    exact = task_reward(world.task("harmless", "train", 5))
    prompts = [read_prompt(item.prompt) for item in items]
    assert list(exact(prompts, [item.answers["refuse"] for item in items])) == [1.0] * 5
    assert list(exact(prompts, [item.answers["comply"] for item in items])) == [0.0] * 5


# --- soups ----------------------------------------------------------------------------------------------------------


def test_a_soup_is_the_average_of_the_models() -> None:
    base, one, two = model(seed=0), model(seed=1), model(seed=2)
    first, second = (difference(m, base, name=n) for m, n in ((one, "one"), (two, "two")))
    for weights, expected in ((None, (0.5, 0.5)), ((3.0, 1.0), (0.75, 0.25)), ((0.0, 2.0), (0.0, 1.0))):
        knob = soup([first, second], weights, name="dpo-soup")
        assert (knob.name, knob.method) == ("dpo-soup", "soup")
        assert [part["weight"] for part in knob.provenance["soup"]] == list(expected)
        with applied(base, {knob: 1.0}):
            for name, value in base.named_parameters():
                mean = sum(w * dict(m.named_parameters())[name] for w, m in zip(expected, (one, two), strict=True))
                assert torch.allclose(value, mean, atol=1e-6), name


def test_a_soup_of_low_rank_knobs_stays_of_low_rank_and_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    knobs = [
        DeltaKnob(
            n, "delta", {"w": LowRank(torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator))}
        )
        for n in ("one", "two")
    ]
    mixed = soup(knobs, (1.0, 3.0))
    assert mixed.low_rank
    assert torch.allclose(mixed.gain * mixed.dense("w"), 0.25 * knobs[0].dense("w") + 0.75 * knobs[1].dense("w"))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, math.inf)], ids=str)
def test_weights_that_make_no_average_are_refused(weights: tuple[float, ...]) -> None:
    knob = DeltaKnob("one", "delta", {"w": torch.ones(2)})
    with pytest.raises(OptionError, match="weight"):
        soup([knob, knob], weights)
    with pytest.raises(OptionError, match="one knob at least"):
        soup([])
