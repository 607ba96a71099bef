"""Run known programs through the sandbox: canonical solutions must pass, and labelled samples agree with their labels.

`python scripts/sandbox_agreement.py DATA`, where DATA holds humaneval, mbpp and pairs, as docs/graders.md says; what is
missing is skipped, saying so. `--quick` leaves the labelled samples out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trimtab.evals.programs import Program, humaneval_program, program_of
from trimtab.evals.sandbox import Sandbox


class Case(NamedTuple):
    """A program with its name and whether it should pass."""

    name: str
    program: str
    passes: bool


def lines(path: Path) -> list[dict]:
    """Read JSON lines, packed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines() if line.strip()]


def humaneval(data: Path, file: str = "humaneval/HumanEval.jsonl.gz") -> Iterator[Case]:
    """HumanEval's own solutions: the bodies of its functions, as a model would continue them."""
    for r in lines(data / file):
        yield Case(r["task_id"], program_of(r["canonical_solution"], humaneval_program(r)), True)


def mbpp(data: Path) -> Iterator[Case]:
    """MBPP's own solutions, with the harder tests where there are some."""
    for r in lines(data / "mbpp/mbpp.jsonl"):
        tests = "\n".join([r["test_setup_code"], *r["test_list"], *r["challenge_test_list"]])
        yield Case(f"mbpp/{r['task_id']}", program_of(r["code"], Program("", tests, "")), True)


def mbpp_sanitized(data: Path) -> Iterator[Case]:
    """The sanitised MBPP in HumanEval's form."""
    return humaneval(data, "mbpp/mbpp_sanitized_for_code_generation.jsonl")


def codegen(data: Path) -> Iterator[Case]:
    """Samples of CodeGen for HumanEval, with labels from the same tests."""
    tests = {r["task_id"]: r for r in lines(data / "humaneval/HumanEval.jsonl.gz")}
    for r in lines(data / "pairs/code_humaneval_codegen_labels.jsonl"):
        truth = humaneval_program(tests[r["task_id"]])._replace(before=r["prompt"])
        for number, (sample, passed) in enumerate(zip(r["samples"], r["passed"], strict=True)):
            yield Case(f"{r['task_id']} sample {number}", program_of(sample, truth), passed)


SETS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "HumanEval canonical": humaneval,
    "MBPP canonical": mbpp,
    "MBPP sanitised canonical": mbpp_sanitized,
    "CodeGen samples": codegen,
}


def main() -> None:
    """Run every set and print rates and disagreements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder of public data")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with Sandbox(timeout=10, memory_mb=1024) as sandbox:
        print(f"isolation: {sandbox.isolation}")
        for name, cases_of in SETS.items():
            if args.quick and cases_of is codegen:
                continue
            begun, agreed, wrong = time.perf_counter(), 0, []
            try:
                cases = list(cases_of(args.data))
            except FileNotFoundError as error:
                print(f"{name}: skipped, there is no {error.filename}")
                continue
            for case in cases:
                result = sandbox.run(case.program)
                if result.ok == case.passes:
                    agreed += 1
                else:
                    wrong.append((case, result))
            print(f"{name}: {agreed} of {len(cases)} agree, {time.perf_counter() - begun:.0f} s")
            for case, result in wrong:
                print(f"  {case.name}: labelled {'pass' if case.passes else 'fail'}, here {result.error or 'pass'}")


if __name__ == "__main__":
    main()
