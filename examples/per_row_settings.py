"""One batch, one setting per row: each answer has its own knobs, and a row without any is the bare model's."""

import trimtab
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
rack = trimtab.Rack(
    **{
        family: trimtab.learn(model, tokenizer, world.pairs(family), positions="demonstrated", layers=[4])
        for family in ("math", "concise")
    }
)

question = world.items("math", "test", 1)[0].prompt
print(question)
settings = ["", "math=1", "math=-1", "concise=1", "math=0.5,concise=0.5"]  # text, or {"math": 1}
answers = trimtab.generate(model, tokenizer, [question] * len(settings), rack=rack, knobs=settings)
for setting, answer in zip(settings, answers, strict=True):
    print(f"{setting or 'no knob':>22}: {answer.text}")

# A row alone answers as it does among others.
alone = trimtab.generate(model, tokenizer, [question], rack=rack, knobs="math=1")[0]
print("the row 'math=1' alone says the same:", alone.text == answers[1].text)
