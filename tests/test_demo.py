"""The demo's plumbing and its contract, at sizes whose figures mean nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab import demo
from trimtab.artifact import Knob
from trimtab.demo.report import CONDITIONS, _side_by_side
from trimtab.evals.tasks import Outcome

KEYS = {"model", "versions", "seed", "seconds", "chosen", "results", "tuning", "samples", "sizes", "warnings"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    demo.run(out, quick=True)
    return out


def test_the_report_keeps_its_contract(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert set(report) == KEYS
    assert set(report["seconds"]) == {"learn", "tune", "total"}
    assert set(report["results"]) == {"math", "code"} == set(report["chosen"])
    for knob, tasks in report["results"].items():
        assert set(tasks) == {"math", "code", "facts", "copying", "sorting"}
        assert set(report["chosen"][knob]) == {"layer", "position", "where", "gain"}
        for task, conditions in tasks.items():
            assert set(CONDITIONS) <= set(conditions)
            for name in CONDITIONS:
                cell = conditions[name]
                assert cell["low"] <= cell["accuracy"] <= cell["high"]
                assert cell["n"] == demo.QUICK.test
            assert ("sampled" in conditions) == (task == knob)
        for own in ("sampled", "side_share", "accuracy_within_side"):
            assert set(tasks[knob][own]) == {"base", "knob", "knob_negative"}


def test_plots_report_and_knobs_are_written(folder: Path) -> None:
    for name in ("math", "code"):
        for plot in (f"dose_response_{name}.png", f"sites_{name}.png"):
            assert (folder / plot).read_bytes().startswith(b"\x89PNG")
            assert plot in (folder / "report.md").read_text()
        knob = Knob.load(folder / f"{name}.knob.safetensors")
        report = json.loads((folder / "report.json").read_text())
        assert knob.gain == report["chosen"][name]["gain"]
        assert knob.safe_range is not None


def test_the_summary_names_every_task_and_shows_two_answers(folder: Path) -> None:
    text = demo.summary(json.loads((folder / "report.json").read_text()))
    for word in ("math", "code", "facts", "copying", "sorting", "strength -1", "random", "shuffled", "Safe range"):
        assert word in text
    assert text.count("  strength 1\n") == 2


def test_cells_compare_the_same_items() -> None:
    base = Outcome(("",) * 4, np.array([0.0, 0.0, 1.0, 1.0]), (None,) * 4, np.zeros(4))
    first_two = Outcome(("",) * 2, np.array([1.0, 1.0]), (None,) * 2, np.zeros(2))
    cell = demo._cell(base, first_two)
    assert (cell["n"], cell["accuracy"], cell["difference"], cell["difference_low"]) == (2, 1.0, 1.0, 1.0)


class _Now(Executor):
    """A pool whose every answer is the same outcome, already there."""

    def __init__(self, result: object) -> None:
        self._result = result

    def submit(self, fn: object, /, *args: object, **kwargs: object) -> Future[Any]:
        return ready(self._result)


def ready(result: object) -> Future[Any]:
    future = Future[Any]()
    future.set_result(result)
    return future


def right(share: float) -> Outcome:
    scores = np.array([1.0] * round(8 * share) + [0.0] * (8 - round(8 * share)))
    return Outcome(("x",) * 8, scores, ("worked",) * 8, np.zeros(8))


def test_of_the_draws_of_a_control_the_one_that_gains_most_counts() -> None:
    plan = demo._Demo(_Now(right(0.25)), demo.QUICK, lambda _: None)
    every = dict.fromkeys(plan.tasks, right(0.25))
    asked: dict[str, Any] = {
        condition: {t: ready(right(0.5)) for t in plan.tasks} for condition in ("knob", "knob_negative", "knob_half")
    }
    asked["random"] = [("draw 0", ready(every)), ("draw 1", ready({"math": right(0.75)}))]
    asked["shuffled"] = [("draw 0", ready(every)), ("draw 1", ready({"math": right(0.0)}))]
    asked["retuned"] = {"shuffled": ready(right(1.0)), "random": None}
    asked["sampled"] = {name: ready(right(0.25)) for name in ("base", "knob", "knob_negative")}
    own = plan.table("math", asked)["math"]
    assert (own["random"]["draw"], own["random"]["accuracy"]) == ("draw 1", 0.75)
    refused = own["random"]["draws"][-1]
    assert (refused["draw"], refused["difference"]) == ("refused by tuning, so nothing is turned", 0.0)
    assert own["shuffled"]["accuracy"] == 1.0
    assert [cell["accuracy"] for cell in own["shuffled"]["draws"]] == [0.25, 0.0, 1.0]
    assert own["shuffled"]["difference"] == 0.75


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc")
def test_a_worker_leaves_with_the_process_that_began_it() -> None:
    lines = ("import os", "from trimtab import workers", "p = os.getppid()", "print(os.getpid(), flush=True)")
    code = "\n".join((*lines, "workers._leave_with(p)"))
    began = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", began], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = process.stdout.readline().strip()
        assert Path("/proc", number).exists()
        process.kill()
    for _ in range(100):
        status = Path("/proc", number, "status")
        if not status.exists() or "State:\tZ" in status.read_text():  # gone, or nobody's to bury
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {number} is still there")


def test_answers_stand_side_by_side() -> None:
    text = _side_by_side("one\ntwo and more", "three")
    assert text == [
        "  base          strength 1",
        "  ----          ----------",
        "  one           three",
        "  two and more",
    ]


BUSY = """
import os, signal, time
from trimtab.workers import open_pool

def nothing():
    pass

def busy():
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
    time.sleep(300)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    with open_pool(2, nothing, ()) as pool:
        jobs = [pool.submit(busy) for _ in range(2)]
        jobs[0].result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a process group")
def test_ctrl_c_ends_busy_workers_at_once_and_only_their_parent_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BUSY)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["True\n"] * 2  # neither hears of it
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=100)  # until nobody holds the pipes; workers sleep for longer
    assert process.returncode != 0
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1
