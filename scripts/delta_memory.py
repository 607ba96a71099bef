"""Subtract two checkpoints of 2 GB in shards of 500 MB: how much memory it takes, and what a kill leaves behind.

Prints the largest anonymous memory of the subtracting process over that of its imports alone, and after each of several
kills at random moments what lies in the output folder. The exit status is 1 if more than `--limit` was taken, or if a
file of the knob's name was there before the knob was whole.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.artifact import DeltaKnob
from trimtab.errors import KnobError

IMPORTS = "import sys, time; from trimtab.weights import difference; print('ready', flush=True); sys.stdin.readline()"
WORK = "difference(sys.argv[1], sys.argv[2], name='delta', dtype='bfloat16', out=sys.argv[3])"
MB = 1 << 20


def checkpoint(folder: Path, size: int, seed: int) -> None:
    """Write a random model of about `size` bytes in float32, in shards of 500 MB."""
    width = 1024
    block = 4 * (4 * width * width + 3 * width * 4 * width)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=max(1, (size - 2 * 4 * 32_000 * width) // block),
        num_attention_heads=8,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def anonymous(pid: int) -> int:
    """Return the anonymous memory of a process in bytes; mapped files are the system's to drop."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def start(plus: Path, minus: Path, out: Path) -> subprocess.Popen[str]:
    """Start a process that has done its imports and waits for a line before it subtracts."""
    words = [sys.executable, "-c", f"{IMPORTS}; {WORK}", str(plus), str(minus), str(out)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    """Let a started process subtract."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def main() -> int:
    """Make the checkpoints, measure one whole run, and kill some more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2000, metavar="MB", help="of each checkpoint (default 2000)")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--limit", type=int, default=1024, metavar="MB", help="anonymous memory allowed (default 1024)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = False
    with tempfile.TemporaryDirectory(prefix="trimtab-delta-") as scratch:
        folder = Path(scratch)
        for seed, name in enumerate(("plus", "minus")):
            checkpoint(folder / name, args.size * 1_000_000, seed)
            shards = sorted(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
            print(f"{name}: {sum(shards) / MB:.0f} MB in {len(shards)} shards of at most {shards[-1] / MB:.0f} MB")
        out = folder / "out" / "delta.knob.safetensors"
        out.parent.mkdir()
        process = start(folder / "plus", folder / "minus", out)
        baseline, peak, begun = anonymous(process.pid), 0, time.perf_counter()
        go(process)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        knob = DeltaKnob.load(out)
        print(f"subtracted {len(knob.parts)} tensors in {seconds:.1f} s; knob of {out.stat().st_size / MB:.0f} MB")
        print(f"anonymous memory: imports {baseline / MB:.0f} MB, at most {(peak - baseline) / MB:.0f} MB above that")
        wrong |= process.returncode != 0 or peak - baseline > args.limit * MB
        draw = random.Random(args.seed)
        for _ in range(args.kills):
            out.unlink(missing_ok=True)
            process, moment = start(folder / "plus", folder / "minus", out), draw.uniform(0, seconds)
            go(process)
            time.sleep(moment)
            process.kill()
            process.wait()
            whole = "no knob"
            if out.exists():
                try:
                    whole = f"a whole knob of {len(DeltaKnob.load(out).parts)} tensors"
                except KnobError as error:
                    whole, wrong = f"a broken knob: {error}", True
            left = sorted(path for path in out.parent.iterdir() if path != out)
            print(f"killed after {moment:.1f} s: {whole}, and {len(left)} part {[path.name for path in left]}")
            for path in left:
                path.unlink()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
