"""The part of `trimtab learn` that takes gradient steps: a lookahead, the step itself, or a vector that is trained."""

from __future__ import annotations

import shlex
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options
from trimtab.cli.options import given
from trimtab.cli.sources import held_out_of, load_pairs, open_model, open_workers, refuse_workers
from trimtab.cli.tables import counted, facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError

if TYPE_CHECKING:
    from trimtab.artifact import AnyKnob

LAYERS = ("layers", "first", "last")
SHARED = ("seed", "licence", "checkpoint")
METHODS: dict[str, tuple[str, ...]] = {
    "cold-fd": ("loss", *LAYERS, "rank", "where", "backend", "step", "per_token", "token_budget", *SHARED),
    "one-step": ("loss", "rank", "token_budget", *SHARED),
    "bipo": (*LAYERS, "where", "betas", "learning_rates", "epochs", "patience", "batch_size", *SHARED, "validation"),
}
"""Methods with their options, which go to their functions under their own names but for `betas` and `validation`."""
OWN = ("rank", "backend", "step", "per_token")


def add_options(parser: ArgumentParser) -> None:
    """Add the options of gradient steps."""
    group = parser.add_argument_group("gradient steps, for cold-fd and one-step")
    group.add_argument("--rank", type=int, metavar="N", help="of each matrix's gradient (default 16)")
    group.add_argument("--backend", metavar="WAY", help="cold-fd: exact or scaled (default exact)")
    group.add_argument(
        "--step", type=float, metavar="X", help="cold-fd, scaled: in gradients; the dtype's where not given"
    )
    group.add_argument(
        "--per-token", action="store_true", default=None, help="cold-fd: move every token by the same length"
    )


def run(args: Namespace, terminal: Terminal, out: Path, name: str, known: tuple[str, ...]) -> None:
    """Learn, save, and say what came out; `known` are the options of all methods."""
    for option in known:
        if option not in METHODS[args.method] and getattr(args, option) not in (None, []):
            raise OptionError(f"--{option.replace('_', '-')} is of other methods than {args.method}. Leave it out.")
    if args.pairs is None:
        raise OptionError("Pass the pairs to learn from: a file, or prefworld:math.")
    pairs = load_pairs(args.pairs, split="train", duplicates=args.duplicates)
    chosen: dict[str, Any] = given(args, *METHODS[args.method])
    if (betas := chosen.pop("betas", None)) is not None:
        if len(betas) != 1:
            raise OptionError(f"--betas takes one number for {args.method}; got {len(betas)}.")
        chosen["beta"] = betas[0]
    if (held := chosen.pop("validation", None)) is not None:
        chosen["validation"] = load_pairs(held, split="validation", duplicates=args.duplicates)
    with terminal.working("Preparing"):
        from trimtab.checkpoint import remove
        from trimtab.train.bipo import learn_vector
        from trimtab.train.steps import learn_lookahead, learn_step
    learn: Any = {"cold-fd": learn_lookahead, "one-step": learn_step, "bipo": learn_vector}[args.method]
    with open_workers(args, terminal) as team, open_model(args, terminal) as (model, tokenizer):
        if args.method == "bipo":
            refuse_workers(team, args.method)
        else:
            chosen["team"] = team
        begun = time.perf_counter()
        working = terminal.working(f"Learning from {counted(len(pairs), 'pair')} ({args.method})", counted=True)
        with options.resumable(args.checkpoint), working as progress:
            knob: AnyKnob = learn(model, tokenizer, pairs, name=name, progress=progress, **chosen)
        seconds = time.perf_counter() - begun
        team.first(lambda: knob.save(out) if team.leads else None)
    terminal.result(_record(knob, out, seconds), _text(knob, args, out, seconds))
    if args.checkpoint is not None and team.leads:
        remove(args.checkpoint)


def _record(knob: AnyKnob, out: Path, seconds: float) -> dict[str, Any]:
    told = {key: knob.diagnostics[key] for key in ("gradient_norm", "energy", "warnings") if key in knob.diagnostics}
    return {
        "knob": knob.name,
        "method": knob.method,
        "kind": knob.kind,
        "site": None if knob.kind == "delta" else str(knob.site),
        "gain": knob.gain,
        "where": knob.where,
        "pairs": knob.provenance["pairs_count"],
        **told,
        "seconds": seconds,
        "out": str(out),
    }


def _text(knob: AnyKnob, args: Namespace, out: Path, seconds: float) -> str:
    model, file = shlex.quote(args.model), shlex.quote(str(out))
    tuned = shlex.quote(str(out.with_name(f"{knob.name}.tuned.safetensors")))
    meaning = {
        "lookahead": f"alpha {knob.gain:.4g}: the mean displacement, in multiples of the mean residual norm",
        "delta": "a step of a hundredth of the length of the weights that it changes",
        "steering": f"alpha {knob.gain:.4g}, in multiples of the mean residual norm",
    }
    energy = knob.diagnostics.get("energy")
    pairs = counted(knob.provenance["pairs_count"], "pair")
    head = f"Learned {knob.name} ({knob.method}) from {pairs} in {seconds:.1f} s."
    return f"{head}\n" + facts(
        {
            "site": None if knob.kind == "delta" else str(knob.site),
            "strength 1": meaning[knob.kind],
            "energy kept": None if energy is None else f"{energy:.2%} of the gradient, by its rank",
            "written to": out,
            "next": f"trimtab tune {model} --knob {file} --pairs {held_out_of(args.pairs)} --out {tuned}",
            "or": f'trimtab generate {model} "..." --knob {file} --strength 1',
        }
    )
