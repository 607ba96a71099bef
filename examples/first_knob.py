"""From pairs to a knob, and one question answered at three strengths."""

import trimtab

# A hundred pairs: answers that show their work against answers that only guess.
QUESTION = "Ana has {a} pens and buys {b} more. How many pens does Ana have?"
pairs = trimtab.Pairs.from_records(
    {
        "prompt": QUESTION.format(a=a, b=b),
        "chosen": f"{a} + {b} = {a + b}. The answer is {a + b}.",
        "rejected": f"The answer is {a + b + 1}.",
    }
    for a in range(12, 52, 4)
    for b in range(13, 43, 3)
)

model, tokenizer = trimtab.load("prefworld")  # or a folder, or a name on the hub
knob = trimtab.learn(model, tokenizer, pairs, method="palrs", name="worked")
print(knob.card(), end="\n\n")

prompts = [QUESTION.format(a=40, b=17)] * 3
rack = trimtab.Rack(worked=knob)
settings = [{"worked": strength} for strength in (-1, 0, 1)]
for answer in trimtab.generate(model, tokenizer, prompts, rack=rack, knobs=settings):
    print(f"worked={answer.knobs['worked']:g}: {answer.text}")

knob.save("worked.knob.safetensors")  # one file; trimtab.load_knob reads it
