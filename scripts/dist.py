"""Build the sdist and the wheel into dist/, check what they hold, and try the wheel in an environment of its own.

    python scripts/dist.py [--demo]

The wheel must hold the package's files and nothing else, come out the same from the sdist as from the tree, and work
from a folder that is not the repository: import, help, an answer under a knob, what to install where an extra is
missing, and with --demo the whole demo. Needs the packages build and twine; the environment is build/dist/env.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "build" / "dist"
SOURCES = ROOT / "src"
INFO = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}

KNOB = """
import trimtab
from trimtab.prefworld import world
model, tokenizer = trimtab.load("prefworld")
pairs = world.pairs("math")
trimtab.learn(model, tokenizer, pairs, positions="demonstrated", layers=[4]).save("math.knob.safetensors")
"""
MISSING = {
    ("serve", "prefworld"): "serve",
    ("bench", "serve", "http://127.0.0.1:9"): "serve",
    (
        "compose",
        "prefworld",
        "--knob",
        "math.knob.safetensors",
        "--prefer",
        "prefworld:math",
        "--out",
        "p.json",
    ): "compose",
    ("train", "dpo", "prefworld", "prefworld:math", "--out", "trained"): "train",
}
"""Commands that need an extra, and its name."""


def main() -> None:
    """Build both, and try the wheel; what was in dist/ is deleted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", action="store_true", help="run the whole demo too, which takes minutes")
    args = parser.parse_args()
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT)])  # the wheel from the sdist
    run([sys.executable, "-m", "build", "--wheel", "--outdir", str(WORK), str(ROOT)])  # and from the tree
    (wheel,), (again,) = DIST.glob("*.whl"), WORK.glob("*.whl")
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir())])
    check_content(wheel, again)
    print(f"{wheel.name} holds the {len(package_files())} files of the package, and is the same from the sdist.")
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel, Path(folder), demo=args.demo)
    print("The wheel works from an environment of its own.")


def check_content(wheel: Path, again: Path) -> None:
    """End with a message unless both wheels hold the package's files and their own description, and nothing else."""
    first, second = contents(wheel), contents(again)
    if first != second:
        sys.exit(f"The wheel differs from the sdist's in {sorted(dict(first.items() ^ second.items()))[:5]}.")
    info = f"{wheel.name.partition('-py3')[0]}.dist-info"
    wanted = package_files() | {f"{info}/{name}" for name in INFO}
    if first.keys() != wanted:
        sys.exit(f"The wheel lacks {sorted(wanted - first.keys())}, and holds {sorted(first.keys() - wanted)} beside.")


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel with their bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def package_files() -> set[str]:
    """Return the files of the package that are kept in the repository."""
    listed = subprocess.run(["git", "ls-files", "trimtab"], cwd=SOURCES, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def try_out(wheel: Path, outside: Path, *, demo: bool) -> None:
    """Install the wheel into an empty environment, and use it from a folder outside the repository."""
    environment = WORK / "env"
    run([sys.executable, "-m", "venv", str(environment)])
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    run([*install, "torch"])
    run([*install, str(wheel)])
    trimtab = str(environment / "bin" / "trimtab")

    place = used(outside, python, "-c", "import trimtab; print(trimtab.__file__)").stdout.strip()
    if not Path(place).is_relative_to(environment):
        sys.exit(f"The environment imports trimtab from {place}.")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if used(outside, trimtab, "--version").stdout != f"trimtab {version}\n":
        sys.exit("trimtab --version says something else than pyproject.toml.")
    used(outside, trimtab, "--help")
    used(outside, python, "-c", KNOB)
    question = "Gus carries 3 bags that hold 8 bricks each. Gus uses up 15 of them. How many bricks are left?"
    answered = used(outside, trimtab, "generate", "prefworld", question, "--knob", "math.knob.safetensors", "--json")
    print("An answer under a knob:", json.loads(answered.stdout))
    for words, extra in MISSING.items():
        told = used(outside, trimtab, *words, status=2).stderr
        if not re.search(rf"pip install .*\[{extra}\]", told):
            sys.exit(f"trimtab {' '.join(words)} does not say how to install what it needs: {told}")
    if demo:
        used(outside, trimtab, "demo", "--json", "--out", "demo")


def used(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would who has never seen the repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != status:
        sys.exit(f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def run(words: list[str]) -> None:
    """Run a command; its failure ends this one."""
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
