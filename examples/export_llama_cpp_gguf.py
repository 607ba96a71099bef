"""A control vector for llama.cpp and repeng: write a knob as GGUF, and read the file back as a knob."""

import trimtab
from trimtab.exchange import export, import_knob
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn(model, tokenizer, world.pairs("math"), positions="demonstrated", layers=[4])

written = export({knob: 1.0}, model, tokenizer, to="gguf", out="math.gguf")  # needs the `gguf` extra
print(f"written: {written.path}, {written.path.stat().st_size} bytes")
print("llama.cpp reads it by: llama-cli -m MODEL.gguf --control-vector math.gguf")

# The other way, for control vectors of repeng and llama.cpp: strength 1 is the file's coefficient 1.
again = import_knob("math.gguf", model, tokenizer, name="again")
question = [world.items("math", "test", 1)[0].prompt]
for name, dose in (("math at 1", {knob: 1.0}), ("the file at 1", {again: 1.0})):
    print(f"{name}: {trimtab.generate(model, tokenizer, question, knobs=dose)[0].text}")
