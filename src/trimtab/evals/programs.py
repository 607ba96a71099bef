"""From an answer to a program that tests it, for benchmarks of code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trimtab.evals.graders import extract_code


class Program(NamedTuple):
    """How a program is tested: what stands before it, what after it, and the function that it defines or continues.

    Without such a function, the program is taken whole.
    """

    before: str
    after: str
    entry_point: str


def humaneval_program(record: Mapping[str, Any]) -> Program:
    """Return how an answer to a record of HumanEval is tested."""
    entry = record["entry_point"].strip()
    return Program(record["prompt"], f"{record['test']}\ncheck({entry})\n", entry)


def program_of(answer: str, truth: Program) -> str:
    """Return the program that tests an answer: its code, or the prompt's function with it as its body, and the tests.

    The prompt's docstring is left out: it does nothing, and a body may be indented by another step than it.
    """
    code, entry = extract_code(answer), re.escape(truth.entry_point)
    # What stands before the function in the prompt, imports and helpers, an answer may use.
    if re.search(rf"^(?:async )?def {entry}\b", code, re.MULTILINE) or not truth.entry_point:
        start = re.search(rf"^def {entry}\b", truth.before, re.MULTILINE)
        before = f"{truth.before[: start.start()] if start else truth.before}\n"
    else:
        head = re.search(
            rf"^def {entry}\b.*?:[ \t]*\n(?=[ \t]*[rR]?(?:\"\"\"|'''))", truth.before, re.DOTALL | re.MULTILINE
        )
        before = truth.before[: head.end()] if head else truth.before
    return f"{before}{code}\n{truth.after}"
