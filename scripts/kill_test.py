"""Kill `trimtab learn --checkpoint` and `trimtab tune --checkpoint` at random moments until they are done.

Prints for each verb how many lives it took, how many steps the kills cost, whether the command's result is the same,
byte for byte, as without a kill, and whether a broken file was ever seen. The exit status is 1 if anything was lost
but the step that ran, or if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trimtab.artifact.file import KnobFile, read_file
from trimtab.checkpoint import remove

# A life is the command line as a user starts it, in a process of its own, but for a note of every step that it begins.
LIFE = """
import sys, time
from trimtab.checkpoint import Checkpoint
from trimtab.cli import main

steps, take = open(sys.argv[1], "a"), Checkpoint._take

def noted(kept, name, compute, *how):
    def begin():
        print(time.time(), name, file=steps, flush=True)
        return compute()
    return take(kept, name, begin, *how)

Checkpoint._take = noted
sys.exit(main(sys.argv[2:]))
"""


def command(verb: str, model: str, folder: Path, pairs: int, budget: int) -> list[str]:
    """Return a command that takes some seconds in many steps; --out and --checkpoint are left out."""
    if verb == "learn":
        return ["learn", model, f"prefworld:math:{pairs}", "--token-budget", str(budget), "--last", "1.0"]
    words = ["tune", model, "--knob", str(folder / "learn.whole.knob"), "--pairs", "prefworld:math:24"]
    words += ["--task", "prefworld:math:16", "--guardrail", "prefworld:facts:8", "--budget", "1"]
    return [*words, "--broken-budget", "1", "--gains", "0.1,0.3", "--agreement", "-1"]


def live(words: list[str], log: Path, seconds: float | None) -> bool:
    """Run a command, killed after some seconds; True if it was done before. A command that fails ends this script."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", LIFE, str(log), *words], text=True, **quiet) as process:
        try:
            complaint = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return False
    if process.returncode:
        sys.exit(f"The command failed with status {process.returncode}: {complaint}")
    return True


def begun(log: Path) -> list[float]:
    """Return when each step was begun, once for each time that it was."""
    return [float(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def essence(file: KnobFile) -> tuple[object, ...]:
    """Return a knob file without the times at which it was made, and the checksum over them."""
    header = json.loads(json.dumps(file.header))
    header.pop("sha256")
    for part, when in (("provenance", "created"), ("tuning", "seconds")):
        (header.get(part) or {}).pop(when, None)
    return header, {name: tensor.numpy().tobytes() for name, tensor in file.tensors.items()}


def trial(words: list[str], verb: str, folder: Path, kills: int, dice: random.Random) -> bool:
    """Run one command whole, and then through kills; print what came out; True if nothing was lost."""
    whole, out, kept = folder / f"{verb}.whole.knob", folder / f"{verb}.knob", folder / f"{verb}.kept"
    log, timed = folder / f"{verb}.steps", folder / f"{verb}.timed"
    start = time.time()
    live([*words, "--out", str(whole)], timed, None)
    span, steps, ready = time.time() - start, len(begun(timed)), begun(timed)[0] - start

    again = jobs = died = lives = working = seen = 0
    same = nothing_more = True
    while died < kills:
        jobs, lost = jobs + 1, 0
        log.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        while True:
            lives, before = lives + 1, len(begun(log))
            # From shortly before the first step, with a quarter of the work at most, so that a job dies several times.
            moment = dice.uniform(0.8 * ready, ready + (span - ready) / 4) if died + lost < kills else None
            if live([*words, "--out", str(out), "--checkpoint", str(kept)], log, moment):
                break
            lost += 1
            working += len(begun(log)) > before
            if out.exists():  # on its way out: the job is done, and its knob must be whole
                seen += 1
                remove(kept)
                break
        died += lost
        cost = len(begun(log)) - steps
        again, nothing_more = again + cost, nothing_more and 0 <= cost <= lost
        same &= essence(read_file(out)) == essence(read_file(whole)) and not kept.exists()
    print(
        f"{verb}: {steps} steps, {span:.1f} s without a kill ({ready:.1f} s to the first step); {died} kills "
        f"({working} after a step had begun, {seen} after the knob was written), {jobs} jobs, {lives} lives; "
        f"{again} steps run again; "
        f"{'same bytes as without a kill, folder gone' if same else 'THE RESULT DIFFERS'}",
        flush=True,
    )
    return same and nothing_more


def main() -> None:
    """Try both verbs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="for each verb (default 20)")
    parser.add_argument("--model", default="prefworld", help="as for trimtab learn (default prefworld)")
    parser.add_argument("--pairs", type=int, default=200, help="to learn from (default 200)")
    parser.add_argument("--token-budget", type=int, default=512, help="of a batch of learn (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [
            trial(command(verb, args.model, folder, args.pairs, args.token_budget), verb, folder, args.kills, dice)
            for verb in ("learn", "tune")
        ]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
