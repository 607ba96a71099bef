"""A hub of our own on loopback: the part of the Hugging Face hub's HTTP protocol that pushing and pulling use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_fakefakefakefakefakefakefakefake"


@dataclass
class Repo:
    """Branches of commits, newest last; a commit is its message with all files after it."""

    private: bool = False
    gated: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=lambda: {"main": []})

    def commit(self, message: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit of files, those of the one before included, and return its hash."""
        before = self.branches[branch][-1][1] if self.branches[branch] else {}
        self.branches[branch].append((message, {**before, **files}))
        return self.sha(branch)

    def sha(self, branch: str) -> str:
        return _sha(repr(self.branches[branch]).encode())

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return hash and files of a branch or of a branch's newest commit."""
        for branch, commits in self.branches.items():
            if revision in (branch, self.sha(branch)):
                return self.sha(branch), commits[-1][1] if commits else {}
        return None


@dataclass
class Hub:
    """`requests` keeps method and path of what came; `refuse` answers a path that matches with (status, code, text).

    Repositories named in `regular` take every file within the commit, the others the large ones before it.
    A `page` is the answer to everything.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    regular: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    visits: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    page: bytes | None = None
    url: str = ""


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Refusal(Exception):
    """Ends a request with a status, an error code of the hub's, and a text."""

    def __init__(self, status: int, code: str = "", text: str = "") -> None:
        self.status, self.code, self.text = status, code, text


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for pattern, refusal in self.hub.refuse.items():
                if re.search(pattern, f"{self.command} {path}"):
                    raise Refusal(*refusal)
            self.route(path, body)
        except Refusal as stop:
            self.send(json.dumps({"error": stop.text}).encode(), stop.status, {"X-Error-Code": stop.code})

    def route(self, path: str, body: bytes) -> None:
        if self.hub.page is not None:
            return self.send(self.hub.page)
        writes = self.command in ("POST", "PUT") and not path.startswith("/blobs/")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not known:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if writes and not known:
            raise Refusal(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.json({"warnings": [], "errors": []})
        if found := re.fullmatch(r"/blobs/(\w+)", path):
            self.hub.stored[found[1]] = body
            return self.send(b"")
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit|branch)/(.+))?", path):
            repo = self.repo(found[1], known)
            action = {"preupload": self.preupload, "commit": self.commit, "branch": self.branch}.get(found[2])
            return self.info(found[1], repo, found[3]) if action is None else action(found[1], repo, found[3], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(self.repo(found[1], known), found[2], found[3])
        raise Refusal(404, "", "no such page")

    def repo(self, name: str, known: bool) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        return repo

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            raise Refusal(409, "", "You already created this model repo")
        # Older clients say `private`, newer ones `visibility`.
        self.hub.repos[name] = repo = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.json({"url": f"{self.hub.url}/{name}"})

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repo.find(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def info(self, name: str, repo: Repo, revision: str | None) -> None:
        sha, files = self.at(repo, revision or "main")
        siblings = [{"rfilename": file} for file in files]
        self.json({"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def preupload(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        self.at(repo, revision)
        files = [entry["path"] for entry in json.loads(body)["files"]]
        modes = [
            "lfs" if name not in self.hub.regular and file.endswith((".safetensors", ".png")) else "regular"
            for file in files
        ]
        entries = [
            {"path": file, "uploadMode": mode, "shouldIgnore": False} for file, mode in zip(files, modes, strict=True)
        ]
        self.json({"files": entries})

    def batch(self, asked: dict[str, Any]) -> None:
        assert asked["operation"] == "upload"
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, self.at(repo, revision)[0]):
            raise Refusal(412, "", "The branch has moved")
        files: dict[str, bytes] = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                data = self.hub.stored[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                assert len(data) == value["size"]
            else:
                assert operation["key"] == "file", operation["key"]
                data = base64.b64decode(value["content"])
            files[value["path"]] = data
        sha = repo.commit(header["value"]["summary"], files, revision)
        self.hub.visits.append({"repo": name, "header": header["value"], "keys": {o["key"] for o in operations}})
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def branch(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        repo.branches[revision] = list(repo.branches["main"])
        self.json({})

    def resolve(self, repo: Repo, revision: str, file: str) -> None:
        if repo.gated:  # what it holds is told to everybody, and given to some
            raise Refusal(403, "GatedRepo", "Access to this model is restricted")
        sha, files = self.at(repo, revision)
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        self.send(files[file], headers={"ETag": f'"{_sha(files[file])}"', "X-Repo-Commit": sha})

    def json(self, content: object) -> None:
        self.send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):
                self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """Answer as a hub until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True  # connections that a client keeps open
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
