"""Choose a knob's site and dose on validation data under a guardrail, then measure it once on a test split."""

import trimtab
from trimtab.evals.evaluate import evaluate
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn(
    model,
    tokenizer,
    world.pairs("math", 100),
    name="math",
    positions=["post_instruction", "demonstrated"],
    last=0.85,
    options={"equal_weight": True},
)

# What chooses is not what was learned from, and what tests is neither.
knob = trimtab.tune(
    knob,
    model,
    tokenizer,
    world.pairs("math", 40, split="validation"),
    task=world.task("math", "validation", 40),
    guardrails=[world.task("copying", "validation", 40)],
    where=["prompt", "context"],
)
print(f"chosen: {knob.site}, {knob.where}, gain {knob.gain:g}, safe strengths {knob.safe_range}")

task, guardrail = world.task("math", "test", 60), world.task("copying", "test", 60)
found = evaluate(model, tokenizer, [task], {knob: 1.0}, guardrails=[guardrail]).record()
for bare, steered in zip(found["bare"]["tasks"], found["settings"][0]["tasks"], strict=True):
    before, after, gain = (part["estimate"] for part in (bare["accuracy"], steered["accuracy"], steered["difference"]))
    low, high = steered["difference"]["low"], steered["difference"]["high"]
    print(f"{bare['task']}: {before:.0%} -> {after:.0%} right ({gain:+.0%}; 95 % interval {low:+.0%} to {high:+.0%})")
