"""The example scripts: each runs offline in seconds, stays short, and is listed in docs/examples.md."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from served import NEWER, SERVES

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINES = 40

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def summary(path: Path) -> str:
    """Return the docstring of an example, which is one sentence."""
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())


def rows(document: str) -> dict[str, str]:
    """Return the table of a page: what it says of each example, by its file's name."""
    return dict(re.findall(r"^\| \[`(\w+\.py)`\]\(\.\./examples/\1\) \| (.+?) \|", document, re.MULTILINE))


@each_example
def test_an_example_runs_offline_and_says_something(path: Path, tmp_path: Path) -> None:
    if path.stem == "ask_the_server" and not SERVES:
        pytest.skip(NEWER)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 10, done.stdout


@pytest.mark.quick
@each_example
def test_an_example_is_short_and_says_what_it_shows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES, f"{path.name} has more than {LINES} lines: show less, or split it"
    assert summary(path).endswith("."), f"{path.name} begins with a docstring of one sentence"
    # a script's folder is where Python looks first
    assert path.stem not in sys.stdlib_module_names
    imported = {name.partition(".")[0] for name in re.findall(r"^(?:import|from) ([\w.]+)", text, re.MULTILINE)}
    assert path.stem not in imported, f"{path.name} is in the way of the package {path.stem}"


@pytest.mark.quick
def test_the_page_lists_every_example_with_its_own_words() -> None:
    listed = rows((ROOT / "docs" / "examples.md").read_text(encoding="utf-8"))
    assert listed == {path.name: summary(path) for path in EXAMPLES}
