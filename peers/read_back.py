"""Import the files that the peers saved, steer with them, and compare with what the peers' own steering did.

    python peers/read_back.py build/peers

Runs in Trimtab's environment after `their_files.py`; `make test-peers` runs it. Exits with 1 where logits differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from trimtab.errors import TrimtabWarning
from trimtab.exchange import export, import_knob
from trimtab.render import load
from trimtab.runtime import steer

LIMIT = 1e-4
"""Of logits, in float32."""
PROMPT = 5
"""Tokens of the prompt, as in `their_files.py`."""


def main() -> None:
    """Compare every file at every multiplier, and write what was found for the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    place = folder / "files"
    logits = load_file(place / "logits.safetensors")
    model, tokenizer = load(folder / "pico-concise", dtype="float32")
    ids, rows = logits["ids"], list[list[str]]()
    for name in dict.fromkeys(label.rpartition(" ")[0] for label in logits if label not in ("ids", "bare")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)  # repeng's last layer was read after the norm
            knob = import_knob(place / name, model, tokenizer)
        gap = effect = 0.0
        for multiplier in (float(label.rpartition(" ")[2]) for label in logits if label.startswith(f"{name} ")):
            wanted = logits[f"{name} {multiplier}"]
            with torch.no_grad(), steer(model, {knob: multiplier}, prompt_lengths=[PROMPT]):
                got = model(ids, use_cache=False).logits[0]
            gap = max(gap, float((got - wanted).abs().max()))
            effect = max(effect, float((wanted - logits["bare"]).abs().max()))
        rows.append([name, knob.method, knob.where, f"{gap:.0e}", f"{effect:.1f}"])
        if not gap < LIMIT < effect:
            sys.exit(f"{name}: logits differ by {gap:.1e} here and there; the vector moves them by {effect}.")
    knob = import_knob(place / "happy.gguf", model, tokenizer)
    export({knob: 1.0}, model, tokenizer, to="gguf", out=place / "back.gguf")
    if (place / "back.gguf").read_bytes() != (place / "happy.gguf").read_bytes():
        sys.exit("A file of repeng comes out otherwise than it went in.")
    (folder / "files.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
