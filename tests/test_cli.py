"""The command line: what each verb prints where, on models of the tests' own and on one that nobody here trained."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from transformers.utils import logging

import pico
from invented import write_all
from trimtab.artifact import Knob, load_panel, save_panel
from trimtab.cli import VERBS, main
from trimtab.cli.options import Parser
from trimtab.cli.sources import load_pairs, load_task
from trimtab.cli.tables import sites_text, tuning_text
from trimtab.cli.terminal import Terminal, as_options, harmless, plain_warnings
from trimtab.compose import compose
from trimtab.contrast import contrast_pairs
from trimtab.errors import TrimtabError
from trimtab.evals.benchmarks import load_benchmark
from trimtab.evals.evaluate import evaluate
from trimtab.evals.tasks import GRADERS
from trimtab.generate import generate
from trimtab.learn import learn
from trimtab.methods import METHODS
from trimtab.pairs import Pairs
from trimtab.render import Loaded, load
from trimtab.tune import STRENGTHS, tune
from trimtab.types import Message, Site

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
KNOB, OTHER = "math.knob.safetensors", "concise.knob.safetensors"


class Output(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        """Every line of stdout, which must be JSON."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Output]


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `trimtab` with words and what stands on stdin; return the exit status and both streams."""

    def call(*words: object, stdin: str = "") -> Output:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Output(status, *capsys.readouterr())

    return call


def save_model(folder: Path, *, seed: int = 0, chat: bool = True, **changes: Any) -> Path:
    pico.model(seed=seed, **changes).save_pretrained(folder)
    pico.tokenizer(chat=chat).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, without a chat template."""
    return save_model(tmp_path_factory.mktemp("plain"), chat=False)


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    return load(model)


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_pairs(path: Path, start: int = 0, count: int = 6) -> Path:
    records = [
        {"prompt": f"What is {n} + {n}?", "chosen": f"{n}+{n}={2 * n}", "rejected": f"Is {n} {n + 1}"}
        for n in range(start, start + count)
    ]
    return write_lines(path, records)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with two knobs, pairs, held-out pairs and a task."""
    monkeypatch.chdir(tmp_path)
    # Long enough to change what a random model says.
    pico.knob(1, name="math", norm=20.0).save(KNOB)
    pico.knob(0, name="concise", seed=1, norm=20.0).save(OTHER)
    write_pairs(tmp_path / "pairs.jsonl")
    write_pairs(tmp_path / "held_out.jsonl", start=20)
    write_lines(tmp_path / "task.jsonl", [{"prompt": "Hi", "answer": "a"}, {"prompt": "Ho", "answer": "b"}])
    return tmp_path


def answers(loaded: Loaded, prompts: Sequence[Any], dose: Any = None, tokens: int = 6) -> list[str]:
    """What the Python interface answers, one prompt at a time."""
    return [generate(*loaded, [p], knobs=dose, max_new_tokens=tokens)[0].text for p in prompts]


# The main path


def check_main_path(run: Run, model: Path, pairs: Path, held_out: Path, task: str, *, gains: str) -> None:
    out = run("learn", model, pairs, "--out", "new/math.knob.safetensors", "--json")
    assert out.status == 0, out.err
    (learned,) = out.records
    assert learned["knob"] == "math"
    assert learned["pairs"] == len(Pairs.load(pairs))
    assert learned["gain"] > 0
    assert learned["seconds"] > 0
    knob = Knob.load(learned["out"])
    assert (str(knob.site), knob.gain, len(knob.vectors)) == (learned["site"], learned["gain"], learned["sites"])

    (card,) = run("inspect", learned["out"], "--json").records
    assert (card["name"], card["method"], card["site"], card["safe_range"]) == ("math", "palrs", str(knob.site), None)
    assert card["provenance"] == knob.provenance
    assert card["diagnostics"] == knob.diagnostics
    assert len(card["sites"]) == learned["sites"] > 1

    words = ["--pairs", held_out, "--task", task, "--max-new-tokens", 6, "--gains", gains, "--finalists", 2]
    out = run("tune", model, "--knob", learned["out"], *words, "--out", "tuned.safetensors", "--json")
    assert out.status == 0, out.err
    (tuned,) = out.records
    assert tuned["gain"] in [float(gain) for gain in gains.split(",")]
    assert tuned["site"] in card["sites"]
    assert {row["site"] for row in tuned["table"]} <= set(card["sites"])
    low, high = tuned["safe_range"]
    assert low <= 0 <= high
    best = Knob.load("tuned.safetensors")
    assert (str(best.site), best.gain, best.safe_range) == (tuned["site"], tuned["gain"], (low, high))

    text = run("inspect", "tuned.safetensors")
    assert f"safe range            {low:g} to {high:g}" in text.out
    assert re.search(rf"^\* +{re.escape(tuned['site'])} +{tuned['where']} +{tuned['gain']:g} ", text.out, re.MULTILINE)
    assert "dose-response" in text.out

    prompts = ["What is 3 + 3?", "Tom and Lily"]
    words = ["--knob", "tuned.safetensors", "--strength", "-0.5", "--max-new-tokens", 6]
    records = run("generate", model, *prompts, *words, "--json").records
    assert [set(record) for record in records] == [{"prompt", "text", "knobs"}] * 2
    assert [record["prompt"] for record in records] == prompts
    assert [record["knobs"] for record in records] == [{"math": -0.5}] * 2
    assert [record["text"] for record in records] == answers(load(model), prompts, {best: -0.5})


def test_learn_inspect_tune_and_generate_follow_each_other(run: Run, model: Path, files: Path) -> None:
    check_main_path(run, model, files / "pairs.jsonl", files / "held_out.jsonl", "task.jsonl:contains", gains="0.2,0.5")


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there: a real Llama that nobody here trained")
def test_the_same_works_on_a_real_llama_without_a_chat_template(run: Run, files: Path) -> None:
    names, verbs = ["Tom", "Lily", "Ben", "Anna", "Max", "Sue"], ["ran to", "saw"]
    records = [
        {"prompt": f"{name} {verb} the", "chosen": f" park and was very happy, {name}", "rejected": " man. He was sad."}
        for name in names
        for verb in verbs
    ]
    pairs, held_out = write_lines(files / "a.jsonl", records[:8]), write_lines(files / "b.jsonl", records[8:])
    check_main_path(run, STORIES, pairs, held_out, "task.jsonl:contains", gains="0.1,0.3")
    out = run("learn", STORIES, pairs, "--out", "c.safetensors")
    assert "warning: This tokenizer has no chat template" in out.err
    assert "--format question_response" in out.err  # not Python's spelling


def test_readable_summaries_name_what_was_chosen_and_what_to_do_next(run: Run, model: Path, files: Path) -> None:
    out = run("learn", model, "pairs.jsonl", "--out", "a.knob.safetensors")
    knob = Knob.load("a.knob.safetensors")
    assert "Learned a (palrs) from 6 pairs" in out.out
    assert f"site        {knob.site} (eq3_cosine; {len(knob.vectors)} kept)" in out.out
    assert f"alpha {knob.gain:.4g}" in out.out
    (command,) = re.findall(r"next +trimtab (.+)", out.out)
    command = command.replace("HELD_OUT.jsonl", "held_out.jsonl")
    out = run(*command.split(), "--gains", "0.2", "--finalists", 1)  # what it suggests works
    assert out.status == 0, out.err
    tuned = Knob.load("a.tuned.safetensors")
    assert f"site        {tuned.site}" in out.out
    assert "strength 1 is alpha 0.2" in out.out
    assert "finalists, judged by margin of the pairs (* chosen)" in out.out


# Learn


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "pca"], {"format": "question_response", "positions": ["last"], "selection": "max_relative_norm"}),
        (["--positions", "last,response_mean"], {"positions": ["last", "response_mean"]}),
        (["--positions", "post_instruction[-1]"], {"positions": ["post_instruction[-1]"]}),
        (["--format", "question_response"], {"format": "question_response"}),
        (["--layers=-1,0-1"], {"layers": [0, 1, 2]}),
        (["--first", "0.3", "--last", "1"], {"layers": [1, 2]}),
        (["--selection", "probe_auc", "--scale", "mean_residual_norm"], {"selection": "probe_auc"}),
        (["--site", "1/last", "--where", "completion"], {"selection": "fixed", "where": "completion"}),
        (["--length-match", "regress"], {"length_match": "regress"}),
        (["--method", "random", "--seed", "7"], {"seed": 7}),
        (["--method", "random", "--option", "seed=3"], {"seed": 3}),
    ],
)
def test_options_of_learn_reach_the_function(
    run: Run, model: Path, files: Path, words: list[str], expected: dict[str, object]
) -> None:
    out = run("learn", model, "pairs.jsonl", "--out", "a.safetensors", *words)
    assert out.status == 0, out.err
    stored = Knob.load("a.safetensors").provenance["options"]
    assert {key: stored[key] for key in expected} == expected


def test_a_knob_is_named_after_its_file_unless_told_otherwise(run: Run, model: Path, files: Path) -> None:
    for words, name in (
        (["--out", "polite.knob.safetensors"], "polite"),
        (["--out", "a=b c.safetensors"], "a-b-c"),  # no name for a setting such as a=b c=1
        (["--out", "\u200b.safetensors"], "knob"),
        (["--out", "x.safetensors", "--name", "kind", "--licence", "CC0-1.0"], "kind"),
    ):
        assert run("learn", model, "pairs.jsonl", *words).status == 0
        assert Knob.load(words[1]).name == name
    assert Knob.load("x.safetensors").provenance["licence"] == "CC0-1.0"


def test_a_knob_may_be_replaced_and_the_weights_of_a_model_may_not(run: Run, model: Path, files: Path) -> None:
    for _ in range(2):
        assert run("learn", model, "pairs.jsonl", "--out", "again.safetensors").status == 0
    weights = (model / "model.safetensors").read_bytes()
    out = run("learn", model, "pairs.jsonl", "--out", model / "model.safetensors")
    assert out.status == 2
    assert "exists and is no knob, so it is not replaced" in out.err
    assert (model / "model.safetensors").read_bytes() == weights
    assert "ends in .json" in run("learn", model, "pairs.jsonl", "--out", "knob.json").err


def test_repeated_pairs_are_refused_with_the_option_that_helps(run: Run, model: Path, files: Path) -> None:
    lines = Path("pairs.jsonl").read_text()
    Path("twice.jsonl").write_text(lines + lines)
    out = run("learn", model, "twice.jsonl", "--out", "a.safetensors")
    assert out.status == 2
    assert "Line 7 repeats line 1" in out.err
    assert "Pass --duplicates drop" in out.err
    assert run("learn", model, "twice.jsonl", "--out", "a.safetensors", "--duplicates", "drop").status == 0
    assert Knob.load("a.safetensors").provenance["pairs_count"] == 6


def test_pairs_of_prefworld_are_named_by_family_and_count(run: Run, model: Path, files: Path) -> None:
    (record,) = run("learn", model, "prefworld:concise:8", "--out", "a.safetensors", "--json").records
    assert record["pairs"] == 8
    train = load_pairs("prefworld:concise", split="train", duplicates="error")
    held_out = load_pairs("prefworld:concise:30", split="validation", duplicates="error")
    assert (len(train), len(held_out)) == (100, 30)
    assert train.hash() == load_pairs("prefworld:concise", split="train", duplicates="error").hash()
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    task = load_task("prefworld:facts:5", grader="exact_match", max_new_tokens=9)
    assert (task.name, len(task)) == ("facts", 5)


def test_benchmarks_are_named_by_file_and_count_and_what_chooses_never_tests(tmp_path: Path) -> None:
    folder = write_all(tmp_path)
    task = partial(load_task, grader="exact_match", max_new_tokens=9)
    file = f"gsm8k:{folder / 'gsm8k.jsonl'}"
    chosen, tested, whole = task(file), task(file, split="test"), load_benchmark("gsm8k", folder / "gsm8k.jsonl")
    assert chosen.name == "gsm8k"
    assert set(chosen.prompts) | set(tested.prompts) == set(whole.prompts)
    assert not set(chosen.prompts) & set(tested.prompts)
    assert chosen.max_new_tokens == whole.max_new_tokens  # those of options are for files without any
    few = task(f"{file}:3", split="test")
    assert len(few) == 3
    assert set(few.prompts) < set(tested.prompts)
    assert few.prompts == task(f"{file}:3", split="test").prompts
    assert len(task(f"mmlu:{folder / 'mmlu.zip'}:2")) == 2
    test, held_out = (task("prefworld:facts:5", split=split).prompts for split in ("test", "validation"))
    assert not set(test) & set(held_out)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gsm8:gsm8k.jsonl", "Unknown benchmark 'gsm8'. Known: caa, gsm8k, "),
        ("gsm8:gsm8k.jsonl", "Did you mean 'gsm8k'?"),
        ("gsm8k:none.jsonl", "There is no file 'none.jsonl'; expected the file of gsm8k."),
        ("gsm8k:", "The name of a file is empty; expected the file of gsm8k."),
        ("gsm8k:gsm8k.jsonl:0", "written gsm8k:FILE or gsm8k:FILE:200; got 'gsm8k:gsm8k.jsonl:0'"),
        ("gsm8k:gsm8k.jsonl:", "written gsm8k:FILE or gsm8k:FILE:200"),
        ("gsm8k:gsm8k.jsonl:exact_answer", "written gsm8k:FILE or gsm8k:FILE:200"),
        ("gsm8k:gsm8k.jsonl:900", "questions for validation; asked for 900"),
        ("humaneval:gsm8k.jsonl", "gsm8k.jsonl: Line 1 needs 'prompt', text; got None."),
        ("gsm8k.jsonl:exact", "Unknown grader 'exact'. Known: contains, "),
        ("gsm8k.jsonl:200", "Questions of a file of your own are taken whole"),
        ("gsm8k", "gsm8k is a benchmark, whose questions lie in a file of yours: gsm8k:FILE."),
    ],
)
def test_a_benchmark_that_cannot_be_had_is_refused_in_words(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_all(tmp_path))
    with pytest.raises(TrimtabError) as caught:
        load_task(text, grader="exact_match", max_new_tokens=9)
    assert words in str(caught.value)


def test_where_without_a_knob_is_refused_and_python_m_trimtab_is_the_command_line(run: Run, files: Path) -> None:
    found = run("eval", "prefworld", "--task", "prefworld:math:5", "--where", "prompt")
    assert found.status == 2
    assert "--where needs a knob. Add --knob FILE." in found.err
    said = subprocess.run([sys.executable, "-m", "trimtab", "--help"], capture_output=True, text=True, check=True)
    assert "reproduce" in said.stdout


def test_tuning_takes_benchmarks_as_task_and_guardrail(run: Run, model: Path, files: Path) -> None:
    write_all(files)
    words = ["tune", model, "--knob", KNOB, "--pairs", "held_out.jsonl", "--task", "truthfulqa-mc2:truthfulqa.json"]
    words += ["--guardrail", "mmlu:mmlu.zip:3", "--budget", 1, "--broken-budget", 1, "--gains", "0.01"]
    (record,) = run(*words, "--finalists", 1, "--strengths", "1", "--out", "x.safetensors", "--json").records
    assert (record["task"], record["guardrails"]) == ("truthfulqa-mc2", ["mmlu"])
    assert 0 < record["base"]["score"] < 1


# Tune


def test_tuning_on_the_pairs_that_were_learned_from_is_warned_of(run: Run, model: Path, files: Path) -> None:
    run("learn", model, "pairs.jsonl", "--out", "a.safetensors")
    words = ["tune", model, "--knob", "a.safetensors", "--gains", "0.2", "--finalists", 1, "--out", "b.safetensors"]
    assert "warning: Knob 'a' was learned from these very pairs" in run(*words, "--pairs", "pairs.jsonl").err
    assert "very pairs" not in run(*words, "--pairs", "held_out.jsonl").err


def test_every_guardrail_has_a_grader_of_its_own_and_counts(run: Run, model: Path, files: Path, loaded: Loaded) -> None:
    # The rail's answers are the base model's own, so a dose that changes everything breaks it.
    prompts = ["What?", "Who?"]
    truths = answers(loaded, prompts)
    write_lines(files / "rail.jsonl", [{"prompt": p, "answer": t} for p, t in zip(prompts, truths, strict=True)])
    words = ["tune", model, "--knob", KNOB, "--pairs", "held_out.jsonl", "--task", "task.jsonl", "--finalists", 1]
    words += ["--guardrail", "rail.jsonl:contains", "--max-new-tokens", 6, "--grader", "exact_answer"]
    write_lines(files / "task.jsonl", [{"prompt": "Hi", "answer": "1"}])
    (record,) = run(*words, "--gains", "0.0001", "--out", "x", "--json").records
    assert record["guardrails"] == ["rail"]
    assert record["base"]["guardrails"] == {"rail": 1.0}
    out = run(*words, "--gains", "9", "--out", "y")
    assert out.status == 2
    assert "guardrail 'rail' falls by 1 (budget 0.02)" in out.err
    assert not Path("y").exists()


def test_the_bar_of_tuning_moves_and_leaves_stdout_alone(
    run: Run, model: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", screen := FakeTerminal())
    words = ["tune", model, "--knob", KNOB, "--pairs", "held_out.jsonl", "--task", "task.jsonl", "--gains", "0.1"]
    out = run(*words, "--finalists", 1, "--max-new-tokens", 4, "--out", "x.safetensors", "--json")
    assert len(out.records) == 1
    assert "Loading" in screen.getvalue()
    rounds = 1 + 1 + 1 + len(STRENGTHS)  # ranking, the base model, one finalist at one gain, the dose-response
    done = [int(n) for n in re.findall(rf"(\d+)/{rounds}", screen.getvalue())]
    assert done
    assert max(done) >= 1


# Generate


def test_strengths_of_the_command_line_are_those_of_the_python_interface(
    run: Run, model: Path, files: Path, loaded: Loaded
) -> None:
    math, concise = Knob.load(KNOB), Knob.load(OTHER)
    both = ["--knob", KNOB, "--knob", OTHER]
    for words, dose, shown in (
        ([], {}, {}),
        (both, {math: 1, concise: 1}, {"math": 1, "concise": 1}),
        ([*both, "--strength", "-1"], {math: -1, concise: -1}, {"math": -1, "concise": -1}),
        ([*both, "--set", "concise=-0.5"], {concise: -0.5}, {"concise": -0.5}),
        (["--knob", f"a={KNOB}", "--set", "a=2"], {math: 2}, {"a": 2}),
        (["--knob", KNOB, "--strength", "0"], {}, {"math": 0}),
        (["--knob", KNOB, "--where", "prompt"], {math.with_(where="prompt"): 1}, {"math": 1}),
    ):
        (record,) = run("generate", model, *words, "Hello you", "--max-new-tokens", 6, "--json").records
        assert record == {"prompt": "Hello you", "text": answers(loaded, ["Hello you"], dose)[0], "knobs": shown}
    assert answers(loaded, ["Hello you"], {math: 1}) != answers(loaded, ["Hello you"], {})  # or all this says nothing


def test_prompts_come_from_arguments_files_and_stdin(run: Run, model: Path, files: Path) -> None:
    Path("prompts.txt").write_text("One\n\n  Two \n")
    Path("prompts.jsonl").write_text('{"prompt": "One", "id": 7}\n{"prompt": "Two"}\n')
    words = ["generate", model, "--max-new-tokens", 4, "--json"]
    direct = run(*words, "One", "Two").records
    assert [record["prompt"] for record in direct] == ["One", "Two"]
    assert run(*words, "--input", "prompts.txt").records == direct
    assert run(*words, "--input", "prompts.jsonl").records == direct
    assert run(*words, "--input", "-", stdin="One\nTwo").records == direct
    assert run(*words, stdin='One\n{"prompt": "Two"}\n').records == direct
    assert run("generate", model, "--max-new-tokens", 4, "One", "--json", "Two").records == direct
    (record,) = run(*words, "--", "-x").records
    assert record["prompt"] == "-x"


def test_every_prompt_may_bring_its_own_setting_and_messages(
    run: Run, model: Path, files: Path, loaded: Loaded
) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    lines = [
        {"prompt": "One", "knobs": {"math": -1}},
        {"prompt": turns, "knobs": "math=0.5,concise=1"},
        {"prompt": "Three", "knobs": {}},
        {"prompt": "Four"},
    ]
    words = ["--knob", KNOB, "--knob", OTHER, "--set", "math=2", "--max-new-tokens", 6, "--json"]
    records = run("generate", model, *words, stdin="\n".join(map(json.dumps, lines))).records
    math, concise = Knob.load(KNOB), Knob.load(OTHER)
    doses: list[dict[Knob, float]] = [{math: -1}, {math: 0.5, concise: 1}, {}, {math: 2}]
    expected = [answers(loaded, [line["prompt"]], dose)[0] for line, dose in zip(lines, doses, strict=True)]
    assert [record["text"] for record in records] == expected
    assert [record["prompt"] for record in records] == ["One", turns, "Three", "Four"]
    settings = [{"math": -1}, {"math": 0.5, "concise": 1}, {}, {"math": 2}]
    assert [record["knobs"] for record in records] == settings


def test_a_panel_stands_where_it_says_and_may_be_turned(run: Run, model: Path, files: Path) -> None:
    save_panel("panel.json", {"m": (KNOB, 0.25), "c": (OTHER, -1.0)})
    words = ["generate", model, "Hi", "--knob", "panel.json", "--max-new-tokens", 2, "--json"]
    assert run(*words).records[0]["knobs"] == load_panel("panel.json").setting == {"m": 0.25, "c": -1.0}
    assert run(*words, "--knob", KNOB, "--set", "m=1,math=2").records[0]["knobs"] == {"m": 1.0, "math": 2.0}
    assert "names its knobs itself" in run("generate", model, "Hi", "--knob", "x=panel.json").err
    shown = run("inspect", "panel.json", "--json").records[0]["knobs"]
    assert [(row["name"], row["strength"], row["kind"]) for row in shown] == [
        ("m", 0.25, "steering"),
        ("c", -1.0, "steering"),
    ]
    assert run("inspect", "panel.json").out.splitlines()[0] == "panel.json, a panel"


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(run: Run, model: Path, files: Path) -> None:
    Path(KNOB).rename("a=b.safetensors")
    (record,) = run("generate", model, "Hi", "--knob", "a=b.safetensors", "--max-new-tokens", 2, "--json").records
    assert record["knobs"] == {"math": 1.0}


def test_a_single_answer_is_streamed_and_several_stand_under_their_prompts(
    run: Run, model: Path, files: Path, loaded: Loaded
) -> None:
    one, two = answers(loaded, ["One", "Two"])
    assert run("generate", model, "One", "--max-new-tokens", 6).out == harmless(f"{one}\n")
    out = run("generate", model, "One", "Two", "--max-new-tokens", 6).out
    assert out == harmless(f"> One\n{one}\n\n> Two\n{two}\n\n")


def test_sampling_repeats_with_the_seed_and_differs_between_rounds(run: Run, model: Path, files: Path) -> None:
    words = ["generate", model, *["Same"] * 8, "--temperature", 2, "--batch-size", 1, "--max-new-tokens", 8, "--json"]
    first, again, other = ([record["text"] for record in run(*words, "--seed", seed).records] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[:4] != first[4:]  # a round of four batches has a seed of its own
    assert [r["text"] for r in run(*words, "--seed", 1, "--top-p", 0.01).records] != first


def test_a_strength_outside_the_safe_range_is_warned_of_once_on_stderr(run: Run, model: Path, files: Path) -> None:
    Knob.load(KNOB).with_(tuning={"safe_range": [-0.5, 1.25]}).save("tuned.safetensors")
    words = ["generate", model, "One", "Two", "--knob", "tuned.safetensors", "--max-new-tokens", 2, "--json"]
    out = run(*words, "--strength", "1.5")
    assert len(out.records) == 2
    assert out.err.startswith("warning: Strength 1.5 of 'math' lies outside its safe range, -0.5 to 1.25")
    assert len(out.err.splitlines()) == 1
    assert run(*words, "--strength", "1.25").err == ""
    assert run(*words).err == ""


def test_a_knob_of_another_model_is_refused(run: Run, model: Path, plain_model: Path, files: Path) -> None:
    wide = save_model(files / "wide", hidden_size=64)
    run("learn", model, "pairs.jsonl", "--out", "a.safetensors")
    for words in (["generate", wide, "Hi"], ["chat", wide]):
        out = run(*words, "--knob", "a.safetensors", "--no-strict")
        assert out.status == 2
        assert "hidden size 32" in out.err
        assert "hidden size 64" in out.err
    # The width fits, the template does not: refused unless the user insists.
    words = ["generate", plain_model, "Hi", "--knob", "a.safetensors", "--max-new-tokens", 2, "--json"]
    out = run(*words)
    assert (out.status, out.out) == (2, "")
    assert "another chat template" in out.err
    assert "pass --no-strict" in out.err
    out = run(*words, "--no-strict")
    assert out.status == 0
    assert len(out.records) == 1
    assert "warning: Knob 'a' was learned with another chat template" in out.err
    words = ["tune", plain_model, "--knob", "a.safetensors", "--pairs", "held_out.jsonl", "--out", "b.safetensors"]
    assert "another chat template" in run(*words).err


# Chat


def chat(run: Run, model: Path, lines: Sequence[str], *words: object, tokens: int = 5) -> Output:
    return run("chat", model, "--max-new-tokens", tokens, *words, stdin="\n".join(lines))


def test_a_chat_reads_the_whole_conversation_again_under_the_new_setting(
    run: Run, model: Path, files: Path, loaded: Loaded
) -> None:
    out = chat(run, model, ["Hello", "/knob math=-0.5", "And now?"], "--knob", KNOB, "--json")
    assert out.status == 0, out.err
    first, second = out.records
    knob, hello = Knob.load(KNOB), Message("user", "Hello")
    assert first["text"] == answers(loaded, ["Hello"], {knob: 1.0}, tokens=5)[0]
    told = [hello, Message("assistant", first["text"]), Message("user", "And now?")]
    assert second["prompt"] == [{"role": m.role, "content": m.content} for m in told]
    assert second["text"] == answers(loaded, [told], {knob: -0.5}, tokens=5)[0]
    assert [first["knobs"], second["knobs"]] == [{"math": 1.0}, {"math": -0.5}]
    assert "read again under the new setting; nothing computed under the old one is reused" in out.err


def test_a_chat_obeys_its_commands(run: Run, model: Path, files: Path) -> None:
    lines = ["/system Be kind.", "One", "Two", "/undo", "Three", "/reset", "/knob concise=2", "Four", "/system", "Five"]
    lines += ["/quit", "Never"]
    out = chat(run, model, lines, "--knob", KNOB, "--knob", OTHER, "--set", "math=1", "--json")
    said = [[turn["content"] for turn in record["prompt"] if turn["role"] != "assistant"] for record in out.records]
    kind = "Be kind."
    assert said == [[kind, "One"], [kind, "One", "Two"], [kind, "One", "Three"], [kind, "Four"], ["Four", "Five"]]
    assert out.records[-1]["knobs"] == {"math": 1.0, "concise": 2.0}
    assert "Forgotten: Two" in out.err
    assert "read again" not in out.err  # nothing had been read when the knob was turned


def test_a_chat_shows_its_knobs_and_commands_and_survives_mistakes(run: Run, model: Path, files: Path) -> None:
    Knob.load(KNOB).with_(tuning={"safe_range": [-0.5, 1.0]}).save(KNOB)
    lines = ["/knob", "/kob", "/knob mth=1", "/knob math=x", "/knob math=nan", "/knob math=3", "/undo", "/help", "Hi"]
    out = chat(run, model, lines, "--knob", KNOB)
    assert out.status == 0
    assert re.search(r"^math +1 +-0.5 to 1 \(no guardrail\) +1/last$", out.err, re.MULTILINE)
    for message in (
        "Did you mean '/knob'?",
        "Unknown knob 'mth'. Known: math. Did you mean 'math'?",
        "must be a number; got 'x'",
        "must be finite",
        "warning: Strength 3 of 'math' lies outside its safe range",
        "There is nothing to undo.",
        "/knob [math=0.5]",
    ):
        assert message in out.err
    assert len(out.out.splitlines()) >= 1  # the answer to Hi, and nothing else of all this
    assert "math" not in out.out


def test_an_answer_keeps_to_the_window_of_the_model(run: Run, model: Path, files: Path) -> None:
    out = chat(run, model, ["x" * 230, "y" * 300, "/reset", "Hi"], "--json", tokens=40)
    long, short = out.records  # the window has 256 tokens
    assert len(long["prompt"]) == len(short["prompt"]) == 1
    assert "window of 256 tokens is nearly full" in out.err
    assert re.search(r"has \d+ tokens, and this model reads at most 256", out.err)


def interrupted(*args: Any, on_text: Callable[[str], None] | None = None, **options: Any) -> Any:
    if on_text is None:  # the rehearsal before the first message
        return generate(*args, **options)
    on_text("Hel")
    raise KeyboardInterrupt


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    model: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("trimtab.generate")
    calls: list[list[Message]] = []

    def once(*args: Any, **options: Any) -> Any:
        calls.append(args[2][0])
        return interrupted(*args, **options) if len(calls) == 2 else generate(*args, **options)

    monkeypatch.setattr(module, "generate", once)
    monkeypatch.setattr(sys, "stdin", FakeTerminal("Hello\nAgain\n"))
    assert main(["chat", str(model), "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hel\n")
    assert "(stopped)" in err
    assert [message.content for message in calls[2]] == ["Hello", "Hel", "Again"]


def test_ctrl_c_in_a_piped_chat_ends_it(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("trimtab.generate"), "generate", interrupted)
    assert chat(run, model, ["Hello", "Again"]).status == 130


def test_ctrl_c_at_the_prompt_of_a_chat_does_not_leave(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Impatient(FakeTerminal):
        pressed = False

        def readline(self, size: int = -1, /) -> str:
            if not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt
            return super().readline(size)

    monkeypatch.setattr(sys, "stdin", Impatient("Hello\n"))
    assert main(["chat", str(model), "--max-new-tokens", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "Ctrl-D or /quit leaves." in err


# Inspect and demo


def test_inspect_shows_a_knob_whose_tables_make_no_sense(run: Run, files: Path) -> None:
    nonsense: dict[str, Any] = {
        "selection": {"rule": ["\x1b[2J"], "table": [["0/last\x1b[31m", "high"], 3, ["1/last"], [None, None]]},
        "sites": [],
    }
    tuning = {"table": [{"site": 3}, 4], "guardrails": "facts", "dose_response": {}, "base": None, "task": "\x1b]0;x"}
    Knob.load(KNOB).with_(diagnostics=nonsense, tuning=tuning).save("odd.safetensors")
    out = run("inspect", "odd.safetensors")
    assert out.status == 0
    assert "\x1b" not in out.out
    assert sites_text({}) is None
    assert tuning_text(None, Site(0, "last"), "all", 1.0) is None
    for row in ({"site": "0/last", "gain": 1.0}, {"site": "0/last", "gain": 1.0, "where": "all"}):  # old rows lack it
        assert "*  0/last" in (tuning_text({"table": [row]}, Site(0, "last"), "all", 1.0) or "")


def test_the_demo_prints_its_report_or_its_summary(run: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"model": "prefworld", "seed": 3, "results": {}}

    def told(out: Path, *, seed: int, progress: Callable[[str], None]) -> dict[str, Any]:
        progress("learning")
        return {**report, "seed": seed, "folder": str(out)}

    module = importlib.import_module("trimtab.demo")
    monkeypatch.setattr(module, "run", told)
    monkeypatch.setattr(module, "summary", lambda report: f"seed {report['seed']}")
    out = run("demo", "--json", "--out", "here", "--seed", 3)
    assert out.records == [{**report, "folder": "here"}]
    assert out.err == "learning\n"
    assert run("demo").out == "seed 0\n\nReport and plots are in out/demo.\n"


# Mistakes


MISTAKES = [
    (
        "lern a b",
        f"Unknown verb 'lern'. Known: {', '.join(sorted(VERBS))}. Did you mean 'learn'?",
    ),
    ("learn MODEL pairs.jsonl", "required: --out. See trimtab learn --help."),
    ("learn", "required: --out"),
    ("inspect", "required: FILE. See trimtab inspect --help."),
    ("learn MODEL pairs.jsonl --out x --methd palrs", "Unknown option of trimtab learn '--methd'. "),
    ("learn MODEL pairs.jsonl --out x --methd palrs", "Did you mean '--method'?"),
    ("learn MODEL pairs.jsonl --out x --meth palrs", "Unknown option of trimtab learn '--meth'. "),
    ("learn MODEL pairs.jsonl more --out x", "trimtab learn has no place for 'more'"),
    ("learn MODEL pairs.jsonl --out x --method diffmeans", "Unknown method 'diffmeans'. "),
    ("learn MODEL pairs.jsonl --out x --method diffmeans", "Did you mean 'diffmean'?"),
    ("learn MODEL pairs.jsonl --out x --selection best", "Unknown selection 'best'. "),
    ("learn MODEL pairs.jsonl --out x --option centre=1", "Unknown option of method palrs 'centre'. "),
    ("learn MODEL pairs.jsonl --out x --option centre", "--option takes name=value; got 'centre'."),
    ("learn MODEL pairs.jsonl --out x --layers a", "expected layers as in 2,4-6; got 'a'"),
    ("learn MODEL pairs.jsonl --out x --layers 3-1", "a range of layers goes upwards"),
    ("learn MODEL pairs.jsonl --out x --layers ,", "the list is empty"),
    ("learn MODEL pairs.jsonl --out x --layers 7", "There is no layer 7"),
    ("learn MODEL pairs.jsonl --out x --layers 0-999999999999", "no model has so many layers; got '0-999999999999'"),
    ("learn MODEL pairs.jsonl --out x --seed 99999999999999999999", "The seed is a whole number from 0 to 2**63 - 1"),
    ("learn MODEL pairs.jsonl --out x --layers 1 --first 0.5", "--layers names the candidates; leave --first and"),
    ("learn MODEL pairs.jsonl --out x --out y", "--out is given 2 times, and takes one value. Give it once."),
    ("generate MODEL Hi --knob KNOB --set math=1 --set=math=0", "--set is given 2 times"),
    ("generate MODEL --input /dev/null", "'/dev/null' is a pipe or a device and no regular file"),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --grader foo", "Unknown grader 'foo'."),
    (
        "tune MODEL --knob KNOB --pairs held_out.jsonl --out x --max-new-tokens 0",
        "--max-new-tokens is 1 or more; got 0.",
    ),
    ("chat MODEL --max-new-tokens 0", "--max-new-tokens is a whole number, 1 or more; got 0."),
    ("chat MODEL --knob KNOB --strength 1e300", "is too large for"),
    ("chat MODEL --knob KNOB --where thinking", "Pass --thinking OPENING CLOSING, or another where."),
    ("demo --out ", "--out is empty; pass the name of a folder."),
    ("learn MODEL pairs.jsonl --out x --duplicates some", "duplicates must be 'error', 'drop' or 'keep'"),
    ("learn MODEL none.jsonl --out x", "There is no file 'none.jsonl'"),
    ("learn MODEL . --out x", "'.' is a folder; expected a JSON or JSONL file"),
    ("learn MODEL bad.jsonl --out x", "Line 2 is not JSON"),
    ("learn MODEL half.jsonl --out x", "Line 1 has no rejected; it has prompt, chosen."),
    ("learn MODEL empty.jsonl --out x", "There are no pairs"),
    ("learn MODEL prefworld:maths --out x", "Unknown family of PrefWorld 'maths'. "),
    ("learn MODEL prefworld:math:0 --out x", "is written prefworld:math or prefworld:math:200"),
    ("learn MODEL prefworld:facts --out x", "'facts' have one side only"),
    ("learn MODEL pairs.jsonl --out .", "--out '.' is a folder"),
    ("learn MODEL pairs.jsonl --out pairs.jsonl", "--out 'pairs.jsonl' exists and is no knob, so it is not replaced."),
    ("learn MODEL pairs.jsonl --out /proc/x", "--out '/proc/x' cannot be written"),
    ("learn MODEL pairs.jsonl --out x --name a,b", "--name takes 1 to 100 printable characters"),
    ("learn MODEL prefworld:math:99999999 --out x", "PrefWorld draws at most 10000 at a time"),
    ("learn MODEL half.jsonl --out x", "half.jsonl: Line 1"),
    ("learn MODEL null.jsonl --out x", "Line 1: rejected is null; it must be text or a list of messages."),
    ("learn MODEL surrogate.jsonl --out x", "Line 1 holds half of a surrogate pair"),
    ("learn MODEL pairs.jsonl --out pairs.jsonl/x", "'pairs.jsonl' is a file"),
    ("learn pairs.jsonl pairs.jsonl --out x", "'pairs.jsonl' is a file; a model is loaded from its folder."),
    ("learn ./none pairs.jsonl --out x", "There is no folder './none'"),
    ("learn MODEL pairs.jsonl --out x --device tpu9", "Cannot use --device tpu9: Invalid device"),
    ("learn MODEL pairs.jsonl --out x --dtype int3", "Unknown dtype 'int3'. Known: auto"),
    ("tune MODEL --knob none --pairs held_out.jsonl --out x", "There is no file 'none'; expected a knob file."),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --gains 1,b", "expected numbers as in 0.2,0.5"),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --gains -1,2", "Gains must be positive numbers"),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --gains=-1,2", "Gains must be positive numbers"),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --task task.jsonl:exact", "Unknown grader 'exact'. "),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --task bad.jsonl", "bad.jsonl: Line 2 is not JSON"),
    (
        "tune MODEL --knob KNOB --pairs held_out.jsonl --out x --task KNOB",
        "it has the suffix '.safetensors'.",
    ),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --task task.jsonl:exact_answer", "must hold a number"),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --guardrail none", "There is no file 'none'"),
    (
        "tune MODEL --knob KNOB --pairs held_out.jsonl --out x --budget nan",
        "numbers, finite and not negative",
    ),
    (
        "tune MODEL --knob KNOB --pairs held_out.jsonl --out x --finalists 0",
        "a whole number, 1 or more; got 0.",
    ),
    (
        "tune MODEL --knob KNOB --pairs held_out.jsonl --out x --task blank.jsonl",
        "blank.jsonl: Line 1: the answer",
    ),
    ("generate MODEL Hi --knob KNOB --strength nan", "The strength must be finite; got 'nan'."),
    ("generate MODEL Hi --knob KNOB --strength much", "The strength must be a number; got 'much'."),
    ("generate MODEL Hi --knob KNOB --set mth=1", "Unknown knob 'mth'. Known: math. Did you mean 'math'?"),
    ("generate MODEL Hi --knob KNOB --set math", "is written name=strength"),
    ("generate MODEL Hi --knob KNOB --set math=1 --strength 1", "not allowed with argument"),
    ("generate MODEL Hi --knob KNOB --knob KNOB", "Two knobs are named 'math'"),
    ("generate MODEL Hi --knob =KNOB", "--knob takes FILE or NAME=FILE"),
    ("generate MODEL Hi --strength 1", "--strength needs a knob. Add --knob FILE."),
    ("generate MODEL Hi --set math=1", "--set needs a knob. Add --knob FILE."),
    ("generate MODEL Hi --knob .", "'.' is a folder; expected a knob file."),
    ("generate MODEL Hi --knob a=", "The name of a file is empty; expected a knob file."),
    ("generate MODEL Hi --seed 99999999999999999999", "The seed is a whole number from 0 to 2**63 - 1"),
    ("generate MODEL Hi --knob pairs.jsonl", "it is not a whole safetensors file"),
    ("generate MODEL Hi --knob KNOB --where here", "Unknown where 'here'. "),
    ("generate MODEL Hi --knob KNOB --where thinking", "Pass --thinking OPENING CLOSING, or another where."),
    ("generate MODEL Hi --thinking <a> </a>", "Thinking markers begin and end with added tokens"),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --where thinking", "Choose other tokens to steer."),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --task list.jsonl", "list.jsonl: Line 1 needs a prompt"),
    ("tune MODEL --knob KNOB --pairs held_out.jsonl --out x --task twice.jsonl", "has two fields 'answer'"),
    ("generate MODEL Hi --where here", "Unknown where 'here'. "),
    ("chat MODEL --knob KNOB --where here", "Unknown where 'here'. "),
    ("learn MODEL pairs.jsonl --out x --option equal_weight=False", "is true or false; got 'False'."),
    ("learn MODEL pairs.jsonl --out x --method random --option seed=1.5", "is a whole number; got 1.5."),
    ("generate MODEL Hi --max-new-tokens many", "--max-new-tokens: invalid int value: 'many'"),
    ("generate MODEL Hi --max-new-tokens 0", "--max-new-tokens is a whole number, 1 or more; got 0."),
    ("generate MODEL Hi --batch-size 0", "--batch-size is 1 or more; got 0."),
    ("generate MODEL Hi --temperature -1", "The temperature is 0 (greedy) or more"),
    ("generate MODEL", "There is no prompt: stdin holds no line with text."),
    ("generate MODEL --input empty.jsonl", "There is no prompt: empty.jsonl holds no line with text."),
    ("generate MODEL --input none.txt", "There is no file 'none.txt'"),
    ("generate MODEL --input .", "'.' is a folder"),
    ("generate MODEL --input KNOB", "is not UTF-8 text"),
    ("generate MODEL Hi --input task.jsonl", "Pass prompts as arguments or with --input, not both."),
    ("generate MODEL --input bad.jsonl", "bad.jsonl, line 1 has no prompt; it has nothing_useful."),
    ("generate MODEL \udcff", "Prompt 1 is not Unicode text"),
    ("inspect panel.json", "'panel.json' is not a panel; a panel is"),
    ("inspect none", "There is no file 'none'; expected a knob file."),
    ("demo --out KNOB", "is a file; pass a folder."),
    ("--jason", "Unrecognized arguments: --jason. See trimtab --help."),
    ("-x", "See trimtab --help."),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[f"{line} -> {m[:30]}" for line, m in MISTAKES])
def test_a_mistake_is_one_line_on_stderr(run: Run, model: Path, files: Path, line: str, message: str) -> None:
    Path("bad.jsonl").write_text('{"nothing_useful": 1}\n{"prompt": \n')
    Path("half.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    Path("empty.jsonl").write_text("\n\n")
    Path("null.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": null}\n')
    Path("surrogate.jsonl").write_text('{"prompt": "a \\ud83d", "chosen": "b", "rejected": "c"}\n')
    Path("blank.jsonl").write_text('{"prompt": "a", "answer": " "}\n')
    Path("list.jsonl").write_text('{"prompt": "a", "answer": ["b"]}\n')
    Path("twice.jsonl").write_text('{"prompt": "a", "answer": "b", "answer": "c"}\n')
    Path("panel.json").write_text("{}")
    if "learn" in line and "bad" in line:  # there the first line must be a pair
        Path("bad.jsonl").write_text(Path("pairs.jsonl").read_text().splitlines()[0] + '\n{"prompt": \n')
    words = [word.replace("MODEL", str(model)).replace("KNOB", KNOB) for word in line.split(" ")]
    out = run(*words)
    assert out.status == 2
    assert out.out == ""
    last = out.err.splitlines()[-1]
    assert last.startswith("trimtab: ")
    assert message in last
    assert not Path("x").exists()
    warnings = [text for text in out.err.splitlines()[:-1] if not text.startswith("warning: ")]
    assert not warnings, out.err  # no traceback, no usage


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "stdin, line 2 is not JSON"),
        ("{x} is a set", "A prompt that starts with { is written"),
        ('{"text": "a"}', "stdin, line 2 has no prompt; it has text."),
        ("{}", "stdin, line 2 has no prompt; it has no fields."),
        ('{"prompt": 3}', "stdin, line 2 is a number; it must be text or a list of messages."),
        ('{"prompt": []}', "stdin, line 2: a prompt is text or a list of messages; got []."),
        ('{"prompt": [{"role": "user"}]}', "stdin, line 2: a message is {"),
        ('{"prompt": "a\\ud800"}', "stdin, line 2 is not Unicode text"),
        ('{"prompt": "a", "knobs": 1}', 'stdin, line 2, knobs: a setting is written {"math": 0.8} or "math=0.8"'),
        ('{"prompt": "a", "knobs": {"math": "x"}}', "stdin, line 2, knobs: The strength of 'math' must be a number"),
        ('{"prompt": "a", "knobs": {"math": NaN}}', "stdin, line 2 is not JSON: NaN is not a finite number"),
        ('{"prompt": "a", "knobs": {"mth": 1}}', "stdin, line 2: Unknown knob 'mth'. Known: math."),
        ('{"prompt": "a", "knobs": "math"}', "stdin, line 2, knobs: A knob setting is written"),
        ('{"prompt": "a", "knob": {"math": 1}}', "stdin, line 2 has a field 'knob'"),
        ('{"prompt": "a", "strength": 0.5}', "stdin, line 2 has a field 'strength', which a line cannot set."),
        ('{"prompt": "a", "temperature": 1}', "stdin, line 2 has a field 'temperature', which a line cannot set."),
        ('{"prompt": "a", "prompt": "b"}', "stdin, line 2 is not JSON: it has two fields 'prompt' in one object"),
        ('{"prompt": "a", "knobs": {"math": 1, "math": 0}}', "it has two fields 'math' in one object"),
    ],
)
def test_a_bad_line_of_prompts_is_named_before_anything_is_answered(
    run: Run, model: Path, files: Path, line: str, message: str
) -> None:
    out = run("generate", model, "--knob", KNOB, "--json", stdin=f"Good\n{line}\n")
    assert (out.status, out.out) == (2, "")
    assert message in out.err
    assert len(out.err.splitlines()) == 1


def test_numbers_below_zero_are_values_and_no_options(run: Run, model: Path, files: Path) -> None:
    words = ["generate", model, "Hi", "--knob", KNOB, "--max-new-tokens", 1, "--json", "--strength"]
    assert run(*words, "-1e-3").records[0]["knobs"] == {"math": -0.001}
    out = run(
        "tune", model, "--knob", KNOB, "--pairs", "held_out.jsonl", "--out", "x", "--strengths", "-1,1", "--gains", 0.1
    )
    assert out.status == 0, out.err
    assert [row["strength"] for row in (Knob.load("x").tuning or {})["dose_response"]] == [-1, 0, 1]


def test_an_exit_of_the_work_itself_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object) -> NoReturn:
        sys.exit(3)

    monkeypatch.setattr(VERBS["inspect"], "run", leave)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "x"])
    assert stop.value.code == 3


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr", "stderr on a full disk"])
def test_work_goes_on_without_the_streams_it_can_do_without(closed: str, model: Path, files: Path) -> None:
    if closed == "stdin":
        command, more = f"generate {model} --json", "<&-"
    else:  # learning from one pair is warned of
        Path("one.jsonl").write_text(Path("pairs.jsonl").read_text().splitlines()[0])
        how = {"stdout": ">&-", "stderr": "2>&-", "stderr on a full disk": "2>/dev/full"}
        command, more = f"learn {model} one.jsonl --out x", how[closed]
    program = f"{sys.executable} -c 'import sys; from trimtab.cli import main; sys.exit(main(sys.argv[1:]))'"
    done = subprocess.run(f"{program} {command} {more}", shell=True, capture_output=True, text=True, check=False)
    if closed == "stdin":
        assert (done.returncode, "There is no prompt" in done.stderr) == (2, True)
    else:
        assert done.returncode == 0
        Knob.load("x")


def test_markers_of_thoughts_are_given_by_their_option(run: Run, model: Path, files: Path) -> None:
    words = ["generate", model, "Hi", "--knob", KNOB, "--max-new-tokens", 2, "--json", "--where", "answer"]
    out = run(*words, "--thinking", "<|system|>", "<|user|>")
    assert out.status == 0, out.err
    assert out.records == run(*words[:-2], "--where", "completion").records  # nothing is ever thought


def test_a_strength_that_drowns_the_text_is_warned_of_where_nothing_was_tuned(
    run: Run, model: Path, files: Path
) -> None:
    Knob.load(KNOB).with_(name="raw", gain=0.125).save("raw.safetensors")
    words = ["generate", model, "Hi", "--knob", "raw.safetensors", "--max-new-tokens", 1, "--strength"]
    assert "adds 1.25e+29 times the mean residual norm; answers are likely to break" in run(*words, "1e30").err
    assert not run(*words, 1).err
    out = chat(run, model, ["/knob raw=-80"], "--knob", "raw.safetensors")
    assert "Strength -80 of 'raw' adds 10 times the mean residual norm" in out.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--help"], "Cannot write to stdout: No space left on device."),
        (["inspect", "--help"], "Cannot write to stdout: No space left on device."),
        (["check", "llama"], "Cannot write to stdout: No space left on device."),
        (["inspect", "KNOB"], "Cannot write to stdout: No space left on device."),
        (["inspect", "none"], "There is no file 'none'; expected a knob file."),
    ],
)
def test_a_full_disk_under_stdout_is_one_line(words: list[str], message: str, files: Path) -> None:
    program = "import sys; from trimtab.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *(word.replace("KNOB", KNOB) for word in words)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"trimtab: {message}\n")


def test_at_a_terminal_generate_without_a_prompt_does_not_wait(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", FakeTerminal("never read"))
    assert main(["generate", str(model)]) == 2
    assert "There is no prompt. Pass one as an argument" in capsys.readouterr().err


@pytest.mark.quick
def test_without_a_verb_the_help_is_shown_as_a_mistake(run: Run) -> None:
    out = run()
    assert (out.status, out.out) == (2, "")
    assert all(re.search(rf"^ +{verb}(?: |$)", out.err, re.MULTILINE) for verb in VERBS)
    assert out.err.splitlines()[-1] == f"trimtab: Pass a verb: {', '.join(VERBS)}."


@pytest.mark.quick
def test_a_file_that_cannot_be_opened_is_a_mistake_and_other_errors_are_not_hidden(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", "secret.knob")

    monkeypatch.setattr(VERBS["inspect"], "run", locked)
    out = run("inspect", KNOB)
    assert (out.status, out.err) == (2, "trimtab: Permission denied: 'secret.knob'.\n")

    def broken(*_: object) -> NoReturn:
        raise OSError("the network fell over")

    monkeypatch.setattr(VERBS["inspect"], "run", broken)
    with pytest.raises(OSError, match="the network fell over"):
        main(["inspect", KNOB])


# Manners


@pytest.mark.quick
@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_lists_json_but_for_a_server(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    # tests/test_repository.py holds that no help imports anything heavy
    assert main([verb, "--help"]) == 0
    assert ("--json" in capsys.readouterr().out) == (verb != "serve")


def test_the_help_states_the_defaults_and_names_of_the_functions() -> None:
    functions = {
        "pairs": contrast_pairs,
        "learn": learn,
        "tune": tune,
        "compose": compose,
        "eval": evaluate,
        "generate": generate,
        "chat": generate,
    }
    stated = 0
    for verb, function in functions.items():
        parser = Parser(prog=verb, description="")
        VERBS[verb].add_options(parser)
        parameters = inspect.signature(function).parameters
        for name, text in options(parser).items():
            match = re.search(r"\(default ([^):]+)", text)
            if match is None or name not in parameters or (verb, name) == ("chat", "where"):
                continue
            default = parameters[name].default
            shown = ",".join(f"{x:g}" for x in default) if isinstance(default, tuple) else str(default)
            assert match[1] == shown, f"trimtab {verb} --help says {match[1]} of {name}, the function {shown}"
            stated += 1
    assert stated > 15
    parser = Parser(prog="learn", description="")
    VERBS["learn"].add_options(parser)
    assert all(method in options(parser)["method"] for method in METHODS)
    for verb in ("tune", "compose", "eval"):
        parser = Parser(prog=verb, description="")
        VERBS[verb].add_options(parser)
        assert all(grader in options(parser)["grader"] for grader in GRADERS)


def options(parser: ArgumentParser) -> dict[str, str]:
    return {action.dest: action.help or "" for action in parser._actions}  # pyright: ignore[reportPrivateUsage]


@pytest.mark.quick
def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"trimtab \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_transformers_is_quiet_during_a_verb_and_as_it_was_afterwards(run: Run, model: Path, files: Path) -> None:
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        out = run("generate", model, "Hi", "--max-new-tokens", 2)
        assert out.err == ""
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        assert run("generate", files / "none", "Hi").status == 2
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


@pytest.mark.quick
def test_an_interrupt_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(VERBS["inspect"], "run", interrupt)
    out = run("inspect", "x")
    assert (out.status, out.out, out.err) == (130, "", "\ntrimtab: interrupted\n")


@pytest.mark.quick
def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import sys; from trimtab.cli import VERBS, main; input()\n"
        "VERBS['inspect'].run = lambda args, terminal: terminal.result({}, 'x' * 100_000)\n"
        "sys.exit(main(['inspect', 'knob']))"
    )
    words = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("go on\n")  # only now, when nobody reads any more
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.quick
def test_messages_speak_of_options_and_not_of_python() -> None:
    assert as_options("Use length_match='bucket' or 'regress', or pass strict=False.") == (
        "Use --length-match bucket or regress, or pass --no-strict."
    )
    assert as_options('Pass duplicates="drop" to leave it out; x=1.') == "Pass --duplicates drop to leave it out; x=1."


@pytest.mark.quick
def test_what_a_model_says_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(json=False)
    terminal.result({}, "a\x1b[2Jb\tc\nd\u00e9\U0001f600\ud800")
    terminal.stream("\x07e")
    terminal.note("\x9bf")
    out, err = capsys.readouterr()
    assert out == "a\ufffd[2Jb\tc\nd\u00e9\U0001f600\ufffd\n\ufffde"
    assert err == "\ufffdf\n"


@pytest.mark.quick
def test_json_is_plain_ascii_on_one_line_and_streams_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(json=True)
    terminal.stream("piece")
    terminal.result({"text": "a\n\u00e9\x1b"}, "unused")
    out = capsys.readouterr().out
    assert json.loads(out) == {"text": "a\n\u00e9\x1b"}
    assert out.isascii()
    assert out.count("\n") == 1


@pytest.mark.quick
def test_warnings_are_one_line_each_and_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from trimtab.errors import TrimtabWarning

    with plain_warnings():
        for text in ("first\nline", "first\nline", "second"):
            warnings.warn(text, TrimtabWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: first line\nwarning: second\n"


@pytest.mark.quick
def test_progress_is_shown_on_terminals_only_and_never_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(json=False)
    with terminal.working("Learning") as progress:
        progress(1, 3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", screen := FakeTerminal())
    with terminal.working("Learning", counted=True) as progress:
        progress(2, 3)
        print("a result")
        terminal.note("a remark")
    assert capsys.readouterr().out == "a result\n"
    assert "Learning" in screen.getvalue()
    assert "2/3" in screen.getvalue()
    assert "a remark" in screen.getvalue()
    monkeypatch.setattr(sys, "stdout", FakeTerminal())
    before = screen.getvalue()
    with terminal.working("Generating", counted=True, printing=True):
        pass
    assert screen.getvalue() == before


def test_torch_threads_and_random_state_are_left_alone(run: Run, model: Path, files: Path) -> None:
    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    run("generate", model, "Hi", "--temperature", 1, "--max-new-tokens", 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.quick
def test_an_interrupt_while_the_command_line_is_loaded_ends_without_a_traceback() -> None:
    code = """
import sys
class Impatient:
    def find_spec(self, name, path=None, target=None):
        if name == 'trimtab.cli.learn':
            raise KeyboardInterrupt
sys.meta_path.insert(0, Impatient())
from trimtab.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ntrimtab: interrupted\n")


@pytest.mark.quick
def test_a_server_refuses_json_in_words_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "prefworld", "--json"]) == 2
    assert "A server prints its log, and no JSON" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize("option", ["--rate", "--concurrency"])
def test_a_limit_of_nothing_is_refused_by_its_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "prefworld", option, "0"]) == 2
    assert f"{option} is a number above 0; got 0. Leave it out" in capsys.readouterr().err
