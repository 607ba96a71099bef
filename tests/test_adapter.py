"""Reading and writing the residual stream: the right blocks, the right point, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import generic

from pico import ARCHITECTURES, CACHE, LAYERS, WIDTH, HomeMade, model, pad, prompts, vision_language_model
from trimtab.adapter import Adapter, CallInfo
from trimtab.adapter.calls import returned_cache
from trimtab.errors import AdapterError, OptionError

CPU = torch.device("cpu")
WITHOUT_EMBEDDINGS = ("mamba", "falcon_mamba", "mamba2")
"""Models whose `hidden_states` begin with the first block, and not with the embeddings."""


def hooks(module: nn.Module) -> int:
    """Count all hooks on a model; transformers' own, behind output_hidden_states, come and go with their first use."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def shift(amount: float) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden + amount


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_capture_equals_what_hook_sees_at_every_layer(name: str) -> None:
    lm, inputs = model(name), pad(prompts([7, 4]))
    adapter, seen = Adapter(lm), dict[int, Tensor]()

    def plain_hook(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    blocks = lm.get_submodule(adapter.path)
    assert isinstance(blocks, nn.ModuleList)
    handles = [block.register_forward_hook(plain_hook(i)) for i, block in enumerate(blocks)]
    with adapter.read(range(LAYERS)) as reading:
        states = lm(**inputs, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert sorted(reading.acts) == list(range(LAYERS)) == sorted(seen)
    for layer in range(LAYERS):
        assert torch.equal(reading.acts[layer], seen[layer])
        if layer + 1 < LAYERS:
            assert torch.equal(reading.acts[layer], states[layer + (name not in WITHOUT_EMBEDDINGS)])
    assert not torch.allclose(reading.acts[LAYERS - 1], states[-1])  # the last entry is normed


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_layer_zero_is_first_block_output(name: str) -> None:
    lm, inputs = model(name), pad(prompts([5]))
    with Adapter(lm).read([0]) as reading:
        states = lm(**inputs, output_hidden_states=True).hidden_states
    first = int(name not in WITHOUT_EMBEDDINGS)
    assert torch.equal(reading.acts[0], states[first])
    assert not torch.allclose(reading.acts[0], states[1 - first])


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_what_is_written_at_a_layer_is_what_is_read_there(name: str) -> None:
    lm, inputs = model(name), pad(prompts([5]))
    adapter = Adapter(lm)
    plain, logits = {}, lm(**inputs).logits
    for layer in range(LAYERS):
        with adapter.read([layer]) as reading:
            lm(**inputs)
        plain[layer] = reading.acts[layer]
    for layer in range(LAYERS):
        # the reader comes first here, and must see the new stream all the same
        with adapter.read(range(LAYERS)) as reading, adapter.write({layer: shift(1.5)}):
            changed = lm(**inputs).logits
        assert torch.equal(reading.acts[layer], plain[layer] + 1.5)
        assert all(torch.equal(reading.acts[below], plain[below]) for below in range(layer))
        assert all(not torch.equal(reading.acts[above], plain[above]) for above in range(layer + 1, LAYERS))
        assert not torch.allclose(changed, logits)
    assert torch.equal(lm(**inputs).logits, logits)


@torch.no_grad()
def test_output_hidden_states_show_the_written_stream() -> None:
    lm, inputs = model(), pad(prompts([5]))
    plain = lm(**inputs, output_hidden_states=True).hidden_states
    with Adapter(lm).write({0: shift(1.0)}):
        assert torch.equal(lm(**inputs, output_hidden_states=True).hidden_states[1], plain[1] + 1)


def test_activations_come_in_the_dtype_of_the_model_and_without_a_graph() -> None:
    lm = model(dtype=torch.bfloat16)
    adapter = Adapter(lm)
    with adapter.read([-1]) as reading:
        lm(**pad(prompts([3])))
    assert list(reading.acts) == [LAYERS - 1]
    assert reading.acts[LAYERS - 1].dtype == adapter.dtype == torch.bfloat16
    assert not reading.acts[LAYERS - 1].requires_grad


def test_layers_count_from_the_end_when_negative_and_must_exist() -> None:
    adapter = Adapter(model())
    assert (adapter.layer(-1), adapter.layer(-LAYERS), adapter.layer(1)) == (LAYERS - 1, 0, 1)
    for bad in (LAYERS, -LAYERS - 1):
        with pytest.raises(
            AdapterError, match=rf"no layer {bad}: LlamaForCausalLM has 3 layers, 0 to 2 \(or -3 to -1\)"
        ):
            adapter.layer(bad)
    assert type(adapter.layer(cast(Any, np.int64(-1)))) is int  # as numpy.arange gives them
    assert adapter.layers(cast(Any, torch.tensor([1, 0]))) == [0, 1]
    for kind in (True, 1.5, "1", None):
        with pytest.raises(OptionError, match=f"A layer is a whole number.*got {kind!r}"):
            adapter.layer(cast(Any, kind))
    with pytest.raises(AdapterError, match="written twice"), adapter.write({-1: shift(1), LAYERS - 1: shift(2)}):
        pass


def test_the_adapter_knows_the_shape_of_the_model() -> None:
    adapter = Adapter(model("gpt2"))
    assert (adapter.n_layers, adapter.hidden_size, adapter.dtype) == (LAYERS, WIDTH, torch.float32)
    assert adapter.device(0) == torch.device("cpu")
    assert [type(block).__name__ for block in adapter.blocks] == ["GPT2Block"] * LAYERS


@torch.no_grad()
def test_blocks_above_the_wanted_layer_and_the_head_never_run() -> None:
    lm, inputs = model(), pad(prompts([6, 3]))
    adapter, ran = Adapter(lm), list[str]()
    for name, module in (("2", adapter.blocks[2]), ("head", lm.get_output_embeddings())):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with adapter.read([0, 1]) as full:
        lm(**inputs)
    assert ran == ["2", "head"]
    before = hooks(lm)
    with adapter.read([0, 1]) as partial:
        adapter.run_to(1, **inputs)
    assert ran == ["2", "head"]
    assert hooks(lm) == before
    assert all(torch.equal(partial.acts[layer], full.acts[layer]) for layer in (0, 1))
    caches = list[object]()
    adapter.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs[CACHE]), with_kwargs=True
    )
    adapter.run_to(-1, **inputs)
    adapter.run_to(-1, **inputs, use_cache=True)
    assert ran == ["2", "head", "2", "2"]
    assert [cache is None for cache in caches] == [True, False]


def test_a_real_error_in_a_partial_run_is_not_swallowed() -> None:
    lm = model()
    adapter, before = Adapter(lm), hooks(lm)
    with pytest.raises(IndexError):
        adapter.run_to(1, input_ids=torch.tensor([[10**6]]))
    assert hooks(lm) == before


def test_partial_runs_carry_gradients() -> None:
    lm, seen = model(), list[Tensor]()
    adapter = Adapter(lm)

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    with adapter.write({1: keep}):
        adapter.run_to(1, **pad(prompts([4])))
    seen[0].sum().backward()
    assert next(adapter.blocks[0].parameters()).grad is not None
    assert next(adapter.blocks[2].parameters()).grad is None


def test_every_hook_is_gone_after_errors_inside_and_while_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    adapter, before = Adapter(lm), hooks(lm)
    with adapter.write({0: shift(1)}, lambda call: None), adapter.read([0]):
        assert hooks(lm) == before + 5  # a block's two, the decoder's, and two on the model around it
    with pytest.raises(IndexError), adapter.write({0: shift(1)}, lambda call: None), adapter.read([0]):
        lm(torch.tensor([[10**6]]))
    assert hooks(lm) == before

    def refuse(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(adapter.blocks[1], "register_forward_hook", refuse)
    with pytest.raises(MemoryError), adapter.write({0: shift(1), 1: shift(1)}, lambda call: None):
        pass
    with pytest.raises(MemoryError), adapter.read([0, 1]):
        pass
    assert hooks(lm) == before


@torch.no_grad()
def test_before_is_called_once_per_forward_with_what_the_model_was_given() -> None:
    lm, calls = model("gpt2"), list[CallInfo]()
    inputs = pad(prompts([6, 3]))
    adapter = Adapter(lm)
    with adapter.write({}, calls.append):
        cache = lm(**inputs, use_cache=True)[CACHE]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        # positional arguments, and the caller's default of use_cache, which does not count as asking for a cache
        lm(torch.tensor([[9], [9]]), cache, attention_mask=mask)
        lm(inputs["input_ids"])
        lm.base_model(input_ids=inputs["input_ids"])
        lm(inputs_embeds=torch.zeros(2, 4, WIDTH), use_cache=False)
        with pytest.raises(AdapterError, match=r"Cannot tell batch and length from a decoder call with arguments \[]"):
            lm.base_model()
    assert [(call.batch, call.tokens, call.caching) for call in calls] == [
        (2, 6, True),
        (2, 1, True),
        (2, 6, False),
        (2, 6, False),
        (2, 4, False),
    ]
    first, second, third, *_ = calls
    assert first.attention_mask is not None
    assert first.attention_mask.shape == (2, 6)
    assert second.past() == 7  # the cache has grown since
    assert third.attention_mask is None
    assert third.past() == 0


@pytest.mark.parametrize("kind", ["bool", "float", "long", "long with room to spare", "long of the new tokens only"])
def test_padding_is_found_in_every_kind_of_mask(kind: str) -> None:
    flat = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    past, tokens = 1, 4
    square = flat[:, None, None].bool() & torch.ones(5, 5).tril().bool()
    square = torch.nn.functional.pad(square, (0, 3))[:, :, past:]  # static caches have room to spare
    mask = {
        "bool": square,
        "float": torch.where(square, 0.0, torch.finfo(torch.float32).min),
        "long": flat,
        "long with room to spare": torch.nn.functional.pad(flat, (0, 3)),
        "long of the new tokens only": flat[:, past:],
    }[kind]

    class Cache:
        def get_seq_length(self) -> int:
            return past

    call = CallInfo(3, tokens, CPU, mask, cache=Cache())
    real = call.real_tokens(past)
    assert real is not None
    assert torch.equal(real, flat[:, past:].bool())
    assert CallInfo(1, tokens, CPU, mask[1:2]).real_tokens(past) is None
    with pytest.raises(AdapterError, match=r"the 6 new tokens, after 1 cached ones"):
        CallInfo(3, 6, CPU, mask[..., :5]).real_tokens(past)


def test_a_cache_of_unknown_kind_is_refused_when_its_length_matters() -> None:
    with pytest.raises(AdapterError, match="KV cache of type dict"):
        CallInfo(1, 1, CPU, cache={}).past()


class States:
    """A cache as transformers may call it tomorrow."""

    def get_seq_length(self) -> int:
        return 5


class Counting(nn.Module):
    """A decoder that takes its cache under a name of its own, and is handed no mask by the model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, memory: States | None = None) -> dict[str, object]:
        hidden = torch.zeros(*input_ids.shape, WIDTH)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"hidden": hidden, "memory": memory or States()}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH)
        self.decoder = Counting()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: States | None = None) -> object:
        return self.decoder(input_ids, memory=memory)


def test_a_cache_is_known_by_what_it_can_do_whatever_its_name() -> None:
    lm, calls, kept = Around(), list[CallInfo](), list[object]()
    with Adapter(lm).write({}, calls.append, kept.append):
        lm(torch.tensor([[9]]))
        lm(torch.tensor([[9]]), memory=States())
    assert [call.past() for call in calls] == [0, 5]
    assert [call.caching for call in calls] == [False, True]
    assert all(isinstance(cache, States) for cache in kept)
    assert len(kept) == 2


def test_the_mask_of_the_whole_model_counts_where_its_decoder_is_handed_none() -> None:
    lm, calls = Around(), list[CallInfo]()
    ids, mask = torch.full((2, 3), 9), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with Adapter(lm).write({}, calls.append):
        lm(ids, mask)
        lm(ids, attention_mask=mask)
        with pytest.raises(TypeError):
            lm(ids, attention_mask=mask, nothing=1)  # ends before the decoder is called
        lm.decoder(ids)  # a call of its own: the masks before are not its mask
        lm(ids)
    assert [None if real is None else real.tolist() for real in (call.real_tokens(0) for call in calls)] == [
        mask.bool().tolist(),
        mask.bool().tolist(),
        None,
        None,
    ]


def test_a_call_that_another_hook_ends_before_ours_leaves_the_calls_in_order() -> None:
    calls, fails = list[CallInfo](), [KeyError("first")]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.inner = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH), Around()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
            try:
                return self.inner(input_ids)
            except KeyError:
                return self.inner(input_ids)

    def fail_once(*_: object) -> None:
        if fails:
            raise fails.pop()

    outer = Outer()
    outer.inner.register_forward_pre_hook(fail_once)
    mask = torch.tensor([[0, 1]])
    with Adapter(outer).write({}, calls.append):
        outer(torch.tensor([[9, 9]]), mask)
    assert [call.attention_mask is mask for call in calls] == [True]


@torch.no_grad()
def test_a_wrapper_may_do_more_than_one_call() -> None:
    class Generating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm: Any = model()
            self.config = self.lm.config

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.lm.generate(input_ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)

    calls = list[CallInfo]()
    wrapper = Generating()
    with Adapter(wrapper).write({}, calls.append):
        wrapper(torch.tensor(prompts([4])))
    assert [call.tokens for call in calls] == [4, 1, 1]


def test_ids_are_not_looked_at_where_the_model_shows_no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(self: object) -> None:
        raise NotImplementedError

    lm = model()
    monkeypatch.setattr(type(lm), "get_input_embeddings", hidden)
    Adapter(lm).check_ids([10**9])
    Adapter(HomeMade()).check_ids([10**9])


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "default"}, 64),
    ],
)
def test_scaled_rotary_embeddings_reach_as_far_as_they_do(rope: dict[str, Any], length: int) -> None:
    lm = model("qwen2", max_position_embeddings=64)
    lm.config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert Adapter(lm).context_length == length
    assert not Adapter(lm).has_position_table
    assert Adapter(model("gpt2")).has_position_table
    assert Adapter(model("opt")).has_position_table


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
@pytest.mark.parametrize("wrap", ["nothing", "PEFT", "torch.compile"])
@torch.no_grad()
def test_the_mask_counts_however_the_model_is_wrapped(wrap: str) -> None:
    lm, inputs = model("rwkv"), pad(prompts([4, 2]))
    if wrap == "PEFT":
        lm = get_peft_model(lm, LoraConfig(target_modules=["key"], task_type="CAUSAL_LM"))
    elif wrap == "torch.compile":
        lm = torch.compile(lm, backend="eager")
    calls = list[CallInfo]()
    with Adapter(lm).write({}, calls.append):
        lm.generate(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=1)
    real = calls[0].real_tokens(0)
    assert real is not None
    assert torch.equal(real, inputs["attention_mask"].bool())


def test_new_tokens_are_found_in_a_mask_of_all_where_the_cache_does_not_tell_its_length() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert CallInfo(2, 3, CPU, mask, cache=[]).real_tokens(0) is None
    real = CallInfo(2, 3, CPU, mask.flip(1), cache=[]).real_tokens(0)
    assert real is not None
    assert real.tolist() == [[True, True, True], [True, False, False]]


@torch.no_grad()
def test_the_text_stack_is_taken_when_the_vision_tower_has_as_many_layers() -> None:
    lm = vision_language_model(vision_layers=LAYERS)
    adapter = Adapter(lm)
    assert "vision" not in adapter.path
    assert type(adapter.blocks[0]).__name__ == "LlamaDecoderLayer"
    with adapter.read([0]) as reading:
        lm(**pad(prompts([5])))
    assert reading.acts[0].shape == (1, 5, WIDTH)


def test_two_fitting_stacks_are_refused_with_the_candidates_and_the_way_out() -> None:
    lm = HomeMade(towers=2)
    with pytest.raises(
        AdapterError,
        match=r"Cannot choose the decoder layers of 3 blocks in HomeMade. "
        r'Candidates: tower0.h \(3\), tower1.h \(3\). Pass layers_path="...".',
    ):
        Adapter(lm)
    assert Adapter(lm, layers_path="tower0.h").n_layers == LAYERS


def test_a_model_without_fitting_layers_is_refused() -> None:
    lm = HomeMade()
    lm.config.num_hidden_layers = 12
    with pytest.raises(AdapterError, match=r"Cannot find .* of 12 blocks in HomeMade. Candidates: tower0.h \(3\)"):
        Adapter(lm)
    with pytest.raises(AdapterError, match=r"has no list of layers at 'tower0'\. Lists: tower0.h"):
        Adapter(lm, layers_path="tower0")
    with pytest.raises(AdapterError, match=r"Cannot find the decoder layers in Linear. Candidates: none"):
        Adapter(nn.Linear(2, 2))
    del lm.config.hidden_size
    with pytest.raises(AdapterError, match="has no hidden_size"):
        Adapter(lm, layers_path="tower0.h")


def test_an_encoder_decoder_model_is_refused() -> None:
    lm = model()
    lm.config.is_encoder_decoder = True
    with pytest.raises(AdapterError, match="works on decoder-only models"):
        Adapter(lm)


def test_experts_of_a_mixture_are_not_mistaken_for_layers() -> None:
    lm = model("mixtral")
    lm.model.layers[0].experts_too = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    assert Adapter(lm).path == "model.layers"


@torch.no_grad()
def test_tuple_blocks_keep_what_else_they_return() -> None:
    outputs = list[Any]()
    lm = HomeMade("tuple")
    adapter = Adapter(lm)
    ids = torch.tensor(prompts([4, 4]))
    with adapter.write({1: shift(2.0)}):
        adapter.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
        lm(ids)
    assert isinstance(outputs[0], tuple)
    assert outputs[0][1] == "what else a block may return"


@torch.no_grad()
def test_replacements_of_another_shape_and_strange_block_outputs_are_refused() -> None:
    lm, ids = HomeMade(), torch.tensor(prompts([4]))
    with (
        pytest.raises(AdapterError, match=r"at layer 1 has shape \(1, 4, 32\) and its replacement \(1, 4\)"),
        Adapter(lm).write({1: lambda hidden: hidden[..., 0]}),
    ):
        lm(ids)
    for strange, got in (({"hidden": 1}, "dict"), (torch.zeros(4, WIDTH), r"a tensor of shape \(4, 32\)")):
        handle = lm.get_submodule("tower0.h.0").register_forward_hook(lambda *_, out=strange: out)
        with pytest.raises(AdapterError, match=got), Adapter(lm).read([0]):
            lm(ids)
        handle.remove()


def test_looking_for_a_cache_in_an_output_without_one_makes_transformers_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", said.append)
    assert returned_cache(BaseModelOutputWithPast(last_hidden_state=torch.zeros(1))) is None  # pyright: ignore[reportArgumentType]
    assert not said
