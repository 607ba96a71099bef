"""A stand-in for `trimtab serve` on loopback, for tests of the playground: its interface, and answers without a model.

Prints its address and serves until it is stopped: `python playground_server.py [SECONDS PER TOKEN]`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

PAGE = files("trimtab") / "serve" / "page"
KINDS = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
LENGTH = 512

STRENGTHS = [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]
CURVES: dict[str, dict[str, Any]] = {
    "math": {
        "strengths": STRENGTHS,
        "score": [0.033, 0.017, 0.2, 0.983, 0.983, 0.983],
        "guardrails": {"copying": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "facts": [1.0, 1.0, 1.0, 1.0, 1.0, 0.65]},
        "broken": [0.0, 0.0, 0.0, 0.0, 0.0, 0.007],
        "kl": [0.00198, 0.0, 0.00019, 0.00143, 0.0181, 0.1389],
    },
    "concise": {
        "strengths": STRENGTHS,
        "score": [0.1, 0.35, 0.6, 0.85, None, 0.4],
        "guardrails": {"copying": [0.9, 1.0, 1.0, 0.95, 0.7, 0.3]},
        "broken": [0.0, 0.0, 0.0, 0.05, 0.3, 0.8],
        "kl": [0.3, 0.0, 0.04, 0.18, 0.6, 1.4],
    },
    "plain": {},
}
RANGES: dict[str, list[float]] = {"math": [-1.0, 1.5], "concise": [-0.98, 1.03]}
PANELS = {"careful": {"math": 1.0, "concise": -0.5}, "short": {"concise": 1.0}}
WORKED = "Start with 12 pens. Then add 13 more pens. 12 + 13 = 25. "
MORE = "One can check it the other way round: 25 - 13 = 12, and that is where it started. "


def knob(name: str) -> dict[str, Any]:
    about = {"kind": "steering", "method": "palrs", "where": "prompt", "layer": 4, "layers": [4], "gain": 0.3}
    return {"id": name, "object": "knob", **about, "safe_range": RANGES.get(name), "projects": True}


def answer(knobs: dict[str, float]) -> list[str]:
    """Say more under `math` and less under `concise`, as tokens."""
    text = WORKED * (knobs.get("math", 0) >= 0.5) + MORE * (knobs.get("concise", 0) < 0)
    last = "25." if knobs.get("concise", 0) >= 0.5 else "The answer is 25."
    return re.findall(r" ?\w+| ?[^\w\s]|\s", text + last)


def projections(tokens: list[str], start: int, knobs: dict[str, float]) -> dict[str, Any]:
    along = {
        name: [round(0.4 * knobs.get(name, 0) + 0.3 * math.sin(start + i + len(name)), 4) for i in range(len(tokens))]
        for name in CURVES
    }
    return {"tokens": tokens, "knobs": along}


class Handler(BaseHTTPRequestHandler):
    pause = 0.0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix("/playground/") if path.startswith("/playground/") else "index.html"
        lists: dict[str, dict[str, Any]] = {
            "/v1/models": listed([model(None), *map(model, PANELS)]),
            "/v1/knobs": {"dose": "strict", **listed([knob(name) for name in CURVES])},
            "/v1/panels": listed([{"id": name, "object": "panel", "knobs": knobs} for name, knobs in PANELS.items()]),
            **{
                f"/v1/knobs/{name}": knob(name)
                | {"card": f"knob   {name}\nsite   4/demonstrated", "dose_response": curve or None}
                for name, curve in CURVES.items()
            },
        }
        if path in lists:
            self.reply(200, "application/json", json.dumps(lists[path]).encode())
        elif (path == "/" or path.startswith("/playground/")) and (file := PAGE / name).is_file():
            self.reply(200, KINDS[name.rpartition(".")[2]], file.read_bytes())
        else:
            self.refuse(404, f"There is nothing at {path}.", None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        knobs: dict[str, float] = body.get("knobs", {})
        outside = [name for name, strength in knobs.items() if not within(name, strength)]
        if outside:
            self.refuse(400, f"The strength of {outside[0]} is outside its safe range.", "knobs")
        elif len(body["messages"][-1]["content"].split()) > LENGTH:
            self.refuse(400, f"The prompt is longer than the model's {LENGTH} tokens.", "messages")
        else:
            self.write(body, knobs)

    def write(self, body: dict[str, Any], knobs: dict[str, float]) -> None:
        self.head(200, "text/event-stream")
        tokens = answer(knobs)[: body["max_tokens"]]
        for i, token in enumerate(tokens):
            time.sleep(self.pause)
            choice: dict[str, Any] = {"index": 0, "delta": {"content": token}, "finish_reason": None}
            if body.get("projections"):
                choice["projections"] = projections([token], i, knobs)
            self.event({"knobs": knobs, "choices": [choice]})
        end = "length" if len(tokens) < len(answer(knobs)) else "stop"
        self.event({"knobs": knobs, "choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def refuse(self, status: int, message: str, param: str | None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        self.reply(status, "application/json", json.dumps({"error": error}).encode())

    def reply(self, status: int, kind: str, data: bytes) -> None:
        self.head(status, kind)
        self.wfile.write(data)

    def head(self, status: int, kind: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a reader that has stopped
            super().handle_error(request, client_address)


def listed(data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": data}


def model(panel: str | None) -> dict[str, Any]:
    name = "prefworld" if panel is None else f"prefworld:{panel}"
    about = {"object": "model", "created": 1764000000, "owned_by": "trimtab", "max_model_len": LENGTH}
    return {"id": name, **about, "panel": panel}


def within(name: str, strength: float) -> bool:
    low, high = RANGES.get(name, [0.0, 0.0])
    return low <= strength <= high


if __name__ == "__main__":
    Handler.pause = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()
