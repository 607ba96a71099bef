"""Evaluation: what is measured of a model without knobs and under settings, against independent computations."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pico
from trimtab.errors import AdapterError, OptionError, TrimtabWarning
from trimtab.evals import evaluate as module
from trimtab.evals.choices import pairs_task
from trimtab.evals.effects import (
    Divergence,
    divergence_of_answers,
    effect,
    load_texts,
    manner,
    own_answers,
    perplexities,
    perplexity_change,
)
from trimtab.evals.evaluate import evaluate
from trimtab.evals.evaluation import SPEC, Evaluation
from trimtab.evals.judge import Judge
from trimtab.evals.likelihood import divergence, pair_margins
from trimtab.evals.stats import bootstrap_mean, bootstrap_ratio, holm, mcnemar, paired_bootstrap, wilson
from trimtab.evals.tasks import Task, run_task
from trimtab.evals.verdicts import Comparison
from trimtab.generate import generate
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.runtime import steer
from trimtab.tune import tune

PROMPTS = tuple(f"What is {n} + {n}?" for n in range(8))
PAIRS = Pairs.from_records(
    [{"prompt": f"Is {n} odd?", "chosen": f"{n} it is", "rejected": f"is {n} no"} for n in range(6)]
)
NEUTRAL = ["The cat sat on the mat.", "It was a fine day, and nobody said a word.", "a b c"]
ALPHABET = " abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def model() -> Any:
    return pico.model()


@pytest.fixture(scope="module")
def words() -> Any:
    return pico.tokenizer()


def graded(name: str = "vowels", prompts: Sequence[str] = PROMPTS, letter: str = "a") -> Task:
    """Right is an answer whose letters sum to an even number: a random model is right about half of the time."""
    return Task(
        name,
        tuple(prompts),
        lambda answers: [float(sum(map(ord, answer + letter)) % 2 == 0) for answer in answers],
        side=lambda i, text: "early" if text[:1] < "m" else None,
        max_new_tokens=6,
    )


def strong(name: str = "pico", **options: Any) -> Any:
    return pico.knob(1, name=name, norm=20.0, **options)


# Side effects


def test_perplexity_is_the_exponential_of_what_the_model_itself_says(model: Any, words: Any) -> None:
    (found,) = perplexities(model, words, NEUTRAL, [{}])
    for text, nats, tokens, length in zip(NEUTRAL, found.nats, found.tokens, found.bytes, strict=True):
        ids = torch.tensor([words.encode(text, add_special_tokens=False)])
        logps = model(input_ids=ids).logits[0, :-1].detach().log_softmax(-1)
        assert nats == pytest.approx(-float(logps.gather(-1, ids[0, 1:, None]).sum()), rel=1e-4)
        assert (tokens, length) == (len(text) - 1, len(text) - 1)  # nothing predicts the first of them
    assert found.per_token == pytest.approx(math.exp(found.nats.sum() / found.tokens.sum()))
    assert found.bits_per_byte == pytest.approx(found.nats.sum() / found.bytes.sum() / math.log(2))


def test_a_text_beyond_the_context_is_read_in_windows_that_predict_every_token_once(words: Any) -> None:
    short = pico.model(max_position_embeddings=16)
    text = (ALPHABET * 3)[:50]
    (found,) = perplexities(short, words, [text, "ab"], [{}])
    assert found.tokens.tolist() == [49, 1]
    assert found.bytes.tolist() == [49, 1]
    ids = words.encode(text, add_special_tokens=False)
    nats = 0.0
    for at in range(1, 50, 15):
        window = torch.tensor([ids[at - 1 : at + 15]])
        assert window.shape[1] <= 16
        logps = short(input_ids=window).logits[0, :-1].detach().log_softmax(-1)
        nats -= float(logps.gather(-1, window[0, 1:, None]).sum())
    assert found.nats[0] == pytest.approx(nats, rel=1e-4)


def test_characters_of_several_bytes_count_as_bytes(model: Any) -> None:
    (found,) = perplexities(model, pico.tokenizer(units="bytes"), ["aéé"], [{}])
    assert (found.tokens.tolist(), found.bytes.tolist()) == ([4], [4])


@pytest.mark.parametrize(
    ("where", "moves"), [("all", True), ("completion", True), ("prompt", True), ("context", False)]
)
def test_neutral_text_is_steered_where_its_note_says(model: Any, words: Any, where: Any, moves: bool) -> None:
    bare, steered = perplexities(model, words, NEUTRAL, [{}, {strong(where=where): 1.0}])
    assert (abs(perplexity_change(bare, steered).estimate) > 1e-3) == moves


def test_a_text_without_anything_to_predict_is_refused(model: Any, words: Any) -> None:
    with pytest.raises(OptionError, match="Neutral text 2 has no token to predict: 'a'"):
        perplexities(model, words, ["ab", "a"], [{}])


def test_divergence_over_answers_is_that_of_all_their_tokens(model: Any, words: Any) -> None:
    texts = own_answers(model, words, PROMPTS[:4], ["abc", "", "a", "hello there"])
    assert len(texts) == 3
    setting = {strong(): 1.0}
    found = divergence_of_answers(model, words, texts, setting)
    assert found.per_token().estimate == pytest.approx(divergence(model, words, texts, setting))
    assert found.per_token().low < found.per_token().estimate < found.per_token().high
    assert divergence_of_answers(model, words, texts, {strong(): 0.0}).per_token().estimate == 0
    assert Divergence(np.array([-1e-9]), np.array([3.0])).per_token() == (0, 0, 0)


def test_lengths_of_answers_are_those_of_generation(model: Any, words: Any) -> None:
    made = generate(model, words, PROMPTS, max_new_tokens=9)
    found = manner(words, PROMPTS, [g.text for g in made])
    assert found.tokens.tolist() == [len(g.text) if g.text.strip() else 0 for g in made]  # a token is a character
    assert manner(words, ["a", "b"], ["", "no " * 50]).repetition[1] > 0.9


def test_an_effect_is_a_paired_difference() -> None:
    assert effect([0, 0, 1], [1, 0, 1]) == (
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        paired_bootstrap([0, 0, 1], [1, 0, 1]),
    )


def test_a_ratio_weighs_items_by_their_wholes() -> None:
    assert bootstrap_ratio([10, 1], [100, 1]).estimate == pytest.approx(11 / 101)
    parts = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert bootstrap_ratio(parts, [1] * 5) == pytest.approx(bootstrap_mean(parts))
    with pytest.raises(OptionError, match="must be positive; got 0"):
        bootstrap_ratio([1, 2], [1, 0])


def test_neutral_text_is_paragraphs_or_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\ntwo.\r\n\r\n\n\nThree.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "One"}\n{"text": "two"}\n')
    assert load_texts(tmp_path / "a.txt") == ["One\ntwo.", "Three."]
    assert load_texts(tmp_path / "b.jsonl") == ["One", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.jsonl", b'{"prompt": "a"}', "Line 1 needs a text"),
        ("a.jsonl", b'{"text": 1}', "Line 1 needs a text"),
        ("a.jsonl", b'{"text": ', "Line 1 is not JSON"),
    ],
)
def test_a_file_of_neutral_text_that_is_none_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=message):
        load_texts(tmp_path / name)


# The record


def test_every_task_is_compared_with_the_bare_model_on_the_same_items(model: Any, words: Any) -> None:
    tasks, rails, knob = [graded(), graded("more", letter="b")], [graded("kept", PROMPTS[:5])], strong()
    found = evaluate(model, words, tasks, {knob: 1.0}, guardrails=rails, sampled=True, temperature=2.0, seed=3)
    assert [(row["task"], row["role"], row["mode"]) for row in found.bare["tasks"]] == [
        ("vowels", "task", "greedy"),
        ("more", "task", "greedy"),
        ("kept", "guardrail", "greedy"),
        ("vowels", "task", "sampled"),
        ("more", "task", "sampled"),
    ]
    (entry,) = found.settings
    p_values: list[float] = []
    for task, before, after in zip([*tasks, *rails, *tasks], found.bare["tasks"], entry["tasks"], strict=True):
        draws = {"temperature": 2.0, "seed": 3} if before["mode"] == "sampled" else {}
        a, b = (run_task(model, words, task, dose, **draws) for dose in ({}, {knob: 1.0}))
        assert before["accuracy"] == wilson(int(a.scores.sum()), len(a.scores))._asdict()
        assert after["accuracy"]["estimate"] == b.accuracy
        assert after["difference"] == paired_bootstrap(a.scores, b.scores)._asdict()
        assert after["broken"] == b.degenerate.mean()
        p_values.append(mcnemar(a.scores, b.scores))
        assert after["p"] == p_values[-1]
        early = after.get("sides", {}).get("early", {"share": 0.0, "accuracy": None})
        assert (early["share"], early["accuracy"]) == (b.share("early"), b.accuracy_within("early"))
    assert [row["p_holm"] for row in entry["tasks"]] == holm(p_values)
    assert any(row["difference"]["estimate"] for row in entry["tasks"])  # the knob did something
    assert entry["side_effects"]["kl_on"] == ["kept"]
    answers = run_task(model, words, rails[0]).answers
    texts = own_answers(model, words, rails[0].prompts, answers)
    kl = divergence(model, words, texts, {knob: 1.0})
    assert entry["side_effects"]["kl"]["estimate"] == pytest.approx(kl, rel=1e-4)
    assert entry["cost"]["answers"] == found.bare["cost"]["answers"] == 37
    assert entry["cost"]["seconds"] > 0


def test_where_programs_were_run_the_row_says_what_kept_them_apart(model: Any, words: Any) -> None:
    plain = Task("code", ("Hi",), lambda answers: [0.0] * len(answers), max_new_tokens=2)
    rows = evaluate(model, words, [plain, replace(plain, name="run", runs_code=True)]).bare["tasks"]
    assert "isolation" not in rows[0]
    assert rows[1]["isolation"]


def test_strength_zero_changes_nothing(model: Any, words: Any) -> None:
    found = evaluate(model, words, [graded()], [{strong(): 0.0}, {strong(): 1.0}], pairs=PAIRS, neutral=NEUTRAL)
    off, on = found.settings
    assert off["setting"] == "pico=0"
    assert off["tasks"][0]["difference"] == {"estimate": 0, "low": 0, "high": 0}
    assert (off["tasks"][0]["p"], off["side_effects"]["kl"]["estimate"]) == (1, 0)
    assert off["preference"]["margin_difference"]["estimate"] == pytest.approx(0, abs=1e-5)
    assert off["neutral"]["change"]["estimate"] == pytest.approx(0, abs=1e-5)
    assert off["neutral"]["perplexity"] == pytest.approx(found.bare["neutral"]["perplexity"])
    assert on["side_effects"]["kl"]["estimate"] > 0
    assert on["neutral"]["change"]["estimate"] != pytest.approx(0, abs=1e-3)


def test_preference_is_how_often_and_how_much_the_chosen_answers_are_likelier(model: Any, words: Any) -> None:
    knob = strong()
    found = evaluate(model, words, settings={knob: 1.0}, pairs=PAIRS, kl_items=3, max_new_tokens=5)
    bare, steered = pair_margins(model, words, PAIRS, [{}, {knob: 1.0}])
    own = found.settings[0]["preference"]
    assert own["accuracy"] == wilson(int((steered.margin > 0).sum()), 6)._asdict()
    assert own["margin"]["estimate"] == pytest.approx(steered.margin.mean())
    assert own["margin_difference"]["estimate"] == pytest.approx((steered.margin - bare.margin).mean())
    # Without a task, answers to the pairs' own prompts show the side effects.
    (row,) = found.settings[0]["tasks"]
    assert (row["task"], row["n"]) == ("prompts", 6)
    assert not {"accuracy", "difference", "p"} & row.keys()
    assert found.settings[0]["side_effects"]["kl_on"] == ["prompts"]
    assert found.settings[0]["side_effects"]["tokens"]["bare"] > 0


def test_scores_between_0_and_1_get_bootstrap_intervals_and_no_mcnemar(model: Any, words: Any) -> None:
    task = Task("thirds", PROMPTS, lambda answers: [sum(map(ord, a)) % 7 / 7 for a in answers], max_new_tokens=6)
    found = evaluate(model, words, [task], {strong(): 1.0})
    row = found.settings[0]["tasks"][0]
    assert (row["interval"], row["p"]) == ("bootstrap", None)
    assert "p_holm" not in row
    bare = found.bare["tasks"][0]["accuracy"]
    assert bare == bootstrap_mean(run_task(model, words, task).scores)._asdict()
    assert bare["low"] < bare["estimate"] < bare["high"]


def test_the_bare_model_is_measured_alone(model: Any, words: Any) -> None:
    calls: list[tuple[int, int]] = []
    found = evaluate(model, words, [graded()], neutral=NEUTRAL, progress=lambda d, t: calls.append((d, t)))
    assert found.settings == ()
    assert found.bare["neutral"]["texts"] == 3
    assert calls == [(1, 2), (2, 2)]
    calls.clear()
    evaluate(model, words, [graded()], {strong(): 1.0}, progress=lambda d, t: calls.append((d, t)))
    assert calls == [(i, 4) for i in range(1, 5)]


def test_a_task_by_likelihood_has_scores_and_no_manner(model: Any, words: Any) -> None:
    task, knob = pairs_task(PAIRS, name="choices"), strong()
    found = evaluate(model, words, [task], {knob: 1.0}, sampled=True)
    bare, steered = pair_margins(model, words, PAIRS, [{}, {knob: 1.0}])
    (row,) = found.settings[0]["tasks"]  # and not once more, sampled
    assert (row["mode"], row["accuracy"]["estimate"]) == ("likelihood", (steered.margin > 0).mean())
    assert row["difference"]["estimate"] == pytest.approx((steered.margin > 0).mean() - (bare.margin > 0).mean())
    assert not {"broken", "tokens", "kl"} & row.keys()
    assert found.settings[0]["side_effects"] == {"kl": None, "kl_on": []}
    assert found.bare["cost"]["tokens"] == 0


# The spec


def test_the_record_carries_everything_it_rests_on(model: Any, words: Any, tmp_path: Path) -> None:
    knob = strong(where="prompt", gain=0.5)
    found = evaluate(model, words, [graded()], {knob: 2.0}, pairs=PAIRS, neutral=NEUTRAL, seed=5)
    spec = found.spec
    options = {
        name
        for name, parameter in inspect.signature(evaluate).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    elsewhere = {"guardrails", "pairs", "neutral", "judge", "checkpoint", "progress"}
    assert set(spec["options"]) == options - elsewhere
    assert spec["options"]["seed"] == 5
    ((entry,),) = spec["settings"]
    assert (entry["knob"], entry["site"], entry["where"]) == ("pico", "1/last", "prompt")
    assert (entry["gain"], entry["strength"], entry["alpha"]) == (0.5, 2.0, 1.0)
    assert len(entry["vectors_sha256"]) == 64
    assert (
        entry["vectors_sha256"]
        != evaluate(model, words, [graded()], {strong(seed=1): 1.0}).spec["settings"][0][0]["vectors_sha256"]
    )
    assert spec["tasks"][0]["n"] == len(PROMPTS)
    assert spec["pairs"] == {"count": 6, "hash": PAIRS.hash()}
    assert spec["neutral"]["texts"] == 3
    assert spec["model"]["architecture"] == "llama"
    assert {"trimtab", "torch", "transformers"} <= spec["versions"].keys()
    found.save(tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == json.loads(json.dumps(found.record()))


def test_a_result_without_its_spec_cannot_be_made(model: Any, words: Any) -> None:
    spec = dict(evaluate(model, words, [graded()]).spec)
    for part in SPEC:
        with pytest.raises(OptionError, match=f"the spec lacks {part}"):
            Evaluation({name: value for name, value in spec.items() if name != part}, {}, ())


def test_prompts_that_learning_or_tuning_has_seen_are_warned_of(model: Any, words: Any) -> None:
    asked = [p.prompt[0].content for p in PAIRS]
    knob = learn(model, words, PAIRS, layers=[1])
    with pytest.warns(TrimtabWarning, match="was learned from 3 of the 5 prompts of seen") as caught:
        found = evaluate(model, words, [graded("seen", [*asked[:3], "New?", "Newer?"])], {knob: 1.0})
    assert list(found.notes) == [str(caught[0].message)]
    held = Pairs.from_records([{"prompt": f"Held {n}", "chosen": "a it", "rejected": "no b"} for n in range(4)])
    task = graded("tuned on", [f"Task {n}" for n in range(4)])
    options: dict[str, Any] = {
        "gains": (0.2,),
        "finalists": 1,
        "dose_response": False,
        "broken_budget": 1.0,
        "budget": 1.0,
    }
    tuned = tune(knob, model, words, held, guardrails=[task], **options)
    with pytest.warns(TrimtabWarning) as caught:
        found = evaluate(model, words, [graded("again", ["Task 0", "Task 9"])], {tuned: 1.0}, pairs=held)
    assert [note.split(":")[0] for note in found.notes] == [
        f"Knob {knob.name!r} was tuned on 1 of the 2 prompts of again",
        f"Knob {knob.name!r} was tuned on 4 of the 4 prompts of the pairs",
    ]
    assert evaluate(model, words, [graded("new", ["Never asked"])], {tuned: 1.0}).notes == ()


# The judge


def test_the_judge_gets_bare_and_steered_answers_to_the_pairs_prompts(
    model: Any, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compare(self: Judge, prompts: Any, a: Sequence[str], b: Sequence[str], **options: Any) -> Comparison:
        seen.append((list(prompts), list(a), list(b)))
        count = len(prompts)
        return Comparison((("B", "A"),) * count, ((3, 3),) * count, (False,) * count)

    monkeypatch.setattr(Judge, "compare", compare)
    knob, judge = strong(), Judge(base_url="http://127.0.0.1/v1", model="critic")
    options: dict[str, Any] = {"judge": judge, "judge_items": 4, "max_new_tokens": 5}
    found = evaluate(model, words, [graded()], {knob: 1.0}, pairs=PAIRS, **options)
    prompts, bare, steered = seen[0]
    assert prompts == [pair.prompt for pair in PAIRS][:4]
    for answers, dose in ((bare, {}), (steered, {knob: 1.0})):
        assert answers == [g.text for g in generate(model, words, prompts, knobs=dose, max_new_tokens=5)]
    assert found.settings[0]["judge"]["on"] == ["prompts"]
    assert found.settings[0]["judge"]["win_rate"]["estimate"] == 1
    assert found.spec["judge"]["model"] == "critic"
    evaluate(model, words, [graded()], {knob: 1.0}, guardrails=[graded("kept")], judge=judge)
    assert len(seen[1][0]) == len(PROMPTS)  # the task's, and not the guardrail's


# Long jobs, and what is refused


def test_kept_answers_are_not_made_again_and_are_graded_again(
    model: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knob = strong()
    options: dict[str, Any] = {"pairs": PAIRS, "neutral": NEUTRAL, "checkpoint": tmp_path / "kept"}
    first = evaluate(model, words, [graded()], {knob: 1.0}, **options)

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("this was done before")

    monkeypatch.setattr(module, "run_task", refuse)
    monkeypatch.setattr("trimtab.evals.likelihood._likelihoods", refuse)
    monkeypatch.setattr("trimtab.evals.likelihood._log_probabilities", refuse)
    again = evaluate(model, words, [graded()], {knob: 1.0}, **options)
    assert again.record() == first.record()
    other = evaluate(model, words, [graded(letter="b")], {knob: 1.0}, **options)
    flipped = 1 - first.bare["tasks"][0]["accuracy"]["estimate"]
    assert other.bare["tasks"][0]["accuracy"]["estimate"] == pytest.approx(flipped)
    with pytest.raises(OptionError, match="holds another job: settings"):
        evaluate(model, words, [graded()], {knob: 0.5}, **options)


def test_likelihoods_of_other_answers_are_another_job_and_another_spec(model: Any, words: Any, tmp_path: Path) -> None:
    task = pairs_task(PAIRS, name="choices")
    other = replace(task, choices=tuple(tuple(answer + "!" for answer in given) for given in task.choices))
    first = evaluate(model, words, [task], checkpoint=tmp_path / "kept")
    for changed in (other, replace(task, per="token")):
        with pytest.raises(OptionError, match="holds another job: tasks"):
            evaluate(model, words, [changed], checkpoint=tmp_path / "kept")
        assert evaluate(model, words, [changed]).spec["tasks"] != first.spec["tasks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to measure"),
        ({"tasks": [graded(), graded()]}, "need names of their own"),
        ({"tasks": [graded()], "guardrails": [graded()]}, "need names of their own"),
        ({"tasks": [graded("prompts")]}, "cannot be named 'prompts'"),
        ({"tasks": [graded("none", [])]}, "Task 'none' is empty"),
        ({"tasks": [graded()], "pairs": Pairs()}, "The set of pairs is empty"),
        ({"tasks": [graded()], "temperature": 0.0}, "a temperature above 0; got 0"),
        ({"tasks": [graded()], "seed": -1}, "The seed is"),
        ({"tasks": [graded()], "kl_items": -1}, "kl_items is 0 or more"),
        ({"tasks": [graded()], "settings": {strong(): math.nan}}, "must be finite"),
        ({"tasks": [graded()], "judge": Judge(base_url="http://127.0.0.1/v1", model="m")}, "Pass a knob"),
        (
            {"neutral": ["ab"], "settings": {strong(): 1}, "judge": Judge(base_url="http://127.0.0.1/v1", model="m")},
            "Pass one of them",
        ),
        (
            {
                "tasks": [pairs_task(PAIRS, name="choices")],
                "settings": {strong(): 1},
                "judge": Judge(base_url="http://127.0.0.1/v1", model="m"),
            },
            "not one by likelihood. Pass one of them",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model: Any, words: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        evaluate(model, words, **arguments)


def test_a_model_that_is_being_steered_is_not_taken_for_the_bare_one(model: Any, words: Any) -> None:
    with pytest.raises(AdapterError, match="evaluating would see it so"), steer(model, {strong(): 1.0}):
        evaluate(model, words, [graded()], {strong(): 1.0})
