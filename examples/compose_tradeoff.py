"""Two preferences that pull apart: measure a grid of strengths, see the front, take the setting that serves a goal."""

import trimtab
from trimtab.compose import Goal
from trimtab.prefworld import world
from trimtab.types import format_setting

model, tokenizer = trimtab.load("prefworld")
families = ("math", "concise")
knobs = {
    family: trimtab.learn(model, tokenizer, world.pairs(family), name=family, positions="demonstrated", layers=[4])
    for family in families
}

composed = trimtab.compose(
    knobs,
    model,
    tokenizer,
    {family: world.task(family, "validation", 24) for family in families},
    guardrails=[world.task("copying", "validation", 24)],
    budget=0.05,
    search="grid",  # Optuna looks more cleverly, with the `compose` extra
    grid=[0, 0.5, 1],
)
goal = Goal(weights=dict.fromkeys(families, 1.0))
for tried in composed.table:
    scores = ", ".join(f"{name} {100 * score:.0f} %" for name, score in tried.scores.items())
    print(format_setting(tried.setting), "->", scores, "" if tried.qualifies(goal) else "(beyond a budget)")
print("chosen:", composed.panel.setting)
composed.save("panel.json")  # with the knobs beside it
