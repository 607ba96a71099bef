"""Conversations, sampling and kinds of caches: which absolute positions a knob meets, turn after turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from pico import CACHE, PAD, knob, model, pad, prompts, tokenizer
from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.check.trace import tracing
from trimtab.errors import CacheError
from trimtab.render import Renderer
from trimtab.runtime import steer
from trimtab.types import Message, Where

WHERE: tuple[Where, ...] = ("all", "prompt", "context", "completion")
STEPS = 4
TALK = [
    Message("system", "Be kind."),
    Message("user", "Who are you?"),
    Message("assistant", "A boat."),
    Message("user", "Where to?"),
    Message("assistant", "To the other shore, slowly."),
    Message("user", "Why?"),
]
TURNS = [Renderer(tokenizer()).prompt_ids(TALK[: 2 * turn]) for turn in (1, 2, 3)]
"""What the model is given in turns 1, 2 and 3; each begins with the one before."""


def answer(lm: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The new tokens of greedy decoding, `[B, STEPS]`."""
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": PAD, "use_cache": True}
    return lm.generate(**{**given, **settings, **options})[:, inputs["input_ids"].shape[1] :]


def positions(where: Where, prompt: int) -> list[int]:
    """The positions that `where` means of those the model sees: the last new token is never fed."""
    last = prompt + STEPS - 1
    spans = {"all": (0, last), "prompt": (0, prompt), "context": (0, prompt - 1), "completion": (prompt - 1, last)}
    return list(range(*spans[where]))


# Turns


def test_turns_begin_with_the_turns_before() -> None:
    for earlier, later in pairwise(TURNS):
        assert later[: len(earlier)] == earlier


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_every_turn_with_a_fresh_prefill_steers_its_own_prompt_and_answer(where: Where) -> None:
    lm, inputs = model(), pad(TURNS)
    with steer(lm, {knob(1, where=where): 1.0}):
        for turn in TURNS:  # one context around the whole talk, as in a chat
            alone = pad([turn])
            with tracing(Adapter(lm), 1, alone["attention_mask"]) as trace:
                answer(lm, alone)
            assert trace.positions() == [positions(where, len(turn))]
        with tracing(Adapter(lm), 1, inputs["attention_mask"]) as trace:  # three talks side by side
            answer(lm, inputs)
        assert trace.positions() == [positions(where, len(turn)) for turn in TURNS]


@torch.no_grad()
def test_the_cache_of_the_turn_before_goes_on_under_the_same_knob_and_no_other() -> None:
    lm, turned = model(), knob(1)

    def talk(settings: Sequence[Mapping[Knob, float]]) -> list[Tensor]:
        cache, said = DynamicCache(config=lm.config), list[Tensor]()
        for turn, setting in zip(TURNS, settings, strict=True):
            with steer(lm, setting):
                said.append(answer(lm, pad([turn]), **{CACHE: cache}))
            cache.crop(1 - STEPS)  # what the user sees of an answer is rendered anew in the next prompt
        return said

    with steer(lm, {turned: 1.0}):
        fresh = [answer(lm, pad([turn])) for turn in TURNS]
    assert all(map(torch.equal, talk([{turned: 1.0}] * 3), fresh))
    assert not all(torch.equal(answer(lm, pad([turn])), said) for turn, said in zip(TURNS, fresh, strict=True))
    for others in ([{turned: 1.0}, {turned: 0.5}, {}], [{}, {knob(0): 1.0}, {}], [{turned: 1.0}, {}, {}]):
        with pytest.raises(CacheError, match=rf"KV cache whose {len(TURNS[0])} tokens were computed"):
            talk(others)


# Sampling and input


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_every_returned_sample_is_steered_by_the_knob_of_its_row(given: bool) -> None:
    lm, rows = model(), prompts([6, 3])
    inputs, settings = pad(rows), [{knob(1, where="completion"): 1.0}, {knob(1, where="context"): 1.0}]
    lengths = [len(row) for row in rows] if given else None
    with steer(lm, settings, prompt_lengths=lengths), tracing(Adapter(lm), 1, inputs["attention_mask"]) as trace:
        torch.manual_seed(0)
        out = answer(lm, inputs, do_sample=True, num_return_sequences=4)
    assert len(out) == 8
    assert len({tuple(row) for row in out.tolist()}) > 2  # samples differ
    # `tracing` refuses copies of one row that are not treated alike
    assert trace.positions() == [positions("completion", 6), positions("context", 3)]


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_embeddings_are_steered_like_the_ids_they_stand_for(where: Where) -> None:
    lm, inputs = model(), pad(prompts([6, 3]))
    embeddings = lm.get_input_embeddings()(inputs["input_ids"])
    for lengths in (None, [6, 3]):
        with steer(lm, {knob(1, where=where): 1.0}, prompt_lengths=lengths):
            out = lm.generate(
                inputs_embeds=embeddings,
                attention_mask=inputs["attention_mask"],
                max_new_tokens=STEPS,
                do_sample=False,
                pad_token_id=PAD,
            )
            assert torch.equal(out, answer(lm, inputs))


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_without_a_cache_the_same_positions_are_steered(where: Where) -> None:
    lm, inputs = model(), pad(prompts([6, 3]))
    steered = steer(lm, {knob(1, where=where): 1.0}, prompt_lengths=[6, 3])
    with steered, tracing(Adapter(lm), 1, inputs["attention_mask"]) as trace:
        answer(lm, inputs, use_cache=False)
    assert trace.positions() == [positions(where, 6), positions(where, 3)]


# Kinds of caches


@pytest.mark.parametrize("kind", ["static", "hybrid", "sliding_window", "hybrid_chunked"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_next"])
@torch.no_grad()
def test_every_kind_of_cache_gives_the_same_answer(name: str, kind: str) -> None:
    lm, inputs = model(name), pad(prompts([12, 4]))
    for where in WHERE:
        with steer(lm, [{knob(1, where=where): 1.0}, {knob(0, where=where): -1.0}]):
            assert torch.equal(answer(lm, inputs, cache_implementation=kind), answer(lm, inputs))


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_a_static_cache_that_was_reset_takes_a_new_prompt_and_other_knobs(where: Where) -> None:
    lm, long, short = model(), pad(prompts([6, 4])), pad(prompts([3, 2], seed=5))
    cache = StaticCache(config=lm.config, max_cache_len=32)
    for turned, inputs in ((knob(1, where=where), long), (knob(1, where=where), short), (knob(0, where=where), long)):
        with steer(lm, {turned: 1.0}):
            assert torch.equal(answer(lm, inputs, **{CACHE: cache}), answer(lm, inputs))
        cache.reset()
    nest = [{knob(1, where=where): 1.0}, {knob(0, name="inner", where=where): 1.0}]
    with steer(lm, nest[0]):
        with steer(lm, nest[1]):
            answer(lm, long, **{CACHE: cache})
        cache.reset()
        assert torch.equal(answer(lm, short, **{CACHE: cache}), answer(lm, short))
