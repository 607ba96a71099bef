"""Rendering: prompts are prefixes of answers, spans and positions are where they say, templates may refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import pico
from trimtab import render
from trimtab.errors import MissingDependency, OptionError, RenderError
from trimtab.render import Renderer
from trimtab.types import Message

pytestmark = pytest.mark.quick

# Trims contents, knows no system turn, and has one turn per bracket: like the templates of Llama 2 and Mistral.
BRACKETS = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}<|end|>{% endif %}{% endfor %}"
)
# Puts something before a finished answer that is not in the generation prompt: like Qwen 3.
THINKING = pico.TEMPLATE.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<t>\n{% endif %}{{ m['content'] }}"
)
# Leaves the system turn out without a word.
DROPPING = "<s>{% for m in messages if m['role'] != 'system' %}({{ m['content'] }}){% endfor %}>"
TEMPLATES = {"turns": pico.TEMPLATE, "brackets": BRACKETS, "thinking": THINKING, "none": None}
ANSWERS = ["Yes.", "a", "[/INST]", "two\nlines é 😀", "end"]


def asked(text: str = "Why?", system: str | None = None) -> list[Message]:
    return [*([Message("system", system)] if system else []), Message("user", text)]


def renderer(template: str | None = pico.TEMPLATE) -> Renderer:
    tokenizer = pico.tokenizer(chat=False, units="bytes")
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def merging(*merges: tuple[str, str], post: str | None = None) -> Renderer:
    """A tokenizer without a template whose word pieces merge, and which may add tokens around a text."""
    tokens = ["<s>", "</s>", *"abcdef ", *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    if post:
        core.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    return Renderer(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>"))


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_prompt_is_a_prefix_of_the_answered_prompt_and_the_span_is_the_answer(
    template: str | None, answer: str
) -> None:
    r = renderer(template)
    prompt, full = r.prompt_ids(asked()), r.full(asked(), answer)
    assert full.ids[: len(prompt)] == prompt
    assert full.response_start == len(prompt)
    shown = r.tokenizer.decode(full.ids[full.response_start : full.response_end])
    assert shown.strip() == answer
    closing = r.tokenizer.decode(full.ids[full.response_end :])
    assert closing == {None: "", BRACKETS: "<|end|>"}.get(template, "<|end|>\n")
    assert r.closing_count() == len(full.ids) - full.response_end
    assert r.response_length(asked(), answer) == full.response_end - full.response_start


@pytest.mark.parametrize("template", [pico.TEMPLATE, BRACKETS], ids=["turns", "brackets"])
def test_answered_prompt_is_what_the_template_makes_of_it(template: str) -> None:
    r = renderer(template)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes"}]
    assert r.tokenizer.decode(r.full(asked(), "Yes").ids) == r.tokenizer.apply_chat_template(turns, tokenize=False)


def test_answers_are_trimmed_only_where_the_template_trims() -> None:
    for template, shown in ((pico.TEMPLATE, " a \n"), (BRACKETS, " a"), (None, " a \n")):
        full = renderer(template).full(asked(), " a \n")
        assert renderer(template).tokenizer.decode(full.ids[full.response_start : full.response_end]) == shown


@pytest.mark.parametrize(
    ("template", "tail"),
    [(pico.TEMPLATE, "<|end|>\n<|assistant|>\n"), (BRACKETS, " [/INST]"), (DROPPING, ")>")],
    ids=["turns", "brackets", "short"],
)
def test_post_instruction_tokens_are_what_the_template_puts_after_the_user_slot(template: str, tail: str) -> None:
    r = renderer(template)
    expected = r.tokenizer.encode(tail, add_special_tokens=False)
    assert r.post_instruction_count() == len(expected) >= 2
    for answer in ANSWERS:
        rendered = r.as_user(answer)
        assert rendered.ids == r.prompt_ids(asked(answer))
        assert rendered.ids[rendered.response_end :] == expected
        assert r.tokenizer.decode(rendered.ids[rendered.response_start : rendered.response_end]) == answer


def test_demonstration_shows_the_answer_and_ends_where_the_next_one_starts() -> None:
    r = renderer()
    text = r.tokenizer.decode(r.demonstrated(asked("Why?", "Be kind."), "Because.", "How?"))
    assert text == (
        "<s><|system|>\nBe kind.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\nBecause.<|end|>\n"
        "<|user|>\nHow?<|end|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("template", [BRACKETS, DROPPING], ids=["raises", "drops"])
def test_system_turn_that_the_template_cannot_show_is_an_error_and_never_lost(template: str) -> None:
    r = renderer(template)
    assert r.prompt_ids(asked("Why?"))
    with pytest.raises(RenderError, match=r"system.*user's turn"):
        r.prompt_ids(asked("Why?", "Be kind."))


def test_without_a_template_texts_are_joined_and_bos_follows_the_tokenizer() -> None:
    assert renderer(None).tokenizer.decode(renderer(None).full(asked("ab"), " cd").ids) == "ab cd"
    with_bos = merging(("a", "b"), post="<s> $A")
    assert with_bos.tokenizer.convert_ids_to_tokens(with_bos.prompt_ids(asked("ab"))) == ["<s>", "ab"]
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert renderer(None).tokenizer.decode(renderer(None).prompt_ids(turns)) == "a\nb\nc"


def test_eos_that_the_tokenizer_adds_does_not_end_the_prompt() -> None:
    r = merging(("a", "b"), post="<s> $A </s>")
    assert r.tokenizer.convert_ids_to_tokens(r.full(asked("ab"), "cd").ids) == ["<s>", "ab", "c", "d"]


def test_prompt_stays_a_prefix_when_word_pieces_would_merge_over_the_seam() -> None:
    r = merging(("b", "c"), ("d", "e"))
    full = r.full(asked("ab"), "cde")
    assert r.tokenizer.convert_ids_to_tokens(full.ids) == ["a", "b", "c", "de"]
    assert (full.response_start, full.response_end) == (2, 4)
    free = r.full(asked("ab"), "de")
    assert r.tokenizer.convert_ids_to_tokens(free.ids) == ["a", "b", "de"]


@pytest.mark.parametrize("what", ["as_user", "demonstrated", "post_instruction_count"])
def test_reading_that_needs_a_template_says_what_works_without_one(what: str) -> None:
    r = renderer(None)
    calls = {
        "as_user": lambda: r.as_user("a"),
        "demonstrated": lambda: r.demonstrated(asked(), "a", "b"),
        "post_instruction_count": r.post_instruction_count,
    }
    with pytest.raises(RenderError, match="Use format='question_response'"):
        calls[what]()
    assert r.closing_count() == 0
    assert not r.has_template


def test_texts_without_tokens_are_errors() -> None:
    r = renderer(None)
    with pytest.raises(RenderError, match="no message"):
        r.prompt_ids([])
    with pytest.raises(RenderError, match="prompt has no tokens"):
        r.prompt_ids(asked(""))
    with pytest.raises(RenderError, match="response '' has no tokens"):
        r.full(asked(), "")
    with pytest.raises(RenderError, match="response ' ' has no tokens"):
        renderer(BRACKETS).as_user(" ")


def test_template_without_the_answer_is_an_error() -> None:
    silent = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RenderError, match="does not show the assistant's answer"):
        renderer(silent).full(asked(), "a")


def test_hashes_tell_templates_and_vocabularies_apart() -> None:
    assert renderer(None).template_hash() is None
    assert renderer(BRACKETS).template_hash() != renderer().template_hash() == renderer().template_hash()
    assert renderer(BRACKETS).tokenizer_hash() == renderer().tokenizer_hash()
    assert merging(("a", "b")).tokenizer_hash() != renderer().tokenizer_hash()


def test_decoded_text_has_no_special_tokens() -> None:
    assert renderer().decode(renderer().full(asked(), "a").ids) == "\nWhy?\n\na\n"


def test_a_token_has_its_text_alone_with_its_space_and_special_tokens_have_their_names() -> None:
    r = renderer()
    texts = [r.token_text(token) for token in r.tokenizer.encode("a \u00e9", add_special_tokens=False)]
    assert texts == ["a", " ", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]
    assert r.token_text(pico.END) == "<|end|>"
    core = Tokenizer(models.BPE(vocab={"\u2581": 0, "a": 1, "\u2581a": 2}, merges=[("\u2581", "a")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces = Renderer(PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False))
    assert pieces.decode([2]) == "a"  # whose space a decoder drops at the start of a text
    assert [pieces.token_text(token) for token in (0, 1, 2)] == [" ", "a", " a"]


@pytest.mark.parametrize(
    ("side", "mask"), [("left", [[0, 0, 1], [1, 1, 1]]), ("right", [[1, 0, 0], [1, 1, 1]])], ids=["left", "right"]
)
def test_padding_counts_positions_from_the_first_real_token(side: render.Side, mask: list[list[int]]) -> None:
    batch = renderer().pad([[9], [5, 6, 7]], side=side)
    assert batch.attention_mask.tolist() == mask
    assert batch.position_ids.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert batch.input_ids[batch.attention_mask.bool()].tolist() == [9, 5, 6, 7]
    assert set(batch.input_ids[~batch.attention_mask.bool()].tolist()) == {pico.PAD}


def test_padding_id_needs_no_pad_token() -> None:
    r = merging(("a", "b"))
    assert r.pad_id == 1  # the end of a text
    bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    assert Renderer(PreTrainedTokenizerFast(tokenizer_object=bare)).pad_id == 0
    with pytest.raises(RenderError, match="at least one row"):
        r.pad([[1], []])
    with pytest.raises(OptionError, match="'left' or 'right'"):
        r.pad([[1]], side="top")  # type: ignore[arg-type]


# Loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pico.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "tiny")
    pico.tokenizer(chat=False).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_local_folder_without_a_template_loads_in_its_own_dtype_and_evaluation_mode(folder: Path) -> None:
    model, tokenizer = render.load(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not Renderer(tokenizer).has_template
    saved = pico.model(dtype=torch.bfloat16)
    assert torch.equal(model.get_input_embeddings().weight, saved.get_input_embeddings().weight)


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_dtype_and_device_are_as_asked(folder: Path, dtype: str | torch.dtype) -> None:
    model, _ = render.load(str(folder), dtype=dtype, device="cpu")
    assert model.dtype == torch.float32
    with pytest.raises(OptionError, match="Unknown dtype 'int3'"):
        render.load(folder, dtype="int3")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "nobody/no-such-model", ""])
def test_missing_model_is_one_line_without_a_traceback_of_the_hub(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        render.load(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_file_and_folder_without_config_are_named_for_what_they_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a file"):
        render.load(folder / "config.json")
    with pytest.raises(OptionError, match=r"holds no config\.json"):
        render.load(tmp_path)


def test_a_model_without_a_tokenizer_and_a_name_that_is_no_folder_are_told_apart(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    for loading in (render.load, render.load_empty):
        with pytest.raises(OptionError, match=r"holds a model and no tokenizer, such as tokenizer\.json"):
            loading(folder)
    with pytest.raises(OptionError, match="There is no such folder here, so it was taken for a name on the hub"):
        render.load("nobody/nothing")


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(pico.model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OptionError, match="Cannot load a model from"):
        render.load(folder)


def test_code_that_comes_with_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(OptionError, match="Cannot load a model from"):
        render.load(folder)
    assert not (tmp_path / "ran").exists()


def test_bundled_model_is_found_in_the_package_or_its_absence_explained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render.loading.resources, "files", lambda _: tmp_path)
    with pytest.raises(OptionError, match="not in this installation"):
        render.load("prefworld")
    (tmp_path / "prefworld").mkdir()
    shutil.move(folder, tmp_path / "prefworld" / "model")
    model, _ = render.load("prefworld")
    assert model.config.name_or_path == "prefworld"


def test_spreading_over_devices_without_accelerate_prints_the_install_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render.loading, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match="pip install accelerate"):
        render.load(folder, device="auto")


# Word pieces over the seam of prompt and answer, with vocabularies that were really learned

TEXTS = [
    "The answer is forty two.",
    "Because the answerer answers, the answer is the answer.",
    "I am sure that this is the answer.",
    "What is the answer? Why is the sky blue?",
    "The sky is blue because the sun is bright.",
]


def trained(pieces: str, template: str | None) -> Renderer:
    """A tokenizer trained on `TEXTS`, on bytes as in GPT-2 or with a mark for spaces as in SentencePiece."""
    core = Tokenizer(models.BPE())
    alphabet = ["\n", *map(chr, range(0x20, 0x7F))]
    if pieces == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=pieces)
        core.decoder = decoders.Metaspace(prepend_scheme=pieces)
    special = [*pico.SPECIAL, "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return Renderer(tokenizer)


SEAMS = [
    ("The ans", "wer is"),
    ("The answer", " is"),
    ("The ", "sky"),
    ("Why is the sky b", "lue?"),
    ("Why?", "Because"),
]


@pytest.mark.parametrize("pieces", ["bytes", "always", "first"])
@pytest.mark.parametrize(("prompt", "answer"), SEAMS)
def test_a_word_cut_by_the_end_of_the_prompt_keeps_both_parts_in_their_places(
    pieces: str, prompt: str, answer: str
) -> None:
    r = trained(pieces, None)
    full = r.full(asked(prompt), answer)
    assert full.ids[: full.response_start] == r.prompt_ids(asked(prompt))
    assert full.response_end == len(full.ids)
    assert r.decode(full.ids) == prompt + answer  # no letter and no space more than that
    alone = r.tokenizer.decode(full.ids[: full.response_start])
    assert alone.strip() == prompt.strip()


def test_the_seams_are_ones_over_which_word_pieces_really_merge() -> None:
    for pieces in ("bytes", "always", "first"):
        r = trained(pieces, None)
        merged = [r.full(asked(p), a).ids != r.tokenizer.encode(p + a, add_special_tokens=False) for p, a in SEAMS]
        assert merged == [True, False, True, True, False]


@pytest.mark.parametrize("pieces", ["bytes", "always", "first"])
@pytest.mark.parametrize("template", [pico.TEMPLATE, BRACKETS, THINKING], ids=["turns", "brackets", "thinking"])
@pytest.mark.parametrize(("prompt", "answer"), SEAMS)
def test_with_a_template_the_span_is_the_answer_whatever_its_pieces(
    pieces: str, template: str, prompt: str, answer: str
) -> None:
    r = trained(pieces, template)
    ids, full = r.prompt_ids(asked(prompt)), r.full(asked(prompt), answer)
    assert full.ids[: full.response_start] == ids
    assert r.tokenizer.decode(full.ids[full.response_start : full.response_end]).strip() == answer.strip()
    assert r.tokenizer.convert_ids_to_tokens(full.ids[full.response_end]) == "<|end|>"
    alone = r.as_user(answer)
    assert r.tokenizer.decode(alone.ids[alone.response_start : alone.response_end]).strip() == answer.strip()
