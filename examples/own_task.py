"""A task of your own: prompts and a grader, beside a guardrail that must not get worse."""

from collections.abc import Sequence

import trimtab
from trimtab.evals.tasks import Task, run_task
from trimtab.prefworld import world

THINGS = ("pens", "cups", "maps", "keys")
QUESTION = "Ana has {a} {thing} and buys {b} more. How many {thing} does Ana have?"
prompts = tuple(QUESTION.format(a=a, b=a + 7, thing=thing) for a in range(20, 30) for thing in THINGS)


def shows_its_work(answers: Sequence[str]) -> list[float]:
    """Score every answer, in the order of the prompts, from 0 to 1."""
    return [float("=" in answer) for answer in answers]


task = Task("shows its work", prompts, shows_its_work, max_new_tokens=60)
guardrail = world.task("facts", "validation", 40)

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn(model, tokenizer, world.pairs("math"), positions="demonstrated", layers=[4])
for strength in (0, 0.5, 1):
    score, kept = (run_task(model, tokenizer, each, {knob: strength}).accuracy for each in (task, guardrail))
    print(f"math={strength:g}: {task.name} {100 * score:.0f} %, guardrail {guardrail.name} {100 * kept:.0f} %")
