"""Five pairs only: COLD-Steer moves the stream as one gradient step on the pairs would."""

import trimtab
from trimtab.evals.tasks import run_task
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
pairs = world.pairs("risk", 5)
print(f"an example of {len(pairs)}:", pairs[0].prompt[0].content)
print(f"  rather {pairs[0].chosen!r} than {pairs[0].rejected!r}")

# A vector (the gradient of DPO's loss by the stream), and a lookahead (by the weights), which sees every token.
kernel = trimtab.learn(model, tokenizer, pairs, method="cold-kernel", loss="dpo", name="kernel")
ahead = trimtab.learn_lookahead(model, tokenizer, pairs, name="ahead", layers=[4])

task = world.task("risk", "test", 100)
for knob in (kernel, ahead):
    for strength in (-2, 0, 2):
        score = run_task(model, tokenizer, task, {knob: strength}).accuracy
        print(f"{knob.method} at {strength:g}: {100 * score:.0f} % of {len(task)} unseen questions on the chosen side")
