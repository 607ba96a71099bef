"""Put the server under load and write docs/serving.md: are answers right, what does mixing cost, what does it survive?

    .venv/bin/python scripts/serving.py          # `make serving`; some parts: --only flood,speed,stops
    .venv/bin/python scripts/serving.py --requests 1000

Ten thousand requests with mixed knobs, 64 at a time and some of them cut off, are compared with what plain transformers
answers to each by itself; then speeds, as ratios in one run; then signals under load.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import httpx  # noqa: E402
import torch  # noqa: E402

import pico  # noqa: E402
import trimtab  # noqa: E402
from flood import Case, flood, under_load  # noqa: E402
from served import Served, served  # noqa: E402
from trimtab.artifact import DeltaKnob, LowRank, Rack  # noqa: E402
from trimtab.engines.continuous.engine import Engine  # noqa: E402
from trimtab.errors import AdapterError  # noqa: E402
from trimtab.serve.figures import Figures  # noqa: E402
from trimtab.serve.load import Load, made_up, measure  # noqa: E402

PAGE = ROOT / "docs" / "serving.md"
MARKS = "<!-- measured: written by scripts/serving.py -->", "<!-- end of what was measured -->"
KEPT = ROOT / "build" / "serving"
"""What was measured, part by part, so that one can be run again."""
DISTINCT = 500
AT_ONCE = 64
CUT = 0.1
"""Share of the requests that are cut off."""
PARTS = ("flood", "speed", "stops", "models")


def main() -> None:
    """Run the parts, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9, help="of every comparison of speeds")
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = knob_words(folder)
        ways: dict[str, Callable[[], str]] = {
            "flood": lambda: crowd(words, folder, args.requests),
            "speed": lambda: speeds(words, args.rounds),
            "stops": lambda: stops(words),
            "models": models,
        }
        for part in args.only.split(","):
            (KEPT / f"{part}.md").write_text(f"{ways[part]()}\n\n{facts()}", encoding="utf-8")
    parts = [(KEPT / f"{part}.md").read_text(encoding="utf-8") for part in PARTS if (KEPT / f"{part}.md").exists()]
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text("\n\n".join([before + MARKS[0], *parts, MARKS[1] + after]), encoding="utf-8")


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def facts() -> str:
    """Say what it was measured with."""
    import fastapi
    import transformers

    return (
        f"Measured with trimtab {version('trimtab')}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, fastapi {fastapi.__version__} on {os.cpu_count()} CPU cores, one of them for the "
        "server's model: the bundled one, in float32."
    )


# Knobs and requests


def knob_words(folder: Path) -> list[str]:
    """Make knobs of every kind that the engine takes, and return the options that load them."""
    model, _ = trimtab.load("prefworld")
    knobs: dict[str, Any] = {
        where: pico.knob(1 + i, name=where, seed=i, where=where, width=model.config.hidden_size, norm=200.0)
        for i, where in enumerate(("all", "context", "prompt", "completion"))
    }
    knobs |= {name: low_rank(model, seed, name) for seed, name in enumerate(("w1", "w2"))}
    words: list[str] = ["prefworld", "--dose", "free"]
    for name, knob in knobs.items():
        knob.save(folder / f"{name}.knob.safetensors")
        words += ["--knob", f"{name}={folder / name}.knob.safetensors"]
    return words


def low_rank(model: Any, seed: int, name: str) -> DeltaKnob:
    """Return a random difference of weights of rank 4."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Any] = {}
    for label, p in model.named_parameters():
        if "layers" in label and p.dim() == 2:
            a, b = torch.randn(4, p.shape[1], generator=generator), torch.randn(p.shape[0], 4, generator=generator)
            parts[label] = LowRank(a / p.shape[1] ** 0.5, 0.3 * b)
    return DeltaKnob(name, "random", parts)


def cases(folder: Path, words: Sequence[str]) -> list[Case]:
    """Draw distinct requests, and answer each by itself with `trimtab.generate`: transformers, hooks and no server."""
    rng = random.Random(0)
    model, tokenizer = trimtab.load("prefworld")
    names = [word.partition("=")[0] for word in words if "=" in word]
    rack = Rack(**{name: folder / f"{name}.knob.safetensors" for name in names})
    prompts = dict.fromkeys(prompt.content for prompt in made_up(2 * DISTINCT, seed=1))
    found: list[Case] = []
    for prompt in list(prompts)[:DISTINCT]:
        chosen = rng.sample(names, rng.choice((0, 1, 1, 2, 3)))
        setting = {name: rng.choice((-1.0, -0.5, 0.5, 1.0, 1.5)) for name in chosen}
        tokens = rng.randint(4, 20)
        answer = trimtab.generate(model, tokenizer, [prompt], rack=rack, knobs=setting, max_new_tokens=tokens)[0]
        found.append(Case(str(prompt), setting, tokens, answer.text))
        if len(found) % 100 == 0:
            say(f"answered {len(found)} of {DISTINCT} alone")
    return found


def crowd(words: Sequence[str], folder: Path, count: int) -> str:
    """Send the requests, and compare every answer."""
    drawn = cases(folder, words)

    def tell(number: int) -> None:
        if number % 1000 == 0:
            say(f"{number} requests")

    with served(*words) as server:
        started = time.monotonic()
        result = asyncio.run(flood(server, drawn, count, at_once=AT_ONCE, cut=CUT, progress=tell))
        seconds = time.monotonic() - started
        status = server.stop()
    memory = result.memory
    tenth = max(1, len(memory) // 10)
    first, last = statistics.mean(memory[:tenth]), statistics.mean(memory[-tenth:])
    wrong = sum(result.wrong.values())
    kinds = "; ".join(f"{n} {what}" for what, n in result.wrong.items()) or "none"
    bare = sum(not case.setting for case in drawn)
    plain = trimtab.generate(*trimtab.load("prefworld"), [case.prompt for case in drawn], max_new_tokens=20)
    changed = sum(not answer.text.startswith(case.expected) for answer, case in zip(plain, drawn, strict=True))
    knobs = sum("=" in word for word in words)
    rows = {
        "answers that are the same, to the letter, as by plain transformers alone": f"{result.same} of "
        f"{count - result.cut}",
        "cut off by the client": result.cut,
        "of which some text had come, and was the right beginning": result.beginnings,
        "anything else": f"{wrong} ({kinds})",
        "memory of the server, first and last tenth of the requests": f"{first:.0f} and {last:.0f} MB",
        "exit status after SIGTERM": status,
        "seconds": f"{seconds:.0f}",
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return (
        f"### {count:,} requests, {AT_ONCE} at a time\n\nDrawn from {len(drawn)} distinct ones: {bare} without knobs, "
        f"the others with one to three of {knobs}, weight knobs among them, which change {changed} of the answers. "
        f"Half of them streamed, {CUT:.0%} cut off at random.\n\n| | |\n|---|---|\n{table}"
    )


# Speeds, as ratios in one run


def speeds(words: Sequence[str], rounds: int) -> str:
    """Compare mixed knobs with one setting for all and with none, many at once with one, and with `transformers serve`.

    Strengths are so small that no answer changes: every way makes the same tokens.
    """
    names = [word.partition("=")[0] for word in words if "=" in word][:4]
    rng = random.Random(3)
    mixed = [{n: rng.choice((-1e-4, 1e-4, 2e-4)) for n in rng.sample(names, rng.randint(1, 3))} for _ in range(64)]
    prompts = made_up(256, seed=4)

    def ask(server: Served, settings: Sequence[Any], at_once: int) -> Callable[[], Figures]:
        requests = 256 if at_once > 1 else 32
        load = Load(
            url=server.url,
            prompts=prompts,
            requests=requests,
            concurrency=at_once,
            settings=settings,
            max_new_tokens=16,
            warmup=0,
        )
        return lambda: asyncio.run(measure(load))

    with served(*words) as server, served(command=baseline()) as other:
        ways = {
            "one setting for all": ask(server, [{"all": 1e-4}], AT_ONCE),
            "64 mixed settings": ask(server, mixed, AT_ONCE),
            "no knobs": ask(server, (), AT_ONCE),
            "no knobs, one at a time": ask(server, (), 1),
            "`transformers serve`, which has no knobs": ask(other, (), AT_ONCE),
            "`transformers serve`, one at a time": ask(other, (), 1),
        }
        measured = interleaved(ways, rounds)
    base = [figures.tokens_per_second for figures in measured["one setting for all"]]
    lines = [row(way, found, base) for way, found in measured.items()]
    head = (
        "| | tokens per second | ratio to one setting for all, median of rounds (quartiles) | first token, ms "
        "(median, p99) | between tokens, ms (median, p99) | errors |"
    )
    return "\n".join([f"### Speed, {rounds} interleaved rounds, {AT_ONCE} at a time\n", head, "|---" * 6 + "|", *lines])


def baseline() -> list[str]:
    """Return the command of `transformers serve` on the same model, with continuous batching, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = ROOT / "src" / "trimtab" / "prefworld" / "model"
    sizes = ["--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "1024"]
    how = ["--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa", "--continuous-batching"]
    program = Path(sys.executable).with_name("transformers")
    return [str(program), "serve", str(model), *how, *sizes, "--host", "127.0.0.1", "--port", str(port)]


def interleaved(ways: dict[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """Measure every way in every round; the first round warms up."""
    found: dict[str, list[Figures]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            figures = run()
            if number:
                found[way].append(figures)
        say(f"round {number} of {rounds}")
    return found


def row(way: str, found: Sequence[Figures], base: Sequence[float]) -> str:
    """Write a line of the table."""
    rates = [figures.tokens_per_second for figures in found]
    ratios = [rate / one for rate, one in zip(rates, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)

    def times(name: str) -> str:
        spreads = [getattr(figures, name) for figures in found]
        return ", ".join(f"{1000 * statistics.median(getattr(s, q) for s in spreads):.0f}" for q in ("median", "p99"))

    errors = sum(failure.count for figures in found for failure in figures.errors.values())
    first, between = times("time_to_first_token"), times("inter_token_latency")
    ratio = f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
    return f"| {way} | {statistics.median(rates):.0f} | {ratio} | {first} | {between} | {errors} |"


# Signals


def stops(words: Sequence[str]) -> str:
    """Stop the server under load, kindly and not, and start it again."""
    prompts = [prompt.content for prompt in made_up(64, seed=5)]
    rows: list[str] = []
    for how in (signal.SIGTERM, signal.SIGKILL):
        with served(*words) as server:
            outcomes = asyncio.run(under_load(server, [str(prompt) for prompt in prompts], how))
            status = server.process.wait(120)
        said = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
        rows.append(f"| {how.name} | {said} | {status} |")
    with served(*words) as server:
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"model": "prefworld", "prompt": "One", "max_tokens": 4, "temperature": 0},
            timeout=60,
        )
        rows.append(f"| started again | HTTP {answer.status_code} | {server.stop()} |")
    return "\n".join(["### Signals under load\n", "| signal | requests | exit status |", "|---|---|---|", *rows])


# Models


def models() -> str:
    """Say on which architectures, as small random twins, a mixed batch comes out as each request alone."""
    found: dict[str, list[str]] = {"served": [], "refused at the start": []}
    for name in pico.ARCHITECTURES:
        try:
            Engine(pico.model(name), pico.tokenizer(), requests=4, tokens=32, cache_tokens=512).close()
            found["served"].append(name)
        except AdapterError:
            found["refused at the start"].append(name)
    rows = [f"| {what} | {len(names)} | {', '.join(names)} |" for what, names in found.items()]
    head = (
        "### Models\n\nTried on small random twins, as at every start:\n\n| | | architectures, by transformers' names |"
    )
    return "\n".join([head, "|---|---|---|", *rows])


if __name__ == "__main__":
    main()
