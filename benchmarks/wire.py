"""The driver's end of a worker: start it, ask it, start it again if it dies."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, Side

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


class WorkerDied(RuntimeError):
    """A worker ended without an answer, as when the system is out of memory."""


class Worker:
    """A process in one environment, with one number of threads."""

    def __init__(self, python: Path, side: Side, threads: int, log: Path) -> None:
        self.side: Side = side
        self._command = [str(python), "-m", "benchmarks.worker", side, str(threads)]
        count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self._environment = {**os.environ, **SETTINGS, **count}
        if side != OURS:
            self._environment.pop("PYTHONPATH", None)
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self._opened: dict[str, Any] | None = None

    def open(self, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Hold a case open; return its ways and the memory that the process has held, or `cannot`."""
        self._opened = {"do": "open", "kind": kind, "options": dict(options)}
        return self._try(self._opened)

    def run(self, way: str) -> dict[str, Any]:
        """Run a way once; return what was measured, or `cannot`, after which the case is open again."""
        return self._try({"do": "run", "way": way})

    def profile(self, way: str) -> str:
        """Return where the time of a way goes."""
        found = self._try({"do": "profile", "way": way})
        return str(found.get("text", found))

    def versions(self) -> dict[str, str]:
        """Return what the environment is made of."""
        return self.ask({"do": "versions"})

    def _try(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self.ask(request)
        except WorkerDied as death:
            if request["do"] != "open" and self._opened:
                self.ask(self._opened)
            return {"cannot": str(death)}

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer; raises `WorkerDied`."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = process.wait()
            self._process = None
            raise WorkerDied(f"the process ended with status {status}")
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[str]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                cwd=ROOT,
                text=True,
            )
        return self._process

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
