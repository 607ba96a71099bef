"""Capture: what is read is what stands at the block's output, whatever the batch, the padding and the model."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pico
from trimtab.adapter import Adapter
from trimtab.capture import Evidence, capture, running
from trimtab.capture.batches import group, make_batches, worth_calls
from trimtab.capture.gathered import PARTS, Gathered
from trimtab.capture.running import Read, Runner
from trimtab.errors import AdapterError, OptionError, PairsError, UnknownName
from trimtab.methods.palrs import palrs_layer
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.texts import Format, Text, _other_questions, expand_positions, render_pairs
from trimtab.types import Message, Pair, Site

QUESTION: tuple[str, ...] = ("response_end", "last", "response_mean", "demonstrated")
ALONE: tuple[str, ...] = ("post_instruction", "last", "response_mean")


def pairs(n: int = 3) -> Pairs:
    return Pairs(Pair((Message("user", f"q{i}" * (i + 1)),), f"yes{'!' * i}", "no" * (i + 2)) for i in range(n))


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    return Adapter(model).blocks


def stream(model: PreTrainedModel, ids: Sequence[int]) -> list[Tensor]:
    """Run one sequence without padding and return every block's output `[T, D]`, by hooks of our own."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].detach().clone())

    hooks = [block.register_forward_hook(look) for block in blocks(model)]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return seen


def at(evidence: Evidence, layer: int, position: str) -> Tensor:
    """Return chosen and rejected at one site, `[2, N, D]`."""
    s = evidence.sites.index(Site(layer, position))
    return torch.stack([evidence.chosen[:, s], evidence.rejected[:, s]])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pico.tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico.model()


@pytest.mark.parametrize("name", pico.ARCHITECTURES)
def test_capture_equals_what_hook_sees_at_every_layer(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, data, r = pico.model(name), pairs(2), Renderer(tokenizer)
    found = capture(model, tokenizer, data, positions=["last"], format="question_response", token_budget=1)
    assert [site.layer for site in found.sites] == list(range(pico.LAYERS))
    for n, pair in enumerate(data):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            full = r.full(pair.prompt, answer)
            for layer, acts in enumerate(stream(model, full.ids)):
                expected = acts[full.response_end - 1]
                torch.testing.assert_close(at(found, layer, "last")[side, n], expected, atol=2e-5, rtol=1e-4)


def test_every_position_is_the_token_it_says(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    data, r = pairs(3), Renderer(tokenizer)
    asked = capture(model, tokenizer, data, positions=QUESTION, format="question_response", layers=[1])
    alone = capture(model, tokenizer, data, positions=ALONE, format="response_as_user", layers=[1])
    for n, pair in enumerate(data):
        other = data[(n + 1) % 3].prompt[0].content
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            full, slot = r.full(pair.prompt, answer), r.as_user(answer)
            shown = r.demonstrated(pair.prompt, answer, other)
            whole, user, demo = (stream(model, ids)[1] for ids in (full.ids, slot.ids, shown))
            expected = {
                (asked, "response_end[-1]"): whole[-1],
                (asked, "response_end[-2]"): whole[-2],
                (asked, "last"): whole[full.response_end - 1],
                (asked, "response_mean"): whole[full.response_start : full.response_end].mean(0),
                (asked, "demonstrated"): demo[-1],
                (alone, "post_instruction[-1]"): user[-1],
                (alone, "post_instruction[-4]"): user[-4],
                (alone, "last"): user[slot.response_end - 1],
                (alone, "response_mean"): user[slot.response_start : slot.response_end].mean(0),
            }
            for (evidence, position), vector in ((key, value) for key, value in expected.items()):
                torch.testing.assert_close(at(evidence, 1, position)[side, n], vector, atol=2e-5, rtol=1e-4)
            assert tokenizer.decode(full.ids[full.response_end - 1]) == answer[-1]


def test_palrs_layer_is_the_input_of_the_block_bit_for_bit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    data, inputs = pairs(2)[:1], []

    def look(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    hook = blocks(model)[2].register_forward_pre_hook(look, with_kwargs=True)
    # Layer 2 is read too, so that block 2 runs and shows its input.
    found = capture(
        model, tokenizer, data, positions=["post_instruction[-1]"], format="response_as_user", layers=[1, 2],
        token_budget=1, share=False,
    )  # fmt: skip
    hook.remove()
    ids = [Renderer(tokenizer).as_user(answer).ids for answer in (data[0].chosen, data[0].rejected)]
    read = [next(x for x in inputs if x.shape[1] == len(row))[0, -1] for row in ids]
    assert torch.equal(at(found, palrs_layer(2), "post_instruction[-1]")[:, 0], torch.stack(read))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "bloom", "falcon"])
def test_padding_side_and_batch_size_do_not_change_the_evidence(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, data = pico.model(name), pairs(4)
    ways = [("right", 1), ("right", 90), ("left", 90), ("left", 8192), ("right", 8192)]
    found = [
        capture(
            model, tokenizer, data, positions=QUESTION, format="question_response", padding=side, token_budget=budget
        )
        for side, budget in ways
    ]  # fmt: skip
    for other in found[1:]:
        torch.testing.assert_close(other.chosen, found[0].chosen, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(other.rejected, found[0].rejected, atol=5e-5, rtol=1e-4)
        assert other.norms == pytest.approx(found[0].norms, rel=1e-5)


def test_residual_norm_is_the_mean_over_answer_tokens_as_assistant_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    data, r = pairs(3), Renderer(tokenizer)
    norms: dict[int, list[float]] = {0: [], 2: []}
    for pair in data:
        for answer in (pair.chosen, pair.rejected):
            full = r.full(pair.prompt, answer)
            for layer, acts in enumerate(stream(model, full.ids)):
                if layer in norms:
                    norms[layer] += acts[full.response_start : full.response_end].norm(dim=-1).tolist()
    ways: list[tuple[Format, str]] = [("question_response", "last"), ("response_as_user", "last")]
    for format, position in ways:
        found = capture(model, tokenizer, data, positions=[position], format=format, layers=[0, -1])
        assert found.norms == pytest.approx({layer: sum(v) / len(v) for layer, v in norms.items()}, rel=1e-5)
        assert found.norm_tokens == len(norms[0])
        assert found.lengths.tolist() == [[3, 4], [4, 6], [5, 8]]


def test_blocks_above_the_highest_layer_and_the_head_never_run(tokenizer: PreTrainedTokenizerFast) -> None:
    model, runs = pico.model(), []
    watched = [*blocks(model), model.get_output_embeddings()]
    for i, part in enumerate(watched):
        part.register_forward_hook(lambda *_, i=i: runs.append(i))
    capture(model, tokenizer, pairs(), positions=["last"], format="question_response", layers=[0, 1])
    assert set(runs) == {0, 1}


@pytest.mark.parametrize("share", [False, True])
def test_batch_that_does_not_fit_is_halved_until_it_does(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    whole = capture(model, tokenizer, pairs(5), positions=QUESTION, format="question_response", share=False)
    sizes: list[int] = []
    run_to = Adapter.run_to

    def small(self: Adapter, layer: int, **inputs: Tensor) -> None:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("no")
        run_to(self, layer, **inputs)

    monkeypatch.setattr(Adapter, "run_to", small)
    halved = capture(model, tokenizer, pairs(5), positions=QUESTION, format="question_response", share=share)
    assert max(sizes) > 3
    assert min(sizes) <= 3
    torch.testing.assert_close(halved.chosen, whole.chosen, atol=2e-5, rtol=1e-4)
    assert halved.norms == pytest.approx(whole.norms)

    monkeypatch.setattr(Adapter, "run_to", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        capture(model, tokenizer, pairs(5), positions=QUESTION, format="question_response", share=share)


@pytest.mark.parametrize("share", [False, True])
def test_no_batch_exceeds_the_token_budget(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    shapes: list[tuple[int, ...]] = []
    run_to = Adapter.run_to

    def watched(self: Adapter, layer: int, **inputs: Tensor) -> None:
        shapes.append(tuple(inputs["attention_mask"].shape))  # as wide as the cache and the new tokens together
        run_to(self, layer, **inputs)

    monkeypatch.setattr(Adapter, "run_to", watched)
    monkeypatch.setattr(Runner, "can_share", lambda own, groups: True)
    capture(model, tokenizer, pairs(8), positions=["last"], format="question_response", token_budget=150, share=share)
    assert sum(rows for rows, _ in shapes) == (24 if share else 16)
    assert all(rows * width <= 150 for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 2


def test_dropout_is_off_and_the_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    calm = capture(model, tokenizer, pairs(), positions=["last"], format="question_response")
    model.train()
    blocks(model)[0].eval()
    modes = [part.training for part in model.modules()]
    trained = capture(model, tokenizer, pairs(), positions=["last"], format="question_response")
    assert torch.equal(calm.chosen, trained.chosen)
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_read_as_it_is_and_kept_in_float32(tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.model(dtype=torch.bfloat16)
    found = capture(
        model, tokenizer, pairs(1), positions=["last"], format="question_response", layers=[0], token_budget=1
    )
    full = Renderer(tokenizer).full(pairs(1)[0].prompt, pairs(1)[0].chosen)
    assert found.chosen.dtype == torch.float32
    assert torch.equal(found.chosen[0, 0], stream(model, full.ids)[0][full.response_end - 1].float())


@pytest.mark.quick
def test_demonstrated_asks_another_question_and_the_same_one_of_both_answers() -> None:
    questions = ["a", "a", "b", "a"]
    data = Pairs(Pair((Message("user", q),), "x", f"y{i}") for i, q in enumerate(questions))
    assert _other_questions(data) == ["b", "b", "a", "b"]
    with pytest.raises(PairsError, match="these pairs ask only one"):
        _other_questions(data[:2])


@pytest.mark.quick
def test_positions_without_an_index_stand_for_all_their_tokens() -> None:
    r = Renderer(pico.tokenizer())
    assert expand_positions(r, ["post_instruction"], "response_as_user") == tuple(
        f"post_instruction[-{k}]" for k in (4, 3, 2, 1)
    )
    assert expand_positions(r, ["last", "response_end", "last"], "question_response") == (
        "last",
        "response_end[-2]",
        "response_end[-1]",
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("positions", "format", "error", "message"),
    [
        (["post_instruction"], "question_response", OptionError, "come before the answer"),
        (["response_end[-1]"], "response_as_user", OptionError, "Use format='question_response'"),
        (["last[-1]"], "question_response", OptionError, "takes no index"),
        (["post_instruction[-5]"], "response_as_user", UnknownName, r"Known: post_instruction\[-1\]"),
        (["post_instruction[0]"], "response_as_user", UnknownName, r"Known: post_instruction\[-1\]"),
        (["lost"], "question_response", UnknownName, "Did you mean 'last'"),
        ([], "question_response", OptionError, "no positions"),
        (["last"], "question", UnknownName, "Unknown format 'question'"),
    ],
)
def test_position_that_does_not_exist_says_what_does(
    positions: list[str], format: Format, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        expand_positions(Renderer(pico.tokenizer()), positions, format)


@pytest.mark.quick
def test_templateless_tokenizer_has_no_closing_tokens_to_read() -> None:
    r = Renderer(pico.tokenizer(chat=False))
    with pytest.raises(OptionError, match="Use position 'last'"):
        expand_positions(r, ["response_end"], "question_response")
    with pytest.raises(OptionError, match="tokens are those of a chat template, and this tokenizer has none"):
        expand_positions(r, ["post_instruction"], "response_as_user")


def test_input_that_cannot_be_read_is_an_error_before_anything_runs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def run(data: Pairs, layers: list[int] | None = None, budget: int = 99) -> Evidence:
        return capture(
            model, tokenizer, data, positions=["last"], format="question_response", layers=layers, token_budget=budget
        )

    with pytest.raises(PairsError, match="no pairs"):
        run(Pairs())
    with pytest.raises(OptionError, match="no layers"):
        run(pairs(), [])
    with pytest.raises(AdapterError, match="no layer 3"):
        run(pairs(), [3])
    with pytest.raises(OptionError, match="token_budget is a whole number, 1 or more; got 0"):
        run(pairs(), budget=0)
    long = Pair((Message("user", "q"),), "a" * 300, "b")
    with pytest.raises(PairsError, match=r"Pair 4 is \d+ tokens long.*holds 256"):
        run(pairs() + Pairs([long]))


def test_layers_count_from_the_end_and_come_in_order(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = capture(model, tokenizer, pairs(), positions=["last"], format="question_response", layers=[-1, 0, 2])
    assert found.sites == (Site(0, "last"), Site(2, "last"))
    assert sorted(found.norms) == [0, 2]
    assert found.format == "question_response"


def test_a_model_that_puts_tokens_of_its_own_before_the_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AdapterError, match=r"The blocks hold 6 rows of \d+ tokens where the texts have 6 of 23"):
        capture(pico.model("cpmant"), tokenizer, pairs(), positions=["last"], format="question_response")


# Prompts that are run once


@pytest.mark.parametrize("name", [*pico.ARCHITECTURES, *pico.VISION])
def test_prompts_that_are_run_once_leave_the_same_evidence(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico.vision_language_model(name) if name in pico.VISION else pico.model(name)
    texts = render_pairs(Renderer(tokenizer), pairs(4), QUESTION[1:], "question_response")
    shares = Runner(Adapter(model), Renderer(tokenizer), [0], "right").can_share(group(texts))
    assert shares is (name not in STATES)
    options: dict[str, Any] = {"positions": QUESTION, "format": "question_response"}
    whole = capture(model, tokenizer, pairs(4), **options, share=False, token_budget=1)
    for budget in (40, 200, 8192):
        found = capture(model, tokenizer, pairs(4), **options, token_budget=budget)
        torch.testing.assert_close(found.chosen, whole.chosen, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(found.rejected, whole.rejected, atol=5e-5, rtol=1e-4)
        assert found.norms == pytest.approx(whole.norms, rel=1e-5)


STATES = (*pico.PURE_STATES, "jamba", "falcon_h1", "qwen3_next")
"""Architectures whose cache is not of keys and values alone."""


def test_a_prompt_of_many_answers_is_run_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, tokens = (Message("user", "what is the capital of this place?"),), list[int]()
    data = Pairs(Pair(asked, f"yes{i}", f"no{i}") for i in range(9))
    run_to = Adapter.run_to

    def counted(self: Adapter, layer: int, **inputs: Tensor) -> None:
        tokens.append(inputs["input_ids"].numel())
        run_to(self, layer, **inputs)

    monkeypatch.setattr(Adapter, "run_to", counted)
    counts = []
    for share in (False, True):
        capture(model, tokenizer, data, positions=["last"], format="question_response", share=share)
        counts.append(sum(tokens))
        tokens.clear()
    prompt = len(Renderer(tokenizer).prompt_ids(asked))
    trial = 2 * counts[0] // 18  # two short groups, run both ways, cost less than two texts
    assert counts[0] - 17 * prompt <= counts[1] <= counts[0] - 17 * prompt + trial


def test_batches_leave_nothing_to_the_garbage_collector(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Tensors that wait for it leave holes between those of the next batches, which then need new memory."""
    data = Pairs(Pair((Message("user", f"what is the capital of place number {i}?"),), "yes", "no") for i in range(12))
    left: list[int] = []
    gc.collect()
    gc.disable()
    try:
        for budget in (8192, 8192, 64):
            found = capture(model, tokenizer, data, positions=["last"], format="question_response", token_budget=budget)
            assert found.shared
            left.append(gc.collect())
    finally:
        gc.enable()
    assert left[2] <= left[1]


def test_a_model_that_reads_otherwise_behind_a_cache_runs_every_text_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico.model()
    options: dict[str, Any] = {"positions": ["last"], "format": "question_response"}
    whole = capture(model, tokenizer, pairs(), **options, share=False)
    right = running.shared_rows
    monkeypatch.setattr(running, "shared_rows", lambda cache, rows: right(cache, rows.flip(0)))
    assert torch.equal(capture(model, tokenizer, pairs(), **options).chosen, whole.chosen)
    monkeypatch.setattr(running, "shared_rows", lambda cache, rows: rows)
    assert torch.equal(capture(model, tokenizer, pairs(), **options).chosen, whole.chosen)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_length_of_a_call_are_run_whole(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 80}
    model = pico.model("phi3" if kind == "longrope" else "llama", rope_parameters=rope)
    asked = (Message("user", "q" * 55),)
    data = Pairs(Pair(asked, "yes" * (i + 4), "no" * (i + 8)) for i in range(3))
    options: dict[str, Any] = {"positions": ["last"], "format": "question_response", "token_budget": 1}
    whole = capture(model, tokenizer, data, **options, share=False)
    found = capture(model, tokenizer, data, **options)
    assert not found.shared
    assert torch.equal(found.chosen, whole.chosen)


def test_a_text_that_fits_whole_is_read_where_nothing_fits_behind_a_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"positions": ["last"], "format": "question_response"}
    whole = capture(model, tokenizer, pairs(3), **options, share=False, token_budget=1)
    monkeypatch.setattr(Runner, "can_share", lambda own, groups: True)
    run_to = Adapter.run_to

    def narrow(self: Adapter, layer: int, **inputs: Any) -> None:
        if inputs.get("use_cache"):
            raise torch.OutOfMemoryError("no")
        run_to(self, layer, **inputs)

    monkeypatch.setattr(Adapter, "run_to", narrow)
    found = capture(model, tokenizer, pairs(3), **options)
    torch.testing.assert_close(found.chosen, whole.chosen, atol=2e-5, rtol=1e-4)


@pytest.mark.quick
def test_texts_are_grouped_by_what_they_begin_with_where_that_saves_something() -> None:
    r = Renderer(pico.tokenizer())
    long = Pairs(Pair((Message("user", "q" * 30),), answer, "no") for answer in ("yes", "aye", "sure"))
    texts = render_pairs(r, long, ["last"], "question_response")
    (together,) = group(texts)
    assert together.head == len(r.prompt_ids(long[0].prompt))
    assert len(together.texts) == 6
    sizes = [len(batch[0].texts) for batch in make_batches([together], 12)]
    assert sizes == [2, 2, 2]  # of tails of five or six tokens
    short = Pairs(Pair((Message("user", "q"),), "yes" * 60, "no" * 60) for _ in range(3))
    assert {g.head for g in group(render_pairs(r, short, ["last"], "question_response"))} == {0}


@pytest.mark.quick
def test_accelerators_share_where_that_saves_more_than_the_calls_cost() -> None:
    r = Renderer(pico.tokenizer())

    def worth(pairs: int, prompt: int, budget: int, answer: int = 3) -> bool:
        asked = ((Message("user", f"{n:04}" + "q" * (prompt - 8)),) for n in range(pairs))
        found = Pairs(Pair(prompt, "y" * answer, "n" * answer) for prompt in asked)
        return worth_calls(group(render_pairs(r, found, ["last"], "question_response")), budget)

    assert worth(150, 60, 2**16)  # saves 9,000 tokens, and takes a call for prompts and three to try it out
    assert not worth(50, 60, 2**16)  # 3,000
    assert not worth(150, 60, 2**13)  # five batches of prompts, and as many of answers
    assert not worth(150, 60, 2**16, answer=600)  # three batches, since answers fill them
    assert not worth_calls([], 8192)


def test_an_accelerator_reads_whole_what_is_not_worth_sharing(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = Pairs(Pair((Message("user", "q" * 30 + str(n)),), "yes", "no") for n in range(6))
    options: dict[str, Any] = {"positions": ["last"], "format": "question_response"}
    assert capture(model, tokenizer, long, **options).shared
    monkeypatch.setattr(Adapter, "input_device", torch.device("meta"))  # any that is no processor
    monkeypatch.setattr(Runner, "_on_device", lambda _, inputs: inputs)
    assert not capture(model, tokenizer, long, **options).shared


@pytest.mark.quick
def test_a_head_ends_where_reading_begins() -> None:
    r = Renderer(pico.tokenizer())
    data = Pairs([Pair((Message("user", "q"),), "same start, one end", "same start, other end")])
    texts = render_pairs(r, data + pairs(1), ["last", "demonstrated"], "question_response")[:4]
    prompt, common = len(r.prompt_ids(data[0].prompt)), len("same start, o")
    assert [text.head for text in texts] == [prompt, prompt, prompt + common, prompt + common]


# Memory


def assert_rows(found: Tensor, expected: Tensor) -> None:
    """Compare rows `[N, S, D]` that may come in any order."""
    nearest = torch.cdist(found.flatten(1), expected.flatten(1)).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(expected)))
    torch.testing.assert_close(found, expected[nearest], atol=1e-12, rtol=1e-12)


def test_few_pairs_are_kept_and_the_means_are_of_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    options: dict[str, Any] = {"positions": QUESTION, "format": "question_response", "token_budget": 300}
    whole = capture(model, tokenizer, pairs(9), **options)
    assert whole.kept.tolist() == list(range(9))
    few = capture(model, tokenizer, pairs(9), **options, keep=4)
    assert few.kept.tolist() == [0, 2, 4, 6]
    assert torch.equal(few.chosen, whole.chosen[few.kept])
    assert torch.equal(few.rejected, whole.rejected[few.kept])
    both = torch.stack([whole.chosen, whole.rejected]).double()
    for found in (whole, few):
        torch.testing.assert_close(found.means, both.mean(dim=1), atol=1e-12, rtol=1e-12)
        assert found.parts.shape[1] == 9  # each pair is a part where there are so few
        assert_rows(found.parts[0], both[0])
    many = capture(model, tokenizer, pairs(35), positions=["last"], format="question_response", keep=1)
    assert many.parts.shape[1] == PARTS
    torch.testing.assert_close(many.parts.sum(1) * 2, many.means * 35, atol=1.0, rtol=0.2)  # of two pairs, or of three
    assert few.lengths.shape == (9, 2)
    assert few.norms == whole.norms
    with pytest.raises(OptionError, match="keep is a whole number, 1 or more; got 0"):
        capture(model, tokenizer, pairs(9), **options, keep=0)


@pytest.mark.parametrize("count", [1, 5, 16, 35])
def test_parts_are_means_of_equally_many_pairs(count: int) -> None:
    seeded = torch.Generator().manual_seed(count)
    acts = torch.randn(2, count, 3, 2, 4, generator=seeded)  # sides, pairs, layers, positions, width
    gathered = Gathered(torch.arange(count), count, 3, 2, 4)
    reads = {p: slice(p, p + 1) for p in range(2)}
    texts = [Text(side, n, array("i", [1, 2]), reads) for n in range(count) for side in (0, 1)]
    silent = Text(0, 0, array("i", [1, 2]), {})  # its norms count, and nothing else
    for batch in (texts[:1], [silent], [silent, *texts[1:]]):
        own = [acts[t.side, t.pair, :, p] for t in batch for p in t.reads]
        gathered.add(batch, Read(torch.stack(own) if own else torch.empty(0, 3, 4), torch.ones(len(batch), 3)))
    part = torch.randperm(count, generator=torch.Generator().manual_seed(0)).argsort() % PARTS
    assert gathered.parts().shape == (2, min(PARTS, count), 3, 2, 4)
    assert part.bincount().max() - part.bincount().min() <= 1
    for i in range(min(PARTS, count)):
        torch.testing.assert_close(gathered.parts()[:, i], acts.double()[:, part == i].mean(1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gathered.means(), acts.double().mean(1), atol=1e-12, rtol=1e-12)
    assert torch.equal(gathered.store, acts)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["left", "right"])
def test_accelerator_reads_what_the_processor_reads(padding: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    models = [pico.model(), pico.model().to("cuda")]  # pyright: ignore[reportArgumentType]
    found = [
        capture(model, tokenizer, pairs(5), positions=QUESTION, format="question_response", padding=padding)
        for model in models
    ]
    assert found[1].chosen.device.type == "cpu"
    torch.testing.assert_close(found[1].chosen, found[0].chosen, atol=1e-3, rtol=1e-3)
    assert found[1].norms == pytest.approx(found[0].norms, rel=1e-3)
