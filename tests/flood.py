"""Many requests at once to a running server, every answer held against what is expected of it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from served import Served


@dataclass(frozen=True)
class Case:
    """A request, and the answer of plain transformers to it."""

    prompt: str
    setting: dict[str, float]
    tokens: int
    expected: str


@dataclass
class Flood:
    """What came of the requests."""

    same: int = 0
    cut: int = 0
    beginnings: int = 0
    """Answers that were cut off, of which some text had come, and was right."""
    wrong: Counter[str] = field(default_factory=Counter[str])
    memory: list[float] = field(default_factory=list[float])
    """Of the server, in MB, every twenty requests."""


async def flood(
    server: Served,
    cases: Sequence[Case],
    count: int,
    *,
    at_once: int,
    cut: float,
    progress: Callable[[int], None] = lambda number: None,
) -> Flood:
    """Send so many of the cases, drawn at random, half of them streamed and a share of them cut off on the way."""
    result, rng = Flood(), random.Random(2)
    numbers = iter(range(count))
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:

        async def worker() -> None:
            for number in numbers:
                case = rng.choice(cases)
                pieces = rng.randrange(6) if rng.random() < cut else None
                await _one(client, server.url, case, pieces, number % 2 == 0, result)
                if number % 20 == 0:
                    result.memory.append(server.memory())
                progress(number)

        await asyncio.gather(*(worker() for _ in range(at_once)))
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
        result.wrong[f"another answer: {text!r} to {case}"] += 1


async def under_load(server: Served, prompts: Sequence[str], how: signal.Signals) -> Counter[str]:
    """Ask all the time, send a signal once 32 answers have begun, and count what became of every request."""
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
