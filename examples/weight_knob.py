"""A knob of weights: DPO on the pairs minus DPO on the pairs swapped, turned row by row and baked into a model."""

import trimtab
from trimtab.exchange import export
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn_weights(  # needs the `train` extra
    model,
    tokenizer,
    world.pairs("harmless", 40),
    method="preference-vector",
    name="refuse",
    validation=world.pairs("harmless", 16, split="validation"),
    learning_rates=[1e-3],
    max_steps=12,  # a quick look; leave it out in earnest
)
print(f"{len(knob.parts)} weights differ, at rank {knob.described()[0]['rank']}")

question = world.items("harmless", "test", 1)[0].prompt
print(question)
strengths = (-1, 0, 1)  # low rank: every row of the batch has its own
rows = [{knob: strength} for strength in strengths]
for strength, answer in zip(strengths, trimtab.generate(model, tokenizer, [question] * 3, knobs=rows), strict=True):
    print(f"refuse={strength:g}: {answer.text}")

# Permanently, for tools that know nothing of knobs: a model folder like any other.
print("written:", export({knob: 1.0}, model, tokenizer, to="checkpoint", out="refusing-model").path)
