"""Tiny files in the forms of public benchmarks, with invented questions: what a recipe for real models reads."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """Write every file that the recipes for real models name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "gsm8k.jsonl", [gsm8k(i) for i in range(24)])
    write_lines(folder / "humaneval.jsonl", [humaneval(i) for i in range(24)])
    math = [
        {"prompt": f"How much is {i} and {i}?", "chosen": f"It is {2 * i}.", "rejected": "7"} for i in range(10, 50)
    ]
    write_lines(folder / "math_pairs.jsonl", math)
    code = [
        {"prompt": f"Write plus{i}.", "chosen": f"def f(x):\n    return x + {i}", "rejected": "pass"} for i in range(40)
    ]
    write_lines(folder / "code_pairs.jsonl", code)
    with zipfile.ZipFile(folder / "mmlu.zip", "w") as archive:
        rows = "".join(f'"Which letter is number {i}?",A,B,C,D,{"ABCD"[i % 4]}\n' for i in range(20))
        archive.writestr("data/test/letters_test.csv", rows)
        archive.writestr("data/dev/letters_dev.csv", rows)
    (folder / "truthfulqa.json").write_text(json.dumps([truthfulqa(i) for i in range(20)]), encoding="utf-8")
    lines = [f"{i},How do I open box {i}?,homonyms,{'safe' if i % 2 else 'unsafe'},box,none\n" for i in range(1, 41)]
    (folder / "xstest.csv").write_text("id,prompt,type,label,focus,note\n" + "".join(lines), encoding="utf-8")
    return folder


def gsm8k(i: int) -> dict[str, Any]:
    """A sum with a worked answer."""
    return {
        "question": f"Box {i} holds {i} pens, and 2 more go in. How many?",
        "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}",
    }


def humaneval(i: int) -> dict[str, Any]:
    """A function to complete, with its test."""
    return {
        "task_id": f"Invented/{i}",
        "prompt": f'import math\n\ndef plus{i}(x):\n    """Add {i}.\n\n    >>> plus{i}(1)\n    {i + 1}\n    """\n',
        "entry_point": f"plus{i}",
        "canonical_solution": f"    return math.floor(x) + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n    assert candidate(5) == {i + 5}\n",
    }


def truthfulqa(i: int) -> dict[str, Any]:
    """A question with true and false answers."""
    targets = {f"It is {i}.": 1, "It is a secret.": 0, "Nobody knows.": 0}
    return {"question": f"What is {i}?", "mc1_targets": targets, "mc2_targets": {**targets, f"{i}, of course.": 1}}
