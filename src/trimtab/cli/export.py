"""Write knobs at their strengths for other tools: llama.cpp and repeng, PEFT, or a model folder that needs no Trimtab.

--to gguf writes a control vector (one vector per layer, from layer 1 on), --to peft a LoRA adapter (weight knobs of low
rank, and vectors as biases of the adapter), --to checkpoint a model folder with the vectors as biases and the
differences of weights added. All of them act on every token; knobs that do not are refused with the reason. What was
written is read again and compared.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options
from trimtab.cli.options import new_folder, writable
from trimtab.cli.quiet import quiet_transformers
from trimtab.cli.sources import load_knobs, open_model, setting_from, warn_outside
from trimtab.cli.tables import facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError
from trimtab.types import format_setting

if TYPE_CHECKING:
    from trimtab.exchange import Exported

FORMS = ("gguf", "peft", "checkpoint")
"""Written down, so that help need not load them; a test compares."""


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    options.add_knobs(parser, thinking=False)
    parser.add_argument("--to", required=True, choices=FORMS, help="what to write")
    parser.add_argument("--out", required=True, metavar="PATH", help="a .gguf file, or a folder that is new or empty")


def run(args: Namespace, terminal: Terminal) -> None:
    """Write, read again, and say what came out."""
    out = _place(args.out) if args.to == "gguf" else new_folder(args.out)
    if not args.knob:
        raise OptionError("There is nothing to export. Add --knob FILE.")
    with terminal.working("Preparing"):
        panel = load_knobs(args.knob, args.where)
        setting = setting_from(args, panel)
        warn_outside(panel.rack, setting)
        from trimtab.artifact import Knob
        from trimtab.exchange import export
    with ExitStack() as stack:
        dose = panel.rack.resolve(setting)
        if args.to == "checkpoint" or (args.to == "peft" and any(isinstance(knob, Knob) for knob in dose)):
            model, tokenizer = stack.enter_context(open_model(args, terminal))
        else:
            stack.enter_context(quiet_transformers())
            with terminal.working(f"Reading {args.model}"):
                from trimtab.render import load_empty

                model, tokenizer = load_empty(args.model)
        with terminal.working("Writing"):
            made = export(dose, model, tokenizer, to=args.to, out=out, strict=not args.no_strict)
    record = {"to": made.format, "out": str(made.path), "knobs": setting, **made.facts}
    terminal.result(record, _text(made, format_setting(setting), args))


def _place(text: str) -> Path:
    """Check before any work is done that a GGUF file can be written there."""
    path = writable(text)
    if path.suffix != ".gguf":
        raise OptionError(f"A control vector is a file whose name ends in .gguf; got {text!r}.")
    return path


def _text(made: Exported, setting: str, args: Namespace) -> str:
    place, found = shlex.quote(str(made.path)), made.facts
    rows: dict[str, Any] = {"acts on": "every token"}
    if made.format == "gguf":
        rows["layers"] = ", ".join(map(str, found["layers"]))
        rows["next"] = f"llama-cli -m MODEL.gguf --control-vector {place}"
    elif made.format == "peft":
        rows["weights"] = f"{found['weights']}, of rank {found['rank']}" if found["weights"] else None
        rows["biases"] = ", ".join(f"layer {layer}" for layer in found["layers"]) or None
        rows["next"] = f"peft.PeftModel.from_pretrained(model, {str(made.path)!r})"
    else:
        rows["biases"] = ", ".join(f"layer {layer}" for layer in found["layers"]) or None
        rows["weights"] = f"{found['weights']} changed" if found["weights"] else None
        rows["next"] = f'trimtab generate {place} "..."'
    rows["compared"] = "read again, and the same"
    if "error" in found:
        rows["compared"] = (
            f"logits differ by {found['error']:.2g} of their length; the knobs change {found['effect']:.2g} of it"
        )
    return f"Exported {setting} ({made.format}).\n" + facts({**rows, "written to": made.path})
