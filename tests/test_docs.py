"""The documentation site: it builds without a warning, off the network, and its lists hold all that the code has."""

from __future__ import annotations

import http.server
import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pytest

import trimtab
from trimtab import errors
from trimtab.cli import parsers

pytestmark = pytest.mark.skipif(not all(map(find_spec, ("material", "mkdocstrings"))), reason="needs the docs extra")

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = "/usr/bin/chromium"
# Nothing but this process's own files may be asked for: a socket that is opened ends the build.
OFFLINE = """
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("the build asks the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8")))


def test_the_index_of_errors_holds_the_whole_tree(site: Path) -> None:
    kinds = [name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert {name.lower() for name in kinds} <= anchors(site / "errors.html")


@pytest.mark.quick
def test_every_error_says_what_to_do() -> None:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if kind.__module__ == errors.__name__:
            assert len(inspect.cleandoc(kind.__doc__ or "").split("\n\n")) > 1, kind


def test_the_page_of_the_command_line_holds_every_verb_and_option(site: Path) -> None:
    by_verb, _ = parsers()
    _, *sections = re.split(r"^trimtab (\w+)¶$", text(site / "reference" / "cli.html"), flags=re.MULTILINE)
    said = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(said) == list(by_verb)
    for verb, parser in by_verb.items():
        refused = {"--json"} if verb == "serve" else set()  # known only to be refused in words
        assert set(parser.long_options()) - refused <= set(re.findall(r"--[\w-]+", said[verb])), verb


def test_the_page_of_the_api_holds_every_public_name(site: Path) -> None:
    known = {anchor.rpartition(".")[2] for anchor in anchors(site / "reference" / "api.html") if "." in anchor}
    assert set(trimtab.__all__) <= known


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's Chromium")
def test_pages_ask_nobody_but_their_own_server_and_fit_a_telephone(site: Path, address: str) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    wrong: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for file in sorted(site.rglob("*.html")):
            page.goto(address + file.relative_to(site).as_posix())
            if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
                wrong.append(f"{file.name} is wider than the screen")
        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(address + "index.html")
        page.fill("input[data-md-component=search-query]", "guardrail")
        page.wait_for_selector(".md-search-result__item")
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not wrong
