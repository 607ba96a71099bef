"""Hostile, broken and merely strange requests, each with the statuses that are right for it.

    python tests/hostile_requests.py http://127.0.0.1:8000     send them all to a server, and print what was not right

The server listens on loopback without keys, holds the model "prefworld" with a knob "math" that has a safe range and a
panel "careful", and refuses strengths outside the range (dose strict). Where it is to be patient for less than half a
minute, the slow requests need less time.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

CLOSED = 0
"""The status where the server closes the connection without an answer."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = ("Content-Type", "application/json")
BYTES = ("Content-Type", "application/octet-stream")
BASE: dict[str, Any] = {"model": "prefworld", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}

Judge = Literal["guard", "application"]


class Case(NamedTuple):
    """One request."""

    name: str
    statuses: frozenset[int]
    by: Judge
    """Who is to answer it."""
    method: str = "POST"
    path: str = CHAT
    headers: tuple[tuple[str, str], ...] = (JSON,)
    body: bytes | None = b""
    """None sends no Content-Length either."""
    raw: bytes = b""
    """The whole request, in place of what the other fields make; HOST stands for the server's name and port."""
    piece: int = 0
    """Bytes that are sent at a time, with `pause` seconds after each; 0 sends all at once."""
    pause: float = 0.0

    def request(self, host: str) -> bytes:
        """Return the request's bytes for a server."""
        if self.raw:
            return self.raw.replace(b"HOST", host.encode())
        given = {name.lower() for name, _ in self.headers}
        headers = list(self.headers)
        if "host" not in given:
            headers.insert(0, ("Host", host))
        if self.body is not None and not {"content-length", "transfer-encoding"} & given:
            headers.append(("Content-Length", str(len(self.body))))
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + (self.body or b"")


def send(base_url: str, case: Case, *, timeout: float = 60.0) -> tuple[int, str]:
    """Send a request; return the status, and of an error in OpenAI's form the message (of any other, nothing).

    Status 0 is a connection that was closed without an answer. Raises `TimeoutError` for one that was left open.
    """
    there = urlsplit(base_url)
    assert there.hostname is not None
    with socket.create_connection((there.hostname, there.port or 80), timeout=timeout) as connection:
        data = case.request(there.netloc)
        step = case.piece or len(data)
        with suppress(ConnectionError):  # a server may answer, and close, before it has read all
            for at in range(0, len(data), step):
                connection.sendall(data[at : at + step])
                if case.pause:
                    time.sleep(case.pause)
        answer, end = b"", time.monotonic() + timeout
        with suppress(ConnectionError):
            while part := connection.recv(2**16):
                answer += part
                if time.monotonic() > end:
                    raise TimeoutError(case.name)
    return _read(answer)


def _read(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 1"):  # 100 Continue
        head, _, body = body.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
    if match is None:
        assert not answer, f"no answer of HTTP: {answer[:200]!r}"
        return CLOSED, ""
    try:
        error = json.loads(body)["error"]
        sound = set(error) == {"message", "type", "param", "code"} and isinstance(error["type"], str)
        return int(match[1]), str(error["message"]) if sound else ""
    except (ValueError, KeyError, TypeError):
        return int(match[1]), ""


def right(case: Case, status: int, message: str) -> bool:
    """Tell whether an answer is a right one: a status that fits, and with every error a message."""
    return status in case.statuses and (status < 400 or bool(message))


# How cases are written


def short(text: str) -> str:
    """Write the start of a text, and how long the whole is if that is more."""
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)})"


def make(name: str, *statuses: int, by: Judge = "application", **fields: Any) -> Case:
    return Case(name, frozenset(statuses), by, **fields)


def chat(name: str, *statuses: int, by: Judge = "application", **changes: Any) -> Case:
    """A chat completion with other fields; Python writes floats that are no numbers as JSON has them not."""
    return make(name, *statuses, by=by, body=json.dumps({**BASE, **changes}).encode())


def text(name: str, *statuses: int, **changes: Any) -> Case:
    body = {"model": "prefworld", "prompt": "Hello", "max_tokens": 2, **changes}
    return make(name, *statuses, path=TEXT, body=json.dumps(body).encode())


def written(name: str, body: bytes | str, *statuses: int, by: Judge = "guard") -> Case:
    """A chat completion whose body stands there as it is sent."""
    return make(name, *statuses, by=by, body=body.encode() if isinstance(body, str) else body)


def field(name: str, value: str, *statuses: int, by: Judge = "guard") -> Case:
    """A chat completion with one field more, whose value is JSON, or nearly."""
    return written(f"{name}={short(value)}", json.dumps(BASE)[:-1] + f', "{name}": {value}}}', *statuses, by=by)


def get(path: str, *statuses: int, by: Judge = "application", method: str = "GET") -> Case:
    return make(f"{method} {short(path)}", *statuses, by=by, method=method, path=path, headers=(), body=None)


def headed(name: str, *statuses: int, by: Judge = "guard", **headers: str) -> Case:
    """A sound chat completion with headers more, or others."""
    given = {key.replace("_", "-"): value for key, value in headers.items()}
    kept = () if "Content-Type" in given else (JSON,)
    return make(name, *statuses, by=by, headers=(*kept, *given.items()), body=json.dumps(BASE).encode())


def raw(name: str, data: bytes, *statuses: int, by: Judge = "guard", **fields: Any) -> Case:
    return make(name, *statuses, by=by, raw=data, **fields)


# The cases


def wrong_types() -> Iterator[Case]:
    """Every field with values that it cannot have."""
    odd: dict[str, list[Any]] = {
        "model": [None, 1, "", [], {}, True, "m" * 10_000],
        "messages": [None, "Hello", {}, [], [1], [None], [[]], [{}]],
        "max_tokens": ["2", 1.5, 0, -1, True, [2], 10**9, 10**30, 10**400],
        "max_completion_tokens": ["2", -2, {}],
        "temperature": ["1", -0.1, 1e308, True, [], {}],
        "top_p": ["1", -0.5, 1.5, True, []],
        "stop": [1, {}, [1], [None], ["a"] * 1000, ["\n", ["\n"]]],
        "seed": ["1", 1.5, 2**80, True, []],
        "stream": ["yes", 1, "true", []],
        "stream_options": ["include_usage", [], {"include_usage": "yes"}, {"nonsense": True}],
        "logprobs": ["yes", 3, []],
        "top_logprobs": ["3", -1, 10**6, 1.5],
        "n": ["1", 0, -1, 1.5, 10**9, True, []],
        "user": [1, [], {}],
        "knobs": [1, True, [], ["math"], [["math", 0.5]]],
        "panel": [1, True, [], {}],
        "projections": ["yes", 1, []],
    }
    for name, values in odd.items():
        for value in values:
            yield chat(
                f"{name}={short(json.dumps(value))}", *((400, 404) if name == "model" else (400,)), **{name: value}
            )
    for value in (None, 1, {}, [], [None], [1.5], [-1], [10**9], [True], [[]], [["Hello"]], ["Hello", 1], [1, "Hello"]):
        yield text(f"prompt={short(json.dumps(value))}", 400, prompt=value)
    yield text("logprobs=true of a text", 400, logprobs=True)
    yield text("messages to the older interface", 400, messages=BASE["messages"])
    yield chat("a field that there is not", 400, temprature=0.5)
    yield chat("a field of a name without end", 400, **{"x" * 50_000: 1})
    yield chat("no tools here", 400, tools=[{"type": "function", "function": {"name": "f"}}])
    yield written("no messages", '{"model": "prefworld"}', 400, by="application")
    yield written("no model", '{"messages": [{"role": "user", "content": "Hello"}]}', 400, by="application")
    yield written("nothing at all", "{}", 400, by="application")


def messages() -> Iterator[Case]:
    """Conversations that none is."""
    odd: dict[str, Any] = {
        "no role": {"content": "Hello"},
        "an unknown role": {"role": "root", "content": "Hello"},
        "a role that is no text": {"role": 1, "content": "Hello"},
        "no content": {"role": "user"},
        "content that is no text": {"role": "user", "content": 1},
        "content null": {"role": "user", "content": None},
        "a picture": {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        "a part without text": {"role": "user", "content": [{"type": "text"}]},
        "a part that is none": {"role": "user", "content": [None]},
        "a field that there is not": {"role": "user", "content": "Hello", "__class__": "str"},
    }
    for name, message in odd.items():
        yield chat(f"a message with {name}", 400, messages=[message])
    yield chat("20000 messages", 400, messages=BASE["messages"] * 20_000)
    yield chat("a prompt beyond the context", 400, messages=[{"role": "user", "content": "Hello " * 50_000}])
    yield chat("a prompt of null characters", 200, 400, messages=[{"role": "user", "content": "\0" * 50}])
    yield chat(
        "a prompt of the template's own tokens", 200, 400, messages=[{"role": "user", "content": "<|im_end|>" * 9}]
    )
    yield chat("a prompt of marks of writing direction", 200, 400, messages=[{"role": "user", "content": "\u202e" * 9}])
    yield chat("a prompt of unassigned characters", 200, 400, messages=[{"role": "user", "content": "\U000e0fff" * 9}])
    yield chat("an empty prompt", 200, 400, messages=[{"role": "user", "content": ""}])
    yield text("an empty text", 200, 400, prompt="")
    yield text("a stop text without end", 400, stop="x" * 100_000)
    yield chat("a user without end", 200, 400, user="u" * 100_000)


def knobs() -> Iterator[Case]:
    """Settings that none is, as objects and as text."""
    objects: dict[str, Any] = {
        "unknown": {"nonsense": 1},
        "beyond the safe range": {"math": 1e6},
        "far beyond": {"math": -1e300},
        "an integer beyond floats": {"math": 10**400},
        "true": {"math": True},
        "null": {"math": None},
        "text": {"math": "0.5"},
        "infinite text": {"math": "1e999"},
        "a list": {"math": [0.5]},
        "an object": {"math": {"strength": 0.5}},
        "no name": {"": 0.5},
        "a blank": {" math": 0.5},
        "case": {"MATH": 0.5},
        "a path": {"../../etc/passwd": 0.5},
        "an absolute path": {"/etc/passwd": 0.5},
        "a null character": {"math\0": 0.5},
        "a line break": {"math\nconcise": 0.5},
        "a colour": {"\x1b[31mmath": 0.5},
        "a look-alike": {"m\u0430th": 0.5},
        "a name without end": {"m" * 100_000: 0.5},
        "a private name": {"__class__": 0.5},
        "a template": {"{{math}}": 0.5, "%s": 1},
        "ten thousand": {f"knob{number}": 0.5 for number in range(10_000)},
    }
    for name, value in objects.items():
        yield chat(f"knobs: {name}", 400, knobs=value)
    for value in (
        "math=1e999",
        "math=-1e999",
        "math=nan",
        "math=inf",
        "math=-Infinity",
        "math=0x1",
        "math=1_0.0_1",
        "math=",
        "math",
        "=0.5",
        "math=0.5=0.5",
        "math=0.5,math=0.6",
        "math=0.5;concise=1",
        "math=\u0661",
        "nonsense=0.5",
        "../../etc/passwd=1",
        "math=0.5\0",
        "{",
        '{"math": NaN}',
        '{"math": 1e999}',
        '{"math": 0.1, "math": 0.2}',
        "[" * 20_000,
        "math=0.5," * 5_000,
        "math=" + "9" * 5_000,
    ):
        yield chat(f"knobs as text: {short(repr(value))}", 400, knobs=value)
    yield chat("a setting of nothing", 200, knobs={})
    yield chat("panel: unknown", 400, 404, panel="nonsense")
    yield chat("panel: a path", 400, 404, panel="../careful")
    yield chat("panel: a file", 400, 404, panel="/etc/passwd\0.json")
    yield chat("panel: empty", 400, 404, panel="")
    for name in (
        "nonsense",
        "prefworld:nonsense",
        "prefworld:",
        ":careful",
        "../prefworld",
        "prefworld\0",
        "PREFWORLD",
    ):
        yield chat(f"model: {name!r}", 400, 404, model=name)


def numbers() -> Iterator[Case]:
    """What JSON does not have, and what readers of it differ on."""
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e99999999999"):
        yield field("temperature", value, 400)
        yield field("knobs", f'{{"math": {value}}}', 400)
    yield field("top_p", "0." + "1" * 200_000, 200, 400)
    yield field("seed", "9" * 5_000, 400)
    yield field("seed", "-" + "9" * 100_000, 400)
    for value in ("01", "+1", "1.", ".5", "0x10", "1_000", "'1'", "True", "None", "undefined"):
        yield field("seed", value, 400)
    yield field("temperature", "1e-400", 200, 400, by="application")
    yield field("temperature", "-0.0", 200, 400, by="application")


def bodies() -> Iterator[Case]:
    """Bodies that are no JSON, or too much of it."""
    plain = json.dumps(BASE)
    yield written("empty", b"", 400)
    yield written("one brace", b"{", 400)
    yield written("a list", f"[{plain}]", 400)
    yield written("a text", '"Hello"', 400)
    yield written("null", "null", 400)
    yield written("a number", "1", 400)
    yield written("two objects", plain + plain, 400)
    yield written("a comment", plain[:-1] + "/* */}", 400)
    yield written("a comma too many", plain[:-1] + ",}", 400)
    yield written("cut short", plain[:-20], 400)
    yield written("quotes of Python", plain.replace('"', "'"), 400)
    yield written("a field twice", '{"model": "other", ' + plain[1:], 400)
    yield written("a field twice, further in", plain.replace('"content"', '"content": "", "content"'), 400)
    yield written("lists 33 deep", plain[:-1] + ', "user": ' + "[" * 33 + "]" * 33 + "}", 400)
    yield written("lists 100000 deep", plain[:-1] + ', "user": ' + "[" * 100_000 + "]" * 100_000 + "}", 400)
    yield written("lists without end", "[" * 500_000, 400)
    yield written("objects 100000 deep", '{"a":' * 100_000 + "1" + "}" * 100_000, 400)
    yield written("300000 empty objects", '{"a": [' + "{}," * 300_000 + "{}]}", 400, by="application")
    yield written("50000 fields", "{" + ", ".join(f'"f{n}": {n}' for n in range(50_000)) + "}", 400, by="application")
    yield written("five megabytes", b'{"a": "' + b"a" * 5_000_000 + b'"}', 413)
    yield written("five megabytes of blanks", b" " * 5_000_000, 413)
    yield written("UTF-16", plain.encode("utf-16"), 400)
    yield written("UTF-16 without a mark", plain.encode("utf-16-le"), 400)
    yield written("UTF-32", plain.encode("utf-32"), 400)
    yield written("a byte order mark", b"\xef\xbb\xbf" + plain.encode(), 400)
    yield written("Latin-1", plain.replace("Hello", "caf\xe9").encode("latin-1"), 400)
    yield written("null bytes", b"\0" * 1000, 400)
    yield written("a null byte in a text", plain.replace("Hello", "He\0llo"), 400)
    yield written("a line break in a text", plain.replace("Hello", "He\nllo"), 400)
    yield written("overlong UTF-8", plain.encode().replace(b"Hello", b"\xc0\xaf\xe0\x80\xaf"), 400)
    yield written("a surrogate as UTF-8", plain.encode().replace(b"Hello", b"\xed\xa0\x80"), 400)
    yield written("half a surrogate pair", plain.replace("Hello", "\\ud83d"), 400)
    yield written("a surrogate pair the wrong way round", plain.replace("Hello", "\\ude00\\ud83d"), 400)
    yield written("half a surrogate pair in a name", plain[:-1] + ', "\\udfff": 1}', 400)
    yield written("a surrogate pair", plain.replace("Hello", "\\ud83d\\ude00"), 200, by="application")
    yield written("an escape that there is not", plain.replace("Hello", "\\x41"), 400)
    yield written("code", "__import__('os').system('id')", 400)
    yield written("a pickle", b"\x80\x04cos\nsystem\n(S'id'\ntR.", 400)
    yield written("XML", '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', 400)


def headers() -> Iterator[Case]:
    """Types, lengths, hosts and origins."""
    for kind in ("text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        yield headed(f"content-type {kind}", 415, Content_Type=kind)
    yield headed("content-type in another encoding", 415, Content_Type="application/json; charset=utf-16")
    yield headed("content-type in UTF-7", 415, Content_Type="application/json; charset=utf-7")
    yield headed("content-type empty", 415, Content_Type="")
    yield make("no content-type", 415, by="guard", headers=(), body=b"{}")
    yield make("two content-types", 400, by="guard", headers=(JSON, ("Content-Type", "text/plain")), body=b"{}")
    for coding in ("gzip", "deflate", "br", "identity, gzip", "x"):
        yield headed(f"content-encoding {coding}", 415, Content_Encoding=coding)
    yield headed("a body of gigabytes, announced", 413, Content_Length=str(2**40))
    yield headed("a length without end", 400, Content_Length="9" * 30)
    yield headed("a negative length", 400, Content_Length="-1")
    yield headed("a length in words", 400, Content_Length="ten")
    yield make("no length", 411, by="guard", body=None)
    yield headed("another host", 403, Host="evil.example")
    yield headed("a host that begins right", 403, Host="localhost.evil.example")
    yield headed("a host of digits", 403, Host="2130706433")
    yield headed("an empty host", 403, Host="")
    yield headed("a page elsewhere", 403, Origin="http://evil.example")
    yield headed("a page in a sandbox", 403, Origin="null")
    yield headed("a page of a file", 403, Origin="file://")
    yield headed("a page at another port", 403, Origin="http://localhost:1", Sec_Fetch_Site="same-site")
    yield headed("a page that does not say where", 403, Sec_Fetch_Site="cross-site")
    yield make("two origins", 400, by="guard", headers=(JSON, ("Origin", "null"), ("Origin", "null")), body=b"{}")
    yield headed("a key where none is needed", 200, by="application", Authorization="Bearer " + "k" * 100)
    yield headed("a key of bytes", 200, 400, by="application", Authorization="Bearer \xff\xfe")
    yield make("two keys", 400, by="guard", headers=(JSON, ("Authorization", "a"), ("Authorization", "b")), body=b"{}")
    yield headed("a name for the request", 200, by="application", X_Request_Id="\tmine; drop")
    yield headed("what a proxy says", 200, by="application", X_Forwarded_For="1.2.3.4", X_Forwarded_Host="evil.example")
    yield headed("another method in a header", 200, by="application", X_HTTP_Method_Override="DELETE")
    yield headed("an upgrade to a websocket", 400, Upgrade="websocket")
    yield headed("languages without end", 431, Accept_Language="a," * 30_000)
    yield make("101 headers", 431, by="guard", headers=(JSON, *[("X-A", "b")] * 101), body=b"{}")


def paths() -> Iterator[Case]:
    """Paths and methods."""
    for path in (
        "/v1/models/nonsense",
        "/v1/knobs/nonsense",
        "/v1/nonsense",
        "/nonsense",
        "/v1",
        "/v1/chat/completions/",
    ):
        yield get(path, 404)
    for path in (
        "/v1/knobs/%252e%252e%252fmath",
        "/v1/models/prefworld%0",
        "/v1/knobs/" + "k" * 1500,
        "/v1/knobs/~root",
    ):
        yield get(path, 404)
    for path in ("/.env", "/.git/config", "/playground/app.py", "/playground/__init__.py", "/docs", "/redoc", "/admin"):
        yield get(path, 404)
    for path in (
        "/v1/knobs/../../etc/passwd",
        "/v1/knobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/knobs/..%5c..%5cetc",
        "/v1/knobs/math%00.safetensors",
        "/v1/knobs/math%0d%0aSet-Cookie:a=b",
        "/v1/knobs/%ff%fe",
        "/v1/knobs/%c0%ae%c0%ae%c0%af",
        "/v1/knobs/%ed%a0%80",
        "/playground/../app.py",
        "/playground/%2e%2e/run.py",
        "/playground/....//....//etc/passwd",
        "/playground//etc/passwd",
        "//etc/passwd",
        "//evil.example/v1/models",
        "/v1/models?key=secret",
        "/v1/knobs?id=" + "a" * 100,
        "http://evil.example/v1/models",
    ):
        yield get(path, 400, by="guard")
    yield get("/v1/knobs/" + "k" * 5_000, 414, by="guard")
    yield get("/?" + "q" * 5_000, 414, by="guard")
    for method in ("PATCH", "TRACE", "OPTIONS", "PROPFIND", "BREW", "get", "M" * 1000):
        yield get(CHAT, 405, by="guard", method=method)
    yield get("127.0.0.1:22", 405, by="guard", method="CONNECT")
    yield get(CHAT, 405)
    yield get("/v1/knobs", 403, by="guard", method="DELETE")
    yield get("/v1/knobs/math", 403, by="guard", method="DELETE")
    for name in ("math", "..%2fmath", "%2fetc%2fpasswd"):
        put = {"method": "PUT", "path": f"/v1/knobs/{name}", "headers": (BYTES,), "body": b"\x80\x04." * 100}
        yield make(
            f"PUT a pickle as {name} without a key",
            *((400,) if "." in name or "%" in name else (403,)),
            by="guard",
            **put,
        )
    yield make("GET with a body", 400, by="guard", method="GET", path="/v1/models", body=b"{}")
    yield make("POST where there is only GET", 405, path="/v1/models", body=b"{}")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\nConnection: close\r\n"


def wire() -> Iterator[Case]:
    """What is no HTTP, or could be taken for two requests."""
    yield raw("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)), 400)
    yield raw("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(24), 400, 405)
    yield raw("SSH", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400)
    yield raw("a random start", bytes(range(256)) * 4 + b"\r\n\r\n", 400)
    yield raw("empty lines", b"\r\n\r\n\r\n\r\n", 400, 408)
    yield raw("HTTP/0.9", b"GET /\r\n\r\n", 400)
    yield raw("HTTP/1.0 without a host", b"GET /v1/models HTTP/1.0\r\n\r\n", 403)
    yield raw("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: HOST\r\nConnection: close\r\n\r\n", 200, 400, 505, by="application")
    yield raw("no host", b"GET / HTTP/1.1\r\n\r\n", 400)
    yield raw("two hosts", b"GET / HTTP/1.1\r\nHost: HOST\r\nHost: evil.example\r\n\r\n", 400)
    yield raw(
        "line feeds alone", b"GET /v1/nonsense HTTP/1.1\nHost: HOST\nConnection: close\n\n", 400, 404, by="application"
    )
    yield raw("a blank before the colon", b"GET / HTTP/1.1\r\nHost : HOST\r\n\r\n", 400)
    yield raw("a null byte in a header", b"GET / HTTP/1.1\r\nHost: HOST\r\nA: \0\r\n\r\n", 400)
    yield raw("a blank in the path", b"GET /v1/models x HTTP/1.1\r\nHost: HOST\r\n\r\n", 400)
    yield raw("bytes in the path", b"GET /\xff\xfe HTTP/1.1\r\nHost: HOST\r\n\r\n", 400)
    yield raw("a header without a name", b"GET / HTTP/1.1\r\nHost: HOST\r\n: b\r\n\r\n", 400)
    yield raw("a header in pieces", b"GET / HTTP/1.1\r\n a: b\r\nHost: HOST\r\n\r\n", 400)
    yield raw(
        "a length and chunks",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        400,
    )
    yield raw("two lengths", HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400)
    yield raw("a list of lengths", HEAD + b"Content-Length: 2, 3\r\n\r\n{} ", 400)
    yield raw("chunks of chunks", HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400, 501)
    yield raw("another transfer coding", HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, 501)
    yield raw("a coding that is nearly chunked", HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400, 501)
    yield raw("a chunk without a size", HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n", 400)
    yield raw("a chunk of a negative size", HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n", 400)
    yield raw(
        "a chunk without end",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + b" " * 3_000_000,
        400,
        413,
    )
    yield raw(
        "chunks in HTTP/1.0",
        HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        400,
    )
    yield raw("an expectation, of gigabytes", HEAD + b"Expect: 100-continue\r\nContent-Length: 9999999999\r\n\r\n", 413)
    yield raw("headers in one piece", HEAD + b"A: b\r\n" * 50_000 + b"\r\n", 431)
    yield raw("a header without end", HEAD + b"Cookie: " + b"c" * 300_000, 431)
    yield raw("a path without end", b"GET /" + b"a" * 300_000, 431)
    yield raw("a method without end", b"G" * 300_000, 431)
    many = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    yield raw("chunks without end", HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + many * 60, 413)
    yield raw(
        "thousands of tiny chunks",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n",
        400,
    )


def slow() -> Iterator[Case]:
    """Clients that let the server wait: answered, or closed, in the time that it has patience."""
    yield raw("headers that stop", HEAD, 408)
    yield raw("a request line that stops", b"GET /v1/mod", 408)
    yield raw("headers byte by byte", HEAD * 9, 408, CLOSED, piece=1, pause=0.06)
    yield raw("a body that stops", HEAD + b"Content-Length: 1000\r\n\r\n{", 408)
    yield raw("chunks that stop", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408)
    yield raw("a body byte by byte", HEAD + b"Content-Length: 900\r\n\r\n" + b" " * 900, 408, piece=100, pause=0.5)


CASES: tuple[Case, ...] = tuple(
    chain(wrong_types(), messages(), knobs(), numbers(), bodies(), headers(), paths(), wire(), slow())
)


def main(base_url: str) -> int:
    found: Counter[bool] = Counter()
    for case in CASES:
        began = time.monotonic()
        status, message = send(base_url, case)
        good = right(case, status, message)
        found[good] += 1
        if not good:
            took = time.monotonic() - began
            print(f"{case.name}: {status} after {took:.1f} s, not {sorted(case.statuses)}: {message[:200]!r}")
    print(f"{found[True]} of {found.total()} are answered as is right.")
    return 1 if found[False] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
