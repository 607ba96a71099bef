"""Put the server under load and write docs/serving.md: are answers right, what does mixing cost, what does it survive?

    .venv/bin/python scripts/serving.py          # `make serving`; some parts: --only flood,speed,stops
    .venv/bin/python scripts/serving.py --requests 1000

Ten thousand requests with mixed knobs, 64 at a time and some of them cut off, are compared with what plain transformers
answers to each by itself; then speeds, as ratios in one run; then signals under load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import httpx  # noqa: E402
import torch  # noqa: E402

import pico  # noqa: E402
import trimtab  # noqa: E402
from served import Served, served  # noqa: E402
from trimtab.artifact import DeltaKnob, LowRank, Rack  # noqa: E402
from trimtab.serve.load import Load, made_up, measure  # noqa: E402

PAGE = ROOT / "docs" / "serving.md"
MARKS = "<!-- measured: written by scripts/serving.py -->", "<!-- end of what was measured -->"
DISTINCT = 500
AT_ONCE = 64
CUT = 0.1
"""Share of the requests that are cut off."""
PARTS = ("flood", "speed", "stops")


def main() -> None:
    """Run the parts, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9, help="of every comparison of speeds")
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = args.only.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = knob_words(folder)
        parts = [facts()]
        if "flood" in wanted:
            parts.append(flood(words, folder, args.requests))
        if "speed" in wanted:
            parts.append(speeds(words, folder, args.rounds))
        if "stops" in wanted:
            parts.append(stops(words))
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
        f"Measured with trimtab {version('trimtab')}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"fastapi {fastapi.__version__} on 2 CPU cores, the server's model on one thread: the bundled model in float32."
    )


# Knobs and requests


def knob_words(folder: Path) -> list[str]:
    """Make knobs of every kind that the engine takes, and return the options that load them."""
    model, _ = trimtab.load("prefworld")
    knobs: dict[str, Any] = {
        where: pico.knob(1 + i, name=where, seed=i, where=where, width=model.config.hidden_size, norm=12.0)
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
            parts[label] = LowRank(a / p.shape[1] ** 0.5, 0.02 * b)
    return DeltaKnob(name, "random", parts)


@dataclass(frozen=True)
class Case:
    """A request, and the answer of plain transformers to it."""

    prompt: str
    setting: dict[str, float]
    tokens: int
    expected: str


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


# Ten thousand requests


@dataclass
class Flood:
    """What came of the requests."""

    same: int = 0
    cut: int = 0
    beginnings: int = 0
    """Answers that were cut off, of which some text had come, and was right."""
    wrong: Counter[str] | None = None
    memory: list[float] | None = None


def flood(words: Sequence[str], folder: Path, count: int) -> str:
    """Send the requests, and compare every answer."""
    drawn = cases(folder, words)
    bare = sum(not case.setting for case in drawn)
    with served(*words) as server:
        started = time.monotonic()
        result = asyncio.run(_flood(server, drawn, count))
        seconds = time.monotonic() - started
        status = server.stop()
    memory = result.memory or [0.0]
    tenth = max(1, len(memory) // 10)
    first, last = statistics.mean(memory[:tenth]), statistics.mean(memory[-tenth:])
    wrong = sum((result.wrong or Counter()).values())
    kinds = "; ".join(f"{n} {what}" for what, n in (result.wrong or Counter()).items()) or "none"
    return f"""### {count:,} requests, {AT_ONCE} at a time

Drawn from {len(drawn)} distinct ones ({bare} without knobs, the others with one to three of {len(words) // 2 - 1} knobs, weight knobs among
them), half of them streamed; {CUT:.0%} cut off at random.

| | |
|---|---|
| answers that are the same, to the letter, as by plain transformers alone | {result.same} of {count - result.cut} |
| cut off by the client | {result.cut} |
| of which some text had come, and was the right beginning | {result.beginnings} |
| anything else | {wrong} ({kinds}) |
| memory of the server, first tenth and last tenth of the requests | {first:.0f} and {last:.0f} MB |
| exit status after SIGTERM | {status} |
| seconds | {seconds:.0f} |"""


async def _flood(server: Served, drawn: Sequence[Case], count: int) -> Flood:
    result, rng = Flood(wrong=Counter(), memory=[]), random.Random(2)
    numbers = iter(range(count))
    assert result.wrong is not None
    assert result.memory is not None
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:

        async def worker() -> None:
            for number in numbers:
                case = rng.choice(drawn)
                cut = rng.randrange(6) if rng.random() < CUT else None
                await _one(client, server.url, case, cut, number % 2 == 0, result)
                if number % 20 == 0:
                    result.memory.append(server.memory())
                if number % 1000 == 0:
                    say(f"{number} requests, {server.memory():.0f} MB")

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        left = (await client.get(f"{server.url}/metrics")).text
    flying = [line for line in left.splitlines() if "in_flight" in line and not line.startswith("#")]
    if flying and float(flying[0].split()[-1]):
        result.wrong["requests left in flight"] += 1
    return result


async def _one(client: httpx.AsyncClient, url: str, case: Case, cut: int | None, streamed: bool, result: Flood) -> None:
    body = {
        "model": "prefworld",
        "messages": [{"role": "user", "content": case.prompt}],
        "max_tokens": case.tokens,
        "temperature": 0,
        "knobs": case.setting,
        "stream": streamed or cut is not None,
    }
    text, place = "", f"{url}/v1/chat/completions"
    assert result.wrong is not None
    try:
        if not body["stream"]:
            response = await client.post(place, json=body)
            text = response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else response.text
        else:
            async with client.stream("POST", place, json=body) as response:
                pieces = 0
                async for line in response.aiter_lines():
                    if cut is not None and pieces >= cut:
                        result.cut += 1
                        result.beginnings += bool(text)
                        if not case.expected.startswith(text):
                            result.wrong["another beginning"] += 1
                        return
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        pieces += 1
                        text += "".join(c["delta"].get("content") or "" for c in chunk.get("choices", []))
    except (httpx.HTTPError, KeyError, ValueError) as error:
        result.wrong[type(error).__name__] += 1
        return
    result.same += text == case.expected
    if text != case.expected:
        result.wrong["another answer"] += 1
        say(f"WRONG {case} {text!r}")


# Speeds, as ratios in one run


def speeds(words: Sequence[str], folder: Path, rounds: int) -> str:
    """Compare mixed knobs with one setting for all and with none, many at once with one, and with `transformers serve`."""
    names = [word.partition("=")[0] for word in words if "=" in word][:4]
    rng = random.Random(3)
    mixed = [{n: rng.choice((-1.0, 0.5, 1.0)) for n in rng.sample(names, rng.randint(1, 3))} for _ in range(32)]
    prompts = made_up(200, seed=4)

    def rate(url: str, settings: Sequence[Any], at_once: int, requests: int) -> Any:
        load = Load(
            url=url,
            prompts=prompts,
            requests=requests,
            concurrency=at_once,
            settings=settings,
            max_new_tokens=16,
            warmup=0,
        )
        return asyncio.run(measure(load))

    with served(*words) as server, transformers_serve(folder) as other:
        ways: dict[str, Callable[[], Any]] = {
            "one setting for all": lambda: rate(server.url, [{"all": 0.5}], AT_ONCE, 192),
            "mixed settings": lambda: rate(server.url, mixed, AT_ONCE, 192),
            "no knobs": lambda: rate(server.url, (), AT_ONCE, 192),
            "no knobs, one at a time": lambda: rate(server.url, (), 1, 32),
        }
        if other is not None:
            ways["`transformers serve`, which has no knobs"] = lambda: rate(other.url, (), AT_ONCE, 192)
            ways["`transformers serve`, one at a time"] = lambda: rate(other.url, (), 1, 32)
        measured = _interleaved(ways, rounds)
    base = [figures.tokens_per_second for figures in measured["one setting for all"]]
    rows = [_row(way, found, base) for way, found in measured.items()]
    head = (
        "| 200 questions, 16 tokens | tokens per second | ratio to one setting, median of rounds | quartiles | "
        "first token, median, ms | between tokens, median and 99 %, ms |"
    )
    return "\n".join(
        [f"### Speed, {rounds} interleaved rounds, {AT_ONCE} at a time\n", head, "|---|---|---|---|---|---|", *rows]
    )


def _interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            figures = run()
            if number:  # the first round warms up
                found[way].append(figures)
        say(f"round {number} of {rounds}")
    return found


def _row(way: str, found: Sequence[Any], base: Sequence[float]) -> str:
    rates = [figures.tokens_per_second for figures in found]
    ratios = [rate / one for rate, one in zip(rates, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    del middle
    return f"| {way} | {statistics.median(rates):.0f} | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} |"


def transformers_serve(folder: Path) -> Any:
    """Start `transformers serve` with continuous batching on the same model; None where it does not start."""
    raise NotImplementedError(folder)


# Signals


def stops(words: Sequence[str]) -> str:
    """Stop the server under load, kindly and not, and start it again."""
    prompts = [prompt.content for prompt in made_up(64, seed=5)]
    rows: list[str] = []
    for how in (signal.SIGTERM, signal.SIGKILL):
        with served(*words) as server:
            outcomes = asyncio.run(_under_load(server, [str(prompt) for prompt in prompts], how))
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


async def _under_load(server: Served, prompts: Sequence[str], how: signal.Signals) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    begun = asyncio.Event()
    sent = 0

    async def ask(client: httpx.AsyncClient, prompt: str) -> None:
        nonlocal sent
        body = {"model": "prefworld", "prompt": prompt, "max_tokens": 48, "temperature": 0, "stream": True}
        accepted = False
        try:
            async with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                if response.status_code == 503:
                    outcomes["refused with 503"] += 1
                    return
                accepted = response.status_code == 200
                sent += 1
                if sent >= 32:
                    begun.set()
                text = "".join([line + "\n" async for line in response.aiter_lines()])
            outcomes["accepted and answered whole" if "[DONE]" in text else "accepted and LOST"] += 1
        except httpx.HTTPError:
            outcomes["accepted and LOST" if accepted else "not accepted (no connection)"] += 1

    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:

        async def worker(prompt: str) -> None:
            for _ in range(4):
                await ask(client, prompt)

        tasks = [asyncio.create_task(worker(prompt)) for prompt in prompts]
        await asyncio.wait_for(begun.wait(), 60)
        server.process.send_signal(how)
        await asyncio.gather(*tasks)
    return outcomes


if __name__ == "__main__":
    main()
