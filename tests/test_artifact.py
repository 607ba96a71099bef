"""The knob file: exact, self-describing, safe to load; knobs as vectors; racks and panels."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import pico
from trimtab.artifact import FORMAT_VERSION, Knob, Rack, file, load_panel, model_identity, save_panel
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
        ({"gain": -1.0}, "Turn a knob around with -knob"),
        ({"site": Site(5, "last")}, "active site 5/last has no vector"),
        ({"vectors": {A: vector(1), B: vector(2, 5)}}, r"site 2/post_instruction\[-1\] has \[5\], not \[32\]"),
        ({"vectors": {A: vector(1)[None]}}, r"must have shape \[D\]"),
        ({"vectors": {A: torch.full((4,), math.nan)}}, "not finite"),
        ({"norms": {1: 4.0}}, "Layer 2 needs a positive mean residual norm; got None"),
        ({"norms": {1: 0.0, 2: 1.0}}, "Layer 1 needs a positive mean residual norm; got 0.0"),
        ({"tuning": {"safe_range": [2, 1]}}, "safe range"),
        ({"tuning": {"safe_range": "wide"}}, "safe range"),
    ],
)
def test_knob_that_makes_no_sense_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KnobError, match=message):
        knob(**changes)


def test_unknown_place_and_operation_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="Known: all, completion, context, prompt"):
        knob(where="everywhere")
    with pytest.raises(UnknownName, match="Known: ablate, add"):
        knob(operation="multiply")


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
        ({"site": B}, "summed at one layer on the same tokens"),
        ({"where": "all"}, "summed at one layer on the same tokens"),
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


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k"
    knob().save(path)
    before = path.read_bytes()

    def full_disk(_descriptor: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space left"):
            knob(name="new").save(path)
    with pytest.raises(KnobError, match="cannot be written as JSON"):
        knob(provenance={"what": object()}).save(path)
    with pytest.raises(KnobError, match="cannot be written as JSON"):
        knob(diagnostics={"angle": math.nan}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Change Trimtab's JSON header inside a knob file."""
    outer = header_of(data)
    inner = json.loads(outer["__metadata__"]["trimtab"])
    changed = change(inner)
    outer["__metadata__"]["trimtab"] = changed if isinstance(changed, str) else json.dumps(inner)
    text = json.dumps(outer).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "not a whole safetensors file"),
    "text": (lambda _: b"hello, this is no knob", "not a whole safetensors file"),
    "cut": (lambda data: data[:-5], "not a whole safetensors file"),
    "huge header length": (lambda data: struct.pack("<Q", 2**62) + data[8:], "not a whole safetensors file"),
    "flipped bit": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum differs"),
    "no JSON": (lambda data: with_header(data, lambda _: "{"), "header is not JSON"),
    "deep JSON": (lambda data: with_header(data, lambda _: "[" * 200_000), "header is not JSON"),
    "huge number": (lambda data: with_header(data, lambda _: "9" * 10_000), "header is not JSON"),
    "list": (lambda data: with_header(data, lambda _: "[]"), "not a JSON object"),
    "later version": (lambda data: with_header(data, lambda h: h.update(format_version=99)), "format version 99"),
    "other kind": (lambda data: with_header(data, lambda h: h.update(kind="delta")), "kind 'delta'"),
    "no name": (lambda data: with_header(data, lambda h: h.update(name=None)), "name is NoneType; expected str"),
    "bad name": (lambda data: with_header(data, lambda h: h.update(name="a=b")), "printable"),
    "bad gain": (lambda data: with_header(data, lambda h: h.update(gain="1")), "gain is '1'; expected a number"),
    "infinite gain": (lambda data: with_header(data, lambda h: h.update(gain=math.inf)), "gain is not a finite"),
    "endless gain": (lambda data: with_header(data, lambda h: h.update(gain=10**400)), "gain is not a finite"),
    "bad norms": (lambda data: with_header(data, lambda h: h.update(norms={"one": 1})), "header is wrong"),
    "bad site": (lambda data: with_header(data, lambda h: h.update(site="x")), "A site is written layer/position"),
    "lost site": (lambda data: with_header(data, lambda h: h.update(site="9/last")), "active site 9/last has no"),
    "bad where": (lambda data: with_header(data, lambda h: h.update(where="x")), "where='x'"),
    "bad provenance": (lambda data: with_header(data, lambda h: h.update(provenance=[])), "provenance is list"),
    "bad tuning": (lambda data: with_header(data, lambda h: h.update(tuning=3)), "tuning is int"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_a_knob_error_that_names_the_problem(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "k"
    knob().save(path)
    damage, message = DAMAGE[kind]
    path.write_bytes(damage(path.read_bytes()))
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
    with pytest.raises(KnobError, match="no such file"):
        Knob.load(tmp_path)
    save_file({"direction": vector(1)}, tmp_path / "plain")
    with pytest.raises(KnobError, match="without Trimtab's header"):
        Knob.load(tmp_path / "plain")
    torch.save({"a": vector(1)}, tmp_path / "pickle")
    with pytest.raises(KnobError, match="not a whole safetensors file"):
        Knob.load(tmp_path / "pickle")
    header = {"kind": "steering", "name": "a", "method": "m", "where": "all", "operation": "add"}
    file.write_file(tmp_path / "stray", {"weight": vector(1)}, header)
    with pytest.raises(KnobError, match="tensor 'weight'"):
        Knob.load(tmp_path / "stray")
    more = {"site": "1/last", "gain": 1, "norms": {"1": 1}, "provenance": {}, "diagnostics": {}}
    file.write_file(tmp_path / "half", {"vector/1/last": vector(1).half()}, header | more)
    with pytest.raises(KnobError, match="not all float32"):
        Knob.load(tmp_path / "half")
    file.write_file(tmp_path / "matrix", {"vector/1/last": vector(1)[None]}, header | more)
    with pytest.raises(KnobError, match=r"must have shape \[D\]"):
        Knob.load(tmp_path / "matrix")


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
        ('{"knobs": {"a": {"path": "k", "strength": "1"}}}', "needs a path"),
        ('{"knobs": {"a": {"path": "nowhere"}}}', "no such file"),
        ('{"knobs": {"a": {"path": "k", "strength": NaN}}}', "strength of 'a' must be finite"),
    ],
)
def test_bad_panel_is_an_error_that_names_the_problem(tmp_path: Path, text: str, message: str) -> None:
    knob().save(tmp_path / "k")
    (tmp_path / "panel.json").write_text(text)
    with pytest.raises((KnobError, OptionError), match=message):
        load_panel(tmp_path / "panel.json")
