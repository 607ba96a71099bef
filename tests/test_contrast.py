"""Pairs from contrasts: who is asked what, which pairs are left out, and what is said of the rest."""

from __future__ import annotations

import gc
import importlib
import io
import json
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import pico
import trimtab
from trimtab.cli import main
from trimtab.contrast import Answers, Contrast, answer_side, contrast_pairs, join_sides
from trimtab.errors import OptionError, PairsError, RenderError, TrimtabWarning, UnknownName
from trimtab.generate import Generation, generate
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.prompts import check_sampling, read_lines
from trimtab.render import Loaded, load
from trimtab.types import Message

BRIEF, LONG = "Be brief.", "Ramble."
PROMPTS = ["Hi", "Ho there", "What is it?"]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(pico.model(), pico.tokenizer())


@pytest.fixture(scope="module")
def bundled() -> Loaded:
    return load("prefworld")


pytestmark = pytest.mark.filterwarnings("ignore:\\d+ of \\d+ (chosen|rejected) answers were cut short")
"""Models of random weights never end an answer."""


def said(loaded: Loaded, prompt: str, *system: str, tokens: int = 6) -> str:
    """What the model answers when it is asked alone."""
    turns = [*({"role": "system", "content": line} for line in system), {"role": "user", "content": prompt}]
    return generate(*loaded, [turns], max_new_tokens=tokens)[0].text


def texts(pairs: Pairs) -> list[tuple[str, str, str]]:
    return [(pair.prompt[-1].content, pair.chosen, pair.rejected) for pair in pairs]


# Who is asked what


def test_each_pair_holds_what_the_model_says_under_the_two_lines_and_its_prompt_neither_of_them(loaded: Loaded) -> None:
    found = contrast_pairs(*loaded, PROMPTS, chosen_system=[BRIEF], rejected_system=[LONG], max_new_tokens=6)
    assert texts(found.pairs) == [(p, said(loaded, p, BRIEF), said(loaded, p, LONG)) for p in PROMPTS]
    assert [pair.prompt for pair in found.pairs] == [(Message("user", p),) for p in PROMPTS]
    assert found.asked == len(found.pairs) == 3
    assert found.pairs[1].meta == {
        "chosen_system": BRIEF,
        "rejected_system": LONG,
        "chosen_model": "LlamaForCausalLM",
        "rejected_model": "LlamaForCausalLM",
        "chosen_tokens": 6,
        "rejected_tokens": 6,
        "chosen_cut": True,
        "rejected_cut": True,
        "sample": 1,
        "decoding": {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 0, "samples": 1, "batch_size": 64},
    }


def test_the_first_lines_of_both_sides_are_a_contrast_and_so_on_for_every_prompt(loaded: Loaded) -> None:
    chosen, rejected = [BRIEF, "Few words."], [LONG, "Many words."]
    found = contrast_pairs(*loaded, PROMPTS, chosen_system=chosen, rejected_system=rejected, max_new_tokens=6)
    lines = list(zip(chosen, rejected, strict=True))
    assert texts(found.pairs) == [(p, said(loaded, p, a), said(loaded, p, b)) for p in PROMPTS for a, b in lines]
    assert [(p.meta["chosen_system"], p.meta["rejected_system"]) for p in found.pairs] == lines * 3


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_side_without_lines_is_asked_without_one(loaded: Loaded, side: str) -> None:
    lines = {"chosen_system": [BRIEF, LONG]} if side == "rejected" else {"rejected_system": [BRIEF, LONG]}
    found = contrast_pairs(*loaded, ["Hi"], max_new_tokens=6, **lines)
    assert [getattr(pair, side) for pair in found.pairs] == [said(loaded, "Hi")] * 2
    assert [pair.meta[f"{side}_system"] for pair in found.pairs] == [None, None]


def test_a_system_line_of_a_prompt_stays_and_that_of_the_contrast_is_added_to_it(loaded: Loaded) -> None:
    prompt = (Message("system", "You are a bird."), Message("user", "Hi"))
    (pair,) = contrast_pairs(*loaded, [prompt], chosen_system=[BRIEF], max_new_tokens=40).pairs
    assert pair.prompt == prompt
    assert pair.chosen == said(loaded, "Hi", f"You are a bird.\n\n{BRIEF}", tokens=40)
    assert pair.rejected == said(loaded, "Hi", "You are a bird.", tokens=40)


def test_greedy_answers_to_the_same_question_are_computed_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def counting(model: Any, tokenizer: Any, prompts: Sequence[Any], **options: Any) -> list[Generation]:
        asked.append((len(prompts), options["batch_size"]))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr("trimtab.contrast.generate", counting)
    lines = ["A", "B", "C"]
    found = contrast_pairs(*loaded, ["Hi", "Hi"], chosen_system=lines, max_new_tokens=6, batch_size=5)
    assert asked == [(3, 5), (1, 5)]
    assert (found.asked, len(found.pairs), found.repeated) == (6, 3, 3)


def test_samples_are_draws_of_their_own_which_the_seed_brings_back(loaded: Loaded) -> None:
    def draw(seed: int) -> Contrast:
        lines = {"chosen_system": [BRIEF], "rejected_system": [LONG]}
        sampling = {"samples": 3, "temperature": 1.0, "top_p": 0.9, "seed": seed, "batch_size": 2}
        return contrast_pairs(*loaded, PROMPTS[:2], max_new_tokens=6, **lines, **sampling)

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(pair.prompt[-1].content, pair.meta["sample"]) for pair in first.pairs] == [
        (prompt, sample) for prompt in PROMPTS[:2] for sample in (1, 2, 3)
    ]
    assert len({pair.chosen for pair in first.pairs}) == len({pair.rejected for pair in first.pairs}) == 6
    assert first.pairs == draw(1).pairs
    assert not set(texts(first.pairs)) & set(texts(draw(2).pairs))
    decoding = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 1, "samples": 3, "batch_size": 2}
    assert all(pair.meta["decoding"] == decoding for pair in first.pairs)


def test_the_likeliest_share_alone_is_sampled_where_it_is_asked_for(loaded: Loaded) -> None:
    drawn = contrast_pairs(
        *loaded, PROMPTS, chosen_system=[BRIEF], max_new_tokens=6, samples=1, temperature=1.0, top_p=1e-6
    )
    greedy = contrast_pairs(*loaded, PROMPTS, chosen_system=[BRIEF], max_new_tokens=6)
    assert texts(drawn.pairs) == texts(greedy.pairs)


def test_rounds_and_sides_of_sampled_answers_draw_apart(loaded: Loaded) -> None:
    # One prompt in a batch, so that rounds of the same seed would repeat each other.
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    sampled: dict[str, Any] = {"samples": 12, "temperature": 1.0, "max_new_tokens": 6, "batch_size": 1}
    drawn = answer_side(*loaded, ["Hi"], "chosen", progress=note, **sampled)
    assert seen == [(4, 12), (8, 12), (12, 12)]
    other = answer_side(*loaded, ["Hi"], "rejected", samples=12, temperature=1.0, max_new_tokens=6, batch_size=1)
    assert len({answer.text for answer in (*drawn.answers, *other.answers)}) == 24


def test_progress_goes_through_both_sides_to_its_end(loaded: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    options = {"batch_size": 1, "max_new_tokens": 2, "chosen_system": [BRIEF], "rejected_system": [LONG]}
    contrast_pairs(*loaded, ["a", "b", "c", "d", "e"], progress=lambda *steps: seen.append(steps), **options)
    assert seen == [(4, 10), (5, 10), (9, 10), (10, 10)]


def test_two_models_make_a_contrast_without_a_line(loaded: Loaded, tmp_path: Path) -> None:
    pico.model(seed=1).save_pretrained(tmp_path / "small")
    other = Loaded(load_model(tmp_path / "small"), loaded.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 6, "lines": [None, BRIEF]}
    sides = answer_side(*loaded, PROMPTS, "chosen", **options), answer_side(*other, PROMPTS, "rejected", **options)
    found = join_sides(*sides)
    asked = [(p, *line) for p in PROMPTS for line in ([], [BRIEF])]
    assert texts(found.pairs) == [(a[0], said(loaded, *a), said(other, *a)) for a in asked]
    assert {pair.meta["rejected_model"] for pair in found.pairs} == {"small"}  # no path


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


# Which pairs are left out


def side(name: Any, answers: Sequence[str], *, tokens: Sequence[int] = (), cut: int = 0, **changes: Any) -> Answers:
    """Answers as a model might have given them, one per prompt; `cut` of them did not end."""
    prompts = tuple((Message("user", f"Prompt {n}"),) for n in range(len(answers)))
    lengths = tokens or [len(text) for text in answers]
    made = [
        Generation(prompt, text, {}, length, n >= cut)
        for n, (prompt, text, length) in enumerate(zip(prompts, answers, lengths, strict=True))
    ]
    given = {"prompts": prompts, "lines": (name,), "samples": 1, "decoding": {}, "answers": tuple(made)}
    return Answers(**{"side": name, "model": "m", **given, **changes})


def test_empty_and_equal_answers_are_left_out_and_counted() -> None:
    found = join_sides(side("chosen", ["a", " ", "b", "", "c "]), side("rejected", ["x", "y", "\n", "", " c"]))
    assert texts(found.pairs) == [("Prompt 0", "a", "x")]
    assert (found.asked, found.empty, found.same) == (5, 3, 1)
    assert found.record()["pairs"] == 1
    assert found.record()["empty"] == 3


def test_repeated_and_contradictory_pairs_are_left_out_and_counted() -> None:
    prompts = ((Message("user", "Hi"),),)
    of = {"prompts": prompts, "samples": 6}
    found = join_sides(side("chosen", list("aabcde"), **of), side("rejected", list("xxyyed"), **of))
    assert texts(found.pairs) == [("Hi", "a", "x"), ("Hi", "b", "y"), ("Hi", "c", "y")]
    assert (found.repeated, found.contradictory) == (1, 2)
    assert [pair.meta["sample"] for pair in found.pairs] == [1, 3, 4]
    assert found.chosen_tokens == 1


def test_where_no_pair_is_left_the_error_says_why_and_what_to_try() -> None:
    with pytest.raises(PairsError, match=r"No pair is left of 2: 1 with the same .* 1 with an empty .* Try system"):
        join_sides(side("chosen", ["a", ""]), side("rejected", ["a", "b"]))


def test_what_is_saved_loads_as_pairs_and_says_how_it_was_made(loaded: Loaded, tmp_path: Path) -> None:
    of = {"samples": 2, "temperature": 1.5, "max_new_tokens": 2, "chosen_system": [BRIEF]}
    pairs = contrast_pairs(*loaded, [*PROMPTS, "Hi"], **of).pairs
    pairs.save(tmp_path / "made.jsonl")
    assert Pairs.load(tmp_path / "made.jsonl") == pairs
    assert pairs.swapped()[0].meta["rejected_system"] == BRIEF


# What is said of the rest


def test_cut_answers_are_counted_and_warned_of_where_they_are_most_of_a_side() -> None:
    chosen, rejected = ["a", "b", "c", "d"], ["w", "x", "y", "z"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # half of a side is not most of it
        found = join_sides(side("chosen", chosen, cut=2), side("rejected", rejected, cut=1))
    assert (found.chosen_cut, found.rejected_cut) == (2, 1)
    assert [pair.meta["chosen_cut"] for pair in found.pairs] == [True, True, False, False]
    with pytest.warns(TrimtabWarning, match="3 of 4 rejected answers were cut short. Let max_new_tokens be larger"):
        join_sides(side("chosen", chosen), side("rejected", rejected, cut=3))


def test_sides_that_differ_in_length_by_more_than_a_factor_of_two_are_warned_of() -> None:
    found = join_sides(side("chosen", ["a", "b"], tokens=[4, 8]), side("rejected", ["x", "y"], tokens=[2, 4]))
    assert (found.chosen_tokens, found.rejected_tokens) == (6, 3)
    for longer in (True, False):
        lengths = [[4, 9], [2, 4]] if longer else [[2, 4], [4, 9]]
        with pytest.warns(TrimtabWarning, match="may be length, and little else"):
            join_sides(side("chosen", ["a", "b"], tokens=lengths[0]), side("rejected", ["x", "y"], tokens=lengths[1]))


# What is refused


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([], [], "Without a system line both sides say the same. Pass chosen_system, rejected_system, or both"),
        (["a", "b"], ["c"], "got 2 of chosen_system and 1 of rejected_system"),
        (["a", "b"], ["c", "b"], "Both sides have the same system line, 'b'"),
        ([" "], [], "chosen_system holds ' ', which says nothing"),
        (["a"], [None], "rejected_system holds None"),
        ("abc", [], r"chosen_system is a list of system lines; got 'abc'. Pass \[line\]"),
        (["a"], ["\ud800"], "rejected_system is not Unicode text"),
    ],
)
def test_lines_that_make_no_contrast_are_refused(loaded: Loaded, chosen: Any, rejected: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        contrast_pairs(*loaded, ["Hi"], chosen_system=chosen, rejected_system=rejected)


def test_two_models_may_have_the_same_line_or_none() -> None:
    assert read_lines([], [], two_models=True) == ((None,), (None,))
    assert read_lines([BRIEF], [BRIEF], two_models=True) == ((BRIEF,), (BRIEF,))
    assert read_lines([BRIEF, LONG], [], two_models=True) == ((BRIEF, LONG), (None, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples counts the answers to a prompt, and is a whole number, 1 or more; got 0"),
        ({"samples": 1.5, "temperature": 1.0}, "got 1.5"),
        ({"samples": 3}, "at temperature 0 they are all the same; got 3. Let the temperature be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number"),
        ({"temperature": -1.0}, "The temperature is 0"),
        ({"top_p": 0.0}, "top_p is above 0"),
        ({"seed": -1}, "The seed is a whole number"),
        ({"batch_size": 0}, "batch_size is a whole number"),
    ],
)
def test_options_out_of_range_are_refused(loaded: Loaded, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        contrast_pairs(*loaded, ["Hi"], chosen_system=[BRIEF], **options)


def test_a_side_is_one_of_two_and_asked_under_a_list_of_lines(loaded: Loaded) -> None:
    with pytest.raises(UnknownName, match=r"Unknown side 'choosen'\. Known: chosen, rejected\."):
        answer_side(*loaded, PROMPTS, "choosen")  # pyright: ignore[reportArgumentType]
    for lines in ("abc", []):
        with pytest.raises(OptionError, match=r"lines is a list of system lines, or \[None\] to ask without"):
            answer_side(*loaded, PROMPTS, "chosen", lines=lines)


def test_samples_of_a_warm_model_are_allowed() -> None:
    check_sampling(samples=3, temperature=0.1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "There are no prompts to ask."),
        (["Hi", " "], "Prompt 2: the user turn of the prompt is empty"),
        (["Hi", [Message("user", "a"), Message("assistant", "b")]], "Prompt 2: the prompt must end with a user turn"),
    ],
)
def test_prompts_that_cannot_be_asked_are_named(loaded: Loaded, prompts: Any, message: str) -> None:
    with pytest.raises(PairsError, match=message):
        contrast_pairs(*loaded, prompts, chosen_system=[BRIEF])


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + pico.TEMPLATE
DROPS = pico.TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


@pytest.mark.parametrize(
    ("template", "line", "message"),
    [
        (REFUSES, BRIEF, "no system role.* A contrast needs a model whose template shows system lines"),
        (DROPS, BRIEF, "drops the system turn.* A contrast needs a model whose template shows system lines"),
        # What is dropped stands elsewhere in the text, so that only the comparison of both sides shows it.
        (DROPS, "Hi", "Prompt 1 is the same tokens under 'Hi' and under None: the chat template does not show"),
    ],
)
def test_a_template_without_system_lines_is_refused_in_words(template: str, line: str, message: str) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RenderError, match=message):
        contrast_pairs(pico.model(), tokenizer, ["Hi there"], chosen_system=[line], max_new_tokens=2)


def test_two_models_need_no_system_role() -> None:
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = REFUSES
    sides = [
        answer_side(pico.model(seed=n), tokenizer, PROMPTS, name, max_new_tokens=6)
        for n, name in enumerate(("chosen", "rejected"))
    ]
    assert len(join_sides(*sides).pairs) == 3


def test_a_prompt_that_leaves_no_room_is_named_by_its_own_number(loaded: Loaded) -> None:
    options = {"chosen_system": ["Be", BRIEF], "samples": 2, "temperature": 1.0, "max_new_tokens": 20}
    with pytest.raises(OptionError, match=r"Prompt 3 is 2\d\d tokens long when rendered"):
        contrast_pairs(*loaded, ["a", "b", "c" * 250], **options)
    with pytest.warns(TrimtabWarning) as told:
        contrast_pairs(*loaded, ["a", "b", "c" * 220], **options)
    told_of = [str(warning.message) for warning in told if "context holds" in str(warning.message)]
    assert len(told_of) == 1  # without a line the prompt is shorter, and leaves room
    assert "and prompt 3 has 240 of them" in told_of[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 2}, "differ in their samples"),
        ({"prompts": ((Message("user", "other"),),)}, "differ in their prompts"),
        ({"decoding": {"seed": 1}}, "differ in their decoding"),
        ({"lines": ("a", "b")}, "has 1 system lines and the rejected side 2"),
        ({"side": "chosen"}, "got chosen and chosen"),
    ],
)
def test_sides_that_were_not_asked_alike_are_not_joined(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        join_sides(side("chosen", ["a"]), side("rejected", ["b"], **change))


# On the bundled model


def test_a_knob_from_two_personas_points_where_one_from_the_worlds_own_pairs_does(bundled: Loaded) -> None:
    own = world.pairs("risk", 30)
    prompts = [pair.prompt for pair in own]
    options = {"chosen_system": ["You take risks."], "rejected_system": ["You avoid risks."], "max_new_tokens": 20}
    found = contrast_pairs(*bundled, prompts, **options)
    assert len(found.pairs) > 20
    made, true = trimtab.learn(*bundled, found.pairs), trimtab.learn(*bundled, own)
    swapped = trimtab.learn(*bundled, found.pairs.swapped())
    for site, vector in true.vectors.items():
        assert torch.cosine_similarity(made.vectors[site], vector, dim=0) > 0.9, site
        assert torch.cosine_similarity(swapped.vectors[site], vector, dim=0) < -0.9, site


# The command line


class Output(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Output]
CONTRAST = ("--chosen-system", BRIEF, "--rejected-system", LONG, "--max-new-tokens", 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "pico")


def save_model(folder: Path, seed: int = 0) -> Path:
    pico.model(seed=seed).save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*words: object, stdin: str = "") -> Output:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Output(status, *capsys.readouterr())

    return call


def test_pairs_of_the_command_line_are_learned_from_as_it_suggests(run: Run) -> None:
    words = ["--chosen-system", "You take risks.", "--rejected-system", "You avoid risks.", "--out", "bold.jsonl"]
    out = run("pairs", "prefworld", "--input", "prefworld:risk:12", *words)
    assert out.status == 0, out.err
    assert out.err == ""
    assert out.out.startswith(f"Made {len(Pairs.load('bold.jsonl'))} pairs from 12 prompts.\n")
    (command,) = [line.partition(" trimtab ")[2] for line in out.out.splitlines() if line.startswith("next")]
    assert command == "learn prefworld bold.jsonl --out bold.knob.safetensors"
    assert run(*command.split()).status == 0
    assert trimtab.load_knob("bold.knob.safetensors").name == "bold"


def test_the_command_line_writes_what_the_function_makes_and_its_numbers_as_json(run: Run, model: Path) -> None:
    sampling = ["--samples", 2, "--temperature", 0.8, "--top-p", 0.95, "--seed", 5, "--batch-size", 3]
    out = run("pairs", model, *PROMPTS, *CONTRAST, *sampling, "--out", "new/made.json", "--json")
    assert out.status == 0, out.err
    found = contrast_pairs(
        *load(model),
        PROMPTS,
        chosen_system=[BRIEF],
        rejected_system=[LONG],
        samples=2,
        max_new_tokens=6,
        temperature=0.8,
        top_p=0.95,
        seed=5,
        batch_size=3,
    )
    assert Pairs.load("new/made.json") == found.pairs
    assert str(model.parent) not in Path("new/made.json").read_text()
    names = {"prompts": 3, "contrasts": 1, "model": str(model), "rejected_model": str(model), "out": "new/made.json"}
    assert json.loads(out.out) == {**found.record(), **names}
    assert "answers were cut short. Let --max-new-tokens be larger" in out.err


def test_prompts_come_from_arguments_files_stdin_and_pairs(run: Run, model: Path) -> None:
    run("pairs", model, *PROMPTS, *CONTRAST, "--out", "a.jsonl")
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    for name, words, stdin in (
        ("b", ["--input", "prompts.txt"], ""),
        ("c", [], "\n".join(PROMPTS)),
        ("d", ["--input", "a.jsonl"], ""),
    ):
        assert run("pairs", model, *words, *CONTRAST, "--out", f"{name}.jsonl", stdin=stdin).status == 0
        assert Path(f"{name}.jsonl").read_bytes() == Path("a.jsonl").read_bytes()


def test_of_two_models_one_at_a_time_is_in_memory(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save_model(model.parent / "other", seed=1)
    alive: list[weakref.ref[Any]] = []

    def watched(name: Any, **options: Any) -> Loaded:
        assert [ref() for ref in alive] == [None] * len(alive), "a model is still there"
        made = load(name, **options)
        alive.append(weakref.ref(made.model))
        return made

    gc.collect()
    monkeypatch.setattr(importlib.import_module("trimtab.render"), "load", watched)
    words = ["--rejected-model", other, "--max-new-tokens", 6, "--chosen-system", BRIEF, "--out", "two.jsonl"]
    out = run("pairs", model, *PROMPTS, *words)
    assert out.status == 0, out.err
    assert len(alive) == 2
    one, two = load(model), load(other)
    assert texts(Pairs.load("two.jsonl")) == [(p, said(one, p, BRIEF), said(two, p)) for p in PROMPTS]


def test_pairs_that_are_there_are_never_replaced(run: Run, model: Path) -> None:
    Path("mine.jsonl").write_text("precious\n")
    out = run("pairs", model, "Hi", *CONTRAST, "--out", "mine.jsonl")
    assert (out.status, Path("mine.jsonl").read_text()) == (2, "precious\n")
    assert "--out 'mine.jsonl' exists and is not replaced. Choose another name" in out.err
    Path("empty.jsonl").touch()
    assert run("pairs", model, "Hi", *CONTRAST, "--out", "empty.jsonl").status == 0


A, B, OUT = "--chosen-system a", "--rejected-system b", "--out x.jsonl"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"NONE Hi {OUT}", "Pass --chosen-system, --rejected-system, or both"),
        (f"NONE Hi {A} {A} {B} {OUT}", "got 2 of --chosen-system and 1 of --rejected-system"),
        (f"NONE Hi {A} --rejected-system a {OUT}", "Both sides have the same system line, 'a'"),
        (f"NONE Hi {A} {B} --samples 0 {OUT}", "--samples counts the answers to a prompt"),
        (f"NONE Hi {A} {B} --samples 3 {OUT}", "at temperature 0 they are all the same; got 3"),
        (f"NONE Hi {A} {B} --batch-size 0 {OUT}", "--batch-size is 1 or more; got 0."),
        (f"NONE {A} {B} {OUT}", "There is no prompt: stdin holds no line with text."),
        (f"NONE Hi --input f.txt {A} {B} {OUT}", "Pass prompts as arguments or with --input, not both."),
        (f"NONE Hi --input prefworld:math {A} {B} {OUT}", "Pass prompts as arguments or with --input, not both."),
        (f"NONE --input none.txt {A} {B} {OUT}", "There is no file 'none.txt'"),
        (f"NONE --input knobs.jsonl {A} {B} {OUT}", "knobs.jsonl, line 1 brings `knobs`, and no knob is turned here."),
        (f"NONE knobs.jsonl {A} {B} {OUT}", "'knobs.jsonl' is no prompt, but names where some are. Pass it as --input"),
        (f"NONE prefworld:math {A} {B} {OUT}", "Pass it as --input prefworld:math."),
        (f"NONE --input prefworld:maths {A} {B} {OUT}", "Unknown family of PrefWorld 'maths'."),
        (f"NONE Hi {A} {B}", "required: --out"),
        (f"NONE Hi {A} {B} --out k.safetensors", "is a file of pairs, and ends in .jsonl or .json."),
        (f"NONE Hi {A} {B} --out ", "--out is empty; pass the name of a file."),
        (f"NONE Hi {A} {B} --out /proc/x.jsonl", "--out '/proc/x.jsonl' cannot be written"),
        (f"NONE Hi --rejected-model NONE {OUT}", "--rejected-model is NONE itself"),
        (f"NONE Hi {A} {OUT}", "Cannot load a model from 'NONE'"),
        (f"MODEL Hi {A} --top-p 2 {OUT}", "--top-p is above 0"),
    ],
)
def test_a_mistake_is_one_line_and_told_before_a_model_is_loaded(
    run: Run, model: Path, line: str, message: str
) -> None:
    Path("knobs.jsonl").write_text('{"prompt": "a", "knobs": {"x": 1}}\n')
    out = run("pairs", *[word.replace("MODEL", str(model)) for word in line.split(" ")])
    assert (out.status, out.out) == (2, "")
    assert message in out.err
    assert len(out.err.splitlines()) == 1
    assert not Path("x.jsonl").exists()


def test_where_no_pair_is_left_nothing_is_written(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> Contrast:
        return join_sides(side("chosen", ["a"]), side("rejected", ["a"]))

    monkeypatch.setattr("trimtab.contrast.contrast_pairs", nothing)
    out = run("pairs", model, "Hi", *CONTRAST, "--out", "x.jsonl")
    assert out.status == 2
    assert "No pair is left of 1: 1 with the same answer on both sides. Try system lines" in out.err
    assert not Path("x.jsonl").exists()
