"""Inside `steer` it is the ordinary transformers API: generate, a pipeline, a forward; afterwards nothing is left."""

import torch
from transformers import pipeline

import trimtab
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn(model, tokenizer, world.pairs("math"), positions="demonstrated", layers=[4])
turns = [{"role": "user", "content": world.items("math", "test", 1)[0].prompt}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")

with torch.no_grad():
    before = model(**inputs).logits
    with trimtab.steer(model, {knob: 1}) as steering:
        made = model.generate(**inputs, max_new_tokens=60)
        print(
            "generate, strength 1:", tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )

        steering.set({knob: -1})  # turn it without leaving
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        print("pipeline, strength -1:", write(turns, max_new_tokens=60)[0]["generated_text"][-1]["content"])
    after = model(**inputs).logits
print("the bare model again, bit for bit:", torch.equal(before, after))
