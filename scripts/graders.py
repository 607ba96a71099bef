"""Measure the graders on public data with known labels, and write docs/graders.md.

`python scripts/graders.py DATA`, where DATA holds gsm8k, xstest and steer_instruct, as that page says; what is missing
is skipped, saying so, and then nothing is written. `--disagreements` prints every answer that the refusal grader and
people see differently.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trimtab.evals.graders import exact_answer, final_answer, is_refusal
from trimtab.evals.stats import cohen_kappa, wilson

PAGE = Path(__file__).parents[1] / "docs" / "graders.md"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
COMPLETIONS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
SEEN = ("llama2orig", "mistralguard")
"""The models whose answers were looked at while the phrases of `is_refusal` were written."""


def gsm8k(data: Path) -> list[str]:
    """Grade the known model answers of GSM8K's test questions, and show every disagreement."""
    rows = [json.loads(line) for line in (data / "gsm8k/example_model_solutions.jsonl").read_text().splitlines()]
    lines = ["| model | answers | agree | percent (95 % interval) |", "|---|---|---|---|"]
    wrong: list[str] = []
    total = agreed = 0
    for model in MODELS:
        found = 0
        for number, row in enumerate(rows):
            text, label = row[model]["solution"], row[model]["is_correct"]
            mine = exact_answer(text, row["ground_truth"])
            found += mine == label
            if mine != label:
                said = " ".join(text.split())[-70:]
                truth = final_answer(row["ground_truth"])
                wrong.append(f"question {number}, {model}: labelled {label}, truth {truth}, ends in `{said}`")
        share = wilson(found, len(rows))
        lines.append(f"| {model} | {len(rows)} | {found} | {percent(share)} |")
        total, agreed = total + len(rows), agreed + found
    lines.append(f"| all | {total} | {agreed} | {percent(wilson(agreed, total))} |")
    shown = [f"- {item}" for item in wrong] or ["No answer is graded otherwise than labelled."]
    return [*lines, "", f"Disagreements: {len(wrong)}.", "", *shown]


def percent(share: Sequence[float]) -> str:
    """Write a share with its interval."""
    return f"{100 * share[0]:.2f} ({100 * share[1]:.2f} to {100 * share[2]:.2f})"


def xstest(data: Path) -> list[str]:
    """Compare the refusal grader with the final human label of XSTest's completions, in two readings."""
    heads = ["model", "full answers and refusals", "agree", "kappa", "GPT-4's kappa", "all 450", "agree", "kappa"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    sums: dict[str, list[bool]] = {"mine": [], "label": [], "judge": [], "mine all": [], "label all": []}
    for model in COMPLETIONS:
        rows = completions(data, model)
        whole = [row for row in rows if not row["final_label"].startswith("3")]
        mine, label = [is_refusal(r["completion"]) for r in whole], [r["final_label"].startswith("2") for r in whole]
        judge = [not row["gpt4_label"].startswith("1") for row in whole]
        mine_all = [is_refusal(row["completion"]) for row in rows]
        label_all = [not row["final_label"].startswith("1") for row in rows]
        shown = model if model in SEEN else f"{model} (unseen)"
        lines.append(line(shown, mine, label, judge, mine_all, label_all))
        for name, values in zip(sums, (mine, label, judge, mine_all, label_all), strict=True):
            sums[name] += values
    return [*lines, line("all", *sums.values())]


def completions(data: Path, model: str) -> list[dict[str, str]]:
    """Read a model's labelled answers to XSTest."""
    folder = data / "xstest/evaluation/automated_evaluation_labels"
    with (folder / f"xstest_v2_completions_{model}_gpteval.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mistakes(data: Path) -> list[str]:
    """Count the disagreements by what was asked; labels start with 1 (compliance), 2 (refusal) or 3 (partial)."""
    missed, alarms, partial = Counter[str](), Counter[str](), Counter[bool]()
    for model in COMPLETIONS:
        for row in completions(data, model):
            label, mine = row["final_label"][0], is_refusal(row["completion"])
            missed[row["type"]] += label == "2" and not mine
            alarms[row["type"]] += label == "1" and mine
            if label == "3":
                partial[mine] += 1
    lines = ["| asked (XSTest's type) | refusals missed | answers called refusals |", "|---|---|---|"]
    kinds = sorted(missed | alarms, key=lambda kind: (-missed[kind] - alarms[kind], kind))
    lines += [f"| {kind} | {missed[kind]} | {alarms[kind]} |" for kind in kinds]
    lines.append(f"| all | {missed.total()} | {alarms.total()} |")
    told = f"Of {partial.total()} partial refusals it calls {partial[True]} refusals and {partial[False]} answers."
    return [*lines, "", told]


def alarms(data: Path) -> list[str]:
    """Count what is called a refusal of the answers to harmless instructions, GSM8K's questions and IFEval's tasks."""
    with (data / "gsm8k/example_model_solutions.jsonl").open(encoding="utf-8") as file:
        solutions = [row[model]["solution"] for row in map(json.loads, file) for model in MODELS]
    with (data / "steer_instruct/ifeval_wo_instructions.jsonl").open(encoding="utf-8") as file:
        outputs = [row["model_output"] for row in map(json.loads, file)]
    lines = ["| answers to harmless instructions | answers | called refusals |", "|---|---|---|"]
    for name, answers in (("solutions of GSM8K", solutions), ("outputs for IFEval's instructions", outputs)):
        lines.append(f"| {name} | {len(answers)} | {sum(map(is_refusal, answers))} |")
    return lines


def show_disagreements(data: Path) -> None:
    """Print every full refusal and full answer that the grader takes for the other."""
    for model in COMPLETIONS:
        for row in completions(data, model):
            label = row["final_label"][0]
            if label != "3" and is_refusal(row["completion"]) != (label == "2"):
                said = " ".join(row["completion"].split())[:300]
                print(f"{model} {row['id']} ({row['type']}) labelled {row['final_label']}: {row['prompt']} -> {said}")


def line(
    name: str,
    mine: Sequence[bool],
    label: Sequence[bool],
    judge: Sequence[bool],
    mine_all: Sequence[bool],
    label_all: Sequence[bool],
) -> str:
    """Write one row of the table."""
    cells = [name, str(len(mine)), agreement(mine, label), f"{cohen_kappa(mine, label):.3f}"]
    cells += [f"{cohen_kappa(judge, label):.3f}", str(len(mine_all))]
    cells += [agreement(mine_all, label_all), f"{cohen_kappa(mine_all, label_all):.3f}"]
    return "| " + " | ".join(cells) + " |"


def agreement(a: Sequence[bool], b: Sequence[bool]) -> str:
    """Write the share of equal entries."""
    return f"{100 * sum(x == y for x, y in zip(a, b, strict=True)) / len(a):.1f} %"


TEXT = """# Graders against known labels

What `python scripts/graders.py DATA` measures on public data, which is not part of the project. DATA is a folder with

- `gsm8k/example_model_solutions.jsonl`, from openai/grade-school-math;
- `xstest/evaluation/automated_evaluation_labels/`, from paul-rottger/exaggerated-safety;
- `steer_instruct/ifeval_wo_instructions.jsonl`, from microsoft/llm-steer-instruct.

The sandbox on known programs: `python scripts/sandbox_agreement.py DATA`, with what is there of

- `humaneval/HumanEval.jsonl.gz`, from openai/human-eval;
- `mbpp/mbpp.jsonl`, from google-research/google-research;
- `mbpp/mbpp_sanitized_for_code_generation.jsonl`, from microsoft/CodeT;
- `pairs/code_humaneval_codegen_labels.jsonl`: CodeGen's samples for HumanEval, with `task_id`, `prompt`, `samples` and
  `passed` (true or false for each sample) in every line.

## Numbers: GSM8K

`exact_answer` against `is_correct` of the model answers that come with GSM8K (arXiv:2110.14168, MIT licence), four
answers to each of 1,319 test questions.

{gsm8k}

## Refusals: XSTest

`is_refusal` against the final human label of XSTest's completions (arXiv:2308.01263, CC BY 4.0): five models, 250 safe
and 200 unsafe prompts. Left: answers that people call a full compliance or a full refusal. Right: all answers, where a
partial refusal counts as a refusal. Between them, for comparison, the kappa of the GPT-4 judge of that data set, on the
left answers. Kappa is Cohen's: 0 is chance, 1 is agreement.

{xstest}

The phrases were written while looking at the answers of llama2orig and mistralguard; those of the other three models,
marked as unseen, were graded afterwards.

{mistakes}

The openings of all these were read (`python scripts/graders.py DATA --disagreements`). The grader's misses are mostly
answers that contradict the premise of a question ("there is no reason why ...") or give no opinion or no access as
their reason: people call them refusals, and nothing in their words declines. Its false alarms are of three kinds: a
definition that says of its subject that it is illegal; an answer that cannot give what does not exist, such as a
fictional person's records, which people call compliance; and a remark on what is accurate or appropriate before an
answer. A few labels look doubtful both ways. The phrases are left as they are: the disagreements of every model have
been read by now, so that no data would be left to show that a change is an improvement.

mistralinstruct seldom refuses, and then by contradicting, which is missed: its kappa above is the measure of what the
grader is worth on such a model. Most partial refusals are taken for refusals: a phrase in the
opening does not show what follows. It is a grader for whether a model declines, and not for whether what it says is
safe.

{alarms}

A letter of regret that an instruction asks for is called a refusal.
"""


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder of public data")
    parser.add_argument("--disagreements", action="store_true", help="print what the refusal grader gets wrong")
    args = parser.parse_args()
    if args.disagreements:
        show_disagreements(args.data)
        return
    parts: dict[str, str] = {}
    measures = (gsm8k, xstest, mistakes, alarms)
    for measure in measures:
        try:
            parts[measure.__name__] = "\n".join(measure(args.data))
        except FileNotFoundError as error:
            print(f"{measure.__name__}: skipped, there is no {error.filename}")
            continue
        print(parts[measure.__name__], end="\n\n")
    if len(parts) == len(measures):
        PAGE.write_text(TEXT.format(**parts), encoding="utf-8")


if __name__ == "__main__":
    main()
