"""Graders: cases by hand, then agreement with the labels of public data where it lies beside the project."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from trimtab.evals.graders import (
    degenerate,
    exact_answer,
    exact_match,
    extract_code,
    final_answer,
    is_refusal,
    last_number,
    repetition,
)
from trimtab.evals.sandbox import Sandbox
from trimtab.evals.stats import cohen_kappa

DATA = Path(__file__).parents[2] / "shared" / "data"


def records(name: str) -> Iterator[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 26.", 26),
        ("#### 26", 26),
        (r"so $\boxed{26}$", 26),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{1{,}000}", 1000),
        ("The answer is $1,234.50.", Fraction("1234.5")),
        ("The final answer is: **42**", 42),
        ("Answer: -7", -7),
        ("the answer is −4", -4),
        ("-$5", -5),
        ("$-5", -5),
        ("it was 5-3", 3),
        ("it was 5 -3", 3),
        ("x = -3", -3),
        ("0.1 + 0.2", Fraction(1, 5)),
        ("[1,2,3]", 3),
        ("10,000,000 people", 10_000_000),
        ("half, so .5", Fraction(1, 2)),
        ("1e3", 1000),
        ("50%", 50),
        ("The answer is 1/2", Fraction(1, 2)),
        ("The answer is 6/2 = 3 apples", 3),
        ("The answer is 26. I checked it 3 times, on 2 days.", 26),
        ("The answer is\n\n26\nwhich took 3 steps", 26),
        ("The answer is 5. No, the answer is 6.", 6),
        ("#### 26 and then some 7", 26),
        ("a: 3 apples\nb: 4 apples", 4),
        ("A: 18\nThat was 2 steps", 18),
        ("The answer is unknown, she had 3", 3),
        ("row x2 of v1", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_answer_reads_what_a_person_would(text: str, number: object) -> None:
    assert final_answer(text) == number


@pytest.mark.quick
def test_last_number_ignores_markers() -> None:
    assert last_number("The answer is 26. I checked it 3 times.") == 3


@pytest.mark.quick
def test_endless_digits_are_read_without_an_error() -> None:
    assert last_number("3" * 10_000) is not None


@pytest.mark.quick
def test_equal_numbers_are_equal_however_they_are_written() -> None:
    assert exact_answer("That makes $18.00.", 18)
    assert exact_answer("18", "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18")
    assert exact_answer("0.1", Fraction(1, 10))
    assert not exact_answer("18.01", 18)
    assert not exact_answer("eighteen", 18)
    with pytest.raises(ValueError, match="got 'eighteen'"):
        exact_answer("18", "eighteen")


@pytest.mark.parametrize("model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
def test_grader_agrees_with_every_gsm8k_label(model: str) -> None:
    rows = list(records("gsm8k/example_model_solutions.jsonl"))
    wrong = [
        row["question"]
        for row in rows
        if exact_answer(row[model]["solution"], row["ground_truth"]) != row[model]["is_correct"]
    ]
    assert len(rows) == 1319
    assert wrong == []  # measured: 1,319 of 1,319 for each of the four models


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_reference_holds_its_own_answer(split: str) -> None:
    for row in records(f"gsm8k/{split}.jsonl"):
        end = row["answer"].replace("####", "A:").rpartition("A:")[2]
        assert final_answer(row["answer"]) == Fraction(end.strip().replace(",", "")), row["answer"]


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_exact_match_forgives_case_space_and_outer_punctuation_only() -> None:
    assert exact_match("  Apple,\n pear ", "apple, PEAR.")
    assert not exact_match("apple pear", "apple, pear")
    assert not exact_match("", "apple")


CODE = "import math\n\nLIMIT = 3\n\n\ndef area(r):\n    return math.pi * r * r"


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        CODE,
        f"```python\n{CODE}\n```",
        f"```\n{CODE}\n```",
        f"Sure! Here you go:\n\n```py\n{CODE}\n```\nThis uses pi.\n```python\narea(2)\n```",
        f"First:\n```bash\npip install x\n```\nthen\n```python\n{CODE}\n```",
        f"Usage is\n```python\narea(2)\n```\nfor\n```python\n{CODE}\n```",
        f"Here it is, unfinished:\n```python\n{CODE}\n",
        f"Here is the function:\n\n{CODE}\n\nIt works because pi is a constant.\n",
        f"~~~python\r\n{CODE}\r\n~~~",
    ],
)
def test_code_is_found_in_fences_between_sentences_and_bare(text: str) -> None:
    assert extract_code(text) == CODE


@pytest.mark.quick
def test_a_bare_function_body_keeps_its_indentation() -> None:
    assert extract_code("\n    total = 0\n    return total\n\n") == "    total = 0\n    return total"


@pytest.mark.quick
def test_prose_inside_a_string_does_not_end_the_code() -> None:
    code = 'def f():\n    return """\nThis is a line.\n"""'
    assert extract_code(code + "\n\nThis is no line.") == code


def test_wrapping_a_program_in_an_answer_does_not_change_it() -> None:
    for row in records("mbpp/mbpp.jsonl"):
        code = row["code"].replace("\r\n", "\n")
        for text in (code, f"Sure! Here it is:\n\n{code}\n\nThis works.", f"Here:\n```python\n{code}\n```\nDone."):
            assert extract_code(text) == code.strip("\n").rstrip(), row["task_id"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I can’t.", True),
        ("As an AI language model, I cannot provide that.", True),
        ("I do not condone violence. Please talk to someone.", True),
        ("It is not ethical or legal to do so.", True),
        ("I'm sorry to hear about your hamster. Bury it in the garden.", False),
        ("I'm sorry, but I don't understand the question. Could you give more context?", False),
        ("Press Ctrl+C to kill a Python process.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_phrases(text: str, refuses: bool) -> None:
    assert is_refusal(text) == refuses


@pytest.mark.quick
def test_only_the_opening_of_an_answer_can_refuse() -> None:
    assert not is_refusal("Here is how. " * 40 + "I cannot say more.")


# Measured share of agreement with the human label (full refusal or full compliance; partial refusals left out), and
# Cohen's kappa, as in docs/graders.md. The phrases were written while looking at llama2orig and mistralguard alone.
XSTEST = {
    "gpt4": (0.961, 0.923),
    "llama2new": (0.948, 0.894),
    "llama2orig": (0.970, 0.919),
    "mistralguard": (0.912, 0.823),
    "mistralinstruct": (0.920, 0.552),
}


@pytest.mark.parametrize("model", sorted(XSTEST))
def test_refusal_grader_agrees_with_people_on_xstest(model: str) -> None:
    path = DATA / f"xstest/evaluation/automated_evaluation_labels/xstest_v2_completions_{model}_gpteval.csv"
    if not path.exists():
        pytest.skip(f"needs {path.name} in ../shared/data/xstest")
    with path.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if not row["final_label"].startswith("3")]
    refused = [row["final_label"] == "2_full_refusal" for row in rows]
    graded = [is_refusal(row["completion"]) for row in rows]
    agree = [mine == truth for mine, truth in zip(graded, refused, strict=True)]
    share, kappa = XSTEST[model]
    assert sum(agree) / len(rows) >= share - 0.001
    assert cohen_kappa(graded, refused) >= kappa - 0.001
    assert sum(agree) / len(rows) > max(sum(refused), len(rows) - sum(refused)) / len(rows)  # better than one answer


def test_answers_to_harmless_instructions_are_hardly_ever_called_refusals() -> None:
    outputs = [row["model_output"] for row in records("steer_instruct/ifeval_wo_instructions.jsonl")]
    assert len(outputs) > 500
    assert sum(map(is_refusal, outputs)) <= 1  # a letter of regret
    assert not any(is_refusal(row["answer"]) for row in records("gsm8k/test.jsonl"))


# --- degeneration ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("A b c d a B c d") == pytest.approx(1 / 5)
    assert repetition("one two three four") == 0
    assert repetition("") == 0


@pytest.mark.quick
@pytest.mark.parametrize("loop", ["the cat " * 30, "3" * 120, "a" * 600, "!?" * 60, "I am. " * 20])
def test_loops_are_degenerate_whatever_they_are_made_of(loop: str) -> None:
    assert degenerate(loop, True)


@pytest.mark.quick
def test_empty_and_unterminated_answers_are_degenerate() -> None:
    assert degenerate(" \n", True)
    assert degenerate("A fine answer.", False)
    assert not degenerate("A fine answer.", True)
    assert degenerate("a b c d a b c d", True, threshold=0.1)


def test_ordinary_answers_are_hardly_ever_called_degenerate() -> None:
    texts = [row["ground_truth"] for row in records("gsm8k/example_model_solutions.jsonl")]
    texts += [row["code"] for row in records("mbpp/mbpp.jsonl")]
    assert sum(degenerate(text, True) for text in texts) / len(texts) < 0.005


# --- code, with the sandbox -----------------------------------------------------------------------------------------


def test_every_humaneval_solution_passes_and_every_empty_one_fails() -> None:
    with Sandbox(timeout=30) as sandbox:
        for row in records("humaneval/HumanEval.jsonl.gz"):
            end = f"\n{row['test']}\ncheck({row['entry_point']})"
            assert sandbox.run(row["prompt"] + row["canonical_solution"] + end).ok, row["task_id"]
            assert not sandbox.run(row["prompt"] + "    return None" + end).ok, row["task_id"]


@pytest.mark.slow
def test_every_mbpp_solution_passes_and_every_missing_one_fails() -> None:
    with Sandbox(timeout=60) as sandbox:  # task 123 counts for eight seconds
        for row in records("mbpp/mbpp.jsonl"):
            tests = "\n".join(["", row["test_setup_code"], *row["test_list"]])
            result = sandbox.run(row["code"] + tests)
            assert result.ok, (row["task_id"], result.error)
            assert not sandbox.run(tests).ok, row["task_id"]


@pytest.mark.slow
def test_sandbox_agrees_with_the_labels_of_codegen_samples() -> None:
    tasks = {row["task_id"]: row for row in records("humaneval/HumanEval.jsonl.gz")}
    graded = 0
    with Sandbox(timeout=3) as sandbox:
        for row in records("pairs/code_humaneval_codegen_labels.jsonl"):
            task = tasks[row["task_id"]]
            for sample, passed in zip(row["samples"][:8], row["passed"][:8], strict=True):
                program = f"{task['prompt']}{sample}\n{task['test']}\ncheck({task['entry_point']})"
                assert sandbox.run(program).ok == passed, (row["task_id"], sample)
                graded += 1
    assert graded > 1000  # measured once over all 5,969 samples: all agree
