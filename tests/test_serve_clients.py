"""The server over a socket: OpenAI's own client, clients that hang up, and its description held against it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

import pico
from fake_engine import FakeEngine
from serving import CHAT, Client, filled, listening, wait_for
from trimtab.serve.flight import Room
from trimtab.serve.guard import Guard, GuardSettings
from trimtab.serve.keys import Keys

WORDS = "Gr\u00fc\u00dfe \U0001f600, 7."
USER, ADMIN = "u" * 16, "a" * 16


@pytest.fixture(scope="module")
def asked() -> Client:
    engine = FakeEngine(WORDS, knobs={"math": pico.knob(), "plain": pico.knob(2)})
    return Client(engine, panels={"careful": {"math": 0.5}})


@pytest.fixture(scope="module")
def address(asked: Client) -> Iterator[str]:
    with listening(asked.asgi) as address:
        yield address


@pytest.fixture
def them(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_openais_client_gets_answers_whole_and_in_a_stream(them: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    said = them.chat.completions.create(
        model="pico:careful", messages=messages, logprobs=True, top_logprobs=1, extra_body={"knobs": {"plain": -1}}
    )
    assert said.choices[0].message.content == WORDS
    assert said.choices[0].finish_reason == "stop"
    assert said.model_extra == {"knobs": {"math": 0.5, "plain": -1.0}}
    assert said.usage is not None
    assert said.usage.completion_tokens == len(WORDS.encode())
    assert said.choices[0].logprobs is not None
    assert said.choices[0].logprobs.content is not None
    assert said.choices[0].logprobs.content[0].top_logprobs[0].token == "G"
    stream = them.chat.completions.create(
        model="pico", messages=messages, stream=True, stream_options={"include_usage": True}, stop=["7"]
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == WORDS[:-2]
    assert chunks[-1].usage is not None
    texts = them.completions.create(model="pico", prompt=["a", "b"], logprobs=1, max_tokens=100)
    assert [choice.text for choice in texts.choices] == [WORDS, WORDS]
    pieces = them.completions.create(model="pico", prompt="a", stream=True, max_tokens=100)
    assert "".join(piece.choices[0].text for piece in pieces) == WORDS


def test_openais_client_lists_models_and_reads_errors(them: openai.OpenAI) -> None:
    assert [model.id for model in them.models.list()] == ["pico", "pico:careful"]
    assert them.models.retrieve("pico:careful").owned_by == "trimtab"
    with pytest.raises(openai.NotFoundError, match="Unknown model 'x'") as missing:
        them.chat.completions.create(model="x", messages=[{"role": "user", "content": "Hi"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="does not do tools"):
        them.chat.completions.create(
            model="pico",
            messages=[{"role": "user", "content": "Hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_openais_client_learns_of_a_failure_in_the_middle_of_a_stream() -> None:
    broken = Client(FakeEngine(WORDS, fails_at=3))
    with (
        listening(broken.asgi) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as them,
    ):
        stream = them.chat.completions.create(model="pico", messages=[{"role": "user", "content": "Hi"}], stream=True)
        with pytest.raises(openai.APIError, match="not finite numbers"):
            list(stream)


def test_openais_client_tries_again_where_there_was_no_room_and_not_where_it_would_take_as_long() -> None:
    for gate, tries in ((False, 2), (True, 1)):
        engine = FakeEngine("word " * 50)
        slow = Client(engine, room=Room(timeout=0.3))
        engine.hold_at(10)
        if not gate:
            engine.gate.clear()
        with (
            listening(slow.asgi) as address,
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=1) as them,
            pytest.raises(openai.InternalServerError, match=r"within 0\.3 seconds"),
        ):
            them.chat.completions.create(model="pico", messages=[{"role": "user", "content": "Hi"}])
        assert len(engine.requests) == tries


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_engine(stream: bool) -> None:
    engine = FakeEngine("word " * 50)
    held = engine.hold_at(10)
    left = Client(engine)
    body = json.dumps(filled(CHAT, {"stream": stream})).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with listening(left.asgi) as address:
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head.encode() + body)
            assert held.wait(10)
            if stream:
                assert b"200 OK" in connection.recv(4096)
        wait_for(lambda: not engine.live)
    assert engine.cancelled == ["request-0"]
    assert left.metric("client_disconnects_total") == 1


def test_behind_the_guard_knobs_change_by_the_admin_key_alone_and_the_page_needs_none(tmp_path: Path) -> None:
    served = Client(FakeEngine(WORDS, knobs={"math": pico.knob()}))
    pico.knob(2).save(tmp_path / "k.safetensors")
    data = (tmp_path / "k.safetensors").read_bytes()
    guard = Guard(served.app, GuardSettings(keys=Keys.of((USER,), (ADMIN,))))
    with listening(guard) as address, httpx.Client(base_url=address) as there:

        def ask(method: str, path: str, key: str = "", **options: Any) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return there.request(method, path, headers={**headers, **options.pop("headers", {})}, **options)

        def put(key: str) -> int:
            kind = {"content-type": "application/octet-stream"}
            return ask("PUT", "/v1/knobs/new", key, content=data, headers=kind).status_code

        assert [put(""), put(USER), put(ADMIN)] == [401, 403, 200]
        assert ask("POST", CHAT, USER, json=filled(CHAT, {"knobs": {"new": 1}})).json()["knobs"] == {"new": 1.0}
        assert ask("DELETE", "/v1/knobs/new", ADMIN).status_code == 200
        page = ask("GET", "/")
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'self';")
        names = set(re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text))
        assert len(names) >= 3
        assert {ask("GET", f"/{name}").status_code for name in names} == {200}


def test_the_description_names_no_status_that_is_never_sent(asked: Client) -> None:
    paths = asked.ask("GET", "/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    statuses = {status for path in paths.values() for method in path.values() for status in method["responses"]}
    assert statuses == {"200", "400", "403", "404", "429", "500", "503", "4XX"}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fits", "misfits"])
def test_the_server_does_what_its_description_says(asked: Client, mode: GenerationMode) -> None:
    bearer = {"authorization": f"Bearer {ADMIN}"}
    guard = Guard(asked.app, GuardSettings(allow_hosts=("testserver",), keys=Keys.of((), (ADMIN,))))
    schema = schemathesis.openapi.from_asgi("/openapi.json", guard)
    load_all_checks()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 11
    for operation in operations:

        @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
        @given(case=operation.as_strategy(generation_mode=mode))
        def hold(case: Any) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):  # names cannot be guessed
                case.body |= {"model": "pico", "knobs": {"math": 0.5}, "panel": None}
            # That an answer fits behind its prompt, and that bytes are a knob, no description can say.
            case.call_and_validate(excluded_checks=[positive_data_acceptance], headers=bearer)

        try:
            hold()
        except Unsatisfiable:  # nothing about the request is described that could be got wrong
            assert mode is GenerationMode.NEGATIVE
