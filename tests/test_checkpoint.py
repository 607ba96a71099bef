"""Jobs that stop and go on: the same knob bit for bit, nothing lost but the last step, and no file that is trusted."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pico
from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.capture import capture
from trimtab.checkpoint import JOB, SAMPLE, Checkpoint, digest, remove
from trimtab.cli import main
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, TrimtabWarning, TuneError
from trimtab.evals.tasks import Task
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.tune import tune
from trimtab.types import Message, Site

JOB_A: dict[str, Any] = {"work": "test", "layers": [0, 1], "pairs": "a" * 64}
KILLS = 20


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico.model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pico.tokenizer()


def pairs(count: int = 12) -> Pairs:
    records = [
        {"prompt": f"Question {n}?", "chosen": "yes" + "!" * (n % 7), "rejected": "no" + "." * (n % 5)}
        for n in range(count)
    ]
    return Pairs.from_records(records)


def says_yes(answers: Sequence[str]) -> list[float]:
    return [float(answer.startswith("y")) for answer in answers]


class Counter:
    """Counts the steps that are computed, in this process and in those forked from it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
        take = Checkpoint._take

        def counted(kept: Checkpoint, name: str, compute: Callable[[], Any], *how: Any) -> Any:
            def begin() -> Any:
                os.write(self._file, b".")
                return compute()

            return take(kept, name, begin, *how)

        monkeypatch.setattr(Checkpoint, "_take", counted)

    def take(self) -> int:
        """Return the number of steps begun since the last call."""
        count = os.fstat(self._file).st_size
        os.ftruncate(self._file, 0)
        return count


@pytest.fixture
def counter(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(tmp_path_factory.mktemp("counter") / "steps", monkeypatch)


def assert_same(one: Knob, other: Knob) -> None:
    """Two knobs agree in every bit but the times at which they were made."""
    assert list(one.vectors) == list(other.vectors)
    assert all(torch.equal(one.vectors[site], other.vectors[site]) for site in one.vectors)
    assert (one.name, one.method, one.norms, one.site, one.gain) == (
        other.name,
        other.method,
        other.norms,
        other.site,
        other.gain,
    )
    assert (one.where, one.operation, one.diagnostics) == (other.where, other.operation, other.diagnostics)
    for a, b, when in (
        (one.provenance, other.provenance, "created"),
        (one.tuning or {}, other.tuning or {}, "seconds"),
    ):
        assert {k: v for k, v in a.items() if k != when} == {k: v for k, v in b.items() if k != when}


def stop_after(steps: int) -> Callable[[int, int], None]:
    """Interrupt at the call of `progress` with this number."""
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == steps:
            raise KeyboardInterrupt

    return progress


# The folder


def test_values_come_back_as_they_were_and_are_not_computed_again(tmp_path: Path) -> None:
    value = {"floats": [0.1 + 0.2, 1e-320, float("inf")], "text": "ä\ud800", "none": None}
    tensors = {"a": torch.randn(3, 0, 2), "b": torch.randn(5).bfloat16(), "c": torch.tensor([float("nan"), -0.0])}
    kept = Checkpoint(tmp_path / "new" / "folder", lambda: JOB_A)
    assert kept.step("one/1 ü", lambda: value) == value
    kept.tensors("two", lambda: tensors)

    again = Checkpoint(tmp_path / "new" / "folder", lambda: JOB_A)
    assert again.step("one/1 ü", lambda: pytest.fail("computed again")) == value
    found = again.tensors("two", lambda: pytest.fail("computed again"))
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert all(t.numpy(force=True).tobytes() == tensors[n].numpy().tobytes() for n, t in found.items() if n != "b")
    assert torch.equal(found["b"], tensors["b"])
    assert again.step("one/1 u", lambda: "another key") == "another key"


def test_without_a_folder_every_step_is_computed_and_the_job_is_not_described() -> None:
    kept = Checkpoint(None, lambda: pytest.fail("described"))
    assert [kept.step("same", lambda n=n: n) for n in range(2)] == [0, 1]


def test_a_folder_of_another_job_is_refused_and_the_error_names_what_differs(tmp_path: Path) -> None:
    Checkpoint(tmp_path, lambda: JOB_A)
    other = {**JOB_A, "pairs": "b" * 64, "layers": (0,)}
    with pytest.raises(OptionError, match=r"layers \(\[0, 1\] there, \[0\] here\), pairs \(a{12} there, b{12} here\)"):
        Checkpoint(tmp_path, lambda: other)
    with pytest.raises(OptionError, match="Pass another folder, or remove this one"):
        Checkpoint(tmp_path, lambda: {**JOB_A, "padding": "left"})
    Checkpoint(tmp_path, lambda: {**JOB_A, "layers": (0, 1)})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": {}}', '{"trimtab": "checkpoint"}', "\xff"])
def test_a_job_file_that_is_damaged_or_of_somebody_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / JOB).write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError, match=r"job\.json' is damaged, or not of a checkpoint"):
        Checkpoint(tmp_path, lambda: JOB_A)
    remove(tmp_path)
    assert (tmp_path / JOB).read_bytes() == text.encode("latin-1")


def test_a_folder_with_other_files_is_refused_and_so_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match=r"folder with other files, 'thesis\.txt' for one"):
        Checkpoint(tmp_path, lambda: JOB_A)
    with pytest.raises(OptionError, match="cannot be written: File exists"):
        Checkpoint(tmp_path / "thesis.txt", lambda: JOB_A)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_only_what_a_checkpoint_wrote_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    kept = Checkpoint(folder, lambda: JOB_A)
    kept.step("one", lambda: 1)
    kept.tensors("two", lambda: {"t": torch.zeros(1)})
    step = next(folder.glob("step-one-*"))
    (folder / f".{step.name}.0a1b2c3d.part").write_text("what a kill left")
    mine = ("notes.txt", "step-1.json", ".hidden.part", "job.json.bak")
    for name in mine:
        (folder / name).write_text("mine")
    remove(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(mine)
    remove(folder)
    remove(tmp_path / "missing")
    for name in mine:
        (folder / name).unlink()
    Checkpoint(folder, lambda: JOB_A)
    remove(folder)
    assert not folder.exists()


def test_a_damaged_step_is_computed_again_with_a_warning(tmp_path: Path) -> None:
    def answers(kept: Checkpoint, plain: int, tensor: float) -> tuple[int, Tensor]:
        return kept.step("plain", lambda: plain), kept.tensors("tensor", lambda: {"t": torch.full((64,), tensor)})["t"]

    kept = Checkpoint(tmp_path, lambda: JOB_A)
    answers(kept, 1, 1.0)
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != JOB}
    assert len(files) == 2
    for path, data in files.items():
        other = next(found for name, found in files.items() if name != path)
        flipped = data.replace(b'"value": 1', b'"value": 3') if path.suffix == ".json" else data[:-1] + b"\x01"
        for broken in (b"", data[: len(data) // 2], data[:-1], flipped, b"[]", other):
            path.write_bytes(broken)
            with pytest.warns(TrimtabWarning, match=f"{path.name}.* is damaged .*computed again"):
                plain, tensor = answers(kept, 2, 2.0)
            assert (plain, float(tensor[0])) == ((2, 1.0) if path.suffix == ".json" else (1, 2.0))
            answers(kept, 5, 5.0)  # whole again: no warning
        path.write_bytes(data)


def test_a_step_of_another_key_or_job_is_not_trusted_under_this_one(tmp_path: Path) -> None:
    one, other = (Checkpoint(tmp_path / name, lambda n=name: {"job": n}) for name in ("one", "other"))
    for kept in (one, other):
        kept.step("plain", lambda: 1)
        kept.tensors("tensor", lambda: {"t": torch.zeros(1)})
    for path in (tmp_path / "other").glob("step-*"):
        (tmp_path / "one" / path.name).write_bytes(path.read_bytes())
    with pytest.warns(TrimtabWarning, match="checksum differs"):
        assert one.step("plain", lambda: 2) == 2
    with pytest.warns(TrimtabWarning, match="checksum differs"):
        assert one.tensors("tensor", lambda: {"t": torch.ones(1)})["t"] == 1


def test_a_full_disk_is_one_error_and_what_was_kept_stays_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoint(tmp_path, lambda: JOB_A)
    kept.step("one", lambda: 1)
    before = sorted(tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write and fsync say it: without a file's name

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for attempt in (
            lambda: kept.step("two", lambda: 2),
            lambda: kept.tensors("three", lambda: {"t": torch.ones(3)}),
            lambda: Checkpoint(tmp_path / "new", lambda: JOB_A),
        ):
            with pytest.raises(OptionError, match=r"No space left on device\. The steps that it holds stay usable"):
                attempt()
    assert sorted(tmp_path.iterdir()) == [*before[:1], tmp_path / "new", *before[1:]]
    (tmp_path / "new").rmdir()
    again = Checkpoint(tmp_path, lambda: JOB_A)
    assert again.step("one", lambda: pytest.fail("computed again")) == 1
    assert again.step("two", lambda: 2) == 2


# What a job depends on


def test_the_digest_sees_names_types_shapes_and_values() -> None:
    small, large = torch.randn(SAMPLE), torch.randn(SAMPLE // 16, 64)
    first = digest([("small", small), ("large", large)])
    assert digest([("small", small.clone()), ("large", large.clone())]) == first
    changed = small.clone()
    changed[SAMPLE - 2] += 1e-3
    column = large.clone()
    column[:, 63] += 1e-3
    for tensors in (
        [("small", changed), ("large", large)],
        [("small", small), ("large", column)],
        [("other", small), ("large", large)],
        [("small", small.view(2, -1)), ("large", large)],
        [("small", small.view(torch.int32)), ("large", large)],
        [("small", small), ("large", large.to("meta"))],
    ):
        assert digest(tensors) != first
    for tensor in (torch.ones((), dtype=torch.bfloat16), torch.zeros(0), torch.ones(3, 4).T, torch.ones(9) > 0):
        assert digest([("t", tensor)]) == digest([("t", tensor.clone())])


def test_the_digest_looks_into_quantised_tensors() -> None:
    def quantised(value: float) -> Any:
        return SimpleNamespace(data=torch.full((4,), value), __tensor_flatten__=lambda: (["data"], None))

    assert digest([("w", quantised(1.0))]) == digest([("w", quantised(1.0))]) != digest([("w", quantised(2.0))])


# Learning


def test_a_stopped_capture_goes_on_with_the_same_bits_and_progress_counts_what_is_kept(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, counter: Counter
) -> None:
    options: dict[str, Any] = {"positions": ["post_instruction", "demonstrated"], "format": "response_as_user"}
    options |= {"token_budget": 150, "padding": "left", "layers": [0, 2]}
    whole = capture(model, tokenizer, pairs(), **options)
    steps = counter.take()
    assert steps > 10
    for stop in (3, 8, 1):  # the last one stops at what is kept
        with pytest.raises(KeyboardInterrupt):
            capture(model, tokenizer, pairs(), checkpoint=tmp_path / "kept", progress=stop_after(stop), **options)
    assert counter.take() == 1 + 8  # whether prompts are shared, and eight batches
    seen: list[tuple[int, int]] = []
    resumed = capture(
        model, tokenizer, pairs(), checkpoint=tmp_path / "kept", progress=lambda *at: seen.append(at), **options
    )
    assert counter.take() == steps - 9
    assert torch.equal(resumed.chosen, whole.chosen)
    assert torch.equal(resumed.rejected, whole.rejected)
    assert (resumed.norms, resumed.norm_tokens, resumed.sites) == (whole.norms, whole.norm_tokens, whole.sites)
    assert len(seen) == steps - 1
    assert seen[-1][0] == seen[-1][1]


def test_batches_that_were_halved_come_back_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to, options = Adapter.run_to, {"positions": ["last", "response_mean"], "format": "question_response"}

    def small(self: Adapter, layer: int, **inputs: Tensor) -> None:
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no")
        run_to(self, layer, **inputs)

    monkeypatch.setattr(Adapter, "run_to", small)
    options |= {"token_budget": 200}
    whole = capture(model, tokenizer, pairs(), **options)
    with pytest.raises(KeyboardInterrupt):
        capture(model, tokenizer, pairs(), checkpoint=tmp_path, progress=stop_after(2), **options)
    resumed = capture(model, tokenizer, pairs(), checkpoint=tmp_path, **options)
    assert torch.equal(resumed.chosen, whole.chosen)
    assert torch.equal(resumed.rejected, whole.rejected)
    assert resumed.norms == whole.norms


def test_a_stopped_learn_ends_in_the_same_knob_whatever_is_made_of_the_readings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, counter: Counter
) -> None:
    whole = learn(model, tokenizer, pairs(), token_budget=300)
    steps = counter.take()
    with pytest.raises(KeyboardInterrupt):
        learn(model, tokenizer, pairs(), token_budget=300, checkpoint=tmp_path, progress=stop_after(2))
    assert_same(learn(model, tokenizer, pairs(), token_budget=300, checkpoint=str(tmp_path)), whole)
    assert counter.take() == steps
    # The method comes after the reading, so another one takes what is kept.
    other = learn(model, tokenizer, pairs(), token_budget=300, checkpoint=tmp_path, method="palrs", seed=3, last=0.8)
    assert (counter.take(), other.site) == (0, whole.site)
    assert tmp_path.exists()


def test_whatever_the_readings_depend_on_makes_another_job(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base: dict[str, Any] = {"positions": ["last"], "layers": [0, 1], "format": "question_response"}

    def read(lm: PreTrainedModel = model, words: Any = tokenizer, data: Pairs | None = None, **options: Any) -> None:
        capture(lm, words, data or pairs(4), checkpoint=tmp_path, **{**base, **options})

    read()
    read()
    template = pico.tokenizer()
    template.chat_template = pico.TEMPLATE.replace("<s>", "<s>\n")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": pairs(5)}, "pairs"),
        ({"positions": ["response_mean"]}, "positions"),
        ({"layers": [0]}, "layers"),
        ({"format": "response_as_user"}, "format"),
        ({"token_budget": 100}, r"token budget \(8192 there, 100 here\)"),
        ({"padding": "left"}, "padding"),
        ({"lm": pico.model(seed=1)}, "another job: weights"),
        ({"lm": pico.model(dtype=torch.bfloat16)}, "dtype"),
        ({"lm": pico.model(rms_norm_eps=1e-3)}, "configuration"),
        ({"words": template}, "chat template"),
    ]
    for change, named in changes:
        with pytest.raises(OptionError, match=named):
            read(**change)
    read()


# Tuning


def planted(lm: PreTrainedModel, words: PreTrainedTokenizerFast) -> Knob:
    """A knob with the direction that writes "y" at the last layer, and noise at another site."""
    letter = Renderer(words).full([Message("user", "Q")], "yes")
    write = lm.get_output_embeddings().weight[letter.ids[letter.response_start]].detach().float()
    noise = torch.randn(len(write), generator=torch.Generator().manual_seed(0))
    vectors = {Site(1, "last"): write, Site(0, "last"): noise}
    return Knob("yes", "planted", vectors, {0: 1.0, 1: 1.0}, Site(0, "last"), 1.0)


def tuning_options() -> dict[str, Any]:
    return {
        "task": Task("yes", tuple(f"Ask {i}" for i in range(3)), says_yes, max_new_tokens=2),
        "guardrails": [Task("keep", ("Keep",), lambda answers: [1.0] * len(answers), max_new_tokens=2)],
        "gains": (0.5, 4.0, 40.0),
        "broken_budget": 1.0,
        "strengths": (-1.0, 0.5, 1.0),
    }


def test_a_stopped_tune_ends_in_the_same_knob(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, counter: Counter
) -> None:
    knob, options = planted(model, tokenizer), tuning_options()
    whole = tune(knob, model, tokenizer, pairs(), **options)
    steps = counter.take()
    for stop in (1, 2, 4, 8, 10):  # ranking, base, settings, dose-response
        with pytest.raises(KeyboardInterrupt):
            tune(knob, model, tokenizer, pairs(), checkpoint=tmp_path, progress=stop_after(stop), **options)
    resumed = tune(knob, model, tokenizer, pairs(), checkpoint=tmp_path, **options)
    assert_same(resumed, whole)
    assert resumed.tuning is not None
    assert {type(row["kl"]) for row in resumed.tuning["dose_response"]} == {float}
    assert counter.take() == steps


def test_kept_answers_serve_other_budgets_and_strengths_and_are_graded_again(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, counter: Counter
) -> None:
    knob, options = planted(model, tokenizer).pruned(Site(1, "last")), tuning_options()
    rails = [Task("keep", ("Keep",), lambda answers: [float(a[:1] != "y") for a in answers], max_new_tokens=2)]
    with pytest.raises(TuneError, match="guardrail 'keep' falls"):
        tune(knob, model, tokenizer, pairs(), checkpoint=tmp_path, **options | {"gains": (40.0,), "guardrails": rails})
    before = counter.take()
    assert before > 5
    options |= {"gains": (40.0,), "budget": 1.0, "dose_response": False}
    strict = tune(knob, model, tokenizer, pairs(), checkpoint=tmp_path, **options | {"guardrails": rails})
    lenient = tune(knob, model, tokenizer, pairs(), checkpoint=tmp_path, **options)
    for tuned, score in ((strict, 0.0), (lenient, 1.0)):
        assert tuned.tuning is not None
        assert [row["guardrails"]["keep"] for row in tuned.tuning["table"]] == [score]
    assert counter.take() == 0


def test_whatever_tuning_measures_makes_another_job(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    knob = planted(model, tokenizer)
    base = tuning_options() | {"dose_response": False}
    base["task"] = task = Task("yes", ("Ask",), says_yes, max_new_tokens=2)

    def run(data: Pairs | None = None, turned: Knob = knob, **options: Any) -> None:
        tune(turned, model, tokenizer, data or pairs(4), checkpoint=tmp_path, **{**base, **options})

    run()
    turned = Knob("yes", "planted", {s: -v for s, v in knob.vectors.items()}, knob.norms, knob.site, 1.0)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": pairs(5)}, "pairs"),
        ({"turned": turned}, "knob's vectors"),
        ({"turned": knob.with_(operation="ablate"), "gains": None}, r".*operation \(add there, ablate here\)"),
        ({"gains": (0.5, 4.0)}, "gains"),
        ({"where": "completion"}, "where"),
        ({"rank_pairs": 2}, "ranked pairs"),
        ({"rank_tokens": 2}, "ranked tokens"),
        ({"batch_size": 1}, "batch size"),
        ({"task": None}, "tasks"),
        ({"task": Task("yes", ("Ask me",), says_yes, max_new_tokens=2)}, "tasks"),
        ({"task": Task("yes", ("Ask",), says_yes, max_new_tokens=3)}, "tasks"),
        ({"guardrails": [task]}, "tasks"),
    ]
    for change, named in changes:
        with pytest.raises(OptionError, match=f"another job: {named}"):
            run(**change)
    with pytest.raises(OptionError, match=r"work \(tuning there, reading pairs here\)"):
        learn(model, tokenizer, pairs(4), checkpoint=tmp_path)
    run()


# The command line


@pytest.fixture
def work(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A folder with a model, pairs, a knob and a task."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in pairs()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "task.jsonl").write_text('{"prompt": "Ask", "answer": "y"}')
    planted(model, tokenizer).save(tmp_path / "planted.safetensors")
    return tmp_path


@pytest.mark.parametrize("verb", ["learn", "tune"])
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    verb: str, work: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = {name: str(work / name) for name in ("model", "pairs.jsonl", "task.jsonl", "planted.safetensors", "kept")}
    words = ["learn", path["model"], path["pairs.jsonl"], "--token-budget", "200"]
    if verb == "tune":
        words = ["tune", path["model"], "--knob", path["planted.safetensors"], "--pairs", path["pairs.jsonl"]]
        words += ["--task", path["task.jsonl"], "--grader", "contains", "--max-new-tokens", "2", "--broken-budget", "1"]
        words += ["--gains", "4"]
    checkpoint = ["--checkpoint", path["kept"]]
    assert main([*words, "--out", str(work / "knob.whole")]) == 0
    steps = counter.take()

    @contextmanager
    def impatient(*_: object, **options: object) -> Generator[Callable[[int, int], None]]:
        yield stop_after(3)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Terminal, "working", impatient)
        assert main([*words, "--out", str(work / "knob.resumed"), *checkpoint]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    said = f"trimtab: interrupted; {path['kept']!r} keeps the finished steps; the same command goes on from there"
    assert line == said
    assert Path(path["kept"], JOB).exists()
    (work / "kept" / "notes.txt").write_text("mine")

    assert main([*words, "--out", str(work / "knob.resumed"), *checkpoint]) == 0
    assert counter.take() == steps
    assert_same(Knob.load(work / "knob.resumed"), Knob.load(work / "knob.whole"))
    assert [left.name for left in (work / "kept").iterdir()] == ["notes.txt"]


def test_ctrl_c_without_a_checkpoint_says_no_more_than_before(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Adapter, "run_to", interrupt)
    assert main(["learn", str(work / "model"), str(work / "pairs.jsonl"), "--out", str(work / "knob")]) == 130
    assert capsys.readouterr().err == "\ntrimtab: interrupted\n"


# Kills


def live(job: Callable[[], object], seconds: float) -> bool:
    """Run a job in a forked process, killed after some seconds; True if it was done before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except Exception:  # noqa: BLE001  # nothing may return into the test of the parent
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the job failed"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the job failed"
    return status == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("verb", ["learn", "tune"])
def test_twenty_kills_lose_nothing_but_the_step_that_ran(
    verb: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, counter: Counter
) -> None:
    knob, out = planted(model, tokenizer), tmp_path / "knob.safetensors"

    def make(folder: Path | None = None) -> Knob:
        if verb == "learn":
            return learn(model, tokenizer, pairs(60), token_budget=100, checkpoint=folder)
        return tune(knob, model, tokenizer, pairs(), checkpoint=folder, **tuning_options())

    def make_and_save(folder: Path) -> None:
        make(folder).save(out)

    whole = make()
    steps = counter.take()
    begun = time.monotonic()
    assert live(partial(make_and_save, tmp_path / "timed"), 60)
    span = time.monotonic() - begun
    counter.take()

    dice, kills, jobs = random.Random(0), 0, 0
    while kills < KILLS:
        folder, lost = tmp_path / f"job{jobs}", 0
        jobs += 1
        out.unlink(missing_ok=True)
        while not live(partial(make_and_save, folder), dice.uniform(0, span / 4) if kills < KILLS else 60):
            lost, kills = lost + 1, kills + 1
            if out.exists():  # killed between the save and the end
                Knob.load(out)
        assert_same(Knob.load(out), whole)
        assert steps <= counter.take() <= steps + lost
        remove(folder)
        assert not folder.exists()
