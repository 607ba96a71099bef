"""BiPO: the loss of the paper on the tokens that are meant, a vector that steers both ways, and a model left alone."""

from __future__ import annotations

import inspect
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import trimtab
from pico import WIDTH, model, tokenizer
from trimtab.artifact import Knob
from trimtab.checkpoint import NO_CHECKPOINT
from trimtab.errors import AdapterError, KnobError, OptionError, PairsError, TrainError, TrimtabWarning, UnknownName
from trimtab.evals.likelihood import pair_margins
from trimtab.ops import cosine
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.render import Renderer
from trimtab.runtime import steer
from trimtab.train.bipo import learn_vector
from trimtab.train.steered import START, STEP_SHARES, SteeredPairs, Training, frozen
from trimtab.types import Pair, Site

WHERES = ("all", "prompt", "context", "completion")
PAIRS = Pairs.from_records([{"prompt": f"Ask {i}?", "chosen": "yes", "rejected": "no"} for i in range(6)])
HELD = Pairs.from_records([{"prompt": f"Held {i}?", "chosen": "yes", "rejected": "no"} for i in range(3)])
UNEVEN = Pairs.from_records(
    [
        {"prompt": "One?", "chosen": "yes", "rejected": "no"},
        {"prompt": "Two, and longer?", "chosen": "yes indeed, by all means", "rejected": "n"},
        {"prompt": "3", "chosen": "y", "rejected": "not at all"},
    ]
)
FAST: dict[str, Any] = {"validation": HELD, "layers": [1], "epochs": 4, "batch_size": 2}


def made(pairs: Pairs = PAIRS, **options: Any) -> Knob:
    return learn_vector(model(), tokenizer(), pairs, **FAST | options)


def training(lm: Any, pairs: Pairs, *, where: Any = "all", beta: float = 0.1) -> Training:
    words = tokenizer()
    sides = [SteeredPairs(lm, words, some, where) for some in (pairs, HELD)]
    return Training(*sides, {1: 1.0}, {"beta": beta, "batch_size": 4}, NO_CHECKPOINT)


def gradient(job: Training, numbers: list[int], vector: Tensor, sign: int) -> Tensor:
    leaf = vector.clone().requires_grad_(True)
    job.loss(numbers, 1, leaf, sign).backward()
    assert leaf.grad is not None
    return leaf.grad


def losses_of(row: dict[str, Any]) -> list[float]:
    return row["validation_losses"]


# The loss


def dpo_loss(lm: Any, pair: Pair, vector: Tensor, sign: int, where: str, beta: float) -> Tensor:
    """DPO's loss of one pair, text by text without padding, with a hook of our own and masks written out."""
    words, ratios = tokenizer(), []
    for answer in (pair.chosen, pair.rejected):
        full = Renderer(words).full(pair.prompt, answer)
        ids, P = torch.tensor([full.ids]), full.response_start
        steered = {
            "all": range(len(full.ids)),
            "prompt": range(P),
            "context": range(P - 1),
            "completion": range(P - 1, len(full.ids)),
        }[where]
        mask = torch.tensor([[[float(t in steered)] for t in range(len(full.ids))]])

        def add(_module: Any, _args: Any, out: Any, mask: Tensor = mask) -> Any:
            return out + mask * sign * vector if isinstance(out, Tensor) else (out[0] + mask * sign * vector, *out[1:])

        def total(ids: Tensor = ids, start: int = P) -> Tensor:
            logps = lm(ids).logits[0].log_softmax(-1)
            return sum((logps[t - 1, ids[0, t]] for t in range(start, ids.shape[1])), torch.zeros(()))

        with torch.no_grad():
            reference = total()
        handle = lm.model.layers[1].register_forward_hook(add)
        ratios.append(total() - reference)
        handle.remove()
    return -logsigmoid(sign * beta * (ratios[0] - ratios[1]))


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("length", [0.0, 2.0])
def test_loss_and_gradient_are_those_of_dpo_with_the_bare_model_as_reference(
    where: str, sign: int, length: float
) -> None:
    lm = model()
    vector = length * torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) / WIDTH**0.5
    leaf = vector.clone().requires_grad_(True)
    expected = torch.stack([dpo_loss(lm, pair, leaf, sign, where, 0.7) for pair in UNEVEN]).mean()
    expected.backward()
    with frozen(lm):
        job = training(lm, UNEVEN, where=where, beta=0.7)
        assert job.loss([0, 1, 2], 1, vector, sign).item() == pytest.approx(expected.item(), abs=1e-4)
        torch.testing.assert_close(gradient(job, [0, 1, 2], vector, sign), leaf.grad, rtol=1e-3, atol=1e-5)


def test_the_first_gradient_is_the_same_for_both_signs_and_points_away_from_the_knob() -> None:
    lm = model()
    with frozen(lm):
        job = training(lm, PAIRS)
        plus, minus = (gradient(job, list(range(len(PAIRS))), torch.zeros(WIDTH), sign) for sign in (1, -1))
        assert job.loss([0], 1, torch.zeros(WIDTH), 1).item() == pytest.approx(START, abs=1e-5)
    torch.testing.assert_close(plus, minus)
    assert cosine(made().direction, -plus) > 0.5


def test_padding_and_neighbours_do_not_change_the_gradient() -> None:
    lm, vector = model(), torch.linspace(-1, 1, WIDTH)
    with frozen(lm):
        job = training(lm, UNEVEN, where="completion")
        alone = torch.stack([gradient(job, [i], vector, -1) for i in range(3)]).mean(0)
        torch.testing.assert_close(gradient(job, [2, 0, 1], vector, -1), alone, rtol=1e-4, atol=1e-6)


# The knob


def test_the_validation_loss_falls_and_the_knob_moves_held_pairs_both_ways() -> None:
    lm, words = model(), tokenizer()
    knob = learn_vector(lm, words, PAIRS, **FAST)
    for row in knob.diagnostics["table"]:
        assert all(later < earlier for earlier, later in pairwise([START, *losses_of(row)]))
        assert row["validation_loss"] == min(losses_of(row))
        assert row["best_epoch"] == len(losses_of(row))
    minus, zero, plus = (float(m.margin.mean()) for m in pair_margins(lm, words, HELD, [{knob: s} for s in (-1, 0, 1)]))
    assert minus < zero < plus


@pytest.mark.parametrize("where", WHERES)
def test_training_saw_what_the_runtime_does(where: Any) -> None:
    lm, words = model(), tokenizer()
    knob = learn_vector(lm, words, UNEVEN, where=where, validation=PAIRS, layers=[1], epochs=6)
    best = min(knob.diagnostics["table"], key=lambda row: row["validation_loss"])
    found = pair_margins(lm, words, PAIRS, [{knob: s} for s in (0, 1, -1)])
    base = knob.diagnostics["base"]
    told = [base["margin"], best["margin"], best["margin_reversed"]]
    assert [float(m.margin.mean()) for m in found] == pytest.approx(told, abs=1e-3)
    assert [float(m.chosen.mean()) for m in found[:2]] == pytest.approx([base["chosen"], best["chosen"]], abs=1e-3)
    assert [float((m.margin > 0).mean()) for m in found[:2]] == [base["preference"], best["preference"]]
    assert knob.where == where


def test_the_knob_says_where_it_comes_from_and_comes_back_from_its_file(tmp_path: Path) -> None:
    knob = made(name="yes", layers=[0, -2], licence="CC0")
    assert (knob.name, knob.method, knob.operation) == ("yes", "bipo", "add")
    assert list(knob.vectors) == [Site(0, "trained"), Site(1, "trained")]
    best = {row["layer"]: row for row in knob.diagnostics["table"] if row["learning_rate"] == rates(knob, row)[-1]}
    assert knob.gain == pytest.approx(float(knob.vectors[knob.site].norm()) / knob.norms[knob.site.layer])
    assert knob.diagnostics["selection"]["site"] == str(knob.site)
    losses = [loss for _, loss in knob.diagnostics["selection"]["table"]]
    assert losses == sorted(losses)
    assert knob.site.layer == min(best, key=lambda layer: best[layer]["validation_loss"])
    assert knob.provenance["paper"] == "arXiv:2406.00045"
    assert knob.provenance["pairs_hash"] == PAIRS.hash()
    assert knob.provenance["licence"] == "CC0"
    knob.save(tmp_path / "knob.safetensors")
    again = Knob.load(tmp_path / "knob.safetensors")
    assert torch.equal(again.vectors[knob.site], knob.vectors[knob.site])
    assert again.diagnostics == json.loads(json.dumps(knob.diagnostics))


def rates(knob: Knob, row: dict[str, Any]) -> list[float]:
    return sorted(r["learning_rate"] for r in knob.diagnostics["table"] if r["layer"] == row["layer"])


def test_rates_are_shares_of_the_residual_norm_or_those_given_and_the_best_one_counts() -> None:
    knob = made()
    unit = knob.norms[1] / WIDTH**0.5
    assert rates(knob, {"layer": 1}) == pytest.approx([share * unit for share in STEP_SHARES])
    given = made(learning_rates=(3e-2, 1e-3, 3e-2))
    assert rates(given, {"layer": 1}) == [1e-3, 3e-2]
    slow, fast = given.diagnostics["table"]
    assert fast["validation_loss"] < slow["validation_loss"]
    assert given.vectors[given.site].norm().item() == pytest.approx(fast["vector_norm"])
    assert torch.equal(made(learning_rates=(3e-2,)).vectors[given.site], given.vectors[given.site])


def test_runs_repeat_and_seeds_differ() -> None:
    one, two, other = (made(seed=seed) for seed in (0, 0, 5))
    assert torch.equal(one.vectors[one.site], two.vectors[one.site])
    assert not torch.equal(one.vectors[one.site], other.vectors[one.site])


def test_a_run_ends_when_validation_has_not_improved_past_the_warm_up() -> None:
    knob = made(learning_rates=(1e-7,), epochs=20, patience=2)
    row = knob.diagnostics["table"][0]  # 60 steps, 6 of them warm-up: epochs of 3
    assert (len(losses_of(row)), row["steps"]) == (4, 12)


@pytest.mark.filterwarnings("ignore:At strength 1 the chosen answers:trimtab.errors.TrimtabWarning")
def test_a_layer_that_learns_nothing_keeps_a_zero_vector_with_a_warning() -> None:
    with pytest.warns(TrimtabWarning, match="at layers 2, whose vectors are zero") as caught:
        knob = made(layers=[0, 2], where="context")  # nothing above the last block looks back
    assert [str(w.message) for w in caught] == knob.diagnostics["warnings"]
    assert not knob.vectors[Site(2, "trained")].any()
    assert knob.site.layer == 0


def test_no_vector_at_all_is_an_error() -> None:
    with pytest.raises(TrainError, match=r"never fell below the 0\.6931 .* at any of 1 layers"):
        made(validation=HELD.swapped())


def test_without_validation_prompts_are_held_out() -> None:
    knob = learn_vector(model(), tokenizer(), PAIRS, layers=[1], epochs=2, checkpoint=None)
    told = knob.provenance["options"]["validation"]
    assert (told["count"], told["held_out_of_pairs"]) == (2, True)
    assert knob.provenance["pairs_count"] == 6


def test_without_layers_the_fractions_choose() -> None:
    assert [site.layer for site in made(layers=None, first=0.3, last=0.7).vectors] == [1]
    assert made(layers=None, epochs=1).provenance["options"]["layers"] == [0, 1]


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "mamba"])
def test_other_architectures_learn_too(name: str) -> None:
    knob = learn_vector(model(name), tokenizer(), PAIRS, **FAST)
    assert knob.diagnostics["selection"]["table"][0][1] < START


def test_half_precision_models_are_trained_with_a_float32_vector() -> None:
    knob = learn_vector(model(dtype=torch.bfloat16), tokenizer(), PAIRS, **FAST)
    vector = knob.vectors[knob.site]
    assert vector.dtype == torch.float32
    assert not torch.equal(vector, vector.bfloat16().float())


def test_a_model_without_a_chat_template_is_learned_from() -> None:
    knob = learn_vector(model(), tokenizer(chat=False), PAIRS, **FAST)
    assert knob.diagnostics["selection"]["table"][0][1] < START


# What is left alone


def test_model_and_process_are_as_before() -> None:
    lm, words = model(), tokenizer()
    lm.train()
    weights = dict(lm.named_parameters())
    for name, parameter in weights.items():
        parameter.requires_grad_("mlp" in name)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        learn_vector(lm, words, PAIRS, **FAST)
        assert not torch.is_grad_enabled()
    with pytest.raises(KeyboardInterrupt):
        learn_vector(lm, words, PAIRS, progress=stop, **FAST)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert all(p.requires_grad == ("mlp" in name) and p.grad is None for name, p in weights.items())
    assert all(module.training and not module._forward_hooks for module in lm.modules())


def test_a_steered_model_is_not_learned_from() -> None:
    lm, knob = model(), made()
    with steer(lm, {knob: 1.0}), pytest.raises(AdapterError, match="is being steered"):
        learn_vector(lm, tokenizer(), PAIRS, **FAST)


def test_a_stopped_job_goes_on_to_the_same_knob_bit_for_bit(tmp_path: Path) -> None:
    options = {"layers": [0, 1], "epochs": 2}
    whole = made(**options)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(checkpoint=tmp_path / "kept", progress=stop, **options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    seen: list[tuple[int, int]] = []
    again = made(checkpoint=tmp_path / "kept", progress=lambda *p: seen.append(p), **options)
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())  # nothing was run twice
    assert all(torch.equal(again.vectors[site], whole.vectors[site]) for site in whole.vectors)
    assert (again.site, again.gain, again.norms) == (whole.site, whole.gain, whole.norms)
    timeless, expected = (
        [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in knob.diagnostics["table"]]
        for knob in (again, whole)
    )
    assert timeless == expected
    with pytest.raises(OptionError, match=r"holds another job: epochs \(2 there, 3 here\)"):
        made(checkpoint=tmp_path / "kept", **options | {"epochs": 3})


# Options


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"name": "two words"}, KnobError, "A knob's name is"),
        ({"layers": []}, OptionError, "There are no layers; name"),
        ({"layers": [3]}, AdapterError, "There is no layer 3"),
        ({"layers": None, "first": 0.9, "last": 0.2}, OptionError, "0 <= first < last <= 1"),
        ({"where": "everywhere"}, UnknownName, "completion"),
        ({"where": "thinking"}, OptionError, "where='thinking' depends on tokens"),
        ({"where": "answer"}, OptionError, "where='answer' depends on tokens"),
        ({"beta": 0.0}, OptionError, "Beta lies between 0 and 1000, both excluded; got 0.0"),
        ({"learning_rates": ()}, OptionError, "at least one"),
        ({"learning_rates": (1e-3, -1.0)}, OptionError, "positive numbers"),
        ({"epochs": 0}, OptionError, "epochs counts from 1; got 0"),
        ({"patience": 1.5}, OptionError, "patience counts from 1; got 1.5"),
        ({"batch_size": True}, OptionError, "batch_size counts from 1; got True"),
        ({"weight_decay": -0.1}, OptionError, "weight decay lies between 0 and 1"),
        ({"seed": -1}, OptionError, "The seed is a whole number"),
        ({"validation": PAIRS}, PairsError, "validation prompts are training prompts too"),
        ({"validation": Pairs()}, PairsError, "at least one"),
        ({"pairs": [1]}, PairsError, "Training needs Pairs"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        made(**options)


def test_a_pair_that_the_context_cannot_hold_is_an_error() -> None:
    lm = model(max_position_embeddings=64)
    long = Pairs.from_records([{"prompt": "Long?", "chosen": "yes " * 200, "rejected": "no"}])
    with pytest.raises(PairsError, match="this model's context holds 64"):
        learn_vector(lm, tokenizer(), PAIRS, **FAST | {"validation": long})


EXERCISED: dict[str, Any] = {
    "name": "other",
    "layers": [0],
    "first": 0.1,
    "last": 1.0,
    "where": "completion",
    "validation": UNEVEN,
    "beta": 1.0,
    "learning_rates": (1e-2,),
    "epochs": 3,
    "patience": 1,
    "batch_size": 3,
    "weight_decay": 0.5,
    "seed": 4,
    "licence": "CC0",
}
APART = ("model", "tokenizer", "pairs", "checkpoint", "progress")  # what is learned from, and what changes no knob


@pytest.mark.filterwarnings("ignore:At strength 1 the chosen answers:trimtab.errors.TrimtabWarning")
@pytest.mark.parametrize("option", [name for name in inspect.signature(learn_vector).parameters if name not in APART])
def test_every_option_changes_the_knob_or_its_provenance(option: str) -> None:
    def outcome(**options: Any) -> tuple[object, ...]:
        knob = made(**{"epochs": 1, "learning_rates": (2e-2,), **options})
        known = {key: value for key, value in knob.provenance.items() if key != "created"}
        return knob.name, sorted(knob.vectors), knob.site, knob.gain, knob.where, known

    assert outcome(**{option: EXERCISED[option]}) != outcome()


# PrefWorld


def test_a_preference_of_the_bundled_world_is_learned_at_a_price_that_is_told() -> None:
    lm, words = trimtab.load("prefworld")
    pairs, test = world.pairs("concise", 24), world.pairs("concise", 16, split="validation")
    with pytest.warns(TrimtabWarning, match="chosen answers of validation are less likely") as caught:
        knob = learn_vector(lm, words, pairs, layers=[3], learning_rates=(0.4,), epochs=12, beta=0.1)
    assert [str(w.message) for w in caught] == knob.diagnostics["warnings"]
    assert knob.diagnostics["selection"]["table"][0][1] < 0.5 < START
    minus, zero, half, plus = pair_margins(lm, words, test, [{knob: s} for s in (-1, 0, 0.5, 1)])
    assert minus.margin.mean() < zero.margin.mean() < half.margin.mean() < plus.margin.mean()
    assert (minus.margin > 0).mean() < 0.5 < (plus.margin > 0).mean()
    assert half.chosen.mean() > zero.chosen.mean() > plus.chosen.mean()
