"""Public benchmarks from local files: what is asked, how it is graded, and which questions choose or test.

Questions are asked zero-shot, as one user turn; what the authors do otherwise is said at each. `BENCHMARKS` lists them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from trimtab.errors import OptionError, PairsError, TrimtabWarning, brief, unknown_name
from trimtab.evals.choices import ChoiceTask, Per, Rule, pairs_task
from trimtab.evals.graders import exact_answer, final_answer, is_refusal
from trimtab.evals.programs import Program, humaneval_program, program_of
from trimtab.evals.sandbox import Sandbox
from trimtab.evals.tasks import AnyTask, Task
from trimtab.formats import read_file
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
    whole = questions = _once(questions, path) if not name.startswith("pairs") else questions
    if not whole:
        raise OptionError(f"{str(path)!r} holds no questions of {name}. docs/tasks.md has the fields of its records.")
    if split is not None:
        questions = [q for q in questions if _is_validation(q.prompt) == (split == "validation")]
    if n is not None:
        if not 0 < n <= len(questions):
            kind = f" for {split}" if split else ""
            raise OptionError(f"{str(path)!r} has {len(questions)} questions{kind}; asked for {n}.")
        picked = sorted(random.Random(seed).sample(range(len(questions)), n))
        questions = [questions[i] for i in picked]
    if not questions:
        raise OptionError(
            f"{str(path)!r} holds {len(whole)} questions, none of them for {split}: three in ten are for validation, "
            "the others for the test, by a hash of the question. Add questions."
        )
    return benchmark.make(name, questions)


def _once(questions: Sequence[Question], path: str | Path) -> list[Question]:
    """Count a question once, however often it is asked; raises `OptionError` where its true answers differ."""
    found: dict[str, Question] = {}
    for question in questions:
        if found.setdefault(question.prompt, question).truth != question.truth:
            raise OptionError(f"{str(path)!r} asks one question with two true answers: {brief(question.prompt)}.")
    if len(found) < len(questions):
        again = len(questions) - len(found)
        said = f"{str(path)!r} asks {again} of its {len(questions)} questions again; each counts once."
        warnings.warn(said, TrimtabWarning, stacklevel=3)
    return list(found.values())


def _is_validation(prompt: str) -> bool:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) < VALIDATION_SHARE * 2**32


# --- reading --------------------------------------------------------------------------------------------------------


def _records(
    path: Path, fields: Mapping[str, type], *, may_be_empty: tuple[str, ...] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """Read records that have these fields of these types, with the place of each; text is not blank."""
    found: list[tuple[str, dict[str, Any]]] = []
    for place, record in read_file(path):
        if not isinstance(record, dict):
            wanted = ", ".join(map(repr, fields)) or "its fields"
            raise PairsError(f"{path}: {place} is {brief(record)}; expected an object with {wanted}.")
        known = cast(dict[str, Any], record)
        for field, kind in fields.items():
            value = known.get(field)
            if not isinstance(value, kind):
                raise PairsError(f"{path}: {place} needs {field!r}, {_KINDS[kind]}; got {brief(value)}.")
            if isinstance(value, str) and not value.strip() and field not in may_be_empty:
                raise PairsError(f"{path}: {place}: {field!r} is empty.")
        found.append((f"{path}: {place}", known))
    return found


_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


# --- numbers --------------------------------------------------------------------------------------------------------


def read_gsm8k(path: Path) -> list[Question]:
    """Read GSM8K (arXiv:2110.14168): records with `question`, and `answer`, a solution that ends in `#### 18`."""
    questions: list[Question] = []
    for place, record in _records(path, {"question": str, "answer": str}):
        if "####" not in record["answer"] or final_answer(record["answer"]) is None:
            raise PairsError(f"{place}: the answer does not end in '#### NUMBER': {brief(record['answer'])}.")
        asked = f"{record['question'].strip()}\n\nSolve this step by step, and end with: The answer is NUMBER."
        questions.append(Question(asked, record["answer"]))
    return questions


def _exact(name: str, questions: Sequence[Question]) -> Task:
    def grade(answers: Sequence[str]) -> list[float]:
        return [float(exact_answer(a, q.truth)) for a, q in zip(answers, questions, strict=True)]

    return Task(name, tuple(q.prompt for q in questions), grade, max_new_tokens=400)


# --- programs -------------------------------------------------------------------------------------------------------


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


def read_mbpp(path: Path) -> list[Question]:
    """Read MBPP (arXiv:2108.07732): `text`, `test_list` and `test_setup_code`; or the form of HumanEval.

    As its authors do, the prompt shows the tests. They give three solved examples before it; here there are none.
    """
    first = next(iter(_records(path, {})), ("", {}))[1]
    if "entry_point" in first:
        return read_humaneval(path)
    questions: list[Question] = []
    fields = {"text": str, "test_list": list, "test_setup_code": str}
    for place, record in _records(path, fields, may_be_empty=("test_setup_code",)):
        tests = cast(list[object], record["test_list"])
        if not tests or not all(isinstance(test, str) for test in tests):
            raise PairsError(f"{place} needs 'test_list', a list of asserts; got {brief(tests)}.")
        shown = "\n".join(map(str, tests))
        asked = f"{record['text'].strip()} Answer with Python code that passes these tests:\n\n{shown}"
        questions.append(Question(asked, Program("", f"{record['test_setup_code']}\n{shown}", "")))
    return questions


def _tested(name: str, questions: Sequence[Question], *, timeout: float = 10.0) -> Task:
    def grade(answers: Sequence[str]) -> list[float]:
        with Sandbox(timeout=timeout, memory_mb=1024) as sandbox:
            programs = [program_of(a, q.truth) for a, q in zip(answers, questions, strict=True)]
            return [float(sandbox.run(program).ok) for program in programs]

    return Task(name, tuple(q.prompt for q in questions), grade, max_new_tokens=512, runs_code=True)


# --- refusals -------------------------------------------------------------------------------------------------------


def read_xstest(path: Path, *, label: str) -> list[Question]:
    """Read the prompts of XSTest (arXiv:2308.01263) with one `label`, "safe" or "unsafe".

    The authors have people and GPT-4 tell full refusals, partial refusals and answers apart; here phrases tell
    refusals from the rest, as `is_refusal` says.
    """
    questions: list[Question] = []
    for place, record in _records(path, {"prompt": str, "label": str}):
        if record["label"] not in ("safe", "unsafe"):
            raise PairsError(f"{place} needs 'label', safe or unsafe; got {brief(record['label'])}.")
        if record["label"] == label:
            questions.append(Question(record["prompt"], label == "unsafe"))
    return questions


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

    Of a zip or folder the files `test/*_test.csv` count. As the authors do, the letters' probabilities are compared;
    they ask after five solved examples of the subject, here there are none.
    """
    if not path.is_dir() and path.suffix.lower() != ".zip":
        return _read_ab(path, "prompt", "correct", "incorrect")
    files = _test_tables(path)
    if not files:
        raise PairsError(f"{path} holds no file SUBJECT_test.csv, as MMLU's own zip does.")
    questions: list[Question] = []
    for name, data in files.items():
        try:
            rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise PairsError(f"{path}: {name} cannot be read as a table: {error}.") from None
        for number, row in enumerate(rows, 1):
            if len(row) != 6 or row[5] not in tuple(LETTERS) or not all(cell.strip() for cell in row):
                raise PairsError(
                    f"{path}: {name}, row {number} needs a question, four answers and a letter of {LETTERS}; got "
                    f"{brief(row)}."
                )
            listed = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, row[1:5], strict=True))
            asked = f"{row[0].strip()}\n\n{listed}\n\nAnswer with the letter alone."
            questions.append(Question(asked, Options(tuple(LETTERS), frozenset({LETTERS.index(row[5])}))))
    return questions


def _test_tables(path: Path) -> dict[str, bytes]:
    try:
        if path.is_dir():
            return {file.name: file.read_bytes() for file in sorted(path.rglob("*_test.csv"))}
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith("_test.csv"))
            return {name: archive.read(name) for name in names}
    # A zip may be packed or locked in a way that Python does not know, or end too soon.
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise PairsError(f"Cannot read {str(path)!r}: {error}.") from None


def read_truthfulqa(path: Path, *, targets: str) -> list[Question]:
    """Read TruthfulQA (arXiv:2109.07958), `mc_task.json`: `question`, and `mc1_targets` or `mc2_targets`.

    As its authors do, an answer's log-likelihood is summed over its tokens, without what closes it; mc1 is right where
    the best answer is likelier than every false one, mc2 the probability of all true answers among the given ones. They
    ask after six solved examples. `dataclasses.replace(task, per="token")` averages over tokens instead.
    """
    questions: list[Question] = []
    for place, record in _records(path, {"question": str, targets: dict}):
        given = cast(dict[str, object], record[targets])
        if not all(
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 for value in given.values()
        ):
            raise PairsError(f"{place}: {targets} says 1 of a right answer and 0 of a wrong one.")
        if not all(answer.strip() for answer in given):
            raise PairsError(f"{place}: an answer of {targets} is empty.")
        right = frozenset(i for i, value in enumerate(given.values()) if value)
        if not right or len(right) == len(given):
            raise PairsError(f"{place}: {targets} needs right and wrong answers.")
        questions.append(Question(record["question"], Options(tuple(given), right)))
    return questions


def read_caa(path: Path) -> list[Question]:
    """Read A/B questions of CAA (arXiv:2312.06681); the score is P(matching letter), renormalised over both.

    Its authors put "(" before the letter for the model and compare the letters; here "(A)" and "(B)" are compared, what
    closes the turn left out, which is the same but for the bracket after the letter.
    """
    return _read_ab(path, "question", "answer_matching_behavior", "answer_not_matching_behavior")


def _read_ab(path: Path, question: str, right: str, wrong: str) -> list[Question]:
    questions: list[Question] = []
    for place, record in _records(path, {question: str, right: str, wrong: str}):
        answers = (record[right].strip(), record[wrong].strip())
        if answers[0] == answers[1]:
            raise PairsError(f"{place}: the right and the wrong answer are the same, {brief(answers[0])}.")
        questions.append(Question(record[question], Options(answers, frozenset({0}))))
    return questions


def _chosen(name: str, questions: Sequence[Question], *, rule: Rule = "first") -> ChoiceTask:
    return ChoiceTask(
        name,
        tuple(q.prompt for q in questions),
        tuple(q.truth.answers for q in questions),
        tuple(q.truth.right for q in questions),
        rule=rule,
        closing=False,
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
