"""Make preference pairs out of a contrast: two system lines, or two models, that answer the same prompts.

Prompts are arguments, or lines of --input or of stdin, as for `trimtab generate`; pairs that you have are prompts too.
Answers under --chosen-system are chosen, those under --rejected-system rejected; given several times, the first of the
one makes a contrast with the first of the other, and so on. With --rejected-model the rejected answers are that
model's, with system lines or without. The pairs are written without these system lines, in TRL's format, and each says
how it was made. Read some of them before you learn from them.
"""

from __future__ import annotations

import gc
import os
import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options
from trimtab.cli.generate import Turns, read_requests
from trimtab.cli.options import given, writable
from trimtab.cli.sources import WORLD, open_model, world_part
from trimtab.cli.tables import counted, facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, brief

if TYPE_CHECKING:
    from trimtab.contrast import Answers, Contrast, Side
    from trimtab.prompts import Lines

ASK = ("samples", "max_new_tokens", "temperature", "top_p", "seed", "batch_size")
"""Options that go to `trimtab.contrast` under their own names."""
SUFFIXES = (".jsonl", ".json")


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what the user says")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="prompts, one per line, as text or as JSON objects; - is stdin; or prefworld:FAMILY[:COUNT]",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the pairs, .jsonl or .json")
    contrast = parser.add_argument_group("the contrast")
    for side, what in (("chosen", "you prefer"), ("rejected", "you do not prefer")):
        contrast.add_argument(
            f"--{side}-system",
            action="append",
            default=[],
            metavar="TEXT",
            help=f"what the model is told before the answers that {what}; may be repeated (default: nothing)",
        )
    contrast.add_argument("--rejected-model", metavar="MODEL", help="gives the rejected answers (default: MODEL)")
    parser.add_argument("--samples", type=int, metavar="N", help="pairs per prompt and contrast (default 1)")
    options.add_decoding(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default 64)")


def run(args: Namespace, terminal: Terminal) -> None:
    """Ask both sides, write the pairs, and say what came out."""
    out = _pairs_file(args.out)
    if args.rejected_model == args.model:
        raise OptionError(f"--rejected-model is {args.model} itself, which gives both answers anyway. Leave it out.")
    prompts = _prompts(args)
    if args.batch_size is not None and args.batch_size < 1:
        raise OptionError(f"--batch-size is 1 or more; got {args.batch_size}.")
    with terminal.working("Preparing"):
        from trimtab.contrast import contrast_pairs, join_sides
        from trimtab.prompts import check_sampling, read_lines
    two_models = args.rejected_model is not None
    lines = read_lines(args.chosen_system, args.rejected_system, two_models=two_models)
    check_sampling(1 if args.samples is None else args.samples, args.temperature or 0.0)  # before a model is loaded
    if two_models:
        chosen = _side(args, terminal, args.model, prompts, "chosen", lines)
        gc.collect()  # what a model's parts hold of each other, before the next one is loaded
        found = join_sides(chosen, _side(args, terminal, args.rejected_model, prompts, "rejected", lines))
    else:
        system = given(args, "chosen_system", "rejected_system")
        with open_model(args, terminal) as loaded, terminal.working("Generating", counted=True) as progress:
            found = contrast_pairs(*loaded, prompts, progress=progress, **system, **given(args, *ASK))
    found.pairs.save(out)
    terminal.result(_record(args, found, lines, len(prompts), out), _text(args, found, len(prompts), out))


def _side(
    args: Namespace, terminal: Terminal, model: str, prompts: list[str | Turns], side: Side, lines: Lines
) -> Answers:
    """Ask one model; nothing keeps it when this returns."""
    from trimtab.contrast import answer_side

    named = Namespace(**{**vars(args), "model": model})
    with open_model(named, terminal) as loaded, terminal.working(f"Generating, {side}", counted=True) as progress:
        return answer_side(*loaded, prompts, side, lines=getattr(lines, side), progress=progress, **given(args, *ASK))


def _pairs_file(text: str) -> Path:
    """Check before any work is done that pairs can be written there; no file is replaced, since pairs are edited."""
    if Path(text).suffix.lower() not in SUFFIXES and text:
        raise OptionError(f"--out {text!r} is a file of pairs, and ends in .jsonl or .json.")
    path = writable(text)
    if path.exists() and (not path.is_file() or path.stat().st_size):
        raise OptionError(f"--out {text!r} exists and is not replaced. Choose another name, or remove it first.")
    return path


def _prompts(args: Namespace) -> list[str | Turns]:
    part = world_part(args.input) if args.input else None
    if part is not None and not args.prompts:
        from trimtab.prefworld import world

        return [item.prompt for item in world.items(part.family, "train", part.size)]
    for text in args.prompts:
        if text.startswith(f"{WORLD}:") or os.path.isfile(text):
            raise OptionError(f"{brief(text)} is no prompt, but names where some are. Pass it as --input {text}.")
    requests = read_requests(args)
    for request in requests:
        if request.setting is not None:
            raise OptionError(f"{request.place} brings `knobs`, and no knob is turned here. Leave them out.")
    return [request.prompt for request in requests]


def _record(args: Namespace, found: Contrast, lines: Lines, prompts: int, out: Path) -> dict[str, Any]:
    models = {"model": args.model, "rejected_model": args.rejected_model or args.model}
    return {**found.record(), "prompts": prompts, "contrasts": len(lines.chosen), **models, "out": str(out)}


def _text(args: Namespace, found: Contrast, prompts: int, out: Path) -> str:
    from trimtab.contrast import dropped_text

    first = found.pairs[0]
    knob = out.with_name(f"{out.name.partition('.')[0]}.knob.safetensors")
    model, file = shlex.quote(args.model), shlex.quote(str(out))
    return f"Made {counted(len(found.pairs), 'pair')} from {counted(prompts, 'prompt')}.\n" + facts(
        {
            "chosen": _side_text(found.chosen_tokens, found.chosen_cut),
            "rejected": _side_text(found.rejected_tokens, found.rejected_cut),
            "left out": dropped_text(found),
            "the first": brief(first.prompt[-1].content, 100),
            "  chosen": brief(first.chosen, 100),
            "  rejected": brief(first.rejected, 100),
            "written to": out,
            "next": f"trimtab learn {model} {file} --out {shlex.quote(str(knob))}",
        }
    )


def _side_text(tokens: float, cut: int) -> str:
    return f"{tokens:.1f} tokens on average, {cut} cut short"
