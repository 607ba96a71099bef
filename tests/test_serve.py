"""The server's application over an engine without a model: answers, refusals, early ends, and knobs that change."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
from fake_engine import FakeEngine
from serving import ASKED, CHAT, TEXT, Client, connected, events_of, until
from trimtab.artifact import DeltaKnob, Knob, LowRank
from trimtab.engines.continuous.requests import Request, Token
from trimtab.errors import OptionError, RenderError
from trimtab.serve import app as application
from trimtab.serve.answers import Part, Piece
from trimtab.serve.flight import Room
from trimtab.serve.forms import TextForm, Told
from trimtab.serve.metrics import Metrics, Outermost
from trimtab.serve.replies import (
    ChatChunk,
    ChatCompletion,
    KnobCard,
    KnobList,
    ModelList,
    PanelList,
    TextCompletion,
    Usage,
)

WORDS = "Gr\u00fc\u00dfe \U0001f600, 3 + 4 = 7."
TUNING = {
    "safe_range": [-0.5, 1.5],
    "guardrails": ["facts"],
    "dose_response": [
        {"strength": 1.0, "score": 0.9, "guardrails": {"facts": 1.0}, "broken": 0.0, "kl": 0.2},
        {"strength": -1.0, "score": None, "guardrails": {}, "broken": 0.5, "kl": 3.0},
    ],
}


def tuned(layer: int = 1) -> Knob:
    return pico.knob(layer).with_(tuning=TUNING)


def client(say: Any = WORDS, **options: Any) -> Client:
    """A client of a server with two knobs, `math` tuned and `plain` not, and the panel `careful` of both."""
    server = {name: options.pop(name) for name in ("panels", "room") if name in options}
    engine = FakeEngine(say, knobs={"math": tuned(), "plain": pico.knob(2)}, **options)
    return Client(engine, **{"panels": {"careful": {"math": 0.5, "plain": -1.0}}, **server})


def only(engine: FakeEngine) -> Request:
    (request,) = engine.requests.values()
    return request


# Answers


def test_a_chat_is_answered_in_openais_form() -> None:
    asked = client()
    said = asked.chat(user="somebody")
    ChatCompletion.model_validate(said)
    assert said["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": WORDS}, "logprobs": None, "finish_reason": "stop"}
    ]
    prompt, made = len(only(asked.engine).ids), len(WORDS.encode())
    assert said["usage"] == {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    assert (said["object"], said["model"], said["knobs"]) == ("chat.completion", "pico", {})
    assert said["id"].startswith("chatcmpl-")
    assert abs(said["created"] - time.time()) < 60


def test_a_stream_says_the_same_in_whole_characters_and_ends_with_its_usage() -> None:
    events = client().stream(stream_options={"include_usage": True})
    for event in events:
        ChatChunk.model_validate(event)
    *chunks, last = events
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], len(WORDS.encode()))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
    pieces = [choice["delta"]["content"] for choice in choices[1:-1]]
    assert pieces == list(WORDS)
    assert len({(chunk["id"], chunk["created"]) for chunk in events}) == 1
    assert "usage" not in client().stream()[0]


def test_an_answer_that_is_cut_says_so() -> None:
    assert client().chat(max_tokens=2)["choices"][0]["finish_reason"] == "length"
    asked = client()
    assert asked.chat(max_completion_tokens=3)["choices"][0]["message"]["content"] == "Gr\N{REPLACEMENT CHARACTER}"
    assert asked.stream(max_tokens=2)[-1]["choices"][0]["finish_reason"] == "length"
    assert only(client_after_chat()).max_new_tokens == 512 - len(only(client_after_chat()).ids)


def client_after_chat(**fields: Any) -> FakeEngine:
    asked = client()
    asked.chat(**fields)
    return asked.engine


@pytest.mark.parametrize("stop", ["= 7", ["never", "+ 4 = 7", "= 7"]])
def test_an_answer_ends_before_a_stop_string_and_the_engine_is_told(stop: Any) -> None:
    asked = client()
    asked.engine.hold_at(len(WORDS.encode()) - 1)  # what comes after the stop strings never does
    expected = WORDS[: WORDS.index("= 7" if isinstance(stop, str) else "+ 4")]
    choice = asked.chat(stop=stop)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    events = asked.stream(stop=stop)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
    assert asked.engine.cancelled == ["request-0", "request-1"]
    assert asked.engine.live == 0


def test_steps_that_come_after_a_stop_string_belong_to_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client()
    texts = iter(["ab.cd", "a longer text", "ab.cd", "a longer text"])

    def submit(request: Any, deliver: Any) -> str:  # everything there is, before anybody has looked
        for step in asked.engine.steps_of(request, asked.engine.tokens(next(texts)), ""):
            deliver(step)
        return "request"

    monkeypatch.setattr(asked.engine, "submit", submit)
    said = asked.chat(n=2, stop=".")
    assert [choice["message"]["content"] for choice in said["choices"]] == ["ab", "a longer text"]
    assert said["usage"]["completion_tokens"] == len("ab.") + len("a longer text")
    events = asked.stream(n=2, stop=".")
    assert [e["choices"][0]["index"] for e in events if e["choices"][0]["finish_reason"]] == [0, 1]


def test_several_answers_come_in_order_with_seeds_of_their_own() -> None:
    asked = client(lambda request: f"seed {request.sampling.seed}")
    said = asked.chat(n=3, seed=7)
    assert [c["message"]["content"] for c in said["choices"]] == ["seed 7", "seed 8", "seed 9"]
    assert [c["index"] for c in said["choices"]] == [0, 1, 2]
    assert said["usage"]["prompt_tokens"] == len(next(iter(asked.engine.requests.values())).ids)
    events = asked.stream(n=2, seed=2**63 - 1)
    texts = ["", ""]
    for event in events:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [f"seed {2**63 - 1}", "seed 0"]
    assert sorted(e["choices"][0]["index"] for e in events if e["choices"][0]["finish_reason"]) == [0, 1]


def test_texts_and_token_ids_are_gone_on_with_in_openais_order() -> None:
    asked = client(lambda request: f"{len(request.ids)}/{request.sampling.seed}")
    ids = asked.engine.tokens("abc")
    said = asked.post(TEXT, prompt=["a", "abc"], n=2, seed=1).json()
    TextCompletion.model_validate(said)
    assert [c["text"] for c in said["choices"]] == ["1/1", "1/2", "3/1", "3/2"]
    assert said["usage"]["prompt_tokens"] == 4
    assert [c["text"] for c in asked.post(TEXT, prompt=ids).json()["choices"]] == ["3/None"]
    assert [c["text"] for c in asked.post(TEXT, prompt=[ids, ids[:1]]).json()["choices"]] == ["3/None", "1/None"]
    assert [r.ids for r in asked.engine.requests.values()][-2:] == [ids, ids[:1]]
    events = asked.stream(TEXT, prompt=["a", "abc"], stream_options={"include_usage": True})
    texts = ["", ""]
    for event in events[:-1]:
        TextCompletion.model_validate(event)
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["1/None", "3/None"]


def test_a_text_gets_sixteen_tokens_unless_more_are_asked_for_or_fewer_fit() -> None:
    asked = client("x" * 100)
    assert asked.post(TEXT).json()["usage"]["completion_tokens"] == 16
    assert asked.post(TEXT, max_tokens=20).json()["usage"]["completion_tokens"] == 20
    assert asked.post(TEXT, prompt="y" * 505).json()["usage"]["completion_tokens"] == 7


def test_the_engine_gets_what_is_asked_for() -> None:
    request = only(client_after_chat(temperature=0.5, top_p=0.9, seed=-1, max_tokens=5))
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (0.5, 0.9, 2**63 - 1)
    assert (request.max_new_tokens, request.ends, request.projections) == (5, frozenset([pico.END]), False)
    default = only(client_after_chat()).sampling
    assert (default.temperature, default.top_p, default.seed, default.logprobs) == (1.0, 1.0, None, None)
    assert only(client_after_chat(temperature=1e-300)).sampling.temperature == 0


def test_turns_are_rendered_by_the_chat_template_and_a_developers_line_is_a_system_line() -> None:
    turns = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "d"},
    ]
    asked = client()
    asked.chat(messages=turns)
    shown = asked.engine.renderer.tokenizer.decode(only(asked.engine).ids)
    assert shown.startswith("<s><|system|>\nBe kind.<|end|>\n<|user|>\na\nb<|end|>")
    assert shown.endswith("<|user|>\nd<|end|>\n<|assistant|>\n")


def test_log_probabilities_have_openais_two_forms() -> None:
    asked = client("h\u00e9")
    told = asked.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in told] == [-0.5, -1.5, -2.5]
    assert (told[0]["token"], told[0]["bytes"]) == ("h", [104])
    assert (told[1]["token"], told[1]["bytes"]) == ("\N{REPLACEMENT CHARACTER}", None)
    assert [len(entry["top_logprobs"]) for entry in told] == [2, 2, 2]
    assert told[0]["top_logprobs"][0] == {"token": "h", "logprob": -0.5, "bytes": [104]}
    assert asked.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    events = asked.stream(logprobs=True)
    streamed = [entry for e in events for entry in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["logprob"] for entry in streamed] == [-0.5, -1.5, -2.5]
    old = asked.post(TEXT, logprobs=1).json()["choices"][0]["logprobs"]
    assert old["tokens"][0] == "h"
    assert old["token_logprobs"] == [-0.5, -1.5, -2.5]
    assert old["text_offset"] == [0, 1, 1]
    assert old["top_logprobs"][0] == {"h": -0.5}
    assert asked.post(TEXT, logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"][0] == {"h": -0.5}
    offsets = [e["choices"][0]["logprobs"]["text_offset"] for e in asked.stream(TEXT, logprobs=0)[:-1]]
    assert offsets == [[0], [1, 1]]


def test_of_tokens_with_one_text_the_older_form_tells_the_likeliest() -> None:
    renderer = FakeEngine().renderer
    one, two = (int(i) for i in renderer.tokenizer.encode("\u00e9", add_special_tokens=False))
    token = Token(two, -3.0, [(one, -0.5), (two, -3.0)], {})
    form = TextForm(Told("pico", {}, logprobs=True, projected=None, usage=False), renderer)
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    said = form.whole([Part([Piece(token, "")], 0, "length")], usage).model_dump()
    assert said["choices"][0]["logprobs"]["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.5}]


def test_projections_tell_of_every_token_on_every_knob_turned_or_not() -> None:
    asked = client()
    choice = asked.chat(projections=True, knobs={"math": 1}, stop="7.")["choices"][0]
    told = choice["projections"]
    assert "".join(told["tokens"]) == choice["message"]["content"]
    assert told["knobs"].keys() == {"math", "plain"}
    assert told["knobs"]["math"] == [0.25 * i for i in range(len(told["tokens"]))]
    assert only(asked.engine).projections
    events = asked.stream(projections=True, stop="7.")
    parts = [e["choices"][0] for e in events if e["choices"][0]["delta"].get("content")]
    assert parts
    for part in parts:
        assert "".join(part["projections"]["tokens"]) == part["delta"]["content"]
    assert [v for p in parts for v in p["projections"]["knobs"]["math"]] == told["knobs"]["math"]
    assert "projections" not in asked.chat()["choices"][0]


# Knobs, panels and models


def test_knobs_are_turned_as_an_object_or_as_text_and_the_answer_says_which() -> None:
    for knobs in ({"math": 0.5, "plain": -1}, "math=0.5,plain=-1"):
        asked = client()
        assert asked.chat(knobs=knobs)["knobs"] == {"math": 0.5, "plain": -1.0}
        assert only(asked.engine).knobs == asked.engine.admission.admit("math=0.5,plain=-1")
        assert all(event["knobs"] == {"math": 0.5, "plain": -1.0} for event in asked.stream(knobs=knobs))
    assert only(client_after_chat()).knobs is None


def test_strengths_are_told_as_the_dose_policy_left_them() -> None:
    assert client(dose="clamp").chat(knobs={"math": 9})["knobs"] == {"math": 1.5}
    refusal = client(dose="strict").refused(400, knobs={"math": 9})
    assert refusal["param"] == "knobs"
    assert "safe range, -0.5 to 1.5" in refusal["message"]


@pytest.mark.parametrize("fields", [{"panel": "careful"}, {"model": "pico:careful"}])
def test_a_panel_sets_knobs_and_knobs_override_it_one_by_one(fields: dict[str, Any]) -> None:
    asked = client()
    assert asked.chat(**fields)["knobs"] == {"math": 0.5, "plain": -1.0}
    assert asked.chat(**fields, knobs={"math": 1})["knobs"] == {"math": 1.0, "plain": -1.0}
    assert asked.chat(**fields, knobs="plain=0")["knobs"] == {"math": 0.5}
    assert asked.chat(model="pico:careful", panel="careful")["model"] == "pico:careful"


def test_models_panels_and_knobs_are_listed() -> None:
    asked = client()
    models = asked.ask("GET", "/v1/models").json()
    ModelList.model_validate(models)
    assert [(m["id"], m["panel"], m["max_model_len"]) for m in models["data"]] == [
        ("pico", None, 512),
        ("pico:careful", "careful", 512),
    ]
    assert asked.ask("GET", "/v1/models/pico:careful").json() == models["data"][1]
    panels = asked.ask("GET", "/v1/panels").json()
    PanelList.model_validate(panels)
    assert panels["data"] == [{"id": "careful", "object": "panel", "knobs": {"math": 0.5, "plain": -1.0}}]
    knobs = asked.ask("GET", "/v1/knobs").json()
    KnobList.model_validate(knobs)
    assert knobs["dose"] == "free"
    assert [(k["id"], k["layer"], k["gain"], k["safe_range"], k["projects"]) for k in knobs["data"]] == [
        ("math", 1, 1.0, [-0.5, 1.5], True),
        ("plain", 2, 1.0, None, True),
    ]


def test_a_knob_is_shown_with_its_card_and_dose_response() -> None:
    asked = client()
    card = asked.ask("GET", "/v1/knobs/math").json()
    KnobCard.model_validate(card)
    assert "safe range" in card["card"]
    assert card["dose_response"] == {
        "strengths": [-1.0, 1.0],
        "score": [None, 0.9],
        "guardrails": {"facts": [None, 1.0]},
        "broken": [0.5, 0.0],
        "kl": [3.0, 0.2],
    }
    assert asked.ask("GET", "/v1/knobs/plain").json()["dose_response"] is None


def test_names_may_hold_slashes() -> None:
    engine = FakeEngine(knobs={"a/b": pico.knob()})
    asked = Client(engine)
    assert asked.ask("GET", "/v1/knobs/a/b").json()["id"] == "a/b"
    assert asked.ask("GET", "/v1/knobs/a%2Fb").json()["id"] == "a/b"
    assert asked.ask("DELETE", "/v1/knobs/a/b").status_code == 200


# Refusals

SAID = "This server does not do"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (
            {"temperatur": 1},
            "temperatur",
            "Unknown field 'temperatur'. Known: knobs, logprobs, .*Did you mean 'temperature'?",
        ),
        ({"top_k": 4}, "top_k", "Did you mean 'top_p'?"),
        ({"tools": [{"type": "function"}]}, "tools", f"{SAID} tools; leave the field out, or at \\[\\]"),
        ({"tool_choice": "auto"}, "tool_choice", f"{SAID} tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format", f"{SAID} response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias", f"{SAID} logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty", f"{SAID} presence_penalty; leave the field out, or at 0"),
        ({"frequency_penalty": False}, "frequency_penalty", f"{SAID} frequency_penalty"),
        ({"audio": {}}, "audio", f"{SAID} audio"),
        ({"model": 3}, "model", "model: input should be a valid string; got 3."),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2; got 2.5"),
        ({"temperature": "1"}, "temperature", "valid number; got '1'"),
        ({"temperature": 10**400}, "temperature", "temperature: "),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"n": True}, "n", "valid integer"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": "a" * 201}, "stop", "at most 200"),
        ({"stop": 3}, "stop", "expected a text, or a list of texts; got 3"),
        ({"user": "a" * 513}, "user", "at most 512"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "goes with logprobs: true"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "the two differ"),
        ({"stream_options": {}}, "stream_options", "goes with stream: true"),
        (
            {"stream": True, "stream_options": {"include_usages": True}},
            "stream_options",
            "Did you mean 'include_usage'?",
        ),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": ASKED * 1001}, "messages", "at most 1000"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'assistant'; got 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages\\[0\\].content: field required."),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "expected a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            f"{SAID} parts of type 'image_url'; it takes text",
        ),
        ({"messages": [{**ASKED[0], "tool_calls": [1]}]}, "messages[0].tool_calls", f"{SAID} tool_calls"),
        ({"messages": [{**ASKED[0], "cache": 1}]}, "messages[0]", "Unknown field 'cache'"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "has room for 512"),
        ({"max_tokens": 510}, "messages", "an answer of up to 510 does not fit.*at most \\d+ tokens"),
        ({"knobs": {"maths": 1}}, "knobs", "Unknown knob 'maths'. Known: math, plain. Did you mean 'math'?"),
        ({"knobs": "math"}, "knobs", "name=strength"),
        ({"knobs": {"math": "1"}}, "knobs.math", "valid number"),
        ({"knobs": [1]}, "knobs", 'expected strengths such as {"math": 0.8}'),
        ({"knobs": {"math": 1e300}}, "knobs", "too large"),
        ({"panel": "care"}, "panel", "Unknown panel 'care'. Known: careful"),
        ({"projections": 1}, "projections", "valid boolean"),
    ],
)
def test_what_is_wrong_with_a_chat_is_said_and_where(fields: dict[str, Any], param: str, words: str) -> None:
    asked = client()
    error = asked.refused(400, **fields)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    match(words, error["message"])
    assert not asked.engine.requests


def match(words: str, message: str) -> None:
    """Hold a message against what it must say, a pattern in which question marks and braces are themselves."""
    pattern = words.replace("?", "\\?").replace("{", "\\{")
    assert re.search(pattern, message), message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"echo": True}, "echo", f"{SAID} echo"),
        ({"best_of": 2}, "best_of", f"{SAID} best_of"),
        ({"suffix": "x"}, "suffix", f"{SAID} suffix"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"prompt": []}, "prompt", "expected a text, a list of texts, token ids"),
        ({"prompt": ["a", 3]}, "prompt[1]", "valid string"),
        ({"prompt": [3, -1]}, "prompt[1]", "greater than or equal to 0"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1"),
        ({"prompt": ""}, "prompt", "has no tokens"),
        ({"prompt": "x" * 600}, "prompt", "has room for 512"),
        ({"prompt": ["x"] * 500}, "n", "500 answers are asked for at once; this server takes up to 320"),
        ({"messages": ASKED}, "messages", "Unknown field 'messages'"),
    ],
)
def test_what_is_wrong_with_a_text_completion_is_said_and_where(fields: Any, param: str, words: str) -> None:
    error = client().refused(400, TEXT, **fields)
    assert error["param"] == param
    match(words, error["message"])


def test_fields_that_cannot_be_done_are_taken_where_they_mean_nothing() -> None:
    nothing = {
        "tools": [],
        "response_format": {"type": "text"},
        "logit_bias": {},
        "presence_penalty": 0.0,
        "audio": None,
    }
    every = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "knobs", "panel", "stream_options"))
    assert client().chat(**nothing, **every)["choices"]
    assert client().post(TEXT, best_of=1, echo=False, suffix="").status_code == 200


def test_several_flaws_are_told_together() -> None:
    error = client().refused(400, temperature=3, top_p=2, n=0, stop=3)
    assert error["param"] == "temperature"
    assert error["message"].count("; got ") == 3


def test_an_unknown_model_is_not_found_and_two_panels_are_one_too_many() -> None:
    error = client().refused(404, model="pic")
    assert error["code"] == "model_not_found"
    assert error["message"] == "Unknown model 'pic'. Known: pico, pico:careful. Did you mean 'pico'?"
    assert client().ask("GET", "/v1/models/x").status_code == 404
    asked = client(panels={"careful": {"math": 1}, "bold": {"plain": 1}})
    error = asked.refused(400, model="pico:careful", panel="bold")
    assert "stands for panel 'careful', and the request asks for 'bold'" in error["message"]
    assert error["param"] == "panel"


def test_unknown_paths_and_methods_are_refused_in_openais_form() -> None:
    asked = client()
    response = asked.ask("GET", "/v1/nothing%0A")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")
    assert "There is nothing at /v1/nothing\N{REPLACEMENT CHARACTER}" in response.json()["error"]["message"]
    response = asked.ask("GET", CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["message"] == "/v1/chat/completions takes POST; got GET."
    assert asked.ask("PATCH", "/v1/knobs/math").headers["allow"] == "DELETE, GET, PUT"
    assert asked.ask("POST", "/").headers["allow"] == "GET"
    assert asked.ask("GET", "/v1/models/").status_code == 404
    assert asked.ask("GET", "/docs").status_code == 404


def test_what_the_chat_template_refuses_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(messages: object) -> list[int]:
        raise RenderError("The chat template refuses the turns user, user.")

    asked = client()
    monkeypatch.setattr(asked.engine.renderer, "prompt_ids", refuse)
    error = asked.refused(400)
    assert (error["message"], error["param"]) == ("The chat template refuses the turns user, user.", "messages")


# Room, and the end of it


def test_requests_beyond_the_queue_are_refused_until_there_is_room_again() -> None:
    asked = client(room=Room(requests=1, queue=2))
    asked.engine.gate.clear()

    async def crowd() -> None:
        async with connected(asked, n=2), connected(asked, TEXT) as second:
            await until(lambda: len(asked.engine.requests) == 3)
            assert asked.metric("answers_in_flight") == 3
            assert asked.metric("answers_waiting") == 2
            response = await asked.send("POST", CHAT, json={"model": "pico", "messages": ASKED})
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert "3 answers are being made or wait" in response.json()["error"]["message"]
            second.leave()
            await until(lambda: asked.metric("answers_in_flight") == 2)
            asked.engine.gate.set()
            response = await asked.send("POST", CHAT, json={"model": "pico", "messages": ASKED})
            assert response.status_code == 200

    asyncio.run(crowd())
    assert asked.metric("answers_in_flight") == 0
    assert "takes up to 3" in asked.refused(400, n=4)["message"]


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"queue": -1}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_room_for_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="above 0"):
        Room(**wrong)


def test_a_refused_request_leaves_no_place_taken() -> None:
    asked = client(room=Room(requests=1, queue=0))
    for _ in range(3):
        asked.refused(400, knobs={"x": 1})
        asked.refused(404, model="x")
    assert asked.chat()["choices"]


def test_a_dead_engine_is_told_by_health_and_by_every_request() -> None:
    asked = client()
    asked.engine.alive = False
    assert asked.ask("GET", "/health").status_code == 503
    assert "has stopped" in asked.refused(503)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_frees_the_engine(stream: bool) -> None:
    asked = client()
    asked.engine.gate.clear()

    async def leave() -> None:
        async with connected(asked, stream=stream, n=2) as connection:
            await until(lambda: asked.engine.live == 2)
            connection.leave()
            await until(lambda: asked.engine.live == 0)

    asyncio.run(leave())
    assert sorted(asked.engine.cancelled) == ["request-0", "request-1"]
    assert asked.metric("client_disconnects_total") == 1
    assert asked.metric("answers_total", ending="cancelled") == 2
    assert asked.metric("answers_in_flight") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_the_middle_frees_the_engine(stream: bool) -> None:
    asked = client("word " * 50)
    held = asked.engine.hold_at(20)

    async def leave() -> None:
        async with connected(asked, stream=stream) as connection:
            await until(held.is_set)
            if stream:
                await until(lambda: connection.text.count('"content"') > 15)
            connection.leave()
            await until(lambda: asked.engine.live == 0)

    asyncio.run(leave())
    assert asked.engine.cancelled == ["request-0"]
    assert asked.metric("client_disconnects_total") == 1


def test_a_client_that_leaves_while_its_prompt_is_rendered_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client()
    slow(asked, monkeypatch)

    async def leave() -> None:
        async with connected(asked) as connection:
            await asyncio.sleep(0.05)
            connection.leave()

    asyncio.run(leave())
    assert asked.engine.live == 0
    assert asked.metric("answers_in_flight") == 0
    assert asked.metric("client_disconnects_total") == 1


def slow(asked: Client, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let rendering take its time; what is returned is set once it is done."""
    render, rendered = asked.engine.renderer.prompt_ids, threading.Event()

    def wait(messages: Any) -> list[int]:
        time.sleep(0.4)
        rendered.set()
        return render(messages)

    monkeypatch.setattr(asked.engine.renderer, "prompt_ids", wait)
    return rendered


def test_rendering_a_prompt_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client()
    rendered = slow(asked, monkeypatch)

    async def both() -> None:
        async with connected(asked) as connection:
            await asyncio.sleep(0.02)
            assert (await asked.send("GET", "/health")).status_code == 200
            assert not rendered.is_set()
            await asyncio.wait_for(asyncio.shield(connection.task), 10)
            assert connection.sent[0]["status"] == 200

    asyncio.run(both())


def test_a_request_whose_time_is_up_is_refused_and_worth_another_try_if_it_has_only_waited() -> None:
    asked = client(room=Room(timeout=0.2))
    asked.engine.gate.clear()
    response = asked.post(CHAT)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "x-should-retry" not in response.headers
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("time_limit", "server_error")
    assert "had not begun within 0.2 seconds" in error["message"]
    assert asked.engine.live == 0
    assert asked.metric("answers_total", ending="timeout") == 1


def test_a_request_whose_time_is_up_in_the_middle_is_not_to_be_tried_again() -> None:
    asked = client("word " * 50, room=Room(timeout=0.3))
    asked.engine.hold_at(20)
    response = asked.post(CHAT)
    assert (response.status_code, response.headers["x-should-retry"]) == (503, "false")
    assert "not complete within 0.3 seconds" in response.json()["error"]["message"]
    *events, last = events_of(asked.post(CHAT, stream=True).text)
    assert len(events) > 10
    assert json.loads(last)["error"]["code"] == "time_limit"
    assert asked.engine.live == 0


def test_a_client_that_reads_no_more_does_not_hold_its_place_for_ever() -> None:
    asked = client("word " * 50, room=Room(timeout=0.3))

    async def stall() -> None:
        async with connected(asked, stream=True) as connection:
            await until(lambda: connection.sent)
            connection.reads.clear()
            await until(lambda: asked.metric("answers_in_flight") == 0)

    asyncio.run(stall())
    assert asked.engine.live == 0


# Failures


def test_a_failure_of_the_engine_is_told_in_its_words() -> None:
    asked = client(fails_at=3)
    error = asked.refused(500, n=2)
    assert (error["message"], error["code"]) == ("The model's probabilities are not finite numbers.", "engine_error")
    assert asked.engine.live == 0
    *events, last = events_of(asked.post(CHAT, stream=True).text)
    assert len(events) == 3  # the role, and two characters of three bytes
    assert json.loads(last)["error"]["message"] == "The model's probabilities are not finite numbers."
    assert asked.metric("answers_total", ending="error") == 2


def test_an_answer_that_ends_with_the_engine_is_worth_another_try() -> None:
    asked = client(fails_at=1)
    deliver = asked.engine.submit

    def die(request: Any, take: Any) -> str:
        name = deliver(request, take)
        asked.engine.alive = False
        return name

    asked.engine.submit = die  # pyright: ignore[reportAttributeAccessIssue]
    response = asked.post(CHAT)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("where", ["submit", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_failure_is_logged_and_told_without_a_word_of_it(
    where: str, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = client()

    def fail(*_: object) -> Any:
        raise LookupError("secret in /home/somebody")

    monkeypatch.setattr(asked.engine if where == "submit" else asked.engine.renderer, where, fail)
    with caplog.at_level(logging.ERROR, "trimtab.serve"):
        response = asked.post(CHAT, stream=stream)
    begun = stream and where == "decode"
    assert response.status_code == (200 if begun else 500)
    assert not any(word in response.text for word in ("secret", "LookupError", "Traceback", ".py", "/home"))
    error = json.loads(events_of(response.text)[-1] if begun else response.text)["error"]
    name = error["message"].rpartition("log has it as ")[2].removesuffix(".")
    assert name.startswith("req_")
    assert f"{name} failed" in caplog.text
    assert "secret in /home/somebody" in caplog.text
    assert asked.engine.live == 0
    assert asked.metric("answers_in_flight") == 0


def test_a_number_that_is_none_is_written_as_openai_or_json_has_it() -> None:
    asked = client("ab")
    steps = asked.engine.steps_of

    def odd(request: Any, ids: Any, last: Any) -> Any:
        for step in steps(request, ids, last):
            token = step.token
            if token is not None:
                nan = float("nan")
                top = [(token.id, float("-inf"))]
                step = step._replace(token=token._replace(logprob=nan, top=top, projections={"math": nan}))
            yield step

    asked.engine.steps_of = odd  # pyright: ignore[reportAttributeAccessIssue]
    choice = asked.chat(logprobs=True, top_logprobs=1, projections=True)["choices"][0]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    assert choice["projections"]["knobs"] == {"math": [None, None], "plain": [None, None]}


# Metrics, and the page


def test_requests_tokens_and_times_are_counted() -> None:
    asked = client()
    asked.chat()
    asked.refused(400, n=0)
    asked.ask("GET", "/made/up")
    asked.ask("GET", "/v1/knobs/math")
    prompt, made = len(only(asked.engine).ids), len(WORDS.encode())
    assert asked.metric("requests_total", route=CHAT, status="200") == 1
    assert asked.metric("requests_total", route=CHAT, status="400") == 1
    assert asked.metric("requests_total", route="other", status="404") == 1
    assert asked.metric("requests_total", route="/v1/knobs/{id:path}", status="200") == 1
    assert asked.metric("prompt_tokens_total") == prompt
    assert asked.metric("completion_tokens_total") == made
    assert asked.metric("answers_total", ending="stop") == 1
    assert asked.metric("time_to_first_token_seconds_count") == 1
    assert asked.metric("completion_seconds_count") == 1
    response = asked.ask("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert f"trimtab_completion_tokens_total {made:.1f}" in response.text


def test_a_response_that_breaks_off_is_not_gone_on_with_as_another() -> None:
    sent: list[dict[str, Any]] = []

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise LookupError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    metrics = Metrics()
    asyncio.run(Outermost(broken, metrics)({"type": "http", "state": {"request_id": "req"}}, None, send))  # pyright: ignore[reportArgumentType]
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert metrics.registry.get_sample_value("trimtab_requests_total", {"route": "other", "status": "200"}) == 1


def test_two_servers_count_apart() -> None:
    one, other = client(), client()
    one.chat()
    assert (one.metric("completion_seconds_count"), other.metric("completion_seconds_count")) == (1, 0)


def test_the_page_is_served_by_names_that_are_known_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("index.html", "app.js", "style.css", "notes.py"):
        (folder / name).write_text(name)
    (tmp_path / "secret.js").write_text("secret")
    monkeypatch.setattr(application, "PAGE", folder)
    asked = client()
    for path, kind in {
        "/": "text/html",
        "/playground/app.js": "text/javascript",
        "/playground/style.css": "text/css",
    }.items():
        response = asked.ask("GET", path)
        assert response.text == (path.rpartition("/")[2] or "index.html")
        assert response.headers["content-type"].startswith(kind)
    for path in ("notes.py", "../secret.js", "..%2Fsecret.js", "%2e%2e/secret.js", "app.js%00", "APP.JS", ""):
        assert asked.ask("GET", f"/playground/{path}").status_code == 404


# Knobs that come and go


def stored(knob: Knob, folder: Path) -> bytes:
    knob.save(folder / "k.safetensors")
    return (folder / "k.safetensors").read_bytes()


def test_a_knob_is_put_in_and_taken_out(tmp_path: Path) -> None:
    asked = client()
    response = asked.ask("PUT", "/v1/knobs/new", content=stored(tuned(), tmp_path))
    assert response.status_code == 200, response.text
    assert response.json() == {**asked.ask("GET", "/v1/knobs/new").json(), "replaced": False}
    again = asked.ask("PUT", "/v1/knobs/new", content=stored(tuned(), tmp_path))
    assert again.json() == {**response.json(), "replaced": True}
    assert response.json()["safe_range"] == [-0.5, 1.5]
    assert asked.chat(knobs={"new": 1})["knobs"] == {"new": 1.0}
    assert asked.ask("DELETE", "/v1/knobs/new").json() == {"id": "new", "object": "knob", "deleted": True}
    assert "Unknown knob 'new'" in asked.refused(400, knobs={"new": 1})["message"]
    for method in ("GET", "DELETE"):
        response = asked.ask(method, "/v1/knobs/new")
        assert response.status_code == 404
        assert "Unknown knob 'new'. Known: math, plain" in response.json()["error"]["message"]


def test_a_weight_knob_outlives_the_file_that_it_came_in(tmp_path: Path) -> None:
    asked = client()
    asked.engine.admission.max_rank = 4
    part = LowRank(torch.randn(2, 6), torch.randn(5, 2))
    DeltaKnob("w", "delta", {"m.weight": part}).save(tmp_path / "w.safetensors")
    response = asked.ask("PUT", "/v1/knobs/w", content=(tmp_path / "w.safetensors").read_bytes())
    assert response.status_code == 200, response.text
    assert response.json()["layer"] is None
    assert response.json()["projects"] is False
    kept = asked.engine.admission.knobs["w"]
    assert isinstance(kept, DeltaKnob)
    torch.testing.assert_close(kept.dense("m.weight"), part.dense())


def test_a_body_that_is_no_knob_is_refused_without_a_word_of_where_it_lay(tmp_path: Path) -> None:
    asked = client()
    whole = stored(tuned(), tmp_path)
    wide = stored(pico.knob(width=8), tmp_path)
    for data, words in (
        (b"", "The body is no knob file: it is not a whole safetensors file (it is empty)"),
        (b"\x80\x04pickle" + b"x" * 100, "a pickle, which is never opened"),
        (whole[:-1], "it is cut short"),
        (whole[:-5] + b"aaaaa", "not as it was saved"),
        (wide, "has width 8; this model has 32"),
    ):
        response = asked.ask("PUT", "/v1/knobs/new", content=data)
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert words in message
        assert "/tmp" not in message
        assert "uploaded" not in message
    response = asked.ask("PUT", "/v1/knobs/a=b", content=whole)
    assert response.status_code == 400
    assert "A knob's name is 1 to 100 printable characters" in response.json()["error"]["message"]
    assert asked.engine.admission.knobs.keys() == {"math", "plain"}


def test_a_panel_without_one_of_its_knobs_is_an_error_of_the_requests_that_ask_for_it() -> None:
    asked = client()
    assert asked.ask("DELETE", "/v1/knobs/plain").status_code == 200
    error = asked.refused(400, model="pico:careful")
    assert error["message"].startswith("Panel 'careful' turns 'plain', which this server has not loaded.")
    assert error["param"] == "panel"
    assert asked.ask("GET", "/v1/panels").status_code == 200
    assert asked.chat()["choices"]
