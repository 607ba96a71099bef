"""An OpenAI-compatible endpoint of our own on loopback, for tests of the judge."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | None | tuple[int, dict[str, str], Any]
"""What the endpoint says: the text of a completion, or a status with headers and a body."""


@dataclass
class Endpoint:
    """`say` gets the two answers in the order in which they were shown; `requests` keeps what came."""

    say: Callable[[str, str], Reply] = lambda first, second: "VERDICT: TIE"
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve() -> Iterator[Endpoint]:
    """Answer chat completions until the context ends."""
    there = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            there.requests.append((dict(self.headers), body))
            parts = re.findall(r"\[answer [AB] (\w+)\]\n(.*?)\n\[end \1\]", body["messages"][1]["content"], re.DOTALL)
            said = there.say(parts[0][1], parts[1][1])
            if isinstance(said, tuple):
                status, headers, reply = said
            else:
                message = {"role": "assistant", "content": said}
                usage = {"prompt_tokens": 100, "completion_tokens": 5}
                status, headers = 200, {}
                reply = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
            data = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(ConnectionError):  # a caller that has given up
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    there.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
