"""The benchmark suite's own arithmetic: ratios, intervals, goals, the page, and taking up a run that was stopped."""

from __future__ import annotations

import json
import math
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.capture.batches import Group, make_batches
from trimtab.texts import Text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    assert str(ROOT) in sys.path


def rounds_of(**seconds: list[float]) -> list[dict[str, Any]]:
    """Make rounds in which only our side ran; NaN is a way that could not."""
    count = len(next(iter(seconds.values())))
    return [
        {"ours": {way: {"cpu": s[n], "wall": 2 * s[n]} for way, s in seconds.items() if not math.isnan(s[n])}}
        for n in range(count)
    ]


@pytest.mark.quick
def test_ratios_are_paired_within_rounds() -> None:
    from benchmarks.ratios import ratios, spread

    # The machine is ten times slower in the second round; only a ratio within the round is unmoved by it.
    rounds = rounds_of(plain=[1.0, 10.0, 1.0], steered=[1.1, 11.0, 1.1])
    assert spread(ratios(rounds, "ours", "steered", "plain", "cpu")).median == pytest.approx(1.1)
    assert ratios(rounds_of(plain=[1.0, math.nan], steered=[2.0, 2.0]), "ours", "steered", "plain", "cpu") == [2.0]


@pytest.mark.quick
def test_ours_beside_a_peer_is_divided_by_the_base_of_each_environment() -> None:
    from benchmarks.ratios import beside

    rounds = rounds_of(bare=[2.0], trimtab=[2.0])
    rounds[0]["theirs"] = {"bare": {"cpu": 4.0}, "repeng": {"cpu": 5.0}}
    found = beside(rounds, ("trimtab", "bare"), ("repeng", "bare"), "cpu", ("ours", "theirs"))
    assert found == [pytest.approx(0.8)]
    del rounds[0]["theirs"]["repeng"]
    assert beside(rounds, ("trimtab", "bare"), ("repeng", "bare"), "cpu", ("ours", "theirs")) == []


@pytest.mark.quick
def test_the_interval_covers_the_median_about_as_often_as_it_says() -> None:
    from benchmarks.ratios import spread

    random = np.random.default_rng(0)
    covered = [low <= 1.0 <= high for _ in range(200) for _, low, high, *_ in [spread(random.normal(1, 0.02, 9))]]
    assert 0.9 <= np.mean(covered) <= 1.0
    one = spread([3.0])
    assert one[:3] == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="finite"):
        spread([1.0, math.nan])


@pytest.mark.quick
def test_every_goal_names_a_case_and_names_are_unique() -> None:
    from benchmarks.cases import all_cases, on_accelerator, quick
    from benchmarks.goals import goals

    cases = all_cases()
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    for goal in goals():
        assert goal.case in names
        assert goal.of != "peak" or goal.against in names
        (ways,) = (case.ways for case in cases if case.name == goal.case)
        asked = {goal.way, goal.against} - {""} if goal.of == "ratio" else {goal.way}
        assert not ways or asked <= {*ways}
    assert {"pairs", "layers", "knobs", "batch"} <= {case.curve for case in cases}
    assert all(quick(case).name == case.name for case in cases)
    moved = on_accelerator(cases, "7b", "cuda", "bfloat16")
    assert moved
    assert all((c.options["device"], c.options["shape"]) == ("cuda", "7b") for c in moved)


class Fake:
    """Stands in for a worker: runs nothing, takes a second more each time, and dies when told."""

    side = "ours"

    def __init__(self, dies_after: int = 10**9, opens_until: int = 10**9) -> None:
        self.runs: list[str] = []
        self.dies_after, self.opens_until = dies_after, opens_until
        self.opened = 0

    def open(self, _kind: str, _options: object) -> dict[str, Any]:
        self.opened += 1
        if self.opened == self.opens_until:
            return {"cannot": "MemoryError: no"}
        return {"ways": ["plain", "steered", "broken"], "peak_mb": 1.0}

    def run(self, way: str) -> dict[str, Any]:
        if len(self.runs) == self.dies_after:
            raise KeyboardInterrupt
        self.runs.append(way)
        return {"cannot": "RuntimeError: no"} if way == "broken" else {"cpu": 1.0, "wall": 1.0, "peak_mb": 2.0}

    def stop(self) -> None:
        pass


@pytest.mark.quick
def test_a_stopped_run_is_taken_up_at_the_round_that_is_missing(tmp_path: Path) -> None:
    from benchmarks.cases import Case
    from benchmarks.run import measure
    from benchmarks.state import take_up

    case = Case("some", "Generation", "a case", "generate", {"device": "cpu", "rows": 1})

    def go(worker: Fake, case: Case = case) -> Any:
        state = take_up(tmp_path, case, 1, wanted=4)
        measure(case, state, {"ours": worker}, tmp_path)  # type: ignore[dict-item]
        return state

    stopped = Fake(dies_after=3 + 2 * 2)  # a warm-up of three ways, and two rounds of two
    with pytest.raises(KeyboardInterrupt):
        go(stopped)
    assert len(take_up(tmp_path, case, 1, wanted=4).rounds) == 2
    later = Fake()
    state = go(later)
    assert len(state.rounds) == 4
    assert len(later.runs) == 3 + 2 * 2
    assert state.cannot == {"ours": {"broken": "RuntimeError: no"}}
    assert later.runs[3:] == ["plain", "steered", "steered", "plain"]  # forwards and backwards in turn
    for fresh, opened in (("round", 1 + 4), ("run", 1 + 1 + 4 * 2)):  # a broken way is not tried again
        worker = Fake()
        assert len(go(worker, replace(case, name=fresh, fresh=fresh)).rounds) == 4  # type: ignore[arg-type]
        assert worker.opened == opened
        assert worker.runs[:2] == ["plain", "steered"]  # nothing warms up
    lost = go(Fake(opens_until=3), replace(case, name="lost", fresh="round"))
    assert lost.cannot["ours"] == {"all": "MemoryError: no"}
    assert [len(done) for done in lost.rounds] == [1, 0, 0, 0]
    other = replace(case, options={"device": "cpu", "rows": 2})
    assert take_up(tmp_path, other, 1, wanted=4).rounds == []


@pytest.mark.quick
def test_peers_that_do_not_start_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.run import BUILD, started
    from benchmarks.wire import WorkerDied

    class Dead(Fake):
        log = BUILD / "workers.log"

        def versions(self) -> dict[str, str]:
            raise WorkerDied("the process ended with status 1")

    class Alive(Fake):
        def versions(self) -> dict[str, str]:
            return {"python": "3"}

    workers: Any = {"ours": Alive(), "theirs": Dead()}
    assert started(workers) == {"ours": {"python": "3"}}
    assert [*workers] == ["ours"]
    assert "build/benchmarks/workers.log" in capsys.readouterr().out
    workers = {"ours": Dead()}
    with pytest.raises(WorkerDied):
        started(workers)


@pytest.mark.quick
def test_a_missed_goal_is_shown_as_missed_and_what_cannot_run_says_why() -> None:
    from benchmarks.page import judged, tables
    from benchmarks.state import State

    slow, fast = [1.05, 1.06, 1.05], [1.0, 1.01, 1.0]
    about = {"section": "Generation", "about": "greedy", "curve": "batch"}
    spec = {"kind": "generate", "options": {"device": "cpu"}, "ways": []}
    seconds = {"plain": [1.0] * 3, "trimtab": fast, "trimtab, a setting per row": slow}
    state = State("generate-1", 1, about, spec, 3, rounds=rounds_of(**seconds), bases={"ours": "plain"})
    state.cannot = {"theirs": {"repeng": "RuntimeError: shape"}}
    lines = judged([state]).splitlines()
    assert "1 met, 1 missed." in lines
    (row,) = (line for line in lines if "setting per row" in line)
    assert row == (
        "| generating at batch 1: trimtab, a setting per row | 1 | 1.0500 | 1.0500 to 1.0600 | 1.0500 to 1.0550 | 1.02 "
        "| upper end | **missed** |"
    )
    lone = judged([replace(state, rounds=state.rounds[:1])])
    assert "0 met, 0 missed, 2 not judged: a single round has no interval." in lone
    assert lone.count("| not judged |") == 2
    (table,) = tables([state])
    assert "repeng: cannot, `RuntimeError: shape`" in table
    assert state.clock == "cpu"
    assert replace(state, threads=2).clock == "wall"


@pytest.mark.quick
def test_texts_have_the_lengths_and_the_share_of_the_prompt_that_a_case_names() -> None:
    from benchmarks.models import sides, token_ids

    texts = sides(400, 96, 0.5)
    prompts, answers = ([len(text[i]) for text in texts] for i in (0, 1))
    assert 0.48 < sum(prompts) / (sum(prompts) + sum(answers)) < 0.52
    assert 36 <= min(answers) <= max(answers) <= 60
    assert max(len(text.prompt) for text in sides(5, 96, 0.0)) == 1
    whole = texts[0].prompt + texts[0].chosen
    (ids,) = token_ids([whole])
    assert len(ids) == len(whole)


@pytest.mark.quick
def test_errors_are_told_without_the_paths_of_a_machine() -> None:
    from benchmarks.worker import told

    text = told(OSError("no file /some/where/else/model.bin here\nand more"))
    assert text == "OSError: no file ... here"


@pytest.mark.quick
def test_a_worker_answers_line_by_line() -> None:
    from benchmarks.ways import directly
    from benchmarks.worker import Worker

    def fails() -> None:
        raise RuntimeError("shape")

    worker = Worker({"kind": lambda _: {"a": directly(lambda: 0.25), "b": directly(fails)}})
    assert worker.answer({"do": "open", "kind": "kind", "options": {"device": "cpu"}})["ways"] == ["a", "b"]
    measured = worker.answer({"do": "run", "way": "a"})
    assert (measured["cpu"], measured["wall"]) == (0.25, 0.25)
    assert worker.answer({"do": "run", "way": "b"}) == {"cannot": "RuntimeError: shape"}
    json.dumps(measured)


@pytest.mark.quick
def test_less_padding_is_what_capture_makes() -> None:
    from benchmarks import bare

    lengths = [20 + 37 * n % 60 for n in range(30)]
    groups = [Group(0, [Text(0, n, array("i", [1] * length), {})]) for n, length in enumerate(lengths)]
    ours = [(len(batch), batch[0].longest) for batch in make_batches(groups, 1000)]
    theirs = bare.batches([[1] * length for length in lengths], 1000, even=True)
    assert [tuple(ids.shape) for ids, _ in theirs] == ours
    assert len(ours) > len(bare.batches([[1] * length for length in lengths], 1000))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rounds 0", "--rounds is 1 or more; got 0"),
        ("--threads 0", "--threads are numbers from 1 to"),
        ("--threads 1,,2", "--threads are numbers from 1 to"),
        ("--threads 9999", "--threads are numbers from 1 to"),
        ("--model-size 9b", "invalid choice: '9b'"),
        ("--dtype float31", "invalid choice: 'float31'"),
        ("--device nonsense", "invalid choice: 'nonsense'"),
        ("--way trimtab", "--way goes with --profile"),
        ("--only nothing", "No case is called 'nothing'. Known: capture-100-share-0"),
        ("--profile generate-*", "--profile takes one case"),
    ],
)
def test_a_wrong_argument_is_named(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.run import main

    monkeypatch.setattr("sys.argv", ["run", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code
    assert message in f"{stopped.value.code}{capsys.readouterr().err}"


@pytest.mark.quick
def test_what_is_not_measured_stays_as_the_last_record_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import run
    from benchmarks.state import State

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "DOCS", tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["run"])
    args = run.arguments()
    about = {"section": "Generation", "about": "a case", "curve": ""}
    for name, folder in (("one", "first"), ("two", "second")):
        spec = {"kind": "generate", "options": {"device": "cpu"}, "ways": []}
        rounds = [{"ours": {"plain": {"cpu": 1.0, "wall": 1.0, "peak_mb": 1.0}}}]
        State(name, 1, about, spec, 1, rounds=rounds, bases={"ours": "plain"}).save(tmp_path / folder)
        run.write(args, tmp_path / folder)
    (record,) = run.newest(tmp_path)
    assert [case["case"] for case in record["cases"]] == ["one", "two"]
    assert "`one`" in (tmp_path / "benchmarks.md").read_text()


def test_ways_that_take_turns_do_what_they_say_and_leave_the_models_plain() -> None:
    from benchmarks.models import llama
    from benchmarks.ours.steps import stepping

    options = {"device": "cpu", "dtype": "float32", "shape": "tiny", "rows": 2, "prompt": 4, "new": 8}
    before = {name: value.clone() for name, value in llama("tiny").state_dict().items()}
    ways = stepping(options)
    assert [*ways] == ["plain", "trimtab", "trimtab, a setting per row", "trimtab, baked"]
    for way in [*ways.values(), *reversed(ways.values())]:  # two rounds, forwards and backwards
        with way() as action:
            assert action() > 0  # type: ignore[operator]
    after = llama("tiny")
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in after.modules())


def test_ways_that_do_not_steer_are_found_out() -> None:
    from contextlib import nullcontext
    from copy import deepcopy

    from benchmarks.models import llama, prompts
    from benchmarks.ours.steering import knob_for
    from benchmarks.ours.steps import Turns

    from trimtab.runtime import steer

    models = [deepcopy(llama("tiny")) for _ in range(4)]
    names = ("plain", "trimtab", "trimtab, a setting per row", "trimtab, baked")
    runs: dict[str, Any] = {name: (model, nullcontext) for name, model in zip(names, models, strict=True)}
    with pytest.raises(RuntimeError, match="The steered model came to the tokens of the plain one"):
        Turns(runs, prompts(2, 4), 8).seconds("plain")
    knob = knob_for(models[1])
    runs["trimtab"] = models[1], lambda: steer(models[1], {knob: 1.0})
    with pytest.raises(RuntimeError, match="The baked model came to other tokens"):
        Turns(runs, prompts(2, 4), 8).seconds("plain")
    assert not any(module._forward_hooks for module in models[1].modules())
    models[3].lm_head.weight.data += 1
    with pytest.raises(AssertionError, match="baking changed a weight"):
        Turns(runs, prompts(2, 4), 8)
