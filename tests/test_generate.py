"""Generation with knobs: order, rows, sampling, streaming, and what counts as the answer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pico import END, SPECIAL, knob, model, tokenizer
from trimtab.artifact import Knob, Rack
from trimtab.artifact.identity import model_identity
from trimtab.errors import KnobError, OptionError, RenderError, TrimtabWarning, UnknownName
from trimtab.evals.likelihood import pair_margins
from trimtab.generate import generate
from trimtab.pairs import Pairs
from trimtab.prompts import read_prompt
from trimtab.render import Renderer
from trimtab.runtime import steer
from trimtab.seeds import seeded
from trimtab.types import THOUGHTS, WHERE, Message, Where

TEXTS = ["Hi", "What is a trim tab?", "One two three", "A"]


def by_hand(lm: PreTrainedModel, text: str, dose: Mapping[Knob, float], steps: int = 8) -> str:
    """The greedy answer to one prompt, by transformers alone under `steer`."""
    words = tokenizer()
    ids = torch.tensor([Renderer(words).prompt_ids([Message("user", text)])])
    with steer(lm, dose):
        out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def always_say(lm: PreTrainedModel, token: int | None) -> None:
    """Make the model predict one token, or (None) nearly every token alike."""
    head = torch.nn.Linear(lm.config.hidden_size, lm.config.vocab_size)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(-1e-4 * torch.arange(lm.config.vocab_size))
        if token is not None:
            head.bias[token] = 1.0
    lm.set_output_embeddings(head)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_equal_one_at_a_time_runs_in_the_order_of_the_prompts(name: str, batch_size: int) -> None:
    lm, one, two = model(name), knob(0), knob(1, name="two", where="completion")
    doses: list[dict[Knob, float]] = [{one: 1.0}, {}, {one: -0.5, two: 1.0}, {two: 2.0}]
    out = generate(lm, tokenizer(), TEXTS, knobs=doses, max_new_tokens=8, batch_size=batch_size)
    assert [generation.prompt for generation in out] == [(Message("user", text),) for text in TEXTS]
    assert [generation.text for generation in out] == [
        by_hand(lm, text, dose) for text, dose in zip(TEXTS, doses, strict=True)
    ]
    assert len({generation.text for generation in out}) == 4
    assert [generation.knobs for generation in out] == [{"pico": 1.0}, {}, {"pico": -0.5, "two": 1.0}, {"two": 2.0}]


def test_prompts_of_similar_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, words, widths = model(), tokenizer(), list[int]()
    original = type(lm).generate

    def spy(view: PreTrainedModel, *, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        widths.append(input_ids.shape[1])
        return original(view, input_ids=input_ids, **inputs)

    monkeypatch.setattr(type(lm), "generate", spy)
    texts = ["a" * length for length in (20, 2, 21, 1)]
    generate(lm, words, texts, max_new_tokens=1, batch_size=2)
    shortest = len(Renderer(words).prompt_ids([Message("user", "")]))
    assert widths == [shortest + 21, shortest + 2]


def test_settings_by_name_by_knob_and_for_all_prompts_agree() -> None:
    lm, words, one, two = model(), tokenizer(), knob(0), knob(1, name="two")
    rack = Rack(math=one, concise=two)
    named = generate(lm, words, TEXTS, rack=rack, knobs={"math": 1.0, "concise": -0.5}, max_new_tokens=6)
    direct = generate(lm, words, TEXTS, knobs={one: 1.0, two: -0.5}, max_new_tokens=6)
    rows = generate(lm, words, TEXTS, rack=rack, knobs=[{"math": 1, "concise": -0.5}] * 4, max_new_tokens=6)
    told = generate(lm, words, TEXTS, rack=rack, knobs="math=1,concise=-0.5", max_new_tokens=6)
    assert told == named
    assert [g.text for g in named] == [g.text for g in direct] == [g.text for g in rows]
    assert named[0].knobs == {"math": 1.0, "concise": -0.5} == rows[0].knobs
    assert direct[0].knobs == {"pico": 1.0, "two": -0.5}
    plain = generate(lm, words, TEXTS, rack=rack, max_new_tokens=6)
    assert all(g.knobs == {} for g in plain)
    assert [g.text for g in plain] != [g.text for g in named]
    assert [g.text for g in plain] == [g.text for g in generate(lm, words, TEXTS, knobs={}, max_new_tokens=6)]


def thinker(*tokens: str) -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": list(tokens)})
    return words


def test_thoughts_and_answer_can_be_steered_apart() -> None:
    words = thinker("<think>", "</think>")
    lm, turned = model(vocab_size=len(words)), knob(0, norm=8.0)

    def said(where: Where, prompt: list[Message]) -> str:
        return generate(lm, words, [prompt], knobs={turned: 1.0}, where=where, max_new_tokens=8)[0].text

    plain = generate(lm, words, ["Hi"], max_new_tokens=8)[0].text
    asked = [Message("user", "Hi")]
    # nothing opens a thought, so that the whole completion is the answer
    assert said("thinking", asked) == plain
    assert said("answer", asked) == said("completion", asked) != plain
    opened = [Message("user", "Hi <think>")]
    assert said("thinking", opened) == said("completion", opened) != said("answer", opened)
    closed = [Message("user", "Hi <think>hm</think>")]
    assert said("answer", closed) == said("completion", closed) != said("thinking", closed)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 has an embedding per position, and none beyond
def test_answers_end_with_the_context_whoever_shares_the_batch(name: str) -> None:
    lm, words = model(name, seed=1, max_position_embeddings=32), tokenizer()
    prompts = ["a" * 15, "b" * 15, "c" * 12, "d"]
    with pytest.warns(TrimtabWarning, match="context holds 32 tokens, and prompt 1 has .* may be shorter than max_new"):
        together = generate(lm, words, prompts, max_new_tokens=12)
    alone = []
    for prompt in prompts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)
            alone += generate(lm, words, [prompt], max_new_tokens=12)
    assert [a.text for a in together] == [a.text for a in alone]
    rendered = [len(Renderer(words).prompt_ids(read_prompt(prompt))) for prompt in prompts]
    assert [a.tokens for a in together] == [min(12, 32 - n) for n in rendered]
    assert not any(a.finished for a in together)


def test_probabilities_that_are_not_finite_are_a_mistake_to_mend() -> None:
    lm = model()
    torch.nn.init.constant_(cast(torch.nn.Linear, lm.lm_head).weight, float("nan"))
    with pytest.raises(OptionError, match="probabilities are not finite numbers"):
        generate(lm, tokenizer(), ["Hi"], temperature=1.0)
    with pytest.raises(OptionError, match=r"0 \(greedy\), or 1e-06 or more; got 1e-39"):
        generate(model(), tokenizer(), ["Hi"], temperature=1e-39)


def test_thinking_markers_of_a_tokenizer_are_found_or_asked_for() -> None:
    turned = knob(0)
    with pytest.raises(OptionError, match="none of the known tokens that open and close thoughts"):
        generate(model(), tokenizer(), ["Hi"], knobs={turned: 1.0}, where="thinking")
    with pytest.raises(RenderError, match=r"begin and end with added tokens of the tokenizer; got \('<a>', '</a>'\)"):
        generate(model(), tokenizer(), ["Hi"], knobs={turned: 1.0}, where="answer", thinking=("<a>", "</a>"))
    words = thinker("<a>", "</a>", "<|channel|>", "<|message|>")
    lm = model(vocab_size=len(words))
    for markers in (("<a>", "</a>"), None):  # None: those of GPT-OSS, several tokens each
        closing = markers[1] if markers else "<|channel|>final<|message|>"
        opening = markers[0] if markers else "<|channel|>analysis<|message|>"
        texts = {
            prompt: generate(
                lm, words, [prompt], knobs={turned: 1.0}, where="thinking", thinking=markers, max_new_tokens=8
            )[0].text
            == generate(lm, words, [prompt], max_new_tokens=8)[0].text
            for prompt in (f"Hi {opening}", f"Hi {opening}hm{closing}", "Hi")
        }
        assert list(texts.values()) == [False, True, True]


def test_where_of_the_call_replaces_that_of_the_knobs() -> None:
    lm, words, turned = model(), tokenizer(), knob(0)
    texts = set[str]()
    scopes = [where for where in WHERE if where not in THOUGHTS]
    for where in scopes:
        own = generate(lm, words, ["Hello there"], knobs={turned.with_(where=where): 1.0}, max_new_tokens=8)
        call = generate(lm, words, ["Hello there"], knobs={turned: 1.0}, where=where, max_new_tokens=8)
        assert own == call
        texts.add(own[0].text)
    assert len(texts) == len(scopes)
    assert turned.where == "all"


def test_prompts_are_strings_messages_or_mappings() -> None:
    lm, words = model(), tokenizer()
    turns = [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Yes?"),
        Message("user", "Bye"),
    ]
    as_dicts = [{"role": turn.role, "content": turn.content} for turn in turns]
    out = generate(lm, words, ["Bye", turns, as_dicts, [Message("user", "Bye")]], max_new_tokens=4)
    assert out[1].prompt == out[2].prompt == tuple(turns)
    assert out[1].text == out[2].text
    assert out[0] == out[3]
    assert generate(lm, words, []) == []


def test_tokenizers_without_a_template_complete_the_text() -> None:
    lm, words = model(), tokenizer(chat=False)
    out = generate(lm, words, ["Once upon a time"], max_new_tokens=5)
    ids = torch.tensor([words.encode("Once upon a time")])
    expected = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert out[0].text == words.decode(expected[0, ids.shape[1] :])


def test_an_answer_ends_at_the_first_token_that_ends_a_turn() -> None:
    lm, words = model(), tokenizer()
    whole = generate(lm, words, TEXTS, max_new_tokens=12)
    assert not any(g.finished for g in whole)
    assert {g.tokens for g in whole} == {12}
    ids = torch.tensor([Renderer(words).prompt_ids([Message("user", TEXTS[1])])])
    out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = out[0, ids.shape[1] :].tolist()
    stop = answer[5]
    lm.generation_config.eos_token_id = [stop, END]
    cut = generate(lm, words, TEXTS, max_new_tokens=12)
    assert cut[1].finished
    assert cut[1].tokens == answer.index(stop)
    assert cut[1].text == words.decode(answer[: answer.index(stop)])
    for before, after in zip(whole, cut, strict=True):
        assert before.text.startswith(after.text)
        assert after.finished == (after.tokens < 12)
    lm.generation_config.eos_token_id = stop
    assert generate(lm, words, TEXTS, max_new_tokens=12) == cut


def test_an_answer_that_ends_at_once_is_empty_and_finished() -> None:
    lm, words = model(), tokenizer()
    lm.generation_config.eos_token_id = list(range(lm.config.vocab_size))
    out = generate(lm, words, TEXTS)
    assert all((g.text, g.tokens, g.finished) == ("", 0, True) for g in out)


@pytest.mark.parametrize("said_by", ["tokenizer", "model"])
def test_tokenizer_and_model_may_both_say_what_ends_a_turn(said_by: str) -> None:
    lm, words = model(), tokenizer()
    end = END if said_by == "tokenizer" else words.convert_tokens_to_ids("!")
    lm.generation_config.eos_token_id = None if said_by == "tokenizer" else end
    always_say(lm, end)
    out = generate(lm, words, ["Hi"])[0]
    assert (out.text, out.tokens, out.finished) == ("", 0, True)


def test_special_tokens_stay_out_of_the_text() -> None:
    lm, words = model(), tokenizer()
    always_say(lm, words.convert_tokens_to_ids("<|user|>"))
    out = generate(lm, words, ["Hi"], max_new_tokens=3)
    assert (out[0].text, out[0].tokens, out[0].finished) == ("", 3, False)


def test_sampled_generation_with_the_same_seed_is_repeatable() -> None:
    lm, words, turned = model(), tokenizer(), knob(1)
    state = torch.get_rng_state()

    def sample(seed: int, **options: Any) -> list[str]:
        out = generate(lm, words, TEXTS, knobs={turned: 1.0}, max_new_tokens=8, seed=seed, **options)
        return [g.text for g in out]

    assert sample(1, temperature=1.0) == sample(1, temperature=1.0)
    assert sample(1, temperature=1.0) != sample(2, temperature=1.0)
    assert sample(1, temperature=0.0) == sample(2, temperature=0.0)
    assert sample(1, temperature=1.0, top_p=1e-6) == sample(2, temperature=0.0)
    assert sample(3, temperature=1e-4) == sample(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_is_the_distribution_of_the_model_and_of_nothing_else() -> None:
    lm, words = model(), tokenizer()
    always_say(lm, None)
    lm.generation_config.update(top_k=1, repetition_penalty=50.0, temperature=0.01, do_sample=True)
    out = generate(lm, words, ["Hi"] * 8, max_new_tokens=64, temperature=1.0)
    assert len({letter for g in out for letter in g.text}) > 60  # top_k=50, the habit of transformers, allows 50


@pytest.mark.parametrize("own", [{}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 30, "min_p": 0.1}])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_warns_about_nothing(
    own: dict[str, Any], temperature: float, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    lm, words = model(), tokenizer()
    lm.generation_config.update(**own, do_sample=bool(own))
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        generate(lm, words, TEXTS, max_new_tokens=4, temperature=temperature)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_the_preferences_of_the_model_do_not_touch_greedy_decoding() -> None:
    lm, words = model(), tokenizer()
    plain = generate(lm, words, TEXTS, max_new_tokens=8)
    own = {"do_sample": True, "num_beams": 2, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "max_length": 5}
    lm.generation_config.update(**own, temperature=2.0, top_k=3, max_new_tokens=2)
    before = lm.generation_config.to_dict()
    assert generate(lm, words, TEXTS, max_new_tokens=8) == plain
    assert lm.generation_config.to_dict() == before


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_answer(temperature: float) -> None:
    lm, words, pieces = model(), tokenizer(), list[str]()
    options: dict[str, Any] = {"knobs": {knob(1): 1.0}, "max_new_tokens": 24, "temperature": temperature, "seed": 3}
    streamed = generate(lm, words, ["Hello"], on_text=pieces.append, **options)
    assert streamed == generate(lm, words, ["Hello"], **options)
    assert "".join(pieces) == streamed[0].text
    assert len(pieces) > 3
    assert all(pieces)


def scripted(ids: list[int]) -> Any:
    """A stand-in for the model's own `generate` that says `ids`."""

    def say(view: object, *, input_ids: torch.Tensor, streamer: Any, **inputs: Any) -> torch.Tensor:
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], 1)

    return say


def test_words_keep_their_spaces_when_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, words, pieces = model(), tokenizer(chat=False), list[str]()
    spaced = ["\u2581one", "\u2581two", "s", "\u2581three"]  # decoders of this kind drop the first space of a text
    words.backend_tokenizer.model = models.WordLevel({token: n for n, token in enumerate([*SPECIAL, *spaced])}, "<pad>")
    words.backend_tokenizer.decoder = decoders.Metaspace()
    monkeypatch.setattr(type(lm), "generate", scripted([6, 7, 8, 9, END]))
    out = generate(lm, words, ["x"], on_text=pieces.append)
    assert out[0].text == "one twos three"
    assert pieces == ["one", " two", "s", " three"]


def test_characters_of_several_tokens_are_streamed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 🙂 ≠ \ufffd"
    lm, words, pieces = model(), tokenizer(units="bytes"), list[str]()
    ids = [*words.encode(text), END]
    monkeypatch.setattr(type(lm), "generate", scripted(ids))
    out = generate(lm, words, ["Hi"], on_text=pieces.append)
    assert out[0].text == "".join(pieces) == text
    assert pieces == [*"naïve 🙂 ≠ \ufffd"]
    assert (out[0].tokens, out[0].finished) == (len(ids) - 1, True)


def test_an_answer_cut_inside_a_character_is_streamed_to_its_end() -> None:
    lm, words, pieces = model(), tokenizer(units="bytes"), list[str]()
    always_say(lm, words.encode("🙂")[0])
    out = generate(lm, words, ["Hi"], on_text=pieces.append, max_new_tokens=3)
    assert out[0].text == "".join(pieces) == "\ufffd" * 3


def test_an_error_in_on_text_ends_the_generation_and_leaves_the_model_clean() -> None:
    lm, words, pieces = model(), tokenizer(), list[str]()
    plain = generate(lm, words, ["Hello"], max_new_tokens=8)

    def stop(piece: str) -> None:
        pieces.append(piece)
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        generate(lm, words, ["Hello"], knobs={knob(1): 1.0}, on_text=stop)
    assert len(pieces) == 1
    assert generate(lm, words, ["Hello"], max_new_tokens=8) == plain


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number, 1 or more; got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is a whole number, 1 or more; got 2.5"),
        ({"batch_size": 0}, "batch_size is a whole number, 1 or more; got 0"),
        ({"seed": 2**70}, "seed is a whole number from 0 to"),
        ({"seed": -1}, "seed is a whole number from 0 to"),
        ({"rack": {"math": knob()}}, "rack is a Rack of named knobs; got dict"),
        ({"knobs": 1.0}, "A setting is written .* got 1.0"),
        ({"knobs": "math"}, "A knob setting is written name=strength"),
        ({"temperature": -0.1}, "temperature is 0 .greedy. or more; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_p": 0.0}, "top_p is above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "got 1.1"),
        ({"knobs": {"math": 1.0}}, r"Knob 'math' is set by name, and there is no rack. Pass rack=Rack\(math=...\)"),
        ({"knobs": [{}]}, "Got a list of 1 knob settings for 2 prompts"),
        ({"knobs": {knob(): float("inf")}}, "strength of 'pico' must be finite"),
        ({"knobs": {"math": float("inf")}, "rack": Rack(math=knob())}, "strength of 'math' must be finite"),
        ({"on_text": print}, "on_text streams one prompt; got 2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(model(), tokenizer(), ["a", "b"], **options)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"Unknown knob 'maths'\. Known: math\. Did you mean 'math'"):
        generate(model(), tokenizer(), ["a"], rack=Rack(math=knob()), knobs={"maths": 1.0})
    with pytest.raises(UnknownName, match=r"Unknown where 'everywhere'\. Known: all, answer, completion, "):
        generate(model(), tokenizer(), ["a"], where=cast(Any, "everywhere"))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hello", r"Prompts come as a list; got 'Hello'. Pass \[prompt\]"),
        (5, "Prompts come as a list; got 5"),
        ([[{"role": "wizard", "content": "x"}]], "Role 'wizard' is not one of system, user, assistant"),
        (["\ud83d"], "half of a surrogate pair"),
        ([Message("user", "Hi")], "A prompt is a string, or a list of messages; got Message"),
        ([[]], r"A prompt is a string, or a list of messages; got \[\]"),
        ([[{"role": "user"}]], "A message has a role and a content, both text; got {'role': 'user'}"),
        ([["Hi"]], "got 'Hi'"),
    ],
)
def test_prompts_of_another_shape_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(model(), tokenizer(), prompts)


def test_a_knob_from_another_template_or_architecture_is_refused_unless_told_otherwise() -> None:
    lm, words = model(), tokenizer()
    learned = model_identity(lm, words)
    own = knob(0).with_(provenance=learned)
    other = knob(0).with_(provenance={**learned, "template_hash": "0" * 64})
    foreign = knob(0).with_(provenance={**learned, "architecture": "mamba"})
    assert generate(lm, words, ["Hi"], knobs={own: 1.0}, max_new_tokens=2)
    for stranger, what in ((other, "another chat template"), (foreign, "another architecture")):
        with pytest.raises(KnobError, match=what):
            generate(lm, words, ["Hi"], knobs={stranger: 1.0}, max_new_tokens=2)
        with pytest.warns(TrimtabWarning, match=what):
            generate(lm, words, ["Hi"], knobs={stranger: 1.0}, max_new_tokens=2, strict=False)
        generate(lm, words, ["Hi"], knobs={stranger: 1.0}, max_new_tokens=2, strict=None)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    lm, words = model(), tokenizer()
    limit = lm.config.max_position_embeddings
    with pytest.raises(OptionError, match=f"Prompt 2 is .* this model's context holds {limit}"):
        generate(lm, words, ["Hi", "x" * (4 * limit)], max_new_tokens=2)


def test_dropout_is_off_while_a_model_in_training_is_asked_and_on_again_afterwards() -> None:
    lm, words = model("gpt2"), tokenizer()
    pairs = Pairs.from_records([{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(3)])
    texts = [made.text for made in generate(lm, words, ["hello", "there"], max_new_tokens=12)]
    margins = pair_margins(lm, words, pairs, [{}])[0].margin
    lm.train()
    assert [made.text for made in generate(lm, words, ["hello", "there"], max_new_tokens=12)] == texts
    assert np.allclose(pair_margins(lm, words, pairs, [{}])[0].margin, margins)
    assert all(module.training for module in lm.modules())


def test_a_seed_touches_the_random_numbers_of_the_models_device_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded_all: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_all.append)
    lm, words = model(), tokenizer()
    before = torch.random.get_rng_state()
    generate(lm, words, ["hello"], temperature=1.0, seed=3, max_new_tokens=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seeded_all == []
    done: list[object] = []
    device = SimpleNamespace(
        get_rng_state=lambda: "as it was",
        manual_seed=done.append,
        set_rng_state=done.append,
        device=device_context(done),
    )
    monkeypatch.setattr(torch, "cuda", device)
    with seeded(5, torch.device("cuda:1")):
        done.append(torch.initial_seed())
    assert done == ["cuda:1", 5, 5, "as it was"]
    assert torch.equal(torch.random.get_rng_state(), before)


def device_context(done: list[object]) -> Any:
    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        done.append(str(device))
        yield

    return enter
