"""Models that are not plain: wrapped by PEFT, quantised, dispatched over devices, tied; conversations and samples."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from pico import LAYERS, knob, model, pad, prompts, tokenizer
from trimtab.adapter import Adapter
from trimtab.check import check, tracing
from trimtab.errors import AdapterError, CacheError
from trimtab.generate import generate
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.runtime import steer
from trimtab.types import Message

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # in peft's own calls

PAIRS = Pairs.from_records(
    [{"prompt": f"Question {n}?", "chosen": f"Yes, it is {n}.", "rejected": f"Nay, it is {n}."} for n in range(12)]
)


def lora(lm: PreTrainedModel) -> Any:
    wrapped = peft.get_peft_model(
        lm, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    return wrapped.eval()


def addends(lm: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """Steered minus base, at every layer: how far it is from the addend, as a share of it."""
    adapter, ids, worst = Adapter(lm), torch.tensor(prompts([6])), 0.0
    with torch.no_grad(), adapter.read(range(LAYERS)) as reading:
        lm(input_ids=ids)
        base = dict(reading.acts)
        for layer in range(LAYERS):
            turned = knob(layer)
            with steer(lm, {turned: 1.0}):
                lm(input_ids=ids)
            added = reading.acts[layer].float() - base[layer].float()
            worst = max(worst, float((added - turned.addend(1.0)).abs().max()))
    assert adapter.dtype == dtype
    return worst


@torch.no_grad()
def test_peft_models_are_steered_at_the_blocks_of_the_model_inside() -> None:
    lm = lora(model())
    assert addends(lm) < 1e-5
    with lm.disable_adapter():
        assert addends(lm) < 1e-5
    assert check(lm).verdict == "ok"
    assert addends(lm.merge_and_unload()) < 1e-5


def test_a_knob_of_a_peft_model_is_learned_and_turned_like_any_other() -> None:
    lm, words = lora(model()), tokenizer()
    learned = learn(lm, words, PAIRS, method="diffmean")
    answers = [generate(lm, words, ["Hello"], knobs={learned: s}, max_new_tokens=6)[0].text for s in (0.0, 8.0)]
    assert answers[0] == generate(lm, words, ["Hello"], max_new_tokens=6)[0].text != answers[1]
    learned.check(model(), words)
    with lm.disable_adapter():
        bare = learn(lm, words, PAIRS, method="diffmean")
    assert not torch.equal(bare.vectors[bare.site], learned.vectors[bare.site])  # the adapter was read


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_adapters_that_put_virtual_tokens_in_front_are_refused(kind: Any) -> None:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's own
        wrapped = peft.get_peft_model(model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(AdapterError, match="puts 5 virtual tokens before every prompt"), steer(wrapped, {knob(1): 1.0}):
        pass


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_are_read_and_steered_like_those_in_memory(where: str, tmp_path: Path) -> None:
    plain, words, moved = model(), tokenizer(), model()
    if where == "cpu":
        cpu_offload(moved, execution_device=torch.device("cpu"))
    else:
        disk_offload(moved, str(tmp_path), execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in moved.parameters())
    assert addends(moved) < 1e-5
    one, other = (learn(lm, words, PAIRS, method="diffmean") for lm in (plain, moved))
    assert torch.equal(one.vectors[one.site], other.vectors[one.site])
    texts = [generate(lm, words, ["Hello"], knobs={one: 4.0}, max_new_tokens=6)[0].text for lm in (plain, moved)]
    assert texts[0] == texts[1]
    assert all(any(hasattr(m, "_hf_hook") for m in block.modules()) for block in Adapter(moved).blocks)


def test_int8_models_are_steered_in_the_dtype_of_their_activations() -> None:
    with warnings.catch_warnings(action="ignore"):  # this way to quantise is old, and the one that needs no package
        small = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)
        assert any("quantized" in type(m).__module__ for m in small.modules())
        assert addends(small) < 1e-5
        ids = torch.tensor(prompts([6]))
        base = small(ids).logits
        with steer(small, {knob(1): 0.0}):
            assert torch.equal(small(ids).logits, base)


@torch.no_grad()
def test_tied_weights_stay_as_they_were() -> None:
    lm, inputs = model(tie_word_embeddings=True), pad(prompts([5]))
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    before, base = {k: v.clone() for k, v in lm.state_dict().items()}, lm(**inputs).logits
    with steer(lm, {knob(1): 1.0}):
        assert not torch.equal(lm(**inputs).logits, base)
    assert torch.equal(lm(**inputs).logits, base)
    assert all(torch.equal(value, before[key]) for key, value in lm.state_dict().items())


def test_gradients_flow_through_a_knob_with_and_without_checkpointing() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        lm = model().train()
        if checkpointing:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its name is about to change
                lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with steer(lm, {knob(1): 1.0}):
            lm(**pad(prompts([6])), use_cache=False).logits.square().mean().backward()
        return {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@torch.no_grad()
def test_samples_of_one_prompt_keep_its_knobs_and_positions() -> None:
    lm, rows = model(), prompts([5, 2])
    inputs, later = {k: v for k, v in pad(rows).items() if k != "position_ids"}, knob(1, where="completion")
    for lengths in (None, [5, 2]):
        with (
            steer(lm, [{later: 1.0}, {}], prompt_lengths=lengths),
            tracing(Adapter(lm), 1, inputs["attention_mask"]) as trace,
        ):
            lm.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=4, pad_token_id=0)
        assert trace.positions() == [[4, 5, 6], []]


@torch.no_grad()
def test_a_static_cache_that_was_reset_begins_a_new_prompt() -> None:
    lm, later = model(), knob(1, where="completion")
    cache = StaticCache(config=lm.config, max_cache_len=16)
    for row in prompts([6, 3]):
        ids = torch.tensor([row])
        with steer(lm, {later: 1.0}), tracing(Adapter(lm), 1, torch.ones_like(ids)) as trace:
            lm(ids, past_key_values=cache, use_cache=True)
        assert trace.positions() == [[len(row) - 1]]
        cache.reset()


@torch.no_grad()
def test_prompts_given_as_embeddings_are_steered_at_the_same_positions() -> None:
    lm, ids, later = model(), torch.tensor(prompts([5])), knob(1, where="completion")
    with steer(lm, {later: 1.0}), tracing(Adapter(lm), 1, torch.ones_like(ids)) as trace:
        lm.generate(inputs_embeds=lm.get_input_embeddings()(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert trace.positions() == [[4, 5, 6]]


@torch.no_grad()
def test_turns_of_a_conversation_are_steered_by_where_their_prompt_ends() -> None:
    lm, renderer = model(), Renderer(tokenizer())
    first = [Message("system", "Be brief."), Message("user", "One?")]
    turns = [first, [*first, Message("assistant", "Yes."), Message("user", "Two?")]]
    for where in ("prompt", "context", "completion"):
        for turn in turns:
            ids = torch.tensor([renderer.prompt_ids(turn)])
            count = ids.shape[1]
            with steer(lm, {knob(1, where=where): 1.0}), tracing(Adapter(lm), 1, torch.ones_like(ids)) as trace:
                lm.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
            spans = {"prompt": (0, count), "context": (0, count - 1), "completion": (count - 1, count + 2)}
            assert trace.positions() == [list(range(*spans[where]))]


@torch.no_grad()
def test_a_second_turn_goes_on_from_the_cache_of_the_first_under_the_same_knob_only() -> None:
    lm, one, ids = model(), knob(1), torch.tensor(prompts([12]))
    with steer(lm, {one: 1.0}):
        wanted = lm(ids, use_cache=False).logits[:, 8:]
        cache = lm(ids[:, :8], use_cache=True).past_key_values
    with steer(lm, {one: 0.5}), pytest.raises(CacheError, match="under other knobs or strengths"):
        lm(ids[:, 8:], past_key_values=cache)
    with steer(lm, {one: 1.0}):
        torch.testing.assert_close(lm(ids[:, 8:], past_key_values=cache).logits, wanted)
