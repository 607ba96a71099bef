"""Start `trimtab serve` on a free port, ask it with knobs per request, and stop it."""

import json
import subprocess
import sys
from urllib.request import Request, urlopen

import trimtab
from trimtab.prefworld import world

model, tokenizer = trimtab.load("prefworld")
knob = trimtab.learn(model, tokenizer, world.pairs("math"), positions="demonstrated", layers=[4])
knob.save("math.knob.safetensors")
question = world.items("math", "test", 1)[0].prompt


def ask(url: str, setting: dict[str, float]) -> str:
    """Return the answer under a setting; any OpenAI client does the same, with extra_body={"knobs": setting}."""
    body = {"model": "prefworld", "messages": [{"role": "user", "content": question}], "temperature": 0}
    data = json.dumps({**body, "knobs": setting}).encode()
    with urlopen(Request(f"{url}/v1/chat/completions", data, {"content-type": "application/json"})) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


# An untuned knob has no safe range, hence --dose free. On a terminal: trimtab serve prefworld --knob math=...
options = ["--knob", "math=math.knob.safetensors", "--dose", "free", "--port", "0"]
command = [sys.executable, "-m", "trimtab", "serve", "prefworld", *options]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
try:
    url = next(line.split()[-1] for line in server.stdout if line.startswith("Listening on"))
    print(f"{url} serves", ", ".join(knob["id"] for knob in json.load(urlopen(f"{url}/v1/knobs"))["data"]))
    for strength in (-1, 0, 1):
        print(f"math={strength}: {ask(url, {'math': strength})}")
finally:
    server.terminate()  # running requests are finished first
    print("stopped with status", server.wait())
