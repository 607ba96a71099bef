"""The knob file: exact, self-describing, safe to load; knobs as vectors; racks and panels."""

from __future__ import annotations

import json
import math
import operator
import os
import struct
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor

import hostile
import pico
from trimtab.artifact import (
    FORMAT_VERSION,
    DeltaKnob,
    Knob,
    Rack,
    file,
    load_knob,
    load_panel,
    model_identity,
    save_panel,
)
from trimtab.artifact.card import describe_safe_range
from trimtab.errors import KnobError, OptionError, TrimtabWarning, UnknownName
from trimtab.types import Site

pytestmark = pytest.mark.quick
A, B = Site(1, "last"), Site(2, "post_instruction[-1]")


def vector(seed: int, width: int = pico.WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def knob(**changes: Any) -> Knob:
    fields: dict[str, Any] = {
        "name": "math",
        "method": "palrs",
        "vectors": {A: vector(1), B: vector(2)},
        "norms": {1: 4.0, 2: 7.7},
        "site": A,
        "gain": 0.1 + 0.2,
        "where": "completion",
        "provenance": {"paper": "arXiv:2509.23982", "options": {"seed": 0}, "licence": "CC0"},
        "diagnostics": {"sites": {str(A): {"angle": 1 / 3}}, "warnings": ["mind the gap"]},
        "tuning": {"safe_range": [-0.5, 1.5]},
    }
    return Knob(**{**fields, **changes})


def knob_for_pico(**changes: Any) -> Knob:
    return knob(provenance={**model_identity(pico.model(), pico.tokenizer()), **changes})


# What it does


def test_addend_is_strength_times_gain_times_residual_norm_along_the_direction() -> None:
    k = knob()
    assert k.addend(2.0).norm().item() == pytest.approx(2 * 0.3 * 4.0, rel=1e-6)
    assert k.alpha(-1) == pytest.approx(-0.3)
    torch.testing.assert_close(k.addend(-1.0), -k.addend(1.0))
    assert torch.equal(k.addend(0.0), torch.zeros(pico.WIDTH))
    torch.testing.assert_close(k.direction, vector(1) / vector(1).norm())
    torch.testing.assert_close(k.with_(gain=k.raw_gain(A)).addend(1.0), vector(1))
    assert k.with_(site=B).addend(1.0).dtype == torch.float32
    with pytest.raises(OptionError, match="must be finite"):
        k.addend(math.nan)


def spread(**changes: Any) -> Knob:
    """A knob that acts at two layers at once."""
    return knob(**{"also": (B,), "tuning": None, **changes})


def test_a_knob_of_several_sites_adds_its_raw_vectors_in_proportion() -> None:
    k = spread()
    raw = k.with_(gain=k.raw_gain(A))
    assert [*raw.addends(1.0)] == [1, 2]
    assert torch.equal(raw.addends(1.0)[1], vector(1))
    assert torch.equal(raw.addends(1.0)[2], vector(2))
    half = k.with_(gain=k.raw_gain(A) / 2).addends(-1.0)
    torch.testing.assert_close(half[2], -0.5 * vector(2))
    torch.testing.assert_close(half[1], -0.5 * vector(1))
    assert not any(addend.any() for addend in k.addends(0.0).values())
    assert [*knob().addends(1.0)] == [1]


def test_a_knob_of_several_sites_keeps_them_in_a_file_and_loses_them_with_another_site(tmp_path: Path) -> None:
    k = spread()
    k.save(tmp_path / "k")
    back = Knob.load(tmp_path / "k")
    assert back.also == (B,)
    assert all(map(torch.equal, back.addends(0.7).values(), k.addends(0.7).values()))
    assert back.pruned().sites == (A, B)
    assert [*back.pruned().norms] == [1, 2]
    assert back.with_(gain=2.0, where="all").also == (B,)
    assert back.with_(site=B).also == ()
    assert [*back.pruned(B).vectors] == [B]
    assert "2 layers at once: 1, 2" in k.card()


def test_knobs_of_the_same_layers_add_up_layer_by_layer() -> None:
    one, two = spread(), spread(name="other", vectors={A: 3 * vector(3), B: vector(4)})
    for total, other in ((one + two, two), (one - two, -two), (one + 0 * two, 0 * two)):
        for layer, addend in total.addends(2.0).items():
            torch.testing.assert_close(addend, one.addends(2.0)[layer] + other.addends(2.0)[layer])
        assert sorted(total.addends(1.0)) == [1, 2]
    assert not any(addend.any() for addend in (one - one).addends(1.0).values())
    with pytest.raises(KnobError, match="at the same ones"):
        one + knob()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "ablate"}, "Only a knob that adds"),
        ({"also": (Site(1, "first"),), "vectors": {A: vector(1), Site(1, "first"): vector(2)}}, "acts once at a layer"),
        ({"also": (Site(3, "last"),)}, "no vector for its further site"),
        ({"vectors": {A: 0 * vector(1), B: vector(2)}}, "in proportion"),
        ({"vectors": {A: 1e-30 * vector(1), B: vector(2)}, "gain": 1e12}, "cannot hold"),
    ],
)
def test_further_sites_that_make_no_sense_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        spread(**changes)


def test_knobs_are_told_apart_by_identity_and_share_no_memory_with_their_source() -> None:
    source = torch.stack([vector(1), vector(2)])
    k = knob(vectors={A: source[0], B: source[1]})
    source.zero_()
    assert torch.equal(k.vectors[A], vector(1))
    assert k != knob()
    assert len({k: 1, knob(): 2}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a,b"}, "no space, comma or equals sign; got 'a,b'"),
        ({"name": ""}, "1 to 100 printable"),
        ({"name": "\x1b[2J"}, "1 to 100 printable"),
        ({"gain": math.inf}, "gain must be finite"),
        ({"gain": "x"}, "gain must be finite and not negative; got 'x'"),
        ({"gain": True}, "gain must be finite and not negative; got True"),
        ({"gain": -1.0}, "Turn a knob around with -knob"),
        ({"site": Site(5, "last")}, "active site 5/last has no vector"),
        ({"vectors": {A: vector(1), B: vector(2, 5)}}, r"site 2/post_instruction\[-1\] has \[5\], not \[32\]"),
        ({"vectors": {A: vector(1)[None]}}, r"must have shape \[D\]"),
        ({"vectors": {A: torch.full((4,), math.nan)}}, "not finite"),
        ({"norms": {1: 4.0}}, "Layer 2 needs a positive mean residual norm; got None"),
        ({"norms": {1: 0.0, 2: 1.0}}, "Layer 1 needs a positive mean residual norm; got 0.0"),
        ({"tuning": {"safe_range": [2, 1]}}, "safe range"),
        ({"method": ""}, "A method's name is 1 to 100 printable characters"),
        ({"site": Site(-1, "last")}, "A site is written layer/position, .* got '-1/last'"),
        ({"vectors": {A: vector(1), Site(1, "a b"): vector(2)}}, "got '1/a b'"),
        ({"norms": {1: 4.0, 2: 1.0, 3: math.inf}}, "Layer 3 needs a positive mean residual norm; got inf"),
        ({"gain": 1e38}, "Strength 1 would add a vector of length 4e.38, which float32 cannot hold"),
        ({"tuning": {"safe_range": "wide"}}, "safe range"),
    ],
)
def test_knob_that_makes_no_sense_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        knob(**changes)


def test_unknown_place_and_operation_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="Known: all, answer, completion, context, prompt"):
        knob(where="everywhere")
    with pytest.raises(UnknownName, match="Known: ablate, add, kernel, piecewise"):
        knob(operation="multiply")
    with pytest.raises(UnknownName, match="Known: steering"):
        knob(kind="delta")


# Other knobs from one


def test_copy_with_another_site_gets_that_sites_raw_gain_and_loses_the_tuning() -> None:
    k = knob()
    moved = k.with_(site="2/post_instruction[-1]")
    assert moved.site == B
    assert moved.gain == pytest.approx(vector(2).norm().item() / 7.7)
    assert moved.tuning is None
    assert k.with_(gain=2.0).tuning is None
    assert k.with_(where="all").tuning is None
    assert k.with_(operation="ablate").tuning is None
    renamed = k.with_(name="other", provenance={"x": 1}, diagnostics={})
    assert (renamed.name, renamed.provenance, renamed.diagnostics) == ("other", {"x": 1}, {})
    assert renamed.safe_range == (-0.5, 1.5)
    assert k.with_(site=B, gain=0.5, tuning={"safe_range": (0, 1)}).safe_range == (0.0, 1.0)
    with pytest.raises(UnknownName, match="Did you mean '1/last'"):
        k.with_(site="1/lost")


def test_pruned_knob_keeps_one_site_and_does_the_same() -> None:
    k = knob()
    small = k.pruned()
    assert list(small.vectors) == [A]
    assert dict(small.norms) == {1: 4.0}
    assert torch.equal(small.addend(1.0), k.addend(1.0))
    assert small.tuning == k.tuning
    assert list(k.pruned("2/post_instruction[-1]").vectors) == [B]


def test_knob_arithmetic_is_that_of_what_knobs_add() -> None:
    a, b = knob(), knob(name="brief", vectors={A: vector(5)}, norms={1: 9.0}, gain=0.7)
    torch.testing.assert_close((2 * a).addend(1.0), a.addend(2.0))
    torch.testing.assert_close((a * -0.5).addend(1.0), a.addend(-0.5))
    torch.testing.assert_close((-a).addend(1.0), -a.addend(1.0))
    torch.testing.assert_close((-a).with_(site=B).addend(1.0), -a.with_(site=B).addend(1.0))
    torch.testing.assert_close((a + b).addend(2.0), a.addend(2.0) + b.addend(2.0))
    torch.testing.assert_close((a - b).addend(1.0), a.addend(1.0) - b.addend(1.0))
    assert torch.equal((0 * a).addend(1.0), torch.zeros(pico.WIDTH))
    assert torch.equal((a - a).addend(3.0), torch.zeros(pico.WIDTH))
    assert (a + b).name == "math+brief"
    assert [part["name"] for part in (a + b).provenance["parts"]] == ["math", "brief"]
    assert (2 * -a).provenance["scaled"] == -2.0
    assert (2 * a).tuning is None
    assert (a + b).site == A


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": B}, "summed at one layer, or at the same ones, on the same tokens"),
        ({"where": "all"}, "summed at one layer, or at the same ones, on the same tokens"),
        ({"operation": "ablate"}, "ablation is not linear"),
        ({"vectors": {A: vector(1, 8)}}, "width 32 and knob 'other' 8"),
        ({"provenance": {"architecture": "gpt2"}}, "another architecture: llama and gpt2"),
        ({"provenance": {"template_hash": "x"}}, "another chat template: t and x"),
    ],
)
def test_sum_of_knobs_that_do_not_go_together_is_an_error(changes: dict[str, Any], message: str) -> None:
    a = knob(provenance={"architecture": "llama", "template_hash": "t"})
    with pytest.raises(KnobError, match=message):
        _ = a + knob(name="other", **changes)


# File


def test_artifact_round_trip_is_bitwise_and_self_describing(tmp_path: Path) -> None:
    path = tmp_path / "math.knob.safetensors"
    extreme = torch.tensor([1e-45, 3.4e38, -0.0, 1 / 3])
    k = knob(vectors={A: extreme, B: vector(2, 4)}, gain=0.1 + 0.2, norms={1: 1 / 3, 2: 1e-300})
    k.save(path)
    back = Knob.load(path)
    for site, values in k.vectors.items():
        assert back.vectors[site].numpy().tobytes() == values.numpy().tobytes()
    for name in ("name", "method", "norms", "site", "gain", "where", "operation", "kind", "provenance", "diagnostics"):
        assert getattr(back, name) == getattr(k, name)
    assert back.tuning == k.tuning
    assert back.card() == k.card()
    with safe_open(path, framework="pt") as handle:
        header = json.loads(handle.metadata()["trimtab"])
    assert header["format_version"] == FORMAT_VERSION
    assert header["provenance"]["paper"] == "arXiv:2509.23982"


def test_same_knob_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        knob().save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def _forbidden() -> None:
    raise PermissionError(13, "Permission denied")


def test_a_safe_range_says_what_could_not_have_spoken_against_it() -> None:
    def said(**tuning: Any) -> str:
        return describe_safe_range(knob(tuning={"safe_range": [-1.0, 2.0], **tuning}))

    assert describe_safe_range(knob(tuning=None)) == "not tuned"
    assert said(guardrails=["facts"], base={"broken": 0.1}, options={"broken_budget": 0.05}) == "-1 to 2"
    assert said(guardrails=[]) == "-1 to 2 (no guardrail)"
    for broken, more in ((0.96, 0.05), (0.0, 1)):
        wanted = (
            f"-1 to 2 ({broken:.0%} of the bare model's answers are broken, and {more:.0%} more were allowed to be)"
        )
        assert said(guardrails=["facts"], base={"broken": broken}, options={"broken_budget": more}) == wanted


@pytest.mark.parametrize("knobs", [3, {"a": "file"}, {"a": ("file",)}, {"a": (3, 1.0)}, {"a": None}])
def test_a_panel_of_other_things_than_files_and_strengths_is_refused(tmp_path: Path, knobs: Any) -> None:
    with pytest.raises(KnobError, match=r"A panel holds .*; got "):
        save_panel(tmp_path / "panel.json", knobs)
    assert not (tmp_path / "panel.json").exists()


def test_a_file_that_is_no_panel_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "package.json"
    for content in ('{"name": "x"}', "[]", "not JSON"):
        path.write_text(content)
        with pytest.raises(KnobError, match=r"package\.json' exists and is not known to be a panel"):
            save_panel(path, {"a": ("x", 1)})
        assert path.read_text() == content
    path.write_text('{"knobs": {}, "more": "' + "x" * 2**20 + '"}')  # longer than any panel
    with pytest.raises(KnobError, match="is not known to be a panel"):
        save_panel(path, {"a": ("x", 1)})
    path.write_text("")
    for strength in (1, 2):
        save_panel(path, {"a": ("x", strength)})
    assert json.loads(path.read_text())["knobs"]["a"]["strength"] == 2


def test_a_file_that_is_no_knob_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, weights = tmp_path / "model.safetensors", to_bytes({"weight": torch.ones(2)})
    path.write_bytes(weights)
    with pytest.raises(KnobError, match=r"model\.safetensors' exists and is not known to be a knob, so it is not"):
        knob().save(path)
    assert path.read_bytes() == weights
    with monkeypatch.context() as patch:
        patch.setattr(file, "is_knob_file", lambda path: _forbidden())
        with pytest.raises(KnobError, match="is not known to be a knob"):
            knob().save(path)
    path.write_bytes(b"")  # as tempfile makes them
    knob().save(path)
    knob(gain=0.125).save(path)
    assert Knob.load(path).gain == 0.125


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k"
    knob().save(path)
    before = path.read_bytes()

    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(KnobError, match=r"no space left on device\. Nothing there was changed"):
            knob(name="new").save(path)
    with pytest.raises(KnobError, match="cannot be written as JSON"):
        knob(provenance={"what": object()}).save(path)
    with pytest.raises(KnobError, match="cannot be written as JSON"):
        knob(diagnostics={"angle": math.nan}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def damaged(**changes: Any) -> bytes:
    return hostile.knob_file(hostile.header_with(**changes))


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"not a whole safetensors file \(it is empty\)"),
    "text": (b"hello, this is no knob", "A knob is a file that learn or Knob.save wrote"),
    "cut in the header": (hostile.VALID[:100], "it has 100 bytes, and its header alone would have 640"),
    "cut in the vectors": (hostile.VALID[:-5], "it is cut short: [0-9]+ of its [0-9]+ bytes are there"),
    "huge header length": (struct.pack("<Q", 2**62) + hostile.VALID[8:], "not a whole safetensors file"),
    "flipped bit": (hostile.VALID[:-1] + bytes([hostile.VALID[-1] ^ 1]), "checksum differs"),
    "edited header": (hostile.VALID.replace(b"completion", b"prompt    "), "checksum differs"),
    "a pickle": (b"\x80\x04\x95\x19\0\0\0\0\0\0\0", "it is a pickle, which is never opened"),
    "a zip": (b"PK\3\4" + bytes(20), "a file of torch.save, which is never opened"),
    "a panel": (b'{"knobs": {}}', "it is JSON text, as a panel is"),
    "GGUF": (b"GGUF\3\0\0\0", "it is a GGUF file"),
    "no JSON": (hostile.knob_file("{"), "header is not JSON"),
    "deep JSON": (hostile.knob_file("[" * 200_000), "nested too deeply"),
    "huge number": (hostile.knob_file("9" * 10_000), "header is not JSON"),
    "list": (hostile.knob_file("[]"), "not a JSON object"),
    "later version": (damaged(format_version=99), "format version 99; this Trimtab reads version 1"),
    "other kind": (damaged(kind="delta"), "kind 'delta'; trimtab.load_knob reads"),
    "no name": (damaged(name=None), "name is NoneType; expected str"),
    "bad name": (damaged(name="a=b"), "printable"),
    "bad method": (damaged(method="a\nb"), "A method's name is 1 to 100 printable characters"),
    "bad gain": (damaged(gain="1"), "gain is '1'; expected a number"),
    "infinite gain": (damaged(gain=math.inf), "Infinity is not a finite number"),
    "endless gain": (damaged(gain=10**400), "gain is not a finite number"),
    "gain too large": (damaged(gain=1e38), "vector of length 4e.38, which float32 cannot hold"),
    "bad norms": (damaged(norms={"one": 1}), "A norm is that of a layer, 0 to 9999; got 'one'"),
    "bad site": (damaged(site="x"), "A site is written layer/position"),
    "site with a path": (damaged(site="1/../../x"), "A site is written layer/position"),
    "site of another spelling": (damaged(site="01/last"), "A site is written layer/position"),
    "lost site": (damaged(site="9/last"), "active site 9/last has no vector; there are 2: 1/last, 2/last"),
    "bad where": (damaged(where="x"), "where='x'"),
    "bad provenance": (damaged(provenance=[]), "provenance is list"),
    "bad tuning": (damaged(tuning=3), "tuning is int"),
    "more fields": (damaged(licence="CC0"), "unknown field 'licence'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_a_knob_error_that_names_the_problem(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "k"
    data, message = DAMAGE[kind]
    path.write_bytes(data)
    with pytest.raises(KnobError, match=message) as caught:
        Knob.load(path)
    assert repr(str(path)) in str(caught.value)


def test_header_beyond_the_limit_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knob().save(tmp_path / "k")
    monkeypatch.setattr(file, "HEADER_LIMIT", 100)
    with pytest.raises(KnobError, match="at most 100 are read"):
        Knob.load(tmp_path / "k")


def test_foreign_files_are_knob_errors(tmp_path: Path) -> None:
    with pytest.raises(KnobError, match="no such file"):
        Knob.load(tmp_path / "nowhere")
    with pytest.raises(KnobError, match="it is a folder"):
        Knob.load(tmp_path)
    save_file({"direction": vector(1)}, tmp_path / "plain")
    with pytest.raises(KnobError, match="without Trimtab's header"):
        Knob.load(tmp_path / "plain")
    torch.save({"a": vector(1)}, tmp_path / "pickle")
    with pytest.raises(KnobError, match=r"a file of torch\.save, which is never opened"):
        Knob.load(tmp_path / "pickle")


def test_tensors_that_are_no_vectors_are_knob_errors(tmp_path: Path) -> None:
    one = hostile.VECTORS["vector/1/last"]
    files = {
        "a tensor 'weight', which": hostile.knob_file(vectors={**hostile.VECTORS, "weight": one}),
        "'vector/1/last' has dtype 'F16'; a knob's are all F32": hostile.knob_file(
            vectors={"vector/1/last": one},
            tensors={"vector/1/last": {"dtype": "F16", "shape": [16], "data_offsets": [0, 32]}},
        ),
        r"must have shape \[D\]; that of site 1/last has \[1, 8\]": hostile.knob_file(
            vectors={"vector/1/last": one},
            tensors={"vector/1/last": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}},
        ),
    }
    for message, data in files.items():
        (tmp_path / "k").write_bytes(data)
        with pytest.raises(KnobError, match=message):
            Knob.load(tmp_path / "k")
    with pytest.raises(KnobError, match="could not be read back: its tensor 'x' has dtype 'F16'"):
        file.write_file(tmp_path / "half", {"x": vector(1).half()}, {})
    assert not (tmp_path / "half").exists()


def test_card_cannot_write_to_the_terminal_or_pose_as_another_line(tmp_path: Path) -> None:
    hostile = {"paper": "x\x1b[2J\nlicence   CC0", "options": [1], "model": "\r\u202e"}
    text = knob(provenance=hostile, diagnostics={"warnings": "no list"}).card()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not any(line.startswith("licence") for line in text.splitlines())


def test_card_says_what_the_knob_is() -> None:
    text = knob_for_pico(pairs_hash="abc", pairs_count=100).card()
    for part in ("math (steering, palrs)", "1/last, one of 2 in layers 1 to 2", "alpha 0.3", "-0.5 to 1.5", "llama",
                 "add at completion tokens", "100, sha256 abc", "mind the gap"):  # fmt: skip
        assert part in text
    assert "removes the component" in knob(operation="ablate").card()
    assert "not tuned" in knob(tuning=None).card()


# Model


def test_identity_names_the_model_and_no_path_of_this_machine(tmp_path: Path) -> None:
    model = pico.model()
    model.config.name_or_path = str(tmp_path / "tiny")
    identity = model_identity(model, pico.tokenizer())
    assert identity["model"] == "tiny"
    assert identity["architecture"] == "llama"
    assert (identity["hidden_size"], identity["n_layers"]) == (pico.WIDTH, pico.LAYERS)
    assert str(tmp_path) not in json.dumps(identity)
    assert model_identity(pico.model())["template_hash"] is None
    model.config.name_or_path = "someone/model"
    assert model_identity(model)["model"] == "someone/model"


def test_identity_does_not_depend_on_precision_and_does_on_the_configuration() -> None:
    base = model_identity(pico.model())["config_hash"]
    assert model_identity(pico.model(dtype=torch.bfloat16))["config_hash"] == base
    assert model_identity(pico.model(rms_norm_eps=1e-3))["config_hash"] != base
    quick = model_identity(pico.model(), pico.tokenizer(), hashes=False)
    assert (quick["config_hash"], quick["tokenizer_hash"]) == (None, None)
    assert quick["template_hash"] is not None


def test_a_kind_of_knob_that_does_not_exist_yet_is_refused() -> None:
    one = pico.knob()
    with pytest.raises(UnknownName, match=r"Unknown kind of knob 'delta'\. Known: steering"):
        Knob(
            name="a", method="m", vectors=one.vectors, norms=one.norms, site=one.site, gain=1.0, kind=cast(Any, "delta")
        )


def test_knob_fits_the_model_it_was_learned_on_without_a_word() -> None:
    knob_for_pico().check(pico.model(), pico.tokenizer())
    knob_for_pico().check(pico.model())
    knob().check(pico.model(), pico.tokenizer())  # knows nothing of its model, so nothing is compared


@pytest.mark.parametrize("strict", [True, False])
def test_other_width_or_too_few_layers_are_errors_even_if_not_strict(strict: bool) -> None:
    with pytest.raises(KnobError, match=r"hidden size 32, 3 layers.*hidden size 16"):
        knob_for_pico().check(pico.model(hidden_size=16), strict=strict)
    with pytest.raises(KnobError, match="reaches layer 2"):
        knob_for_pico().check(pico.model(num_hidden_layers=2), strict=strict)


def test_other_architecture_or_template_is_refused_and_a_warning_if_not_strict() -> None:
    plain = pico.tokenizer(chat=False)
    for model, tokenizer, what in (
        (pico.model("gpt_neox"), pico.tokenizer(), "another architecture: llama; this model has gpt_neox"),
        (pico.model(), plain, "another chat template: .*; this model has None"),
    ):
        with pytest.raises(KnobError, match=what):
            knob_for_pico().check(model, tokenizer)
        with pytest.warns(TrimtabWarning, match=what):
            knob_for_pico().check(model, tokenizer, strict=False)
    learned_without = knob(provenance=model_identity(pico.model(), plain))
    with pytest.raises(KnobError, match="another chat template: None"):
        learned_without.check(pico.model(), pico.tokenizer())


def test_other_configuration_revision_or_vocabulary_is_a_warning() -> None:
    with pytest.warns(TrimtabWarning, match="another configuration"):
        knob_for_pico().check(pico.model(rms_norm_eps=1e-3), pico.tokenizer())
    with pytest.warns(TrimtabWarning, match="another vocabulary"):
        knob_for_pico(tokenizer_hash="x").check(pico.model(), pico.tokenizer())
    model = pico.model()
    model.config._commit_hash = "new"
    with pytest.warns(TrimtabWarning, match="another revision of the model: old; this model has new"):
        knob_for_pico(revision="old").check(model)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"architecture": "gpt2"}, KnobError, "another architecture: gpt2; this model has llama"),
        ({"template_hash": "0" * 64}, KnobError, "another chat template: 000000000000; this model has"),
        ({"template_hash": None}, KnobError, "another chat template: None; this model has"),
        ({"revision": "old"}, TrimtabWarning, "another revision of the model: old; this model has new"),
        ({"n_layers": 24, "config_hash": "x"}, TrimtabWarning, "another number of layers: 24; this model has 3"),
        ({"config_hash": "x"}, TrimtabWarning, "another configuration: x; this model has"),
        ({"tokenizer_hash": "x"}, TrimtabWarning, "another vocabulary: x; this model has"),
    ],
)
def test_each_difference_is_said_once(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = pico.model()
    model.config._commit_hash = "new"
    k = knob(provenance={**model_identity(model, pico.tokenizer()), **changes})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            k.check(model, pico.tokenizer())
            messages = [(each.category, str(each.message)) for each in said]
        except KnobError as error:
            messages = [(KnobError, str(error)), *((each.category, str(each.message)) for each in said)]
    assert [found for found, _ in messages] == [kind]
    assert message in messages[0][1]


def test_another_number_of_layers_is_noticed_without_the_hashes() -> None:
    with pytest.warns(TrimtabWarning, match="another number of layers: 3; this model has 4"):
        knob_for_pico().check(pico.model(num_hidden_layers=4), hashes=False)


@pytest.mark.parametrize(
    "value", ["\x1b[2J" * 1000, "a\nb", "\u202e", {"a": [1] * 1000}, [None] * 10**5, 10**4000, True, 1e308]
)
def test_identity_written_by_others_cannot_flood_or_command_the_terminal(value: object) -> None:
    for key in model_identity(pico.model()):
        odd = knob_for_pico(**{key: value})
        messages: list[str] = [odd.card().replace("\n", "")]
        for model in (pico.model(), pico.model(hidden_size=16)):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    odd.check(model, pico.tokenizer())
                except KnobError as error:
                    messages.append(str(error))
            messages += [str(each.message) for each in said]
        assert all(message.isprintable() for message in messages)
        assert all(len(message) < 500 for message in messages[1:])


def test_a_scale_that_is_no_number_is_a_clear_error() -> None:
    with pytest.raises(KnobError, match="its scale is 'twice'; expected a number"):
        _ = 2 * knob(provenance={"scaled": "twice"})


def test_sum_of_knobs_with_long_names_has_a_name_that_a_knob_can_have() -> None:
    assert (knob(name="a" * 60) + knob(name="b" * 60)).name == "a" * 60 + "+" + "b" * 39


# Racks and panels


def test_rack_turns_names_into_knobs_and_adds_up_names_of_one_knob(tmp_path: Path) -> None:
    k = knob()
    k.save(tmp_path / "k")
    rack = Rack(math=k, again=k, stored=tmp_path / "k", text=str(tmp_path / "k"))
    assert list(rack) == ["math", "again", "stored", "text"]
    assert rack["stored"].name == "math"
    assert rack.resolve({"math": 1, "again": 0.5, "stored": 0}) == {k: 1.5, rack["stored"]: 0.0}
    with pytest.raises(UnknownName, match=r"Unknown knob 'maths'.*Did you mean 'math'"):
        rack.resolve({"maths": 1})
    with pytest.raises(UnknownName, match="Unknown knob"):
        rack["nothing"]
    with pytest.raises(OptionError, match="strength of 'math' must be finite"):
        rack.resolve({"math": math.inf})
    assert rack.resolve("math=1,again=0.5") == {k: 1.5}
    nothing: Any = None
    with pytest.raises(OptionError, match="A setting maps names to strengths"):
        rack.resolve(nothing)
    with pytest.raises(KnobError, match="A knob file is named by its path; got None"):
        load_knob(nothing)
    for name in ("", "a b", "a=b,"):
        with pytest.raises(KnobError, match="no space, comma or equals sign"):
            Rack(**{name: k})
    assert "math" in rack
    assert len(rack) == 4
    assert repr(rack) == "Rack(math, again, stored, text)"


def test_panel_can_be_moved_with_its_knobs(tmp_path: Path) -> None:
    (tmp_path / "here" / "knobs").mkdir(parents=True)
    knob().save(tmp_path / "here" / "knobs" / "k")
    knob(name="far").save(tmp_path / "far")
    save_panel(
        tmp_path / "here" / "panel.json",
        {"math": (tmp_path / "here" / "knobs" / "k", 0.8), "far": (tmp_path / "far", -1)},
    )
    (tmp_path / "here").rename(tmp_path / "there")
    panel = load_panel(tmp_path / "there" / "panel.json")
    assert panel.setting == {"math": 0.8, "far": -1.0}
    assert panel.rack["far"].name == "far"
    assert panel.rack.resolve(panel.setting)[panel.rack["math"]] == 0.8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Cannot read a panel"),
        ("[]", "is not a panel"),
        ('{"knobs": {"a": 1}}', "Knob 'a' of panel .* needs a path"),
        ('{"knobs": {"a": {"path": "k", "strength": "1"}}}', "strength is '1'; expected a number"),
        ('{"knobs": {"a": {"path": "nowhere"}}}', "no such file"),
        ('{"knobs": {"a": {"path": "k", "strength": NaN}}}', "NaN is not a finite number"),
        ('{"knobs": {"a": {"path": "k", "strenght": 1}}}', "and nothing else; got {'path': 'k', 'strenght': 1}"),
        ('{"knobs": {}, "name": "x"}', "and nothing else"),
        ('{"knobs": {"a": {"path": "k"}, "a": {"path": "k"}}}', "two fields 'a'"),
        ('{"knobs": {"a b": {"path": "k"}}}', "no space, comma or equals sign; got 'a b'"),
    ],
)
def test_bad_panel_is_an_error_that_names_the_problem(tmp_path: Path, text: str, message: str) -> None:
    knob().save(tmp_path / "k")
    (tmp_path / "panel.json").write_text(text)
    with pytest.raises(KnobError, match=message):
        load_panel(tmp_path / "panel.json")


def test_arithmetic_across_kinds_says_what_to_do_instead() -> None:
    steering, delta = knob(), DeltaKnob("w", "delta", {"m.weight": torch.ones(2, 3)})
    for one, other in ((steering, delta), (delta, steering)):
        for combine in (operator.add, operator.sub):
            with pytest.raises(KnobError, match=r"Arithmetic is within a kind of knob: .* Steer with both at once"):
                combine(one, other)
    with pytest.raises(TypeError):
        _ = steering + 1
