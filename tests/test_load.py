"""Loads on a server: what is sent, what is counted, and what becomes of refusals, errors and callers that leave."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fake_openai import Fake, serve
from trimtab.cli import main
from trimtab.errors import MissingDependency, OptionError, TrimtabWarning, UnknownName
from trimtab.serve import load as module
from trimtab.serve.figures import Failure, Figures, Outcome, Spread, figures, spread
from trimtab.serve.keys import USER_VARIABLE
from trimtab.serve.load import Load, Prompt, made_up, measure, planned

PROMPTS = [Prompt("one"), Prompt("two"), Prompt("three")]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(USER_VARIABLE, raising=False)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serve(Fake()) as there:
        yield there


def ask(fake: Fake, **options: Any) -> Figures:
    """Measure a load of few requests, without any before them unless they are asked for."""
    return asyncio.run(measure(Load(**{"url": fake.url, "prompts": PROMPTS, "requests": 6, "warmup": 0, **options})))


def until_left(fake: Fake, count: int) -> int:
    """Wait until so many callers have left, or for a long time."""
    end = time.monotonic() + 20
    while (fake.left < count or fake.now) and time.monotonic() < end:
        time.sleep(0.01)
    return fake.left


# What is counted


def test_figures_of_planted_times_are_exact() -> None:
    outcomes = [
        Outcome(begun=0.0, pieces=[1.0, 1.5, 2.5], ended=3.0, tokens=7, finished=True),
        Outcome(begun=1.0, pieces=[1.25, 1.5], ended=1.5, retries=2, finished=True),
        Outcome(begun=1.0, pieces=[100.0, 200.0], ended=200.0, tokens=9, disconnected=True),
        Outcome(begun=1.0, pieces=[100.0], ended=100.0, tokens=9, retries=1, error="timeout", said="slow"),
        Outcome(begun=1.0, error="timeout", said="slower"),
    ]
    assert figures("m", outcomes, 4.0) == Figures(
        model="m",
        requests=5,
        answered=2,
        disconnected=1,
        errors={"timeout": Failure(2, "slow")},
        retries=3,
        seconds=4.0,
        requests_per_second=0.5,
        tokens=9,
        tokens_per_second=2.25,
        tokens_from="both",
        time_to_first_token=Spread(0.25, 1.0, 1.0),
        inter_token_latency=Spread(0.5, 1.0, 1.0),
        end_to_end_latency=Spread(0.5, 3.0, 3.0),
    )


def test_nothing_answered_is_no_latency_and_no_error() -> None:
    made = figures("m", [Outcome(begun=0.0, error="HTTP 500")], 1.0)
    assert (made.answered, made.tokens, made.tokens_from, made.end_to_end_latency) == (0, 0, None, None)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 1000])
def test_percentiles_are_measured_numbers_in_their_order(count: int) -> None:
    found = spread(float(number) for number in range(count))
    assert found is not None
    assert found.median <= found.p90 <= found.p99 <= count - 1
    for share, value in ((0.5, found.median), (0.9, found.p90), (0.99, found.p99)):
        assert value == int(value)
        assert (value + 1) / count >= share > value / count  # the least number with such a share not above it


def test_planted_waits_show_in_the_latencies(fake: Fake) -> None:
    fake.delay, fake.gap = 0.1, 0.05
    made = ask(fake, requests=3, concurrency=1)
    assert made.time_to_first_token is not None
    assert made.inter_token_latency is not None
    assert made.end_to_end_latency is not None
    assert 0.1 <= made.time_to_first_token.median < 10
    assert 0.02 <= made.inter_token_latency.p99 < 10
    assert 0.2 <= made.end_to_end_latency.median < 10
    assert made.seconds >= 0.6
    assert made.requests_per_second == pytest.approx(3 / made.seconds)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_tokens_are_the_servers_count_where_it_has_one(fake: Fake, endpoint: str) -> None:
    made = ask(fake, endpoint=endpoint)
    assert (made.answered, made.tokens, made.tokens_from) == (6, 36, "usage")
    assert fake.bodies[0]["path"] == {"chat": "/v1/chat/completions", "completions": "/v1/completions"}[endpoint]
    fake.usage = False
    made = ask(fake, endpoint=endpoint)
    assert (made.answered, made.tokens, made.tokens_from) == (6, 18, "pieces")


def test_answers_end_where_they_are_told(fake: Fake) -> None:
    assert ask(fake, max_new_tokens=2).tokens == 24


def test_a_stream_may_end_without_done_once_it_has_said_why(fake: Fake) -> None:
    event = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\r\n\r\n'
    fake.stream = event + event.replace(b"null", b'"stop"')
    assert (ask(fake).answered, ask(fake).tokens) == (6, 12)


def test_thoughts_are_text_and_roles_are_none(fake: Fake) -> None:
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "a"}]
    events = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    fake.stream = ("".join(events) + ": a comment\n\ndata: [DONE]\n\n").encode()
    assert ask(fake, requests=1).tokens == 2


# What is sent


def test_requests_before_are_sent_and_not_counted(fake: Fake) -> None:
    made = ask(fake, warmup=5, requests=2)
    assert len(fake.bodies) == 7
    assert made.requests == made.answered == 2


def test_settings_are_dealt_in_turn_and_an_empty_one_leaves_the_field_out(fake: Fake) -> None:
    ask(fake, settings=[{"math": 0.8}, {}, {"math": 1.0, "concise": -1.0}], concurrency=1, warmup=2)
    counted = [body.get("knobs") for body in fake.bodies[2:]]
    assert counted == 2 * [{"math": 0.8}, None, {"math": 1.0, "concise": -1.0}]
    assert [body["messages"][0]["content"] for body in fake.bodies[2:]] == 2 * ["one", "two", "three"]


def test_a_prompt_keeps_the_setting_that_it_brings(fake: Fake) -> None:
    prompts = [Prompt("a", {"math": 2.0}), Prompt([{"role": "system", "content": "b"}], {}), Prompt("c")]
    ask(fake, prompts=prompts, settings=[{"math": 0.5}], concurrency=1, requests=3)
    assert [body.get("knobs") for body in fake.bodies] == [{"math": 2.0}, None, {"math": 0.5}]
    assert fake.bodies[1]["messages"] == [{"role": "system", "content": "b"}]


def test_settings_dealt_at_random_depend_on_the_seed_alone() -> None:
    def dealt(**options: Any) -> list[Any]:
        given = {"prompts": PROMPTS, "requests": 300, "settings": [{"a": 1.0}, {"b": 1.0}, {}], "deal": "random"}
        _, counted = planned(Load(**{"url": "http://localhost", **given, **options}), "m")
        return [json.dumps(json.loads(request.body).get("knobs")) for request in counted]

    first = dealt()
    assert dealt() == dealt(rate=5.0, disconnect=0.5) == first
    assert dealt(seed=1) != first != dealt(deal="turn")
    assert min(Counter(first).values()) > 60


def test_as_many_are_under_way_as_was_said(fake: Fake) -> None:
    fake.delay = 0.5
    ask(fake, requests=8, concurrency=4)
    assert fake.most == 4


def test_connections_are_used_again_after_an_answer(fake: Fake) -> None:
    assert ask(fake, requests=12, concurrency=2).answered == 12
    assert len(fake.ports) <= 2


def test_no_proxy_stands_between(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(fake).answered == 6


def test_a_rate_does_not_wait_for_answers(fake: Fake) -> None:
    fake.delay = 1.0
    made = ask(fake, requests=20, rate=200.0, concurrency=1)
    assert made.answered == 20
    assert fake.most > 4  # a tenth of a second of arrivals in a second of waiting


def test_arrivals_are_poisson_at_the_rate_that_was_asked() -> None:
    load = Load(url="http://localhost", prompts=PROMPTS, requests=4000, rate=50.0, warmup=3, seed=2)
    warmups, counted = planned(load, "m")
    gaps = [later.due - earlier.due for earlier, later in pairwise(counted)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.08)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.2)  # as of no other gaps
    assert {request.due for request in warmups} == {0.0}


def test_latency_at_a_rate_counts_from_when_a_request_was_due(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, sent = list[float](), list[float]()

    async def slow(*_: Any, **options: Any) -> Outcome:
        sent.append(time.monotonic())
        begun.append(options["begun"])
        time.sleep(0.02)  # this client cannot keep up with the rate
        return Outcome(options["begun"])

    monkeypatch.setattr(module, "ask", slow)
    load = Load(url=fake.url, prompts=PROMPTS, requests=10, rate=1000.0, warmup=0)
    asyncio.run(measure(load))
    _, counted = planned(load, "first")
    due = [request.due for request in counted]
    assert [when - begun[0] for when in begun] == pytest.approx([when - due[0] for when in due])
    assert sent[-1] - begun[-1] > 0.1


def test_the_first_model_is_asked_unless_another_is_named(fake: Fake) -> None:
    assert ask(fake).model == fake.bodies[-1]["model"] == "first"
    assert ask(fake, model="second:careful").model == fake.bodies[-1]["model"] == "second:careful"


def test_bodies_are_plain_for_any_server(fake: Fake) -> None:
    ask(fake, requests=1, temperature=0.5)
    assert fake.bodies == [
        {
            "model": "first",
            "max_tokens": 64,
            "temperature": 0.5,
            "messages": [{"role": "user", "content": "one"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "path": "/v1/chat/completions",
        }
    ]
    assert "authorization" not in fake.headers[0]


def test_the_key_comes_from_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_VARIABLE, "secret")
    ask(fake, requests=1)
    assert fake.headers[0]["authorization"] == "Bearer secret"
    monkeypatch.setenv(USER_VARIABLE, "a\nb")
    with pytest.raises(OptionError, match=USER_VARIABLE):
        ask(fake)


def test_a_key_that_goes_out_by_plain_http_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_VARIABLE, "secret")

    async def gone(*_: Any) -> str:
        raise OptionError("gone")

    monkeypatch.setattr(module, "_model", gone)
    load = Load(url="http://example.invalid", prompts=PROMPTS)
    with (
        pytest.raises(OptionError, match="gone"),
        pytest.warns(TrimtabWarning, match=r"example\.invalid by plain HTTP"),
    ):
        asyncio.run(measure(load))


@pytest.mark.parametrize("words", [None, 7])
def test_made_up_prompts_are_varied_and_the_same_for_a_seed(words: int | None) -> None:
    prompts = made_up(64, words=words)
    assert prompts == made_up(64, words=words) != made_up(64, seed=1, words=words)
    assert len({prompt.content for prompt in prompts}) > 56
    if words is not None:
        assert {len(str(prompt.content).split()) for prompt in prompts} == {words}


# Refusals, errors, and callers that leave


def test_a_full_server_is_asked_again_when_it_says(fake: Fake) -> None:
    fake.refusals = [(429, {"Retry-After": "0.3"}, "{}"), (429, {"Retry-After": "0"}, "{}")]
    made = ask(fake, requests=1)
    assert (made.answered, made.retries, made.errors) == (1, 2, {})
    first, second, third = fake.arrivals
    assert second - first >= 0.3
    assert third - second < 10
    assert made.end_to_end_latency is not None
    assert made.end_to_end_latency.median >= 0.3  # what whoever asked has waited


@pytest.mark.parametrize("text", ["", "Wed, 21 Oct 2026 07:28:00 GMT", "-5", "nan"])
def test_a_full_server_that_does_not_say_when_is_asked_a_little_later(
    fake: Fake, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serve.asking.WAIT", 0.1)
    fake.refusals = [(429, {"Retry-After": text} if text else {}, "{}")]
    assert ask(fake, requests=1).retries == 1
    assert fake.arrivals[1] - fake.arrivals[0] >= 0.1


def test_a_server_that_stays_full_is_an_error(fake: Fake) -> None:
    fake.refusals = [(429, {"Retry-After": "60"}, "{}")]
    made = ask(fake, requests=2, concurrency=1, timeout=10.0)
    assert made.errors == {"HTTP 429": Failure(1, "full, and asks for 60 s more of the 10 s")}
    assert (made.answered, made.retries) == (1, 0)


def test_errors_are_counted_by_kind_with_what_the_first_was_told(fake: Fake) -> None:
    fake.refusals = [
        (500, {}, "oops \x1b[31m"),
        (400, {}, '{"error": {"message": "Unknown knob.\\nKnown: math."}}'),
        (422, {}, '{"detail": "no such field"}'),
        (400, {}, '{"error": {"message": "another"}}'),
    ]
    made = ask(fake, requests=6, concurrency=1)
    assert made.answered == 2
    assert made.errors == {
        "HTTP 400": Failure(2, "Unknown knob. Known: math."),
        "HTTP 500": Failure(1, "oops \N{REPLACEMENT CHARACTER}[31m"),
        "HTTP 422": Failure(1, "no such field"),
    }


@pytest.mark.parametrize(
    ("stream", "kind", "told"),
    [
        (b'data: {"error": {"message": "engine is dead"}}\n\n', "error in the stream", "engine is dead"),
        (b'data: {"error": "dead"}\n\ndata: [DONE]\n\n', "error in the stream", "dead"),
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "cut short", "after 1 pieces"),
        (b"data: {nonsense}\n\n", "broken stream", "nonsense"),
        (b"data: [1]\n\n", "broken stream", "[1]"),
        (b'data: {"choices": 3}\n\n', "broken stream", "3"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "broken stream", "["),
    ],
)
def test_streams_that_break_are_errors_of_their_own(fake: Fake, stream: bytes, kind: str, told: str) -> None:
    fake.stream = stream
    made = ask(fake, requests=2)
    assert {name: failure.count for name, failure in made.errors.items()} == {kind: 2}
    assert told in made.errors[kind].first
    assert len(made.errors[kind].first) <= 320


def test_what_a_server_says_does_not_repeat_the_key(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_VARIABLE, "secret")
    fake.refusals = [(401, {}, '{"error": {"message": "Incorrect key: secret"}}')]
    fake.stream = b'data: {"error": {"message": "no secret"}}\n\n'
    made = ask(fake, requests=2, concurrency=1)
    assert [failure.first for failure in made.errors.values()] == ["Incorrect key: ***", "no ***"]


def test_an_answer_that_is_no_stream_is_an_error(fake: Fake) -> None:
    fake.kind, fake.stream = "application/json", b'{"choices": []}'
    assert set(ask(fake, requests=1).errors) == {"no stream"}


def test_a_connection_that_breaks_is_an_error(fake: Fake) -> None:
    fake.refusals = [(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "nonsense"}, "zz")]
    made = ask(fake, requests=2, concurrency=1)
    assert (made.answered, sum(failure.count for failure in made.errors.values())) == (1, 1)


def test_a_request_that_takes_too_long_is_given_up_and_closed(fake: Fake) -> None:
    fake.delay = 30.0
    made = ask(fake, requests=2, timeout=1.0)
    assert {kind: failure.count for kind, failure in made.errors.items()} == {"timeout": 2}
    assert until_left(fake, 2) == 2


def test_those_who_leave_close_their_connection_and_are_in_no_figure(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serve.asking.PATIENCE", 20.0)  # the head of the answer is there at once
    fake.pieces, fake.gap = 40, 0.05
    made = ask(fake, requests=16, concurrency=16, disconnect=1.0)
    assert (made.disconnected, made.answered, made.errors, made.tokens) == (16, 0, {}, 0)
    assert until_left(fake, 16) == 16


def test_who_leaves_before_the_first_piece_waits_for_no_head(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAY", 1)
    monkeypatch.setattr("trimtab.serve.asking.PATIENCE", 1.0)  # long enough for the request to be read
    fake.held = 60.0
    made = ask(fake, disconnect=1.0)
    assert (made.disconnected, made.errors) == (6, {})
    assert made.seconds < 30
    assert until_left(fake, 6) == 6


def test_a_share_leaves_and_the_others_are_answered(fake: Fake) -> None:
    fake.pieces, fake.gap = 12, 0.01
    made = ask(fake, requests=60, concurrency=20, disconnect=0.3)
    _, counted = planned(Load(url=fake.url, prompts=PROMPTS, requests=60, disconnect=0.3), "first")
    assert 8 <= made.disconnected == sum(request.cut is not None for request in counted) <= 28
    assert made.disconnected + made.answered == 60
    assert made.tokens == 24 * made.answered


# What cannot be measured


def test_an_address_where_nothing_answers_is_a_plain_error() -> None:
    with serve(Fake()) as gone:
        pass
    with pytest.raises(OptionError, match=r"Nothing answers at http://127\.0\.0\.1:\d+ .* Pass the URL"):
        ask(gone)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ((404, {}, '{"detail": "Not Found"}'), r"answers 404 \(Not Found\)"),
        ((401, {}, "{}"), f"wants a key, and there is none in the environment variable {USER_VARIABLE}"),
        ((503, {}, '{"error": {"message": "draining"}}'), r"answers 503 \(draining\)"),
        ((200, {}, "<html>hello</html>"), "no list of models: <html>hello"),
        ((200, {}, '{"data": 3}'), "no list of models"),
        ((200, {}, '{"data": []}'), "lists no model"),
        ((307, {"Location": "http://127.0.0.1:1/"}, ""), "answers 307"),
    ],
)
def test_something_else_at_the_address_is_a_plain_error(fake: Fake, models: Any, said: str) -> None:
    fake.models = models
    with pytest.raises(OptionError, match=said):
        ask(fake)
    assert not fake.bodies


def test_a_refused_key_is_a_plain_error_without_the_key(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_VARIABLE, "secret")
    fake.models = (403, {}, '{"error": {"message": "secret is no key"}}')
    with pytest.raises(OptionError, match="refuses the key in") as error:
        ask(fake)
    assert "secret" not in str(error.value)
    fake.models = (500, *fake.models[1:])
    with pytest.raises(OptionError, match=r"answers 500 \(\*\*\* is no key\)"):
        ask(fake)


def test_a_server_without_a_list_of_its_own_is_asked_for_the_model_that_is_named(fake: Fake) -> None:
    fake.models = (200, {}, '{"data": []}')
    assert ask(fake, model="mine").answered == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "127.0.0.1:8000"}, "is like http"),
        ({"url": "http://"}, "is like http"),
        ({"url": "http://h:99999"}, "is like http"),
        ({"url": "http://me:secret@h"}, "holds no user"),
        ({"requests": 0}, "requests is 1 or more; got 0"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"warmup": -1}, "warmup is 0 or more"),
        ({"rate": 0.0}, "rate is above 0"),
        ({"timeout": float("nan")}, "timeout is above 0"),
        ({"disconnect": 1.5}, "disconnect is a share"),
        ({"temperature": -1.0}, "temperature"),
        ({"endpoint": "chats"}, "Did you mean 'chat'"),
        ({"deal": "turns"}, "Did you mean 'turn'"),
        ({"prompts": []}, "no prompt"),
        (
            {"prompts": [Prompt([{"role": "user", "content": "a"}])], "endpoint": "completions"},
            "Prompts of completions",
        ),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_say_what_would_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises((OptionError, UnknownName), match=said):
        Load(**{"url": "http://127.0.0.1:8000", "prompts": PROMPTS, **options})


def test_the_version_may_stand_in_the_url(fake: Fake) -> None:
    fake.url += "/v1/"
    assert ask(fake).answered == 6


def test_without_httpx_the_install_command_is_said(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install .*\[serve\]"):
        ask(fake)


# The command line


def test_the_verb_prints_a_table(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "serve", fake.url, "--requests", "7", "--warmup", "0", "--set", "math=1", "--set", ""]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "first: 7 requests, 8 at a time, 2 settings of knobs" in said
    assert "answered    7\n" in said
    assert "(42 tokens, as the server counts them)" in said
    assert "time to first token" in said
    assert "left" not in said
    assert [body.get("knobs") for body in fake.bodies].count({"math": 1.0}) == 4


def test_the_verb_prints_json_with_what_was_asked(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.pieces = 40
    words = "--requests 8 --rate 100 --words 5 --seed 3 --warmup 2 --disconnect 0.5 --deal random --model second --json"
    assert main(["bench", "serve", fake.url, *words.split(), "--timeout", "60", "--temperature", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == "second"
    assert record["answered"] + record["disconnected"] == 8
    assert record["load"] == {
        "url": fake.url,
        "requests": 8,
        "rate": 100.0,
        "deal": "random",
        "endpoint": "chat",
        "model": "second",
        "max_new_tokens": 64,
        "temperature": 1.0,
        "disconnect": 0.5,
        "warmup": 2,
        "timeout": 60.0,
        "seed": 3,
        "settings": [],
        "prompts": 256,
    }
    assert set(record) == {"load", *asdict(figures("m", [Outcome(0.0)], 1.0))}


def test_the_verb_reads_prompts_as_generate_does(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'plain text\n\n{"prompt": "with knobs", "knobs": "math=2"}\n'
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    for source in (str(tmp_path / "prompts.txt"), "-"):
        fake.bodies.clear()
        words = ["--requests", "2", "--warmup", "0", "--concurrency", "1", "--input", source]
        assert main(["bench", "serve", fake.url, *words]) == 0
        asked = [(body["messages"][0]["content"], body.get("knobs")) for body in fake.bodies]
        assert asked == [("plain text", None), ("with knobs", {"math": 2.0})]


def test_the_verb_fails_where_requests_did_and_says_how(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refusals = [(400, {}, '{"error": {"message": "No knob is called maths."}}'), (429, {"Retry-After": "0"}, "")]
    words = "--requests 3 --warmup 0 --concurrency 1 --endpoint completions --max-new-tokens 1"
    assert main(["bench", "serve", fake.url, *words.split()]) == 1
    said = capsys.readouterr().out
    assert "HTTP 400  1         No knob is called maths." in said
    assert "retries     1 after 429" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trains http://h", "serve"),
        ("serve http://h --concurrency 2 --rate 3", "not allowed with"),
        ("serve http://h --words 0", "--words is 1 or more"),
        ("serve http://h --max-new-tokens 0", "--max-new-tokens is 1 or more"),
        ("serve http://h --set math", "name=strength"),
        ("serve http://h --input no/such/file", "no file"),
        ("serve localhost", "is like http"),
    ],
)
def test_the_verb_refuses_what_cannot_be(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_warm_up_that_is_refused_as_a_whole_ends_it(fake: Fake) -> None:
    unknown = (400, {}, '{"error": {"message": "Unknown knob \'wat\'. Known: math"}}')
    fake.refusals = [unknown] * 3
    with pytest.raises(OptionError, match=r"answers none of the 3 requests of the warm-up .*Unknown knob 'wat'"):
        ask(fake, warmup=3, requests=50)
    assert len(fake.bodies) == 3
    fake.refusals = [unknown] * 2  # one that is answered is enough
    assert ask(fake, warmup=3, requests=5).answered == 5
