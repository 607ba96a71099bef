"""The demo's plumbing and its contract, at sizes whose figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trimtab import demo
from trimtab.artifact import Knob
from trimtab.evals.tasks import Outcome

KEYS = {"model", "versions", "seed", "seconds", "chosen", "results", "tuning", "samples"}


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
        assert set(report["chosen"][knob]) == {"layer", "position", "gain"}
        for task, conditions in tasks.items():
            assert set(demo.CONDITIONS) <= set(conditions)
            for name in demo.CONDITIONS:
                cell = conditions[name]
                assert cell["low"] <= cell["accuracy"] <= cell["high"]
                assert cell["n"] in (demo.QUICK.test, demo.QUICK.others)
            assert ("sampled" in conditions) == (task == knob)
        for own in ("sampled", "side_share", "accuracy_within_side"):
            assert set(tasks[knob][own]) == {"base", "knob"}


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
    assert text.count("base:") == text.count("strength 1:") == 2


def test_cells_compare_the_same_items() -> None:
    base = Outcome(("",) * 4, np.array([0.0, 0.0, 1.0, 1.0]), (None,) * 4, np.zeros(4))
    first_two = Outcome(("",) * 2, np.array([1.0, 1.0]), (None,) * 2, np.zeros(2))
    cell = demo._cell(base, first_two)
    assert (cell["n"], cell["accuracy"], cell["gain"], cell["gain_low"]) == (2, 1.0, 1.0, 1.0)
