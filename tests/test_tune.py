"""Choosing site, tokens and gain: planted truth, budgets, and likelihoods against computation by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pico import model, tokenizer
from trimtab.artifact import Knob
from trimtab.errors import KnobError, OptionError, PairsError, TrimtabWarning, TuneError, UnknownName
from trimtab.evals.choosing import alike
from trimtab.evals.likelihood import divergence, pair_margins, render_texts
from trimtab.evals.stats import Interval, paired_bootstrap, selection_bias
from trimtab.evals.tasks import Outcome, Task, load_task, run_task
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.runtime import steer
from trimtab.tune import tune
from trimtab.types import Message, Site

RECORDS = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no, never"} for i in range(6)]
PAIRS = Pairs.from_records(RECORDS)


def planted(lm: torch.nn.Module, words: object) -> Knob:
    """A knob with the direction that writes "y" at the last layer, and noise at another site."""
    letter = Renderer(words).full([Message("user", "Q")], "yes")  # pyright: ignore[reportArgumentType]
    first = letter.ids[letter.response_start]
    write = lm.get_output_embeddings().weight[first].detach().float()
    noise = torch.randn(len(write), generator=torch.Generator().manual_seed(0))
    vectors = {Site(1, "last"): write, Site(0, "last"): noise}
    return Knob("yes", "planted", vectors, {0: 1.0, 1: 1.0}, Site(0, "last"), 1.0)


def says_yes(answers: Sequence[str]) -> list[float]:
    return [float(a.startswith("y")) for a in answers]


def test_pair_margins_equal_a_computation_by_hand() -> None:
    lm, words = model(), tokenizer()
    knob = planted(lm, words)
    settings = [{}, {knob: 2.0}, {knob.with_(where="completion"): 2.0}]
    scored = pair_margins(lm, words, PAIRS, settings, token_budget=100)
    for setting, margins in zip(settings, scored, strict=True):
        for i, pair in enumerate(PAIRS):
            for answer, found in ((pair.chosen, margins.chosen[i]), (pair.rejected, margins.rejected[i])):
                text = Renderer(words).full(pair.prompt, answer)
                ids = torch.tensor([text.ids])
                with torch.no_grad(), steer(lm, setting, prompt_lengths=[text.response_start]):
                    logps = lm(ids, use_cache=False).logits[0].log_softmax(-1)
                expected = sum(float(logps[t - 1, text.ids[t]]) for t in range(text.response_start, len(text.ids)))
                assert found == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(scored[1].chosen, scored[2].chosen)


def test_divergence_is_zero_for_the_base_and_grows_with_the_dose() -> None:
    lm, words = model(), tokenizer()
    knob = planted(lm, words)
    texts = render_texts(words, [p.prompt for p in PAIRS], [p.chosen for p in PAIRS])
    found = [divergence(lm, words, texts, {knob: s}) for s in (0.0, 0.2, 1.0)]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert 0 < found[1] < found[2]


def test_tuning_finds_the_planted_site_and_stores_what_it_measured() -> None:
    lm, words = model(), tokenizer()
    knob = planted(lm, words)
    task = Task("yes", tuple(f"Ask {i}" for i in range(4)), says_yes, max_new_tokens=3)
    gains, strengths = (0.5, 4.0, 40.0), (-1.0, 0.5, 1.0)
    tuned = tune(knob, lm, words, PAIRS, task=task, gains=gains, broken_budget=1.0, strengths=strengths)
    assert tuned.site == Site(1, "last")
    assert set(tuned.vectors) == {tuned.site}
    assert run_task(lm, words, task, {tuned: 1.0}).accuracy == 1.0
    tuning = tuned.tuning
    assert tuning is not None
    assert len(tuning["ranking"]) == 6
    assert [row["strength"] for row in tuning["dose_response"]] == [-1.0, 0.0, 0.5, 1.0]
    assert tuning["dose_response"][1]["kl"] == 0.0
    best = max(row["score"] for row in tuning["table"])
    winners = [row["gain"] for row in tuning["table"] if row["score"] == best and row["site"] == "1/last"]
    assert tuned.gain == min(winners)
    assert tuned.safe_range == (-1.0, 1.0)


def test_a_knob_of_several_sites_is_tuned_in_gain_and_keeps_them() -> None:
    lm, words = model(), tokenizer()
    both = replace(planted(lm, words).with_(site=Site(1, "last")), also=(Site(0, "last"),))
    tuned = tune(both, lm, words, PAIRS, gains=[0.5, 2.0], strengths=[1.0], broken_budget=1.0)
    assert tuned.sites == both.sites
    assert tuned.gain in (0.5, 2.0)
    assert {row["site"] for row in tuned.tuning["table"]} == {"1/last"}


def test_a_guardrail_that_falls_rules_a_setting_out() -> None:
    lm, words = model(), tokenizer()
    prompts = tuple(f"Keep {i}" for i in range(4))
    probe = Task("keep", prompts, says_yes, max_new_tokens=3)
    before = run_task(lm, words, probe).answers

    def unchanged(answers: Sequence[str]) -> list[float]:
        return [float(a == b) for a, b in zip(answers, before, strict=True)]

    keep = Task("keep", prompts, unchanged, max_new_tokens=3)
    task = Task("yes", ("Ask",), says_yes, max_new_tokens=3)
    knob = planted(lm, words)
    with pytest.raises(TuneError, match="smaller gains than 40"):
        tune(knob, lm, words, PAIRS, task=task, guardrails=[keep], gains=(40.0,), broken_budget=1.0)
    kept: dict[str, Any] = {"task": task, "guardrails": [keep], "broken_budget": 1.0}
    with pytest.warns(TrimtabWarning, match="scores above the base model on 'yes'"):
        tuned = tune(knob, lm, words, PAIRS, gains=(1e-4, 40.0), strengths=(1.0, 4e5, 8e5), **kept)
    assert tuned.gain == 1e-4
    assert tuned.safe_range == (0.0, 1.0)


def test_a_dose_that_breaks_answers_is_ruled_out_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, words = model(), tokenizer()

    def outcome(_model: object, _words: object, task: Task, knobs: Mapping[Knob, float], **_: object) -> Outcome:
        n = len(task)
        dose = max((knob.alpha(strength) for knob, strength in knobs.items()), default=0.0)
        return Outcome(("x",) * n, np.full(n, dose), (None,) * n, np.full(n, float(dose > 0.3)))

    monkeypatch.setattr("trimtab.evals.trial.run_task", outcome)
    task = Task("yes", ("Ask", "Ask again"), says_yes)
    tuned = tune(planted(lm, words), lm, words, PAIRS, task=task, gains=(0.2, 0.4), strengths=(1.0, 2.0))
    assert tuned.gain == 0.2
    assert tuned.safe_range == (0.0, 1.0)
    with pytest.raises(TuneError, match=r"broken answers rise by 1 \(budget 0\.05\)"):
        tune(planted(lm, words), lm, words, PAIRS, task=task, gains=(0.4,))


def scripted(
    monkeypatch: pytest.MonkeyPatch, scores: Mapping[float, Sequence[int]], kls: Mapping[float, float]
) -> None:
    """Let the task "yes" have these item scores at each alpha, guardrails be right, and KL be as given."""

    def dose_of(knobs: Mapping[Knob, float]) -> float:
        return round(max((knob.alpha(strength) for knob, strength in knobs.items()), default=0.0), 3)

    def outcome(_model: object, _words: object, task: Task, knobs: Mapping[Knob, float], **_: object) -> Outcome:
        n = len(task)
        values = scores.get(dose_of(knobs), (0,) * n) if task.name == "yes" else (1,) * n
        return Outcome(("x",) * n, np.array(values, dtype=float), (None,) * n, np.zeros(n))

    monkeypatch.setattr("trimtab.evals.trial.run_task", outcome)
    monkeypatch.setattr("trimtab.evals.trial.divergence", lambda _model, _words, _texts, knobs: kls[dose_of(knobs)])


GRADED = {0.2: (0, 0, 1, 1, 1, 1, 1, 1), 0.4: (0, 1, 1, 1, 1, 1, 1, 1), 0.8: (1, 1, 1, 1, 1, 1, 1, 1)}
"""7 of 8 lies within one standard error of 8 of 8 (0.125), and 6 of 8 does not (0.25, error 0.16)."""


@pytest.mark.parametrize(
    ("kls", "rails", "chosen"),
    [
        ({0.2: 0.1, 0.4: 0.2, 0.8: 0.3}, True, 0.4),
        ({0.2: 0.1, 0.4: 0.3, 0.8: 0.2}, True, 0.8),
        ({0.2: 0.1, 0.4: 0.3, 0.8: 0.2}, False, 0.4),  # without guardrails KL would speak against the effect itself
    ],
)
def test_of_settings_that_the_items_cannot_tell_apart_the_mildest_wins(
    kls: Mapping[float, float], rails: bool, chosen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, words = model(), tokenizer()
    scripted(monkeypatch, GRADED, kls)
    task = Task("yes", tuple(f"Ask {i}" for i in range(8)), says_yes)
    guardrails = [Task("keep", ("Keep this",), says_yes)] if rails else []
    knob = planted(lm, words).pruned(Site(1, "last"))
    options: dict[str, Any] = {"task": task, "guardrails": guardrails, "dose_response": False}
    assert tune(knob, lm, words, PAIRS, gains=(0.2, 0.4, 0.8), **options).gain == chosen
    assert tune(knob, lm, words, PAIRS, gains=(0.2, 0.8), **options).gain == 0.8


def test_a_setting_that_gains_nothing_is_never_the_mildest(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, words = model(), tokenizer()
    scripted(monkeypatch, {0.2: (0,) * 8, 0.4: (1, 0, 0, 0, 0, 0, 0, 0)}, {0.2: 0.1, 0.4: 0.2})
    task = Task("yes", tuple(f"Ask {i}" for i in range(8)), says_yes)
    knob = planted(lm, words).pruned(Site(1, "last"))
    options: dict[str, Any] = {"guardrails": [Task("keep", ("Keep this",), says_yes)], "dose_response": False}
    assert tune(knob, lm, words, PAIRS, task=task, gains=(0.2, 0.4), **options).gain == 0.4


def test_alike_is_a_paired_comparison() -> None:
    best = np.array([1, 1, 1, 0, 0, 0, 0, 0], dtype=float)
    nested, crossed = np.array([1, 0, 0, 0, 0, 0, 0, 0.0]), np.array([0, 0, 0, 1, 0, 0, 0, 0.0])
    assert nested.mean() == crossed.mean()
    assert not alike(best, nested)
    assert alike(best, crossed)
    assert not alike(np.ones(1), np.zeros(1))


def test_kl_is_taken_on_the_guardrails_answers_and_without_them_on_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, words = model(), tokenizer()
    read: list[int] = []

    def count(_model: object, _words: object, texts: Sequence[object], _knobs: object) -> float:
        read.append(len(texts))
        return 0.0

    monkeypatch.setattr("trimtab.evals.trial.divergence", count)
    task = Task("yes", ("Ask", "Ask again", "Ask more"), says_yes, max_new_tokens=3)
    keep = Task("keep", tuple(f"Keep {i}" for i in range(20)), lambda answers: [1.0] * len(answers), max_new_tokens=3)
    options: dict[str, Any] = {"task": task, "gains": (0.5,), "broken_budget": 1.0, "dose_response": False}
    knob = planted(lm, words).pruned(Site(1, "last"))
    with pytest.warns(TrimtabWarning, match="scores above the base model"):
        tune(knob, lm, words, PAIRS, **options)
    with pytest.warns(TrimtabWarning, match="scores above the base model"):
        tune(knob, lm, words, PAIRS, guardrails=[keep], **options)
    assert read == [3, 16]


def test_tuning_chooses_the_tokens_to_steer_among_those_it_is_given() -> None:
    lm, words = model(), tokenizer()
    knob = planted(lm, words).pruned(Site(1, "last"))
    task = Task("yes", tuple(f"Ask {i}" for i in range(4)), says_yes, max_new_tokens=3)
    options: dict[str, Any] = {"task": task, "gains": (4.0,), "broken_budget": 1.0, "dose_response": False}
    # What is written into the token that predicts the answer reaches it; into earlier ones, hardly.
    tuned = tune(knob, lm, words, PAIRS, where=("context", "completion"), **options)
    assert tuned.where == "completion"
    assert tuned.tuning is not None
    assert tuned.tuning["options"]["where"] == ["context", "completion"]
    assert {row["where"] for row in tuned.tuning["ranking"]} == {"context", "completion"}
    assert tune(knob, lm, words, PAIRS, **options).where == knob.where
    with pytest.raises(UnknownName, match="Unknown where 'reply'"):
        tune(knob, lm, words, PAIRS, where="reply")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownName, match="Unknown where '3'"):
        tune(knob, lm, words, PAIRS, where=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="got none"):
        tune(knob, lm, words, PAIRS, where=())


def test_sites_on_which_the_pairs_do_not_agree_are_no_candidates() -> None:
    lm, words = model(), tokenizer()
    knob = planted(lm, words)
    best, other = Site(1, "last"), next(site for site in knob.vectors if site != Site(1, "last"))
    options: dict[str, Any] = {"gains": (0.5,), "broken_budget": 1.0, "dose_response": False}

    def with_halves(**cosines: float | None) -> Knob:
        return knob.with_(diagnostics={"sites": {site: {"split_half_cosine": c} for site, c in cosines.items()}})

    assert tune(knob, lm, words, PAIRS, **options).site == best  # a knob that stores nothing is taken as it is
    for noise in (0.1, -0.6):
        doubtful = with_halves(**{str(best): noise, str(other): 0.9})
        assert tune(doubtful, lm, words, PAIRS, **options).site == other
        assert tune(doubtful, lm, words, PAIRS, agreement=-1.0, **options).site == best
    shuffled = with_halves(**{str(site): -0.3 for site in knob.vectors})
    with pytest.raises(TuneError, match=r"do not agree on a direction: .*at best -0\.3"):
        tune(shuffled, lm, words, PAIRS, **options)
    with pytest.raises(OptionError, match="agreement is a cosine"):
        tune(knob, lm, words, PAIRS, agreement=1.5)


def test_progress_reaches_its_total_and_the_record_says_how_it_was_found() -> None:
    lm, words = model(), tokenizer()
    seen: list[tuple[int, int]] = []
    tuned = tune(
        planted(lm, words),
        lm,
        words,
        PAIRS,
        gains=(1e-3,),
        finalists=2,
        rank_pairs=3,
        rank_tokens=5,
        strengths=(1.0, 2.0),
        broken_budget=1.0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 6) for n in range(1, 7)]
    tuning = tuned.tuning
    assert tuning is not None
    assert tuning["pairs_hash"] == PAIRS.hash()
    assert tuning["options"]["rank_pairs"] == 3
    assert tuning["options"]["rank_tokens"] == 5


def test_bad_options_are_errors() -> None:
    lm, words = model(), tokenizer()
    with pytest.raises(PairsError, match="no pairs to tune on"):
        tune(planted(lm, words), lm, words, Pairs([]))
    knob = planted(lm, words)
    with pytest.raises(OptionError, match="positive"):
        tune(knob, lm, words, PAIRS, gains=(0.5, -1.0))
    with pytest.raises(OptionError, match="finalists"):
        tune(knob, lm, words, PAIRS, finalists=0)
    with pytest.raises(OptionError, match="negative"):
        tune(knob, lm, words, PAIRS, budget=-0.1)
    wrong: Any = "x"
    with pytest.raises(OptionError, match="Budgets are numbers, finite and not negative; got 'x'"):
        tune(knob, lm, words, PAIRS, budget=wrong)
    with pytest.raises(OptionError, match="rank_pairs is a whole number, 1 or more; got 'x'"):
        tune(knob, lm, words, PAIRS, rank_pairs=wrong)
    rail = Task("keep", ("Keep",), says_yes)
    with pytest.raises(OptionError, match="names of their own; got keep, keep"):
        tune(knob, lm, words, PAIRS, guardrails=[rail, rail])
    zero = Knob("zero", "planted", {Site(0, "last"): torch.zeros(knob.width)}, {0: 1.0}, Site(0, "last"), 1.0)
    with pytest.raises(TuneError, match="do not differ"):
        tune(zero, lm, words, PAIRS)


def test_tuning_without_a_task_goes_by_the_margin() -> None:
    lm, words = model(), tokenizer()
    tuned = tune(planted(lm, words), lm, words, PAIRS, gains=(0.5, 2.0), broken_budget=1.0, dose_response=False)
    assert tuned.site == Site(1, "last")
    assert tuned.tuning is not None
    assert tuned.tuning["task"] is None


def test_tuning_warns_of_a_choice_that_gains_nothing_and_of_the_pairs_it_was_learned_from() -> None:
    lm, words = model(), tokenizer()
    knob = planted(lm, words).pruned(Site(1, "last"))
    backwards = Knob("no", "planted", {knob.site: -knob.vectors[knob.site]}, knob.norms, knob.site, 1.0)
    options: dict[str, Any] = {"gains": (0.5,), "broken_budget": 1.0, "dose_response": False}
    with pytest.warns(TrimtabWarning, match="raises the margin of the chosen answers"):
        tune(backwards, lm, words, PAIRS, **options)
    learned = knob.with_(provenance={"pairs_hash": PAIRS.hash()})
    with pytest.warns(TrimtabWarning, match="learned from these very pairs"):
        tune(learned, lm, words, PAIRS, **options)


def test_a_task_file_is_read_and_bad_lines_are_named(tmp_path: Path) -> None:
    good = tmp_path / "sums.jsonl"
    turns = [{"role": "user", "content": "2+2?"}]
    lines = [{"prompt": "1+1?", "answer": "2"}, {"prompt": turns, "answer": 4}]
    good.write_text("\n".join(map(json.dumps, lines)))
    task = load_task(good, grader="exact_answer")
    assert task.prompts == ("1+1?", (Message("user", "2+2?"),))
    assert list(task.grade(["It is 2.", "5"])) == [1.0, 0.0]
    table = tmp_path / "sums.csv"
    table.write_text('prompt,answer\n1+1?,2\n"[{""role"": ""user"", ""content"": ""2+2?""}]",4\n')
    again = load_task(table, grader="exact_answer")
    assert again.prompts == task.prompts
    assert list(again.grade(["It is 2.", "5"])) == [1.0, 0.0]
    bad = tmp_path / "bad.jsonl"
    for line in ('{"prompt": "x"}', '{"prompt": 5, "answer": "x"}', "prompt"):
        bad.write_text(line)
        with pytest.raises(OptionError, match=r"bad\.jsonl: Line 1"):
            load_task(bad)
    with pytest.raises(KeyError, match="Known: contains"):
        load_task(good, grader="exact")


def test_a_question_of_a_file_counts_once_and_refusals_need_no_answer(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Bad?"}\n{"prompt": "Worse?", "answer": "false"}\n' * 2)
    with pytest.warns(TrimtabWarning, match="asks 2 of its 4 questions again"):
        refusals = load_task(tmp_path / "asked.jsonl", grader="refusal")
    assert refusals.grade(["I can't help with that.", "I can't help with that."]) == [1.0, 0.0]
    (tmp_path / "torn.jsonl").write_text('{"prompt": "x", "answer": 3}\n{"prompt": "x", "answer": 4}\n')
    with pytest.raises(OptionError, match="Line 1 and Line 2 ask the same with two true answers"):
        load_task(tmp_path / "torn.jsonl")


# --- a control that fools a naive protocol ---------------------------------------------------------------------------


def coin(prompts: Sequence[str], toss: int) -> Task:
    """A task on which every answer is as good as a coin: its score is a bit of a hash of prompt and answer."""

    def grade(answers: Sequence[str]) -> list[float]:
        hashes = [hashlib.sha256(f"{toss} {p} {a}".encode()).digest() for p, a in zip(prompts, answers, strict=True)]
        return [float(h[0] & 1) for h in hashes]

    return Task("coin", tuple(prompts), grade, max_new_tokens=4)


def test_thirty_useless_settings_look_like_a_gain_where_they_are_chosen_and_nowhere_else() -> None:
    lm, words = model(), tokenizer()
    validation, test = ([f"{name} {i}?" for i in range(100)] for name in ("Held", "New"))
    draws = torch.Generator().manual_seed(0)
    sites = [Site(layer, f"post_instruction[{-k}]") for layer in (0, 1) for k in range(1, 6)]
    knob = Knob("useless", "random", {s: torch.randn(32, generator=draws) for s in sites}, {0: 1, 1: 1}, sites[0], 1.0)
    gains = (1.0, 2.0, 4.0)
    settings = [{}, *({knob.with_(site=site, gain=gain): 1.0} for site in sites for gain in gains)]
    answers = {
        name: [run_task(lm, words, coin(prompts, 0), setting).answers for setting in settings]
        for name, prompts in (("held", validation), ("new", test))
    }
    naive: list[Interval] = []
    honest: list[Interval] = []
    expected: list[float] = []
    for toss in range(20):
        held, new = (
            [np.array(coin(prompts, toss).grade(said)) for said in answers[name]]
            for name, prompts in (("held", validation), ("new", test))
        )
        naive.append(paired_bootstrap(new[0], max(new[1:], key=np.mean), draws=1000))
        expected.append(selection_bias(new[0], new[1:]).expected)
        chosen = max(range(1, 31), key=lambda i: held[i].mean())
        honest.append(paired_bootstrap(new[0], new[chosen], draws=1000))
    # Chosen on the hundred items that are then reported, luck is a gain, and too often a "significant" one.
    assert np.mean([i.estimate for i in naive]) > 0.08
    assert np.mean([i.low > 0 for i in naive]) > 0.1  # 0.025 if luck were not chosen
    # Chosen on other items it is none; and the figure beside every tuned result foretold the luck.
    assert abs(np.mean([i.estimate for i in honest])) < 0.04
    assert np.mean([i.low > 0 for i in honest]) <= 0.1
    assert np.mean(expected) > np.mean([i.estimate for i in naive])  # an upper figure: settings resemble each other

    budgets: dict[str, Any] = {"gains": gains, "finalists": len(sites), "broken_budget": 1.0, "dose_response": False}
    with pytest.warns(TrimtabWarning, match=r"useless ones would seem to add 0\.\d+\. Add items"):
        tune(knob, lm, words, PAIRS, task=coin(validation, 0), **budgets)


def test_an_ablation_has_no_gain_to_choose_and_none_to_scale() -> None:
    lm, words = model(), tokenizer()
    knob = planted(lm, words).with_(operation="ablate", gain=0.7)
    tuned = tune(knob, lm, words, PAIRS, finalists=1, strengths=(1.0,), broken_budget=1.0)
    assert tuned.gain == 0.7
    assert tuned.tuning is not None
    assert [row["gain"] for row in tuned.tuning["table"]] == [0.7]
    assert len(tuned.tuning["ranking"]) == 2
    with pytest.raises(OptionError, match="the same at any gain: leave gains out"):
        tune(knob, lm, words, PAIRS, gains=[0.1])
    assert (1 * knob).direction.equal(knob.direction)
    for scaled in (lambda: 0.5 * knob, lambda: -knob):
        with pytest.raises(KnobError, match="is an ablation, the same at any gain"):
            scaled()
