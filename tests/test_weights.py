"""Weight knobs: exact differences, adapters, compression, files, and a live model that gets its bits back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pico import model
from trimtab.artifact import load_knob
from trimtab.artifact.delta import DeltaKnob
from trimtab.artifact.large import Entry, write_large
from trimtab.artifact.parts import LowRank
from trimtab.errors import KnobError, OptionError, TrimtabWarning
from trimtab.weights import delta
from trimtab.weights.delta import difference, random_like
from trimtab.weights.live import applied
from trimtab.weights.lowrank import EXACT, compress, effective_rank, relative_error, truncate

# transformers' own remark on a name that PEFT still asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(lm: nn.Module, seed: int, *, size: float = 0.01, like: str = "") -> Any:
    """The same model with other weights in every matrix of the blocks whose name holds `like`."""
    other: Any = type(lm)(lm.config)  # pyright: ignore[reportCallIssue]
    other.load_state_dict(lm.state_dict())
    with torch.no_grad():
        for i, (name, p) in enumerate(other.named_parameters()):
            if "layers" in name and like in name:
                p.add_(size * drawn(*p.shape, seed=100 * seed + i))
    return other


# --- differences ----------------------------------------------------------------------------------------------------


def test_a_difference_holds_what_changed_and_nothing_else() -> None:
    lm = model()
    plus, minus = moved(lm, 1, like="q_proj"), moved(lm, 2, like="q_proj")
    knob = difference(plus, minus, name="p")
    names = [name for name, _ in lm.named_parameters() if "layers" in name and "q_proj" in name]
    assert sorted(knob.parts) == sorted(names)
    for name in names:
        wanted = plus.get_parameter(name).detach() - minus.get_parameter(name).detach()
        assert torch.equal(knob.dense(name), wanted)
        assert knob.diagnostics["norms"][name] == pytest.approx(float(wanted.norm()))
    assert knob.diagnostics["unchanged"] == len(list(lm.named_parameters())) - len(names)


def test_a_random_control_is_as_long_in_every_weight_and_another_for_another_seed() -> None:
    base = model("llama")
    knob = difference(moved(base, 1), base, name="k")
    control = random_like(knob, seed=0)
    assert control.norms() == pytest.approx(knob.norms(), rel=1e-5)
    name = next(iter(knob.parts))
    assert torch.equal(control.dense(name), random_like(knob, seed=0).dense(name))
    assert not torch.equal(control.dense(name), random_like(knob, seed=1).dense(name))
    cosine = torch.cosine_similarity(control.dense(name).flatten(), knob.dense(name).flatten(), dim=0)
    assert abs(float(cosine)) < 0.2


def test_labels_swapped_twice_give_the_same_knob_and_once_its_negative() -> None:
    lm = model()
    plus, minus = moved(lm, 1), moved(lm, 2)
    knob, swapped = difference(plus, minus, name="p"), difference(minus, plus, name="p")
    assert all(torch.equal(knob.dense(name), -swapped.dense(name)) for name in knob.parts)
    assert all(torch.equal(knob.dense(name), (-swapped).dense(name)) for name in knob.parts)


def test_folders_are_subtracted_as_models_are_whatever_their_shards(tmp_path: Path) -> None:
    lm = model()
    plus, minus = moved(lm, 1), moved(lm, 2)
    plus.save_pretrained(tmp_path / "plus", max_shard_size="40KB")
    minus.save_pretrained(tmp_path / "minus")
    assert (tmp_path / "plus/model.safetensors.index.json").exists()
    knob = difference(plus, minus, name="p")
    for out in (None, tmp_path / "knob.safetensors"):
        found = difference(tmp_path / "plus", tmp_path / "minus", name="p", out=out)
        assert sorted(found.parts) == sorted(knob.parts)
        assert all(torch.equal(found.dense(name), knob.dense(name)) for name in knob.parts)
        assert found.diagnostics == knob.diagnostics


def test_subtraction_is_in_float32_and_rounded_once(tmp_path: Path) -> None:
    a, b = (torch.tensor([1.0, 1.0 + 2**-7, 3.0]).to(torch.bfloat16), torch.tensor([1.0, 1.0, 1.0]).to(torch.bfloat16))
    for name, tensor in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    with pytest.warns(TrimtabWarning, match="33% of the differences are exactly zero"):
        knob = difference(tmp_path / "a", tmp_path / "b", name="p")
    assert knob.dense("w").tolist() == [0.0, 2**-7, 2.0]
    with pytest.warns(TrimtabWarning):
        stored = difference(tmp_path / "a", tmp_path / "b", name="p", dtype="bfloat16", out=tmp_path / "k.safetensors")
    assert isinstance(stored.parts["w"], Tensor)
    assert stored.parts["w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"w": (3, 4), "v": (2,)}, {"w": (3, 4)}, "1 weights of .* are not in .*'v'"),
        ({"w": (3, 4)}, {"w": (3, 5)}, r"1 weights differ in shape: 'w' \(\[3, 4\] and \[3, 5\]\)"),
        ({"w": (3,)}, {"w": (4,)}, r"'w' \(\[3\] and \[4\]\)\.$"),
        ({"e": (10, 4)}, {"e": (12, 4)}, "vocabularies differ in size"),
        ({"w": (2, 2), "lm_head.weight": (4, 2)}, {"w": (2, 2)}, "ties its output layer"),
        ({"w": (2, 2)}, {"w": (2, 2)}, "hold the same weights"),
    ],
)
def test_what_does_not_match_is_named(
    first: dict[str, Any], second: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for folder, shapes in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / folder / "model.safetensors")
    with pytest.raises(OptionError, match=words):
        difference(tmp_path / "a", tmp_path / "b", name="p")


def test_pickles_missing_folders_and_quantised_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(OptionError, match="is a pickle, which is never opened"):
        difference(tmp_path / "old", tmp_path / "old", name="p")
    with pytest.raises(OptionError, match="holds no weights"):
        difference(tmp_path / "none", tmp_path / "none", name="p")
    (tmp_path / "int").mkdir()
    save_file({"w": torch.ones(2, dtype=torch.int8)}, tmp_path / "int/model.safetensors")
    (tmp_path / "nan").mkdir()
    save_file({"w": torch.tensor([1.0, torch.nan])}, tmp_path / "nan/model.safetensors")
    with pytest.raises(KnobError, match="'w' holds values that are not finite"):
        difference(tmp_path / "nan", tmp_path / "nan", name="p")
    with pytest.raises(OptionError, match="quantised"):
        difference(tmp_path / "int", tmp_path / "int", name="p")
    with pytest.raises(OptionError, match="alone is no difference"):
        difference(model(), name="p")
    with pytest.raises(OptionError, match="Unknown dtype"):
        difference(model(), model(), name="p", dtype="int4")


def test_an_index_that_its_shards_do_not_bear_out_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for shard in ("1", "2"):
        save_file({"w": drawn(2, 3)}, folder / f"{shard}.safetensors")
    for listed, words in (
        ({"w": "1.safetensors", "lost": "1.safetensors"}, "lacks 1 weights that its index lists, 'lost'"),
        ({"w": "1.safetensors", "x": "2.safetensors"}, "'w' in two shards"),
        ({"w": "3.safetensors"}, "Cannot read"),
        ({"w": "../../../etc/passwd"}, "Cannot read .*/a/passwd"),
        ({"w": 1}, "no weight_map"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(OptionError, match=words):
            difference(folder, folder, name="p")


def test_what_is_no_source_and_names_that_no_knob_could_hold_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    for source in (3, None, {"w": drawn(2)}):
        with pytest.raises(OptionError, match="Pass models in memory, or folders"):
            difference(source, model(), name="p")  # pyright: ignore[reportArgumentType]
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        save_file({"w\n": drawn(2, seed=seed)}, tmp_path / str(seed) / "model.safetensors")
    with pytest.raises(KnobError, match="printable"):
        difference(tmp_path / "0", tmp_path / "1", name="p", out=tmp_path / "k.safetensors")
    with pytest.raises(KnobError, match="at most 8388608 are written"):
        difference(model(), moved(model(), 1), name="p", out=tmp_path / "k.safetensors", provenance={"x": "x" * 2**23})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1"]


# --- adapters -------------------------------------------------------------------------------------------------------


def adapters(folder: Path, ranks: tuple[int, ...] = (2, 3), **options: Any) -> tuple[Any, list[Path]]:
    """Two trained-looking LoRA adapters of one pico model, and the model."""
    peft = pytest.importorskip("peft")
    lm, saved = model(), list[Path]()
    for i, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", **options)
        wrapped = peft.get_peft_model(moved(lm, 0, size=0.0), config)
        with torch.no_grad():
            for j, (name, p) in enumerate(wrapped.named_parameters()):
                if "lora_" in name:
                    p.copy_(0.05 * drawn(*p.shape, seed=1000 * (i + 1) + j))
        wrapped.save_pretrained(folder / str(i))
        saved.append(folder / str(i))
    return lm, saved


def merged(lm: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(moved(lm, 0, size=0.0), folder).merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_concatenated_adapter_equals_dense_delta(options: dict[str, Any], tmp_path: Path) -> None:
    lm, (plus, minus) = adapters(tmp_path, **options)
    knob = difference(plus, minus, name="p")
    dense = difference(merged(lm, plus), merged(lm, minus), name="p")
    assert knob.low_rank
    assert not dense.low_rank
    assert sorted(knob.parts) == sorted(dense.parts)
    for name in knob.parts:
        part = knob.parts[name]
        assert isinstance(part, LowRank)
        assert part.rank == 2 + 3
        assert torch.allclose(knob.dense(name), dense.dense(name), atol=1e-6)
        assert knob.diagnostics["norms"][name] == pytest.approx(dense.diagnostics["norms"][name], rel=1e-4)


def test_one_adapter_is_the_difference_to_its_base(tmp_path: Path) -> None:
    lm, (plus, _) = adapters(tmp_path)
    knob, dense = difference(plus, name="p"), difference(merged(lm, plus), lm, name="p")
    assert all(torch.allclose(knob.dense(name), dense.dense(name), atol=1e-6) for name in dense.parts)
    with pytest.raises(OptionError, match="hold the same adapter"):
        difference(plus, plus, name="k")
    with pytest.raises(OptionError, match="the other is not"):
        difference(plus, lm, name="p")


@pytest.mark.parametrize("signs", [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-0.5, -2.0)])
def test_several_adapters_at_every_sign_equal_the_merged_weights(signs: tuple[float, float], tmp_path: Path) -> None:
    lm, folders = adapters(tmp_path)
    one, two = (difference(folder, name="abc"[i]) for i, folder in enumerate(folders))
    exact = [difference(merged(lm, folder), lm, name="d") for folder in folders]
    found = signs[0] * one + signs[1] * two
    for name, part in found.parts.items():
        assert isinstance(part, LowRank)
        wanted = signs[0] * exact[0].dense(name) + signs[1] * exact[1].dense(name)
        assert torch.allclose(found.gain * found.dense(name), wanted, atol=1e-6)
        assert part.rank == 5


def test_peft_s_linear_combination_is_not_the_difference_of_adapters_and_its_cat_is(tmp_path: Path) -> None:
    lm, (plus, minus) = adapters(tmp_path, ranks=(2, 2))
    knob = difference(plus, minus, name="p")
    peft = pytest.importorskip("peft")
    errors: dict[str, float] = {}
    for kind in ("linear", "cat"):
        wrapped = peft.PeftModel.from_pretrained(moved(lm, 0, size=0.0), plus, adapter_name="plus")
        wrapped.load_adapter(minus, adapter_name="minus")
        wrapped.add_weighted_adapter(["plus", "minus"], [1.0, -1.0], kind, combination_type=kind)
        wrapped.set_adapter(kind)
        combined = wrapped.merge_and_unload(adapter_names=[kind])
        found = difference(combined, lm, name="p")
        errors[kind] = (found - knob).norm() / knob.norm()
    assert errors["cat"] < 1e-4
    assert errors["linear"] > 0.5


def test_zero_alpha_is_no_missing_alpha(tmp_path: Path) -> None:
    _, (plus, _) = adapters(tmp_path)
    edit(plus, lora_alpha=0)
    assert difference(plus, name="p").norm() == 0


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "with biases"),
        ({"lora_bias": True}, "with biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [3]}, "embeddings of its own"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeated layers"),
        ({"init_lora_weights": "pissa"}, "whose start changed"),
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"peft_type": None}, "type None"),
        ({"lora_alpha": "8"}, "lora_alpha is a number"),
        ({"lora_alpha": None}, "lora_alpha is a number"),
        ({"alpha_pattern": [1]}, "maps patterns to numbers"),
        ({"alpha_pattern": {"(": 1}}, "maps patterns to numbers"),
        ({"alpha_pattern": {"([a-z0-9_.]+)+!": 1}}, "without repetitions"),
        ({"alpha_pattern": {"a{99999999999999999999}": 1}}, "without repetitions"),
        ({"alpha_pattern": {"q_proj": "x"}}, "maps patterns to numbers"),
    ],
)
def test_what_is_no_plain_lora_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, (plus, _) = adapters(tmp_path)
    edit(plus, **change)
    with pytest.raises(OptionError, match=words):
        difference(plus, name="p")


A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: (2, 5)}, "alone"),
        ({B: (3, 2)}, "alone"),
        ({A: (2, 5), B: (3, 2), "base_model.model.q.lora_B.bias": (3,)}, "alone"),
        ({A: (2, 5), B: (3, 2), "base_model.model.q.lora_magnitude_vector": (3,)}, "alone"),
        ({A: (2, 5), B: (3, 4)}, "no product"),
        ({A: (2,), B: (3,)}, "no product"),
        ({A: (0, 5), B: (3, 0)}, "no product"),
        ({A: (9, 5), B: (3, 9)}, "no product"),
        ({A: (2, 5), B: (3, 2), A.replace("A.w", "A.x.w"): (2, 5), B.replace("B.w", "B.x.w"): (3, 2)}, "twice"),
        ({}, "no LoRA weights"),
    ],
)
def test_halves_and_strangers_in_an_adapter_are_refused(
    tensors: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(OptionError, match=words):
        difference(tmp_path, name="p")


def test_adapters_that_are_not_finite_or_not_numbers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    for fill, dtype, stored, words in (
        (torch.nan, torch.float32, "float32", "not finite"),
        (1e6, torch.float32, "float16", "not finite"),
        (1, torch.int8, "float32", "as I8 and I8; floats are read"),
    ):
        halves = {A: torch.full((2, 5), fill, dtype=dtype), B: torch.full((3, 2), fill, dtype=dtype)}
        save_file(halves, tmp_path / "adapter_model.safetensors")
        with pytest.raises(KnobError if words == "not finite" else OptionError, match=words):
            difference(tmp_path, name="p", dtype=stored)


# --- low rank -------------------------------------------------------------------------------------------------------


def test_a_planted_rank_is_found_and_its_product_exact() -> None:
    delta = drawn(30, 4) @ drawn(4, 20, seed=1)
    low = truncate(delta, rank=4)
    assert (low.rank, tuple(low.shape)) == (4, (30, 20))
    assert relative_error(delta, low) < 1e-5
    assert truncate(delta, energy=1.0).rank == 4
    assert relative_error(delta, truncate(delta, rank=2)) > 0.1


def test_the_truncation_is_the_best_there_is_and_energy_is_what_it_keeps() -> None:
    delta = drawn(40, 25)
    values = torch.linalg.svdvals(delta.double()).square()
    for rank in (1, 5, 20):
        wanted = float((values[rank:].sum() / values.sum()).sqrt())
        assert relative_error(delta, truncate(delta, rank=rank)) == pytest.approx(wanted, rel=1e-4)
    low = truncate(delta, energy=0.8)
    assert float(values[: low.rank].sum() / values.sum()) >= 0.8 * (1 - 1e-6)
    assert float(values[: low.rank - 1].sum() / values.sum()) < 0.8


def test_large_matrices_are_decomposed_at_random_and_the_same_twice() -> None:
    size = EXACT + 40
    delta = drawn(size, 6) @ drawn(6, size, seed=1) + 1e-3 * drawn(size, size, seed=2)
    low = truncate(delta, rank=6)
    exact = torch.linalg.svdvals(delta)
    best = float((exact[6:].double().square().sum() / exact.double().square().sum()).sqrt())
    assert relative_error(delta, low) < 1.01 * best
    state = torch.random.get_rng_state()
    again = truncate(delta, rank=6)
    assert torch.equal(low.a, again.a)
    assert torch.equal(state, torch.random.get_rng_state())
    assert truncate(delta, energy=0.99).rank <= 6


def test_wrong_ranks_and_energies_are_refused() -> None:
    for options, words in (
        ({}, "either a rank or an energy"),
        ({"rank": 1, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "counts from 1"),
        ({"energy": 1.5}, "share of the squared norm"),
    ):
        with pytest.raises(OptionError, match=words):
            truncate(drawn(3, 3), **options)
    with pytest.raises(OptionError, match="Only a matrix"):
        truncate(drawn(3), rank=1)
    assert truncate(drawn(3, 2), rank=9).rank == 2
    assert truncate(torch.zeros(3, 2), energy=0.9).dense().abs().max() == 0


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(drawn(5, 1) @ drawn(1, 6, seed=1)) == pytest.approx(1, abs=1e-3)


def test_a_planted_rank_is_no_divergence_and_lower_ranks_are_one_that_grows() -> None:
    lm = model()
    names = [name for name, p in lm.named_parameters() if "layers" in name and p.dim() == 2]
    parts = {n: 0.1 * drawn(lm.get_parameter(n).shape[0], 4) @ drawn(4, lm.get_parameter(n).shape[1]) for n in names}
    exact = DeltaKnob("planted", "m", parts)
    probe = [torch.tensor(ids) for ids in ([1, 5, 9, 30, 4, 7], [3, 8], [40, 41, 42, 43])]
    found = [compress(exact, lm, rank=rank, probe=probe) for rank in (1, 2, 3, 4)]
    kls = [knob.diagnostics["fidelity"]["kl"] for knob in found]
    assert kls == sorted(kls, reverse=True)
    assert kls[2] > 1e-4
    assert kls[3] < 1e-6  # float32's rounding
    assert "nats a token" in found[0].card()
    with pytest.raises(OptionError, match="Dropout"):
        compress(exact, lm.train(), rank=1, probe=probe)


# --- the knob and its file ------------------------------------------------------------------------------------------


def knob_of(lm: Any, seed: int = 1, **options: Any) -> DeltaKnob:
    return difference(moved(lm, seed, **options), lm, name=f"knob{seed}")


def test_a_knob_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    lm = model()
    dense = knob_of(lm).with_(gain=1.5, tuning={"safe_range": [0, 1]}, provenance={"paper": "arXiv:2504.20106"})
    low = DeltaKnob("low", "m", {"w": LowRank(drawn(2, 5), drawn(4, 2, seed=1)), "v": drawn(3)}, diagnostics={"x": 1})
    for knob in (dense, low):
        knob.save(tmp_path / "k.safetensors")
        again = DeltaKnob.load(tmp_path / "k.safetensors")
        assert again.header() == knob.header()
        assert all(torch.equal(again.dense(name), knob.dense(name)) for name in knob.parts)
        assert [type(p) for p in again.parts.values()] == [type(p) for p in knob.parts.values()]
    assert dense.safe_range == (0.0, 1.0)
    assert dense.with_(gain=2.0).tuning is None
    assert load_file(tmp_path / "k.safetensors").keys() == {"a/w", "b/w", "dense/v"}  # any reader of the format


def test_every_altered_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    DeltaKnob("k", "m", {"w": drawn(8, 8)}).save(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    used = len(whole[8 : 8 + length].rstrip())
    for place in (3, 20, 8 + used // 2, 8 + used - 2, 8 + length, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(KnobError):
            DeltaKnob.load(path)
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(KnobError):
            DeltaKnob.load(path)


def folders(folder: Path) -> list[Path]:
    """Two checkpoints with two weights each."""
    for seed in range(2):
        (folder / str(seed)).mkdir()
        weights = {name: drawn(6, 5, seed=10 * seed + i) for i, name in enumerate("vw")}
        save_file(weights, folder / str(seed) / "model.safetensors")
    return [folder / "0", folder / "1"]


def test_a_difference_that_is_killed_while_it_is_written_leaves_no_half_knob(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from trimtab.weights import delta\n"
        "delta.BLOCK, subtract = 8, delta._Pair.subtract\n"
        "def slow(pair, name, dtype):\n"
        "    for i, block in enumerate(subtract(pair, name, dtype)):\n"
        "        yield block\n"
        "        if (name, i) == ('w', 1): print('writing', flush=True); time.sleep(60)\n"
        "delta._Pair.subtract = slow\n"
        "delta.difference(sys.argv[1], sys.argv[2], name='new', out=sys.argv[3])\n"
    )
    sources, out = folders(tmp_path), tmp_path / "out"
    for old in (False, True):
        path = out / f"{old}.safetensors"
        if old:
            DeltaKnob("old", "m", {"w": torch.ones(2)}).save(path)
        command = [sys.executable, "-c", code, *map(str, sources), str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ})
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert DeltaKnob.load(path).name == "old" if old else not path.exists()
    left = sorted(file.name for file in out.iterdir())
    assert [re.sub(r"\.[0-9a-f]{8}\.", ".*.", name) for name in left] == [
        ".False.safetensors.*.part",
        ".True.safetensors.*.part",
        "True.safetensors",
    ]
    assert difference(*sources, name="new", out=path).name == "new"  # leftovers are in nobody's way


def test_no_more_than_a_block_is_computed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = folders(tmp_path)
    whole = difference(*sources, name="p")
    blocks: list[int] = []
    subtract = delta._Pair.subtract  # pyright: ignore[reportPrivateUsage]

    def counted(pair: Any, name: str, dtype: torch.dtype) -> Any:
        for block in subtract(pair, name, dtype):
            blocks.append(len(block))
            yield block

    monkeypatch.setattr(delta, "BLOCK", 8)
    monkeypatch.setattr(delta._Pair, "subtract", counted)  # pyright: ignore[reportPrivateUsage]
    found = difference(*sources, name="p", out=tmp_path / "k.safetensors")
    assert blocks == [8, 8, 8, 6] * 2
    assert all(torch.equal(found.dense(name), whole.dense(name)) for name in whole.parts)


def test_a_knob_takes_the_place_of_no_folder_and_no_device_and_that_is_said_before_the_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("hello")
    for place, words in (("", "it is a folder"), ("pipe", "it is a pipe"), ("text", "is not replaced"), ("\0", "name")):
        with pytest.raises(KnobError, match=words):
            difference(tmp_path / "none", tmp_path / "none", name="p", out=tmp_path / place)
        with pytest.raises(KnobError, match=words):
            DeltaKnob("k", "m", {"w": drawn(2)}).save(tmp_path / place)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pipe", "text"]


def test_foreign_files_and_wrong_parts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    with pytest.raises(KnobError, match="exists and is not known to be a knob"):
        DeltaKnob("k", "m", {"w": drawn(2)}).save(tmp_path / "x")
    with pytest.raises(KnobError, match="holds no difference"):
        DeltaKnob("k", "m", {})
    with pytest.raises(KnobError, match=r"b \[out, R\] times a \[R, in\]"):
        DeltaKnob("k", "m", {"w": LowRank(drawn(2, 3), drawn(4, 3))})
    with pytest.raises(KnobError, match="gain"):
        DeltaKnob("k", "m", {"w": drawn(2)}, gain=-1.0)
    with pytest.raises(KnobError, match="two shapes"):
        DeltaKnob("k", "m", {"w": drawn(2)}) + DeltaKnob("k", "m", {"w": drawn(3)})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a/w": (2, 3)}, "a tensor 'a/w', which"),
        ({"b/w": (2, 3)}, "a tensor 'b/w', which"),
        ({"a/w": (2, 3), "b/w": (4, 2), "dense/w": (4, 3)}, "twice"),
        ({"a/w": (2, 3), "b/w": (4, 3)}, r"b \[out, R\] times"),
        ({"w": (2, 3)}, "a tensor 'w', which"),
        ({"dense/": (2,)}, "printable"),
        ({}, "holds no difference"),
    ],
)
def test_files_with_other_tensors_are_refused(tensors: dict[str, tuple[int, ...]], words: str, tmp_path: Path) -> None:
    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        return Entry(name, torch.float32, shape, lambda: [torch.ones(shape).reshape(-1)])

    header = DeltaKnob("k", "m", {"w": drawn(1)}).header()
    write_large(tmp_path / "k.safetensors", [entry(*item) for item in tensors.items()], header)
    with pytest.raises(KnobError, match=words):
        DeltaKnob.load(tmp_path / "k.safetensors")


def test_a_pipe_is_no_knob_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (DeltaKnob.load, load_knob):
        with pytest.raises(KnobError, match="a pipe"):
            read(tmp_path / "pipe")
        with pytest.raises(KnobError, match="no file has such a name"):
            DeltaKnob.load("a\0b")


def test_a_knob_for_another_model_is_refused() -> None:
    lm = model()
    with pytest.raises(KnobError, match=r"lacks 1 of them, 'w' for one"):
        DeltaKnob("k", "m", {"w": drawn(2)}).check_shapes(lm)
    name = next(name for name, p in lm.named_parameters() if p.dim() == 2)
    with pytest.raises(KnobError, match="in shape"):
        DeltaKnob("k", "m", {name: drawn(2, 2)}).check_shapes(lm)


# --- a live model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strengths_are_put_in_place_exactly_and_undone_bit_for_bit(dtype: torch.dtype) -> None:
    lm = model()
    one, two = knob_of(lm, 1), knob_of(lm, 2, like="q_proj")
    lm = lm.to(dtype)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    with applied(lm, {one: 0.5, two: -2.0}) as live:
        for _ in range(3):  # over and over: nothing piles up
            live.set({one: 1.5})
            live.set({one: 0.5, two: -2.0})
        for name, p in lm.named_parameters():
            wanted = before[name].float()
            wanted = wanted + 0.5 * one.dense(name) if name in one.parts else wanted
            wanted = wanted - 2.0 * two.dense(name) if name in two.parts else wanted
            step = 1e-2 if dtype.itemsize == 2 else 1e-5
            assert torch.allclose(p.detach().float(), wanted.to(dtype).float(), rtol=step, atol=1e-6)
        live.set({two: 1.0})
        changed = {name for name, p in lm.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(two.parts)
        live.set({one: 0.0})
        assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_weights_are_restored_after_an_error_inside_and_one_while_entering() -> None:
    lm = model()
    knob = knob_of(lm)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), applied(lm, {knob: 1.0}):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    for large, strength, words in ((knob, 1e308, "too large"), (knob_of(lm, size=1e3), 1e37, "not finite")):
        with pytest.raises(KnobError, match=words), applied(lm, {large: strength}):
            pass
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_whoever_holds_the_original_weights_sees_no_change_and_strides_do_not_matter() -> None:
    lm = model().to(torch.bfloat16)
    weight = lm.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T  # as a transposed view
    knob = knob_of(lm, like="layers.0.mlp.up_proj")
    held, before = weight.data, weight.detach().clone()
    with applied(lm, {knob: 2.0}):
        wanted = before.float() + 2.0 * knob.dense("model.layers.0.mlp.up_proj.weight")
        assert torch.equal(weight, wanted.bfloat16())
        assert torch.equal(held, before)
    assert weight.data_ptr() == held.data_ptr()


def test_tensors_that_cannot_be_changed_or_would_count_twice_are_refused() -> None:
    lm = model(tie_word_embeddings=True)
    tied = lm.lm_head.weight
    assert tied is lm.model.embed_tokens.weight
    parts = {"lm_head.weight": drawn(*tied.shape), "model.embed_tokens.weight": drawn(*tied.shape)}
    before = tied.detach().clone()
    with pytest.raises(KnobError, match="are one tensor in this model"), applied(lm, {DeltaKnob("k", "m", parts): 1.0}):
        pass
    assert torch.equal(tied, before)
    knob = knob_of(lm)
    lm.model.layers[1].to("meta")
    with pytest.raises(KnobError, match="off-loaded"), applied(lm, {knob: 1.0}):
        pass


def test_a_low_rank_knob_and_its_dense_twin_change_the_model_alike(tmp_path: Path) -> None:
    lm, (plus, minus) = adapters(tmp_path)
    low = difference(plus, minus, name="low")
    dense = DeltaKnob("dense", "m", {name: low.dense(name) for name in low.parts})
    ids = torch.tensor([[1, 2, 3, 4]])
    said: list[Tensor] = []
    for knob in (low, dense):
        with applied(lm, {knob: 1.3}), torch.no_grad():
            said.append(lm(ids).logits)
    assert torch.allclose(said[0], said[1], atol=1e-5)
    assert not torch.allclose(said[0], lm(ids).logits, atol=1e-3)


def test_a_parameter_stays_the_object_it_is_and_gets_its_own_memory_back() -> None:
    lm = model()
    knob = knob_of(lm)
    before = {name: (p, p.data_ptr(), p.requires_grad) for name, p in lm.named_parameters()}
    with applied(lm, {knob: 1.0}) as live:
        place = lm.get_parameter(next(iter(knob.parts))).data_ptr()
        live.set({knob: -1.0})
        assert lm.get_parameter(next(iter(knob.parts))).data_ptr() == place  # no more memory for another strength
        assert all(p is before[name][0] for name, p in lm.named_parameters())
    assert {name: (p, p.data_ptr(), p.requires_grad) for name, p in lm.named_parameters()} == before


def test_gradients_through_weights_that_were_changed_meanwhile_are_refused() -> None:
    layer = nn.Linear(4, 4)
    knob = DeltaKnob("k", "m", {"weight": drawn(4, 4)})
    inputs = drawn(2, 4).requires_grad_()
    before = layer(inputs).sum()
    with applied(layer, {knob: 1.0}) as live:
        inside = layer(inputs).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.backward()
        live.set({knob: 2.0})
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            inside.backward()
        inside = layer(inputs).sum()
        inside.backward()
        assert torch.allclose(inputs.grad, (layer.weight.sum(0)).expand(2, 4))  # pyright: ignore[reportArgumentType]
        inside = layer(inputs).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def test_weights_of_any_layout_width_and_mode_are_changed_and_come_back() -> None:
    delta = drawn(3, 5)
    knob = DeltaKnob("k", "m", {"weight": delta})
    turned, wide, scalar = nn.Linear(5, 3), nn.Linear(5, 3).double(), nn.Module()
    turned.weight = nn.Parameter(drawn(5, 3, seed=1).T)
    scalar.weight = nn.Parameter(torch.tensor(2.0))
    with torch.inference_mode():
        made_there = nn.Linear(5, 3)
    for layer in (turned, wide, made_there):
        before = layer.weight.detach().clone()
        with torch.inference_mode(), applied(layer, {knob: 0.5}):
            assert torch.allclose(layer.weight, before + 0.5 * delta)
        with applied(layer, {knob: 0.5}):
            assert torch.allclose(layer.weight, before + 0.5 * delta)
        assert torch.equal(layer.weight, before)
        assert layer.weight.dtype == before.dtype
    with applied(scalar, {DeltaKnob("s", "m", {"weight": torch.tensor(1.0)}): 3.0}):
        assert scalar.weight.tolist() == 5.0
    wide.weight = nn.Parameter(drawn(3, 5).double() / 3)
    with applied(wide, {DeltaKnob("z", "m", {"weight": torch.zeros(3, 5)}): 1.0}):
        assert torch.equal(wide.weight, drawn(3, 5).double() / 3)  # never through float32


def test_tied_weights_take_a_difference_once() -> None:
    lm = model(tie_word_embeddings=True)
    part = 0.1 * drawn(*lm.lm_head.weight.shape)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    before = lm.lm_head.weight.detach().clone()  # pyright: ignore[reportAttributeAccessIssue]
    head, embedding = (DeltaKnob(n[:2], "m", {n: part}) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    with applied(lm, {head: 1.0, embedding: 0.5}):
        assert torch.allclose(lm.lm_head.weight, before + 1.5 * part, atol=1e-6)  # pyright: ignore[reportAttributeAccessIssue]
        assert lm.lm_head.weight is lm.model.embed_tokens.weight  # pyright: ignore[reportAttributeAccessIssue]
    both = DeltaKnob("both", "m", {**head.parts, **embedding.parts})
    with pytest.raises(KnobError, match="which ties them"), applied(lm, {both: 1.0}):
        pass
    assert torch.equal(lm.lm_head.weight, before)  # pyright: ignore[reportAttributeAccessIssue]


def test_nothing_is_added_to_quantised_or_offloaded_weights() -> None:
    knob = DeltaKnob("k", "m", {"weight": drawn(3, 5)})
    small, away = nn.Linear(5, 3), nn.Linear(5, 3, device="meta")
    small.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.int8), requires_grad=False)
    for layer, words in ((small, "quantised"), (away, "off-loaded")):
        with pytest.raises(KnobError, match=words), applied(layer, {knob: 1.0}):
            pass


def test_16_bit_weights_are_summed_in_float32_and_rounded_once() -> None:
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    one, two = (DeltaKnob(f"k{i}", "m", {"weight": 1e-2 * drawn(4, 8, seed=i)}) for i in (1, 2))
    stored = DeltaKnob("short", "m", {"weight": (1e-2 * drawn(4, 8, seed=3)).to(torch.bfloat16)})
    before = layer.weight.detach().double()
    with applied(layer, {one: 0.7, two: -1.3, stored: 0.7}):
        exact = before + 0.7 * one.dense("weight") - 1.3 * two.dense("weight") + 0.7 * stored.dense("weight")
        assert torch.equal(layer.weight, exact.to(torch.bfloat16))


def test_a_random_control_of_a_tuned_knob_is_as_strong_as_it() -> None:
    base = model("llama")
    knob = difference(moved(base, 1), base, name="k").with_(gain=0.25)
    assert random_like(knob).norm() == pytest.approx(knob.norm(), rel=1e-5)


def test_a_low_rank_part_of_one_use_of_a_tied_weight_is_not_put_into_both() -> None:
    lm = model("llama", tie_word_embeddings=True)
    head = lm.lm_head.weight
    part = LowRank(drawn(2, head.shape[1]), drawn(head.shape[0], 2, seed=1))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with pytest.raises(KnobError, match=r"ties .*, and a difference of low rank"):
            applied(lm, {DeltaKnob("k", "planted", {name: part}): 1.0}).__enter__()
    with applied(lm, {DeltaKnob("k", "planted", {"lm_head.weight": part.dense()}): 1.0}):
        assert torch.equal(lm.model.embed_tokens.weight, lm.lm_head.weight)


def test_a_difference_of_folders_whose_names_change_as_they_are_loaded_says_what_to_do(tmp_path: Path) -> None:
    base = model("mixtral")
    other = model("mixtral", seed=1)
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "other")
    knob = difference(tmp_path / "other", tmp_path / "base", name="k")
    with pytest.raises(KnobError, match="renames weights as it loads, take the difference of loaded models"):
        knob.check_shapes(base)
    difference(other, base, name="k").check_shapes(base)
