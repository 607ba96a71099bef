"""Several knobs together: by arithmetic as one knob, side by side on a rack, and as a panel in a file."""

import trimtab
from trimtab.artifact import load_panel, save_panel
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
learned = {  # at one layer, for otherwise they have no sum
    family: trimtab.learn(model, tokenizer, world.pairs(family), name=family, positions="demonstrated", layers=[4])
    for family in ("math", "concise")
}
question = [world.items("math", "test", 1)[0].prompt]

# Arithmetic: strength 1 of the sum is strength 1 of both.
both = learned["math"] - 0.5 * learned["concise"]
print("one knob:", trimtab.generate(model, tokenizer, question, knobs={both: 1})[0].text)

# A rack: the same by name, at strengths that each request chooses.
rack = trimtab.Rack(**learned)
answer = trimtab.generate(model, tokenizer, question, rack=rack, knobs="math=1,concise=-0.5")[0]
print("a rack:  ", answer.text)

# A panel: a file of knobs with strengths, which stands wherever a knob does.
for name, knob in learned.items():
    knob.save(f"{name}.knob.safetensors")
save_panel(
    "panel.json",
    {"math": ("math.knob.safetensors", 1), "concise": ("concise.knob.safetensors", -0.5)},
)
rack, setting = load_panel("panel.json")
print("a panel: ", trimtab.generate(model, tokenizer, question, rack=rack, knobs=setting)[0].text)
