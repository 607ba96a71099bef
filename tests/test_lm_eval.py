"""The lm-evaluation-harness under knobs, item by item against our own runner and against the harness's plain model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pico
import trimtab
from trimtab.artifact import Knob, save_panel
from trimtab.errors import KnobError, OptionError, TrimtabWarning, UnknownName
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import load_task, run_task
from trimtab.render import Renderer
from trimtab.types import Message, Where

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'lm-eval[hf]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'lm-eval[hf]')")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from trimtab.evals import lm_eval as harness
from trimtab.evals.lm_eval import TrimtabLM

# Prompt, what is graded as right (the base model says the second, a turned knob another), and two answers to compare.
SUMS = [
    ("Ana has 12 pens and buys 13 more. How many pens does Ana have?", "25", "12 + 13 = 25. The answer is 25.", "31"),
    ("Gus has 41 bricks and uses up 15 of them. How many bricks are left?", "That makes 30.", "41 - 15 = 26.", "30"),
    ("Mia has 40 coins and loses 17. How many coins are left?", "23", "The answer is 23.", "40 + 17 = 57."),
    ("Tom bakes 3 trays of 8 rolls. How many rolls are there?", "That makes 14.", "3 * 8 = 24.", "That makes 24, Tom."),
    ("Write the word stone.", "Understood.", "stone", "The word is stone, and nothing else."),
]
TOKENS = 24


@pytest.fixture(scope="module")
def prefworld() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return trimtab.load("prefworld")


@pytest.fixture(scope="module")
def knob() -> Knob:
    return pico.knob(2, width=192, norm=24.0, seed=1, name="some")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prefworld: Any, knob: Knob) -> Path:
    """A folder with a knob for every `where`, and the same questions as a harness's task and as ours."""
    path = tmp_path_factory.mktemp("harness")
    for where in ("all", "prompt", "context", "completion"):
        knob.with_(where=where).save(path / f"{where}.safetensors")
    closing = "<|end|>"  # part of what a model says, and so of what our own runner scores
    fields = ("prompt", "answer", "chosen", "rejected")
    ours = [dict(zip(fields, item, strict=True)) for item in SUMS]
    theirs = [{**item, "choices": [item["chosen"] + closing, item["rejected"] + closing]} for item in ours]
    for name, items in (("ours", ours), ("theirs", theirs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "theirs.jsonl")}, "cache_dir": str(path / "cache")},
        "test_split": "test",
        "doc_to_text": "prompt",
    }
    answers = {
        **shared,
        "task": "sums_answer",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "max_gen_toks": TOKENS},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choices = {
        **shared,
        "task": "sums_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (answers, choices):
        (path / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # asks the machine for seconds


def evaluated(model: Any, folder: Path, **options: Any) -> dict[str, list[tuple[Any, float]]]:
    """What the harness found per task and item: the answer, or log-likelihoods of the choices, and the score."""
    results = simple_evaluate(
        model=model,
        tasks=["sums_answer", "sums_choice"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        **options,
    )
    assert results is not None
    found: dict[str, list[tuple[Any, float]]] = {}
    for task, metric in (("sums_answer", "exact_match"), ("sums_choice", "acc")):
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        found[task] = [(sample["filtered_resps"], float(sample[metric])) for sample in samples]
        assert len(samples) == len(SUMS)
    return found


@pytest.mark.parametrize(
    ("where", "strength"),
    [("all", 0), ("all", 1), ("all", -1), ("prompt", 1), ("context", -1), ("completion", 1)],
)
def test_answers_and_log_likelihoods_are_those_of_our_own_runner_item_by_item(
    prefworld: Any, folder: Path, where: str, strength: float
) -> None:
    model, tokenizer = prefworld
    knob = Knob.load(folder / f"{where}.safetensors")
    task, pairs = load_task(folder / "ours.jsonl", max_new_tokens=TOKENS), trimtab.Pairs.load(folder / "ours.jsonl")
    ours, base = (run_task(model, tokenizer, task, {knob: s}) for s in (strength, 0))
    margins, plain = pair_margins(model, tokenizer, pairs, [{knob: strength}, {}])
    args = f"pretrained=prefworld,knob={folder / where}.safetensors,strength={strength}"
    theirs = evaluated("trimtab", folder, model_args=args, batch_size=3)
    assert theirs["sums_answer"] == [([a], s) for a, s in zip(ours.answers, ours.scores, strict=True)]
    likelihoods = [[choice[0] for choice in choices] for choices, _ in theirs["sums_choice"]]
    expected = np.stack([margins.chosen, margins.rejected], 1)
    np.testing.assert_allclose(likelihoods, expected, atol=1e-4, rtol=0)
    assert [score for _, score in theirs["sums_choice"]] == [float(m > 0) for m in margins.margin]
    # What would be equal without any knob proves nothing.
    assert (ours.answers == base.answers) == (strength == 0)
    assert (abs(plain.chosen - margins.chosen).max() > 0.01) == (strength != 0)


def test_strength_0_is_the_harness_own_model(prefworld: Any, folder: Path) -> None:
    model, tokenizer = prefworld
    # Its logits_cache scores a shorter continuation by the longer one's positions where both end one text.
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=64, logits_cache=False)
    ours = TrimtabLM(pretrained="prefworld", knob=folder / "all.safetensors", strength=0, batch_size=3, max_length=64)
    assert evaluated(ours, folder) == evaluated(plain, folder)
    texts = requests("loglikelihood_rolling", [(" ".join(item[0] for item in SUMS),), ("stone",)])
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), plain.loglikelihood_rolling(texts), atol=1e-4)
    scored = requests("loglikelihood", SHARED)
    for found, expected in zip(ours.loglikelihood(scored), plain.loglikelihood(scored), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


# One text with its context ending in several places; contexts of one; a context that is empty or ends in a space.
SHARED = [
    ("the answer is", " 25 pens"),
    ("the answer is 25", " pens"),
    ("the answer", " is 25 pens"),
    ("the answer", " is 25 bricks"),
    ("the answer ", "is 25 pens"),
    ("", "the answer is"),
    ("Mia has 40 coins and loses 17. How many coins are left? 40 - 17 = 23. The", " answer is 23."),
]


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("all", {"batch_size": 4}),
        ("prompt", {"batch_size": 1}),
        ("prompt", {"batch_size": 4}),
        ("prompt", {"batch_size": 3, "logits_cache": False}),
        ("prompt", {"batch_size": "auto"}),
        ("context", {"batch_size": 4}),
        ("completion", {"batch_size": 4}),
    ],
)
def test_a_request_is_scored_as_if_it_were_alone(
    prefworld: Any, folder: Path, where: str, options: dict[str, Any]
) -> None:
    model, tokenizer = prefworld
    knob = Knob.load(folder / f"{where}.safetensors")
    lm = TrimtabLM(pretrained="prefworld", knob=folder / f"{where}.safetensors", max_batch_size=4, **options)
    for (context, continuation), (found, _) in zip(
        SHARED, lm.loglikelihood(requests("loglikelihood", SHARED)), strict=True
    ):
        whole = tokenizer.encode(context + continuation) if context else [1, *tokenizer.encode(continuation)]
        scored = len(tokenizer.encode(context.rstrip())) if context else 1
        prompt = len(tokenizer.encode(context)) if context else 1
        prompt = prompt if whole[:prompt] == tokenizer.encode(context) else scored
        with torch.no_grad(), trimtab.steer(model, {knob: 1.0}, prompt_lengths=[prompt]):
            logps = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
        expected = sum(float(logps[i - 1, whole[i]]) for i in range(scored, len(whole)))
        assert found == pytest.approx(expected, abs=1e-4), (context, continuation)


def test_a_text_scored_as_a_whole_is_all_completion_in_every_window(prefworld: Any, folder: Path) -> None:
    text = requests("loglikelihood_rolling", [(" ".join(item[0] for item in SUMS),), ("The answer is 25.",)])
    scores = {
        where: TrimtabLM(
            pretrained="prefworld", knob=folder / f"{where}.safetensors", batch_size=2, max_length=16
        ).loglikelihood_rolling(text)
        for where in ("all", "completion", "context")
    }
    base = TrimtabLM(pretrained="prefworld", batch_size=2, max_length=16).loglikelihood_rolling(text)
    np.testing.assert_allclose(scores["completion"], scores["all"], atol=1e-4)
    np.testing.assert_allclose(scores["context"], base, atol=1e-4)
    assert min(abs(np.subtract(scores["all"], base))) > 0.1


def test_a_text_longer_than_the_context_loses_its_beginning_and_not_its_prompts_end(
    prefworld: Any, folder: Path
) -> None:
    model, tokenizer = prefworld
    knob = Knob.load(folder / "prompt.safetensors")
    lm = TrimtabLM(pretrained="prefworld", knob=folder / "prompt.safetensors", max_length=12)
    with pytest.warns(TrimtabWarning, match="1 of 2 texts are longer than max_length=12"):
        (found, _), _ = lm.loglikelihood(requests("loglikelihood", [(SUMS[0][0], " The answer is"), ("a", " b")]))
    context, whole = tokenizer.encode(SUMS[0][0]), tokenizer.encode(SUMS[0][0] + " The answer is")
    kept, prompt = whole[-13:], len(context) - (len(whole) - 13)
    with torch.no_grad(), trimtab.steer(model, {knob: 1.0}, prompt_lengths=[prompt]):
        logps = model(torch.tensor([kept]), use_cache=False).logits[0].log_softmax(-1)
    assert found == pytest.approx(sum(float(logps[i - 1, kept[i]]) for i in range(prompt, 13)), abs=1e-4)
    with pytest.raises(OptionError, match="1 to 12 tokens"):
        lm.loglikelihood(requests("loglikelihood", [("a", SUMS[0][0])]))


# Chat templates


def saved(folder: Path, *, template: str, adds_bos: bool) -> str:
    """A pico model in a folder, with a chat template, and a tokenizer that may put BOS before every text."""
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", pico.BOS)]
        )
    tokenizer.save_pretrained(folder)
    pico.model(eos_token_id=pico.END, pad_token_id=pico.PAD, bos_token_id=pico.BOS).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain", "adds-bos"])
@pytest.mark.parametrize("template", [pico.TEMPLATE, pico.TEMPLATE.removeprefix("<s>")], ids=["bos", "no-bos"])
def test_a_chat_prompt_has_the_renderers_ids(tmp_path: Path, template: str, adds_bos: bool) -> None:
    lm = TrimtabLM(pretrained=saved(tmp_path, template=template, adds_bos=adds_bos))
    renderer = Renderer(lm.tokenizer)
    turns = [Message("system", "Be kind."), Message("user", "Hello?")]
    ids = renderer.prompt_ids(turns)
    text = lm.apply_chat_template([{"role": turn.role, "content": turn.content} for turn in turns])
    assert lm.tok_batch_encode([text])[0].tolist() == [ids]
    context, continuation = lm._encode_pair(text, "Hi")
    full = renderer.full(turns, "Hi")
    assert context + continuation == full.ids[: full.response_end]
    # Text that no template has rendered is the tokenizer's to begin.
    assert lm.tok_batch_encode(["Hello?"])[0][0, 0].item() == (pico.BOS if adds_bos else renderer._plain("H")[0])


def test_an_answer_ends_where_the_tokenizer_says_even_if_the_model_does_not(tmp_path: Path) -> None:
    name = saved(tmp_path, template=pico.TEMPLATE, adds_bos=False)
    lm = TrimtabLM(pretrained=name, batch_size=4)
    prompts = ["Hello?", "a", "Where is it?", "b c"]
    lm.model.generation_config.eos_token_id = None
    # A random model never ends a turn: let it end one where it would say the second token of its first answer.
    (first,) = trimtab.generate(lm.model, lm.tokenizer, prompts[:1], max_new_tokens=2)
    (likeliest,) = lm.tok_encode(first.text[1])
    with torch.no_grad():
        lm.model.lm_head.weight[pico.END] = 1.1 * lm.model.lm_head.weight[likeliest]
    ours = [answer.text for answer in trimtab.generate(lm.model, lm.tokenizer, prompts, max_new_tokens=12)]
    chats = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    asked = requests("generate_until", [(chat, {"until": [], "max_gen_toks": 12}) for chat in chats])
    assert lm.generate_until(asked) == ours
    assert len(ours[0]) < 12


@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_the_line_break_that_ends_a_template_belongs_to_the_prompt(tmp_path: Path, where: Where) -> None:
    # The harness scores it as the first token of every choice: it is in both log-likelihoods, and in no margin.
    name = saved(tmp_path, template=pico.TEMPLATE, adds_bos=False)
    knob = pico.knob(1, norm=8.0, where=where)
    knob.save(tmp_path / "knob.safetensors")
    lm = TrimtabLM(pretrained=name, knob=tmp_path / "knob.safetensors", batch_size=2)
    text = lm.apply_chat_template([{"role": "user", "content": "Hello?"}])
    choices = [("Hi.", "Go away."), ("Yes", "No")]
    asked = [(text, answer + "<|end|>\n") for pair in choices for answer in pair]
    found = [score for score, _ in lm.loglikelihood(requests("loglikelihood", asked))]
    pairs = trimtab.Pairs.from_records(
        [{"prompt": "Hello?", "chosen": chosen, "rejected": rejected} for chosen, rejected in choices]
    )
    margins, plain = pair_margins(lm.model, lm.tokenizer, pairs, [{knob: 1.0}, {}])
    assert [found[0] - found[1], found[2] - found[3]] == pytest.approx(list(margins.margin), abs=1e-4)
    assert found[0] < margins.chosen[0] - 0.1
    assert max(abs(margins.margin - plain.margin)) > 0.01


# What is asked for


def test_a_panel_sets_its_knobs_at_its_strengths(folder: Path, tmp_path: Path) -> None:
    save_panel(
        tmp_path / "panel.json", {"a": (folder / "all.safetensors", 0.5), "b": (folder / "prompt.safetensors", -1)}
    )
    lm = TrimtabLM(pretrained="prefworld", panel=tmp_path / "panel.json")
    asked = requests("loglikelihood", SHARED[:2])
    both = {Knob.load(folder / "all.safetensors"): 0.5, Knob.load(folder / "prompt.safetensors"): -1.0}
    plain = TrimtabLM(pretrained="prefworld")
    expected: list[float] = []
    for request in asked:
        length = len(plain.tok_encode(request.args[0]))
        with trimtab.steer(plain.model, both, prompt_lengths=[length]):
            expected += [score for score, _ in plain.loglikelihood([request])]
    assert [score for score, _ in lm.loglikelihood(asked)] == pytest.approx(expected, abs=1e-4)
    info = lm.get_model_info()
    assert info["model_name"] == "prefworld"
    assert {name: (one["strength"], one["where"]) for name, one in info["knobs"].items()} == {
        "a": (0.5, "all"),
        "b": (-1.0, "prompt"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("knob={0}/all.safetensors,panel=x.json", "Pass one"),
        ("panel=x.json,strength=2", "a panel has strengths of its own"),
        ("strength=0.5", "there is no knob"),
        ("knob={0}/all.safetensors,strength=much", "strength must be a number"),
        ("batch_size=3", "batch_size is given twice"),
        ("dtype=float7", "Unknown dtype"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(folder: Path, arguments: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrimtabLM.create_from_arg_string(f"pretrained=prefworld,{arguments.format(folder)}", {"batch_size": 2})


def test_an_unknown_argument_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"'strenght'.*panel.*Did you mean 'strength'"):
        TrimtabLM.create_from_arg_obj({"pretrained": "prefworld", "strenght": 1})
    with pytest.raises(OptionError, match="name no model"):
        TrimtabLM.create_from_arg_obj({"knob": "some.safetensors"})


def test_a_knob_of_another_model_is_refused(tmp_path: Path) -> None:
    pico.knob(1).save(tmp_path / "narrow.safetensors")
    with pytest.raises(KnobError, match="Learn the knob on this model"):
        TrimtabLM(pretrained="prefworld", knob=tmp_path / "narrow.safetensors")
    foreign = dataclasses.replace(pico.knob(1, width=192), provenance={"architecture": "gpt2"})
    foreign.save(tmp_path / "foreign.safetensors")
    with pytest.raises(KnobError, match="another architecture"):
        TrimtabLM(pretrained="prefworld", knob=tmp_path / "foreign.safetensors")
    with pytest.warns(TrimtabWarning, match="another architecture"):
        TrimtabLM(pretrained="prefworld", knob=tmp_path / "foreign.safetensors", strict=False)


def test_a_knob_that_steers_thoughts_needs_a_tokenizer_that_marks_them(tmp_path: Path) -> None:
    pico.knob(1, width=192, where="thinking").save(tmp_path / "thinking.safetensors")
    with pytest.raises(OptionError, match="open and close the thoughts"):
        TrimtabLM(pretrained="prefworld", knob=tmp_path / "thinking.safetensors")


# The command line


def test_the_harness_command_runs_with_our_model_type(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = partial(TaskManager, include_defaults=False)  # looking through the harness's own tasks takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    words = f"run --model trimtab --tasks sums_choice --include_path {folder} --apply_chat_template".split()
    args = f"pretrained=prefworld,knob={folder}/all.safetensors,strength=-1"
    monkeypatch.setattr(sys, "argv", ["lm-eval", *words, "--model_args", args, "--output_path", str(tmp_path)])
    assert harness.main() == 0
    assert "|sums_choice|" in capsys.readouterr().out
    (results,) = tmp_path.rglob("results_*.json")
    config = json.loads(results.read_text(encoding="utf-8"))["config"]
    assert config["knobs"]["some"]["strength"] == -1
    monkeypatch.setattr(sys, "argv", ["lm-eval", *words, "--model_args", f"{args},panel=x.json"])
    assert harness.main() == 2
    assert "trimtab: Got knob=" in capsys.readouterr().err


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.evals.lm_eval", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lm-eval run" in done.stdout


def test_without_lm_eval_the_module_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import trimtab.evals.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("trimtab.errors.MissingDependency")
    assert last.endswith("Install it with: pip install 'lm-eval[hf]'")
