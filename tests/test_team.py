"""Learning on several processes: the same knob whatever their number, errors for all, and what a killed one leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import pico
from trimtab.artifact import AnyKnob, Knob, LowRank, load_knob
from trimtab.capture import capture
from trimtab.capture.running import Runner
from trimtab.cli import main
from trimtab.errors import OptionError
from trimtab.learn import learn
from trimtab.ops import Moments
from trimtab.pairs import Pairs
from trimtab.render import load
from trimtab.team import ALONE, Team, open_team, torchrun
from trimtab.train.steps import learn_lookahead, learn_step


def test_one_process_does_everything_and_several_share_batches_out() -> None:
    assert ALONE.leads
    assert all(ALONE.takes(batch) for batch in range(5))
    three = [Team(rank, 3) for rank in range(3)]
    assert [[team.takes(batch) for team in three].index(True) for batch in range(5)] == [0, 1, 2, 0, 1]
    assert all(sum(team.takes(batch) for team in three) == 1 for batch in range(9))
    assert ALONE.collect({"a": 1}) == [{"a": 1}]
    assert ALONE.add(torch.ones(2)).tolist() == [1, 1]
    assert ALONE.first(lambda: 3) == 3
    with pytest.raises(OptionError, match="Ranks count from 0 to 1; got 2"):
        Team(2, 2)


def test_without_torchrun_there_is_no_team() -> None:
    assert not torchrun({})
    assert not torchrun({"WORLD_SIZE": "2"})  # of another launcher
    assert not torchrun({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"})
    assert torchrun({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"})
    with open_team(minutes=1) as team:
        assert team is ALONE


def test_moments_of_parts_merge_to_those_of_the_whole() -> None:
    values = torch.randn(40, 3, dtype=torch.float64)
    whole, parts = Moments(), (Moments(), Moments(), Moments())
    whole.add(values)
    for part, some in zip(parts, (values[:1], values[1:25], values[25:]), strict=True):
        part.add(some)
    first, *others = parts
    for other in others:
        first.merge(other)
    torch.testing.assert_close(first.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.variance, whole.variance, rtol=1e-12, atol=1e-12)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pico.model().save_pretrained(tmp_path / "model")
    pico.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"q{n} " * (n % 4 + 1), "chosen": f"yes {n}", "rejected": f"no! {n}"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def torchrun_two(*call: str, **environment: str) -> tuple[int, str, str]:
    """Let torchrun start two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run([*start, *call], env=known, capture_output=True, text=True, timeout=300, check=False)
    return run.returncode, run.stdout, run.stderr


def tensors(knob: AnyKnob) -> dict[str, torch.Tensor]:
    if isinstance(knob, Knob):
        norms = {f"norm {layer}": torch.tensor(norm) for layer, norm in knob.norms.items()}
        return {**{str(site): vector for site, vector in knob.vectors.items()}, **norms}
    return {name: part.dense() if isinstance(part, LowRank) else part for name, part in knob.parts.items()}


LEARN = ["learn", "model", "pairs.jsonl", "--token-budget", "80", "--method", "diffmean", "--positions", "last"]


def every(team: Team) -> dict[str, AnyKnob]:
    """Learn by every way of reading that several processes can share."""
    model, tokenizer = load("model")
    pairs, budget = Pairs.load("pairs.jsonl"), 80
    read = partial(learn, model, tokenizer, pairs, token_budget=budget)
    answers = partial(read, positions="last", format="question_response")
    return {
        "diffmean": answers(method="diffmean", team=team),
        "pca": answers(method="pca", length_match="regress", team=team),
        "cold-kernel": learn(model, tokenizer, pairs, method="cold-kernel", token_budget=budget, team=team),
        "softmax": read(method="cold-kernel", options={"kernel": "softmax"}, team=team),
        "cold-fd": learn_lookahead(model, tokenizer, pairs, token_budget=budget, team=team),
        "one-step": learn_step(model, tokenizer, pairs, token_budget=budget, team=team),
    }


EVERY = """
import sys
sys.path.insert(0, sys.argv[1])
from test_team import every
from trimtab.team import open_team

with open_team() as team:
    for name, knob in every(team).items():
        knob.save(f"{name}.{team.rank}.safetensors")
"""


def test_one_process_and_two_learn_the_same_knobs(folder: Path) -> None:
    """Two read different batches; their sums are those of one but for the order in which they are added up."""
    (folder / "every.py").write_text(EVERY)
    status, _, error = torchrun_two("every.py", str(Path(__file__).parent))
    assert status == 0, error
    for name, knob in every(ALONE).items():
        wanted = tensors(knob)
        for rank in range(2):
            found = load_knob(folder / f"{name}.{rank}.safetensors")
            assert found.provenance["options"] == knob.provenance["options"]
            assert tensors(found).keys() == wanted.keys()
            for part, value in tensors(found).items():
                torch.testing.assert_close(value, wanted[part], rtol=1e-4, atol=1e-6, msg=f"{name} {part}")


def test_a_process_that_is_one_of_two_runs_every_second_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load("model")
    pairs, ran = Pairs.load("pairs.jsonl"), list[int]()
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda own, batch, budget: (ran.append(len(batch)), run(own, batch, budget))[1])
    monkeypatch.setattr(Team, "add", lambda self, part: part)
    monkeypatch.setattr(Team, "collect", lambda self, part: [part])

    def read(team: Team) -> torch.Tensor:
        found = capture(
            model, tokenizer, pairs, positions=["last"], format="question_response", token_budget=80, team=team
        )
        return found.chosen

    whole, batches = read(ALONE), [*ran]
    halves = [read(Team(rank, 2)) for rank in range(2)]
    assert ran[len(batches) :] == [*batches[::2], *batches[1::2]]
    assert torch.equal(halves[0] + halves[1], whole)


COUNTING = """
import os, sys
from pathlib import Path
from trimtab.capture.running import Runner
from trimtab.cli import main

rank, last = os.environ["RANK"], int(os.environ["LAST"])
run, count = Runner.run, 0

def counted(self, batch, budget):
    global count
    if rank == "1" and count == last:
        os.kill(os.getpid(), 9)
    count += 1
    Path(f"ran.{rank}").write_text(str(count))
    return run(self, batch, budget)

Runner.run = counted
sys.exit(main(sys.argv[1:]))
"""
"""Counts the batches that each process runs, and kills the second one before it runs more than `LAST`."""


def ran(folder: Path) -> int:
    """Return how many batches were run, and forget them."""
    files = list(folder.glob("ran.*"))
    count = sum(int(file.read_text()) for file in files)
    for file in files:
        file.unlink()
    return count


def test_a_killed_worker_loses_its_batch_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "counting.py").write_text(COUNTING)
    assert main([*LEARN, "--out", "whole.safetensors", "--checkpoint", "alone", "--name", "k"]) == 0
    call = ["counting.py", *LEARN, "--out", "k.safetensors", "--json", "--checkpoint", "kept"]
    status, _, _ = torchrun_two(*call, LAST="2")
    assert status != 0
    assert not (folder / "k.safetensors").exists()
    kept = len(list((folder / "kept").glob("step-batch-*")))
    assert kept >= 2
    assert 0 <= ran(folder) - kept <= 1  # what the other process was at when it was ended
    status, said, error = torchrun_two(*call, LAST="99")
    assert status == 0, error
    assert len(said.strip().splitlines()) == 1  # one of the two speaks
    assert json.loads(said)["pairs"] == 12
    assert kept + ran(folder) > 6
    assert not (folder / "kept").exists()
    one, two = (tensors(load_knob(folder / name)) for name in ("whole.safetensors", "k.safetensors"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8)


def test_an_error_of_the_first_is_everyones_and_what_trains_is_refused(folder: Path) -> None:
    (folder / "kept").mkdir()
    (folder / "kept" / "mine.txt").write_text("x")
    status, _, error = torchrun_two("-m", "trimtab", *LEARN, "--out", "k.safetensors", "--checkpoint", "kept")
    assert status != 0
    assert error.count("is a folder with other files") >= 1
    status, _, error = torchrun_two("-m", "trimtab", "learn", "model", "pairs.jsonl", "--method", "bipo", "--out", "k")
    assert status != 0
    assert "bipo trains in one process" in error
