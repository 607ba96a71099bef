"""What was measured of a case so far, kept after every round, so that a stopped run is taken up again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from trimtab.files import write_atomically

WAITED = ("start", "load")


@dataclass
class State:
    """The rounds of one case with one number of threads."""

    case: str
    threads: int
    about: dict[str, str]
    """Section, description, and the axis of a plot."""
    spec: dict[str, Any]
    wanted: int
    """Rounds that are to be measured."""
    date: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """By side and way: seconds, memory, a mark of what came out."""
    bases: dict[str, str] = field(default_factory=dict[str, str])
    """By side: the way that its others are divided by."""
    cannot: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """By side and way: why it was not measured."""
    before: dict[str, float] = field(default_factory=dict[str, float])
    """By side: the most memory held before anything was run, in MB."""
    versions: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    load: list[float] = field(default_factory=list[float])
    """Processes that wanted to run, before each round."""

    @property
    def done(self) -> bool:
        """True when nothing is left to measure."""
        return len(self.rounds) >= self.wanted

    @property
    def clock(self) -> str:
        """Which seconds count: the processor's where it works alone, which others on the machine disturb least.

        What is waited for, such as a start, is measured by the clock on the wall.
        """
        alone = self.threads == 1 and self.spec["options"]["device"] == "cpu" and self.spec["kind"] not in WAITED
        return "cpu" if alone else "wall"

    def save(self, folder: Path) -> None:
        """Keep it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.date = datetime.now(UTC).date().isoformat()
        path = file_of(folder, self.case, self.threads)
        write_atomically(path, json.dumps(asdict(self), indent=1).encode())


def file_of(folder: Path, case: str, threads: int) -> Path:
    """Return where a case is kept."""
    return folder / f"{case}.{threads}.json"


def take_up(folder: Path, case: Case, threads: int, wanted: int) -> State:
    """Return what is kept of a case, if it was measured as it would be now, or else an empty state."""
    path = file_of(folder, case.name, threads)
    spec = json.loads(json.dumps(case.spec))
    about = {"section": case.section, "about": case.about, "curve": case.curve}
    if path.exists():
        kept: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["spec"] == spec:
            return State(**{**kept, "about": about, "wanted": wanted})
    return State(case.name, threads, about, spec, wanted)


def all_kept(folder: Path) -> list[State]:
    """Return every case that has rounds."""
    found = [State(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.*.json"))]
    return [state for state in found if state.rounds]
