"""Remake the bundled model and its scorecard, or a sister of it: `python -m trimtab.prefworld.build`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from trimtab.prefworld.scorecard import scorecard
from trimtab.prefworld.train import Recipe, Shape

SHIPPED = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def corpus_hash() -> str:
    """Return the sha256 over the files that generate the corpus; a frozen corpus keeps it."""
    home = Path(__file__).parent
    names = ["items.py", "words.py", "habits.py", "corpus.py", "tokenizer.py"]
    files = [home / name for name in names] + sorted((home / "families").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def weights_hash(folder: Path) -> str:
    """Return the sha256 of a model folder's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def train_in_processes(out: Path, recipe: Recipe, device: str) -> None:
    """Run the trainer, on a CPU with one single-threaded process per core; a killed run goes on where it was."""
    command = [sys.executable, "-m", "trimtab.prefworld.train", "--out", str(out), "--steps", str(recipe.steps)]
    command += ["--seed", str(recipe.seed), "--shape", recipe.shape]
    workers = 1 if device != "cpu" else min(os.cpu_count() or 1, 4)
    if workers > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    subprocess.run([*command, "--device", device], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ship(run: Path, into: Path) -> None:
    """Copy weights, configuration, tokenizer and chat template of a finished run."""
    into.mkdir(parents=True, exist_ok=True)
    for name in (*SHIPPED, "chat_template.jinja"):
        if (run / name).exists():
            shutil.copy2(run / name, into / name)
            (into / name).chmod(0o644)


def main() -> None:
    """Train (or take up again), measure, and place the model in the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="where training keeps its state (default runs/prefworld-SHAPE-SEED)")
    parser.add_argument("--into", type=Path, help="for the model; the first of its kind goes into the package")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--shape", choices=get_args(Shape), default=Recipe.shape)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=100, help="items of every measure of the scorecard")
    parser.add_argument("--measure-only", action="store_true", help="only measure the model that is in place")
    args = parser.parse_args()
    recipe = Recipe(args.shape, steps=args.steps, seed=args.seed)
    bundled = (recipe.shape, recipe.seed) == (Recipe.shape, Recipe.seed)
    if args.into is None and not bundled:
        parser.error("--into is needed for another seed or shape: the package holds one model")
    into = args.into or Path(__file__).parent / "model"
    if not args.measure_only:
        run = args.run or Path(f"runs/prefworld-{recipe.shape}-{recipe.seed}")
        train_in_processes(run, recipe, args.device)
        ship(run, into)
    card: dict[str, Any] = {"corpus": corpus_hash(), "weights": weights_hash(into), "n": args.n}
    card["families"] = scorecard(str(into), n=args.n)
    (into / "scorecard.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
