"""Learning: planted truth is found, selection rules choose as they say, warnings name what to distrust."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pico
from trimtab import learn as exported
from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.capture import Evidence, capture
from trimtab.errors import AdapterError, KnobError, OptionError, PairsError, TrimtabWarning, UnknownName
from trimtab.learn import learn
from trimtab.methods import METHODS
from trimtab.ops import alpha_from_palrs, cosine, describe_site
from trimtab.pairs import Pairs
from trimtab.runtime import steer
from trimtab.selection import layers_between, rank_sites
from trimtab.types import Message, Pair, Site

SLOT = Site(1, "post_instruction[-1]")


def pairs(n: int = 8) -> Pairs:
    """Pairs whose answers differ in one character and not in length."""
    return Pairs(Pair((Message("user", f"q{i}"),), f"answer! {i}", f"answer? {i}") for i in range(n))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico.model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pico.tokenizer()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plant(monkeypatch: pytest.MonkeyPatch, chosen: Tensor, rejected: Tensor, sites: list[Site], **more: Any) -> None:
    """Make learning read these activations `[N, S, D]` instead of the model's."""
    norms = {site.layer: 10.0 for site in sites}
    lengths = more.pop("lengths", torch.full((len(chosen), 2), 7))
    both, kept = torch.stack([chosen, rejected]).double(), torch.arange(len(chosen))
    evidence = Evidence(
        tuple(sites), chosen, rejected, norms, lengths, "response_as_user", 99, both.mean(1), both, kept, shared=False
    )
    monkeypatch.setattr(inspect.getmodule(learn), "capture", lambda *_, **__: evidence)


@contextmanager
def liking(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, delta: Tensor, layer: int) -> Generator[None]:
    """Add `delta` at `layer` to every sequence with an exclamation mark."""
    mark, rows = tokenizer.convert_tokens_to_ids("!"), []

    def look(_module: object, args: tuple[Tensor, ...]) -> None:
        rows[:] = [(args[0] == mark).any(dim=1)]

    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    with Adapter(model).write({layer: lambda hidden: hidden + rows[0][:, None, None] * delta}):
        yield
    handle.remove()


# Planted truth


@pytest.mark.parametrize("method", ["palrs", "diffmean", "pca"])
def test_preference_planted_in_a_model_is_recovered(
    method: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    delta = 60 * noise(0, pico.WIDTH) / pico.WIDTH**0.5
    with liking(model, tokenizer, delta, layer=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        knob = learn(model, tokenizer, pairs(), method=method, layers=[0, 1])
    assert knob.site.layer == 1
    assert cosine(knob.direction, delta) > 0.99
    assert knob.addend(1.0).norm().item() == pytest.approx(delta.norm().item(), rel=0.1)
    assert knob.method == method


@pytest.mark.parametrize("selection", ["eq3_cosine", "max_relative_norm", "probe_auc"])
def test_selection_finds_the_planted_site(
    selection: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [Site(layer, f"post_instruction[-{k}]") for layer in (0, 1, 2) for k in (2, 1)]
    rejected = 3 + noise(0, 40, 6, 32)
    chosen = 3 + noise(1, 40, 6, 32)
    delta = 4 * noise(2, 32)
    delta += 4  # along the mean activation too, as Eq. 3 asks
    chosen[:, 3] += delta
    plant(monkeypatch, chosen, rejected, sites)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        knob = learn(model, tokenizer, pairs(), selection=selection)
    assert knob.site == sites[3]
    assert cosine(knob.direction, delta) > 0.99
    assert knob.diagnostics["selection"]["table"][0][0] == str(sites[3])


def test_sites_where_the_difference_is_rounding_are_never_chosen() -> None:
    same, other = noise(0, 9, 8) + 5, noise(1, 9, 8) + 5
    statistics = {
        Site(0, "a"): describe_site(same, same * (1 - 1e-8)),  # cosine 1, if rounding were a signal
        Site(1, "a"): describe_site(same, other),
    }
    for rule in ("eq3_cosine", "max_relative_norm", "probe_auc"):
        ranked = rank_sites(statistics, rule)
        assert [r.site.layer for r in ranked] == [1, 0]
        assert ranked[1].score is None
    with pytest.raises(PairsError, match="same activations at all 1 candidate sites"):
        rank_sites({Site(0, "a"): describe_site(same, same)}, "eq3_cosine")


def test_equal_scores_go_to_the_lowest_layer() -> None:
    values = describe_site(noise(0, 9, 8), noise(1, 9, 8))
    sites = [Site(2, "a"), Site(1, "b"), Site(1, "a")]
    assert [r.site for r in rank_sites(dict.fromkeys(sites, values), "probe_auc")] == sorted(sites)


def test_norm_gap_wins_under_eq3_with_a_warning_and_loses_under_relative_norm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [Site(0, "post_instruction[-1]"), Site(1, "post_instruction[-1]")]
    base = 5 * noise(0, 32) + 0.1 * noise(1, 30, 2, 32)
    gap, turn = 0.8 * base[:, 0], base[:, 1] + 2 * noise(2, 32)
    plant(monkeypatch, base, torch.stack([gap, turn], dim=1), sites)
    with pytest.warns(TrimtabWarning, match="mostly a rescaling of the mean activation"):
        trapped = learn(model, tokenizer, pairs())
    assert trapped.site == sites[0]
    assert "rescaling" in trapped.diagnostics["warnings"][0]
    assert "rescaling" in trapped.card()
    assert learn(model, tokenizer, pairs(), selection="max_relative_norm").site == sites[1]


# What is stored


def test_every_candidate_site_is_stored_with_its_diagnostics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    knob = learn(model, tokenizer, pairs(), name="mark", licence="CC0", seed=3)
    expected = {Site(layer, f"post_instruction[-{k}]") for layer in (0, 1) for k in (1, 2, 3, 4)}
    assert set(knob.vectors) == expected
    assert set(knob.diagnostics["sites"]) == set(map(str, expected))
    for site in expected:
        values = knob.diagnostics["sites"][str(site)]
        assert values["r_norm"] == pytest.approx(knob.vectors[site].norm().item(), rel=1e-5)
        assert {"mu_plus_norm", "mu_minus_norm", "angle", "relative_norm", "cos_r_mu", "top5_share", "probe_auc",
                "pairwise_cosine", "split_half_cosine"} <= set(values)  # fmt: skip
    selection = knob.diagnostics["selection"]
    assert selection["rule"] == "eq3_cosine"
    assert len(selection["table"]) == len(expected)
    assert knob.diagnostics["mean_lengths"] == {"chosen": 9.0, "rejected": 9.0}
    knob.save(tmp_path / "k")
    back = Knob.load(tmp_path / "k")
    assert back.provenance == knob.provenance
    assert back.diagnostics == knob.diagnostics
    back.check(model, tokenizer)


def test_provenance_holds_every_option_passed_and_defaulted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    knob = learn(model, tokenizer, pairs(), method="random", name="n", licence="CC0", seed=3)
    known = knob.provenance
    assert (known["licence"], known["pairs_count"], known["pairs_hash"]) == ("CC0", 8, pairs().hash())
    assert known["tool"].startswith("trimtab ")
    assert json.dumps(dict(known))
    own = {"model", "tokenizer", "pairs", "method", "name", "site", "options", "licence", "checkpoint"}
    own |= {"progress", "team"}
    assert set(known["options"]) == set(inspect.signature(learn).parameters) - own
    assert known["options"]["seed"] == 3
    assert known["options"]["layers"] == [0, 1]


@pytest.mark.parametrize(
    ("scale", "length"),
    [("raw", "r_norm"), ("mean_chosen_norm", "mu_plus_norm"), ("mean_residual_norm", None)],
)
def test_strength_one_before_tuning_is_what_scale_says(
    scale: Any, length: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    knob = learn(model, tokenizer, pairs(), scale=scale)
    norm = knob.norms[knob.site.layer]
    expected = knob.diagnostics["sites"][str(knob.site)][length] if length else norm
    assert knob.addend(1.0).norm().item() == pytest.approx(expected, rel=1e-5)
    assert knob.gain == pytest.approx(expected / norm)
    if scale == "raw":
        torch.testing.assert_close(knob.addend(1.0), knob.vectors[knob.site])
    if scale == "mean_chosen_norm":
        assert knob.alpha(0.8) == pytest.approx(alpha_from_palrs(0.8, expected, norm))


def test_palrs_read_as_caa_reads_equals_the_plain_difference_of_means(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = Pairs(Pair((Message("user", f"q{i}" * i),), "yes " * i + "A", "no " * i + "B") for i in range(1, 6))
    knob = learn(model, tokenizer, data, format="question_response", positions="last", selection="fixed", site="1/last")
    seen: list[Tensor] = []
    with Adapter(model).read([1]) as reading, torch.no_grad():
        for answer in ("chosen", "rejected"):
            for pair in data:
                turn = [{"role": "user", "content": pair.prompt[0].content}]
                text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
                text += getattr(pair, answer)
                model(input_ids=tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids)
                seen.append(reading.acts[1][0, -1].double())
    expected = torch.stack(seen[:5]).mean(0) - torch.stack(seen[5:]).mean(0)
    torch.testing.assert_close(knob.addend(1.0).double(), expected, atol=2e-5, rtol=1e-4)
    caa = learn(model, tokenizer, data, method="diffmean", site="1/last")
    assert torch.equal(caa.vectors[Site(1, "last")], knob.vectors[Site(1, "last")])


def test_learned_knob_steers_the_model_by_what_it_says(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    knob = learn(model, tokenizer, pairs(), where="all")
    ids = torch.tensor([tokenizer.encode("hello")])
    layer, acts = knob.site.layer, []
    with Adapter(model).read([layer]) as reading, torch.no_grad():
        for strength in (0.0, 1.5):
            with steer(model, {knob: strength}):
                model(input_ids=ids)
            acts.append(reading.acts[layer])
        model(input_ids=ids)
    assert torch.equal(acts[0], reading.acts[layer])
    torch.testing.assert_close(acts[1] - acts[0], knob.addend(1.5).expand_as(acts[0]), atol=1e-5, rtol=1e-4)


# Options


def test_layers_are_kept_by_the_fraction_of_depth_in_which_they_lie() -> None:
    assert layers_between(10, 0.0, 0.8) == [*range(8)]
    assert layers_between(5, 0.0, 0.8) == [0, 1, 2, 3]
    assert layers_between(32, 0.25, 0.5) == [*range(8, 16)]
    assert layers_between(3, 0.0, 1.0) == [0, 1, 2]
    with pytest.raises(OptionError, match="No layer of 2 lies between"):
        layers_between(2, 0.3, 0.6)
    for first, last in ((-0.1, 1), (0.5, 0.5), (0, 1.1)):
        with pytest.raises(OptionError, match="0 <= first < last <= 1"):
            layers_between(4, first, last)


def test_candidates_follow_layers_fractions_and_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def sites(**options: Any) -> set[str]:
        return set(map(str, learn(model, tokenizer, pairs(), **options).vectors))

    last = "post_instruction[-1]"
    assert sites(positions=last, last=1.0) == {f"{layer}/{last}" for layer in (0, 1, 2)}
    assert sites(positions=last, first=0.3, last=0.7) == {f"1/{last}"}
    assert sites(positions=last, layers=[-1]) == {f"2/{last}"}
    assert sites(positions=["last", "demonstrated"], layers=[0]) == {"0/last", "0/demonstrated"}
    assert sites(positions="response_end", layers=[0]) == {"0/response_end[-1]", "0/response_end[-2]"}
    assert sites(format="question_response", layers=[0]) == {"0/response_end[-1]", "0/response_end[-2]"}
    assert sites(method="diffmean", layers=[0]) == {"0/last"}
    assert sites(method="diffmean", positions=last, layers=[0]) == {f"0/{last}"}
    assert sites(site=f"2/{last}") == {f"{layer}/{last}" for layer in (0, 1, 2)}


def test_fixed_site_is_taken_whatever_the_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    free = learn(model, tokenizer, pairs())
    worst = free.diagnostics["selection"]["table"][-1][0]
    fixed = learn(model, tokenizer, pairs(), selection="fixed", site=worst, positions="post_instruction")
    assert str(fixed.site) == worst != str(free.site)
    assert torch.equal(fixed.vectors[fixed.site], free.vectors[fixed.site])
    assert learn(model, tokenizer, pairs(), site=Site(-1, "demonstrated")).site == Site(2, "demonstrated")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "diffmeans"}, UnknownName, "Unknown method 'diffmeans'.*Did you mean 'diffmean'"),
        ({"selection": "validation"}, OptionError, r"trimtab\.tune"),
        ({"selection": "best"}, UnknownName, "Unknown selection 'best'"),
        ({"selection": "fixed"}, OptionError, "selection='fixed' needs a site"),
        ({"selection": "probe_auc", "site": "1/last"}, OptionError, "A site goes with selection='fixed'"),
        ({"site": "1/last", "layers": [0]}, UnknownName, "Unknown site '1/last'. Known: 0/last"),
        ({"site": "1/last", "positions": "response_mean"}, UnknownName, "Unknown site '1/last'"),
        ({"site": 4}, OptionError, "A site is a layer with a position, as in '4/last'; got 4"),
        ({"first": "a"}, OptionError, "first must be a number; got 'a'"),
        ({"token_budget": "x"}, OptionError, "token_budget is a whole number, 1 or more; got 'x'"),
        ({"token_budget": math.nan}, OptionError, "token_budget is a whole number"),
        ({"token_budget": True}, OptionError, "token_budget is a whole number"),
        ({"scale": "big"}, UnknownName, "Unknown scale 'big'"),
        ({"where": "nowhere"}, UnknownName, "Unknown where"),
        ({"length_match": "on"}, UnknownName, "Unknown length_match"),
        ({"format": "chat"}, UnknownName, "Unknown format 'chat'"),
        ({"options": {"center": True}}, UnknownName, "Unknown option of method palrs 'center'. Known: equal_weight"),
        ({"name": "a b"}, KnobError, "no space"),
        ({"positions": "post_instruction", "format": "question_response"}, OptionError, "come before the answer"),
    ],
)
def test_bad_option_is_an_error_that_says_what_would_work(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(error, match=message):
        learn(model, tokenizer, pairs(), **options)


def test_probe_auc_needs_four_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PairsError, match="probe_auc needs at least 4"):
        learn(model, tokenizer, pairs(3), selection="probe_auc")


def test_options_and_seed_reach_the_method(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def vector(method: str, **options: Any) -> Tensor:
        return learn(model, tokenizer, pairs(), method=method, site=SLOT, **options).vectors[SLOT]

    assert not torch.allclose(vector("pca"), vector("pca", options={"center": True}))
    assert not torch.allclose(vector("random"), vector("random", seed=1))
    assert torch.equal(vector("random", seed=1), vector("random", options={"seed": 1}))


def test_token_budget_does_not_change_the_knob(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    small, large = (learn(model, tokenizer, pairs(), token_budget=budget) for budget in (1, 9999))
    assert small.site == large.site
    torch.testing.assert_close(small.addend(1.0), large.addend(1.0), atol=2e-5, rtol=1e-4)


def test_without_a_template_answers_are_read_after_their_prompts_with_a_warning(model: PreTrainedModel) -> None:
    plain = pico.tokenizer(chat=False)
    with pytest.warns(TrimtabWarning, match="no chat template") as caught:
        knob = learn(model, plain, pairs())
    assert caught[0].filename == __file__
    assert {site.position for site in knob.vectors} == {"last"}
    assert knob.provenance["options"]["format"] == "question_response"
    assert learn(model, plain, pairs(), format="question_response").site == knob.site


# Lengths


def uneven(n: int = 12) -> Pairs:
    """Pairs with a long chosen answer, every third of them with one as long as the rejected."""
    answers = [("short!" if i % 3 == 0 else "rather longer!" + "x" * i, "short?") for i in range(n)]
    return Pairs(Pair((Message("user", f"q{i}"),), c, r) for i, (c, r) in enumerate(answers))


def test_answers_of_different_length_are_a_warning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.warns(TrimtabWarning, match=r"Chosen answers have 15\.3 tokens on average and rejected ones 6\.0"):
        learn(model, tokenizer, uneven(), selection="max_relative_norm")


def test_length_buckets_keep_pairs_of_equal_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    knob = learn(model, tokenizer, uneven(), length_match="bucket")
    assert knob.provenance["pairs_count"] == 4
    assert knob.diagnostics["pairs_left_out"] == 8
    assert knob.diagnostics["mean_lengths"] == {"chosen": 6.0, "rejected": 6.0}
    assert knob.provenance["pairs_hash"] == Pairs(uneven()[i] for i in (0, 3, 6, 9)).hash()
    with pytest.raises(PairsError, match="Use length_match='regress'"):
        learn(model, tokenizer, uneven()[1:3], length_match="bucket")


def test_length_regression_removes_a_length_effect_and_keeps_the_preference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    preference, length = torch.eye(32)[0] * 3, torch.eye(32)[1]
    lengths = torch.randint(5, 30, (80, 2), generator=torch.Generator().manual_seed(0)) + torch.tensor([20, 0])
    acts = [2 + 0.05 * noise(i, 80, 1, 32) + lengths[:, i, None, None] * length for i in (0, 1)]
    plant(monkeypatch, acts[0] + preference, acts[1], [SLOT], lengths=lengths)
    with pytest.warns(TrimtabWarning, match="may steer length"):
        raw = learn(model, tokenizer, pairs(), site=SLOT)
    matched = learn(model, tokenizer, pairs(), site=SLOT, length_match="regress")
    assert cosine(raw.direction, preference) < 0.3
    assert cosine(matched.direction, preference) > 0.99


def test_a_regression_on_lengths_that_never_vary_says_that_it_changed_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    fixed = Pairs(Pair((Message("user", f"q{i}"),), f"a long answer {i}", f"short {i}") for i in range(8))
    with pytest.warns(TrimtabWarning) as caught:
        knob = learn(model, tokenizer, fixed, length_match="regress", selection="max_relative_norm")
    assert [str(w.message) for w in caught] == knob.diagnostics["warnings"]
    assert any("length_match='regress' changed nothing" in note for note in knob.diagnostics["warnings"])
    assert any("may steer length" in note for note in knob.diagnostics["warnings"])


def test_a_steered_model_is_not_learned_from(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    turned = learn(model, tokenizer, pairs(), site=SLOT)
    with (
        steer(model, {turned: 1.0}),
        pytest.raises(AdapterError, match="is being steered, and learning would see it so"),
    ):
        learn(model, tokenizer, pairs(), site=SLOT)
    with steer(model, {turned: 0.0}):
        again = learn(model, tokenizer, pairs(), site=SLOT)
    assert torch.equal(again.vectors[again.site], turned.vectors[turned.site])


def test_massive_activations_are_a_warning_in_wide_models_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width, warned in ((128, True), (32, False)):
        acts = noise(0, 20, 1, width)
        acts[..., 3] += 1000
        plant(monkeypatch, acts + 0.3 * noise(1, width), acts, [SLOT])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            learn(model, tokenizer, pairs())
        assert any("Five coordinates hold 100%" in str(w.message) for w in caught) == warned


EXERCISED: dict[str, Any] = {
    "method": "pca",
    "name": "other",
    "format": "question_response",
    "positions": "last",
    "layers": [2],
    "first": 0.3,
    "last": 1.0,
    "selection": "max_relative_norm",
    "site": "2/demonstrated",
    "scale": "mean_chosen_norm",
    "loss": "sft",
    "where": "completion",
    "length_match": "regress",
    "options": {"seed": 4},
    "seed": 5,
    "token_budget": 1,
    "licence": "CC0",
}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.of_means])
def test_methods_of_means_keep_few_pairs_and_learn_from_all(
    method: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(model, tokenizer, pairs(), method=method)
    read, kept = capture, list[int | None]()

    def counted(*args: Any, keep: int | None = None, **options: Any) -> Evidence:
        kept.append(keep)
        return read(*args, keep=keep, **options)

    monkeypatch.setattr(inspect.getmodule(learn), "capture", counted)
    monkeypatch.setattr(inspect.getmodule(learn), "KEPT", 4)
    few = learn(model, tokenizer, pairs(), method=method)
    assert kept == [4]
    assert few.site == whole.site
    for site, vector in whole.vectors.items():
        torch.testing.assert_close(few.vectors[site], vector, rtol=1e-5, atol=1e-7)
        for name in ("r_norm", "mu_plus_norm", "cos_r_mu", "relative_norm"):
            found, expected = (knob.diagnostics["sites"][str(site)][name] for knob in (few, whole))
            assert found == pytest.approx(expected, rel=1e-5)
    assert few.norms == whole.norms
    assert (few.diagnostics["pairs_kept"], whole.diagnostics["pairs_kept"]) == (4, 8)


def test_methods_of_single_pairs_keep_them_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[dict[str, Any]] = [
        {"method": "pca"},
        {"method": "icv"},
        {"method": "diffmean", "options": {"equal_weight": True}},
        {"method": "diffmean", "length_match": "regress"},
    ]
    whole = [learn(model, tokenizer, pairs(), **way) for way in ways]
    monkeypatch.setattr(inspect.getmodule(learn), "KEPT", 4)
    for way, knob in zip(ways, whole, strict=True):
        again = learn(model, tokenizer, pairs(), **way)
        assert all(torch.equal(again.vectors[site], vector) for site, vector in knob.vectors.items())


APART = (
    "model",
    "tokenizer",
    "pairs",
    "checkpoint",
    "progress",
    "team",
)  # what is learned from, and what changes no knob


def test_progress_reaches_the_number_of_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    learn(model, tokenizer, pairs(), token_budget=100, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (seen[0][1], seen[0][1])


@pytest.mark.parametrize("option", [name for name in inspect.signature(learn).parameters if name not in APART])
def test_every_option_changes_the_knob_or_its_provenance(
    option: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def outcome(**options: Any) -> tuple[object, ...]:
        method = "cold-kernel" if option == "loss" else "random"
        knob = learn(model, tokenizer, uneven()[::3], **{"method": method, **options})
        known = {key: value for key, value in knob.provenance.items() if key != "created"}
        return knob.name, knob.method, sorted(knob.vectors), knob.site, knob.gain, knob.where, known

    assert outcome() == outcome()
    assert outcome(**{option: EXERCISED[option]}) != outcome()


def test_the_package_exports_the_function() -> None:
    assert exported is learn


@pytest.mark.parametrize(
    ("method", "options"),
    [("palrs", {}), ("diffmean", {"positions": "response_mean"}), ("cold-kernel", {})],
)
def test_the_default_dtype_of_the_process_plays_no_part(method: str, options: dict[str, Any]) -> None:
    lm, words = pico.model(), pico.tokenizer()
    records = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]

    def learned() -> Knob:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)
            return learn(lm, words, Pairs.from_records(records), method=method, **options)

    wanted = learned()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = learned()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.vectors[wanted.site].dtype == torch.float32
    assert torch.equal(found.vectors[wanted.site], wanted.vectors[wanted.site])


def test_a_knob_remembers_so_many_prompts_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.checkpoint.MOST_HASHES", 3)
    records = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        knob = learn(pico.model(), pico.tokenizer(), Pairs.from_records(records))
    assert knob.provenance["prompt_hashes"] == Pairs.from_records(records).prompt_hashes()[:3]
