"""Cold starts and files: what a new process takes to help, to import, and to load a knob."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours.steering import knob_of
from benchmarks.ways import Way, directly

HELP = "import sys; from trimtab.__main__ import main; sys.exit(main())"
"""What the installed command runs."""
LOAD = """
import sys, time
import trimtab
from trimtab.artifact import load_knob
begun = time.perf_counter()
load_knob(sys.argv[1])
print(time.perf_counter() - begun)
"""


def _python(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return done.stdout


def starting(_options: dict[str, Any]) -> dict[str, Way]:
    """Start a process that does nothing, that imports Trimtab, and that shows the command line's help."""
    ways = {"python": ("-c", "pass"), "import trimtab": ("-c", "import trimtab")}
    ways["trimtab --help"] = ("-c", HELP, "--help")
    return {name: directly(lambda words=words: _python(*words) and None) for name, words in ways.items()}


def loading(options: dict[str, Any]) -> dict[str, Way]:
    """Load a knob file in a new process, after the imports: a vector of `width` for each of `layers`."""
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "random.knob.safetensors"
    knob_of({layer: torch.randn(options["width"]) for layer in range(options["layers"])}).save(path)

    def run() -> float:
        assert folder  # kept as long as the way is
        return float(_python("-c", LOAD, str(path)))

    return {"load_knob": directly(run)}
