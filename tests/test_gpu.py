"""On an accelerator: the vectors, tokens and weights of the processor, and no waiting for it at decode steps."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, StaticCache

import pico
from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, LowRank
from trimtab.capture import capture
from trimtab.evals.choices import pairs_task
from trimtab.evals.evaluate import evaluate
from trimtab.generate import generate
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.render import load
from trimtab.runtime import Dose, steer
from trimtab.train.steps import learn_lookahead
from trimtab.tune import tune
from trimtab.types import Message, Pair
from trimtab.weights.live import applied

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Chosen answers have"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # torch
]
DEVICE = "cuda"
ROWS = pico.prompts([5, 8, 11])


def pairs(n: int = 6) -> Pairs:
    return Pairs(Pair((Message("user", f"q{i}" * (i + 1)),), f"yes{'!' * i}", "no" * (i + 2)) for i in range(n))


def twins(**changes: Any) -> list[PreTrainedModel]:
    """The same model on the processor and on the accelerator."""
    lm = pico.model(**changes)
    return [lm, copy.deepcopy(lm).to(DEVICE)]  # pyright: ignore[reportArgumentType]


def inputs(lm: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.to(lm.device) for name, value in pico.pad(ROWS).items() if name != "position_ids"}


def decoded(lm: PreTrainedModel, settings: Any, **options: Any) -> Tensor:
    """Greedy tokens under a setting, on the processor."""
    run: Any = lm.generate
    with steer(lm, settings):
        out = run(**inputs(lm), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=pico.PAD, **options)
    return out[:, -8:].cpu()


def logits(lm: PreTrainedModel, settings: Any) -> Tensor:
    with torch.no_grad(), steer(lm, settings):
        return lm(**inputs(lm)).logits.cpu()


def weight_knob(lm: PreTrainedModel, *, rank: int = 0, name: str = "weights") -> DeltaKnob:
    generator = torch.Generator().manual_seed(rank)
    parts: dict[str, Any] = {}
    for path, weight in lm.named_parameters():
        if "layers" in path and weight.dim() == 2:
            out, into = weight.shape
            down, up = (0.05 * torch.randn(*shape, generator=generator) for shape in ((rank, into), (out, rank)))
            parts[path] = LowRank(down, up) if rank else 0.02 * torch.randn(out, into, generator=generator)
    return DeltaKnob(name, "random", parts)


def every_kind(lm: PreTrainedModel) -> dict[str, AnyKnob]:
    lookahead = learn_lookahead(lm, pico.tokenizer(), pairs(4), layers=[0, 1, 2], rank=None).with_(gain=2.0)
    added: dict[str, AnyKnob] = {where: pico.knob(where=where) for where in ("all", "prompt", "completion")}
    reacting = {op: pico.knob(operation=op) for op in ("ablate", "piecewise", "kernel")}
    return {
        **added,
        **reacting,
        "low rank": weight_knob(lm, rank=2),
        "dense": weight_knob(lm),
        "lookahead, exact": lookahead,
        "lookahead, scaled": lookahead.with_(backend="scaled"),
    }


def test_steered_logits_and_tokens_are_those_of_the_processor() -> None:
    ours, theirs = twins()
    for kind, knob in every_kind(ours).items():
        if kind not in ("prompt", "completion"):  # these need a KV cache to see where the prompt ends
            near = 1e-2 if kind == "lookahead, scaled" else 1e-4  # a difference of near numbers
            torch.testing.assert_close(logits(theirs, {knob: 0.5}), logits(ours, {knob: 0.5}), atol=near, rtol=0)
        assert torch.equal(decoded(theirs, {knob: 0.5}), decoded(ours, {knob: 0.5})), kind


def test_a_setting_per_row_is_each_row_by_itself() -> None:
    ours, theirs = twins()
    kinds = {kind: knob for kind, knob in every_kind(ours).items() if kind != "dense"}
    for kind, knob in kinds.items():
        settings: list[Dose] = [{knob: 0.0}, {knob: 0.5}, {knob: -0.5}]
        assert torch.equal(decoded(theirs, settings), decoded(ours, settings)), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_and_leaving_are_bitwise_the_plain_model(dtype: torch.dtype) -> None:
    lm = pico.model(dtype=dtype).to(DEVICE)  # pyright: ignore[reportArgumentType]
    before = [weight.clone() for weight in lm.parameters()]
    plain = logits(lm, {})
    for knob in (pico.knob(), weight_knob(lm), weight_knob(lm, rank=2)):
        assert not torch.equal(logits(lm, {knob: 1.0}), plain)
        assert torch.equal(logits(lm, {knob: 0.0}), plain)
        assert torch.equal(logits(lm, {}), plain)
    with applied(lm, {weight_knob(lm): 0.7}):
        assert any(not torch.equal(a, b) for a, b in zip(lm.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), before, strict=True))


def test_a_decode_step_under_a_knob_waits_no_more_than_a_plain_one() -> None:
    lm = pico.model().to(DEVICE)  # pyright: ignore[reportArgumentType]

    def waits(settings: Any) -> int:
        given = inputs(lm)
        with torch.no_grad(), steer(lm, settings), warnings.catch_warnings(record=True) as seen:
            cache = lm(**given, use_cache=True)[pico.CACHE]
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for step in range(3):
                    mask = torch.ones(len(ROWS), given["input_ids"].shape[1] + step + 1, device=DEVICE)
                    lm(given["input_ids"][:, :1], attention_mask=mask, **{pico.CACHE: cache}, use_cache=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in seen)

    def waiting(_layer: int, acts: Tensor) -> None:
        acts.sum().item()

    waits({})  # what is made ready once
    plain = waits({})
    with Adapter(lm).watch([1], waiting):
        assert waits({}) == plain + 3  # they are seen
    reacting = [pico.knob(operation=operation) for operation in ("ablate", "piecewise", "kernel")]
    for knob in (pico.knob(), pico.knob(where="completion"), weight_knob(lm, rank=2), *reacting):
        assert waits({knob: 1.0}) == plain
        assert waits([{knob: 1.0}, {}, {knob: 0.5}]) == plain


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_with_a_static_cache_are_the_eager_ones(mode: str) -> None:
    lm = pico.model().to(DEVICE)  # pyright: ignore[reportArgumentType]
    step: Any = torch.compile(lm, dynamic=False, mode=mode)
    ids = torch.tensor(pico.prompts([8])).to(DEVICE)

    def tokens(settings: Any, call: Any) -> list[int]:
        with torch.no_grad(), steer(lm, settings):
            cache = StaticCache(config=lm.config, max_cache_len=32)
            token = lm(input_ids=ids, **{pico.CACHE: cache}, use_cache=True).logits[:, -1:].argmax(-1)
            found = [int(token)]
            for _ in range(6):
                token = call(input_ids=token, **{pico.CACHE: cache}, use_cache=True).logits[:, -1:].argmax(-1).clone()
                found.append(int(token))
        return found

    settings: list[Any] = [{}, {pico.knob(): 1.0}, [{pico.knob(2, seed=3, where="completion"): 1.0}]]
    for setting in settings:
        assert tokens(setting, step) == tokens(setting, lm)
    assert len({*map(tuple, (tokens(setting, lm) for setting in settings))}) > 1


@pytest.mark.parametrize("method", ["palrs", "pca", "cold-kernel"])
def test_knobs_learned_there_are_those_learned_here(method: str) -> None:
    found = [learn(lm, pico.tokenizer(), pairs(), method=method, layers=[0, 1, 2]) for lm in twins()]
    assert found[0].sites == found[1].sites
    for site in found[0].sites:
        assert found[1].vectors[site].device.type == "cpu"
        assert float(cosine_similarity(found[0].vectors[site], found[1].vectors[site], 0)) > 0.999


def test_shared_prompts_are_read_there_as_here() -> None:
    many = Pairs(Pair((Message("user", f"{n:03}" + "q" * 97),), "yes" * (1 + n % 3), "no") for n in range(120))
    options: dict[str, Any] = {
        "positions": ["last", "response_mean"],
        "format": "question_response",
        "token_budget": 2**16,
    }
    ours, theirs = (capture(lm, pico.tokenizer(), many, **options) for lm in twins())
    assert ours.shared
    assert theirs.shared  # so many are worth the calls
    torch.testing.assert_close(theirs.chosen, ours.chosen, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(theirs.means, ours.means, atol=1e-3, rtol=1e-3)


def test_reading_backs_off_where_memory_is_really_out() -> None:
    lm = pico.model(hidden_size=512, intermediate_size=16384).to(DEVICE)  # pyright: ignore[reportArgumentType]
    long = Pairs(
        Pair((Message("user", f"{i}" + "q" * 100),), "y" * (99 + i % 3), "n" * (100 + i % 3)) for i in range(64)
    )
    options: dict[str, Any] = {"positions": ["last"], "layers": [1], "format": "question_response"}
    whole = capture(lm, pico.tokenizer(), long, token_budget=1024, **options)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    room = torch.cuda.memory_allocated() + 600e6
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
    try:
        less = capture(lm, pico.tokenizer(), long, token_budget=65_536, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free > room
    torch.testing.assert_close(less.chosen, whole.chosen, atol=1e-3, rtol=1e-3)


def test_the_bundled_model_does_its_main_job_there() -> None:
    lm, words = load("prefworld", device=DEVICE)
    knob = learn(lm, words, world.pairs("math", 40))
    held = world.pairs("math", 16, split="validation")
    tuned = tune(knob, lm, words, held, gains=[0.1, 0.2], dose_response=False)
    found = evaluate(lm, words, [pairs_task(world.pairs("math", 16, split="test"))], [{tuned: 1.0}])
    assert found.settings
    said = generate(lm, words, ["2 + 2 ="], knobs={tuned: 1.0}, max_new_tokens=8)
    assert said[0].text


@pytest.mark.filterwarnings("ignore")  # of what is off-loaded
def test_a_model_on_two_devices_is_steered_as_on_one() -> None:
    accelerate = pytest.importorskip("accelerate")
    ours, theirs = pico.model(), pico.model()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": DEVICE, "model.norm": DEVICE, "lm_head": DEVICE}
    places |= {f"model.layers.{n}": "cpu" if n < 2 else DEVICE for n in range(Adapter(theirs).n_layers)}
    split = accelerate.dispatch_model(theirs, places)
    for knob in (pico.knob(0), pico.knob(2), pico.knob(2, operation="ablate")):
        with torch.no_grad(), steer(split, {knob: 1.0}):
            found = split(**pico.pad(ROWS)).logits.cpu()
        with torch.no_grad(), steer(ours, {knob: 1.0}):
            wanted = ours(**pico.pad(ROWS)).logits
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
