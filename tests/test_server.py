"""The whole server as users start it: `trimtab serve prefworld`, in a process of its own, over HTTP."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

import pico
import trimtab
from flood import Case, flood, under_load
from hostile_requests import CASES, send
from served import NEWER, SERVES, Served, served
from trimtab.artifact import Rack, save_panel

WIDTH, NORM = 192, 200.0
RANGES: dict[str, list[float] | None] = {"math": [-1.0, 1.5], "concise": [-2.0, 2.0], "raw": None}
QUESTION = "Ana has 12 pens and buys 13 more. How many pens does Ana have?"


class Running(NamedTuple):
    server: Served
    words: list[str]
    rack: Rack
    model: Any
    tokenizer: Any

    def alone(self, prompt: str, setting: dict[str, float], tokens: int) -> str:
        """What plain transformers answers, with hooks and without a server."""
        made = trimtab.generate(
            self.model, self.tokenizer, [prompt], rack=self.rack, knobs=setting, max_new_tokens=tokens
        )
        return made[0].text

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, **options)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if not SERVES:
        pytest.skip(NEWER)
    folder = tmp_path_factory.mktemp("server")
    wheres: Any = {"math": "prompt", "concise": "completion", "raw": "all"}
    words = ["prefworld"]
    for layer, (name, where) in enumerate(wheres.items(), start=2):
        bounds = RANGES[name]
        knob = pico.knob(layer, name=name, seed=layer, where=where, width=WIDTH, norm=NORM)
        knob = knob.with_(tuning={"safe_range": bounds} if bounds else None)
        knob.save(folder / f"{name}.knob.safetensors")
        words += ["--knob", f"{name}={folder / name}.knob.safetensors"]
    save_panel(folder / "careful.json", {"math": (folder / "math.knob.safetensors", 0.8)})
    words += ["--knob", str(folder / "careful.json")]
    rack = Rack(**{name: folder / f"{name}.knob.safetensors" for name in wheres})
    with served(*words) as server:
        yield Running(server, words, rack, *trimtab.load("prefworld"))
        assert server.stop() == 0
        assert "Traceback" not in server.said


def test_the_official_client_turns_knobs_per_request_and_panels_by_the_models_name(running: Running) -> None:
    client = running.client()
    asked: Any = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
    bare = running.alone(QUESTION, {}, 12)
    for setting in ({}, {"math": 1.0}, {"math": -1.0, "concise": 1.5}):
        answer = client.chat.completions.create(model="prefworld", extra_body={"knobs": setting}, **asked)
        assert answer.choices[0].message.content == running.alone(QUESTION, setting, 12)
        assert answer.model_extra is not None
        assert answer.model_extra["knobs"] == setting
    assert running.alone(QUESTION, {"math": 1.0}, 12) != bare  # so that the knobs are seen to act
    by_panel = client.chat.completions.create(model="prefworld:careful", **asked)
    assert by_panel.choices[0].message.content == running.alone(QUESTION, {"math": 0.8}, 12)
    streamed = client.chat.completions.create(
        model="prefworld", stream=True, extra_body={"knobs": "math=1"}, stream_options={"include_usage": True}, **asked
    )
    chunks = list(streamed)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == running.alone(QUESTION, {"math": 1.0}, 12)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert [model.id for model in client.models.list()] == ["prefworld", "prefworld:careful"]


def test_a_strength_beyond_the_safe_range_and_an_untuned_knob_are_refused(running: Running) -> None:
    for knobs, words in (
        ({"math": 9}, "safe range, -1 to 1.5"),
        ({"raw": 0.1}, "never tuned"),
        ({"mth": 1}, "Did you"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            running.client().completions.create(model="prefworld", prompt="a", extra_body={"knobs": knobs})


def test_mixed_requests_at_once_and_some_cut_off_are_answered_as_each_alone(running: Running) -> None:
    rng = random.Random(0)
    cases: list[Case] = []
    for number in range(24):
        prompt = f"Ana has {number + 2} pens and buys {number + 3} more. How many pens does Ana have?"
        names = rng.sample(["math", "concise"], rng.randint(0, 2))
        setting = {name: rng.choice((-1.0, 0.5, 1.0, 1.5)) for name in names}
        tokens = rng.randint(2, 14)
        cases.append(Case(prompt, setting, tokens, running.alone(prompt, setting, tokens)))
    bare = [running.alone(case.prompt, {}, case.tokens) for case in cases]
    assert sum(case.expected != text for case, text in zip(cases, bare, strict=True)) > 8
    result = asyncio.run(flood(running.server, cases, 200, at_once=32, cut=0.15))
    assert not result.wrong
    assert result.same + result.cut == 200
    assert min(result.same, result.cut) > 10


def test_hostile_requests_get_an_error_that_says_why_and_the_server_lives_on(running: Running) -> None:
    url = running.server.url
    patient = [case for case in CASES if case.pause]
    quick = [case for case in CASES if not case.pause]
    assert len(quick) > 200
    slow = [case._replace(pause=case.pause * 8) for case in patient]  # beyond the half a minute that a body may take
    found: dict[str, tuple[int, str]] = {}
    threads = [
        threading.Thread(target=lambda case=case: found.update({case.name: send(url, case)}), daemon=True)
        for case in slow
    ]
    for thread in threads:
        thread.start()
    for case in quick:
        found[case.name] = send(url, case)
    for thread in threads:
        thread.join(90)
    wrong = [
        f"{case.name}: {found.get(case.name)}, not {sorted(case.statuses)}"
        for case in CASES
        if case.name not in found or found[case.name][0] not in case.statuses
    ]
    assert not wrong
    silent = [name for name, (status, said) in found.items() if 400 <= status < 500 and len(said) < 10]
    assert not silent
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert running.client().completions.create(model="prefworld", prompt="a", max_tokens=2).choices[0].text


def test_what_its_own_description_allows_never_breaks_it(running: Running, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{running.server.url}/openapi.json"]
    checks = ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
    options = [
        *checks,
        "--max-examples",
        "12",
        "--seed",
        "1",
        "--phases",
        "examples,fuzzing",
        "--suppress-health-check=all",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert httpx.get(f"{running.server.url}/health").status_code == 200


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_under_load_loses_no_accepted_request_or_leaves_nothing_broken(
    running: Running, how: signal.Signals
) -> None:
    prompts = [f"The number {number}" for number in range(48)]
    with served(*running.words) as server:
        outcomes = asyncio.run(under_load(server, prompts, how))
        status = server.process.wait(60)
    if how == signal.SIGTERM:
        assert status == 0
        assert outcomes["accepted and answered whole"] > 30
        assert not outcomes["accepted and LOST"]
        assert sum(outcomes.values()) > outcomes["accepted and answered whole"]  # it really ended under load
    else:
        assert status == -signal.SIGKILL
        assert outcomes["accepted and LOST"]
        port = server.url.rpartition(":")[2]
        words = [sys.executable, "-m", "trimtab", "serve", *running.words, "--port", port]
        with served(command=words) as again:
            assert again.url == server.url
            answer = httpx.post(
                f"{again.url}/v1/completions", json={"model": "prefworld", "prompt": "a", "max_tokens": 2}
            )
            assert answer.status_code == 200
            assert again.stop() == 0
