"""Models that are not plain: wrapped by PEFT, quantised, dispatched, tied, of several dtypes; several at once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import trimtab
from pico import CACHE, EXPERTS, LAYERS, PAD, knob, model, pad, prompts, tokenizer
from trimtab.adapter import Adapter
from trimtab.artifact import Knob, model_identity
from trimtab.capture import capture
from trimtab.check.trace import tracing
from trimtab.checkpoint import describe_model
from trimtab.errors import AdapterError, CacheError
from trimtab.evals.likelihood import pair_margins
from trimtab.pairs import Pairs
from trimtab.runtime import steer
from trimtab.types import Message, Pair, Where

pytestmark = [
    # what peft calls of transformers
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

INPUTS = pad(prompts([6, 4]))
PAIRS = Pairs(Pair((Message("user", f"q{i}"),), f"answer! {i}", f"answer? {i}") for i in range(8))


def lora(task: str | None = None, **options: Any) -> LoraConfig:
    """Adapters that change what the model says: their weights begin at random."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type=task, **options)


def wrapped(task: str | None = None, base: PreTrainedModel | None = None) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base or model(), lora(task)).eval()


@torch.no_grad()
def added(lm: nn.Module, layer: int, setting: dict[Knob, float], inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    """What `setting` adds to the block's output at the real tokens, `[tokens, D]`."""
    with Adapter(lm).read([layer]) as base:
        lm(**inputs)
    with Adapter(lm).read([layer]) as steered, steer(lm, setting):
        lm(**inputs)
    return (steered.acts[layer].float() - base.acts[layer].float())[inputs["attention_mask"].bool()]


def check_exact(lm: nn.Module, atol: float = 1e-5) -> None:
    """Steered minus base is the addend at every layer, and strength 0 is the model itself."""
    with torch.no_grad():
        base = lm(**INPUTS).logits
    for layer in range(LAYERS):
        turned = knob(layer)
        difference = added(lm, layer, {turned: -1.5})
        torch.testing.assert_close(difference, turned.addend(-1.5).expand_as(difference), atol=atol, rtol=0)
        with torch.no_grad(), steer(lm, {turned: 0.0}):
            assert torch.equal(lm(**INPUTS).logits, base)


def answers(lm: Any, setting: dict[Knob, float] | None = None) -> list[str]:
    done = trimtab.generate(lm, tokenizer(), ["hi", "hello"], knobs=setting or {knob(1): 1.0}, max_new_tokens=5)
    assert all(answer.tokens <= 5 for answer in done)
    return [answer.text for answer in done]


def greedy(lm: Any, inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return lm.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=PAD)


# PEFT


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_adapters_are_steered_switched_on_and_off_two_or_merged(task: str | None) -> None:
    lm = wrapped(task)
    check_exact(lm)
    with lm.disable_adapter():
        check_exact(lm)
        torch.testing.assert_close(lm(**INPUTS).logits, model()(**INPUTS).logits)
    lm.add_adapter("second", lora(task))
    lm.set_adapter("second")
    check_exact(lm)
    merged = lm.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    check_exact(merged)


def test_adapters_put_in_by_transformers_are_steered() -> None:
    lm = model()
    try:
        lm.add_adapter(lora())
    except ValueError as error:  # transformers 5.24.0 asks for PEFT 0.22, which may not be out
        if "The version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    check_exact(lm)


def test_a_knob_fits_the_wrapped_model_and_the_bare_one() -> None:
    bare, lm = model(), wrapped()
    ours, theirs = model_identity(lm, tokenizer()), model_identity(bare, tokenizer())
    assert {key for key in ours if ours[key] != theirs[key]} <= {"model"}  # a random model has no name but its class
    for learned, used in ((bare, lm), (lm, bare)):
        turned = trimtab.learn(learned, tokenizer(), PAIRS)
        turned.check(used, tokenizer())  # a warning would be an error
        trimtab.generate(used, tokenizer(), ["hi"], knobs={turned: 1.0}, max_new_tokens=2)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_generate_keeps_its_own_options_on_a_wrapped_model_and_leaves_no_trace(task: str | None) -> None:
    base = model()
    own, settings = base.generation_config, base.generation_config.to_dict()
    lm = wrapped(task, base)
    steered = answers(lm)
    with lm.disable_adapter():
        assert answers(lm) == answers(model())
    assert base.generation_config is own
    assert own.to_dict() == settings
    merged = lm.merge_and_unload()
    assert answers(merged) == steered != answers(model())


def test_generate_keeps_its_own_options_on_a_compiled_model() -> None:
    assert answers(torch.compile(model(), backend="eager")) == answers(model())


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(config: Callable[..., Any]) -> None:
    lm = get_peft_model(model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for use in (
        lambda: steer(lm, {knob(1): 1.0}).__enter__(),
        lambda: trimtab.learn(lm, tokenizer(), PAIRS),
        lambda: answers(lm),
    ):
        with pytest.raises(AdapterError, match=r"puts 3 virtual tokens .*_TUNING\).* Use model\.get_base_model\(\)"):
            use()
    check_exact(lm.get_base_model())


def test_a_checkpoint_knows_which_adapters_were_active() -> None:
    lm = wrapped()

    def job() -> dict[str, Any]:
        return describe_model(lm, tokenizer())

    on = job()
    with lm.disable_adapter():
        assert job() != on
    assert job() == on
    lm.add_adapter("second", lora())
    second = job()
    lm.set_adapter("second")
    assert job() != second


# Quantised and dispatched


def test_dynamically_quantised_models_are_steered_read_and_generate() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls all of its own quantisation deprecated
        lm = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in str(lm)
    assert Adapter(lm).dtype == torch.float32
    assert Adapter(lm).device(0).type == "cpu"
    check_exact(lm)
    turned = trimtab.learn(lm, tokenizer(), PAIRS)
    turned.check(lm, tokenizer())
    assert len(answers(lm, {turned: 1.0})) == 2


def test_weights_of_eight_bits_do_not_decide_the_dtype_of_the_stream() -> None:
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
        lm = model(dtype=torch.bfloat16)
        for module in lm.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
        assert Adapter(lm).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_a_float32_stream_between_bfloat16_weights_gets_the_whole_addend(name: str) -> None:
    lm = model(name, dtype=torch.bfloat16)
    with torch.no_grad(), Adapter(lm).read([0]) as reading:
        lm(**INPUTS)
    assert reading.acts[0].dtype == torch.float32 == Adapter(lm).dtype
    check_exact(lm)


def offloaded(how: str, folder: Path) -> PreTrainedModel:
    lm = model()
    if how == "cpu_offload":
        return cpu_offload(lm, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return disk_offload(lm, str(folder), execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    if how == "dispatch_model":
        return dispatch_model(lm, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    lm.save_pretrained(folder / "saved")
    if how == "auto":
        return AutoModelForCausalLM.from_pretrained(folder / "saved", device_map="auto")
    return AutoModelForCausalLM.from_pretrained(folder / "saved", device_map=places, offload_folder=folder / "off")


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on:UserWarning")  # of 5.16
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model", "auto", "from_pretrained"])
def test_dispatched_models_are_steered_and_read_like_plain_ones(how: str, tmp_path: Path) -> None:
    lm, plain = offloaded(how, tmp_path), model()
    devices = [parameter.device.type for parameter in lm.parameters()]
    assert ("meta" in devices) == (how != "auto")
    accelerates = [getattr(module, "_hf_hook", None) for module in lm.modules()]
    assert (Adapter(lm).dtype, Adapter(lm).device(-1)) == (torch.float32, torch.device("cpu"))
    check_exact(lm)
    assert answers(lm) == answers(plain)
    here, there = (
        capture(m, tokenizer(), PAIRS, positions=["last"], format="question_response").chosen for m in (lm, plain)
    )
    assert torch.equal(here, there)
    here, there = (pair_margins(m, tokenizer(), PAIRS, [{knob(1): 1.0}])[0].margin.tolist() for m in (lm, plain))
    assert here == there
    assert [getattr(module, "_hf_hook", None) for module in lm.modules()] == accelerates
    assert [parameter.device.type for parameter in lm.parameters()] == devices


# Tied weights, training, dtypes


def test_tied_weights_are_saved_as_they_were(tmp_path: Path) -> None:
    lm = model(tie_word_embeddings=True)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    check_exact(lm)
    with torch.no_grad(), steer(lm, {knob(0): 1.0}):
        lm(**INPUTS)
        lm.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in saved.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["all", "completion"])
def test_checkpointing_of_activations_changes_no_gradient(name: str, reentrant: bool, where: Where) -> None:
    lm = model(name)
    settings: dict[Knob, float] = {knob(1, where=where): 1.0, knob(0, operation="ablate", where=where): 1.0}
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    runs = list[int]()
    inner = next(m for m in Adapter(lm).blocks[1].modules() if "Norm" in type(m).__name__)
    inner.register_forward_hook(lambda *_: runs.append(1))

    def gradient(on: bool) -> Tensor:
        lm.zero_grad()
        runs.clear()
        with ExitStack() as context:
            if on:
                context.enter_context(steer(lm, settings, prompt_lengths=[3, 3]))
            logits = lm(**INPUTS, use_cache=False).logits
            logits.logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    lm.train()
    plain, plainly = gradient(True), len(runs)
    assert not torch.allclose(plain, gradient(False))
    if hasattr(lm, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradient(True), plain)
    assert len(runs) == 2 * plainly  # computed again on the way back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_the_addend_within_their_dtype(dtype: torch.dtype) -> None:
    check_exact(model(dtype=dtype), atol=8 * torch.finfo(dtype).eps)  # the stream is as large as 8


def test_what_inference_mode_and_autocast_build_serves_outside_of_them() -> None:
    lm = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_exact(lm)
    with torch.inference_mode(), steer(lm, {knob(1): 1.0}):
        inside = lm(**INPUTS).logits
    context = steer(lm, {knob(1): 1.0})
    with torch.inference_mode():
        context.__enter__()
    logits = lm(**INPUTS).logits
    assert torch.equal(logits, inside)
    logits.sum().backward()
    context.__exit__(None, None, None)


def test_dropout_in_training_is_the_same_with_the_knob_at_zero_and_its_addend_is_not_dropped() -> None:
    lm = model("gpt2").train()
    ids = INPUTS["input_ids"]

    def run(setting: dict[Knob, float]) -> Tensor:
        torch.manual_seed(0)
        with Adapter(lm).read([1]) as reading, steer(lm, setting):
            lm(ids)
        return reading.acts[1]

    plain = run({})
    assert torch.equal(run({knob(1): 0.0}), plain)
    torch.manual_seed(1)
    with Adapter(lm).read([1]) as other:
        lm(ids)
    assert not torch.equal(other.acts[1], plain)
    difference = run({knob(1): 1.0}) - plain
    torch.testing.assert_close(difference, knob(1).addend(1.0).expand_as(difference), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
@torch.no_grad()
def test_mixtures_of_experts_are_steered_exactly_and_rows_stay_apart(name: str) -> None:
    assert name in EXPERTS
    lm = model(name)
    check_exact(lm)
    rows, settings = prompts([6, 4, 5]), [{knob(0): 1.0}, {}, {knob(1): -1.0, knob(2): 2.0}]
    with steer(lm, settings):
        mixed = lm(**pad(rows)).logits
    for row, setting, seen in zip(rows, settings, mixed, strict=True):
        with steer(lm, setting):
            alone = lm(**pad([row])).logits[0]
        torch.testing.assert_close(seen[-len(row) :], alone, atol=1e-5, rtol=1e-5)


# Several at once


@torch.no_grad()
def test_two_models_are_steered_at_once() -> None:
    one, two = model(), model(seed=1)
    alone = list[Tensor]()
    for lm, turned in ((one, knob(1)), (two, knob(0, where="completion"))):
        with steer(lm, {turned: 1.0}):
            alone.append(greedy(lm))
    with steer(one, {knob(1): 1.0}), steer(two, {knob(0, where="completion"): 1.0}):
        assert torch.equal(greedy(one), alone[0])
        assert torch.equal(greedy(two), alone[1])


@contextmanager
def nested(lm: nn.Module, *settings: dict[Knob, float], **options: Any) -> Iterator[None]:
    with ExitStack() as contexts:
        for setting in settings:
            contexts.enter_context(steer(lm, setting, **options))
        yield


@pytest.mark.parametrize("wheres", [("all", "all"), ("all", "completion"), ("prompt", "all"), ("context", "prompt")])
@torch.no_grad()
def test_nested_contexts_steer_like_one_with_both_knobs(wheres: tuple[Where, Where]) -> None:
    lm = model()
    adapter = Adapter(lm)
    outer, inner = knob(1, name="outer", where=wheres[0]), knob(1, name="inner", seed=5, where=wheres[1])
    seen = list[Any]()
    for settings in ([{outer: 1.0, inner: -1.0}], [{outer: 1.0}, {inner: -1.0}], [{outer: 1.0}, {}, {inner: -1.0}]):
        with nested(lm, *settings), tracing(adapter, 1, INPUTS["attention_mask"]) as trace:
            seen.append((greedy(lm).tolist(), trace.steered))
    assert seen[0] == seen[1] == seen[2]


@torch.no_grad()
def test_a_cache_made_in_nested_contexts_goes_on_in_those_and_in_no_others() -> None:
    lm, ids = model(), torch.tensor(prompts([8]))
    one, two = {knob(1, name="one"): 1.0}, {knob(0, name="two"): 1.0}

    def goes_on(made: list[dict[Knob, float]], under: list[dict[Knob, float]]) -> Tensor | None:
        cache = DynamicCache(config=lm.config)
        with nested(lm, *made):
            lm(ids[:, :5], **{CACHE: cache})
        try:
            with nested(lm, *under):
                return lm(ids[:, 5:], **{CACHE: cache}).logits
        except CacheError:
            return None

    with nested(lm, one, two):
        wanted = lm(ids, use_cache=False).logits[:, 5:]
    same = goes_on([one, two], [one, two])
    assert same is not None
    torch.testing.assert_close(same, wanted)
    assert goes_on([one, {}], [one]) is not None
    assert [goes_on([one, two], under) for under in ([one], [two], [{}], [one, {}], [two, one])] == [None] * 5
    assert [goes_on(made, [one, two]) for made in ([one], [two], [])] == [None] * 3


@torch.no_grad()
def test_a_prefix_that_an_inner_knob_left_alone_goes_on_without_it() -> None:
    lm, ids = model(), torch.tensor(prompts([8]))
    later, cache = knob(0, where="completion"), DynamicCache(config=lm.config)
    with steer(lm, {knob(1): 1.0}):
        wanted = lm(ids, use_cache=False).logits[:, 5:]
        with steer(lm, {later: 1.0}, prompt_lengths=[7]):
            lm(ids[:, :5], **{CACHE: cache})
        seen = [lm(ids[:, at : at + 1], **{CACHE: cache}).logits for at in (5, 6, 7)]
    torch.testing.assert_close(torch.cat(seen, 1), wanted)


@torch.no_grad()
def test_tokens_that_came_into_a_cache_outside_of_the_context_are_noticed() -> None:
    lm, ids = model(), torch.tensor(prompts([8]))

    def goes_on(turned: Knob, **options: Any) -> None:
        cache = DynamicCache(config=lm.config)
        with steer(lm, {turned: 1.0}, **options):
            lm(ids[:, :3], **{CACHE: cache})
        lm(ids[:, 3:5], **{CACHE: cache})
        with steer(lm, {turned: 1.0}, **options):
            lm(ids[:, 5:], **{CACHE: cache})

    with pytest.raises(CacheError, match="5 tokens were computed in part outside of this steer"):
        goes_on(knob(1))
    goes_on(knob(1, where="completion"), prompt_lengths=[7])  # both parts are as they would be
    goes_on(knob(1), check_cache=False)
    cache = DynamicCache(config=lm.config)
    with steer(lm, {knob(1): 1.0}):
        lm(ids[:, :3], **{CACHE: cache})
        model()(ids[:, 3:5], **{CACHE: cache})  # the same weights without a knob
        with pytest.raises(CacheError, match="in part outside of this steer"):
            lm(ids[:, 5:], **{CACHE: cache})


def in_thread(work: Callable[[], object]) -> object:
    """What `work` returns or raises in a thread of its own."""
    results = list[object]()

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001  # handed to the caller
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


@torch.no_grad()
def test_two_threads_steer_two_models_and_never_one() -> None:
    lm, other, base = model(), model(seed=1), model()(**INPUTS).logits

    def steered(which: nn.Module, turned: Knob) -> Tensor:
        with torch.no_grad(), steer(which, {turned: 1.0}):
            return which(**INPUTS).logits

    mine, theirs = steered(lm, knob(1)), steered(other, knob(0))
    with steer(lm, {knob(1): 1.0}):
        result = in_thread(lambda: steered(other, knob(0)))
        assert isinstance(result, Tensor)
        assert torch.equal(result, theirs)
        for same in (lm, Adapter(lm), wrapped(base=lm)):
            refused = in_thread(lambda same=same: steer(same, {knob(0): 1.0}).__enter__())
            assert isinstance(refused, AdapterError)
            assert "is being steered in another thread" in str(refused)
        # a thread that only generates is welcome: this is how transformers streams
        streamed = in_thread(lambda: greedy(lm))
        assert isinstance(streamed, Tensor)
        assert torch.equal(streamed, greedy(lm))
    assert torch.equal(model()(**INPUTS).logits, base)
    assert not torch.equal(mine, base)
    assert isinstance(in_thread(lambda: steered(lm, knob(1))), Tensor)  # free again
