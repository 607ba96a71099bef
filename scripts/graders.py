"""Measure the graders on public data with known labels, and write docs/graders.md.

`python scripts/graders.py [DATA]`, where DATA (default ../shared/data) holds gsm8k and xstest; what is missing is
skipped, saying so, and then nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from trimtab.evals.graders import exact_answer, final_answer, is_refusal
from trimtab.evals.stats import cohen_kappa, wilson

PAGE = Path(__file__).parents[1] / "docs" / "graders.md"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
COMPLETIONS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")


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
    folder = data / "xstest/evaluation/automated_evaluation_labels"
    heads = ["model", "full answers and refusals", "agree", "kappa", "GPT-4's kappa", "all 450", "agree", "kappa"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    sums: dict[str, list[bool]] = {"mine": [], "label": [], "judge": [], "mine all": [], "label all": []}
    for model in COMPLETIONS:
        with (folder / f"xstest_v2_completions_{model}_gpteval.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        whole = [row for row in rows if not row["final_label"].startswith("3")]
        mine, label = [is_refusal(r["completion"]) for r in whole], [r["final_label"].startswith("2") for r in whole]
        judge = [not row["gpt4_label"].startswith("1") for row in whole]
        mine_all = [is_refusal(row["completion"]) for row in rows]
        label_all = [not row["final_label"].startswith("1") for row in rows]
        lines.append(line(model, mine, label, judge, mine_all, label_all))
        for name, values in zip(sums, (mine, label, judge, mine_all, label_all), strict=True):
            sums[name] += values
    return [*lines, line("all", *sums.values())]


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

What `python scripts/graders.py` measures on public data (not part of the project; the sources are named below). The
sandbox on known programs: `python scripts/sandbox_agreement.py`.

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

What it gets wrong: answers that decline by changing the subject or by asking back; answers that comply after a moral
remark which sounds like a refusal; and nearly every partial refusal, which a phrase in the opening cannot tell from an
answer. It is a grader for whether a model declines, and not for whether what it says is safe.
"""


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    parts: dict[str, str] = {}
    for measure in (gsm8k, xstest):
        try:
            parts[measure.__name__] = "\n".join(measure(args.data))
        except FileNotFoundError as error:
            print(f"{measure.__name__}: skipped, there is no {error.filename}")
            continue
        print(parts[measure.__name__], end="\n\n")
    if len(parts) == 2:
        PAGE.write_text(TEXT.format(**parts), encoding="utf-8")


if __name__ == "__main__":
    main()
