"""Public benchmarks: prompts, graders and splits on invented files, bad files, and the real ones where they are."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invented import gsm8k, humaneval, truthfulqa, write_all, write_lines
from pico import knob, model, tokenizer
from trimtab.cli.sources import BENCHMARK_NAMES
from trimtab.errors import OptionError, TrimtabWarning, UnknownName
from trimtab.evals.benchmarks import BENCHMARKS, load_benchmark, read_gsm8k
from trimtab.evals.choices import ChoiceTask, choose, levels_task, pairs_task
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.programs import Program, program_of
from trimtab.evals.tasks import Task, run_task
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.types import Message

DATA = Path(__file__).parents[2] / "shared/data"
FILES = {
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "humaneval": ("humaneval/HumanEval.jsonl.gz", 164),
    "mbpp": ("mbpp/mbpp.jsonl", 974),
    "mmlu": ("mmlu/mmlu.zip", 13937),  # of 14,042: 105 stand there twice
    "truthfulqa-mc1": ("truthfulqa/mc_task.json", 817),
    "truthfulqa-mc2": ("truthfulqa/mc_task.json", 817),
    "xstest-safe": ("xstest/xstest_prompts.csv", 250),
    "xstest-unsafe": ("xstest/xstest_prompts.csv", 200),
    "caa": ("caa/test/refusal/test_dataset_ab.json", 50),
    "pairs": ("pairs/math_gsm8k.jsonl", 1163),
    "pairs-per-token": ("pairs/tiny_soda_reply.jsonl", 703),  # of 704: one stands there twice
}


def test_every_benchmark_has_a_real_file_to_be_read() -> None:
    assert set(FILES) == set(BENCHMARKS)


@pytest.mark.filterwarnings("ignore:.* asks 105 of its 14042 questions again")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_files_are_read_whole_and_every_question_is_on_one_side(name: str) -> None:
    path = DATA / FILES[name][0]
    if not path.exists():
        pytest.skip(f"needs {FILES[name][0]} in ../shared/data")
    whole = load_benchmark(name, path)
    assert len(whole) == FILES[name][1]
    parts = [load_benchmark(name, path, split=split) for split in ("validation", "test")]
    assert sum(map(len, parts)) == len(whole)
    assert 0.2 < len(parts[0]) / len(whole) < 0.4
    few = load_benchmark(name, path, split="test", n=10, seed=3)
    assert set(few.prompts) <= set(parts[1].prompts)
    assert few.prompts == load_benchmark(name, path, split="test", n=10, seed=3).prompts
    assert few.prompts != load_benchmark(name, path, split="test", n=10, seed=4).prompts


def test_the_page_on_tasks_and_the_help_name_every_benchmark() -> None:
    page = (Path(__file__).parents[1] / "docs/tasks.md").read_text()
    assert set(BENCHMARK_NAMES.split(", ")) == set(BENCHMARKS)
    assert all(f"| `{name}` |" in page for name in BENCHMARKS)


def test_a_question_counts_once_and_has_one_true_answer(tmp_path: Path) -> None:
    rows = [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(20)]

    def write(records: list[Any]) -> Path:
        (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, records)))
        return tmp_path / "g.jsonl"

    with pytest.warns(TrimtabWarning, match="asks 2 of its 22 questions again"):
        assert len(load_benchmark("gsm8k", write([*rows, *rows[:2]]))) == 20
    with pytest.raises(OptionError, match="asks one question with two true answers: 'How many is 3"):
        load_benchmark("gsm8k", write([*rows, {**rows[3], "answer": "#### 4"}]))
    with pytest.raises(OptionError, match="does not end in '#### NUMBER'"):
        load_benchmark("gsm8k", write([{**rows[0], "answer": "5"}]))
    with pytest.raises(OptionError, match=r"Line 21 is \[1, 2\]; expected an object with 'question', 'answer'"):
        load_benchmark("gsm8k", write([*rows, [1, 2]]))
    with pytest.raises(OptionError, match="holds no questions of gsm8k"):
        load_benchmark("gsm8k", write([]))
    one = next(row for row in rows if len(load_benchmark("gsm8k", write([row]))) == 1)
    sides: list[str] = []
    for split in ("validation", "test"):
        try:
            load_benchmark("gsm8k", write([one]), split=split)  # pyright: ignore[reportArgumentType]
        except OptionError as error:
            sides.append(str(error))
    assert len(sides) == 1
    assert "holds 1 questions, none of them for" in sides[0]


def test_other_forms_of_mbpp_and_mmlu_are_read() -> None:
    if not DATA.exists():
        pytest.skip("needs ../shared/data")
    assert len(load_benchmark("mbpp", DATA / "mbpp/mbpp_sanitized_for_code_generation.jsonl")) == 427
    assert len(load_benchmark("mmlu", DATA / "caa/test/mmlu/mmlu.json")) == 570


def test_a_questions_side_depends_on_the_question_alone(tmp_path: Path) -> None:
    records = [gsm8k(i) for i in range(30)]
    one = load_benchmark("gsm8k", write_lines(tmp_path / "one.jsonl", records), split="test")
    more = [*records[::-1], *map(gsm8k, range(30, 40))]
    other = load_benchmark("gsm8k", write_lines(tmp_path / "other.jsonl", more), split="test")
    assert set(one.prompts) == set(other.prompts) & {q.prompt for q in read_gsm8k(tmp_path / "one.jsonl")}


# --- grading --------------------------------------------------------------------------------------------------------


def test_gsm8k_grades_the_last_number(tmp_path: Path) -> None:
    task = load_benchmark("gsm8k", write_lines(tmp_path / "g.jsonl", [gsm8k(1), gsm8k(2)]))
    assert isinstance(task, Task)
    assert task.grade(["1 + 2 = 3. The answer is 3.", "The answer is 5."]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "answer",
    [
        "    return x + 3\n",
        "  return x + 3",  # another step of indentation than the docstring's
        "def plus3(x):\n    return x + 3",
        "Here it is:\n```python\nimport math\n\ndef plus3(x):\n    return math.floor(x) + 3\n```\nDone.",
        "def helper(x):\n    return x\n\ndef plus3(x):\n    return helper(math.floor(x)) + 3",  # the prompt's import
    ],
)
def test_humaneval_takes_a_body_or_a_whole_function(answer: str, tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(humaneval(3)).encode()))
    task = load_benchmark("humaneval", path)
    assert isinstance(task, Task)
    assert task.runs_code
    assert task.grade([answer]) == [1.0]
    assert task.grade([answer.replace("+ 3", "+ 4")]) == [0.0]
    assert task.grade(["I would add three."]) == [0.0]


def test_mbpp_runs_its_tests_after_the_code(tmp_path: Path) -> None:
    record = {"text": "Write a tree.", "test_setup_code": "root = Node(1)", "test_list": ["assert depth(root) == 1"]}
    task = load_benchmark("mbpp", write_lines(tmp_path / "m.jsonl", [record]))
    assert isinstance(task, Task)
    code = "class Node:\n    def __init__(self, x): self.x = x\n\ndef depth(n):\n    return n.x\n"
    assert task.grade([code]) == [1.0]
    assert task.grade([code.replace("n.x\n", "2\n")]) == [0.0]
    assert "assert depth(root) == 1" in task.prompts[0]


def test_a_program_that_names_no_function_is_taken_whole() -> None:
    assert program_of("x = 1", Program("", "assert x == 1", "")).split() == ["x", "=", "1", "assert", "x", "==", "1"]


def test_xstest_wants_answers_to_safe_prompts_and_refusals_of_others(tmp_path: Path) -> None:
    write_all(tmp_path)
    safe, unsafe = (load_benchmark(f"xstest-{label}", tmp_path / "xstest.csv") for label in ("safe", "unsafe"))
    assert isinstance(safe, Task)
    assert isinstance(unsafe, Task)
    said = ["I'm sorry, but I cannot help with that."] * 20
    assert sum(safe.grade(said)) == 0
    assert sum(unsafe.grade(said)) == 20


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("gsm8k", {"question": "Q"}, r"Line 2 needs 'answer', text; got None"),
        ("gsm8k", {"question": "Q", "answer": "none"}, "Line 2: the answer does not end in '#### NUMBER'"),
        ("humaneval", {"prompt": 1, "entry_point": "f", "test": ""}, "Line 2 needs 'prompt', text; got 1"),
        ("truthfulqa-mc1", {"question": "Q", "mc1_targets": {"a": 1}}, "needs right and wrong answers"),
        ("truthfulqa-mc2", {"question": "Q", "mc2_targets": {"a": 2, "b": 0}}, "says 1 of a right answer"),
        ("caa", {"question": "Q", "answer_matching_behavior": "(A)"}, "needs 'answer_not_matching_behavior'"),
        ("pairs", {"prompt": "Q", "chosen": "a"}, "rejected"),
        ("mbpp", {"text": "T", "test_list": [], "test_setup_code": ""}, "a list of asserts"),
        ("mbpp", {"text": "T", "test_list": [1], "test_setup_code": ""}, "a list of asserts"),
        ("mbpp", {"text": "T", "test_list": ["assert f(1)"]}, "Line 2 needs 'test_setup_code', text; got None"),
        ("gsm8k", {"question": " ", "answer": "1"}, "Line 2: 'question' is empty"),
        ("humaneval", {"prompt": "p", "entry_point": "f", "test": ""}, "Line 2: 'test' is empty"),
        ("truthfulqa-mc1", {"question": "Q", "mc1_targets": {"a": True, "b": False}}, "says 1 of a right answer"),
        ("truthfulqa-mc1", {"question": "Q", "mc1_targets": {"a": 1, " ": 0}}, "an answer of mc1_targets is empty"),
        ("truthfulqa-mc2", {"question": "Q", "mc2_targets": ["a"]}, r"needs 'mc2_targets', an object; got \['a'\]"),
        ("xstest-safe", {"prompt": "P", "label": "sage"}, "Line 2 needs 'label', safe or unsafe; got 'sage'"),
        (
            "caa",
            {"question": "Q", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": " (A)"},
            "Line 2: the right and the wrong answer are the same",
        ),
    ],
)
def test_a_bad_record_is_named_by_its_line(name: str, record: dict[str, Any], words: str, tmp_path: Path) -> None:
    good = {
        "gsm8k": gsm8k(1),
        "humaneval": humaneval(1),
        "truthfulqa-mc1": truthfulqa(1),
        "truthfulqa-mc2": truthfulqa(1),
        "caa": {"question": "Q?", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"},
        "pairs": {"prompt": "P", "chosen": "a", "rejected": "b"},
        "mbpp": {"text": "T", "test_list": ["assert f(1)"], "test_setup_code": ""},
        "xstest-safe": {"prompt": "P", "label": "safe"},
    }[name]
    with pytest.raises(OptionError, match=words):
        load_benchmark(name, write_lines(tmp_path / "bad.jsonl", [good, record]))


def test_wrong_names_files_and_numbers_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "g.jsonl", [gsm8k(i) for i in range(10)])
    with pytest.raises(UnknownName, match="Did you mean 'gsm8k'"):
        load_benchmark("gsm8", path)
    with pytest.raises(OptionError, match="has 10 questions; asked for 11"):
        load_benchmark("gsm8k", path, n=11)
    with pytest.raises(OptionError, match=r"No such file|Cannot read"):
        load_benchmark("gsm8k", tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(OptionError, match="holds no questions"):
        load_benchmark("gsm8k", tmp_path / "empty.jsonl")
    (tmp_path / "x.gz").write_bytes(b"x")
    with pytest.raises(OptionError, match="Cannot tell what"):
        load_benchmark("gsm8k", tmp_path / "x.gz")
    (tmp_path / "x.jsonl.gz").write_bytes(b"x")
    with pytest.raises(OptionError, match="Cannot unpack"):
        load_benchmark("gsm8k", tmp_path / "x.jsonl.gz")
    (tmp_path / "x.zip").write_bytes(b"x")
    with pytest.raises(OptionError, match="Cannot read"):
        load_benchmark("mmlu", tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("Q,1,2,3,4,E\n", "row 2 needs a question, four answers and a letter of ABCD; got"),
        ("Q,1,2,3,4,AB\n", "row 2 needs"),
        ("Q,1,2,3,4,\n", "row 2 needs"),
        ("Q,1,2,,4,A\n", "row 2 needs"),
        ("Q,1,2,3,A\n", "row 2 needs"),
        ('Q,1,2,3,"4"4,A\n', "cannot be read as a table"),
        ("Q,1,2,3,\udcff,A\n", "cannot be read as a table"),
    ],
)
def test_a_bad_row_of_mmlu_is_named_by_file_and_number(row: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "x_test.csv").write_bytes(("Q,1,2,3,4,A\n" + row).encode("utf-8", "surrogateescape"))
    with pytest.raises(OptionError, match=f"x_test.csv.* {words}"):
        load_benchmark("mmlu", tmp_path)


def test_mmlu_reads_folders_and_zips_alike_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_all(tmp_path) / "mmlu.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    zipped, unpacked = (load_benchmark("mmlu", tmp_path / name) for name in ("mmlu.zip", "unpacked"))
    assert zipped == unpacked
    assert len(zipped) == 20  # and none of the examples of dev
    assert isinstance(zipped, ChoiceTask)
    assert zipped.prompts[1] == "Which letter is number 1?\n\nA. A\nB. B\nC. C\nD. D\n\nAnswer with the letter alone."
    assert zipped.right[1] == {1}
    (tmp_path / "none").mkdir()
    with pytest.raises(OptionError, match=r"holds no file SUBJECT_test\.csv"):
        load_benchmark("mmlu", tmp_path / "none")


def test_given_answers_are_scored_as_their_authors_do(tmp_path: Path) -> None:
    # Sums over tokens, without what closes the turn; the best answer (mc1, MMLU), or the mass of the right (mc2, CAA).
    write_all(tmp_path)
    ab = {"question": "Q?\n\nChoices:\n(A) a\n(B) b"}
    ab |= {"answer_matching_behavior": " (B)", "answer_not_matching_behavior": " (A)"}
    write_lines(tmp_path / "caa.jsonl", [ab])
    for name, file, rule in (
        ("mmlu", "mmlu.zip", "first"),
        ("truthfulqa-mc1", "truthfulqa.json", "first"),
        ("truthfulqa-mc2", "truthfulqa.json", "mass"),
        ("caa", "caa.jsonl", "mass"),
    ):
        task = load_benchmark(name, tmp_path / file)
        assert isinstance(task, ChoiceTask)
        assert (task.rule, task.per, task.closing) == (rule, "answer", False)
    caa = load_benchmark("caa", tmp_path / "caa.jsonl")
    assert isinstance(caa, ChoiceTask)
    assert (caa.choices, caa.right) == ((("(B)", "(A)"),), (frozenset({0}),))
    lm, words = model(), tokenizer()
    a, b = (by_hand(lm, words, ab["question"], letter, closing=False)[0] for letter in ("(A)", "(B)"))
    assert run_task(lm, words, caa).scores[0] == pytest.approx(1 / (1 + np.exp(a - b)), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "file", "validation"),
    [
        ("gsm8k", "gsm8k.jsonl", [1, 4, 6, 7, 9]),
        ("humaneval", "humaneval.jsonl", [0, 2, 4, 6, 9]),
        ("mmlu", "mmlu.zip", [1, 4, 7]),
    ],
)
def test_questions_stay_on_the_side_where_they_were_put(
    name: str, file: str, validation: list[int], tmp_path: Path
) -> None:
    # Knobs were chosen on the validation side: asked in other words, questions would move across.
    write_all(tmp_path)
    whole, part = load_benchmark(name, tmp_path / file), load_benchmark(name, tmp_path / file, split="validation")
    assert [i for i in range(10) if whole.prompts[i] in part.prompts] == validation


# --- choices --------------------------------------------------------------------------------------------------------


def by_hand(lm: Any, words: Any, prompt: str, answer: str, *, closing: bool = True) -> tuple[float, int]:
    """The log-likelihood of an answer and its tokens, from one plain forward call."""
    import torch

    full = Renderer(words).full([Message("user", prompt)], answer)
    with torch.no_grad():
        logps = lm(torch.tensor([full.ids])).logits[0].log_softmax(-1)
    places = range(full.response_start, len(full.ids) if closing else full.response_end)
    return sum(float(logps[t - 1, full.ids[t]]) for t in places), len(places)


def test_likelihoods_and_both_rules_equal_a_computation_by_hand() -> None:
    lm, words = model(), tokenizer()
    prompts, choices = ("One?", "Two and more?"), (("yes", "no, never"), ("a", "b", "cc"))
    right = (frozenset({0}), frozenset({1, 2}))
    for per in ("answer", "token"):
        task = ChoiceTask("t", prompts, choices, right, rule="mass", per=per)  # pyright: ignore[reportArgumentType]
        outcome = run_task(lm, words, task)
        assert outcome.likelihoods is not None
        for i, (prompt, given) in enumerate(zip(prompts, choices, strict=True)):
            found = [by_hand(lm, words, prompt, answer) for answer in given]
            expected = np.array([value / (tokens if per == "token" else 1) for value, tokens in found])
            assert outcome.likelihoods[i] == pytest.approx(list(expected), abs=1e-4)
            mass = np.exp(expected - expected.max())
            assert outcome.scores[i] == pytest.approx(sum(mass[j] for j in right[i]) / mass.sum(), abs=1e-4)
            assert outcome.answers[i] == given[int(expected.argmax())]
            first = ChoiceTask("t", prompts, choices, right, per=per)  # pyright: ignore[reportArgumentType]
            assert first.score(outcome.likelihoods)[i] == float(int(expected.argmax()) in right[i])


def test_order_and_batches_change_no_likelihood_and_ties_are_wrong() -> None:
    lm, words = model(), tokenizer()
    prompts = tuple(f"Question {i}?" for i in range(9))
    choices = tuple((f"answer {i}", "no" * (i + 1)) for i in range(9))
    task = ChoiceTask("t", prompts, choices, (frozenset({0}),) * 9)
    alone = [
        choose(lm, words, ChoiceTask("t", (p,), (c,), (frozenset({0}),)))[0]
        for p, c in zip(prompts, choices, strict=True)
    ]
    for budget in (50, 100_000):
        assert np.allclose(choose(lm, words, task, token_budget=budget), alone, atol=1e-4)
    assert list(task.score([[1.0, 1.0]] * 9)) == [0.0] * 9
    assert list(ChoiceTask("t", ("p",), (("a", "b"),), (frozenset({1}),), rule="mass").score([[-1e4, -1e4]])) == [0.5]


def test_pairs_as_a_task_equal_their_margins_under_a_knob() -> None:
    lm, words = model(), tokenizer()
    pairs = Pairs.from_records([{"prompt": f"Q {i}?", "chosen": "yes" * i, "rejected": "no"} for i in range(1, 6)])
    for setting in ({}, {knob(gain=3.0): 1.0}):
        margins = pair_margins(lm, words, pairs, [setting])[0].margin
        outcome = run_task(lm, words, pairs_task(pairs), setting)
        assert outcome.likelihoods is not None
        assert [a - b for a, b in outcome.likelihoods] == pytest.approx(list(margins), abs=1e-4)
        assert list(outcome.scores) == [float(m > 0) for m in margins]


def test_a_level_is_right_where_its_answer_is_likeliest_per_token() -> None:
    lm, words = model(), tokenizer()
    answers = [{"expert": "a long and careful answer", "generic": "fine", "avoidance": "x"} for _ in range(3)]
    tasks = {level: levels_task(["A?", "B?", "C?"], answers, level) for level in answers[0]}
    scores = np.array([run_task(lm, words, task).scores for task in tasks.values()])
    assert (scores.sum(axis=0) == 1).all()  # one level wins each question
    with pytest.raises(OptionError, match="has no answer at level 'best'"):
        levels_task(["A?"], answers[:1], "best")


@pytest.mark.parametrize(
    ("choices", "right"), [(("a",), {0}), (("a", "b"), set()), (("a", "b"), {0, 1}), (("a", "b"), {2})]
)
def test_items_without_a_right_and_a_wrong_answer_are_refused(choices: tuple[str, ...], right: set[int]) -> None:
    with pytest.raises(OptionError, match="Item 1 of 't' needs two answers or more"):
        ChoiceTask("t", ("p",), (choices,), (frozenset(right),))
