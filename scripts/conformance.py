"""Check twins of every architecture, and write docs/conformance.md from what was found under each transformers.

`conformance.py --run` checks all architectures that the installed transformers knows, each in a process of its own,
and adds to build/conformance/VERSION.jsonl; a run that was stopped goes on. Without it, the page is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOUND, PAGE = ROOT / "build" / "conformance", ROOT / "docs" / "conformance.md"
LIMIT = 180
"""Seconds for one architecture."""

sys.path.insert(0, str(ROOT / "tests"))  # the list that the tests run lies with them

INTRODUCTION = """# Conformance: architectures

Is the residual stream read and written where Trimtab thinks? Each architecture is checked on a small random twin of
its default configuration, on a CPU in float32. The page is written by `make conformance`, which runs what
`trimtab check NAME` runs, under the oldest supported version of transformers and under the newest.

- **ok**: the text stack's blocks are found; what is captured is what a hook sees at every layer; steered minus base is
  strength times direction at every layer; strength 0 is bitwise the base model, and so is the model afterwards; the
  same absolute positions are steered, by trace, with and without a KV cache, padded on either side, in batches of 1
  and 8, in beams and in a second turn; rows keep their own knobs.
- **refused**: Trimtab says that it will not steer it, and why. Encoders and models with several residual streams are
  here, and so are models whose own code fails on such a small twin: check those themselves, with
  `trimtab check FOLDER`.
- **no twin**: the default configuration cannot be made small. Check the model itself.
- **failed**: steering would be silently wrong, or nothing came of the check at all.

Where a remark says "no worse than the base model", the model without any knob gives other logits by itself when it is
padded, or goes on from a cache, and the steered one differs by less than three times as much.
"""


def architectures() -> list[str]:
    """Return what transformers can generate text with, and what the tests run, once each."""
    from transformers.models.auto import modeling_auto as auto

    from pico import ARCHITECTURES, VISION

    known = [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    return list(dict.fromkeys([*ARCHITECTURES, *VISION, *sorted(known)]))


def look(name: str) -> dict[str, Any]:
    """Check the twin of one architecture."""
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers

    from trimtab.check import check, default_config, twin
    from trimtab.errors import TrimtabError

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        config = default_config(name)
        if getattr(config, "is_encoder_decoder", False):
            return {"verdict": "refused", "remark": "an encoder-decoder model"}
        model = twin(config)
    except TrimtabError as error:
        return {"verdict": "no twin", "remark": str(error).partition(": ")[2] or str(error)}
    except Exception as error:  # noqa: BLE001  # a default configuration that its own library refuses
        return {"verdict": "no twin", "remark": f"{type(error).__name__}: {error}"}
    report = check(model)
    remarks = [
        f"{f.name}: {f.said}"
        for f in report.findings
        if f.verdict != "ok" or "base model" in f.said or "cannot do" in f.said
    ]
    return {"verdict": report.verdict, "path": report.path, "remark": "; ".join(remarks)}


def _send(name: str, pipe: Any) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    pipe.send(look(name))


def run(names: list[str]) -> int:
    """Check architectures and keep what was found; those that were found already are left out."""
    import transformers

    import trimtab.check  # noqa: F401  # once here, and not in every process

    FOUND.mkdir(parents=True, exist_ok=True)
    file = FOUND / f"{transformers.__version__}.jsonl"
    done = {json.loads(line)["name"] for line in file.read_text().splitlines()} if file.exists() else set[str]()
    context = multiprocessing.get_context("fork")
    for name in [name for name in names or architectures() if name not in done]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(name, theirs))
        process.start()
        theirs.close()
        found: dict[str, Any] = {"verdict": "failed", "remark": f"nothing came of it within {LIMIT} s"}
        try:
            if ours.poll(LIMIT):
                found = ours.recv()
        except EOFError:
            found = {"verdict": "failed", "remark": "its process ended without a word"}
        process.kill()
        process.join()
        with file.open("a") as out:
            out.write(json.dumps({"name": name, **found}) + "\n")
        print(f"{name}: {found['verdict']}", flush=True)
    return 0


def write() -> int:
    """Write the page from what the runs have found."""
    from pico import ARCHITECTURES, VISION

    files = sorted(FOUND.glob("*.jsonl"), key=lambda file: [int(part) for part in file.stem.split(".")])
    if not files:
        print("Nothing was found yet: run scripts/conformance.py --run first.", file=sys.stderr)
        return 1
    versions = [file.stem for file in files]
    found = {file.stem: {r["name"]: r for r in map(json.loads, file.read_text().splitlines())} for file in files}
    import torch

    tested = [*ARCHITECTURES, *VISION]
    others = sorted({name for rows in found.values() for name in rows} - set(tested))
    parts = [INTRODUCTION, f"transformers {' and '.join(versions)}, torch {torch.__version__}.\n"]
    parts += [_counts("All architectures", [*tested, *others], versions, found)]
    parts += [f"## In the test suite\n\n{_table(tested, versions, found)}"]
    parts += [f"## Every other architecture that transformers generates text with\n\n{_table(others, versions, found)}"]
    PAGE.write_text("\n".join(parts))
    print(f"{PAGE.relative_to(ROOT)}: {len(tested)} architectures of the test suite, {len(others)} others")
    return 0


def _counts(title: str, names: list[str], versions: list[str], found: dict[str, dict[str, Any]]) -> str:
    lines = [f"| {title} | ok | refused | no twin | failed | not in it |", "|---|---|---|---|---|---|"]
    for version in versions:
        counts = Counter(found[version].get(name, {"verdict": "-"})["verdict"] for name in names)
        kinds = ("ok", "refused", "no twin", "failed", "-")
        lines.append(f"| transformers {version} | " + " | ".join(str(counts[kind]) for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


def _table(names: list[str], versions: list[str], found: dict[str, dict[str, Any]]) -> str:
    lines = [f"| architecture | blocks | {' | '.join(versions)} | remark |", "|---" * (3 + len(versions)) + "|"]
    for name in names:
        rows = [found[version].get(name) for version in versions]
        newest = next((row for row in reversed(rows) if row), {})
        path = f"`{newest['path']}`" if newest.get("path") else ""
        remark = " ".join(str(newest.get("remark", "")).split()).replace("|", "\\|").replace("`", "'")
        remark = remark if len(remark) <= 160 else remark[:157] + "..."
        verdicts = " | ".join(row["verdict"] if row else "-" for row in rows)
        lines.append(f"| {name} | {path} | {verdicts} | {remark} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="check twins; without it, the page is written")
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    arguments = parser.parse_args()
    sys.exit(run(arguments.names) if arguments.run else write())
