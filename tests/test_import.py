"""Imports: what other tools wrote becomes a knob that steers as it did there; what could run code is not opened."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, _utils

import foreign
import pico
from foreign import floats, gguf_bytes, text
from pico import model, tokenizer
from test_runtime import plain_hooks
from trimtab.artifact import DeltaKnob, Knob, LowRank, load_knob
from trimtab.cli import main
from trimtab.errors import KnobError, OptionError, TrimtabWarning, UnknownName
from trimtab.exchange import SOURCES, export, import_knob
from trimtab.exchange.gguf import read_control_vector
from trimtab.exchange.neutral import neutral_pairs
from trimtab.exchange.pickles import load_pickled
from trimtab.pairs import Pairs
from trimtab.runtime import steer
from trimtab.types import Site

WORDS = tokenizer()
WIDTH = pico.WIDTH
VECTORS = {layer: torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}


def imported(path: Path, **options: Any) -> Knob:
    knob = import_knob(path, model(), WORDS, **options)
    assert isinstance(knob, Knob)
    return knob


@torch.no_grad()
def steers_as_there(knob: Knob, vectors: dict[int, Tensor], multiplier: float) -> None:
    """The other tool adds its vectors, times the multiplier, to the blocks' outputs; strength is that multiplier."""
    lm, inputs = model(), pico.pad(pico.prompts([6, 4]))
    with plain_hooks(lm, {layer: multiplier * vector.float() for layer, vector in vectors.items()}):
        wanted = lm(**inputs).logits
    with steer(lm, {knob: multiplier}):
        torch.testing.assert_close(lm(**inputs).logits[:, -1], wanted[:, -1], atol=1e-5, rtol=1e-4)


def save_repeng(path: Path, vectors: dict[int, Tensor], hint: str = "llama") -> None:
    """Write what repeng's `export_gguf` writes, layers in its order."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer in sorted(vectors, reverse=True):
        writer.add_tensor(f"direction.{layer}", vectors[layer].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- control vectors -------------------------------------------------------------------------------------------------


def test_a_file_of_repeng_goes_in_and_comes_out_bit_for_bit(tmp_path: Path) -> None:
    save_repeng(tmp_path / "happy.gguf", {1: VECTORS[1], 2: VECTORS[2]})
    with pytest.warns(TrimtabWarning, match="after the final norm"):
        knob = imported(tmp_path / "happy.gguf")
    assert (knob.name, knob.method, knob.provenance["paper"]) == ("happy", "gguf", None)
    assert sorted(site.layer for site in knob.sites) == [1, 2]
    assert all(torch.equal(addend, VECTORS[layer]) for layer, addend in knob.addends(1.0).items())
    knob.save(tmp_path / "k")
    kept = load_knob(tmp_path / "k")
    export({kept: 1.0}, model(), WORDS, to="gguf", out=tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "happy.gguf").read_bytes()
    steers_as_there(knob, {1: VECTORS[1], 2: VECTORS[2]}, -0.7)
    fields = knob.provenance["imported"].pop("fields")
    assert fields["controlvector.model_hint"] == "llama"
    assert len(knob.provenance["imported"].pop("sha256")) == 64
    assert knob.provenance["imported"] == {"from": "gguf", "file": "happy.gguf"}
    with pytest.warns(TrimtabWarning, match="repeng reads layer 2"):
        assert imported(tmp_path / "happy.gguf", source="repeng").provenance["paper"] == "arXiv:2310.01405"


def test_a_header_with_numbers_that_json_has_not_makes_a_knob_that_can_be_saved(tmp_path: Path) -> None:
    fields = {"a": (6, struct.pack("<f", float("nan"))), "b": (12, struct.pack("<d", 0.5)), "c": (8, text("x\x1b[2J"))}
    (tmp_path / "v.gguf").write_bytes(gguf_bytes({"direction.1": floats()}, fields=fields))
    knob = imported(tmp_path / "v.gguf")
    knob.save(tmp_path / "k")
    assert load_knob(tmp_path / "k").provenance["imported"]["fields"] == {"b": 0.5, "c": "x\x1b[2J"}
    assert "\x1b" not in knob.card()


def test_one_layer_of_several_can_act_alone_and_the_others_stay_candidates(tmp_path: Path) -> None:
    save_repeng(tmp_path / "v.gguf", {0: VECTORS[0], 1: VECTORS[1]})
    knob = imported(tmp_path / "v.gguf", layer=-3, source="llama.cpp")
    assert knob.method == "llama.cpp"
    assert knob.sites == (Site(0, "imported"),)
    assert [*knob.vectors] == [Site(0, "imported"), Site(1, "imported")]
    steers_as_there(knob, {0: VECTORS[0]}, 1.0)
    save_repeng(tmp_path / "half.gguf", {0: 0 * VECTORS[0], 1: VECTORS[1]})
    with pytest.raises(KnobError, match="vector of layer 0 is zero"):
        imported(tmp_path / "half.gguf", layer=0)
    with pytest.raises(OptionError, match="no vector for layer 2; it has them for 0, 1"):
        imported(tmp_path / "v.gguf", layer=2)


@pytest.mark.parametrize(("kind", "code"), [(1, "e"), (0, "f"), (30, None)])
def test_vectors_of_sixteen_bits_are_read_too(kind: int, code: str | None, tmp_path: Path) -> None:
    values = [0.5, -1.25, 3.0, 0.0]
    raw = struct.pack(f"<4{code}", *values) if code else b"".join(struct.pack("<f", v)[2:] for v in values)
    (tmp_path / "v.gguf").write_bytes(gguf_bytes({"direction.1": ([4], kind, raw)}, version=2))
    assert read_control_vector(tmp_path / "v.gguf").vectors[1].tolist() == values


EIGHT = [f"direction.{i}" for i in range(1, 9)]
HOSTILE_GGUF = {
    "empty": (b"", "does not begin"),
    "only magic": (b"GGUF", "ends in the middle"),
    "version 1": (gguf_bytes({"direction.1": floats()}, version=1), "version 1"),
    "cut": (gguf_bytes({"direction.1": floats()})[:-40], "ends before its vectors do"),
    "cut header": (gguf_bytes({"direction.1": floats()})[:40], "ends in the middle"),
    "no tensors": (gguf_bytes({}), "holds no tensors"),
    "endless tensors": (gguf_bytes({"direction.1": floats()}, counts=(2**62, 1)), "claims 4611686018427387904 tensors"),
    "endless fields": (gguf_bytes({"direction.1": floats()}, counts=(1, 2**40)), "claims 1099511627776 fields"),
    "endless text": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "bytes of text"),
    "endless list": (gguf_bytes({}, fields={"a": (9, struct.pack("<IQ", 0, 2**60))}), "claims"),
    "list of nothing": (gguf_bytes({}, fields={"a": (9, struct.pack("<IQ", 9, 1) * 9)}), "nested"),
    "strange type": (gguf_bytes({}, fields={"a": (77, b"")}), "type 77"),
    "a field twice": (gguf_bytes({}, counts=(0, 2))[:24] + 2 * (text("a") + struct.pack("<IB", 0, 1)), "'a' twice"),
    "tensors over each other": (
        gguf_bytes(
            {f"direction.{i}": floats() for i in range(1, 9)}, offsets={f"direction.{i}": 0 for i in range(1, 9)}
        )[:-900],
        "claim 1024 bytes",
    ),
    "a layer twice": (
        gguf_bytes({"direction.1": floats(), "direction.2": floats()}).replace(b"direction.2", b"direction.1"),
        "layer 1 twice",
    ),
    "a model": (gguf_bytes({"blk.0.attn_q.weight": floats()}), "tensor 'blk.0.attn_q.weight'"),
    "negative layer": (gguf_bytes({"direction.-1": floats()}), "tensor 'direction.-1'"),
    "layer of another spelling": (gguf_bytes({"direction.01": floats()}), "tensor 'direction.01'"),
    "a matrix": (gguf_bytes({"direction.1": ([4, 8], 0, floats()[2])}), "has shape"),
    "no dimension": (gguf_bytes({"direction.1": ([], 0, b"")}), "has shape"),
    "a wide one": (gguf_bytes({"direction.1": ([2**50], 0, b"")}), "has shape"),
    "quantised": (gguf_bytes({"direction.1": ([32], 8, b"\0" * 40)}), "GGUF's type 8"),
    "beyond the end": (gguf_bytes({"direction.1": floats()}, offsets={"direction.1": 2**60}), "ends before the vector"),
    "not finite": (gguf_bytes({"direction.1": floats(value=float("nan"))}), "not finite"),
    "two widths": (gguf_bytes({"direction.1": floats(), "direction.2": floats(16)}), "widths [16, 32]"),
    "not UTF-8": (gguf_bytes({"direction.1": floats()}).replace(b"controlvector", b"\xff" * 13), "not UTF-8"),
    "odd alignment": (
        gguf_bytes({"direction.1": floats()}, fields={"general.alignment": (4, struct.pack("<I", 0))}),
        "alignment is 0",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_a_hostile_control_vector_is_an_error_that_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE_GGUF[name]
    (tmp_path / "v.gguf").write_bytes(data)
    with pytest.raises(KnobError) as error:
        read_control_vector(tmp_path / "v.gguf")
    assert message in str(error.value)


def test_every_cut_of_a_control_vector_and_every_flipped_byte_is_an_error_or_a_vector(tmp_path: Path) -> None:
    whole = gguf_bytes({"direction.1": floats(4), "direction.2": floats(4)})
    path, errors = tmp_path / "v.gguf", 0
    for at in range(0, len(whole), 3):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            path.write_bytes(data)
            try:
                vectors = read_control_vector(path).vectors
                assert all(vector.isfinite().all() for vector in vectors.values())
            except KnobError:
                errors += 1
    assert errors > len(whole) / 4


# --- pickles ---------------------------------------------------------------------------------------------------------


def write_objects(folder: Path) -> dict[str, Path]:
    """Write an object of steering-vectors, and its dictionary, in every way in which users save them."""
    paths: dict[str, Path] = {}
    with foreign.steering_vectors() as kind:
        for name, value in (("object", kind(VECTORS)), ("layers", VECTORS)):
            paths[f"{name} torch"] = folder / f"{name}.pt"
            torch.save(value, paths[f"{name} torch"])
            paths[f"{name} old torch"] = folder / f"{name}.old.pt"
            torch.save(value, paths[f"{name} old torch"], _use_new_zipfile_serialization=False)
            for protocol in (2, 4, 5):
                paths[f"{name} {protocol}"] = folder / f"{name}.{protocol}.pkl"
                paths[f"{name} {protocol}"].write_bytes(pickle.dumps(value, protocol=protocol))
    return paths


def test_objects_of_steering_vectors_are_read_however_they_were_saved(tmp_path: Path) -> None:
    for name, path in write_objects(tmp_path).items():
        knob = imported(path, name="sv")
        assert knob.method == "steering-vectors", name
        assert sorted(site.layer for site in knob.sites) == [0, 1, 2], name
        assert all(torch.equal(addend, VECTORS[layer]) for layer, addend in knob.addends(1.0).items()), name
    steers_as_there(knob, VECTORS, 1.5)


def test_vectors_that_act_elsewhere_than_on_the_stream_are_refused(tmp_path: Path) -> None:
    with foreign.steering_vectors() as kind:
        torch.save(kind(VECTORS, "mlp"), tmp_path / "sv.pt")
    with pytest.raises(KnobError, match="layer type 'mlp'"):
        imported(tmp_path / "sv.pt")


def test_lone_vectors_of_caa_and_bipo_find_their_layer_in_the_name_or_in_the_option(tmp_path: Path) -> None:
    torch.save(VECTORS[1], tmp_path / "vec_layer_1_Llama-2-7b-chat-hf.pt")
    torch.save(torch.nn.Parameter(VECTORS[2].half()), tmp_path / "vec_ep5_layer2.pt")
    torch.save(VECTORS[0][None], tmp_path / "mine.pt")
    caa, bipo = imported(tmp_path / "vec_layer_1_Llama-2-7b-chat-hf.pt"), imported(tmp_path / "vec_ep5_layer2.pt")
    assert (caa.method, caa.site, bipo.method, bipo.site) == ("caa", Site(1, "imported"), "bipo", Site(2, "imported"))
    assert caa.provenance["paper"] == SOURCES["caa"].paper == "arXiv:2312.06681"
    assert (caa.where, bipo.where) == ("completion", "all")
    steers_as_there(caa.with_(where="all"), {1: VECTORS[1]}, 2.0)
    steers_as_there(bipo, {2: VECTORS[2].half()}, -1.0)
    mine = imported(tmp_path / "mine.pt", layer=-1, source="bipo", name="renamed", licence="MIT")
    assert (mine.name, mine.method, mine.site.layer, mine.provenance["licence"]) == ("renamed", "bipo", 2, "MIT")
    with pytest.raises(OptionError, match="says which layer it is for"):
        imported(tmp_path / "mine.pt")


def test_a_stack_of_persona_vectors_loses_the_embeddings_and_the_normed_row(tmp_path: Path) -> None:
    stack = torch.stack([torch.full((WIDTH,), 9.0), *VECTORS.values()])  # rows 0 to 3 of hidden_states, 3 layers
    torch.save(stack, tmp_path / "response_avg_diff.pt")
    with pytest.raises(OptionError, match="Say which: layer=0 to 1"):
        imported(tmp_path / "response_avg_diff.pt")
    knob = imported(tmp_path / "response_avg_diff.pt", layer=1)
    assert [*knob.vectors] == [Site(0, "imported"), Site(1, "imported")]
    assert knob.where == "completion"
    steers_as_there(knob.with_(where="all"), {1: VECTORS[1]}, 1.0)  # row 2
    torch.save(stack[:3], tmp_path / "short.pt")
    with pytest.raises(KnobError, match="holds 3 rows; a stack of hidden_states of this LlamaForCausalLM has 4"):
        imported(tmp_path / "short.pt")


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle", "protocol 0", "hidden", "storage"])
def test_a_pickle_that_would_run_code_is_refused_unopened(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = foreign.write_bombs(tmp_path, mark)[kind]
    with pytest.raises(KnobError, match=r"would run|does more \(POP\)"):
        imported(path)
    assert not mark.exists()


def test_the_pickles_of_these_tests_do_run_code_where_they_are_opened(tmp_path: Path) -> None:
    """A control: without it the test above could pass for pickles that do nothing."""
    mark = tmp_path / "mark"
    for path in foreign.write_bombs(tmp_path, mark).values():
        if path.read_bytes()[:2] == b"PK" or "old torch" in path.name:
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
        assert mark.exists(), path.name
        mark.unlink()


def test_names_that_a_reader_of_pickles_cannot_resolve_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.layer1.pt"
    for data, said in (
        (b"\x80\x04\x8c\x0bcollections)\x93.", "what cannot be told"),
        (b"\x80\x02(cos\nsystem\nq\x00.", "os.system"),
        (b"(S'ls'\nios\nsystem\n.", "os.system"),
    ):
        path.write_bytes(data)
        with pytest.raises(KnobError, match="would run") as error:
            load_pickled(path)
        assert said in str(error.value)


def test_a_pickle_sets_no_attribute_of_torch(tmp_path: Path) -> None:
    """GLOBAL and BUILD together would set attributes on whatever is found under a name."""
    before = torch.UntypedStorage.nbytes, _utils._rebuild_tensor_v2.__defaults__
    state = b"N}\x8c\x06nbytesccollections\nOrderedDict\ns\x86b."  # the state (None, {"nbytes": OrderedDict})
    defaults = b"N}\x8c\x0c__defaults__K\x01K\x02\x86s\x86b."
    for start, rest in (
        (b"ctorch.storage\nUntypedStorage\n", state),
        (b"ctorch._utils\n_rebuild_tensor_v2\n", defaults),
    ):
        (tmp_path / "v.layer1.pt").write_bytes(b"\x80\x04" + start + rest)
        with pytest.raises(KnobError):
            imported(tmp_path / "v.layer1.pt")
        assert (torch.UntypedStorage.nbytes, _utils._rebuild_tensor_v2.__defaults__) == before


def legacy(value: bytes, rest: bytes = b"\x80\x02].") -> bytes:
    """What torch before 1.6 wrote around a value: three pickles before it, and the names of its storages behind."""
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + value + rest


STORED = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK"
VIEW = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + STORED
    + b"\x20Nt\x51K\0K\x20\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR."
)
KEYS = b"\x80\x02]X\x01\0\0\x000a."
NAMED = legacy(b"\x80\x02ctorch.storage\nUntypedStorage\n.")
INNER = legacy(b"\x80\x03ctorch.storage\n_load_from_bytes\nB\x01\0\0\0x\x85R.")
TRICKS = {
    "a name out of a nested file": b"\x80\x03ctorch.storage\n_load_from_bytes\nB"
    + struct.pack("<I", len(NAMED))
    + NAMED
    + b"\x85RN}\x8c\x06nbytesK\x01s\x86b.",
    "tuples a million deep": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "tuples shared forty times": b"\x80\x02})q\0" + b"h\0\x86q\0" * 40 + b"Ns.",
    "a memo of four thousand million": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "a codec": b"\x80\x02c_codecs\nencode\nX\x02\0\0\x0061X\x04\0\0\0nope\x86R.",
    "a number of thousands of digits": b"\x80\x02\x8b" + struct.pack("<i", 3000) + b"\x7f" * 3000 + b".",
    "more entries than layers": b"\x80\x02}("
    + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(20_000))
    + b"u.",
    "a tensor without its numbers": legacy(b"\x80\x02" + VIEW),
    "a tensor with half of its numbers": legacy(b"\x80\x02" + VIEW, KEYS + struct.pack("<q", 32) + b"\0" * 64),
    "a nested file in a nested file": b"\x80\x03"
    + b"ctorch.storage\n_load_from_bytes\nB"
    + struct.pack("<I", len(INNER))
    + INNER
    + b"\x85R.",
    "a state for a dictionary": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.",
}


@pytest.mark.parametrize("name", TRICKS)
def test_what_a_pickle_tries_beyond_tensors_is_a_quick_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "v.layer1.pt").write_bytes(TRICKS[name])
    before = torch.UntypedStorage.nbytes
    with pytest.raises(KnobError):
        imported(tmp_path / "v.layer1.pt")
    assert torch.UntypedStorage.nbytes is before


def test_the_tricks_above_are_made_of_a_file_that_is_read(tmp_path: Path) -> None:
    """A control: with all of its numbers, the hand-made tensor is a vector."""
    numbers = struct.pack("<q32f", 32, *range(1, 33))
    (tmp_path / "v.layer1.pt").write_bytes(legacy(b"\x80\x02" + VIEW, KEYS + numbers))
    assert torch.equal(imported(tmp_path / "v.layer1.pt").addend(1.0), torch.arange(1.0, 33.0))


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    wide = torch.zeros(1).as_strided((2**23,), (0,))
    for value in (wide, dict.fromkeys(range(500), wide), torch.zeros(1).as_strided((4, 2**23), (0, 0))):
        torch.save(value, tmp_path / "v.layer1.pt")
        with pytest.raises(KnobError, match="claims more numbers than there are"):
            imported(tmp_path / "v.layer1.pt", layer=1)


def test_archives_that_are_compressed_are_refused(tmp_path: Path) -> None:
    torch.save(VECTORS[1], tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "v.layer1.pt", "w", zipfile.ZIP_LZMA) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(KnobError, match="compressed"):
        imported(tmp_path / "v.layer1.pt")


DAMAGED = {
    "empty": b"",
    "text": b"hello, this is no pickle",
    "zip of something": None,
    "cut": pickle.dumps(torch.ones(4))[:-20],
    "a number": pickle.dumps(3),
    "a list": pickle.dumps([1, 2]),
    "nested": b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",
    "stack underflow": b"\x80\x04R.",
    "names as layers": pickle.dumps({"a": 1}),
    "layers of text": pickle.dumps({1: "a"}),
    "no layers": pickle.dumps({}),
    "beyond": pickle.dumps({10**6: torch.ones(4)}),
    "not finite": pickle.dumps({1: torch.full((32,), float("inf"))}),
    "whole numbers": pickle.dumps({1: torch.ones(32, dtype=torch.int64)}),
    "matrix": pickle.dumps({1: torch.ones(4, 8)}),
    "no dimension": pickle.dumps(torch.tensor(1.0)),
    "no dimension by layer": pickle.dumps({1: torch.tensor(1.0)}),
    "stretched": pickle.dumps({1: torch.ones(1).expand(2**40)}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_pickle_of_vectors_is_an_error(name: str, tmp_path: Path) -> None:
    path, data = tmp_path / "v.layer1.pt", DAMAGED[name]
    if data is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b.txt", "x")
    else:
        path.write_bytes(data)
    with pytest.raises(KnobError):
        imported(path)


def test_every_cut_of_a_pickle_is_an_error(tmp_path: Path) -> None:
    for value in (write_objects(tmp_path)[name].read_bytes() for name in ("object 4", "layers torch")):
        for at in range(0, len(value) - 1, 97):
            (tmp_path / "v.pt").write_bytes(value[:at])
            with pytest.raises(KnobError):
                imported(tmp_path / "v.pt", layer=1)


# --- what fits -------------------------------------------------------------------------------------------------------


def test_vectors_of_another_model_zeros_and_knobs_are_refused(tmp_path: Path) -> None:
    save_repeng(tmp_path / "wide.gguf", {1: torch.ones(64)})
    save_repeng(tmp_path / "high.gguf", {7: torch.ones(WIDTH)})
    save_repeng(tmp_path / "zero.gguf", {1: torch.zeros(WIDTH)})
    pico.knob(1).save(tmp_path / "k.safetensors")
    for name, message in (
        ("wide.gguf", "width 64 up to layer 1"),
        ("high.gguf", "up to layer 7"),
        ("zero.gguf", "zeros only"),
        ("k.safetensors", "is a safetensors file"),
        ("nothing.gguf", "there is no such file"),
    ):
        with pytest.raises(KnobError, match=message):
            imported(tmp_path / name)
    with pytest.raises(UnknownName, match="Did you mean 'repeng'"):
        imported(tmp_path / "wide.gguf", source="repen")
    save_repeng(tmp_path / "fits.gguf", {1: VECTORS[1]})
    for source in ("peft", "caa", "steering-vectors"):
        with pytest.raises(OptionError, match="is a file as gguf writes it"):
            imported(tmp_path / "fits.gguf", source=source)
    with pytest.raises(OptionError, match="layer is a number"):
        imported(tmp_path / "fits.gguf", layer="1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(KnobError, match="without adapter_config"):
        imported(tmp_path / "folder")
    for options in ({"layer": 1}, {"source": "caa"}, {"pairs": neutral_pairs()}):
        with pytest.raises(OptionError, match="no source, layer or pairs"):
            imported(tmp_path / "folder", **options)
    (tmp_path / "folder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "folder" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(KnobError, match="Its weights are a pickle, which is never opened"):
        imported(tmp_path / "folder")


def test_a_file_that_says_another_model_or_layer_than_it_is_given_brings_a_warning(tmp_path: Path) -> None:
    save_repeng(tmp_path / "v.gguf", {1: VECTORS[1]}, hint="gemma2")
    with pytest.warns(TrimtabWarning, match="made for a model of type 'gemma2'; this one is llama"):
        imported(tmp_path / "v.gguf")
    torch.save(VECTORS[1], tmp_path / "vec_layer_2_x.pt")
    with pytest.warns(TrimtabWarning, match="name says layer 2"):
        assert imported(tmp_path / "vec_layer_2_x.pt", layer=0).site.layer == 0
    lm = model()
    low = DeltaKnob(
        "low", "delta", {"model.layers.1.self_attn.q_proj.weight": LowRank(torch.ones(1, 32), torch.ones(32, 1))}
    )
    export({low: 1.0}, lm, WORDS, to="peft", out=tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/Mistral-7B"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(TrimtabWarning, match="trained on 'someone/Mistral-7B'"):
        back = import_knob(tmp_path / "adapter", lm, WORDS)
    assert back.provenance["imported"]["fields"] == {"base_model": "someone/Mistral-7B"}
    zero = DeltaKnob("zero", "delta", {name: LowRank(part.a, 0 * part.b) for name, part in low.parts.items()})
    export({zero: 1.0}, lm, WORDS, to="peft", out=tmp_path / "zeros")
    with pytest.raises(KnobError, match="an adapter of zeros"):
        import_knob(tmp_path / "zeros", lm, WORDS)


def test_harmless_pickles_of_other_numbers_are_not_said_to_run_code(tmp_path: Path) -> None:
    for value in (np.ones(32), torch.ones(32, dtype=torch.int64), torch.ones(32, dtype=torch.complex64)):
        torch.save(value, tmp_path / "v.layer1.pt")
        with pytest.raises(KnobError, match="tensors of floats are taken"):
            imported(tmp_path / "v.layer1.pt")
    torch.save({"1": VECTORS[1]}, tmp_path / "text.pt")
    assert imported(tmp_path / "text.pt").site.layer == 1


def test_norms_are_those_of_the_pairs_that_are_given(tmp_path: Path) -> None:
    save_repeng(tmp_path / "v.gguf", {0: VECTORS[0], 1: VECTORS[1]})
    pairs = Pairs.from_records([{"prompt": f"Q{i}", "chosen": "abc def", "rejected": "xyz"} for i in range(3)])
    own, neutral = imported(tmp_path / "v.gguf", pairs=pairs), imported(tmp_path / "v.gguf")
    assert own.norms != neutral.norms
    assert own.norms == imported(tmp_path / "v.gguf", pairs=pairs).norms
    for layer, addend in own.addends(1.0).items():
        assert torch.equal(addend, neutral.addends(1.0)[layer])
    assert len(neutral_pairs()) == 12
    assert "neutral" in neutral.diagnostics["norms_from"]


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_imports_and_the_knob_steers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model().save_pretrained(tmp_path / "lm")
    WORDS.save_pretrained(tmp_path / "lm")
    save_repeng(tmp_path / "v.gguf", {0: VECTORS[0], 1: VECTORS[1]})
    lm, out = str(tmp_path / "lm"), tmp_path / "k.safetensors"
    assert main(["import", lm, str(tmp_path / "v.gguf"), "--out", str(out)]) == 0
    assert "layer 0, layer 1" in capsys.readouterr().out
    options = ["--layer", "1", "--name", "calm", "--source", "repeng", "--licence", "MIT", "--json"]
    assert main(["import", lm, str(tmp_path / "v.gguf"), "--out", str(out), *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["knob"], record["layers"], record["candidates"]) == ("calm", [1], ["0/imported", "1/imported"])
    assert main(["inspect", str(out)]) == 0
    assert "imported              from repeng, file v.gguf" in capsys.readouterr().out
    torch.save(VECTORS[0], tmp_path / "lone.pt")
    for words, message in (
        ([str(tmp_path / "lone.pt")], "Pass --layer"),
        ([str(tmp_path / "lone.pt"), "--layer", "9"], "There is no layer 9"),
        ([str(tmp_path / "lone.pt"), "--layer", "1", "--source", "caaa"], "Did you mean 'caa'"),
        ([str(tmp_path / "none.pt")], "There is no file"),
        ([str(tmp_path / "lone.pt"), "--layer", "1", "--name", "a b"], "A knob's name"),
    ):
        assert main(["import", lm, *words, "--out", str(tmp_path / "new.safetensors")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new.safetensors").exists()


def test_the_help_names_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(source in said for source in SOURCES)
