"""Knobs on a live model: where they act, on which rows, in which tokens, and that nothing else changes."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StaticCache

from pico import (
    ARCHITECTURES,
    CACHE,
    EXPERTS,
    LAYERS,
    PAD,
    PURE_STATES,
    VOCABULARY,
    WIDTH,
    HomeMade,
    knob,
    model,
    pad,
    prompts,
    vision_language_model,
)
from trimtab.adapter import CACHE_NAMES, Adapter
from trimtab.artifact import OPERATIONS, AnyKnob, DeltaKnob, Knob, LowRank, Operation
from trimtab.errors import AdapterError, CacheError, KnobError, OptionError
from trimtab.runtime import steer
from trimtab.types import Site, Where

Side = Literal["left", "right"]
WHERE: tuple[Where, ...] = ("all", "prompt", "context", "completion")  # those that positions alone decide
SIDES: tuple[Side, ...] = ("left", "right")


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@contextmanager
def plain_hooks(lm: nn.Module, addends: Mapping[int, Tensor]) -> Iterator[None]:
    """Steer every token with hooks written independently of the package: the reference."""
    handles = []
    for layer, addend in addends.items():

        def hook(module: Any, args: Any, output: Any, addend: Tensor = addend) -> Any:
            if isinstance(output, tuple):
                return (output[0] + addend, *output[1:])
            return output + addend

        handles.append(Adapter(lm).blocks[layer].register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def greedy(lm: PreTrainedModel, inputs: Mapping[str, Tensor], steps: int = 6, **options: Any) -> Tensor:
    """New tokens of greedy decoding."""
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    given |= {"max_new_tokens": steps, "do_sample": False, "pad_token_id": PAD, "use_cache": True}
    out = lm.generate(**{**given, **options})
    return out[:, inputs["input_ids"].shape[1] :]


def stepwise(lm: PreTrainedModel, rows: list[list[int]], new: Tensor, side: Side = "left") -> Tensor:
    """Logits `[B, steps, V]` that predict `new` `[B, steps]`, with a KV cache, one token at a time."""
    inputs = pad(rows, side)
    mask, position = inputs["attention_mask"], torch.tensor([[len(row)] for row in rows])
    out = lm(**inputs, use_cache=True)
    last = mask.shape[1] - 1 if side == "left" else position[:, 0] - 1
    logits = [out.logits[torch.arange(len(rows)), last]]
    for token in new[:, :-1].T:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        cache = {name: value for name, value in out.items() if name in CACHE_NAMES and value is not None}
        seen = {} if lm.config.model_type in PURE_STATES else {"attention_mask": mask}
        out = lm(input_ids=token[:, None], position_ids=position, use_cache=True, **seen, **cache)
        position = position + 1
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


# --- what is added, and where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_two_layers_get_their_own_vectors(name: str) -> None:
    lm, inputs = model(name), pad(prompts([6]))
    low, high = knob(0, gain=0.5), knob(2, gain=2.0)
    assert low.norms != high.norms or not torch.equal(low.direction, high.direction)
    with plain_hooks(lm, {0: low.addend(1.0), 2: high.addend(-0.5)}):
        expected, tokens = lm(**inputs).logits, greedy(lm, inputs)
    with steer(lm, {low: 1.0, high: -0.5}):
        assert torch.equal(lm(**inputs).logits, expected)
        assert torch.equal(greedy(lm, inputs), tokens)


@torch.no_grad()
def test_a_knob_of_several_sites_acts_like_a_knob_at_each() -> None:
    lm, inputs = model(), pad(prompts([6, 4]))
    low, high = knob(0, gain=0.5), knob(2)
    sites = {**low.vectors, **high.vectors}
    both = replace(low, vectors=sites, norms={0: 4.0, 2: 4.0}, also=(high.site,))
    high = high.with_(gain=0.5 * 4.0 / both.raw_length(both.site) * both.raw_gain(high.site))
    with steer(lm, [{low: 1.0, high: 1.0}, {low: -2.0, high: -2.0}]):
        expected = lm(**inputs).logits
    with steer(lm, [{both: 1.0}, {both: -2.0}]):
        torch.testing.assert_close(lm(**inputs).logits, expected)
    far = Site(9, "last")
    beyond = replace(both, vectors={**sites, far: sites[low.site]}, norms={0: 4.0, 2: 4.0, 9: 4.0}, also=(far,))
    with pytest.raises(AdapterError, match="no layer 9"), steer(lm, {beyond: 1.0}):
        pass


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_steered_minus_base_equals_strength_times_direction(name: str) -> None:
    lm = model(name)
    adapter, turned = Adapter(lm), knob(1, norm=4.0, gain=0.5)
    for lengths in ([6, 4], [5, 5]):  # with padding and without: two ways of adding
        inputs = pad(prompts(lengths))
        with adapter.read([0, 1]) as base:
            lm(**inputs)
        with adapter.read([0, 1]) as steered, steer(adapter, {turned: -1.5}):
            lm(**inputs)
        assert torch.equal(steered.acts[0], base.acts[0])
        real = inputs["attention_mask"].bool()
        difference = (steered.acts[1] - base.acts[1])[real]
        expected = -1.5 * 0.5 * 4.0 * turned.direction
        torch.testing.assert_close(difference, expected.expand_as(difference), atol=1e-5, rtol=1e-5)
        assert torch.equal(steered.acts[1][~real], base.acts[1][~real])  # padding


@torch.no_grad()
def test_the_embeddings_are_untouched() -> None:
    lm, inputs = model(), pad(prompts([6]))
    base = lm(**inputs, output_hidden_states=True).hidden_states
    with steer(lm, {knob(0): 1.0}):
        steered = lm(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(steered[0], base[0])
    assert not torch.allclose(steered[1], base[1])


@torch.no_grad()
def test_knobs_at_one_layer_add_up_and_opposite_ones_cancel() -> None:
    lm, inputs = model(), pad(prompts([6]))
    one, two = knob(1, name="one", seed=1), knob(1, name="two", seed=2)
    with plain_hooks(lm, {1: one.addend(0.5) + two.addend(2.0)}):
        expected = lm(**inputs).logits
    with steer(lm, {one: 0.5, two: 2.0}):
        torch.testing.assert_close(lm(**inputs).logits, expected)
    base, twin = lm(**inputs).logits, knob(1, name="twin", seed=1)
    with steer(lm, {one: 1.0, twin: -1.0}):
        assert torch.equal(lm(**inputs).logits, base)
    with steer(lm, {one: 1.0}):
        alone = lm(**inputs).logits
        with steer(lm, {one: -1.0}):  # contexts may be nested
            torch.testing.assert_close(lm(**inputs).logits, base)
        assert torch.equal(lm(**inputs).logits, alone)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_zero_strength_is_bitwise_baseline(name: str) -> None:
    lm, inputs = model(name), pad(prompts([6, 3]))
    base, tokens = lm(**inputs).logits, greedy(lm, inputs)
    before = sum(map(hooks, Adapter(lm).blocks))
    for settings in ({}, {knob(0): 0.0, knob(1, where="prompt"): -0.0}, [{knob(1): 0}, {}]):
        with steer(lm, settings):
            assert sum(map(hooks, Adapter(lm).blocks)) == before
            assert torch.equal(lm(**inputs).logits, base)
            assert torch.equal(greedy(lm, inputs), tokens)
    with steer(lm, [{knob(0): 0.0}, {knob(0): 1.0}]):  # a row at zero beside a row that is steered
        beside = lm(**inputs).logits[0]
    assert torch.equal(beside, base[0]) or (name in EXPERTS and torch.allclose(beside, base[0], atol=1e-5))


@torch.no_grad()
def test_tuple_and_tensor_blocks_steer_alike() -> None:
    tuples, tensors, ids = HomeMade("tuple"), HomeMade("tensor"), torch.tensor(prompts([5, 5, 5]))
    settings: list[dict[Knob, float]] = [{knob(0): 1.0}, {}, {knob(2): -2.0, knob(1): 1.0}]
    with steer(tuples, settings), steer(tensors, settings):
        steered = tuples(ids)
        assert torch.equal(steered, tensors(ids))
    for row, setting in enumerate(settings):
        with plain_hooks(tensors, {k.site.layer: k.addend(strength) for k, strength in setting.items()}):
            torch.testing.assert_close(steered[row], tensors(ids)[row])


@torch.no_grad()
def test_bfloat16_models_are_steered_in_their_own_dtype() -> None:
    lm, inputs = model(dtype=torch.bfloat16), pad(prompts([6, 4]))
    adapter, turned = Adapter(lm), knob(1)
    with adapter.read([1]) as base:
        lm(**inputs)
    with adapter.read([1]) as steered, steer(lm, [{turned: 1.0}, {turned: 0.5}]):
        logits = lm(**inputs).logits
    assert logits.dtype == steered.acts[1].dtype == torch.bfloat16
    for row, strength in enumerate((1.0, 0.5)):
        real = inputs["attention_mask"][row].bool()
        assert torch.equal(steered.acts[1][row, real], base.acts[1][row, real] + turned.addend(strength).bfloat16())


@torch.no_grad()
def test_autocast_does_not_change_what_is_added() -> None:
    lm, inputs = model(), pad(prompts([6]))
    with torch.autocast("cpu", torch.bfloat16), steer(lm, {knob(1): 1.0}):
        steered = lm(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16), plain_hooks(lm, {1: knob(1).addend(1.0)}):
        torch.testing.assert_close(steered, lm(**inputs).logits, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_vision_language_model_is_steered_in_its_text_part() -> None:
    lm, inputs = vision_language_model(), pad(prompts([6, 4]))
    rows = [{knob(1, where="completion"): 1.0}, {knob(0): 1.0}]
    with steer(lm, rows):
        tokens = greedy(lm, inputs)
    for row, setting in enumerate(rows):
        with steer(lm, setting):
            assert torch.equal(tokens[row], greedy(lm, pad([prompts([6, 4])[row]]))[0])


# --- ablation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_ablation_removes_the_component_along_the_direction(dtype: torch.dtype) -> None:
    lm, inputs = model(dtype=dtype), pad(prompts([6, 6, 6, 3]))
    adapter, turned = Adapter(lm), knob(1, operation="ablate", gain=7.0)
    with adapter.read([1]) as base:
        lm(**inputs)
    strengths = [1.0, 0.5, 0.0, 1.0]
    with adapter.read([1]) as steered, steer(lm, [{turned: strength} for strength in strengths]):
        lm(**inputs)
    before, after = base.acts[1].float(), steered.acts[1].float()
    along, left = before @ turned.direction, after @ turned.direction
    atol = 1e-5 if dtype == torch.float32 else 0.05
    assert float(along.abs().max()) > 0.5
    for row, strength in enumerate(strengths):
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(left[row, real], (1 - strength) * along[row, real], atol=atol, rtol=0)
        rest = (after - before) - (left - along)[..., None] * turned.direction
        assert float(rest[row].abs().max()) < atol
    whole = before[0] - along[0, :, None] * turned.direction  # in float32, and rounded once
    assert torch.equal(steered.acts[1][0], whole.to(dtype))
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[3, :3], before[3, :3])  # padding
    assert steered.acts[1].dtype == dtype


@torch.no_grad()
def test_ablation_comes_before_addition_whatever_the_order() -> None:
    lm, inputs = model(), pad(prompts([6]))
    adapter = Adapter(lm)
    for names in (("a", "b"), ("b", "a")):
        remove, add = knob(1, name=names[0], operation="ablate"), knob(1, name=names[1], norm=3.0)
        with adapter.read([1]) as steered, steer(lm, {add: 1.0, remove: 1.0}):
            lm(**inputs)
        along = steered.acts[1] @ add.direction  # the same direction: removed, then set to the dose
        torch.testing.assert_close(along, torch.full_like(along, 3.0))


@torch.no_grad()
def test_ablations_at_one_layer_follow_the_order_of_their_names_in_every_row() -> None:
    lm, inputs = model(), pad(prompts([6, 6]))
    adapter = Adapter(lm)
    a, b = (knob(1, name=name, seed=seed, operation="ablate") for name, seed in (("a", 1), ("b", 2)))
    with adapter.read([1]) as steered, steer(lm, [{a: 1.0, b: 1.0}, {b: 1.0, a: 1.0}]):
        lm(**inputs)
    assert float((steered.acts[1] @ b.direction).abs().max()) < 1e-5
    assert float((steered.acts[1] @ a.direction).abs().max()) > 1e-2  # what b put back


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_ablation_touches_the_tokens_of_its_where_and_no_others(where: Where) -> None:
    lm, inputs = model(), pad(prompts([6]))
    adapter, turned = Adapter(lm), knob(1, operation="ablate", where=where)
    with adapter.read([1]) as seen, steer(lm, {turned: 1.0}):
        cache = lm(**inputs, use_cache=True)[CACHE]
        along = (seen.acts[1] @ turned.direction)[0].abs()
        lm(input_ids=torch.tensor([[9]]), **{CACHE: cache})
        new = (seen.acts[1] @ turned.direction)[0].abs()
    removed = [length < 1e-5 for length in [*along.tolist(), *new.tolist()]]
    steered = {"all": range(7), "prompt": range(6), "context": range(5), "completion": range(5, 7)}[where]
    assert removed == [position in steered for position in range(7)]


# --- positions -------------------------------------------------------------------------------------------------------


def trace(
    rows: list[list[int]],
    setting: Sequence[Mapping[Knob, float]] | Mapping[Knob, float],
    *,
    side: Side,
    pieces: Sequence[int] = (),
    width: int = 0,
    **options: Any,
) -> list[list[float]]:
    """Run rows plus four new tokens through a cache; per row and absolute position, the length of what was added.

    The knobs must sit at layer 0: its input depends on no steering, so that the difference to a plain run is exactly
    what the knobs added. Padding comes back at the end of each row. `pieces` are the widths of the calls; `width` pads
    every row.
    """
    lm = model()
    inputs = {key: value[:-1] for key, value in pad([*rows, [9] * max(width, *map(len, rows), 1)], side).items()}
    ids = torch.cat([inputs["input_ids"], torch.arange(10, 14).expand(len(rows), 4)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 4, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    widths = list(pieces) or [inputs["input_ids"].shape[1], 1, 1, 1, 1]
    assert sum(widths) == ids.shape[1]
    adapter = Adapter(lm)

    def run() -> Tensor:
        from transformers import DynamicCache

        cache, start, seen = DynamicCache(config=lm.config), 0, list[Tensor]()
        for width in widths:
            columns = slice(start, start + width)
            with adapter.read([0]) as reading:
                lm(
                    input_ids=ids[:, columns],
                    attention_mask=mask[:, : start + width],
                    position_ids=positions[:, columns],
                    **{CACHE: cache},
                )
            seen.append(reading.acts[0])
            start += width
        return torch.cat(seen, 1)

    base = run()
    with torch.no_grad(), steer(lm, setting, **options):
        lengths = (run() - base).norm(dim=-1)
    order = torch.argsort(1 - mask, dim=1, stable=True)
    return [[round(float(value), 3) for value in row] for row in lengths.gather(1, order)]


def expected_trace(where: Where, prompt: int, width: int, dose: float) -> list[float]:
    steered = {
        "all": range(prompt + 4),
        "prompt": range(prompt),
        "context": range(prompt - 1),
        "completion": range(prompt - 1, prompt + 4),
    }
    return [dose if position in steered[where] else 0.0 for position in range(width + 4)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("lengths", [[5, 5], [5, 2, 1], [1, 1]], ids=str)
def test_each_where_steers_exactly_its_absolute_positions(where: Where, side: Side, lengths: list[int]) -> None:
    turned = knob(0, where=where, norm=4.0)
    traces = trace(prompts(lengths), {turned: 0.5}, side=side)
    assert traces == [expected_trace(where, length, max(lengths), 2.0) for length in lengths]
    given = trace(prompts(lengths), {turned: 0.5}, side=side, prompt_lengths=lengths)
    assert given == traces


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pieces", [[2, 2, 1, 3, 1], [1] * 9, [9], [6, 3]], ids=str)
def test_prompts_fed_in_pieces_are_steered_at_the_same_positions(side: Side, pieces: list[int]) -> None:
    lengths = [5, 2, 1]
    for where in WHERE:
        turned = knob(0, where=where, norm=4.0)
        traces = trace(prompts(lengths), {turned: 0.5}, side=side, pieces=pieces, prompt_lengths=lengths)
        expected = [expected_trace(where, length, 5, 2.0) for length in lengths]
        if where == "all" and 1 in pieces:  # one token at a time is taken for decoding: only real tokens count
            traces = [row[: length + 4] for row, length in zip(traces, lengths, strict=True)]
            expected = [row[: length + 4] for row, length in zip(expected, lengths, strict=True)]
        assert traces == expected


@pytest.mark.parametrize("pieces", [[1] * 10, [2, 3, 1, 2, 2], [6, 4]], ids=str)
@pytest.mark.parametrize("where", ["prompt", "context", "completion"])
def test_padding_in_front_of_every_row_does_not_move_the_end_of_the_prompt(where: Where, pieces: list[int]) -> None:
    turned = knob(0, where=where, norm=4.0)
    traces = trace(prompts([3, 2]), {turned: 0.5}, side="left", pieces=pieces, width=6, prompt_lengths=[3, 2])
    assert traces == [expected_trace(where, length, 6, 2.0) for length in (3, 2)]


@pytest.mark.parametrize("side", SIDES)
def test_rows_and_knobs_of_one_layer_keep_their_own_positions(side: Side) -> None:
    kinds: list[Where] = ["prompt", "completion", "all", "context"]
    prompt, completion, everywhere, context = (knob(0, name=kind, where=kind, norm=4.0) for kind in kinds)
    rows: list[dict[Knob, float]] = [
        {prompt: 0.5},
        {completion: 1.0},
        {everywhere: -1.5},
        {},
        {prompt: 1, completion: 1},
        {context: 1, completion: 1},
    ]
    traces = trace(prompts([5, 2, 3, 4, 2, 3]), rows, side=side)
    assert traces[:4] == [
        expected_trace("prompt", 5, 5, 2.0),
        expected_trace("completion", 2, 5, 4.0),
        expected_trace("all", 3, 5, 6.0),
        [0.0] * 9,
    ]
    assert traces[4] == [4.0, 8.0, 4.0, 4.0, 4.0, 4.0, 0.0, 0.0, 0.0]  # the last prompt token is in both
    assert traces[5] == expected_trace("all", 3, 5, 4.0)  # between them context and completion have every token once


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_completion_only_mask_same_with_and_without_cache(name: str) -> None:
    lm, rows = model(name), prompts([6, 3, 1])
    new = torch.tensor(prompts([4, 4, 4], seed=1))
    whole = [row + tokens.tolist()[:-1] for row, tokens in zip(rows, new, strict=True)]
    plain = stepwise(lm, rows, new)
    for where in WHERE:
        turned = knob(1, where=where)
        with steer(lm, {turned: 1.0}):
            cached = stepwise(lm, rows, new)
        lengths = [len(row) for row in rows]
        with steer(lm, {turned: 1.0}, prompt_lengths=lengths):
            uncached = lm(**pad(whole, "left"), use_cache=False).logits[:, -4:]
            given = stepwise(lm, rows, new)
        torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)
        assert torch.equal(cached, given)
        assert not torch.allclose(cached, plain, atol=1e-2)


@torch.no_grad()
def test_generation_without_a_cache_needs_prompt_lengths_and_then_agrees() -> None:
    lm, inputs = model(), pad(prompts([6, 3]))
    for where in ("prompt", "context", "completion"):
        turned = knob(1, where=where)
        with steer(lm, {turned: 1.0}):
            cached = greedy(lm, inputs)
            with pytest.raises(OptionError, match=r"asks for no KV cache\. Pass prompt_lengths to steer"):
                greedy(lm, inputs, use_cache=False)
            with pytest.raises(OptionError, match="asks for no KV cache"):
                lm(**inputs)  # a cache made by default is no sign that the input is a prompt
        with steer(lm, {turned: 1.0}, prompt_lengths=[6, 3]):
            assert torch.equal(greedy(lm, inputs, use_cache=False), cached)
    with steer(lm, {knob(1): 1.0}):
        assert torch.equal(greedy(lm, inputs, use_cache=False), greedy(lm, inputs))


@torch.no_grad()
def test_a_new_empty_cache_starts_a_new_prompt() -> None:
    lm, long, short = model(), pad(prompts([9])), pad(prompts([3], seed=1))
    turned = knob(1, where="completion")
    with steer(lm, {turned: 1.0}):
        fresh = greedy(lm, short)
    with steer(lm, {turned: 1.0}):
        greedy(lm, long)
        assert torch.equal(greedy(lm, short), fresh)


@torch.no_grad()
def test_a_cache_made_outside_needs_prompt_lengths_and_tokens_that_the_knob_leaves_alone() -> None:
    # both rows begin with padding, which lies in the part of the cache that was not seen being made
    lm, whole = model(), {key: value[:2] for key, value in pad(prompts([6, 4, 8])).items()}

    def columns(start: int, stop: int) -> dict[str, Tensor]:
        part = {key: whole[key][:, start:stop] for key in ("input_ids", "position_ids")}
        return {**part, "attention_mask": whole["attention_mask"][:, :stop]}

    def continued(which: Knob, lengths: list[int] | None, **options: bool) -> Tensor:
        cache = lm(**columns(0, 4), use_cache=True)[CACHE]
        with steer(lm, {which: 1.0}, prompt_lengths=lengths, **options):
            pieces = [lm(**columns(*span), **{CACHE: cache}).logits for span in ((4, 6), (6, 7), (7, 8))]
        return torch.cat(pieces, 1)

    turned = knob(1, where="completion")
    with pytest.raises(OptionError, match="KV cache made elsewhere"):
        continued(turned, None)
    steered = continued(turned, [6, 4])
    with steer(lm, {turned: 1.0}, prompt_lengths=[6, 4]):
        torch.testing.assert_close(steered, lm(**whole, use_cache=False).logits[:, 4:], atol=1e-4, rtol=1e-4)
    for which, lengths in ((knob(1), None), (knob(1, where="prompt"), [6, 4]), (turned, [2, 2])):
        with pytest.raises(CacheError, match=r"[24] tokens were computed without knobs \(row 0\)"):
            continued(which, lengths)
        assert not torch.allclose(continued(which, lengths, check_cache=False), steered)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])  # with and without sliding windows
@torch.no_grad()
def test_static_caches_steer_the_same_tokens(name: str, where: Where) -> None:
    lm, inputs = model(name), pad(prompts([12, 3, 1]))
    with steer(lm, [{knob(1, where=where): 1.0}, {}, {knob(0, where=where): -1.0}]):
        assert torch.equal(greedy(lm, inputs, cache_implementation="static"), greedy(lm, inputs))


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_prompt_lookup_with_prompt_lengths_steers_the_same_tokens(where: Where) -> None:
    lm, repeating = model(), pad([[20, 21, 22, 23] * 4])
    with steer(lm, {knob(1, where=where): 1.0}, prompt_lengths=[16]):
        assert torch.equal(greedy(lm, repeating, prompt_lookup_num_tokens=3), greedy(lm, repeating))


# --- thoughts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[6, 1, 1, 1, 1], [1] * 10, [4, 3, 3]], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_thoughts_are_steered_from_their_opening_to_their_closing_marker(side: Side, pieces: list[int]) -> None:
    # The completion of `trace` is 10 11 12 13 in every row, and begins with the prompt's last token.
    rows = [[30, 31, 32, 33, 34, 10], [30, 31, 11, 10], [10, 11, 30]]
    thinking, answer = (knob(0, name=where, where=where, norm=4.0) for where in ("thinking", "answer"))
    options = {"side": side, "pieces": pieces, "prompt_lengths": [6, 4, 3], "thinking": ([10, 11], [12])}
    alone = [[i for i, dose in enumerate(row) if dose] for row in trace(rows, {thinking: 0.5}, **options)]
    assert alone == [[7], [5], [2, 3, 4]]  # from the 11 that ends the marker on, and 12 closes it
    rest = [[i for i, dose in enumerate(row) if dose] for row in trace(rows, {answer: 0.5}, **options)]
    assert rest == [[5, 6, 8, 9], [3, 4, 6, 7], [5, 6]]
    short = {**options, "thinking": ([30], [13])}  # opened in the prompt, where nothing is steered before its end
    alone = [[i for i, dose in enumerate(row) if dose] for row in trace(rows, {thinking: 0.5}, **short)]
    assert alone == [[5, 6, 7, 8], [3, 4, 5, 6], [2, 3, 4, 5]]


@torch.no_grad()
def test_a_context_that_has_ended_takes_no_knobs() -> None:
    lm, inputs, turned = model(), pad(prompts([4])), knob(1)
    with steer(lm, {turned: 1.0}) as steering:
        pass
    before, base = hooks(lm), lm(**inputs).logits
    with pytest.raises(OptionError, match=r"This steer\(\) has ended"):
        steering.set({turned: 5.0})
    assert hooks(lm) == before
    assert torch.equal(lm(**inputs).logits, base)


@torch.no_grad()
def test_a_prompt_longer_than_its_row_is_refused_unless_the_rest_may_follow() -> None:
    lm, inputs, turned = model(), pad(prompts([6, 4])), knob(1, where="completion")
    with steer(lm, {turned: 1.0}, prompt_lengths=[6, 5]):
        with pytest.raises(OptionError, match=r"Row 1 has 4 tokens, and prompt_lengths says that its prompt has 5\."):
            lm(**inputs, use_cache=False)
        with pytest.raises(OptionError, match=r"Row 2 has 4 tokens"):
            lm(**{name: value.repeat_interleave(2, 0) for name, value in inputs.items()}, use_cache=False)
        lm(**inputs, use_cache=True)
        with pytest.raises(OptionError, match=r"Row 1 has 4 tokens"):
            greedy(lm, inputs)
    with steer(lm, {turned: 1.0}, prompt_lengths=[6, 3]):  # the rest of row 1 is an answer that was begun
        greedy(lm, inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rwkv", "cpmant"])
def test_blocks_that_hold_other_tokens_than_the_call_are_refused(name: str) -> None:
    lm, ids = model(name), torch.tensor(prompts([5, 5]))
    with steer(lm, {knob(1): 1.0}):
        if name == "rwkv":  # transformers mixes up the rows of a batch that goes on with their states
            out = lm(ids, use_cache=True)
            with pytest.raises(AdapterError, match="Layer 1 holds 2 rows of 2 tokens in a call of 2 of 1, so that"):
                lm(ids[:, :1], state=out.state, use_cache=True)
        else:  # puts a prompt of its own before every text
            with pytest.raises(AdapterError, match="given 37 tokens in a call of 5, so that their positions"):
                lm(ids)


@torch.no_grad()
def test_thoughts_need_markers_token_ids_and_rows_that_stay_in_place() -> None:
    lm, inputs, turned = model(), pad(prompts([4])), knob(0, where="thinking")
    with pytest.raises(OptionError, match="need the tokens that open and close"), steer(lm, {turned: 1.0}):
        pass
    for bad in ([[1]], [[], [2]], [[1], ["x"]], 3, (1, 2)):
        refused = pytest.raises(OptionError, match="thinking holds the ids that open and those that close")
        with refused, steer(lm, {turned: 1.0}, thinking=bad):  # pyright: ignore[reportArgumentType]
            pass
    stray = pytest.raises(OptionError, match=f"token id {VOCABULARY}; this model's vocabulary has {VOCABULARY} tokens")
    with stray, steer(lm, {turned: 1.0}, thinking=([10], [VOCABULARY])):
        pass
    with steer(lm, {turned: 1.0}, thinking=([10], [11])):
        with pytest.raises(OptionError, match="cannot follow beam search"):
            greedy(lm, inputs, num_beams=2)
        with pytest.raises(OptionError, match="the decoder got embeddings"):
            lm(inputs_embeds=torch.zeros(1, 4, WIDTH), use_cache=True)


# --- compiled models -------------------------------------------------------------------------------------------------


def test_nothing_is_reset_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    for frames in (0, 3):
        monkeypatch.setattr(torch._dynamo.convert_frame, "FRAME_COUNTER", frames)
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True), steer(model(), {knob(): 1.0}):
            assert len(resets) == (frames > 0)


@pytest.mark.parametrize("compiled", ["before", "inside"])
@torch.no_grad()
def test_compiled_models_are_steered_and_let_go(compiled: str) -> None:
    lm, twin, ids = model(), model(), torch.tensor(prompts([6]))
    base = twin(ids).logits
    if compiled == "before":  # by default torch's compiled code would not see hooks that came later
        lm.compile(backend="eager")
        torch.testing.assert_close(lm(ids).logits, base)
    for strength, where in ((1.0, "all"), (-2.0, "completion")):
        turned = knob(1, where=cast(Where, where))
        with steer(twin, {turned: strength}, prompt_lengths=[6]):
            wanted = twin(ids).logits
        with steer(lm, {turned: strength}, prompt_lengths=[6]), Adapter(lm).read([1]) as reading:
            if compiled == "inside":
                lm.compile(backend="eager")
            torch.testing.assert_close(lm(ids).logits, wanted)
            assert reading.acts
        torch.testing.assert_close(lm(ids).logits, base)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler, g++ or $CXX")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch, of itself
@torch.no_grad()
def test_code_that_inductor_generates_is_steered_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that an earlier run has left
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)  # code past the limit of 8 would run uncompiled
    lm, twin, inputs = model(), model(), pad(prompts([6, 4]))
    graphs = torch._dynamo.utils.counters["stats"]

    def said(lm: PreTrainedModel) -> tuple[list[list[int]], Tensor]:
        """New tokens, and their logits `[B, T, V]`: the prompt's, then those of decode steps with a KV cache."""
        out: Any = lm.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences.tolist(), torch.stack(out.logits, 1)

    def check_same(wanted: tuple[list[list[int]], Tensor]) -> None:
        tokens, logits = said(lm)
        assert tokens == wanted[0]
        torch.testing.assert_close(logits, wanted[1])

    base = said(twin)
    lm.compile()
    check_same(base)
    for strength, where in ((1.0, "all"), (-2.0, "completion")):
        turned, compiled = knob(1, where=cast(Where, where)), graphs["unique_graphs"]
        with steer(twin, {turned: strength}):
            wanted = said(twin)
        with steer(lm, {turned: strength}):
            check_same(wanted)
        assert wanted[0] != base[0]
        assert graphs["unique_graphs"] > compiled  # it was not run uncompiled
        check_same(base)
    again = knob(1, seed=1)
    with steer(twin, {again: 0.5}):
        wanted = said(twin)
    compiled = graphs["unique_graphs"]
    with steer(lm, {again: 0.5}):
        check_same(wanted)
    assert graphs["unique_graphs"] == compiled  # another knob at that layer takes the same code


# --- caches of other knobs -------------------------------------------------------------------------------------------


def prefix(lm: Any, setting: Mapping[Knob, float] | None, **options: Any) -> Any:
    """A KV cache of five tokens, made under a setting, or outside of any."""
    if setting is None:
        return prefix_inside(lm)
    with steer(lm, setting, **options):
        return prefix_inside(lm)


def prefix_inside(lm: Any) -> Any:
    """A KV cache of five tokens, made under whatever is on."""
    return lm(torch.tensor(prompts([5])), use_cache=True)[CACHE]


@pytest.mark.parametrize("copied", [False, True])
@torch.no_grad()
def test_a_cached_prefix_made_under_other_knobs_is_refused(copied: bool) -> None:
    lm, one, two = model(), knob(1), knob(1, name="two", seed=5)
    last = torch.tensor([[9]])

    def goes_on(made: Mapping[Knob, float] | None, under: Mapping[Knob, float]) -> bool:
        cache = prefix(lm, made)
        cache = copy.deepcopy(cache) if copied else cache
        with steer(lm, under), contextlib.suppress(CacheError):
            lm(last, **{CACHE: cache})
            return True
        return False

    same = knob(1, name="another-name")
    assert [goes_on({one: 1.0}, under) for under in ({one: 1.0}, {same: 1.0}, {one: 1.0, two: 0.0})] == [True] * 3
    assert [goes_on({one: 1.0}, under) for under in ({one: 0.5}, {two: 1.0}, {one: 1.0, two: 1.0}, {})] == [False] * 4
    assert [goes_on(made, {one: 1.0}) for made in (None, {}, {one: 0.0})] == [False] * 3
    assert goes_on(None, {})
    cache = prefix(lm, {one: 1.0})
    with steer(lm, {two: 1.0}, check_cache=False):
        lm(last, **{CACHE: cache})


@torch.no_grad()
def test_a_prefix_serves_every_knob_that_leaves_its_tokens_alone() -> None:
    lm, later, ids = model(), knob(1, where="completion"), torch.tensor(prompts([5])[0] + [9, 8])[None]
    with steer(lm, {later: 1.0}, prompt_lengths=[7]):
        wanted = lm(ids, use_cache=False).logits[:, 5:]
        own = prefix(lm, {later: 1.0}, prompt_lengths=[7])
    for cache in (prefix(lm, None), prefix(lm, {}), prefix(lm, {later: 2.0}, prompt_lengths=[9]), own):
        with steer(lm, {later: 1.0}, prompt_lengths=[7]):
            torch.testing.assert_close(lm(ids[:, 5:], **{CACHE: cache}).logits, wanted)
    short = prefix(lm, {later: 1.0}, prompt_lengths=[3])
    refused = pytest.raises(CacheError, match="5 tokens were computed under the same knobs with another end of the")
    with refused, steer(lm, {later: 1.0}, prompt_lengths=[7]):
        lm(ids[:, 5:], **{CACHE: short})


@torch.no_grad()
def test_a_cache_can_be_copied_and_pickled_inside_the_context() -> None:
    lm, turned, last = model(), knob(1), torch.tensor([[9]])
    with steer(lm, {turned: 1.0}):
        cache = prefix_inside(lm)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        wanted = lm(last, **{CACHE: cache}).logits
        for copied in copies:
            assert torch.equal(lm(last, **{CACHE: copied}).logits, wanted)


@torch.no_grad()
def test_two_caches_in_turn_keep_their_own_prompts() -> None:
    lm, turned = model(), knob(1, where="completion")
    rows, new = prompts([9, 3]), torch.tensor(prompts([3])[0])
    with steer(lm, {turned: 1.0}):
        alone = [stepwise(lm, [row], new[None]) for row in rows]
        caches = [lm(torch.tensor([row]), use_cache=True)[CACHE] for row in rows]
        for step in range(2):
            for index, cache in enumerate(caches):
                logits = lm(new[None, step : step + 1], **{CACHE: cache}).logits
                torch.testing.assert_close(logits[0, -1], alone[index][0, step + 1])


@torch.no_grad()
def test_what_hides_the_end_of_the_prompt_is_refused_without_prompt_lengths() -> None:
    lm, repeating = model(), pad([[20, 21, 22, 23] * 4])
    everywhere, part = knob(1), knob(1, where="completion")
    hidden: dict[str, dict[str, Any]] = {
        "Assisted decoding": {"prompt_lookup_num_tokens": 3},
        "comes in pieces": {"prefill_chunk_size": 5},
    }
    for message, options in hidden.items():
        with steer(lm, {part: 1.0}), pytest.raises(OptionError, match=f"{message}.* Pass prompt_lengths"):
            greedy(lm, repeating, **options)
        for turned, lengths in ((part, [16]), (everywhere, None)):
            with steer(lm, {turned: 1.0}, prompt_lengths=lengths):
                assert torch.equal(greedy(lm, repeating, **options), greedy(lm, repeating))
    with steer(lm, {part: 1.0}):  # pieces by hand: the first is taken for the prompt, and the second is a surprise
        cache = lm(repeating["input_ids"][:, :9], use_cache=True)[CACHE]
        with pytest.raises(OptionError, match="brings 7 more tokens after a prompt of 9"):
            lm(repeating["input_ids"][:, 9:], **{CACHE: cache})


@torch.no_grad()
def test_a_draft_model_changes_the_speed_and_not_the_tokens() -> None:
    lm, draft, inputs = model(), model(seed=1), pad(prompts([7]))
    with steer(lm, {knob(1): 1.0}):
        assert torch.equal(greedy(lm, inputs, assistant_model=draft), greedy(lm, inputs))
    part = knob(1, where="completion")
    with steer(lm, {part: 1.0}), pytest.raises(OptionError, match="Assisted decoding puts guesses behind the prompt"):
        greedy(lm, inputs, assistant_model=draft)
    with steer(lm, {part: 1.0}, prompt_lengths=[7]):
        assert torch.equal(greedy(lm, inputs, assistant_model=draft), greedy(lm, inputs))


@torch.no_grad()
def test_tokens_taken_back_are_refused_where_they_matter() -> None:
    lm, ids = model(), torch.tensor(prompts([12]))

    def goes_on(turned: Knob, **options: Any) -> None:
        with steer(lm, {turned: 1.0}, **options):
            cache = lm(ids[:, :10], use_cache=True)[CACHE]
            cache.crop(-5)
            lm(ids[:, 5:8], **{CACHE: cache})

    goes_on(knob(1))
    goes_on(knob(1, where="completion"), prompt_lengths=[8])
    with pytest.raises(OptionError, match=r"the prompt may end elsewhere\. Pass prompt_lengths"):
        goes_on(knob(1, where="completion"))
    with pytest.raises(CacheError, match="what is known of thoughts"):
        goes_on(knob(1, where="thinking"), prompt_lengths=[8], thinking=([10], [11]))


@torch.no_grad()
def test_rows_that_leave_a_cache_are_refused() -> None:
    lm, turned, ids = model(), knob(1, where="completion"), torch.tensor(prompts([5, 5, 5]))
    for check_cache in (True, False):
        with steer(lm, {turned: 1.0}, check_cache=check_cache):
            cache = lm(ids, use_cache=True)[CACHE]
            cache.batch_select_indices(torch.tensor([0, 2]))
            with pytest.raises(CacheError, match="a KV cache of 3 rows with 2"):
                lm(ids[:2, :1], **{CACHE: cache})


@torch.no_grad()
def test_guidance_and_unknown_masks_are_refused() -> None:
    lm, inputs = model(), pad(prompts([6]))
    refused = pytest.raises(OptionError, match="guidance_scale runs a second prompt")
    with steer(lm, {knob(1, where="completion"): 1.0}, prompt_lengths=[6]), refused:
        greedy(lm, inputs, guidance_scale=2.0)
    with steer(lm, {knob(1): 1.0}):
        greedy(lm, inputs, guidance_scale=2.0)
        with pytest.raises(AdapterError, match=r"attention mask of this kind: a tensor of shape \(1, 6, 6\)"):
            lm(input_ids=inputs["input_ids"], attention_mask=torch.ones(1, 6, 6))


@torch.no_grad()
def test_a_static_cache_with_padding_is_not_taken_over_blindly() -> None:
    lm, inputs, turned = model(), pad(prompts([6, 3])), knob(1, where="completion")
    cache = StaticCache(config=lm.config, max_cache_len=16)
    lm(**inputs, **{CACHE: cache}, use_cache=True)
    square = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    with steer(lm, {turned: 1.0}, prompt_lengths=[8, 8]), pytest.raises(OptionError, match="does not show the padding"):
        lm(input_ids=torch.tensor([[9], [9]]), attention_mask=square, **{CACHE: cache})


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_nested_contexts_act_together_and_leave_in_turn(where: Where) -> None:
    lm, inputs = model(), pad(prompts([6, 3]))
    one, two = knob(1, where=where), knob(1, name="two", seed=5)
    with steer(lm, {one: 1.0, two: -1.0}):
        wanted = greedy(lm, inputs)
    with steer(lm, {one: 1.0}):
        alone = greedy(lm, inputs)
        with steer(lm, {two: -1.0}):
            assert torch.equal(greedy(lm, inputs), wanted)
            cache = lm(**inputs, use_cache=True)[CACHE]
        assert torch.equal(greedy(lm, inputs), alone)
        with pytest.raises(CacheError, match="nested in this one"):
            lm(torch.tensor([[9], [9]]), **{CACHE: cache})


def test_a_model_is_steered_in_one_thread_at_a_time() -> None:
    lm, errors = model(), list[str]()

    def other() -> None:
        try:
            with steer(lm, {knob(1): 1.0}):
                pass
        except AdapterError as error:
            errors.append(str(error))

    with steer(lm, {knob(1): 1.0}):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "is being steered in another thread" in errors[0]
    other()
    assert len(errors) == 1


def test_two_tasks_of_an_event_loop_do_not_steer_one_model_and_one_may_nest() -> None:
    lm = model()
    plain = {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}
    name = "model.layers.0.mlp.up_proj.weight"
    dense = DeltaKnob("dense", "planted", {name: torch.ones_like(plain[name])})

    async def request(turned: Mapping[AnyKnob, float], seconds: float) -> None:
        with steer(lm, turned), steer(lm, turned):
            await asyncio.sleep(seconds)

    async def both() -> list[BaseException | None]:
        return await asyncio.gather(request({dense: 1.0}, 0.02), request({knob(1): 1.0}, 0.04), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert isinstance(second, AdapterError)
    assert "another thread or task" in str(second)
    assert all(torch.equal(parameter, plain[name]) for name, parameter in lm.named_parameters())
    with steer(lm, {knob(1): 1.0}):  # which the tasks lie within
        asyncio.run(request({dense: 1.0}, 0.0))
    assert torch.equal(lm.get_parameter(name), plain[name])


def test_knobs_beneath_those_of_an_inner_context_stay_until_it_has_ended() -> None:
    lm = model()
    name = "model.layers.0.mlp.up_proj.weight"
    before = lm.get_parameter(name).detach().clone()
    one, two = (DeltaKnob(f"k{i}", "planted", {name: i * torch.ones_like(before)}) for i in (1, 2))
    with steer(lm, {one: 1.0}) as outer:
        with steer(lm, {two: 1.0}) as inner:
            for change in (lambda: outer.set({}), outer.clear):
                with pytest.raises(AdapterError, match=r"Another steer\(\) acts inside this one"):
                    change()
            assert torch.equal(lm.get_parameter(name), before + 1 + 2)
            inner.set({})
            assert torch.equal(lm.get_parameter(name), before + 1)
        outer.set({two: 1.0})
        assert torch.equal(lm.get_parameter(name), before + 2)
    outer.clear()
    assert torch.equal(lm.get_parameter(name), before)


def test_settings_that_cannot_be_put_on_leave_no_half_of_them() -> None:
    lm = model()
    ids = torch.tensor(prompts([6]))
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = lm.get_parameter(name)
    low = LowRank(torch.ones(1, parameter.shape[1]), torch.ones(parameter.shape[0], 1))
    plain = lm(ids, use_cache=False).logits
    for weights in (torch.ones_like(parameter), low):
        good = DeltaKnob("good", "planted", {name: weights})
        for bad in (knob(1, width=2 * WIDTH), knob(1, where="thinking")):
            with steer(lm, {}) as steering:
                with pytest.raises((KnobError, OptionError)):
                    steering.set({good: 1.0, bad: 1.0})
                assert torch.equal(lm(ids, use_cache=False).logits, plain)
                steering.set({good: 1.0})
                assert not torch.equal(lm(ids, use_cache=False).logits, plain)


# --- padding and rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text", "falcon"])
@torch.no_grad()
def test_padding_side_does_not_change_vector_or_output(name: str, where: Where) -> None:
    lm, rows = model(name), prompts([7, 4, 1])
    turned = knob(1, where=where)
    adapter = Adapter(lm)
    for side in SIDES:  # nothing attends to padding, so logits would not tell
        inputs = pad(rows, side)
        padding = inputs["attention_mask"] == 0
        with adapter.read([1]) as base:
            lm(**inputs, use_cache=False)
        with steer(adapter, {turned: 1.0}, prompt_lengths=[4, 3, 1]), adapter.read([1]) as steered:
            lm(**inputs, use_cache=False)
        assert torch.equal(steered.acts[1][padding], base.acts[1][padding])
    with steer(lm, {turned: 1.0}, prompt_lengths=[4, 3, 1]):
        left, right = (lm(**pad(rows, side), use_cache=False).logits for side in SIDES)
    for index, row in enumerate(rows):
        with steer(lm, {turned: 1.0}, prompt_lengths=[[4, 3, 1][index]]):
            alone = lm(**pad([row]), use_cache=False).logits[0]
        torch.testing.assert_close(left[index, -len(row) :], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(right[index, : len(row)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_mixed_batch_rows_equal_solo_runs(name: str, operation: Operation) -> None:
    lm, rows = model(name), prompts([7, 4, 4, 1])
    one, two = knob(0, name="one", operation=operation), knob(1, name="two", where="completion", operation=operation)
    three = knob(0, name="three", seed=3, operation=operation)
    settings: list[dict[Knob, float]] = [{one: 1.0, two: -1.0}, {}, {three: 0.7, two: 0.5, one: 0.3}, {two: 1.0}]
    new = torch.tensor(prompts([3] * 4, seed=1))
    with steer(lm, settings):
        mixed, tokens = stepwise(lm, rows, new), greedy(lm, pad(rows))
    for index, (row, setting) in enumerate(zip(rows, settings, strict=True)):
        with steer(lm, setting):
            same_shape = stepwise(lm, rows, new)
            alone, own = stepwise(lm, [row], new[index : index + 1]), greedy(lm, pad([row]))
        if name not in EXPERTS:
            assert torch.equal(mixed[index], same_shape[index])
        torch.testing.assert_close(mixed[index], same_shape[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed[index], alone[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(tokens[index], own[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_beams_and_returned_sequences_keep_the_knob_of_their_row(name: str) -> None:
    lm, rows = model(name), prompts([5, 3, 4, 2])
    turned, other, removed = knob(1), knob(2, where="completion"), knob(0, operation="ablate")
    settings: list[dict[Knob, float]] = [{turned: 1.0}, {removed: 1.0, other: 1.0}, {turned: -1.0, other: 1.0}, {}]
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    with steer(lm, settings):
        mixed = greedy(lm, pad(rows), **beams).unflatten(0, (4, 2))
    with steer(lm, settings, prompt_lengths=[len(row) for row in rows]):
        assert torch.equal(greedy(lm, pad(rows), **beams).unflatten(0, (4, 2)), mixed)
    for index, setting in enumerate(settings):
        with steer(lm, setting):
            assert torch.equal(mixed[index], greedy(lm, pad([rows[index]]), **beams))


@torch.no_grad()
def test_a_multiple_of_the_rows_repeats_each_row_for_its_neighbours() -> None:
    lm, adapter = model(), Adapter(model())
    adapter = Adapter(lm)
    ids = torch.tensor(prompts([5] * 6))
    with adapter.read([1]) as base:
        lm(ids)
    for lengths in (None, [5, 5]):
        with steer(lm, [{knob(1): 1.0}, {knob(1): -2.0}], prompt_lengths=lengths), adapter.read([1]) as steered:
            for times in (3, 1, 2):
                lm(ids[: 2 * times])
                strengths = (steered.acts[1] - base.acts[1][: 2 * times]) @ knob(1).direction / 4.0
                assert strengths.mean(1).round(decimals=3).tolist() == [1.0] * times + [-2.0] * times


# --- staying out of the way ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_model_is_bitwise_restored_after_error_inside_and_during_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, inputs = model(), pad(prompts([6, 3]))
    base, before = lm(**inputs).logits, hooks(lm)
    weights = {key: value.clone() for key, value in lm.state_dict().items()}

    def untouched() -> bool:
        same = all(torch.equal(value, weights[key]) for key, value in lm.state_dict().items())
        return same and hooks(lm) == before and torch.equal(lm(**inputs).logits, base)

    with steer(lm, {knob(0): 1.0, knob(2): 1.0}):
        assert hooks(lm) > before
        assert not torch.equal(lm(**inputs).logits, base)
    with pytest.raises(IndexError), steer(lm, {knob(0): 1.0, knob(2): 1.0}):
        lm(torch.tensor([[10**6]]))
    assert untouched()
    with pytest.raises(AdapterError), steer(lm, {knob(0): 1.0, knob(9): 1.0}):
        pass
    assert untouched()

    def refuse(*args: object, **kwargs: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Adapter(lm).blocks[2], "register_forward_hook", refuse)
        with pytest.raises(MemoryError), steer(lm, {knob(0): 1.0, knob(2): 1.0}):
            pass
    assert untouched()
    with steer(lm, {knob(0): 1.0}) as steering:
        with pytest.raises(OptionError):
            steering.set({knob(0): float("nan")})
        assert untouched()  # a refused setting leaves the model unsteered, not steered by the old one
    with steer(lm, {knob(0): 1.0}):
        pass
    assert untouched()


@torch.no_grad()
def test_hook_does_not_mutate_saved_activations() -> None:
    lm, inputs, saved = model(), pad(prompts([6, 3])), list[tuple[Tensor, Tensor]]()
    for settings in (
        {knob(0): 1.0},
        [{knob(0): 1.0}, {}],
        {knob(0, where="completion"): 1.0},
        *({knob(0, operation=operation): 1.0} for operation in OPERATIONS[1:]),
    ):
        with steer(lm, settings):
            # prepended after ours: runs first, on the block's own output
            handle = (
                Adapter(lm)
                .blocks[0]
                .register_forward_hook(
                    lambda module, args, output: saved.append((output, output.clone())), prepend=True
                )
            )
            greedy(lm, inputs, steps=2)
            handle.remove()
    assert len(saved) == 12
    assert all(torch.equal(output, copy) for output, copy in saved)


class CountOps(TorchDispatchMode):
    """Counts the tensor operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["all", "completion"])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_decode_step_costs_one_addition_per_steered_layer(where: Where, rows: int) -> None:
    lm, inputs = model(), pad(prompts([6, 3]))

    def step() -> list[str]:
        out = lm(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        with CountOps() as counter:
            lm(input_ids=torch.ones(2, 1, dtype=torch.long), attention_mask=mask, **{CACHE: out[CACHE]})
        return counter.names

    plain = step()
    low, high = knob(0, where=where), knob(2, where=where)
    twin = knob(0, name="twin", seed=2)  # a second knob at a layer, with another `where`, costs nothing more
    with steer(lm, [{low: 1.0, high: 1.0, twin: 1.0}, {high: -1.0}] if rows > 1 else {low: 1.0, high: 1.0, twin: 1.0}):
        steered = step()
    for name in plain:
        steered.remove(name)
    assert [name for name in steered if name != "detach"] == ["add", "add"]


@pytest.mark.parametrize("where", ["prompt", "context"])
@torch.no_grad()
def test_a_decode_step_after_a_steered_prompt_costs_nothing(where: Where) -> None:
    lm, inputs = model(), pad(prompts([6, 6]))

    def step() -> list[str]:
        cache = lm(**inputs, use_cache=True)[CACHE]
        with CountOps() as counter:
            lm(input_ids=torch.ones(2, 1, dtype=torch.long), **{CACHE: cache})
        return [name for name in counter.names if name != "detach"]

    plain = step()
    with steer(lm, {knob(0, where=where): 1.0}):
        assert step() == plain


@torch.no_grad()
def test_a_prefill_without_padding_builds_no_masks() -> None:
    lm, inputs = model(), pad(prompts([6, 6]))

    def names(given: Mapping[str, Tensor]) -> list[str]:
        with CountOps() as counter:
            lm(**given, use_cache=False)
        return counter.names

    bare = {"input_ids": inputs["input_ids"]}
    extra = {key: names(given) for key, given in (("mask", inputs), ("bare", bare))}
    with steer(lm, {knob(0): 1.0, knob(2): 1.0}):
        for key, given in (("mask", inputs), ("bare", bare)):
            steered = names(given)
            for name in extra[key]:
                steered.remove(name)
            assert steered.count("add") == 2
            assert "addcmul" not in steered
            assert len(steered) <= (2 if key == "bare" else 8)  # one look at the mask


# --- the handle and what is refused ----------------------------------------------------------------------------------


@torch.no_grad()
def test_settings_change_inside_the_context() -> None:
    lm, inputs = model(), pad(prompts([6, 3]))
    one, two = knob(0), knob(1)
    with plain_hooks(lm, {0: one.addend(1.0)}):
        first = lm(**inputs).logits
    with plain_hooks(lm, {1: two.addend(-1.0)}):
        second = lm(**inputs).logits
    base, before = lm(**inputs).logits, hooks(lm)
    with steer(lm, {}) as steering:
        assert torch.equal(lm(**inputs).logits, base)
        steering.set({one: 1.0})
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(lm(**inputs).logits[real], first[real])
        steering.set([{one: 1.0}, {two: -1.0}])
        mixed = lm(**inputs).logits
        torch.testing.assert_close(mixed[0], first[0])
        torch.testing.assert_close(mixed[1, -3:], second[1, -3:])
        steering.clear()
        assert hooks(lm) == before
        assert torch.equal(lm(**inputs).logits, base)
    assert hooks(lm) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "strong", None])
def test_strengths_must_be_finite_numbers(bad: Any) -> None:
    with pytest.raises(OptionError, match="strength of 'pico' must be"), steer(model(), [{}, {knob(): bad}]):
        pass


def test_strengths_too_large_for_the_dtype_are_refused() -> None:
    with steer(model(), {knob(): 1e5}):
        pass
    for dtype, strength in ((torch.float16, 1e5), (torch.float32, 1e300)):
        with (
            pytest.raises(OptionError, match=rf"too large for {dtype}; got \[{{}}, {{'pico'"),
            steer(model(dtype=dtype), [{}, {knob(): strength}]),
        ):
            pass


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_a_knob_of_another_width_is_refused(strength: float) -> None:
    with (
        pytest.raises(KnobError, match="Knob 'pico' has width 48; this LlamaForCausalLM has hidden size 32"),
        steer(model(), {knob(width=48): strength}),
    ):
        pass


def test_a_knob_at_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AdapterError, match=f"There is no layer {LAYERS}"), steer(model(), {knob(LAYERS): 1.0}):
        pass


def test_names_and_missing_settings_are_refused() -> None:
    lm, named = model(), cast(Any, {"math": 1.0})
    with pytest.raises(OptionError, match="takes knobs, not 'math'"), steer(lm, named):
        pass
    with pytest.raises(OptionError, match="Got no knob settings"), steer(lm, []):
        pass


@torch.no_grad()
def test_rows_that_do_not_fit_the_batch_are_refused() -> None:
    lm, ids = model(), torch.tensor(prompts([4, 4, 4]))
    rows = [{knob(1): 1.0}, {}]
    with steer(lm, rows), pytest.raises(OptionError, match="got 3 rows, not a multiple of the 2 knob settings"):
        lm(ids)
    with steer(lm, rows), pytest.raises(OptionError, match="got 1 rows, not a multiple of the 2 knob settings"):
        lm(ids[:1])
    with (
        steer(lm, {knob(1): 1.0}, prompt_lengths=[4, 4]),
        pytest.raises(OptionError, match="got 3 rows, not a multiple of the 2 prompt lengths"),
    ):
        lm(ids)
    with (
        pytest.raises(OptionError, match="2 knob settings but 3 prompt lengths"),
        steer(lm, rows, prompt_lengths=[4] * 3),
    ):
        pass
    for bad in ([], [4, 0], [True], ["1"], [1.5], 3):
        refused = pytest.raises(OptionError, match="Prompt lengths are a list of whole numbers, 1 or more")
        with refused, steer(lm, {}, prompt_lengths=bad):  # pyright: ignore[reportArgumentType]
            pass


def test_width_of_pico_knobs_is_the_width_of_pico_models() -> None:
    assert knob().direction.shape == (WIDTH,)
