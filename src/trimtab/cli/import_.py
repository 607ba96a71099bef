"""Make a knob of what another tool wrote: control vectors, pickled vectors, LoRA adapters.

FILE is a GGUF control vector (repeng, llama.cpp), a vector or an object that torch.save or pickle.dump wrote (CAA,
BiPO, persona vectors, steering-vectors), or the folder of a PEFT LoRA adapter. Strength 1 is that tool's coefficient 1.
Nothing in a file is run: pickles that name anything but tensors are refused unopened.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from trimtab.cli import options
from trimtab.cli.options import input_file, output_file
from trimtab.cli.sources import load_pairs, open_model
from trimtab.cli.tables import facts
from trimtab.cli.terminal import Terminal


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument("file", metavar="FILE", help="what the other tool wrote; an adapter is a folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the knob")
    parser.add_argument("--name", help="name of the knob (default: from FILE)")
    parser.add_argument(
        "--source",
        help="bipo, caa, gguf, llama.cpp, peft, persona-vectors, repeng or steering-vectors (default: as FILE tells)",
    )
    parser.add_argument("--layer", type=int, metavar="L", help="layer of a lone vector, or the one of several to act")
    parser.add_argument(
        "--pairs", metavar="PAIRS", help="pairs over whose answers norms are read (default: a few plain questions)"
    )
    parser.add_argument("--licence", help="licence of the vectors, stored in the knob")


def run(args: Namespace, terminal: Terminal) -> None:
    """Read, measure norms, save, and say what came out."""
    out = output_file(args.out)
    if not Path(args.file).is_dir():
        input_file(args.file, "a control vector, a pickled vector, or the folder of an adapter")
    pairs = None if args.pairs is None else load_pairs(args.pairs, split="train", duplicates="error")
    with terminal.working("Preparing"):
        from trimtab.artifact import DeltaKnob
        from trimtab.exchange import import_knob
        from trimtab.exchange.importers import check_source
    check_source(args.source)
    with open_model(args, terminal) as (model, tokenizer), terminal.working("Reading"):
        knob = import_knob(
            args.file,
            model,
            tokenizer,
            name=args.name,
            source=args.source,
            layer=args.layer,
            pairs=pairs,
            licence=args.licence,
        )
    knob.save(out)
    record: dict[str, Any] = {"knob": knob.name, "kind": knob.kind, "method": knob.method, "out": str(out)}
    record |= {"imported": knob.provenance["imported"], "gain": knob.gain}
    rows: dict[str, Any] = {}
    if isinstance(knob, DeltaKnob):
        record["weights"] = knob.described()
        rows["weights"] = f"{len(knob.parts)} of low rank"
    else:
        layers = sorted(site.layer for site in knob.sites)
        record |= {"site": str(knob.site), "layers": layers, "candidates": [*map(str, knob.vectors)]}
        rows["acts at"] = ", ".join(f"layer {layer}" for layer in layers)
        rows["strength 1"] = f"alpha {knob.gain:.4g} at layer {knob.site.layer}, the tool's coefficient 1"
        rows["candidates"] = f"{len(knob.vectors)} layers, for tune" if len(knob.vectors) > len(layers) else None
    file = shlex.quote(str(out))
    rows["written to"] = out
    rows["next"] = f'trimtab generate {shlex.quote(args.model)} "..." --knob {file} --strength 1'
    terminal.result(record, f"Imported {knob.name} ({knob.method}).\n" + facts(rows))
