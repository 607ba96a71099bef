"""Load mutated knob files for as long as you like: each is refused with a KnobError, or is a sound knob.

    python scripts/fuzz_artifact.py --seconds 60 --seed 0

Half of the files are changed at random; the others get their checksum renewed after the change, so that what stands
behind the checksum is tried as well. Prints how many cases ran and what became of them; exits with 1, and names the
seed of the case and the file that is kept, where one was neither refused nor sound.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import hostile
from trimtab.artifact import Knob
from trimtab.errors import KnobError

LEAVES: list[Any] = [None, True, False, 0, 1, -1, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-310, 1e308, "", "1", "x" * 300]
LEAVES += ["1/last", "2/last", "all", "add", "ablate", "steering", "F32", "vector/1/last", *hostile.NAMES.values()]
TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"NaN", b"1e999", b"\xff", b"\\ud800", b"9" * 5000]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Draw any JSON value."""
    choice = rng.random()
    if depth > 3 or choice < 0.7:
        return rng.choice(LEAVES)
    parts = [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return parts if choice < 0.85 else {str(rng.choice(LEAVES)): part for part in parts}


def edited(rng: random.Random, data: bytes) -> bytes:
    """Change some bytes: replace, insert, delete, repeat, swap, cut, or splice tokens of JSON in."""
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        span = data[a : min(b, a + rng.choice([1, 2, 4, 8, 64, 4096]))]
        rest = data[a + len(span) :]
        new = rng.choice([
            rng.randbytes(len(span)), b"", span * 2, span[::-1], rng.choice(TOKENS), span + rng.choice(TOKENS),
            bytes(len(span)), bytes(byte ^ 1 << rng.randrange(8) for byte in span),
        ])  # fmt: skip
        data = data[:a] if rng.random() < 0.05 else data[:a] + new + rest
    return data


def shaken(rng: random.Random, document: Any) -> Any:
    """Change a JSON document somewhere: another value, a field more or less, or the same one level down."""
    if isinstance(document, dict) and document and rng.random() < 0.9:
        found = dict(document)
        name = rng.choice(list(found))
        choice = rng.random()
        if choice < 0.1:
            del found[name]
        elif choice < 0.2:
            found[str(rng.choice(LEAVES))] = value(rng)
        elif choice < 0.3:
            found[str(rng.choice(LEAVES))] = found.pop(name)
        else:
            found[name] = shaken(rng, found[name])
        return found
    if isinstance(document, list) and document and rng.random() < 0.7:
        place = rng.randrange(len(document))
        return [*document[:place], shaken(rng, document[place]), *document[place + 1 :]]
    if isinstance(document, str) and document and rng.random() < 0.5:
        return edited(rng, document.encode()).decode("utf-8", "replace")
    return value(rng)


def mutated(rng: random.Random) -> bytes:
    """Draw a file."""
    choice = rng.random()
    if choice < 0.5:
        return edited(rng, hostile.VALID)
    if choice < 0.65:
        return hostile.sealed(edited(rng, hostile.unsealed(hostile.VALID)))
    if choice < 0.85:
        return hostile.knob_file(shaken(rng, hostile.HEADER))
    if choice < 0.95:
        tensors = shaken(rng, hostile.entries(hostile.VECTORS))
        return hostile.knob_file(tensors=tensors if isinstance(tensors, dict) else {"x": tensors})
    return hostile.knob_file(edited(rng, json.dumps(hostile.HEADER).encode()).decode("utf-8", "replace"))


def outcome(data: bytes, folder: Path) -> str:
    """Load a file and say what became of it; raises for anything but a `KnobError` or a sound knob."""
    (folder / "k").write_bytes(data)
    try:
        knob = Knob.load(folder / "k")
    except KnobError as error:
        said = str(error)
        message = said.partition(": ")[2]
        assert said.isprintable(), said
        assert len(said) < 500 + len(str(folder)), said
        return "refused: " + re.sub(r"'.*'|\".*\"|`.*`|[\[{(].*[\]})]|[-\d.e+]*\d", "_", message)[:70]
    hostile.check_sound(knob, folder / "again")
    return "the same knob" if data == hostile.VALID else "a sound knob, its checksum renewed"


def main() -> int:
    """Run until the time is over, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found: Counter[str] = Counter()
    end, case = time.monotonic() + args.seconds, 0
    with tempfile.TemporaryDirectory() as name:
        while time.monotonic() < end:
            data = mutated(random.Random(f"{args.seed}/{case}"))
            try:
                found[outcome(data, Path(name))] += 1
            except Exception:  # noqa: BLE001  # whatever it is, it is what is looked for
                kept = Path(f"fuzz-{args.seed}-{case}.bin").resolve()
                kept.write_bytes(data)
                traceback.print_exc()
                print(f"case {case} of seed {args.seed} was neither refused nor sound; it is kept in {kept}")
                return 1
            case += 1
    refused = sum(count for what, count in found.items() if what.startswith("refused"))
    print(
        f"{case} cases, seed {args.seed}: {refused} refused, {case - refused} sound, {len(found)} distinct outcomes\n"
    )
    for what, count in found.most_common(40):
        print(f"{count:8}  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
