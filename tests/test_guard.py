"""The guard: keys, hosts, origins, bodies, limits and headers, without a network."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import OptionError, TrimtabWarning
from trimtab.serve import guard as guard_module
from trimtab.serve.guard import Guard, GuardSettings
from trimtab.serve.hosts import Hosts, is_loopback
from trimtab.serve.keys import Keys, load_keys
from trimtab.serve.limits import Limits, client_of
from trimtab.serve.refusal import Refusal

pytestmark = pytest.mark.quick

ANA, BEN, ADMIN = "ana-0123456789abcdef", "ben-0123456789abcdef", "admin-0123456789abcdef"
KEYS = Keys.of((ANA, BEN), (ADMIN,))
JSON = ("content-type", "application/json")
HEADERS = {
    "content-security-policy",
    "x-content-type-options",
    "referrer-policy",
    "cross-origin-resource-policy",
    "x-request-id",
    "cache-control",
}


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


class Behind:
    """An application that notes what reaches it, and answers with what its request brought."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.error: Exception | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.bodies.append((await receive())["body"])
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"{}"})


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    read: int
    """Bytes of the request's body that were taken before the answer began."""

    def __getitem__(self, name: str) -> str:
        found = [value for key, value in self.headers if key == name]
        assert len(found) == 1, (name, self.headers)
        return found[0]

    @property
    def message(self) -> str:
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["message"]


async def exchange(
    guard: Guard,
    method: str = "GET",
    path: str = "/v1/models",
    headers: Sequence[tuple[str, str]] = (),
    body: bytes | Sequence[bytes] = b"",
    *,
    query: str = "",
    client: str = "127.0.0.1",
    host: str | None = "localhost:8000",
    version: str = "1.1",
    pause: float = 0.0,
) -> Answer:
    """Ask the guard as uvicorn would; `body` in one piece is announced, in several it is not."""
    headers = [*([] if host is None else [("host", host)]), *headers]
    if isinstance(body, bytes):
        if body and not any(name == "content-length" for name, _ in headers):
            headers.append(("content-length", str(len(body))))
        body = [body]
    elif not any(name == "transfer-encoding" for name, _ in headers):
        headers.append(("transfer-encoding", "chunked"))
    pending, sent = list(body), list[Any]()
    read = at_start = 0

    async def receive() -> Any:
        nonlocal read
        await asyncio.sleep(pause)
        if not pending:
            return {"type": "http.disconnect"}
        part = pending.pop(0)
        read += len(part)
        return {"type": "http.request", "body": part, "more_body": bool(pending)}

    async def send(message: Any) -> None:
        nonlocal at_start
        if message["type"] == "http.response.start":
            at_start = read
        sent.append(message)

    await guard(
        {
            "type": "http",
            "http_version": version,
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
            "client": (client, 50000),
            "server": ("127.0.0.1", 8000),
        },
        receive,
        send,
    )
    if not sent:
        return Answer(0, [], b"", read)
    assert [message["type"] for message in sent[:1]] == ["http.response.start"]
    assert not sent[-1].get("more_body", False)
    found = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
    return Answer(sent[0]["status"], found, b"".join(part["body"] for part in sent[1:] if "body" in part), at_start)


def ask(guard: Guard, *args: Any, **options: Any) -> Answer:
    return asyncio.run(exchange(guard, *args, **options))


def guarded(behind: Behind | None = None, **options: Any) -> Guard:
    return Guard(behind or Behind(), GuardSettings(**options))


def post(guard: Guard, body: bytes | Sequence[bytes] = b"{}", *headers: tuple[str, str], **options: Any) -> Answer:
    given = headers if any(name == "content-type" for name, _ in headers) else (JSON, *headers)
    return ask(guard, "POST", "/v1/chat/completions", given, body, **options)


# Keys


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_keys_come_from_files_and_from_the_environment(tmp_path: Path) -> None:
    path = key_file(tmp_path, f"# who\n\n{ANA}  # Ana's\r\n\t{BEN}\n")
    keys = load_keys(path, environment={"TRIMTAB_API_KEY": "from-0123456789abc", "TRIMTAB_ADMIN_KEY": ADMIN})
    found = {key: keys.find(key.encode()) for key in (ANA, BEN, "from-0123456789abc", ADMIN, "# who", ANA[:-1], "")}
    assert [caller is not None for caller in found.values()] == [True, True, True, True, False, False, False]
    assert [caller.admin for caller in found.values() if caller] == [False, False, False, True]
    assert len({caller.name for caller in found.values() if caller}) == 4
    assert load_keys(None, path, environment={}).find(ANA.encode()) is not None
    assert load_keys(environment={}) == Keys.of() or not load_keys(environment={}).users


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hushh", "line 1 of .* has 5 characters; at least 16"),
        (f"{ANA}\nhush-hush-h\n", "line 2 of .* has 11 characters"),
        ("# nobody\n\n", "holds no keys"),
        ("", "holds no keys"),
        ("hush with blanks in it", "line 1 of .* no header can carry"),
        ("hush-é-0123456789abc", "line 1 of .* no header can carry"),
        ("hush\x000123456789abc", "line 1 of .* no header can carry"),
    ],
)
def test_a_key_that_can_be_none_is_refused_by_its_place_and_never_shown(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(OptionError, match=why) as error:
        load_keys(key_file(tmp_path, text), environment={})
    assert "hush" not in str(error.value)


def test_files_that_hold_no_text_are_no_keys(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        load_keys(tmp_path / "nothing", environment={})
    with pytest.raises(OptionError, match="folder"):
        load_keys(tmp_path, environment={})
    (tmp_path / "keys").write_bytes(b"\xff\xfe" * 40)
    with pytest.raises(OptionError, match="not text"):
        load_keys(tmp_path / "keys", environment={})


@pytest.mark.parametrize("value", ["", "   ", "short"])
@pytest.mark.parametrize("variable", ["TRIMTAB_API_KEY", "TRIMTAB_ADMIN_KEY"])
def test_a_variable_that_is_set_to_no_key_does_not_open_the_server(variable: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"{variable} has .* characters; at least 16"):
        load_keys(environment={variable: value})


def test_a_key_that_is_for_both_is_refused() -> None:
    with pytest.raises(OptionError, match="take two"):
        Keys.of((ANA, ADMIN), (ADMIN,))


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_file_of_keys_that_others_can_get_at_is_warned_of(tmp_path: Path, mode: int) -> None:
    with pytest.warns(TrimtabWarning, match="chmod 600"):
        load_keys(key_file(tmp_path, ANA, mode), environment={})


@pytest.mark.parametrize("key", [ANA, BEN, ADMIN, "none-0123456789abcdef", ""])
def test_every_key_is_compared_in_constant_time_whichever_it_is(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    compared = list[tuple[bytes, bytes]]()

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", spy)
    answer = ask(guarded(keys=KEYS), headers=[bearer(key)])
    assert answer.status == (200 if key in (ANA, BEN, ADMIN) else 401)
    assert [known for _, known in compared] == [*KEYS.users, *KEYS.admins]
    assert len({one for one, _ in compared}) == 1
    assert {len(digest) for pair in compared for digest in pair} == {32}


def test_keys_show_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="trimtab.serve")
    guard = guarded(keys=KEYS)
    unknown = "unknown-0123456789abcdef"
    answers = [ask(guard, headers=[bearer(key)]) for key in (ANA, ADMIN, unknown)]
    assert len(caplog.records) == 3  # something was logged that could have had a key in it
    shown = caplog.text + repr(guard.settings) + repr(answers)
    assert not any(key in shown for key in (ANA, BEN, ADMIN, unknown))


def test_keys_are_told_apart_by_names_that_say_nothing_of_them() -> None:
    behind = Behind()
    guard = guarded(behind, keys=KEYS)
    for key in (ANA, ANA, BEN, ADMIN):
        ask(guard, headers=[bearer(key)])
    ana, again, ben, admin = [scope["state"] for scope in behind.scopes]
    assert ana["key"] == again["key"]
    assert len({ana["key"], ben["key"], admin["key"]}) == 3
    other = Keys.of((ANA,)).find(ANA.encode())
    assert other is not None
    assert other.name != ana["key"]  # new with every start: nobody can test guesses against a log


# Authentication


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "No key was sent"),
        ("", "not known"),
        ("Bearer", "not known"),
        ("Bearer ", "not known"),
        (ANA, "not known"),
        (f"Basic {ANA}", "not known"),
        (f"Bearer {ANA}x", "not known"),
        (f"Bearer {ANA[:-1]}", "not known"),
        (f"Bearer {ANA}, Bearer {BEN}", "not known"),
        (f"Bearer {ANA.upper()}", "not known"),
        ("Bearer \xff\xfe\xfd", "not known"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/playground", "/healthy", "/v1/../health", "/openapi.json"]
)
def test_without_a_known_key_there_is_nothing(path: str, value: str | None, why: str) -> None:
    behind = Behind()
    answer = ask(guarded(behind, keys=KEYS), path=path, headers=[] if value is None else [("authorization", value)])
    assert answer.status in ((400,) if ".." in path else (401,))
    assert not behind.scopes
    if answer.status == 401:
        assert why in answer.message
        assert answer["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_is_read_in_any_case(scheme: str) -> None:
    assert ask(guarded(keys=KEYS), headers=[("authorization", f"{scheme} {ANA}")]).status == 200


def test_the_page_and_the_health_need_no_key_to_be_read_and_one_for_all_else() -> None:
    guard = guarded(keys=KEYS)
    for path in ("/", "/health", "/playground/app.js"):
        assert ask(guard, path=path).status == 200
        assert ask(guard, "POST", path, [JSON], b"{}").status == 401


def test_whose_key_it_is_not_is_told_before_a_byte_of_the_body_is_read() -> None:
    answer = post(guarded(keys=KEYS), [b"{" * 1000] * 3)
    assert (answer.status, answer.read) == (401, 0)


def test_without_an_admin_key_nobody_is_admin() -> None:
    behind = Behind()
    for keys, header in ((Keys.of(), bearer(ADMIN)), (Keys.of((ANA,)), bearer(ANA)), (Keys.of(), bearer(""))):
        guard = guarded(behind, keys=keys)
        assert ask(guard, headers=[header]).status == 200
        for method in ("PUT", "DELETE"):
            answer = ask(guard, method, "/v1/knobs/math", [header])
            assert answer.status == 403
            assert "started without one" in answer.message
    assert [scope["method"] for scope in behind.scopes] == ["GET"] * 3


def test_knobs_are_put_by_admins_and_nobody_elses_file_is_read() -> None:
    behind = Behind()
    guard = guarded(behind, keys=KEYS)
    kind = ("content-type", "application/octet-stream")
    refused = ask(guard, "PUT", "/v1/knobs/math", [bearer(ANA), kind], [b"knob", b"file"])
    assert (refused.status, refused.read) == (403, 0)
    assert ask(guard, "DELETE", "/v1/knobs/math", [bearer(ANA)]).status == 403
    assert ask(guard, "PUT", "/v1/knobs/math", [bearer(ADMIN), kind], [b"knob", b"file"]).status == 200
    assert ask(guard, "DELETE", "/v1/knobs/math", [bearer(ADMIN)]).status == 200
    assert behind.bodies == [b"knobfile", b""]


def test_with_an_admin_key_alone_only_what_is_the_admins_needs_a_key() -> None:
    guard = guarded(keys=Keys.of((), (ADMIN,)))
    assert ask(guard).status == 200
    assert ask(guard, headers=[bearer("anything")]).status == 200
    assert ask(guard, "DELETE", "/v1/knobs/math").status == 403
    assert ask(guard, "DELETE", "/v1/knobs/math", [bearer(ADMIN)]).status == 200


# Hosts and origins


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]:8000"]
)
def test_loopback_answers_to_its_names_at_any_port(host: str) -> None:
    assert ask(guarded(), host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "evil.example#localhost",
        "localhost:8000:evil",
        "localhost:",
        "localhost.",
        "localhost,evil.example",
        "http://localhost",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
        "0.0.0.0",
        "10.0.0.7",
        "[::ffff:127.0.0.1]",
        "::1",
        "[::1",
        "loc\xadalhost",
    ],
)
def test_other_hosts_are_refused_on_loopback_for_every_path(host: str | None) -> None:
    behind = Behind()
    for path in ("/", "/health", "/v1/models"):
        answer = ask(guarded(behind), path=path, host=host)
        assert answer.status == 403
        assert "--allow-host" in answer.message
    assert not behind.scopes


@pytest.mark.parametrize(
    ("bound", "allowed", "keys", "host", "status"),
    [
        ("127.0.0.1", ("trimtab.example",), False, "trimtab.example:443", 200),
        ("127.0.0.1", ("Trimtab.example",), False, "trimtab.EXAMPLE", 200),
        ("127.0.0.1", ("trimtab.example",), False, "other.example", 403),
        ("127.0.0.1", (), True, "evil.example", 403),
        ("0.0.0.0", (), False, "192.0.2.7:8000", 200),  # rebinding needs a name
        ("0.0.0.0", (), False, "[2001:db8::7]:8000", 200),
        ("0.0.0.0", (), False, "localhost", 200),
        ("0.0.0.0", (), False, "evil.example", 403),
        ("0.0.0.0", ("box.example",), False, "box.example", 200),
        ("0.0.0.0", (), True, "any.example", 200),  # a page has no key
        ("0.0.0.0", ("box.example",), True, "any.example", 403),
    ],
)
def test_which_names_are_answered_depends_on_where_the_server_listens(
    bound: str, allowed: tuple[str, ...], keys: bool, host: str, status: int
) -> None:
    guard = guarded(host=bound, allow_hosts=allowed, keys=KEYS if keys else Keys())
    assert ask(guard, host=host, headers=[bearer(ANA)]).status == status


@pytest.mark.parametrize("name", ["*", "http://box.example", "box.example:80", "", "a b", "[::1]:80", "box/path"])
def test_what_is_no_name_of_a_host_is_refused_at_start(name: str) -> None:
    with pytest.raises(OptionError, match="without scheme and port"):
        Hosts.of("127.0.0.1", (name,))


def test_loopback_is_known_by_its_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "", "192.0.2.1")] == [False] * 4
    with pytest.raises(OptionError, match="no address"):
        is_loopback("no such host")


OWN = ("origin", "http://localhost:8000")
EVIL = ("origin", "http://evil.example")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 200),  # no browser
        ([OWN], 200),
        ([OWN, ("sec-fetch-site", "same-origin")], 200),
        ([("sec-fetch-site", "none")], 200),
        ([("origin", "https://localhost:8000"), ("sec-fetch-site", "same-origin")], 200),  # behind a proxy with TLS
        ([EVIL], 403),
        ([("origin", "null")], 403),
        ([("origin", "")], 403),
        ([("origin", "http://localhost:3000")], 403),
        ([("origin", "http://localhost")], 403),
        ([("origin", "https://localhost:8000")], 403),
        ([("origin", "http://localhost:8000.evil.example")], 403),
        ([("origin", "http://localhost:8000/")], 403),
        ([("origin", "http://localhost:8000, http://evil.example")], 403),
        ([("sec-fetch-site", "cross-site")], 403),
        ([("sec-fetch-site", "same-site")], 403),  # another port of this machine
        ([("sec-fetch-site", "")], 403),
        ([OWN, ("sec-fetch-site", "cross-site")], 403),
        ([OWN, EVIL], 400),
    ],
)
def test_other_pages_change_nothing(headers: list[tuple[str, str]], status: int) -> None:
    behind = Behind()
    guard = guarded(behind, keys=Keys.of((), (ADMIN,)))
    assert post(guard, b"{}", *headers).status == status
    assert ask(guard, "DELETE", "/v1/knobs/math", [bearer(ADMIN), *headers]).status == status
    assert len(behind.scopes) == (2 if status == 200 else 0)


def test_other_pages_may_read_nothing_unless_their_origin_is_allowed() -> None:
    page = ("origin", "http://localhost:3000")
    preflight = [page, ("access-control-request-method", "POST"), ("access-control-request-headers", "authorization")]
    closed, opened = guarded(), guarded(allow_origins=("http://LOCALHOST:3000",), keys=KEYS)

    assert ask(closed, "OPTIONS", "/v1/chat/completions", preflight).status == 405
    assert "access-control-allow-origin" not in dict(ask(closed, headers=[page]).headers)

    answer = ask(opened, "OPTIONS", "/v1/chat/completions", preflight)
    assert (answer.status, answer["access-control-allow-origin"]) == (200, page[1])
    assert answer["access-control-allow-headers"] == "authorization"
    answer = post(opened, b"{}", page, ("sec-fetch-site", "same-site"), bearer(ANA))
    assert (answer.status, answer["access-control-allow-origin"]) == (200, page[1])
    answer = post(opened, b"{}", page)
    assert (answer.status, answer["access-control-allow-origin"]) == (401, page[1])  # or the page could not read why

    other = [("origin", "http://evil.example"), *preflight[1:]]
    answer = ask(opened, "OPTIONS", "/v1/chat/completions", other)
    assert answer.status == 403
    assert "evil.example" in answer.message
    assert "access-control-allow-origin" not in dict(answer.headers)
    answer = ask(opened, headers=[("origin", "http://evil.example"), bearer(ANA)])
    assert "access-control-allow-origin" not in dict(answer.headers)
    assert "access-control-allow-credentials" not in dict(answer.headers)


@pytest.mark.parametrize(
    "origin", ["*", "null", "localhost:3000", "http://a.example/", "http://a b", "ftp://a.example"]
)
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(OptionError, match="is no origin"):
        guarded(allow_origins=(origin,))


# Lines and headers


@pytest.mark.parametrize(
    ("path", "query", "status"),
    [
        ("/v1/models", "", 200),
        ("/v1/models/prefworld:careful", "", 200),
        ("/v1/models/some%2Fmodel", "", 200),
        ("/v1/models/r%C3%A9gl%C3%A9", "", 200),
        ("/playground/app.js", "v=2", 200),
        ("/", "knob=math", 200),
        ("/v1/models", "key=0123456789abcdef", 400),
        ("/health", "a", 400),
        ("//v1/models", "", 400),
        ("/v1//models", "", 400),
        ("/v1/../v1/models", "", 400),
        ("/playground/..", "", 400),
        ("/playground/%2e%2e/app.py", "", 400),
        ("/playground/..%2fapp.py", "", 400),
        ("/playground/.%2e/app.py", "", 400),
        ("/playground/./app.js", "", 400),
        ("/playground/..\\app.py", "", 400),
        ("/v1/knobs/a%00b", "", 400),
        ("/v1/knobs/a%0d%0ab", "", 400),
        ("/v1/knobs/%ff", "", 400),
        ("/v1/knobs/%c0%ae%c0%ae", "", 400),
        ("http://evil.example/v1/models", "", 400),
        ("*", "", 400),
        ("", "", 400),
        ("/" + "a" * 2048, "", 414),
        ("/playground/a", "b" * 2048, 414),
    ],
)
def test_paths_and_query_strings(path: str, query: str, status: int) -> None:
    answer = ask(guarded(), path=path, query=query)
    assert answer.status == status
    assert status == 200 or answer.message


@pytest.mark.parametrize("method", ["PATCH", "TRACE", "CONNECT", "OPTIONS", "QUERY", "get", "G\u00cbT", ""])
def test_odd_methods_are_told_the_known_ones(method: str) -> None:
    answer = ask(guarded(), method)
    assert answer.status == 405
    assert answer["allow"] == "GET, HEAD, POST, PUT, DELETE"
    assert "DELETE" in answer.message


def test_too_many_and_too_long_headers_are_refused() -> None:
    assert ask(guarded(), headers=[("x-a", "b")] * 99).status == 200
    assert ask(guarded(), headers=[("x-a", "b")] * 100).status == 431
    assert ask(guarded(), headers=[("cookie", "c" * 32000)]).status == 200
    assert ask(guarded(), headers=[("cookie", "c" * 32768)]).status == 431


@pytest.mark.parametrize(
    "name", ["host", "authorization", "content-type", "content-length", "origin", "sec-fetch-site", "transfer-encoding"]
)
def test_what_is_looked_at_may_not_stand_twice(name: str) -> None:
    answer = ask(guarded(), headers=[(name, "localhost"), (name, "localhost")], host=None)
    assert answer.status == 400
    assert f"two headers {name}" in answer.message


def test_websockets_are_refused() -> None:
    assert ask(guarded(), headers=[("upgrade", "WebSocket"), ("connection", "upgrade")]).status == 400
    sent = list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    behind = Behind()
    asyncio.run(guarded(behind)({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))  # pyright: ignore[reportArgumentType]
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert not behind.scopes


# Bodies


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ('application/json; charset="utf-8"', 200),
        ("application/json;", 200),
        ("application/json; charset=utf-16", 415),
        ("application/json; a=b", 415),
        ("text/json", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/octet-stream", 415),
        ("application/json, text/plain", 415),
        ("", 415),
    ],
)
def test_a_body_says_that_it_is_json(kind: str, status: int) -> None:
    answer = post(guarded(), b"{}", ("content-type", kind))
    assert answer.status == status
    assert status == 200 or "application/json" in answer.message
    missing = ask(guarded(), "POST", "/v1/completions", [], b"{}")
    assert missing.status == 415


@pytest.mark.parametrize(
    ("headers", "version", "status"),
    [
        ([("content-encoding", "gzip")], "1.1", 415),
        ([("content-encoding", "identity")], "1.1", 200),
        ([("transfer-encoding", "chunked"), ("content-length", "2")], "1.1", 400),
        ([("transfer-encoding", "chunked")], "1.0", 400),
        ([("content-length", "-2")], "1.1", 400),
        ([("content-length", "+2")], "1.1", 400),
        ([("content-length", "\u00b2")], "1.1", 400),
        ([("content-length", "")], "1.1", 400),
    ],
)
def test_a_body_that_could_be_read_in_two_ways_is_not_read(
    headers: list[tuple[str, str]], version: str, status: int
) -> None:
    body: Any = [b"{}"] if ("transfer-encoding", "chunked") in headers else b"{}"
    answer = post(guarded(), body, *headers, version=version)
    assert answer.status == status


def test_bodies_are_where_they_belong() -> None:
    assert ask(guarded(), "POST", "/v1/completions", [JSON]).status == 411
    assert ask(guarded(), "POST", "/v1/completions", [JSON, ("content-length", "0")]).status == 400  # no JSON
    for method, path in (("GET", "/v1/models"), ("GET", "/"), ("HEAD", "/health")):
        assert ask(guarded(), method, path, [], b"{}").status == 400
        assert ask(guarded(), method, path, [("content-length", "0")]).status == 200


@pytest.mark.parametrize(("method", "limit"), [("POST", "body_limit"), ("PUT", "file_limit")])
def test_long_bodies_are_refused_by_what_they_announce_and_by_what_comes(method: str, limit: str) -> None:
    behind = Behind()
    guard = guarded(behind, keys=KEYS, **{limit: 1000})
    kind = JSON if method == "POST" else ("content-type", "application/octet-stream")
    headers = [bearer(ADMIN), kind]
    fits, longer = b'{"a": "' + b"a" * 991 + b'"}', b'{"a": "' + b"a" * 992 + b'"}'
    for body in (fits, [fits[:500], fits[500:]], [fits[at : at + 1] for at in range(1000)]):
        assert ask(guard, method, "/v1/knobs/a", headers, body).status == 200
    assert behind.bodies == [fits] * 3
    announced = ask(guard, method, "/v1/knobs/a", headers, longer)
    assert (announced.status, announced.read) == (413, 0)
    assert "1000 bytes" in announced.message
    counted = ask(guard, method, "/v1/knobs/a", headers, [b"a" * 500] * 100)
    assert (counted.status, counted.read) == (413, 1500)
    assert len(behind.bodies) == 3


def test_slow_bodies_are_not_waited_for() -> None:
    guard = guarded(body_seconds=0.1)
    began = time.monotonic()
    answer = post(guard, [b" "] * 1000, pause=0.02)
    assert answer.status == 408
    assert "0.1 s" in answer.message
    assert time.monotonic() - began < 5
    assert post(guard, [b"{", b"}"], pause=0.01).status == 200


def test_who_leaves_in_the_middle_of_a_body_gets_no_answer_and_takes_no_place() -> None:
    behind = Behind()
    guard = guarded(behind, concurrency=1)
    assert post(guard, [], ("transfer-encoding", "chunked")).status == 0
    assert post(guard).status == 200
    assert len(behind.scopes) == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "expected an object"),
        (b'"text"', "expected an object"),
        (b"null", "expected an object"),
        (b'{"a": NaN}', "not a finite number"),
        (b'{"a": Infinity}', "not a finite number"),
        (b'{"a": -Infinity}', "not a finite number"),
        (b'{"a": 1e999}', "not a finite number"),
        (b'{"a": -1e999}', "not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"a": 1, "a": 2}', "two fields"),
        (b'{"a": {"b": 1, "b": 1}}', "two fields"),
        (b'{"a": ' * 33 + b"1" + b"}" * 33, "more than 32 lists"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "more than 32 lists"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ["\\udc00\\ud800"]}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "\xc0\xaf"}', "utf-8"),
        (b'{"a": "\xed\xa0\x80"}', "utf-8"),
        (b'{"a": "\x00"}', "control character"),
        (b"\x00{}", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 0x10}', "not JSON"),
        (b'{"a": 01}', "not JSON"),
    ],
)
def test_json_that_readers_differ_on_stays_outside(body: bytes, why: str) -> None:
    behind = Behind()
    answer = post(guarded(behind), body, ("content-length", str(len(body))))
    assert answer.status == 400
    assert why in answer.message
    assert "set_int_max_str_digits" not in answer.message
    assert not behind.scopes


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b' \n\t{"a": [1, -0.5, 1e300, null, true]} ',
        b'{"a": ' * 32 + b"1" + b"}" * 32,
        b'{"a": "' + b"[" * 1000 + b'"}',
        b'{"a": "\\ud83d\\ude00 \\u0000 \\\\ud800"}',
        '{"é": "\N{GRINNING FACE}\u2028"}'.encode(),
        b'{"a": ' + b"9" * 4000 + b"}",
    ],
)
def test_json_that_is_sound_is_handed_on_as_it_came(body: bytes) -> None:
    behind = Behind()
    assert post(guarded(behind), body).status == 200
    assert behind.bodies == [body]


def test_a_long_body_is_checked_in_a_thread_so_that_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bool] = []

    def spy(body: bytes) -> None:
        checked.append(threading.current_thread() is threading.main_thread())
        check_json(body)

    check_json = guard_module.check_json
    monkeypatch.setattr(guard_module, "check_json", spy)
    guard = guarded()
    assert post(guard, b'{"a": "' + b"a" * 100 + b'"}').status == 200
    assert post(guard, b'{"a": "' + b"a" * 100_000 + b'"}').status == 200
    answer = post(guard, b'{"a": "' + b"a" * 100_000 + b'", "a": 1}')
    assert (answer.status, "two fields" in answer.message) == (400, True)
    assert checked == [True, False, False]


# Limits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusals(limits: Limits, *clients: str) -> list[bool]:
    def refused(client: str) -> bool:
        with suppress(Refusal), limits.admitted(client):
            return False
        return True

    return [refused(client) for client in clients]


def test_a_minutes_requests_are_taken_at_once_and_then_at_their_pace() -> None:
    clock = Clock()
    limits = Limits(6, clock=clock)
    assert refusals(limits, *["a"] * 7) == [False] * 6 + [True]
    clock.now += 9.9
    assert refusals(limits, "a", "b") == [True, False]
    clock.now += 0.2
    assert refusals(limits, "a", "a") == [False, True]
    clock.now += 1e6
    assert refusals(limits, *["a"] * 7) == [False] * 6 + [True]


def test_the_limit_of_requests_a_minute_is_named_and_says_when_to_come_again() -> None:
    guard = guarded(rate=2)
    assert [post(guard).status for _ in range(2)] == [200, 200]
    answer = post(guard)
    assert answer.status == 429
    assert "2 requests a minute" in answer.message
    assert answer["retry-after"] == "30"
    assert post(guard, client="192.0.2.9").status == 200
    assert ask(guard, path="/health").status == 200
    assert ask(guard, path="/").status == 200


def test_keys_are_limited_each_for_itself_wherever_they_come_from() -> None:
    guard = guarded(rate=1, keys=KEYS)
    assert ask(guard, headers=[bearer(ANA)], client="192.0.2.1").status == 200
    assert ask(guard, headers=[bearer(ANA)], client="192.0.2.2").status == 429
    assert ask(guard, headers=[bearer(BEN)], client="192.0.2.1").status == 200


def test_guessing_keys_is_limited_by_address() -> None:
    guard = guarded(rate=2, keys=KEYS)
    guesses = [ask(guard, headers=[bearer(f"guess-0123456789-{n}")]).status for n in range(4)]
    assert guesses == [401, 401, 429, 429]
    assert ask(guard, headers=[bearer(ANA)]).status == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_guessing_the_admin_key_is_limited_too_where_nobody_else_needs_one(method: str) -> None:
    guard = guarded(rate=2, keys=Keys.of((), ("the-admin-key-0123456789",)))
    guesses = [ask(guard, method, "/v1/knobs/x", headers=[bearer(f"guess-0123456789-{n}")]).status for n in range(4)]
    assert guesses == [403, 403, 429, 429]


def test_requests_at_a_time_are_limited_until_they_end_however_they_do() -> None:
    behind = Behind()
    guard = guarded(behind, concurrency=2)

    async def crowd() -> list[Answer]:
        slow = [exchange(guard, "POST", "/v1/completions", [JSON], [b"{", b"}"], pause=0.2) for _ in range(2)]
        tasks = [asyncio.create_task(one) for one in slow]
        await asyncio.sleep(0.1)
        third = await exchange(guard)
        other = await exchange(guard, client="192.0.2.9")
        behind.error = RuntimeError("broken")
        broken = await asyncio.gather(*tasks)
        behind.error = None
        return [third, other, *broken, *[await exchange(guard) for _ in range(3)]]

    third, *others = asyncio.run(crowd())
    assert third.status == 429
    assert "At most 2 requests" in third.message
    assert third["retry-after"] == "1"
    assert [answer.status for answer in others] == [200, 500, 500, 200, 200, 200]


def test_the_table_of_clients_does_not_grow_and_a_flood_of_addresses_gains_nothing() -> None:
    clock = Clock()
    limits = Limits(1, places=10, clock=clock)
    assert refusals(limits, *map(str, range(10))) == [False] * 10
    flood = refusals(limits, *map(str, range(10, 1000)))
    assert flood.count(False) == 1  # they share one bucket
    assert refusals(limits, "3") == [True]  # and nobody's count is forgotten for them
    assert len(limits._buckets) == 10
    clock.now += 61
    assert refusals(limits, *map(str, range(1000, 1010))) == [False] * 10
    assert len(limits._buckets) <= 10


def test_clients_whose_requests_run_are_not_forgotten() -> None:
    clock = Clock()
    limits = Limits(concurrency=1, places=2, clock=clock)
    with limits.admitted("a"):
        assert refusals(limits, "b", "c", "d", "a") == [False, False, False, True]
    assert refusals(limits, "a") == [False]


def test_an_ipv6_site_is_one_client() -> None:
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1") != client_of("2001:db8:0:1::1")
    assert client_of("::ffff:192.0.2.1") == client_of("192.0.2.1") != client_of("192.0.2.2")
    assert client_of("fe80::1%eth0") == client_of("fe80::2%eth0")
    assert client_of("") == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0},
        {"rate": -1},
        {"rate": float("nan")},
        {"concurrency": 0},
        {"concurrency": -2},
        {"body_limit": 0},
        {"file_seconds": 0},
    ],
)
def test_limits_that_nothing_could_keep_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="positive"):
        GuardSettings(**wrong)


# Answers


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", [], 200),
        ("/", [], 200),
        ("/playground/app.js", [], 200),
        ("/v1/models", [("authorization", "a"), ("authorization", "b")], 400),
        ("/v1/models/a//b", [], 400),
    ],
)
def test_every_answer_has_the_headers_and_each_once(path: str, headers: list[tuple[str, str]], status: int) -> None:
    behind = Behind()
    behind.headers = [(b"Content-Security-Policy", b"script-src *"), (b"X-Request-Id", b"taken"), (b"X-Own", b"1")]
    answer = ask(guarded(behind), path=path, headers=[*headers, ("x-request-id", "mine\r\nx: y")])
    assert answer.status == status
    page = not path.startswith("/v1")
    for name in HEADERS - ({"cache-control"} if page else set()):
        assert answer[name]
    policy = answer["content-security-policy"]
    for part in (
        "default-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "object-src 'none'",
    ):
        assert part in policy.split("; ")
    assert "unsafe" not in policy
    assert answer["x-content-type-options"] == "nosniff"
    assert answer["x-request-id"].startswith("req_")
    assert page or answer["cache-control"] == "no-store"
    assert status != 200 or answer["x-own"] == "1"


def test_the_pages_files_may_be_kept_as_the_application_says_and_nothing_else_may() -> None:
    behind = Behind()
    behind.headers = [(b"cache-control", b"no-cache")]
    kept = [ask(guarded(behind), path=path)["cache-control"] for path in ("/", "/playground/app.js", "/v1/models")]
    assert kept == ["no-cache", "no-cache", "no-store"]


def test_requests_have_names_that_differ_and_that_the_application_knows() -> None:
    behind = Behind()
    guard = guarded(behind)
    names = [ask(guard, headers=[("x-request-id", "same")])["x-request-id"] for _ in range(20)]
    assert len(set(names)) == 20
    assert names == [scope["state"]["request_id"] for scope in behind.scopes]


def test_what_the_application_did_not_expect_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    behind = Behind()
    behind.error = RuntimeError("the prompt was: tell me a secret")
    answer = post(guarded(behind), b"{}")
    assert answer.status == 500
    assert answer["x-request-id"] in answer.message
    assert "secret" not in answer.message
    assert answer["x-request-id"] in caplog.text
    assert json.loads(answer.body)["error"]["type"] == "server_error"


def test_an_answer_that_breaks_off_is_not_ended_as_if_it_were_whole() -> None:
    sent = list[Any]()

    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/v1/models", "query_string": b""}
    asyncio.run(
        Guard(breaks, GuardSettings())({**scope, "headers": [(b"host", b"localhost")]}, None, send)  # pyright: ignore[reportArgumentType]
    )
    assert [message.get("more_body") for message in sent] == [None, True]


def test_a_refused_body_closes_the_connection_and_a_read_one_does_not() -> None:
    guard = guarded()
    assert post(guard, b"{}", ("content-type", "text/plain"))["connection"] == "close"
    assert "connection" not in dict(post(guard, b"[]").headers)
    assert "connection" not in dict(ask(guard).headers)


def test_the_rest_of_a_refused_body_is_taken_in_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "_LINGER", 0.1)
    began = time.monotonic()
    assert post(guarded(), [b" " * 10] * 1000, ("content-type", "text/plain"), pause=0.01).status == 415
    assert 0.05 < time.monotonic() - began < 3


def test_while_the_server_ends_everything_is_answered_with_503() -> None:
    behind = Behind()
    guard = guarded(behind)
    guard.draining = True
    for path in ("/", "/health", "/v1/models"):
        answer = ask(guard, path=path)
        assert answer.status == 503
        assert answer["retry-after"]
        assert answer["connection"] == "close"
        assert "shutting down" in answer.message
    assert not behind.scopes


def test_one_line_is_logged_of_each_request_without_what_is_in_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trimtab.serve")
    guard = guarded(keys=KEYS)
    answer = post(guard, b'{"prompt": "tell me a secret"}', bearer(ANA))
    ask(guard, path="/v1/knobs/a%0A%1b[31mb", query="token=secret")
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"{answer['x-request-id']} POST /v1/chat/completions 200 ")
    assert " 400 " in second
    assert "secret" not in first + second
    assert (first + second).isprintable()


# Anything

TEXT = st.text(st.characters(max_codepoint=255), max_size=12)
NAMES = st.sampled_from(["host", "origin", "content-length", "content-type", "authorization", "x", "upgrade", "expect"])
VALUES = st.one_of(TEXT, st.sampled_from(["application/json", "chunked", "localhost", "2", "0", f"Bearer {ANA}"]))


@settings(max_examples=300, deadline=None)
@given(
    method=st.one_of(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS"]), TEXT),
    path=st.one_of(st.sampled_from(["/", "/v1/models", "/health"]), TEXT),
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=4),
    body=st.one_of(st.binary(max_size=20), st.lists(st.binary(max_size=5), min_size=1, max_size=4)),
    query=TEXT,
    host=st.one_of(st.none(), st.just("localhost"), TEXT),
)
def test_whatever_comes_is_answered_or_refused_and_never_breaks_the_guard(**request: Any) -> None:
    answer = ask(GUARD, **request)
    assert answer.status == 200 or (400 <= answer.status < 500 and answer.message)


GUARD = guarded(keys=Keys.of((), (ADMIN,)), allow_origins=("http://a.example",))
