"""What the engines share, and the parts of the plugin that need no vLLM; tests/engines holds those inside it."""

from __future__ import annotations

import asyncio
import json
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
from trimtab.artifact import DeltaKnob, Knob, LowRank
from trimtab.check.twin import LAYERS, WIDTH
from trimtab.cli import main
from trimtab.engines.admission import (
    Admission,
    adapter_name,
    adapter_path,
    compose_adapter,
    engine_digest,
    read_adapter_path,
    read_setting,
)
from trimtab.engines.slots import PLACES, Plan, Slots, block_key, knob_digest, plan_request
from trimtab.engines.vllm import compat, http, launch, scheduler, worker
from trimtab.engines.vllm.front import configure, front_of, refuse
from trimtab.engines.vllm.settings import KEY, Settings
from trimtab.errors import AdapterError, KnobError, MissingDependency, OptionError, TrimtabError, UnknownName
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


def test_equal_settings_share_rows_which_are_zeroed_with_the_last_of_them() -> None:
    slots = Slots(range(LAYERS), WIDTH, settings=2, tokens=8, dtype=torch.float32)
    plan = planned(all=1.0)
    slots.sync({"a": plan, "b": planned(all=1.0)})
    assert int(slots.table.abs().sum(-1).bool().sum()) == 1
    slots.sync({"b": plan})
    assert slots.table.any()
    slots.fill(["b"], [2], [0], [2])
    assert not slots.idle
    slots.sync({})
    slots.fill([], [], [], [])
    assert not slots.table.any()
    assert not slots.rows.any()
    assert slots.idle


def test_a_request_that_comes_again_under_its_name_gets_what_it_asks_for_now() -> None:
    slots = Slots(range(LAYERS), WIDTH, settings=1, tokens=8, dtype=torch.float32)
    for strength in (1.0, 2.0):
        slots.sync({"a": planned(all=strength)})
        slots.fill(["a"], [1], [0], [4])
        torch.testing.assert_close(slots.table[1][slots.rows[0]], KNOBS["all"].addend(strength))


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
        ({"all": 1e39}, OptionError, "too large"),
        ({"w": 1.0, "v": 1.0}, OptionError, "rank 5 together"),
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
    assert both == whole
    assert desk.admit({"all": 0.5, "again": -0.5}).keys == ("", "", "")  # pyright: ignore[reportOptionalMemberAccess]


def test_strengths_outside_a_safe_range_are_refused_where_that_is_asked_for() -> None:
    tuned = KNOBS["all"].with_(tuning={"safe_range": [-0.5, 1.5]})
    for safe in (False, True):
        desk = Admission(torch.float32, safe_ranges=safe)
        desk.put("all", tuned)
        assert desk.admit({"all": 1.5})
        if safe:
            with pytest.raises(OptionError, match=r"safe range, -0\.5 to 1\.5"):
                desk.admit({"all": 1.6})
        else:
            assert desk.admit({"all": 1.6})


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
    with pytest.raises(OptionError, match="too large"):
        compose_adapter([(one, 1e8)], torch.float16)


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


def test_the_settings_of_an_engine_are_read_and_stored() -> None:
    assert Settings.read({}) is None
    assert Settings.read(None) is None
    settings = Settings.read({KEY: {"knobs": {"a": "f"}, "layers": [1]}})
    assert settings is not None
    again = Settings.read({KEY: settings.stored()})
    assert again is not None
    assert again.knobs == {"a": "f"}
    assert again.layers == [1]
    assert again.version


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


@pytest.mark.parametrize("option", ["enable_dbo", "ubatch_size", "prefill_context_parallel_size"])
def test_what_cuts_a_step_into_pieces_is_refused(option: str) -> None:
    made = SimpleNamespace(additional_config={KEY: {}}, parallel_config=SimpleNamespace(**{option: 2}))
    with pytest.raises(OptionError, match=option):
        configure(lambda args: made, None)
    plain = SimpleNamespace(additional_config={}, parallel_config=made.parallel_config)
    assert configure(lambda args: plain, None) is plain


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

    size = str(sum(map(len, chunks))).encode()
    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-length", size), (b"x", b"y")]}
    asyncio.run(http.KnobsInBody(app)(scope, receive, send))
    return got, sent


def test_the_middleware_hands_on_a_body_with_its_knobs_moved_and_its_length_mended() -> None:
    got, sent = exchange("/v1/completions", b'{"knobs": ', b'"m=1"}')
    assert json.loads(got[1]["body"]) == {"vllm_xargs": {"knobs": "m=1"}}
    assert got[0] == {b"x": b"y", b"content-length": str(len(got[1]["body"])).encode()}
    assert sent == ["answered"]


def test_the_middleware_hands_on_everything_else_as_it_came() -> None:
    got, _ = exchange("/v1/completions", b'{"pro', b'mpt": 1}')
    assert [message["body"] for message in got[1:]] == [b'{"pro', b'mpt": 1}']
    assert got[0][b"content-length"] == b"13"
    got, _ = exchange("/v1/models", b"", method="GET")
    assert got[1]["body"] == b""


def test_the_middleware_refuses_knobs_that_would_be_lost() -> None:
    for path, body, words in (
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
    desk = admission()
    entries = http.listed(SimpleNamespace(admission=desk))["data"]  # pyright: ignore[reportArgumentType]
    assert [entry["id"] for entry in entries] == [*WHERES, "w", "v"]
    assert entries[0]["layer"] == KNOBS["all"].site.layer
    assert entries[-1]["kind"] == "delta"


def test_an_order_to_load_names_a_knob_and_a_file() -> None:
    assert http.read_order(b'{"name": "m", "path": "f"}') == ("m", "f")
    for body in (b"", b"[]", b'{"name": "m"}', b'{"name": "m", "path": 3}', b'{"name": "m", "path": "f", "x": 1}'):
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
    with pytest.raises(KnobError, match="rank 600 together"):
        launch.engine_options({"a": low("a", 600)}, {}, {})  # pyright: ignore[reportArgumentType]


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
        (["serve", "prefworld"], "--engine"),
        (["serve", "prefworld", "--engine", "vllm", "--port", "0"], "1 to 65535"),
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
