"""Weight knobs inside `steer`: a mixture per row, beside steering knobs, and a model that is as it was afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pico import ARCHITECTURES, CACHE, model, tokenizer
from trimtab.artifact import DeltaKnob, Knob, LowRank, Rack, load_knob, load_panel, save_panel
from trimtab.errors import CacheError, KnobError, OptionError
from trimtab.evals.likelihood import pair_margins
from trimtab.generate import generate
from trimtab.pairs import Pairs
from trimtab.runtime import steer
from trimtab.types import Site
from trimtab.weights import compress, difference
from trimtab.weights.rows import is_linear

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 8, 7, 6]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(lm: nn.Module, seed: int = 1, *, like: str = "_proj", rank: int = 2, name: str = "low") -> DeltaKnob:
    parts: dict[str, Any] = {}
    for i, (label, p) in enumerate(lm.named_parameters()):
        if like in label and p.dim() == 2 and "layers" in label:
            a, b = drawn(rank, p.shape[1], seed=100 * seed + i), drawn(p.shape[0], rank, seed=100 * seed + i + 50)
            parts[label] = LowRank(0.1 * a, 0.1 * b)
    return DeltaKnob(name, "planted", parts)


def direction(lm: Any, seed: int = 3) -> Knob:
    vector = drawn(lm.config.hidden_size, seed=seed)
    return Knob("way", "planted", {Site(1, "last"): vector}, {1: 1.0}, Site(1, "last"), 2.0)


def logits(lm: Any, settings: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad(), steer(lm, settings, prompt_lengths=[ids.shape[1]] * len(ids)):
        return lm(ids, use_cache=False).logits


def test_every_row_of_a_mixed_batch_equals_its_solo_run() -> None:
    lm = model()
    one, two, way = low_rank(lm), low_rank(lm, 2, like="mlp", rank=3, name="two"), direction(lm)
    settings: list[dict[Any, float]] = [{one: 1.0, way: -0.5}, {two: -2.0}, {one: 0.5, two: 1.5, way: 1.0}]
    together = logits(lm, settings)
    for row, setting in enumerate(settings):
        alone = logits(lm, setting, IDS[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-5)
        plain = logits(lm, {}, IDS[row : row + 1])
        assert not torch.allclose(together[row], plain[0], atol=1e-2)


def test_a_row_at_zero_among_others_is_the_plain_model_and_all_at_zero_bitwise_so() -> None:
    lm = model()
    knob = low_rank(lm)
    plain = logits(lm, {})
    mixed = logits(lm, [{knob: 0.0}, {knob: 1.0}, {}])
    assert torch.allclose(mixed[0], plain[0], atol=1e-6)
    assert torch.allclose(mixed[2], plain[2], atol=1e-6)
    assert torch.equal(logits(lm, {knob: 0.0}), plain)
    assert torch.equal(logits(lm, [{knob: 0.0}, {}, {}]), plain)


def test_low_rank_beside_the_weights_equals_dense_within_them() -> None:
    lm = model()
    knob, way = low_rank(lm), direction(lm)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    beside, within = logits(lm, {knob: 1.3, way: 0.4}), logits(lm, {knob.dense_copy(): 1.3, way: 0.4})
    assert torch.allclose(beside, within, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_dense_knobs_act_on_all_rows_alike_or_are_refused() -> None:
    lm = model()
    dense = low_rank(lm).dense_copy()
    assert torch.equal(logits(lm, [{dense: 1.0}] * 3), logits(lm, {dense: 1.0}))
    with pytest.raises(OptionError, match=r"Compress them"):
        logits(lm, [{dense: 1.0}, {}, {}])
    thin = compress(dense, lm, rank=2)
    assert thin.low_rank
    assert thin.diagnostics["fidelity"]["relative_error"] < 1e-5
    mixed = logits(lm, [{thin: 1.0}, {}, {}])
    assert torch.allclose(mixed[0], logits(lm, {dense: 1.0})[0], atol=1e-4)


def test_nothing_is_left_on_the_model_and_set_changes_the_mixture() -> None:
    lm = model()
    low, dense = low_rank(lm), low_rank(lm, 2, name="dense").dense_copy()
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    plain = logits(lm, {})
    with torch.no_grad(), steer(lm, {low: 1.0, dense: 0.5}) as steering:
        first = lm(IDS, use_cache=False).logits
        steering.set({low: -1.0})
        assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
        second = lm(IDS, use_cache=False).logits
    assert not torch.allclose(first, second, atol=1e-2)
    with pytest.raises(RuntimeError, match="inside"), steer(lm, {low: 1.0, dense: 1.0}):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    assert torch.equal(logits(lm, {}), plain)
    assert not any(m._forward_hooks for m in lm.modules())


def test_beams_and_samples_keep_their_rows_mixture() -> None:
    lm = model()
    knob = low_rank(lm)
    settings: list[dict[Any, float]] = [{knob: 2.0}, {}]
    options: Any = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones(2, 4)}
    with torch.no_grad():
        with steer(lm, settings):
            together = lm.generate(IDS[:2], **options)
        for row, setting in enumerate(settings):
            with steer(lm, setting):
                options["attention_mask"] = torch.ones(1, 4)
                alone = lm.generate(IDS[row : row + 1], **options)
            assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_a_cache_made_under_other_weights_is_refused() -> None:
    lm = model()
    one, two = low_rank(lm), low_rank(lm, 2)  # of one name
    for knob in (one, one.dense_copy()):
        with torch.no_grad(), steer(lm, {knob: 1.0}):
            cache = lm(IDS, use_cache=True)[CACHE]
        with torch.no_grad(), steer(lm, {two: 1.0}), pytest.raises(CacheError):
            lm(IDS[:, :1], **{CACHE: cache}, use_cache=True)


def test_what_is_no_linear_layer_and_other_models_are_refused() -> None:
    lm = model()
    name, weight = next((n, p) for n, p in lm.named_parameters() if "embed" in n)
    part = LowRank(drawn(2, weight.shape[1]), drawn(weight.shape[0], 2))
    embedding = DeltaKnob("e", "m", {name: part})
    with pytest.raises(KnobError, match="no linear layer"), steer(lm, {embedding: 1.0}):
        pass
    assert not torch.allclose(logits(lm, {embedding.dense_copy(): 1.0}), logits(lm, {}), atol=1e-2)
    with pytest.raises(KnobError, match="lacks 1 of them"), steer(lm, {DeltaKnob("x", "m", {"w": drawn(2)}): 1.0}):
        pass


def test_rows_get_no_values_that_are_not_finite() -> None:
    lm = model()
    knob = low_rank(lm)
    name = next(iter(knob.parts))
    bad = DeltaKnob("bad", "m", {name: LowRank(torch.full_like(knob.parts[name].a, torch.nan), knob.parts[name].b)})  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KnobError, match="not finite"), steer(lm, {bad: 1.0}):
        pass


def test_generation_and_margins_take_weight_knobs_by_name_per_row(tmp_path: Path) -> None:
    lm, words = model(), tokenizer()
    low = low_rank(lm, name="low")
    low.save(tmp_path / "low.knob.safetensors")
    save_panel(tmp_path / "panel.json", {"low": (tmp_path / "low.knob.safetensors", 1.5)})
    panel = load_panel(tmp_path / "panel.json")
    assert isinstance(panel.rack["low"], DeltaKnob)
    assert load_knob(tmp_path / "low.knob.safetensors").digest == low.digest  # pyright: ignore[reportAttributeAccessIssue]
    rack = Rack(low=tmp_path / "low.knob.safetensors", way=direction(lm))
    settings: list[Any] = [{"low": 3.0, "way": 1.0}, {"low": -3.0}, {}]
    made = generate(lm, words, ["Hello"] * 3, rack=rack, knobs=settings, max_new_tokens=6, strict=None)
    solo = [generate(lm, words, ["Hello"], rack=rack, knobs=one, max_new_tokens=6, strict=None)[0] for one in settings]
    assert [m.text for m in made] == [s.text for s in solo]
    pairs = Pairs.from_records([{"prompt": "Q?", "chosen": "yes", "rejected": "no, never"}])
    margins = [m.margin[0] for m in pair_margins(lm, words, pairs, [{}, {low: 1.0}, {low: -1.0}])]
    assert len({round(float(m), 4) for m in margins}) == 3


def test_a_card_and_the_cli_tell_of_a_weight_knob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab.cli import main

    lm = model()
    low_rank(lm, name="low").save(tmp_path / "low.knob.safetensors")
    assert main(["inspect", str(tmp_path / "low.knob.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "low (delta, planted)" in said
    assert "21 of rank 2\n" in said


def test_compression_stores_how_far_the_model_strays_on_a_probe_set() -> None:
    lm = model()
    knob = low_rank(lm, rank=3).dense_copy()
    found = [compress(knob, lm, rank=rank, probe=[*IDS]).diagnostics["fidelity"] for rank in (3, 2, 1)]
    assert found[0]["kl"] < 1e-6
    assert found[0]["kl"] < found[1]["kl"] < found[2]["kl"]
    assert found[0]["kl_tokens"] == IDS.numel()
    with torch.no_grad(), steer(lm, {knob: 1.0}):
        wanted = lm(IDS).logits.double().log_softmax(-1)
    with torch.no_grad(), steer(lm, {compress(knob, lm, rank=1): 1.0}):
        other = lm(IDS).logits.double().log_softmax(-1)
    by_hand = float((wanted.exp() * (wanted - other)).sum() / IDS.numel())
    assert found[2]["kl"] == pytest.approx(by_hand, rel=1e-3)
    assert "kl" not in compress(knob, lm, rank=1).diagnostics["fidelity"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_layers_are_those_whose_output_the_model_uses(name: str) -> None:
    lm = model(name)
    called: set[str] = set()
    for path, module in lm.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    with torch.no_grad():
        lm(IDS, use_cache=False)
    labels = [label for label, _ in lm.named_parameters(remove_duplicate=False)]
    linear = [label.rpartition(".")[0] for label in labels if is_linear(lm, label)]
    layers = {path for path, module in lm.named_modules() if isinstance(module, nn.Linear)}
    assert layers & called <= {*linear}
    # An expert may get no token.
    assert [path for path in linear if path not in called and "expert" not in path] == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_on_every_linear_layer_steers_where_one_of_them_is_never_called(tmp_path: Path) -> None:
    lm: Any = model("jamba")
    config = LoraConfig(target_modules="all-linear", r=2, lora_alpha=4, task_type="CAUSAL_LM")
    peft: Any = get_peft_model(lm, config)
    with torch.no_grad():
        for label, parameter in peft.named_parameters():
            if "lora_B" in label and "dt_proj" not in label:  # which no gradient reaches
                parameter.copy_(0.1 * drawn(*parameter.shape))
        wanted = peft(IDS, use_cache=False).logits
    peft.save_pretrained(tmp_path)
    knob = difference(tmp_path, name="k")
    assert knob.low_rank
    assert not any("dt_proj" in label for label in knob.parts)
    assert torch.allclose(logits(model("jamba"), [{knob: 1.0}] * len(IDS)), wanted, atol=1e-5)


def test_a_layer_that_lends_its_weight_and_is_never_called_is_refused() -> None:
    lm = model("mamba")
    knob = low_rank(lm, like="dt_proj")
    assert knob.parts
    with pytest.raises(KnobError, match="a layer that is never called"), steer(lm, {knob: 1.0}):
        pass
    assert not torch.equal(logits(lm, {knob.dense_copy(): 1.0}), logits(lm, {}))
    other = low_rank(lm, like="x_proj")
    both = DeltaKnob("both", "planted", {**knob.parts, **other.parts})
    made = compress(both.dense_copy(), lm, rank=2)
    assert sorted(made.parts) == sorted(other.parts)
    assert made.diagnostics["fidelity"]["left_out"] == sorted(knob.parts)
