"""Learn a knob from preference pairs: a direction in seconds, or a difference of weights by training.

Directions (palrs, diffmean, pca, icv, cold-kernel): every candidate site (layers x positions) is read and kept;
`trimtab tune` chooses among them on held-out pairs. Gradient steps: cold-fd moves the stream as one step would, and
one-step takes it; bipo trains a vector. Weights: preference-vector trains with DPO on the pairs and on the pairs
swapped and subtracts, alignment-vector trains once and subtracts the model; both need the `train` extra. What is not
given is as the method's paper has it.
"""

from __future__ import annotations

import re
import shlex
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options, steps, vectors
from trimtab.cli.options import given, output_file
from trimtab.cli.sources import held_out_of, load_pairs, open_model, open_workers
from trimtab.cli.tables import counted, facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, unknown_name
from trimtab.types import WHERE, is_knob_name

if TYPE_CHECKING:
    from trimtab.artifact import Knob

LEARN = (
    "method",
    "name",
    "positions",
    "format",
    "layers",
    "first",
    "last",
    "selection",
    "site",
    "scale",
    "loss",
    "where",
    "length_match",
    "seed",
    "token_budget",
    "licence",
    "checkpoint",
)
"""Options that go to `trimtab.learn` under their own names."""
STEERING = (*(name for name in LEARN if name not in ("method", "name", "seed", "licence", "checkpoint")), "option")


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument(
        "pairs", metavar="PAIRS", nargs="?", help="a .jsonl, .json, .csv, .tsv or .parquet file, or prefworld:math"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the knob")
    parser.add_argument(
        "--method",
        help="palrs, diffmean, pca, icv, cold-kernel or random, a control; cold-fd, one-step or bipo; "
        "preference-vector or alignment-vector (default palrs)",
    )
    parser.add_argument("--name", help="of the knob (default: the file's name up to its first dot, with - for spaces)")
    reading = parser.add_argument_group("what is read")
    reading.add_argument(
        "--positions",
        type=options.names,
        metavar="LIST",
        help="post_instruction, response_end, demonstrated, last, response_mean; one token of the first two as in "
        "post_instruction[-1]; of gradients last_prompt, all_prompt, response_mean",
    )
    reading.add_argument("--format", help="response_as_user or question_response (default: as the positions need)")
    reading.add_argument("--layers", type=options.layers, metavar="LIST", help="candidates, as in 2,4-6")
    reading.add_argument("--first", type=float, metavar="X", help="first depth, as a fraction (default 0.0)")
    reading.add_argument("--last", type=float, metavar="X", help="last depth, as a fraction (default 0.8)")
    reading.add_argument("--token-budget", type=int, metavar="N", help="tokens of a batch (default 8192)")
    reading.add_argument(
        "--loss",
        metavar="LOSS",
        help="of gradients: dpo, sft, negative-sft, simpo, distribution, with options as in dpo:per=token or "
        "simpo:beta=2,gamma=1; dpo where none is given",
    )
    reading.add_argument("--length-match", metavar="RULE", help="off, bucket or regress (default off)")
    reading.add_argument("--duplicates", default="error", help="error, drop or keep pairs seen before (default error)")
    options.add_checkpoint(parser)
    choice = parser.add_argument_group("what is chosen before tuning")
    choice.add_argument("--selection", help="eq3_cosine, max_relative_norm, probe_auc, first_order or fixed")
    choice.add_argument("--site", help="take this one, as in 4/last")
    choice.add_argument(
        "--scale", help="raw, mean_chosen_norm or mean_residual_norm; where none is given raw, of gradients alpha 0.2"
    )
    choice.add_argument("--where", help="steer these tokens: " + ", ".join(WHERE) + " (default all)")
    choice.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the method, as in kernel=softmax; repeatable",
    )
    choice.add_argument("--seed", type=int, metavar="N", help="of whatever is drawn (default 0)")
    choice.add_argument("--licence", help="of the knob, stored in it")
    steps.add_options(parser)
    vectors.add_options(parser)


def run(args: Namespace, terminal: Terminal) -> None:
    """Learn, save, and say what came out."""
    out = output_file(args.out)
    own = options.assignments(args.option)
    if args.name is not None and not is_knob_name(args.name):
        raise OptionError(
            f"--name takes 1 to 100 printable characters, no space, comma or equals sign; got {args.name!r}."
        )
    if args.layers is not None and (args.first is not None or args.last is not None):
        raise OptionError("--layers names the candidates; leave --first and --last out.")
    if args.method in vectors.METHODS:
        vectors.refuse(args, (*STEERING, *steps.OWN), args.method, "other methods")
        vectors.run(args, terminal, out, args.name or _name_from(out))
        return
    if args.method in steps.METHODS:
        known = (*LEARN, "option", *vectors.OWN, *vectors.SOURCES, *steps.OWN)
        own_name = args.name or _name_from(out)
        steps.run(args, terminal, out, own_name, tuple(n for n in known if n not in ("method", "name")))
        return
    vectors.refuse(args, (*vectors.OWN, *vectors.SOURCES), args.method or "palrs", "methods that train")
    vectors.refuse(args, steps.OWN, args.method or "palrs", "methods that take a step")
    if args.pairs is None:
        raise OptionError("Pass the pairs to learn from: a file, or prefworld:math.")
    pairs = load_pairs(args.pairs, split="train", duplicates=args.duplicates)
    chosen: dict[str, Any] = {"name": _name_from(out), **given(args, *LEARN)}
    with terminal.working("Preparing"):
        from trimtab.checkpoint import remove
        from trimtab.learn import learn
        from trimtab.methods import METHODS
    if args.method is not None and args.method not in METHODS:  # before the model is loaded, which may take long
        raise unknown_name("method", args.method, [*METHODS, *steps.METHODS, *vectors.METHODS])
    with open_workers(args, terminal) as team, open_model(args, terminal) as (model, tokenizer):
        begun = time.perf_counter()
        working = terminal.working(f"Learning from {counted(len(pairs), 'pair')}", counted=True)
        with options.resumable(args.checkpoint), working as progress:
            knob = learn(model, tokenizer, pairs, options=own, progress=progress, team=team, **chosen)
        seconds = time.perf_counter() - begun
        team.first(lambda: knob.save(out) if team.leads else None)
    terminal.result(_record(knob, out, seconds), _text(knob, args, out, seconds))
    if args.checkpoint is not None and team.leads:
        remove(args.checkpoint)


def _name_from(out: Path) -> str:
    stem = re.sub(r"[\s,=]+", "-", out.name.partition(".")[0])
    return stem if is_knob_name(stem) else "knob"


def _record(knob: Knob, out: Path, seconds: float) -> dict[str, Any]:
    return {
        "knob": knob.name,
        "method": knob.method,
        "site": str(knob.site),
        "gain": knob.gain,
        "where": knob.where,
        "sites": len(knob.vectors),
        "pairs": knob.provenance["pairs_count"],
        "warnings": knob.diagnostics["warnings"],
        "seconds": seconds,
        "out": str(out),
    }


def _text(knob: Knob, args: Namespace, out: Path, seconds: float) -> str:
    model, file = shlex.quote(args.model), shlex.quote(str(out))
    tuned = shlex.quote(str(out.with_name(f"{knob.name}.tuned.safetensors")))
    sites, rule = len(knob.vectors), knob.diagnostics["selection"]["rule"]
    pairs = counted(knob.provenance["pairs_count"], "pair")
    head = f"Learned {knob.name} ({knob.method}) from {pairs} in {seconds:.1f} s."
    return f"{head}\n" + facts(
        {
            "site": f"{knob.site} ({rule}; {sites} kept)",
            "strength 1": f"alpha {knob.gain:.4g}, in multiples of the mean residual norm at layer {knob.site.layer}",
            "written to": out,
            "next": f"trimtab tune {model} --knob {file} --pairs {held_out_of(args.pairs)} --out {tuned}",
            "or": f'trimtab generate {model} "..." --knob {file} --strength 1',
        }
    )
