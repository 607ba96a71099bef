"""Show that two checkpoints are subtracted in little memory, and that a kill at any time leaves no half knob.

Makes two random checkpoints of about 2 GB each in a temporary folder, subtracts them in a process of its own, and
prints the most anonymous memory (RssAnon: what is no page of a file) it held beyond what its imports hold. Then kills
that process at random moments. The exit status is 1 if it took more than a gigabyte, if a file stood in the knob's
place that is no whole knob, or if anything but the named leftovers lay beside it. Linux only.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.artifact import DeltaKnob

CHILD = """
import sys
from trimtab.weights import difference
print("ready", flush=True)
sys.stdin.readline()
difference(sys.argv[1], sys.argv[2], name="difference", out=sys.argv[3])
"""


class Run(NamedTuple):
    """How a process ended (None: it was killed), its seconds, and its anonymous bytes after its imports and at most."""

    status: int | None
    seconds: float
    imported: int
    peak: int


def make_checkpoints(folder: Path, layers: int, vocabulary: int) -> list[Path]:
    """Save two random models of one shape, in shards."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=False,
    )
    made: list[Path] = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(folder / str(seed))
        LlamaForCausalLM(config).save_pretrained(made[-1], max_shard_size="500MB")
        size = sum(file.stat().st_size for file in made[-1].iterdir())
        print(f"{made[-1].name}: {size / 1e9:.2f} GB in {len([*made[-1].glob('*.safetensors')])} shards", flush=True)
    return made


def anonymous(pid: int) -> int:
    """Return the anonymous bytes of a process that are in memory; 0 if it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def subtract(sources: list[Path], out: Path, limit: float = 3600) -> Run:
    """Subtract in a process of its own, which is killed after some seconds; look at its memory all the time."""
    command = [sys.executable, "-c", CHILD, *map(str, sources), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            sys.exit("The imports failed.")
        imported = peak = anonymous(child.pid)
        begun = time.monotonic()
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None and time.monotonic() - begun < limit:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.002)
        seconds, status = time.monotonic() - begun, child.poll()
        child.kill()
    return Run(status, seconds, imported, peak)


def whole(out: Path, sources: list[Path]) -> bool:
    """Tell whether a knob file loads and its first weight is the difference of the sources'."""
    knob = DeltaKnob.load(out)
    name = next(iter(knob.parts))
    plus, minus = (read(source, name) for source in sources)
    return torch.equal(knob.dense(name), plus.float() - minus.float())


def read(folder: Path, name: str) -> torch.Tensor:
    """Return a weight of a sharded checkpoint."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            if name in shard.keys():  # noqa: SIM118  # no mapping
                return shard.get_tensor(name)
    raise KeyError(name)


def killed(sources: list[Path], folder: Path, kills: int, seconds: float, dice: random.Random) -> bool:
    """Kill the subtraction at random moments, with and without an older knob in the place; True if all is well."""
    out, fine, alive, leftovers = folder / "killed.knob.safetensors", True, 0, 0
    old = folder / "old.knob.safetensors"
    DeltaKnob("old", "none", {"weight": torch.ones(2)}).save(old)
    for turn in range(kills):
        before = old.read_bytes() if turn % 2 else None
        if before is not None:
            out.write_bytes(before)
        status = subtract(sources, out, dice.uniform(0, seconds)).status
        alive += status is None
        if status is None and out.exists() and (before is None or out.read_bytes() != before):
            fine &= whole(out, sources)  # killed after the rename, while it was read back
        elif status is None:
            fine &= out.exists() == (before is not None)
        else:
            fine &= status == 0 and whole(out, sources)
        parts = [*folder.glob(".killed.knob.safetensors.*.part")]
        leftovers += len(parts)
        for file in (out, *parts):
            file.unlink(missing_ok=True)
    strange = sorted({file.name for file in folder.iterdir()} - {"0", "1", old.name})
    print(f"{alive} kills, {kills - alive} runs done before; {leftovers} leftovers named .NAME.XXXXXXXX.part, deleted")
    if strange or not fine:
        print(f"BROKEN: {'a knob was not whole' if not fine else strange}")
    return fine and not strange


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=5, help="of the checkpoints (default 5)")
    parser.add_argument("--vocabulary", type=int, default=64000, help="so that one tensor is large (default 64000)")
    parser.add_argument("--kills", type=int, default=8, help="(default 8)")
    parser.add_argument("--limit", type=float, default=1.0, help="GB of anonymous memory (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = make_checkpoints(folder, args.layers, args.vocabulary)
        out = folder / "whole.knob.safetensors"
        run = subtract(sources, out)
        took, right = (run.peak - run.imported) / 1e9, run.status == 0 and whole(out, sources)
        print(
            f"subtracted in {run.seconds:.1f} s to {out.stat().st_size / 1e9:.2f} GB: {run.imported / 1e9:.3f} GB "
            f"anonymous after the imports, at most {run.peak / 1e9:.3f} GB, so {took:.3f} GB for the difference",
            flush=True,
        )
        out.unlink()
        fine = killed(sources, folder, args.kills, run.seconds, random.Random(args.seed))
    sys.exit(not (right and fine and took <= args.limit))


if __name__ == "__main__":
    main()
