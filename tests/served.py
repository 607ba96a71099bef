"""A server in a process of its own, as users start it; tests and scripts share it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

SERVES = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 19)
"""Whether the server's own engine runs here."""
NEWER = "the server's engine wants transformers 5.19 or later, and says so"
PATIENCE = 120.0
"""Seconds until it has to listen."""


class Served:
    """A running `trimtab serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(PATIENCE) or not self.url:
            self.process.kill()
            self._reader.join(5)
            raise AssertionError("The server does not listen: " + "".join(self.lines)[-2000:])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"(?:Listening|running) on (http://\S+)", line)
            if found:
                self.url = found[1].rstrip("/.")
                self._listening.set()
        self._listening.set()

    @property
    def said(self) -> str:
        """Everything that it has written."""
        return "".join(self.lines)

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(how)
        status = self.process.wait(PATIENCE)
        self._reader.join(5)
        return status

    def memory(self) -> float:
        """Return the resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def served(*words: str, python: str = sys.executable, command: Sequence[str] = ()) -> Generator[Served]:
    """Run `trimtab serve` with these words on a free port, or another command that says where it listens."""
    whole = command or [python, "-m", "trimtab", "serve", *words, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
    ) as process:
        try:
            yield Served(process)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
