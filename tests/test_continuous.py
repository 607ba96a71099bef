"""transformers' continuous batching with knobs: every request of a mixed batch comes out as it does alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig

import pico
from served import NEWER, SERVES
from trimtab.artifact import AnyKnob, DeltaKnob, LowRank, Rack
from trimtab.engines.continuous import batching, steering
from trimtab.engines.continuous.batching import check_seams
from trimtab.engines.continuous.engine import Engine
from trimtab.engines.continuous.requests import Request, Sampling, Step
from trimtab.engines.continuous.sampling import Draw, choose, log_probabilities
from trimtab.errors import AdapterError, EngineError, KnobError, OptionError, TrimtabWarning, UnknownName
from trimtab.runtime import steer
from trimtab.types import Where

if not SERVES:
    pytest.skip(NEWER, allow_module_level=True)

NEW = 8
WHERES: tuple[Where, ...] = ("all", "context", "prompt", "completion")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "mixtral", "gpt_oss", "lfm2")
"""With and without sliding windows, position tables, experts, tied heads."""


def low_rank(lm: Any, seed: int = 1, *, like: str = "_proj", rank: int = 2, name: str = "low") -> DeltaKnob:
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Any] = {}
    for label, p in lm.named_parameters():
        if like in label and p.dim() == 2 and "layers" in label:
            a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, p.shape[1]), (p.shape[0], rank)))
            parts[label] = LowRank(0.1 * a, 0.1 * b)
    return DeltaKnob(name, "planted", parts)


def rack_of(lm: Any, *, weights: bool = False) -> Rack:
    width = lm.config.get_text_config().hidden_size
    knobs: dict[str, AnyKnob] = {
        where: pico.knob(1 + i % 2, name=where, seed=i, where=where, width=width) for i, where in enumerate(WHERES)
    }
    if weights:
        knobs |= {"low": low_rank(lm), "thin": low_rank(lm, 2, like="mlp", rank=3, name="thin")}
    return Rack(**knobs)


def engine(lm: Any, rack: Rack | None = None, **options: Any) -> Engine:
    return Engine(
        lm, pico.tokenizer(), rack, **{"dose": "free", "requests": 8, "tokens": 32, "cache_tokens": 1024, **options}
    )


class Answer(NamedTuple):
    tokens: list[int]
    steps: list[Step]


class Box:
    """Takes the steps of one request."""

    def __init__(self) -> None:
        self.steps: queue.SimpleQueue[Step] = queue.SimpleQueue()

    def answer(self) -> Answer:
        steps: list[Step] = []
        while not steps or not steps[-1].ending:
            steps.append(self.steps.get(timeout=60))
        return Answer([step.token.id for step in steps if step.token is not None], steps)


def ask(own: Engine, ids: list[int], setting: Mapping[str, float] | None = None, new: int = NEW, **options: Any) -> Box:
    box = Box()
    admitted = own.admission.admit(setting or {})
    own.submit(Request(ids, new, knobs=admitted, **options), box.steps.put)
    return box


def alone(lm: Any, ids: list[int], dose: Mapping[Any, float], new: int = NEW) -> list[int]:
    """What plain transformers answers, greedily, without a cache."""
    row = list(ids)
    with torch.no_grad(), steer(lm, dose, prompt_lengths=[len(ids)]):
        for _ in range(new):
            row.append(int(lm(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(ids) :]


def mixture(rack: Rack, count: int, seed: int = 0) -> tuple[list[list[int]], list[dict[str, float]]]:
    rng = Random(seed)
    ids = pico.prompts([rng.randint(1, 40) for _ in range(count)], seed=seed)
    names = list(rack)
    strengths = (-1.0, -0.5, 0.5, 1.0, 2.0)
    return ids, [
        {name: rng.choice(strengths) for name in rng.sample(names, rng.randint(0, min(3, len(names))))} for _ in ids
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_requests_under_different_knobs_share_a_batch_and_come_out_as_alone(architecture: str) -> None:
    lm = pico.model(architecture)
    rack = rack_of(lm)
    ids, settings = mixture(rack, 14)
    expected = [alone(lm, row, rack.resolve(setting)) for row, setting in zip(ids, settings, strict=True)]
    bare = [alone(lm, row, {}) for row in ids]
    assert sum(one != other for one, other in zip(expected, bare, strict=True)) > 5  # knobs change what is said
    with engine(lm, rack) as own:
        boxes = [ask(own, row, setting) for row, setting in zip(ids, settings, strict=True)]
        assert [box.answer().tokens for box in boxes] == expected
        assert own.live == 0


def test_weight_knobs_of_low_rank_mix_with_steering_in_one_batch() -> None:
    lm = pico.model()
    rack = rack_of(lm, weights=True)
    ids, settings = mixture(rack, 16, seed=3)
    assert sum(bool({"low", "thin"} & setting.keys()) for setting in settings) > 5
    expected = [alone(lm, row, rack.resolve(setting)) for row, setting in zip(ids, settings, strict=True)]
    with engine(lm, rack) as own:
        boxes = [ask(own, row, setting) for row, setting in zip(ids, settings, strict=True)]
        assert [box.answer().tokens for box in boxes] == expected


def test_a_cache_too_small_for_all_gives_the_same_answers_and_so_do_prompts_in_pieces() -> None:
    lm = pico.model()
    rack = rack_of(lm)
    ids, settings = mixture(rack, 24, seed=5)
    expected = [alone(lm, row, rack.resolve(s), 24) for row, s in zip(ids, settings, strict=True)]
    with engine(lm, rack, tokens=8, cache_tokens=160) as own:
        boxes = [ask(own, row, setting, 24) for row, setting in zip(ids, settings, strict=True)]
        assert [box.answer().tokens for box in boxes] == expected


def test_blocks_of_one_prompt_are_not_shared_between_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = pico.model()
    rack = rack_of(lm)
    ids = pico.prompts([60])[0]
    settings: list[dict[str, float]] = [{}, {"all": 2}, {"all": -2}, {"prompt": 2}, {}, {"all": 2}]
    expected = [alone(lm, ids, rack.resolve(setting)) for setting in settings]

    def one_after_another() -> list[list[int]]:
        with engine(lm, rack, tokens=64) as own:
            return [ask(own, ids, setting).answer().tokens for setting in settings]

    assert one_after_another() == expected

    class Sharing(ContinuousBatchingConfig):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "allow_block_sharing": True})

    monkeypatch.setattr(batching, "ContinuousBatchingConfig", Sharing)
    assert one_after_another() != expected  # the control: what sharing by tokens alone would do


def test_what_a_seed_draws_does_not_depend_on_the_batch() -> None:
    lm = pico.model()
    rack = rack_of(lm)
    ids = pico.prompts([7])[0]
    warm = Sampling(temperature=1.3, top_p=0.9, seed=11)
    with engine(lm, rack) as own:
        first = ask(own, ids, {"all": 0.5}, sampling=warm).answer().tokens
        crowd = [ask(own, row, setting) for row, setting in zip(*mixture(rack, 6), strict=True)]
        crowd += [ask(own, ids, {}, sampling=Sampling(temperature=1.0)) for _ in range(4)]
        again = ask(own, ids, {"all": 0.5}, sampling=warm).answer().tokens
        other = ask(own, ids, {"all": 0.5}, sampling=Sampling(temperature=1.3, seed=12)).answer().tokens
        for box in crowd:
            box.answer()
    assert first == again
    assert first != other


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draw = Draw(Sampling(temperature=0.5, seed=0))
    drawn = torch.cat([choose(logits, [draw]) for _ in range(4000)])
    shares = drawn.bincount(minlength=4) / len(drawn)
    assert torch.allclose(shares, (logits[0] / 0.5).softmax(-1), atol=0.03)
    cut = Draw(Sampling(temperature=2.0, top_p=0.7, seed=0))
    kept = torch.cat([choose(logits, [cut]) for _ in range(500)]).unique()
    assert kept.tolist() == [0, 1]  # 0.46 and 0.28: the second one reaches 0.7
    only = Draw(Sampling(temperature=2.0, top_p=1e-6, seed=0))
    assert choose(logits.expand(1, 4), [only]).tolist() == [0]


def test_greedy_and_drawn_rows_stand_side_by_side() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(Sampling()), Draw(Sampling(temperature=1.0, seed=1)), Draw(Sampling())]
    chosen = choose(logits, draws)
    assert chosen[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert choose(logits[1:2], [Draw(Sampling(temperature=1.0, seed=1))])[0] == chosen[1]
    assert choose(logits * 1e30, [Draw(Sampling(temperature=1e-3, seed=1))] * 3).tolist() == logits.argmax(-1).tolist()


def test_log_probabilities_are_those_of_the_steered_model() -> None:
    lm = pico.model()
    rack = rack_of(lm)
    ids = pico.prompts([9])[0]
    with engine(lm, rack) as own:
        answer = ask(own, ids, {"all": 1}, new=3, sampling=Sampling(logprobs=4)).answer()
    with torch.no_grad(), steer(lm, {rack["all"]: 1}, prompt_lengths=[9]):
        rows = lm(torch.tensor([ids + answer.tokens]), use_cache=False).logits[0, 8:-1].log_softmax(-1)
    for step, row in zip(answer.steps, rows, strict=True):
        assert step.token is not None
        assert step.token.logprob == pytest.approx(float(row[step.token.id]), abs=1e-4)
        best = row.topk(4)
        assert [token for token, _ in step.token.top] == best.indices.tolist()
        assert [value for _, value in step.token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert log_probabilities(torch.zeros(3), 1, 9)[1][0][1] == pytest.approx(-1.0986, abs=1e-3)


def test_projections_are_read_where_the_token_was_predicted() -> None:
    lm = pico.model()
    rack = Rack(**rack_of(lm), off=pico.knob(2, name="off", seed=9))
    ids = pico.prompts([9])[0]
    with engine(lm, rack) as own:
        crowd = [ask(own, row, setting) for row, setting in zip(*mixture(rack_of(lm), 5), strict=True)]
        answer = ask(own, ids, {"all": 1}, new=3, projections=True).answer()
        plain = ask(own, ids, {"all": 1}, new=3).answer()
        for box in crowd:
            assert all(not step.token.projections for step in box.answer().steps if step.token is not None)
        assert set(own.directions) == {*WHERES, "off"}
    assert plain.tokens == answer.tokens
    adapter = own.adapter
    for name, knob in rack.items():
        layer = knob.site.layer
        with torch.no_grad(), adapter.read([layer]) as reading, steer(lm, {rack["all"]: 1}, prompt_lengths=[9]):
            lm(torch.tensor([ids + answer.tokens]), use_cache=False)
        expected = reading.acts[layer][0, 8:-1] @ knob.direction / knob.norms[layer]
        seen = [step.token.projections[name] for step in answer.steps if step.token is not None]
        assert seen == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_end_token_ends_an_answer_and_is_left_out() -> None:
    lm = pico.model()
    ids = pico.prompts([5])[0]
    said = alone(lm, ids, {})
    end = said[3]
    with engine(lm) as own:
        answer = ask(own, ids, ends=frozenset([end])).answer()
        assert answer.tokens == said[: said.index(end)]
        assert answer.steps[-1] == Step(None, "stop")
        whole = ask(own, ids).answer()
    assert (whole.tokens, whole.steps[-1].ending) == (said, "length")


def test_a_request_that_is_given_up_says_nothing_more_and_leaves_its_place() -> None:
    lm = pico.model()
    ids = pico.prompts([6])[0]
    expected = alone(lm, ids, {})
    with engine(lm, requests=2, cache_tokens=4096) as own:
        started = threading.Event()
        heard: list[Step] = []

        def listen(step: Step) -> None:
            heard.append(step)
            started.set()

        names = [own.submit(Request(ids, 240), listen) for _ in range(4)]
        assert started.wait(60)
        for name in (*names, "request-unknown"):
            own.cancel(name)
        assert own.live == 0
        count = len(heard)
        assert ask(own, ids).answer().tokens == expected
        assert len(heard) <= count + 2  # those of the step that was running
        assert all(not step.ending for step in heard)


def test_a_request_whose_numbers_overflow_fails_and_its_neighbours_do_not() -> None:
    lm = pico.model()
    huge = {"norm": 4e36, "gain": 10.0}
    one, same = pico.knob(1, seed=1000, **huge), pico.knob(2, **huge)  # one direction; together beyond float32
    rack = Rack(one=one, same=same, **rack_of(lm))
    ids, settings = mixture(rack_of(lm), 6)
    expected = [alone(lm, row, rack.resolve(setting)) for row, setting in zip(ids, settings, strict=True)]
    with engine(lm, rack) as own:
        boxes = [ask(own, row, setting) for row, setting in zip(ids, settings, strict=True)]
        broken = ask(own, ids[0], {"one": 20, "same": 20}).answer()
        assert broken.steps[-1].ending == "error"
        assert "not finite" in broken.steps[-1].error
        assert [box.answer().tokens for box in boxes] == expected
        assert own.alive


def test_a_name_given_to_another_knob_changes_nothing_in_flight() -> None:
    lm = pico.model()
    old, new = pico.knob(1, seed=1), pico.knob(1, seed=2)
    ids = pico.prompts([6])[0]
    by_old, by_new = alone(lm, ids, {old: 1}, 40), alone(lm, ids, {new: 1}, 40)
    with engine(lm, Rack(k=old), cache_tokens=2048) as own:
        before = ask(own, ids, {"k": 1}, 40)
        before.steps.put(before.steps.get(timeout=60))  # it has begun
        own.load("k", new)
        after = ask(own, ids, {"k": 1}, 40)
        assert sorted(before.answer().tokens) == sorted(by_old)
        assert after.answer().tokens == by_new
        own.unload("k")
        with pytest.raises(UnknownName, match="Unknown knob 'k'"):
            own.admission.admit({"k": 1})


def test_weight_knobs_can_be_loaded_and_taken_away_while_requests_run() -> None:
    lm = pico.model()
    first, second = low_rank(lm), low_rank(lm, 5, like="o_proj", name="second")
    ids = pico.prompts([6])[0]
    by_first, by_second = alone(lm, ids, {first: 1}, 40), alone(lm, ids, {second: -1}, 12)
    with engine(lm, Rack(w=first), cache_tokens=2048) as own:
        running = ask(own, ids, {"w": 1}, 40)
        running.steps.put(running.steps.get(timeout=60))
        own.load("x", second)
        own.unload("w")
        late = ask(own, ids, {"x": -1}, 12)
        assert late.answer().tokens == by_second
        assert sorted(running.answer().tokens) == sorted(by_first)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.mlp.experts.3.weight", "one expert of several"),
        ("lm_head.weight", "the output head"),
        ("model.embed_tokens.weight", "no linear layer"),
    ],
)
def test_a_weight_that_cannot_differ_from_token_to_token_is_refused_and_the_engine_lives_on(
    name: str, words: str
) -> None:
    lm = pico.model(tie_word_embeddings=False)
    if "experts" in name:
        lm.get_submodule("model.layers.1.mlp").experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))
    shape = lm.get_parameter(name).shape
    rows, columns = (*shape, 1)[:2]
    knob = DeltaKnob("w", "planted", {name: LowRank(torch.ones(1, columns), torch.ones(rows, 1))})
    with engine(lm) as own:
        with pytest.raises(KnobError, match=words):
            own.load("w", knob)
        own.load("fine", low_rank(lm))
        assert len(ask(own, [7, 8]).answer().tokens) == NEW


def test_a_knob_that_is_taken_away_between_admission_and_the_queue_still_acts() -> None:
    lm = pico.model()
    knob = low_rank(lm)
    ids = pico.prompts([6])[0]
    expected = alone(lm, ids, {knob: 1.0})
    assert expected != alone(lm, ids, {})
    with engine(lm, Rack(w=knob)) as own:
        admitted = own.admission.admit({"w": 1.0})
        own.unload("w")
        ask(own, ids).answer()  # a step without it
        box = Box()
        own.submit(Request(ids, NEW, knobs=admitted), box.steps.put)
        assert box.answer().tokens == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": []}, "has a prompt"),
        ({"max_new_tokens": 0}, "room for an answer"),
        ({"max_new_tokens": 5000}, "does not fit"),
        ({"ids": [100_000]}, "beyond the"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with engine(pico.model()) as own:
        with pytest.raises((OptionError, AdapterError), match=words):
            own.submit(Request(**{"ids": [7, 8], "max_new_tokens": 4, **changes}), print)
        assert own.live == 0


def test_knobs_that_do_not_fit_are_refused() -> None:
    lm = pico.model()
    for knob, words in (
        (pico.knob(width=7), "width|hidden size"),
        (pico.knob(operation="ablate"), "looks at the stream"),
    ):
        with pytest.raises(KnobError, match=words):
            engine(lm, Rack(k=knob))
    other = pico.knob().with_(provenance={"architecture": "gpt2"})
    with pytest.raises(KnobError, match="gpt2"):
        engine(lm, Rack(k=other))
    with pytest.warns(TrimtabWarning), engine(lm, Rack(k=other), strict=False) as own:
        assert own.admission.knobs["k"] is other
    for sizes in ({"requests": 0}, {"tokens": 4}, {"cache_tokens": 20}, {"cache_tokens": 0}):
        with pytest.raises(OptionError):
            engine(lm, **sizes)


def test_a_step_has_room_for_a_token_of_every_request() -> None:
    lm = pico.model()
    with Engine(lm, pico.tokenizer(), requests=600, cache_tokens=1024) as own:
        assert own.alive


def test_the_model_is_as_it_was_once_the_engine_is_closed() -> None:
    lm = pico.model()
    ids = torch.tensor(pico.prompts([9]))

    def logits() -> Tensor:
        with torch.no_grad():
            return lm(ids).logits

    before, kind = logits(), lm.config._attn_implementation
    own = engine(lm, rack_of(lm, weights=True))
    box = ask(own, ids[0].tolist(), {"all": 1, "low": 1}, 240)
    own.close()
    assert box.answer().steps[-1].ending == "error"
    assert torch.equal(logits(), before)
    assert lm.config._attn_implementation == kind
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())
    with pytest.raises(EngineError, match="stopped"):
        ask(own, [7])


def test_when_the_loop_dies_every_request_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = pico.model()
    own = engine(lm)
    monkeypatch.setattr(own._steering, "prepare", lambda *_: 1 / 0)
    boxes = [ask(own, ids) for ids in pico.prompts([5, 6])]
    for box in boxes:
        step = box.answer().steps[-1]
        assert step.ending == "error"
        assert "zero" not in step.error  # what happened is for the log
    assert "division" in own.trouble
    for _ in range(100):
        if not own.alive:
            break
        threading.Event().wait(0.05)
    assert not own.alive
    with pytest.raises(EngineError, match="stopped"):
        ask(own, [7])
    own.close()


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "opt"])
def test_models_that_cannot_be_batched_so_are_refused_at_the_start(architecture: str) -> None:
    lm = pico.model(architecture)
    with pytest.raises(AdapterError, match="continuous batching"):
        engine(lm)
    assert not any(module._forward_hooks for module in lm.modules())


def test_a_cache_that_no_memory_could_hold_is_an_option_out_of_range() -> None:
    with pytest.raises(OptionError, match="Give fewer"):
        engine(pico.model(), cache_tokens=10**12)


def wrong_rows(slots: Any, *_: object) -> None:
    slots.rows.zero_()


def test_a_seam_that_means_something_else_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering.Slots, "fill", wrong_rows)
    with pytest.raises(AdapterError, match=r"log-probability off by"):
        engine(pico.model())


def test_a_seam_that_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_seams()
    for place, needed, words in (
        ("model_runner.ModelRunner.gone", (), "gone"),
        ("model_runner.ModelRunner._sample", ("temperature",), "temperature"),
        ("nowhere.Gone", (), "Gone"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(batching.SEAMS, place, needed)
            with pytest.raises(AdapterError, match=f"no '{words}'"):
                check_seams()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before
