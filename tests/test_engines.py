"""What the engines share, and the parts of the plugin that need no vLLM; tests/engines holds those inside it."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pico
from trimtab.artifact import DeltaKnob, Knob, LowRank, Rack
from trimtab.check.twin import LAYERS, WIDTH
from trimtab.cli import main
from trimtab.engines.admission import (
    Admission,
    DosePolicy,
    adapter_name,
    adapter_path,
    compose_adapter,
    engine_digest,
    read_adapter_path,
    read_setting,
)
from trimtab.engines.listing import listed
from trimtab.engines.slots import PLACES, Plan, Slots, block_key, knob_digest, plan_request
from trimtab.engines.vllm import Engine, compat, http, launch, scheduler, worker
from trimtab.engines.vllm.front import admit, configure, front_of, load_knob, load_knob_async, open_front, refuse
from trimtab.engines.vllm.settings import KEY, Settings
from trimtab.errors import (
    AdapterError,
    KnobError,
    MissingDependency,
    OptionError,
    TrimtabError,
    TrimtabWarning,
    UnknownName,
)
from trimtab.types import Where

WHERES: tuple[Where, ...] = ("all", "context", "prompt", "completion")
KNOBS = {where: pico.knob(1 + i % 2, name=where, seed=i, where=where) for i, where in enumerate(WHERES)}


def planned(**strengths: float) -> Plan:
    turned = {knob_digest(KNOBS[where]): (KNOBS[where], s) for where, s in strengths.items()}  # pyright: ignore[reportArgumentType]
    return plan_request(turned, torch.float32)


def touches(where: str, position: int, prompt: int) -> bool:
    """Which tokens a `where` means, as the design says."""
    return {
        "all": True,
        "context": position < prompt - 1,
        "prompt": position < prompt,
        "completion": position >= prompt - 1,
    }[where]


def added(strengths: dict[str, float], layer: int, position: int, prompt: int) -> Tensor:
    """What is added to one token, computed knob by knob."""
    total = torch.zeros(WIDTH)
    for where, strength in strengths.items():
        knob = KNOBS[where]  # pyright: ignore[reportArgumentType]
        if knob.site.layer == layer and touches(where, position, prompt):
            total += knob.addend(strength)
    return total


settings_of = st.dictionaries(st.sampled_from(WHERES), st.sampled_from([-1.0, 0.5, 2.0]), max_size=4)


# The table


@given(st.lists(st.tuples(settings_of, st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 99))
def test_every_token_gets_what_its_request_asks_for_however_its_prompt_comes(
    asked: list[tuple[dict[str, float], int]], seed: int
) -> None:
    random = Random(seed)
    slots = Slots(range(LAYERS), WIDTH, settings=len(asked), tokens=64, dtype=torch.float32)
    begins, lengths = [0] * len(asked), [prompt + 3 for _, prompt in asked]
    while any(begin < length for begin, length in zip(begins, lengths, strict=True)):
        step = [i for i in range(len(asked)) if begins[i] < lengths[i] and random.random() < 0.8]
        if random.random() < 0.1:  # all are preempted, and computed again
            begins = [0] * len(asked)
            continue
        counts = [random.randint(1, lengths[i] - begins[i]) for i in step]
        plans = {str(i): planned(**asked[i][0]) for i in step}
        slots.sync(plans)
        slots.fill([*plans], counts, [begins[i] for i in step], [asked[i][1] for i in step])
        at = 0
        for i, count in zip(step, counts, strict=True):
            for position in range(begins[i], begins[i] + count):
                for layer in range(LAYERS):
                    found = slots.table[layer][slots.rows[at]]
                    torch.testing.assert_close(found, added(asked[i][0], layer, position, asked[i][1]))
                at += 1
            begins[i] += count
        assert not slots.rows[at:].any()
        assert not slots.table[:, 0].any()


def test_equal_settings_share_rows_which_stay_while_there_is_room() -> None:
    slots = Slots(range(LAYERS), WIDTH, settings=1, tokens=8, dtype=torch.float32)
    for name in ("a", "b"):  # as two halves of a batch that take turns in a pipeline
        slots.sync({name: planned(all=1.0)})
        slots.fill([name], [2], [0], [2])
        assert int(slots.table.abs().sum(-1).bool().sum()) == 1
        assert not slots.idle
    slots.sync({})
    slots.fill([], [], [], [])
    assert not slots.rows.any()
    assert slots.idle
    for strength in (2.0, 3.0, 4.0, 5.0):  # more than there is room for, one after the other
        slots.sync({"c": planned(prompt=strength, completion=strength)})
        slots.fill(["c"], [1], [1], [2])
        expected = KNOBS["prompt"].addend(strength)
        torch.testing.assert_close(slots.table[KNOBS["prompt"].site.layer][slots.rows[0]], expected)
        assert not slots.table[:, 0].any()


def test_a_request_that_comes_again_under_its_name_gets_what_it_asks_for_now() -> None:
    slots = Slots(range(LAYERS), WIDTH, settings=1, tokens=8, dtype=torch.float32)
    for strength in (1.0, 2.0):
        slots.sync({"a": planned(all=strength)})
        slots.fill(["a"], [1], [0], [4])
        torch.testing.assert_close(slots.table[1][slots.rows[0]], KNOBS["all"].addend(strength))


def test_a_knob_of_several_sites_has_a_row_in_every_layers_table() -> None:
    low, high = pico.knob(0), pico.knob(2)
    both = replace(low, vectors={**low.vectors, **high.vectors}, norms={0: 4.0, 2: 4.0}, also=(high.site,))
    slots = Slots(range(LAYERS), WIDTH, settings=1, tokens=8, dtype=torch.float32)
    slots.sync({"a": plan_request({knob_digest(both): (both, -0.5)}, torch.float32)})
    slots.fill(["a"], [1], [0], [2])
    for layer, addend in both.addends(-0.5).items():
        torch.testing.assert_close(slots.table[layer][slots.rows[0]], addend)
    assert not slots.table[1].any()
    assert knob_digest(both) != knob_digest(low)


def test_a_full_table_and_too_long_a_step_are_refused() -> None:
    slots = Slots(range(LAYERS), WIDTH, settings=1, tokens=4, dtype=torch.float32)
    with pytest.raises(OptionError, match="full"):
        slots.sync({str(i): planned(prompt=1.0 + i, completion=1.0 + i) for i in range(2)})
    with pytest.raises(OptionError, match="5 tokens"):
        slots.fill(["x"], [5], [0], [5])


def test_layers_of_other_stages_are_left_to_them() -> None:
    slots = Slots([0], WIDTH, settings=1, tokens=4, dtype=torch.float32)
    slots.sync({"a": planned(all=1.0)})
    assert not slots.table.any()


def test_a_sum_that_the_dtype_cannot_hold_is_refused() -> None:
    knob = KNOBS["all"]
    with pytest.raises(OptionError, match="too large"):
        plan_request({knob_digest(knob): (knob, 1e6)}, torch.float16)


@given(settings_of, settings_of, st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_a_block_has_one_key_for_one_treatment_of_its_tokens(
    one: dict[str, float], other: dict[str, float], first: int, second: int, block: int
) -> None:
    start, end = 4 * block, 4 * block + 4

    def treatment(setting: dict[str, float], prompt: int) -> list[list[float]]:
        return [[float(added(setting, layer, p, prompt).sum()) for layer in range(LAYERS)] for p in range(start, end)]

    keys = [block_key(planned(**s).keys, p, start, end) for s, p in ((one, first), (other, second))]
    alike = treatment(one, first) == treatment(other, second)
    assert (keys[0] == keys[1]) == alike
    assert bool(keys[0]) == any(map(any, treatment(one, first)))


def test_a_digest_tells_tensors_layers_and_tokens_apart_but_not_names() -> None:
    knob = pico.knob(1, seed=1)
    assert knob_digest(knob) == knob_digest(knob.with_(name="other"))
    others = [pico.knob(1, seed=2), pico.knob(2, seed=1), knob.with_(where="prompt"), knob.with_(gain=0.5)]
    assert len({knob_digest(k) for k in (knob, *others)}) == 5


# Admission


def low(name: str, rank: int = 2, *, seed: int = 0, names: tuple[str, ...] = ("m.a.weight",)) -> DeltaKnob:
    generator = torch.Generator().manual_seed(seed)
    parts = {
        n: LowRank(torch.randn(rank, 6, generator=generator), torch.randn(4, rank, generator=generator)) for n in names
    }
    return DeltaKnob(name, "delta", parts)


def admission(**options: Any) -> Admission:
    found = Admission(torch.float32, max_rank=4, **options)
    for where, knob in KNOBS.items():
        found.put(where, knob)
    found.put("w", low("w"))
    found.put("v", low("v", 3, seed=1))
    return found


def test_a_setting_is_admitted_as_text_as_json_and_as_a_mapping() -> None:
    desk = admission()
    said = [
        desk.admit("all=0.5,prompt=-1"),
        desk.admit({"all": 0.5, "prompt": -1}),
        desk.admit('{"all": 0.5, "prompt": -1}'),
    ]
    assert said[0] == said[1] == said[2]
    assert said[0] is not None
    assert said[0].keys == planned(all=0.5, prompt=-1.0).keys
    assert said[0].stamp() == {"turned": said[0].turned, "keys": list(said[0].keys)}
    assert json.loads(json.dumps(said[0].stamp())) == said[0].stamp()
    assert desk.admit({}) is None
    assert desk.admit({"all": 0.0}) is None


@pytest.mark.parametrize(
    ("knobs", "kind", "words"),
    [
        ({"al": 1}, UnknownName, "Did you mean 'all'"),
        ({"all": "1"}, OptionError, "must be a number"),
        ({"all": True}, OptionError, "must be a number"),
        ({"all": float("inf")}, OptionError, "finite"),
        ("{", OptionError, "not JSON"),
        ("all", OptionError, "name=strength"),
        (3, OptionError, "are written"),
        ({3: 1.0}, OptionError, "by their names"),
        ({"all": 1e39}, OptionError, "too large"),
        ({"w": 1e39}, OptionError, "too large"),
        ({"all": 1e4}, OptionError, "too large"),
        ({"w": 1.0, "v": 1.0, "all": 1.0}, OptionError, "knobs v, w have rank 5 together"),
        ("{" * 3000, OptionError, "not JSON"),
        ('{"a":' * 100_000, OptionError, "not JSON"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said(knobs: object, kind: type[TrimtabError], words: str) -> None:
    with pytest.raises(kind, match=words):
        admission().admit(knobs)


def test_a_name_given_to_another_knob_means_that_one_from_then_on() -> None:
    desk = admission()
    before = desk.admit({"all": 1.0})
    desk.put("all", pico.knob(1, seed=99))
    after = desk.admit({"all": 1.0})
    assert before is not None
    assert after is not None
    assert before.keys != after.keys


def test_two_names_of_one_knob_add_up() -> None:
    desk = admission()
    desk.put("again", KNOBS["all"].with_(name="again"))
    both, whole = desk.admit({"all": 0.5, "again": 0.5}), desk.admit({"all": 1.0})
    assert both is not None
    assert whole is not None
    assert (both.turned, both.keys) == (whole.turned, whole.keys)
    assert both.applied == {"all": 0.5, "again": 0.5}
    assert desk.admit({"all": 0.5, "again": -0.5}).keys == ("", "", "")  # pyright: ignore[reportOptionalMemberAccess]


def desk_with(dose: DosePolicy) -> Admission:
    desk = Admission(torch.float32, dose=dose)
    desk.put("all", KNOBS["all"].with_(tuning={"safe_range": [-0.5, 1.5]}))
    desk.put("untuned", KNOBS["prompt"])
    return desk


def test_strengths_outside_a_safe_range_are_refused_moved_or_taken_as_the_policy_says() -> None:
    with pytest.raises(OptionError, match=r"safe range, -0\.5 to 1\.5"):
        desk_with("strict").admit({"all": 1.6})
    for dose, applied in (("strict", 1.5), ("clamp", 1.5), ("free", 1.5)):
        admitted = desk_with(dose).admit({"all": 1.5})
        assert admitted is not None
        assert admitted.applied == {"all": applied}
    for dose, strength, applied in (("clamp", 1.6, 1.5), ("clamp", -9, -0.5), ("free", 1.6, 1.6)):
        admitted = desk_with(dose).admit({"all": strength})
        assert admitted is not None
        assert admitted.applied == {"all": applied}
        assert list(admitted.turned.values()) == [applied]


def test_two_names_of_one_knob_are_moved_into_its_safe_range_together() -> None:
    desk = desk_with("clamp")
    desk.put("again", desk.knobs["all"])
    admitted = desk.admit({"all": 2.0, "again": 1.0})
    assert admitted is not None
    assert admitted.applied == {"all": 1.0, "again": 0.5}


@pytest.mark.parametrize("order", [("all", "again"), ("again", "all")])
def test_a_knob_under_two_names_has_to_be_safe_as_each_was_tuned(order: tuple[str, str]) -> None:
    for dose in ("strict", "clamp"):
        desk = desk_with(dose)
        desk.put("again", desk.knobs["all"].with_(tuning={"safe_range": [-0.5, 1.0]}))
        setting = dict.fromkeys(order, 0.6)
        if dose == "strict":
            with pytest.raises(OptionError, match=r"safe range, -0\.5 to 1"):
                desk.admit(setting)
        else:
            admitted = desk.admit(setting)
            assert admitted is not None
            assert sum(admitted.applied.values()) == pytest.approx(1.0)


def test_a_knob_that_was_never_tuned_is_turned_under_the_free_policy_only() -> None:
    for dose in ("strict", "clamp"):
        with pytest.raises(OptionError, match="never tuned"):
            desk_with(dose).admit({"untuned": 0.1})
        assert desk_with(dose).admit({"untuned": 0}) is None
    assert desk_with("free").admit({"untuned": 5.0})


def test_a_name_that_was_dropped_is_unknown() -> None:
    desk = desk_with("free")
    desk.drop("untuned")
    for call in (lambda: desk.drop("untuned"), lambda: desk.admit({"untuned": 1})):
        with pytest.raises(UnknownName, match="Unknown knob 'untuned'"):
            call()


def test_knobs_that_change_while_a_request_is_admitted_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, other = desk_with("free"), pico.knob(1, seed=99)
    held = desk.knobs
    putting = threading.Thread(target=desk.put, args=("all", other))

    def plan(*arguments: Any) -> Plan:
        putting.start()
        putting.join(0.1)
        assert putting.is_alive()
        return plan_request(*arguments)

    monkeypatch.setattr("trimtab.engines.admission.plan_request", plan)
    first = desk.admit({"all": 1.0})
    putting.join(10)
    monkeypatch.undo()
    second = desk.admit({"all": 1.0})
    assert first is not None
    assert second is not None
    assert first.keys != second.keys  # nothing of the old knob was kept under its name
    assert desk.knobs["all"] is other
    assert held["all"] is not other  # whoever goes through the knobs has a list that stays as it is


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        (low("dense").dense_copy(), "dense difference"),
        (pico.knob(operation="ablate"), "looks at the stream"),
        (pico.knob(operation="kernel"), "looks at the stream"),
        (pico.knob(where="thinking"), "steers 'thinking' tokens"),
    ],
)
def test_knobs_that_no_table_can_express_are_refused(knob: Knob | DeltaKnob, words: str) -> None:
    with pytest.raises(KnobError, match=words):
        engine_digest(knob)


def test_a_weight_knob_that_the_dtype_cannot_hold_is_refused_before_any_worker_sees_it() -> None:
    desk = Admission(torch.float16, max_rank=4)
    desk.put("w", DeltaKnob("w", "delta", {"m.weight": LowRank(torch.ones(1, 2), torch.full((2, 1), 100.0))}))
    assert desk.admit({"w": 600.0})
    with pytest.raises(OptionError, match="too large"):
        desk.admit({"w": 700.0})


def test_a_safe_range_holds_for_all_names_of_a_knob_together_and_never_for_off() -> None:
    desk = Admission(torch.float32, dose="strict")
    for name in ("x", "y"):
        desk.put(name, KNOBS["all"].with_(tuning={"safe_range": [0.5, 1.5]}))
    assert desk.admit({"x": 0}) is None
    assert desk.admit({"x": 0.25, "y": 0.25})
    with pytest.raises(OptionError, match="Strength 3"):
        desk.admit({"x": 1.5, "y": 1.5})


def test_weight_knobs_need_an_engine_with_adapters() -> None:
    with pytest.raises(KnobError, match="max_lora_rank"):
        Admission(torch.float32).put("w", low("w"))


def test_one_changed_entry_of_a_large_adapter_changes_its_digest() -> None:
    a = torch.zeros(4, 40_000)
    changed = a.clone()
    changed[2, 12_346] = 1.0
    knobs = [DeltaKnob("w", "delta", {"m.weight": LowRank(side, torch.ones(2, 4))}) for side in (a, changed)]
    assert engine_digest(knobs[0]) != engine_digest(knobs[1])
    assert knobs[0].digest == knobs[1].digest  # which looks at some of the values


def test_an_adapter_is_the_sum_of_its_knobs_exactly() -> None:
    one, two = low("one", names=("m.a.weight", "m.b.weight")), low("two", 3, seed=1)
    rank, parts = compose_adapter([(one, 0.7), (two, -0.4)], torch.float64)
    assert rank == 5
    a, b = parts["m.a"]
    torch.testing.assert_close(
        b @ a, 0.7 * one.dense("m.a.weight").double() - 0.4 * two.dense("m.a.weight").double(), atol=1e-6, rtol=1e-5
    )
    a, b = parts["m.b"]
    torch.testing.assert_close(b @ a, 0.7 * one.dense("m.b.weight").double(), atol=1e-6, rtol=1e-5)


def test_the_path_of_an_adapter_says_what_it_is() -> None:
    path = adapter_path({"b": 0.1 + 0.2, "a": -1.0, "c": 0.0})
    assert read_adapter_path(path) == {"a": -1.0, "b": 0.1 + 0.2}
    assert read_adapter_path("trimtab:") == {}
    assert adapter_path({"c": 0.0}) == ""
    name, number = adapter_name(path)
    assert adapter_name(path) == (name, number)
    assert name.startswith("trimtab-")
    assert 1 <= number < 2**31
    assert adapter_name("trimtab:")[1] != number


def test_a_setting_keeps_its_numbers() -> None:
    assert read_setting('{"a": 0.1}') == {"a": 0.1}
    assert set(PLACES) == set(WHERES)


# The plugin: settings, cache key, model


def test_the_settings_of_an_engine_travel_with_its_configuration() -> None:
    assert Settings.read({}) is None
    assert Settings.read(None) is None
    assert Settings.of(SimpleNamespace(additional_config={})) is None
    settings = Settings.read({KEY: {"knobs": {"a": "f"}, "layers": [1]}})
    assert settings is not None
    made = SimpleNamespace(additional_config={"x": 1, KEY: {"knobs": {"a": "f"}, "layers": [1]}})
    settings.put_into(made)
    assert made.additional_config == {"x": 1, KEY: {"version": settings.version, "layers": [1]}}
    assert Settings.of(copy.copy(made)) == settings
    with pytest.raises(OptionError, match="lost its knobs"):
        Settings.of(SimpleNamespace(additional_config=made.additional_config))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "holds settings"),
        ({"knob": {}}, "Did you mean 'knobs'"),
        ({"knobs": ["f"]}, "paths by name"),
        ({"knobs": {"a": 3}}, "paths by name"),
        ({"strict": "no"}, "true or false"),
        ({"layers": [-1]}, "counted from 0"),
        ({"layers": []}, "counted from 0"),
    ],
)
def test_wrong_settings_are_refused(found: object, words: str) -> None:
    with pytest.raises(TrimtabError, match=words):
        Settings.read({KEY: found})


def stamped(**strengths: float) -> SimpleNamespace:
    turned = {knob_digest(KNOBS[w]): s for w, s in strengths.items()}  # pyright: ignore[reportArgumentType]
    return SimpleNamespace(extra_args={KEY: {"turned": turned, "keys": list(planned(**strengths).keys)}})


def test_only_blocks_that_a_knob_touches_have_a_key_of_their_own() -> None:
    def keys(params: object, start: int) -> list[object]:
        request = SimpleNamespace(sampling_params=params, num_prompt_tokens=20)
        return scheduler.key_block(lambda *_: ["its own"], request, start, start + 16)

    assert keys(None, 0) == keys(SimpleNamespace(extra_args=None), 0) == keys(stamped(completion=1.0), 0) == ["its own"]
    assert keys(stamped(completion=1.0), 16) == ["its own", ("trimtab", f"3:{planned(completion=1.0).after.key}")]
    assert keys(stamped(all=1.0), 0) != keys(stamped(all=2.0), 0)


class Block(nn.Module):
    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden: Tensor) -> Any:
        return (hidden + 1, hidden) if self.pair else hidden + 1


class PPMissingLayer(nn.Identity):
    pass


class Model(nn.Module):
    def __init__(self, *, pair: bool = True, missing: int = 0) -> None:
        super().__init__()
        blocks = [PPMissingLayer() if i < missing else Block(pair) for i in range(LAYERS)]
        self.model = nn.ModuleDict(
            {"layers": nn.ModuleList(blocks), "vision_tower": nn.ModuleList(map(Block, [0] * LAYERS))}
        )


def config(*, eager: bool = True) -> Any:
    model = SimpleNamespace(
        dtype=torch.float32,
        hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS),
        get_hidden_size=lambda: WIDTH,
        enforce_eager=eager,
    )
    return SimpleNamespace(
        model_config=model,
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=None),
        scheduler_config=SimpleNamespace(max_num_seqs=2, max_num_batched_tokens=16),
    )


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("eager", [True, False])
def test_a_layer_that_returns_its_stream_in_one_part_or_two_is_steered_once(
    tmp_path: Path, pair: bool, eager: bool
) -> None:
    KNOBS["all"].save(tmp_path / "k")
    settings = Settings(knobs={"all": str(tmp_path / "k")}, digests={"all": knob_digest(KNOBS["all"])})
    model = Model(pair=pair)
    for _ in range(2):  # a model that is loaded again
        steering = worker.Steering(config(eager=eager), model, torch.device("cpu"), settings)
    steering.fill({"a": steering.plan(stamped(all=2.0)), "b": None}, ["a", "b"], [2, 1], [0, 5], [4, 3])
    hidden, layer = torch.zeros(5, WIDTH), KNOBS["all"].site.layer
    out = model.model["layers"][layer](hidden)  # pyright: ignore[reportIndexIssue]
    first = out[0] if pair else out
    expected = torch.ones(5, WIDTH)
    expected[:2] += KNOBS["all"].addend(2.0)
    torch.testing.assert_close(first, expected)
    if pair:
        assert out[1] is hidden
    steering.fill({}, ["b"], [1], [6], [3])
    out = model.model["layers"][layer](hidden)  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(out[0] if pair else out, torch.ones(5, WIDTH))


def test_layers_are_found_but_for_those_of_a_tower_and_of_other_stages() -> None:
    assert list(worker.own_blocks(Model(), LAYERS)) == [*range(LAYERS)]
    assert list(worker.own_blocks(Model(missing=2), LAYERS)) == [*range(2, LAYERS)]
    with pytest.raises(AdapterError, match="Cannot find the 99 decoder layers"):
        worker.own_blocks(Model(), 99)


def test_a_worker_with_another_file_refuses_to_start(tmp_path: Path) -> None:
    KNOBS["all"].save(tmp_path / "k")
    settings = Settings(knobs={"all": str(tmp_path / "k")}, digests={"all": "another"})
    with pytest.raises(KnobError, match="another one on this machine"):
        worker.Steering(config(), Model(), torch.device("cpu"), settings)


def test_a_worker_answers_what_it_has_loaded_or_why_not(tmp_path: Path) -> None:
    KNOBS["all"].save(tmp_path / "k")
    own = SimpleNamespace(get_model=Model)
    assert worker.receive_knob(own, str(tmp_path / "k")) == {"digest": knob_digest(KNOBS["all"])}
    assert "Cannot load" in worker.receive_knob(own, str(tmp_path / "gone"))["error"]


def test_engines_with_knobs_are_refused_and_others_left_alone_where_a_seam_moved() -> None:
    wrapper = refuse(compat.moved(["vllm.x.y is not there"]))
    plain = SimpleNamespace(additional_config={})
    assert wrapper(lambda args: "made", plain) == "made"
    with pytest.raises(AdapterError, match=r"vllm\.x\.y is not there"):
        wrapper(lambda args: "made", SimpleNamespace(additional_config={KEY: {}}))


# The front end, beside stand-ins for vLLM


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A configuration such as vLLM makes, of a model with a tokenizer; adapters up to rank 4."""
    model = pico.model()
    pico.tokenizer().save_pretrained(tmp_path / "model")
    found = {
        ("vllm.platforms", "current_platform"): SimpleNamespace(is_cpu=lambda: False),
        ("vllm", "envs"): SimpleNamespace(VLLM_USE_RUST_FRONTEND=False),
        ("vllm.exceptions", "VLLMValidationError"): lambda text, parameter: ValueError(f"{parameter}: {text}"),
        ("vllm.lora.request", "LoRARequest"): lambda name, number, path: SimpleNamespace(name=name, path=path),
    }
    monkeypatch.setattr(compat, "vllm", lambda module, name: found[module, name])
    parallel = {"prefill_context_parallel_size": 1, "use_ubatching": False, "data_parallel_size": 1}
    return SimpleNamespace(
        additional_config={},
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        kv_transfer_config=None,
        lora_config=SimpleNamespace(max_lora_rank=4),
        found=found,
        model_config=SimpleNamespace(
            dtype=torch.float32,
            hf_config=model.config,
            hf_text_config=model.config,
            get_hidden_size=lambda: WIDTH,
            tokenizer=str(tmp_path / "model"),
            tokenizer_revision=None,
            trust_remote_code=False,
            skip_tokenizer_init=False,
        ),
    )


def started(engine: Any, **settings: Any) -> Any:
    """Take an engine through its start, and return its processor of inputs."""
    engine.additional_config = {KEY: settings}
    configure(lambda args: engine, None)
    processor = SimpleNamespace()
    open_front(lambda *_: None, processor, engine)
    return processor


def ask(processor: Any, **options: Any) -> Any:
    """Send a request through admission; returns what reaches the engine, adapter included."""

    def process_inputs(
        self: Any, request_id: str, prompt: str, params: Any, lora_request: Any = None, resumable: bool = False
    ) -> Any:
        own = SimpleNamespace(**vars(params))  # vLLM copies them
        return SimpleNamespace(sampling_params=own, lora_request=lora_request)

    knobs = options.pop("extra_args", None)
    return admit(process_inputs, processor, "1", "prompt", SimpleNamespace(extra_args=knobs), **options)


def save(tmp_path: Path, *knobs: Any) -> dict[str, str]:
    for knob in knobs:
        knob.save(tmp_path / knob.name)
    return {knob.name: str(tmp_path / knob.name) for knob in knobs}


def low_on_the_model(name: str = "w", *, place: str = "model.layers.0.self_attn.o_proj.weight") -> DeltaKnob:
    own = dict(pico.model().named_parameters())[place]
    parts = {place: LowRank(torch.ones(2, own.shape[1]), torch.ones(own.shape[0], 2))}
    return DeltaKnob(name, "delta", parts)


def test_a_request_is_stamped_with_digests_and_the_caller_keeps_its_own(engine: Any, tmp_path: Path) -> None:
    processor = started(engine, knobs=save(tmp_path, KNOBS["all"], low_on_the_model()))
    request = ask(processor, extra_args={"knobs": {"all": 2.0}, "x": 1})
    assert request.sampling_params.extra_args["x"] == 1
    assert request.sampling_params.extra_args[KEY] == {
        "turned": {knob_digest(KNOBS["all"]): 2.0},
        "keys": list(planned(all=2.0).keys),
    }
    assert request.lora_request is None
    request = ask(processor, extra_args={"knobs": "w=0.5"})
    assert request.lora_request.path == adapter_path({engine_digest(low_on_the_model()): 0.5})
    assert ask(processor).sampling_params.extra_args is None


def test_requests_that_cannot_be_served_as_asked_are_refused(engine: Any, tmp_path: Path) -> None:
    processor = started(engine, knobs=save(tmp_path, KNOBS["all"], low_on_the_model()))
    for options, words in (
        ({"extra_args": {"knobs": {"al": 1}}}, "Unknown knob"),
        ({"extra_args": {KEY: {}}}, "not for requests to pass"),
        ({"extra_args": {"knobs": "all=1"}, "resumable": True}, "fed in parts"),
        ({"extra_args": {"knobs": "w=1"}, "lora_request": "mine"}, "one adapter"),
    ):
        with pytest.raises(ValueError, match=words):
            ask(processor, **options)
    assert ask(processor, lora_request="mine", extra_args={"knobs": "all=1"}).lora_request == "mine"
    with pytest.raises(ValueError, match="started without knobs"):
        ask(SimpleNamespace(trimtab=None), extra_args={"knobs": "all=1"})
    assert ask(SimpleNamespace(trimtab=None), resumable=True)


def test_on_a_cpu_requests_without_an_adapter_get_one_that_does_nothing(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.32.0")
    engine.found["vllm.platforms", "current_platform"] = SimpleNamespace(is_cpu=lambda: True)
    steering = started(engine, knobs=save(tmp_path, KNOBS["all"]))
    assert ask(steering).lora_request is None
    processor = started(engine, knobs=save(tmp_path, KNOBS["all"], low_on_the_model()))
    assert (
        ask(processor).lora_request.path
        == ask(processor, extra_args={"knobs": "all=1"}).lora_request.path
        == "trimtab:"
    )
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.33.0")
    assert ask(started(engine, knobs=save(tmp_path, low_on_the_model()))).lora_request is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("parallel_config.prefill_context_parallel_size", 2),
        ("parallel_config.use_ubatching", True),
        ("cache_config.kv_sharing_fast_prefill", True),
        ("kv_transfer_config", "a connector"),
    ],
)
def test_options_of_vllm_that_do_not_go_with_knobs_are_refused(engine: Any, place: str, value: object) -> None:
    part, _, option = place.rpartition(".")
    setattr(getattr(engine, part) if part else engine, option, value)
    with pytest.raises(OptionError, match=option):
        started(engine)
    engine.additional_config = {}
    assert configure(lambda args: engine, None) is engine


def test_another_front_end_and_layers_that_are_not_there_are_refused(engine: Any) -> None:
    with pytest.raises(OptionError, match="has not"):
        started(engine, layers=[LAYERS])
    engine.found["vllm", "envs"].VLLM_USE_RUST_FRONTEND = True
    with pytest.raises(OptionError, match="VLLM_USE_RUST_FRONTEND"):
        started(engine)


def test_knobs_that_do_not_fit_the_model_are_refused_at_start(engine: Any, tmp_path: Path) -> None:
    other = KNOBS["all"].with_(provenance={"architecture": "another", "n_layers": LAYERS})
    for knob, settings, words in (
        (pico.knob(1, name="wide", width=16), {}, "has width 16"),
        (pico.knob(99, name="high"), {}, "acts on layer 99"),
        (KNOBS["all"], {"layers": [0]}, "was started for layers"),
        (other, {}, "another architecture"),
        (low("foreign", 2), {}, "lacks 1 of them"),
        (low("thick", 9), {}, "rank 9|lacks"),
    ):
        with pytest.raises(KnobError, match=words):
            started(engine, knobs=save(tmp_path, knob), **settings)
    with pytest.warns(TrimtabWarning, match="another architecture"):
        started(engine, knobs=save(tmp_path, other), strict=False)
    embedding = low_on_the_model("embedding", place="model.embed_tokens.weight")
    with pytest.raises(KnobError, match="no linear layer"):
        started(engine, knobs=save(tmp_path, embedding))
    with pytest.raises(KnobError, match="lacks"):
        low("foreign").check_shapes(pico.model().to("meta"), loaded=False)


def test_a_file_that_changed_since_the_start_is_refused(engine: Any, tmp_path: Path) -> None:
    started(engine, knobs=save(tmp_path, KNOBS["all"]))
    pico.knob(1, name="all", seed=77).save(tmp_path / "all")
    with pytest.raises(KnobError, match="another knob than"):
        open_front(lambda *_: None, SimpleNamespace(), engine)


def test_a_knob_is_loaded_once_every_worker_has_it(engine: Any, tmp_path: Path) -> None:
    path = save(tmp_path, KNOBS["all"])["all"]
    good, bad = {"digest": knob_digest(KNOBS["all"])}, {"error": "no such file"}
    for answers, words in (
        ([good, bad], "cannot load the knob"),
        ([good, {"digest": "x"}], "differs between machines"),
    ):
        running = SimpleNamespace(input_processor=started(engine), collective_rpc=lambda *_, args, a=answers: a)
        with pytest.raises(KnobError, match=words):
            load_knob(running, "mood", path)
        assert not front_of(running).admission.knobs
    running = SimpleNamespace(input_processor=started(engine), collective_rpc=lambda *_, args: [good, good])
    load_knob(running, "mood", path)
    assert ask(running.input_processor, extra_args={"knobs": "mood=1"})
    with pytest.raises(KnobError, match="A knob's name"):
        load_knob(running, "a b", path)

    async def answer(*_: object, args: object) -> list[dict[str, str]]:
        return [good]

    running = SimpleNamespace(input_processor=started(engine), collective_rpc=answer)
    asyncio.run(load_knob_async(running, "mood", path))
    assert "mood" in front_of(running).admission.knobs
    engine.parallel_config.data_parallel_size = 2
    running = SimpleNamespace(input_processor=started(engine), collective_rpc=answer)
    with pytest.raises(OptionError, match="several replicas"):
        asyncio.run(load_knob_async(running, "mood", path))


class Several(nn.Module):
    def __init__(self, shape: tuple[int, ...], parts: int) -> None:
        super().__init__()
        self.shape, self.parts = shape, parts

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(self.shape) for _ in range(self.parts))


@pytest.mark.parametrize(("shape", "parts"), [((4, 2, WIDTH), 1), ((4, WIDTH - 1), 2), ((4, WIDTH), 3)])
def test_a_layer_whose_output_is_not_the_stream_is_refused(shape: tuple[int, ...], parts: int) -> None:
    model = Model()
    model.model["layers"] = nn.ModuleList(Several(shape, parts) for _ in range(LAYERS))  # pyright: ignore[reportIndexIssue]
    worker.Steering(config(eager=False), model, torch.device("cpu"), Settings())
    with pytest.raises(AdapterError, match="not the residual stream"):
        model.model["layers"][0]()  # pyright: ignore[reportIndexIssue]


def test_an_engine_that_was_started_without_knobs_says_so() -> None:
    with pytest.raises(OptionError, match="started without knobs"):
        front_of(SimpleNamespace(input_processor=SimpleNamespace()))


# Over HTTP


def test_knobs_move_to_where_vllm_takes_them_from() -> None:
    moved = http.move_knobs(b'{"prompt": "a", "knobs": {"m": 0.5}, "vllm_xargs": {"x": 1}}', "/v1/completions")
    assert moved is not None
    assert json.loads(moved) == {"prompt": "a", "vllm_xargs": {"x": 1, "knobs": '{"m": 0.5}'}}
    moved = http.move_knobs(b'{"knobs": "m=0.5"}', "/v1/chat/completions")
    assert moved is not None
    assert json.loads(moved) == {"vllm_xargs": {"knobs": "m=0.5"}}
    for body in (b"", b'no json "knobs"', b'["knobs"]', b'{"knobs": null}', b'{"prompt": "say \\"knobs\\""}'):
        assert http.move_knobs(body, "/v1/completions") is None


def app_of(desk: Admission) -> Any:
    """An app such as the middleware finds: its engine knows the knob m."""
    engine = SimpleNamespace(input_processor=SimpleNamespace(trimtab=SimpleNamespace(admission=desk)))
    return SimpleNamespace(state=SimpleNamespace(engine_client=engine))


def headers_of(size: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-length", size), (b"content-type", b"application/json"), (b"x", b"y")]


def exchange(path: str, *chunks: bytes, method: str = "POST") -> tuple[list[Any], list[Any]]:
    """Send a request through the middleware; return what the app got and what came back."""
    got: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append(dict(scope["headers"]))
        while True:
            message = await receive()
            got.append(message)
            if not message.get("more_body"):
                break
        await send("answered")

    waiting = [{"type": "http.request", "body": c, "more_body": c is not chunks[-1]} for c in chunks]

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    desk = Admission(torch.float32)
    desk.put("m", KNOBS["all"])
    size = str(sum(map(len, chunks))).encode()
    scope = {"type": "http", "method": method, "path": path, "headers": headers_of(size), "app": app_of(desk)}
    asyncio.run(http.KnobsInBody(app)(scope, receive, send))
    return got, sent


def test_the_middleware_hands_on_a_body_with_its_knobs_moved_and_its_length_mended() -> None:
    got, sent = exchange("/v1/completions", b'{"knobs": ', b'"m=1"}')
    assert json.loads(got[1]["body"]) == {"vllm_xargs": {"knobs": "m=1"}}
    assert got[0][b"content-length"] == str(len(got[1]["body"])).encode()
    assert got[0][b"x"] == b"y"
    assert sent == ["answered"]


def test_the_middleware_hands_on_everything_else_as_it_came() -> None:
    got, _ = exchange("/v1/completions", b'{"pro', b'mpt": 1}')
    assert [message["body"] for message in got[1:]] == [b'{"pro', b'mpt": 1}']
    assert got[0][b"content-length"] == b"13"
    got, _ = exchange("/v1/models", b"", method="GET")
    assert got[1]["body"] == b""


def test_the_middleware_refuses_wrong_knobs_before_an_answer_begins_and_those_that_would_be_lost() -> None:
    for path, body, words in (
        ("/v1/completions", b'{"knobs": "zz=1", "stream": true}', "Unknown knob 'zz'"),
        ("/v1/messages", b'{"vllm_xargs": {"knobs": "m=nan"}}', "must be finite"),
        ("/v1/completions", b'{"\\u006bnobs": "zz=1"}', "Unknown knob 'zz'"),
        ("/v1/completions", '{"knobs": "zz=1"}'.encode("utf-16"), "Unknown knob 'zz'"),
        ("/tokenize", b'{"knobs": "m=1"}', "takes no 'knobs'"),
        ("/v1/completions", b'{"knobs": "m=1", "use_beam_search": true}', "Beam search"),
        ("/v1/completions", b'{"knobs": 3}', "are written"),
        ("/v1/completions", b'{"knobs": "m=1", "vllm_xargs": {"knobs": "m=1"}}', "either in it or beside it"),
    ):
        got, sent = exchange(path, body)
        assert not got
        assert sent[0]["status"] == 400
        assert words in json.loads(sent[1]["body"])["error"]["message"]


def test_the_list_of_knobs_says_what_a_client_needs() -> None:
    entries = listed(admission(), ["w"])["data"]
    assert [entry["id"] for entry in entries] == [*WHERES, "w", "v"]
    assert entries[0]["layer"] == KNOBS["all"].site.layer
    assert entries[-1]["kind"] == "delta"
    assert (entries[0]["gain"], entries[0]["projects"]) == (1.0, False)
    assert entries[-2]["projects"]


def test_an_order_to_load_names_a_knob_and_a_file() -> None:
    assert http.read_order(b'{"name": "m", "path": "f"}') == ("m", "f")
    for body in (
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"name": "m", "path": ""}',
        b'{"name": "m"}',
        b'{"name": "m", "path": 3}',
        b'{"name": "m", "path": "f", "x": 1}',
    ):
        with pytest.raises(OptionError):
            http.read_order(body)


# Starting it


def test_an_engine_gets_room_for_all_weight_knobs_at_once() -> None:
    rack = {"a": low("a", 5), "b": low("b", 6), "c": KNOBS["all"]}
    options = launch.engine_options(rack, {"knobs": {}}, {"max_loras": 2, "additional_config": {"x": 1}})  # pyright: ignore[reportArgumentType]
    assert options == {
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 2,
        "additional_config": {"x": 1, "trimtab": {"knobs": {}}},
    }
    assert "enable_lora" not in launch.engine_options({"c": KNOBS["all"]}, {}, {})  # pyright: ignore[reportArgumentType]
    for additional in ("text", {KEY: {}}):
        with pytest.raises(OptionError, match="additional_config"):
            launch.engine_options({}, {}, {"additional_config": additional})  # pyright: ignore[reportArgumentType]
    with pytest.raises(KnobError, match="rank 600 together"):
        launch.engine_options({"a": low("a", 600)}, {}, {})  # pyright: ignore[reportArgumentType]


def test_the_bundled_model_is_found_and_computes_in_float32(tmp_path: Path) -> None:
    place, options = launch.model_options("prefworld")
    assert (Path(place) / "config.json").is_file()
    assert options == {"dtype": "float32"}
    assert launch.model_options("some/model") == ("some/model", {})
    with pytest.raises(OptionError, match=r"no config\.json"):
        launch.model_options(tmp_path)


def test_knobs_that_lie_in_files_are_read_where_they_are_and_others_written_down(tmp_path: Path) -> None:
    KNOBS["all"].save(tmp_path / "k")
    files = launch.Files(Rack(all=tmp_path / "k", prompt=KNOBS["prompt"]), {"all": tmp_path / "k"})
    assert files.paths["all"] == str(tmp_path / "k")
    assert knob_digest(Knob.load(files.paths["prompt"])) == knob_digest(KNOBS["prompt"])
    files.cleanup()
    assert not Path(files.paths["prompt"]).exists()
    assert (tmp_path / "k").exists()


def test_an_engine_refuses_what_is_no_rack() -> None:
    with pytest.raises(OptionError, match="Rack of named knobs"):
        Engine("prefworld", {"m": 1})  # pyright: ignore[reportArgumentType]


def test_without_vllm_the_message_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "1")  # which the command sets, and the test puts back
    if compat.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(MissingDependency, match="trimtab\\[vllm\\]"):
        compat.vllm("vllm", "LLM")
    for words in (["generate", "prefworld", "hi", "--engine", "vllm"], ["serve", "prefworld", "--engine", "vllm"]):
        assert main(words) == 2
        assert "pip install 'trimtab[vllm]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "prefworld", "hi", "--engine", "sglang"], "invalid choice"),
        (["generate", "prefworld", "hi", "--engine-option", "a=1"], "is for --engine vllm"),
        (["generate", "prefworld", "hi", "--engine", "vllm", "--batch-size", "3"], "--batch-size is not for --engine"),
        (["generate", "prefworld", "hi", "--engine", "vllm", "--device", "cpu"], "--device is not for --engine"),
        (["serve", "prefworld", "--engine", "vllm", "--port", "0"], "1 to 65535"),
        (["serve", "prefworld", "--engine", "vllm", "--json"], "Leave --json out"),
        (["serve", "prefworld", "--engine", "vllm", "--host", "256.0.0.1"], "Cannot listen on '256.0.0.1'"),
        (["serve", "prefworld", "--engine", "vllm", "--layers", "-1"], "counts from 0"),
        (["serve", "prefworld", "--engine", "vllm", "--engine-option", "a"], "name=value"),
        (["serve", "prefworld", "--engine", "vllm", "--knob", "gone"], "no file"),
    ],
)
def test_wrong_words_are_refused_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    assert main(words) == 2
    assert said in capsys.readouterr().err
