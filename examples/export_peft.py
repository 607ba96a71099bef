"""A LoRA adapter: write a knob at a strength for PEFT, and let PEFT load it, without Trimtab."""

import torch
from peft import PeftModel

import trimtab
from trimtab.exchange import export
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn(model, tokenizer, world.pairs("math"), positions="demonstrated", layers=[4])
turns = [{"role": "user", "content": world.items("math", "test", 1)[0].prompt}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
with torch.no_grad(), trimtab.steer(model, {knob: 1.0}):
    wanted = model(**inputs).logits

# A vector becomes a bias of the adapter, a low-rank knob of weights its matrices; the export checks itself.
written = export({knob: 1.0}, model, tokenizer, to="peft", out="math-adapter")
print("written:", ", ".join(sorted(path.name for path in written.path.iterdir())))

plain, _ = trimtab.load("prefworld")
adapted = PeftModel.from_pretrained(plain, "math-adapter").eval()
with torch.no_grad():
    found = adapted(**inputs).logits
    made = adapted.generate(**inputs, max_new_tokens=60)
print(f"logits differ by at most {float((found - wanted).abs().max()):.1g}")
print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
