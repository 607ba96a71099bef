"""Exports: what is exact is written and read again, everything else refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import pico
from pico import knob, model, tokenizer
from trimtab.artifact import DeltaKnob, LookaheadKnob, LowRank
from trimtab.cli import main
from trimtab.cli.export import FORMS
from trimtab.errors import AdapterError, KnobError, MissingDependency, OptionError, TrimtabWarning, UnknownName
from trimtab.exchange import EXPORTS, export, import_knob
from trimtab.exchange import checkpoint as checkpoints
from trimtab.exchange.bias import find_place
from trimtab.exchange.constant import RECORD, constant
from trimtab.exchange.gguf import read_control_vector, write_control_vector
from trimtab.exchange.lora import low_rank_sum
from trimtab.render import Loaded, load_empty
from trimtab.runtime import steer
from trimtab.types import WHERE, Site

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # which PEFT asks for
    "ignore:`lora_bias=True` was passed:peft.utils.warning.PeftWarning",  # such an adapter cannot be merged
)
WORDS = tokenizer()
IDS = torch.tensor(pico.prompts([7, 7]))


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    return lm(input_ids=IDS, use_cache=False).logits


def steered(lm: PreTrainedModel, dose: dict[Any, float]) -> Tensor:
    with steer(lm, dose):
        return logits(lm)


def plain(folder: Path) -> Tensor:
    """Logits of a folder as anybody's transformers loads it."""
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def low_rank(seed: int = 0, *, ranks: tuple[int, int] = (2, 3), name: str = "low") -> DeltaKnob:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 64)}
    own = dict(model().named_parameters())
    parts: dict[str, Any] = {}
    for (place, _), rank in zip(shapes.items(), ranks, strict=True):
        out, inner = own[f"model.layers.1.{place}.weight"].shape
        a, b = torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)
        parts[f"model.layers.1.{place}.weight"] = LowRank(0.3 * a, 0.3 * b)
    return DeltaKnob(name, "delta", parts)


# --- what is exact ---------------------------------------------------------------------------------------------------

BAKED = "llama granite gpt2 gpt_neox phi starcoder2 opt falcon bloom gptj qwen2".split()


@pytest.mark.parametrize("name", BAKED)
def test_a_baked_checkpoint_is_the_steered_model(name: str, tmp_path: Path) -> None:
    lm, dose = model(name), {knob(0): 0.5, knob(1): -1.0, knob(1, seed=3): 0.25}
    made = export(dose, lm, WORDS, to="checkpoint", out=tmp_path / "baked")
    wanted, bare = steered(lm, dose), logits(lm)
    assert float((plain(tmp_path / "baked") - wanted).abs().max()) < 1e-5
    assert float((wanted - bare).abs().max()) > 0.01
    assert made.facts["layers"] == [0, 1]
    assert made.facts["error"] < 1e-5 < 0.1 < made.facts["effect"]
    assert torch.equal(logits(lm), bare)  # the model itself is as it was


def test_a_qwen2_and_a_mistral_become_the_llamas_that_they_are(tmp_path: Path) -> None:
    for name, changes in (("qwen2", {}), ("mistral", {"sliding_window": None})):
        lm = model(name, **changes)
        export({knob(2): 1.0}, lm, WORDS, to="checkpoint", out=tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
        torch.testing.assert_close(plain(tmp_path / name), steered(lm, {knob(2): 1.0}), atol=1e-5, rtol=1e-4)


def test_a_window_keeps_a_mistral_from_being_a_llama(tmp_path: Path) -> None:
    with pytest.raises(KnobError, match="has no bias"):
        export({knob(1): 1.0}, model("mistral", sliding_window=4), WORDS, to="checkpoint", out=tmp_path / "x")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "exaone4", "mixtral"])
def test_blocks_that_end_in_a_norm_or_a_gate_are_not_baked(name: str, tmp_path: Path) -> None:
    with pytest.raises(KnobError, match="there is a norm or a gate behind its last layer"):
        export({knob(1): 1.0}, model(name), WORDS, to="checkpoint", out=tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_what_a_block_scales_is_divided_out(tmp_path: Path) -> None:
    """Granite multiplies what its MLP puts out before it adds it to the stream."""
    from trimtab.adapter import Adapter

    place = find_place(Adapter(model("granite", residual_multiplier=0.25)), 1)
    assert place.module.endswith("mlp.down_proj")
    assert place.factor == pytest.approx(0.25, rel=1e-3)


def test_differences_are_added_beside_vectors_and_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    lm, dense = model(), low_rank().dense_copy().with_(name="dense")
    dose: dict[Any, float] = {low_rank(): 0.5, dense: -0.2, knob(1): 1.0}
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    export(dose, lm, WORDS, to="checkpoint", out=tmp_path / "baked")
    torch.testing.assert_close(plain(tmp_path / "baked"), steered(lm, dose), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    record = json.loads((tmp_path / "baked" / RECORD).read_text())
    assert [(entry["name"], entry["strength"]) for entry in record["knobs"]] == [
        ("low", 0.5),
        ("dense", -0.2),
        ("pico", 1),
    ]
    assert (tmp_path / "baked" / "tokenizer.json").is_file()


def test_sixteen_bits_are_baked_within_their_rounding(tmp_path: Path) -> None:
    lm = model(dtype=torch.bfloat16)
    made = export({knob(1): 1.0}, lm, WORDS, to="checkpoint", out=tmp_path / "baked")
    assert 0 < made.facts["error"] < 0.1 * made.facts["effect"]


def test_what_does_not_come_out_as_meant_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(found: Any, places: Any, zeros: Any, model: Any) -> Any:
        return zeros

    monkeypatch.setattr(checkpoints, "_biases", forgetful)
    with pytest.raises(KnobError, match="is not the steered model"):
        export({knob(1): 1.0}, model(), WORDS, to="checkpoint", out=tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "load", lambda *args, **options: Loaded(model(seed=1, mlp_bias=True), WORDS))
    with pytest.raises(KnobError, match="was written otherwise than it was meant"):
        export({knob(1): 1.0}, model(), WORDS, to="checkpoint", out=tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_difference_of_the_very_bias_that_holds_a_vector_is_kept(tmp_path: Path) -> None:
    lm, place = model("gpt2"), "transformer.h.1.mlp.c_proj.bias"
    delta = DeltaKnob("bias", "delta", {place: torch.linspace(-1, 1, 32)})
    dose: dict[Any, float] = {delta: 1.0, knob(1): 1.0}
    export(dose, lm, WORDS, to="checkpoint", out=tmp_path / "baked")
    torch.testing.assert_close(plain(tmp_path / "baked"), steered(lm, dose), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2", "glm4", "mixtral"])
@pytest.mark.parametrize("to", ["peft", "checkpoint"])
def test_sixteen_bits_and_a_long_stream_hide_no_norm_and_no_gate(name: str, to: str, tmp_path: Path) -> None:
    """Beside a long residual stream what a block adds is small, and in 16 bits less than rounding."""
    lm = model(name, dtype=torch.bfloat16)
    with torch.no_grad():
        lm.get_input_embeddings().weight.mul_(1000)
    with pytest.raises(KnobError, match="there is a norm or a gate behind its last layer"):
        export({knob(1): 1.0}, lm, WORDS, to=to, out=tmp_path / "x")


def test_a_dose_that_drowns_in_rounding_is_warned_of(tmp_path: Path) -> None:
    lm = model(dtype=torch.bfloat16)
    with pytest.warns(TrimtabWarning, match="drowns in rounding"):
        export({knob(1): 1e-3}, lm, WORDS, to="checkpoint", out=tmp_path / "baked")


def test_other_dtypes_and_models_without_weights_have_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KnobError, match=r"computes in torch\.float64"):
        export({knob(1): 1.0}, model(dtype=torch.float64), WORDS, to="checkpoint", out=tmp_path / "x")
    with torch.device("meta"):
        empty = type(model())(model().config)
    with pytest.raises(KnobError, match="this model has none"):
        export({knob(1): 1.0}, empty, WORDS, to="checkpoint", out=tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_the_folder_of_a_model_in_sixteen_bits_says_so(tmp_path: Path) -> None:
    export({knob(1): 1.0}, model(dtype=torch.bfloat16), WORDS, to="checkpoint", out=tmp_path / "baked")
    assert json.loads((tmp_path / "baked" / "config.json").read_text())["dtype"] == "bfloat16"


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
def test_peft_does_with_an_exported_adapter_what_the_knobs_do(ranks: tuple[int, int], tmp_path: Path) -> None:
    lm, dose = model(), {low_rank(ranks=ranks): 0.7, low_rank(5, ranks=ranks, name="two").with_(gain=2.0): -0.4}
    wanted = steered(lm, dose)
    made = export(dose, lm, WORDS, to="peft", out=tmp_path / "adapter")
    assert (made.facts["weights"], made.facts["rank"], made.facts["layers"]) == (2, 2 * max(ranks), [])
    assert made.facts["error"] < 1e-5 < made.facts["effect"]
    adapted = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), wanted, atol=1e-5, rtol=1e-4)


def test_an_adapter_in_and_out_is_the_dense_difference(tmp_path: Path) -> None:
    lm, low = model(), low_rank()
    export({low: 0.5}, lm, WORDS, to="peft", out=tmp_path / "adapter")
    back = import_knob(tmp_path / "adapter", lm, WORDS, name="back", licence="CC0")
    assert isinstance(back, DeltaKnob)
    assert back.provenance["imported"]["from"] == "peft"
    assert back.provenance["licence"] == "CC0"
    for name in low.parts:
        torch.testing.assert_close(back.dense(name), 0.5 * low.dense(name))
    export({back: 1.0}, lm, WORDS, to="peft", out=tmp_path / "again")
    first, second = (read(tmp_path / name) for name in ("adapter", "again"))
    assert all(torch.equal(first[name], second[name]) for name in {*first, *second})


def read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_weights_stored_the_other_way_round_make_an_adapter_too(tmp_path: Path) -> None:
    lm = model("gpt2")
    name = next(n for n, p in lm.named_parameters() if n.endswith("mlp.c_proj.weight"))
    out, inner = dict(lm.named_parameters())[name].shape
    low = DeltaKnob("low", "delta", {name: LowRank(torch.randn(2, inner), torch.randn(out, 2))})
    export({low: 0.3}, lm, WORDS, to="peft", out=tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    adapted = PeftModel.from_pretrained(model("gpt2"), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), steered(lm, {low: 0.3}), atol=1e-5, rtol=1e-4)


def test_what_is_no_product_of_a_linear_layer_makes_no_adapter(tmp_path: Path) -> None:
    lm = model()
    with pytest.raises(KnobError, match="dense difference, which an adapter has no room for"):
        low_rank_sum({low_rank().dense_copy(): 1.0}, lm)
    rows, width = lm.get_input_embeddings().weight.shape
    table = DeltaKnob("t", "delta", {"model.embed_tokens.weight": LowRank(torch.ones(1, width), torch.ones(rows, 1))})
    with pytest.raises(KnobError, match="no linear layer's weight"):
        export({table: 1.0}, lm, WORDS, to="peft", out=tmp_path / "x")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma", "mistral", "gpt2", "mpt", "cohere", "granite"])
def test_an_adapter_brings_vectors_as_biases_of_its_own(name: str, tmp_path: Path) -> None:
    lm, dose = model(name), {knob(0): -0.5, knob(1): 1.0}
    made = export(dose, lm, WORDS, to="peft", out=tmp_path / "adapter")
    assert (made.facts["weights"], made.facts["rank"], made.facts["layers"]) == (0, 0, [0, 1])
    assert made.facts["error"] < 1e-5 < made.facts["effect"]
    adapted, wanted = PeftModel.from_pretrained(model(name), tmp_path / "adapter"), steered(lm, dose)
    torch.testing.assert_close(logits(adapted), wanted, atol=1e-5, rtol=1e-4)
    assert float((wanted - logits(lm)).abs().max()) > 0.01


def test_an_adapter_holds_vectors_and_differences_together(tmp_path: Path) -> None:
    lm, dose = model(), {low_rank(): 0.7, knob(1): 1.0, knob(2): -0.3}
    export(dose, lm, WORDS, to="peft", out=tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), steered(lm, dose), atol=1e-5, rtol=1e-4)
    with pytest.raises(OptionError, match="with biases"):  # weights alone make a weight knob
        import_knob(tmp_path / "adapter", lm, WORDS)


def test_an_adapter_that_peft_does_not_load_is_not_kept_and_one_without_peft_is_compared_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KnobError, match="PEFT does not take an adapter at this place"):
        export({knob(1): 1.0}, model("mamba"), WORDS, to="peft", out=tmp_path / "x")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr("trimtab.exchange.exporters.find_spec", lambda name: None)
    assert "error" not in export({knob(1): 1.0}, model(), WORDS, to="peft", out=tmp_path / "x").facts


def test_a_vector_has_no_place_in_an_adapter_behind_a_norm_or_without_weights_to_try(tmp_path: Path) -> None:
    with pytest.raises(KnobError, match="there is a norm or a gate behind its last layer"):
        export({knob(1): 1.0}, model("gemma2"), WORDS, to="peft", out=tmp_path / "x")
    with torch.device("meta"):
        empty = type(model())(model().config)
    with pytest.raises(KnobError, match="this one has no weights"):
        export({knob(1): 1.0}, empty, WORDS, to="peft", out=tmp_path / "x")
    assert not any(tmp_path.iterdir())


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_control_vector_holds_the_sum_at_each_layer_and_names_the_architecture(tmp_path: Path) -> None:
    dose = {knob(1): 0.5, knob(2): -1.0, knob(2, seed=4): 2.0}
    made = export(dose, model("qwen2"), WORDS, to="gguf", out=tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")  # the package that llama.cpp's own tools use
    assert [tensor.name for tensor in reader.tensors] == ["direction.2", "direction.1"]
    assert np.array_equal(reader.tensors[1].data, knob(1).addend(0.5).numpy())
    assert np.array_equal(reader.tensors[0].data, (knob(2).addend(-1.0) + knob(2, seed=4).addend(2.0)).numpy())
    assert bytes(reader.fields["controlvector.model_hint"].parts[-1]) == b"qwen2"
    assert made.facts["layers"] == [1, 2]


def test_layer_zero_and_weights_have_no_control_vector(tmp_path: Path) -> None:
    with pytest.raises(KnobError, match="does not steer the output of layer 0"):
        export({knob(0): 1.0, knob(1): 1.0}, model(), WORDS, to="gguf", out=tmp_path / "v.gguf")
    with pytest.raises(KnobError, match="is a difference of weights"):
        export({low_rank(): 1.0}, model(), WORDS, to="gguf", out=tmp_path / "v.gguf")
    with pytest.raises(KnobError, match="layer 0"):
        write_control_vector(tmp_path / "v.gguf", {0: torch.ones(4)}, architecture="llama")
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_no_control_vector_stays_and_so_does_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, message in (("notes.txt", "is not replaced"), ("folder", "it is a folder")):
        with pytest.raises(KnobError, match=message):
            export({knob(1): 1.0}, model(), WORDS, to="gguf", out=tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_writing_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.exchange.gguf.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install"):
        write_control_vector(tmp_path / "v.gguf", {1: torch.ones(4)}, architecture="llama")


# --- what nobody can hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", EXPORTS)
@pytest.mark.parametrize("where", [where for where in WHERE if where != "all"])
def test_knobs_that_spare_some_tokens_are_refused_everywhere(to: str, where: Any, tmp_path: Path) -> None:
    with pytest.raises(KnobError, match=f"steers '{where}' tokens, and what is exported acts on every token"):
        export({knob(1, where=where): 1.0}, model(), WORDS, to=to, out=tmp_path / "x")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("operation", ["ablate", "piecewise", "kernel"])
def test_knobs_that_look_at_the_stream_are_refused(operation: Any) -> None:
    with pytest.raises(KnobError, match="looks at the stream at every token"):
        constant({knob(1, operation=operation): 1.0})


def test_a_lookahead_is_refused_and_nothing_turned_is_nothing_to_write() -> None:
    part = {"model.layers.0.mlp.down_proj.weight": torch.ones(32, 64)}
    ahead = LookaheadKnob("k", "cold-fd", part, {1: 1.0}, {1: 1.0}, (1,), "model.layers", 0.01)
    with pytest.raises(KnobError, match="looks ahead"):
        constant({ahead: 1.0})
    with pytest.raises(OptionError, match="Nothing is turned"):
        constant({knob(1): 0.0, low_rank(): 0.0})
    with pytest.raises(OptionError, match="the knobs cancel"):
        constant({knob(1): 1.0, knob(1): -1.0})


def test_doses_that_could_only_overflow_and_models_that_are_steered_are_refused(tmp_path: Path) -> None:
    lm, low = model(), low_rank()
    for to in EXPORTS:
        with pytest.raises(OptionError, match="is too large"):
            export({knob(1): 1e20}, lm, WORDS, to=to, out=tmp_path / "x.gguf")
        with steer(lm, {low: 1.0}), pytest.raises(AdapterError, match="is being steered"):
            export({knob(1): 1.0}, lm, WORDS, to=to, out=tmp_path / "x.gguf")
    with pytest.raises(OptionError, match="Settings map knobs to strengths"):
        export(knob(1), lm, WORDS, to="gguf", out=tmp_path / "x.gguf")  # pyright: ignore[reportArgumentType]
    assert not any(tmp_path.iterdir())


def test_a_knob_of_another_model_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    foreign = replace(knob(1), provenance={"architecture": "qwen2"})
    with pytest.raises(KnobError, match="another architecture"):
        export({foreign: 1.0}, model(), WORDS, to="gguf", out=tmp_path / "v.gguf")
    with pytest.warns(UserWarning, match="another architecture"):
        export({foreign: 1.0}, model(), WORDS, to="gguf", out=tmp_path / "v.gguf", strict=False)
    with pytest.raises(KnobError, match="reaches layer 9"):
        export({knob(9): 1.0}, model(), WORDS, to="gguf", out=tmp_path / "w.gguf")
    with pytest.raises(KnobError, match="lacks"):
        export({low_rank(): 1.0}, model("gpt2"), WORDS, to="peft", out=tmp_path / "p")
    with pytest.raises(UnknownName, match="Did you mean 'gguf'"):
        export({knob(1): 1.0}, model(), WORDS, to="ggf", out=tmp_path / "w.gguf")


@pytest.mark.parametrize("to", ["peft", "checkpoint"])
def test_nothing_that_is_there_is_replaced(to: str, tmp_path: Path) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "mine").write_text("x")
    file.write_text("x")
    for place in (full, file):
        with pytest.raises(OptionError, match="nothing in it is replaced"):
            export({low_rank(): 1.0}, model(), WORDS, to=to, out=place)
    export({low_rank(): 1.0}, model(), WORDS, to=to, out=empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert (full / "mine").read_text() == file.read_text() == "x"


# --- without weights, and on the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model().save_pretrained(place / "lm")
    WORDS.save_pretrained(place / "lm")
    knob(1, name="v").save(place / "v.knob.safetensors")
    knob(0, name="zero", where="prompt").save(place / "zero.knob.safetensors")
    low_rank().save(place / "low.knob.safetensors")
    return place


def test_vectors_and_adapters_are_written_without_the_models_weights(folder: Path, tmp_path: Path) -> None:
    empty, words = load_empty(folder / "lm")
    assert next(empty.parameters()).is_meta
    export({knob(1): 1.0}, empty, words, to="gguf", out=tmp_path / "v.gguf")
    export({low_rank(): 1.0}, empty, words, to="peft", out=tmp_path / "p")
    assert torch.equal(read_control_vector(tmp_path / "v.gguf").vectors[1], knob(1).addend(1.0))


def test_the_command_exports_and_says_what_is_next(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm, own = str(folder / "lm"), f"--knob={folder / 'v.knob.safetensors'}"
    assert main(["export", lm, own, "--to", "gguf", "--out", str(tmp_path / "v.gguf"), "--strength", "0.5"]) == 0
    assert "llama-cli -m MODEL.gguf --control-vector" in capsys.readouterr().out
    assert torch.equal(read_control_vector(tmp_path / "v.gguf").vectors[1], knob(1).addend(0.5))
    assert main(["export", lm, own, "--to", "gguf", "--out", str(tmp_path / "v.gguf"), "--json"]) == 0  # replaced
    assert json.loads(capsys.readouterr().out)["layers"] == [1]
    low = f"--knob={folder / 'low.knob.safetensors'}"
    assert main(["export", lm, low, own, "--to", "checkpoint", "--out", str(tmp_path / "c"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["knobs"], record["weights"], record["layers"]) == ({"low": 1.0, "v": 1.0}, 2, [1])
    assert main(["export", lm, low, "--to", "peft", "--out", str(tmp_path / "p")]) == 0
    assert "PeftModel.from_pretrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "gguf", "--out", "v.bin"], "ends in .gguf"),
        (["--to", "gguf", "--out", "taken.gguf"], "not known to be a control vector"),
        (["--to", "gguf", "--out", "full"], "is a folder"),
        (["--to", "peft", "--out", "full"], "is not empty"),
        (["--to", "onnx", "--out", "x"], "invalid choice"),
        (["--to", "gguf", "--out", "v.gguf", "--knob", "zero"], "--where all"),
        (["--to", "gguf", "--out", "v.gguf", "--knob", "zero", "--where", "all"], "layer 0"),
    ],
)
def test_wrong_words_are_errors_that_leave_everything_as_it_was(
    words: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.gguf").write_text("mine")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    chosen = "zero" if "zero" in words else "v"
    own = [word for word in words if word not in ("--knob", "zero")]
    assert main(["export", str(folder / "lm"), "--knob", str(folder / f"{chosen}.knob.safetensors"), *own]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "taken.gguf"]
    assert Path("taken.gguf").read_text() == Path("full/mine").read_text() == "mine"


def test_export_without_a_knob_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder / "lm"), "--to", "gguf", "--out", "v.gguf"]) == 2
    assert "Add --knob FILE" in capsys.readouterr().err


def test_the_help_names_every_form() -> None:
    assert set(FORMS) == set(EXPORTS)


def test_a_site_of_several_is_exported_with_all_of_them(tmp_path: Path) -> None:
    vectors = {**knob(1).vectors, **knob(2).vectors}
    both = replace(knob(1), vectors=vectors, norms={1: 4.0, 2: 4.0}, also=(Site(2, "last"),))
    export({both: 1.0}, model(), WORDS, to="gguf", out=tmp_path / "v.gguf")
    assert read_control_vector(tmp_path / "v.gguf").vectors.keys() == {1, 2}
    export({both: 1.0}, model(), WORDS, to="checkpoint", out=tmp_path / "c")
    torch.testing.assert_close(plain(tmp_path / "c"), steered(model(), {both: 1.0}), atol=1e-5, rtol=1e-4)
    assert LlamaConfig.from_pretrained(tmp_path / "c").mlp_bias is True
