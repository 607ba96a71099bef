"""Public benchmarks from local files: what is asked, how it is graded, and which questions choose or test.

Questions are asked zero-shot, as one user turn; what the authors do otherwise is said at each. `BENCHMARKS` lists them.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import random
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from trimtab.errors import OptionError, PairsError, brief, unknown_name
from trimtab.evals.choices import ChoiceTask, Per, Rule, pairs_task
from trimtab.evals.graders import exact_answer, extract_code, final_answer, is_refusal
from trimtab.evals.sandbox import Sandbox
from trimtab.evals.tasks import AnyTask, Task
from trimtab.formats import READERS, Placed, read_file
from trimtab.pairs import Pairs

Split = Literal["validation", "test"]
VALIDATION_SHARE = 0.3


class Question(NamedTuple):
    """One question: the prompt, and what a grader needs to know."""

    prompt: str
    truth: Any


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: the reader of its file, and what makes a task of some of its questions."""

    read: Callable[[Path], list[Question]]
    make: Callable[[str, Sequence[Question]], AnyTask]
    summary: str


def load_benchmark(
    name: str, path: str | Path, *, split: Split | None = None, n: int | None = None, seed: int = 0
) -> AnyTask:
    """Read a benchmark's file and make a task of all its questions, or of `n` drawn with `seed`.

    `split` keeps the questions that choose apart from those that test: three in ten are for validation, by a hash of
    the question, whatever file it stands in and in whatever order. Raises `UnknownName` for another benchmark and
    `OptionError` for a file that is not of its form, or holds fewer than `n` such questions.
    """
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    benchmark = BENCHMARKS[name]
    try:
        questions = benchmark.read(Path(path))
    except PairsError as error:
        raise OptionError(str(error)) from None
    if split is not None:
        questions = [q for q in questions if _is_validation(q.prompt) == (split == "validation")]
    if n is not None:
        if not 0 < n <= len(questions):
            kind = f" for {split}" if split else ""
            raise OptionError(f"{str(path)!r} has {len(questions)} questions{kind}; asked for {n}.")
        picked = sorted(random.Random(seed).sample(range(len(questions)), n))
        questions = [questions[i] for i in picked]
    if not questions:
        raise OptionError(f"{str(path)!r} holds no questions{f' for {split}' if split else ''}.")
    return benchmark.make(name, questions)


def _is_validation(prompt: str) -> bool:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) < VALIDATION_SHARE * 2**32


# --- reading --------------------------------------------------------------------------------------------------------


def _records(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[tuple[str, dict[str, Any]]]:
    """Read records that have these fields of these types, with the place of each; `.gz` files are read too."""
    placed = _read_gzip(path) if path.suffix == ".gz" else read_file(path)
    found: list[tuple[str, dict[str, Any]]] = []
    for place, record in placed:
        known = cast(dict[str, Any], record) if isinstance(record, dict) else {}
        for field, kind in fields.items():
            if not isinstance(known.get(field), kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                wanted = " or ".join(_KINDS[one] for one in kinds)
                raise PairsError(f"{path}: {place} needs {field!r}, {wanted}; got {brief(known.get(field))}.")
        found.append((f"{path}: {place}", known))
    return found


_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}


def _read_gzip(path: Path) -> list[Placed]:
    reader = READERS.get(Path(path.stem).suffix)
    if reader is None:
        raise PairsError(f"Cannot tell what {str(path)!r} holds. Known: {', '.join(f'{s}.gz' for s in READERS)}.")
    try:
        return reader(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError) as error:
        raise PairsError(f"Cannot read {str(path)!r}: {error}.") from None


# --- numbers --------------------------------------------------------------------------------------------------------


def read_gsm8k(path: Path) -> list[Question]:
    """Read GSM8K (arXiv:2110.14168): records with `question`, and `answer`, a solution that ends in `#### 18`."""
    questions: list[Question] = []
    for place, record in _records(path, {"question": str, "answer": str}):
        if final_answer(record["answer"]) is None:
            raise PairsError(f"{place}: the answer holds no number: {brief(record['answer'])}.")
        asked = f"{record['question'].strip()}\n\nSolve this step by step, and end with: The answer is NUMBER."
        questions.append(Question(asked, record["answer"]))
    return questions


def _exact(name: str, questions: Sequence[Question]) -> Task:
    def grade(answers: Sequence[str]) -> list[float]:
        return [float(exact_answer(a, q.truth)) for a, q in zip(answers, questions, strict=True)]

    return Task(name, tuple(q.prompt for q in questions), grade, max_new_tokens=400)


# --- programs -------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """How a program is tested: what stands before it, what stands after it, and the function that it must define."""

    before: str
    after: str
    entry_point: str


def read_humaneval(path: Path) -> list[Question]:
    """Read HumanEval (arXiv:2107.03374), or MBPP in its form: `prompt`, `entry_point` and `test` with `check`.

    The authors let a base model continue the prompt; here a chat model is asked for the whole function, and an answer
    that does not define it is taken for its continuation. The score is pass@1 of one answer.
    """
    fields = {"prompt": str, "entry_point": str, "test": str}
    return [
        Question(
            f"Complete this Python function. Answer with the whole function and nothing else.\n\n```python\n"
            f"{record['prompt'].rstrip()}\n```",
            humaneval_program(record),
        )
        for _, record in _records(path, fields)
    ]


def humaneval_program(record: Mapping[str, Any]) -> Program:
    """Return how an answer to a record of HumanEval is tested."""
    entry = record["entry_point"].strip()
    return Program(record["prompt"], f"{record['test']}\ncheck({entry})\n", entry)


def read_mbpp(path: Path) -> list[Question]:
    """Read MBPP (arXiv:2108.07732): `text`, `test_list` and `test_setup_code`; or the form of HumanEval.

    As its authors do, the prompt shows the tests. They give three solved examples before it; here there are none.
    """
    first = next(iter(_records(path, {})), ("", {}))[1]
    if "entry_point" in first:
        return read_humaneval(path)
    questions: list[Question] = []
    for place, record in _records(path, {"text": str, "test_list": list, "test_setup_code": str}):
        tests = cast(list[object], record["test_list"])
        if not tests or not all(isinstance(test, str) for test in tests):
            raise PairsError(f"{place} needs 'test_list', a list of asserts; got {brief(tests)}.")
        shown = "\n".join(map(str, tests))
        asked = f"{record['text'].strip()} Answer with Python code that passes these tests:\n\n{shown}"
        called = re.search(r"assert[\s(]+(?:\w+\()*?(\w+)\(", str(tests[0]))
        program = Program("", f"{record['test_setup_code']}\n{shown}", called[1] if called else "")
        questions.append(Question(asked, program))
    return questions


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


def _tested(name: str, questions: Sequence[Question], *, timeout: float = 10.0) -> Task:
    def grade(answers: Sequence[str]) -> list[float]:
        with Sandbox(timeout=timeout, memory_mb=1024) as sandbox:
            programs = [program_of(a, q.truth) for a, q in zip(answers, questions, strict=True)]
            return [float(sandbox.run(program).ok) for program in programs]

    return Task(name, tuple(q.prompt for q in questions), grade, max_new_tokens=512, runs_code=True)


# --- refusals -------------------------------------------------------------------------------------------------------


def read_xstest(path: Path, *, label: str) -> list[Question]:
    """Read the prompts of XSTest (arXiv:2308.01263) with one `label`, "safe" or "unsafe"."""
    found = [record for _, record in _records(path, {"prompt": str, "label": str}) if record["label"] == label]
    return [Question(record["prompt"], label == "unsafe") for record in found]


def _refused(name: str, questions: Sequence[Question]) -> Task:
    def grade(answers: Sequence[str]) -> list[float]:
        return [float(is_refusal(a) == q.truth) for a, q in zip(answers, questions, strict=True)]

    return Task(name, tuple(q.prompt for q in questions), grade, max_new_tokens=128)


# --- choices --------------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """Given answers, and the places of the right ones."""

    answers: tuple[str, ...]
    right: frozenset[int]


LETTERS = "ABCD"


def read_mmlu(path: Path) -> list[Question]:
    """Read MMLU (arXiv:2009.03300): the zip or a folder of its CSV files, or records in CAA's A/B form.

    Of a zip or folder the files `test/*_test.csv` count. The authors compare the letters' probabilities after five
    solved examples of the subject; here there are none.
    """
    if path.is_dir():
        files = {file.name: file.read_bytes() for file in sorted(path.rglob("*_test.csv"))}
    elif path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if name.endswith("_test.csv"))
                files = {name: archive.read(name) for name in names}
        except (OSError, zipfile.BadZipFile) as error:
            raise PairsError(f"Cannot read {str(path)!r}: {error}.") from None
    else:
        return _read_ab(path, "prompt", "correct", "incorrect")
    questions: list[Question] = []
    for name, data in files.items():
        for number, row in enumerate(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")), 1):
            if len(row) != 6 or row[5] not in LETTERS:
                raise PairsError(f"{path}: {name}, row {number} needs a question, four answers and a letter.")
            listed = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, row[1:5], strict=True))
            asked = f"{row[0].strip()}\n\n{listed}\n\nAnswer with the letter alone."
            questions.append(Question(asked, Options(tuple(LETTERS), frozenset({LETTERS.index(row[5])}))))
    return questions


def read_truthfulqa(path: Path, *, targets: str) -> list[Question]:
    """Read TruthfulQA (arXiv:2109.07958), `mc_task.json`: `question`, and `mc1_targets` or `mc2_targets`.

    As its authors do, an answer's log-likelihood is summed over its tokens; they ask after six solved examples.
    """
    questions: list[Question] = []
    for place, record in _records(path, {"question": str, targets: dict}):
        given = cast(dict[str, object], record[targets])
        if not all(value in (0, 1) for value in given.values()):
            raise PairsError(f"{place}: {targets} says 1 of a right answer and 0 of a wrong one.")
        right = frozenset(i for i, value in enumerate(given.values()) if value)
        if not right or len(right) == len(given):
            raise PairsError(f"{place}: {targets} needs right and wrong answers.")
        questions.append(Question(record["question"], Options(tuple(given), right)))
    return questions


def read_caa(path: Path) -> list[Question]:
    """Read A/B questions of CAA (arXiv:2312.06681); the score is P(matching letter), renormalised over both."""
    return _read_ab(path, "question", "answer_matching_behavior", "answer_not_matching_behavior")


def _read_ab(path: Path, question: str, right: str, wrong: str) -> list[Question]:
    return [
        Question(record[question], Options((record[right].strip(), record[wrong].strip()), frozenset({0})))
        for _, record in _records(path, {question: str, right: str, wrong: str})
    ]


def _chosen(name: str, questions: Sequence[Question], *, rule: Rule = "first", per: Per = "answer") -> ChoiceTask:
    return ChoiceTask(
        name,
        tuple(q.prompt for q in questions),
        tuple(q.truth.answers for q in questions),
        tuple(q.truth.right for q in questions),
        rule=rule,
        per=per,
    )


def read_pairs(path: Path) -> list[Question]:
    """Read preference pairs; the question is the prompt's last turn."""
    return [Question(pair.prompt[-1].content, pair) for pair in Pairs.load(path, duplicates="drop")]


def _preferred(name: str, questions: Sequence[Question], *, per: Per = "answer") -> ChoiceTask:
    return pairs_task(Pairs(q.truth for q in questions), name=name, per=per)


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(read_gsm8k, _exact, "arithmetic word problems, the last number"),
    "humaneval": Benchmark(read_humaneval, _tested, "Python functions, run against their tests"),
    "mbpp": Benchmark(read_mbpp, _tested, "small Python programs, run against their tests"),
    "mmlu": Benchmark(read_mmlu, _chosen, "knowledge, the likeliest letter"),
    "truthfulqa-mc1": Benchmark(
        partial(read_truthfulqa, targets="mc1_targets"), _chosen, "the likeliest answer is the true one"
    ),
    "truthfulqa-mc2": Benchmark(
        partial(read_truthfulqa, targets="mc2_targets"), partial(_chosen, rule="mass"), "probability of true answers"
    ),
    "xstest-safe": Benchmark(partial(read_xstest, label="safe"), _refused, "benign prompts that must be answered"),
    "xstest-unsafe": Benchmark(partial(read_xstest, label="unsafe"), _refused, "harmful prompts that must be refused"),
    "caa": Benchmark(read_caa, partial(_chosen, rule="mass"), "probability of the letter that matches a behaviour"),
    "pairs": Benchmark(read_pairs, _preferred, "pairs whose chosen answer is the likelier one"),
    "pairs-per-token": Benchmark(read_pairs, partial(_preferred, per="token"), "the same, averaged over tokens"),
}
