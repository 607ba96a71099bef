"""The part of `trimtab learn` that makes weight knobs: by training, or from weights that were trained elsewhere."""

from __future__ import annotations

import shlex
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options
from trimtab.cli.options import given, input_folder
from trimtab.cli.sources import load_pairs, open_model, open_workers, refuse_workers
from trimtab.cli.tables import counted, facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError

if TYPE_CHECKING:
    from trimtab.artifact import DeltaKnob

METHODS = ("preference-vector", "alignment-vector")
TRAINED = (
    "learning_rates",
    "betas",
    "lora_rank",
    "epochs",
    "max_steps",
    "patience",
    "batch_size",
    "seed",
    "licence",
    "checkpoint",
)
"""Options that go to `trimtab.learn_weights` under their own names."""
OWN = (
    "validation",
    "anchor",
    "learning_rates",
    "betas",
    "lora_rank",
    "all_weights",
    "epochs",
    "max_steps",
    "patience",
    "batch_size",
)
SOURCES = ("plus", "minus", "stored_as", "gain")


def add_options(parser: ArgumentParser) -> None:
    """Add the options of weight knobs."""
    train = parser.add_argument_group("training, for preference-vector and alignment-vector; in part for bipo")
    train.add_argument("--validation", metavar="PAIRS", help="held-out pairs (default: three tenths of PAIRS)")
    train.add_argument(
        "--anchor",
        metavar="PAIRS",
        action="append",
        default=[],
        help="pairs whose margin is to stay as it is, as of topics that the knob must leave alone; repeatable",
    )
    train.add_argument("--lora-rank", type=int, metavar="N", help="rank of the adapter that is trained (default 16)")
    train.add_argument("--all-weights", action="store_true", default=None, help="train all weights: a dense knob")
    train.add_argument(
        "--learning-rates",
        type=options.numbers,
        metavar="LIST",
        help="default 1e-5,1e-4; all weights: 1e-6,1e-5; bipo: by the mean residual norm",
    )
    train.add_argument("--betas", type=options.numbers, metavar="LIST", help="of DPO (default 0.1)")
    train.add_argument("--epochs", type=int, metavar="N", help="at most (default 10; bipo: 20)")
    train.add_argument("--max-steps", type=int, metavar="N", help="end after so many steps: few-step LoRA")
    train.add_argument(
        "--patience", type=int, metavar="N", help="looks without improvement before it stops (default 2; bipo: 3)"
    )
    train.add_argument("--batch-size", type=int, metavar="N", help="pairs of a step (default 16; bipo: 4)")
    made = parser.add_argument_group("weights that were trained elsewhere, instead of PAIRS")
    made.add_argument("--plus", metavar="DIR", help="a model folder with safetensors, or a LoRA adapter")
    made.add_argument("--minus", metavar="DIR", help="what is subtracted, of the same kind (default: MODEL)")
    parser.add_argument("--gain", type=float, metavar="X", help="differences at strength 1 (default 1; ExPO: 1.3)")
    parser.add_argument(
        "--stored-as", metavar="DTYPE", help="dense differences: float32, bfloat16 or float16 (default float32)"
    )


def refuse(args: Namespace, own: tuple[str, ...], method: str, others: str) -> None:
    """Raise `OptionError` for an option that belongs to other methods."""
    for name in own:
        if getattr(args, name) not in (None, []):
            raise OptionError(f"--{name.replace('_', '-')} is for {others}; {method} has no such option. Leave it out.")


def run(args: Namespace, terminal: Terminal, out: Path, name: str) -> None:
    """Train or subtract, save, and say what came out."""
    if (args.plus is None) == (args.pairs is None):
        raise OptionError("Pass either PAIRS to train on, or --plus DIR with weights that were trained elsewhere.")
    if args.plus is None:
        refuse(args, ("minus",), "a training", "a difference of given weights, beside --plus")
    else:
        refuse(args, (*OWN, "checkpoint"), "a difference of given weights", "training")
    if args.gain is not None and not 0 < args.gain < 1e6:
        raise OptionError(f"--gain is a positive number; got {args.gain:g}. A negative strength turns a knob round.")
    if args.all_weights and args.lora_rank is not None:
        raise OptionError("--all-weights trains no adapter, so that --lora-rank has no meaning. Pass one of the two.")
    with open_workers(args, terminal) as team:
        refuse_workers(team, args.method)
    begun = time.perf_counter()
    knob = _subtracted(args, terminal, out, name) if args.plus else _trained(args, terminal, name)
    if args.plus is None:
        knob.save(out)
    terminal.result(
        _record(knob, out, time.perf_counter() - begun), _text(knob, args, out, time.perf_counter() - begun)
    )
    if args.checkpoint is not None:
        from trimtab.checkpoint import remove

        remove(args.checkpoint)


def _trained(args: Namespace, terminal: Terminal, name: str) -> DeltaKnob:
    pairs = load_pairs(args.pairs, split="train", duplicates=args.duplicates)
    anchors = [load_pairs(source, split="train", duplicates=args.duplicates) for source in args.anchor]
    held = load_pairs(args.validation, split="validation", duplicates=args.duplicates) if args.validation else None
    with terminal.working("Preparing"):
        from trimtab.train.loops import load_trainers
        from trimtab.train.vectors import learn_weights

        load_trainers()  # before the model is loaded, which may take long
    chosen: dict[str, Any] = given(args, *TRAINED)
    if args.all_weights:
        chosen["lora_rank"] = None
    if args.stored_as is not None:
        chosen["dtype"] = args.stored_as
    with open_model(args, terminal) as (model, tokenizer):
        working = terminal.working(f"Training on {counted(len(pairs), 'pair')} ({args.method})", counted=True)
        with options.resumable(args.checkpoint), working as progress:
            made = learn_weights(
                model,
                tokenizer,
                pairs,
                method=args.method,
                name=name,
                validation=held,
                anchors=sum(anchors[1:], anchors[0]) if anchors else None,
                progress=progress,
                **chosen,
            )
    return made if args.gain is None else made.with_(gain=args.gain)


def _subtracted(args: Namespace, terminal: Terminal, out: Path, name: str) -> DeltaKnob:
    plus = input_folder(args.plus, "--plus")
    minus = None if args.minus is None else input_folder(args.minus, "--minus")
    if args.method == "preference-vector" and minus is None:
        raise OptionError(
            "A preference vector is what training with the labels left (--plus) minus what training with the labels "
            "swapped left: pass --minus too. With --plus alone it is an alignment-vector."
        )
    with terminal.working("Preparing"):
        from trimtab.artifact import model_identity
        from trimtab.methods import TRAINED as PAPERS
        from trimtab.weights import difference
        from trimtab.weights.source import is_adapter
    with open_model(args, terminal) as (model, tokenizer), terminal.working("Subtracting"):
        base = None if is_adapter(plus) else model
        told = {"paper": PAPERS[args.method], **model_identity(model, tokenizer), "licence": args.licence}
        return difference(
            plus,
            base if minus is None else minus,
            name=name,
            method=args.method,
            dtype=args.stored_as or "float32",
            gain=1.0 if args.gain is None else args.gain,
            out=out,
            provenance=told,
        )


def _record(knob: DeltaKnob, out: Path, seconds: float) -> dict[str, Any]:
    return {
        "knob": knob.name,
        "method": knob.method,
        "kind": knob.kind,
        "weights": knob.described(),
        "norm": knob.norm(),
        "pairs": knob.provenance.get("pairs_count"),
        "anchors": knob.provenance.get("options", {}).get("anchors"),
        "cosine_plus_minus": knob.diagnostics.get("cosine_plus_minus"),
        "training": knob.diagnostics.get("training"),
        "seconds": seconds,
        "out": str(out),
    }


def _text(knob: DeltaKnob, args: Namespace, out: Path, seconds: float) -> str:
    training: dict[str, Any] = knob.diagnostics.get("training", {})
    stopped = {
        f"theta{'+' if side == 'plus' else '-'}": (
            f"learning rate {record['chosen']['learning_rate']:g}, beta {record['chosen']['beta']:g}; "
            f"{_preferred(record):.0%} of validation pairs preferred" + _tied(record)
        )
        for side, record in training.items()
    }
    cosine = knob.diagnostics.get("cosine_plus_minus")
    ranks = sorted({part["rank"] or 0 for part in knob.described()})
    pairs = f" from {counted(knob.provenance['pairs_count'], 'pair')}" if training else ""
    if anchors := knob.provenance.get("options", {}).get("anchors"):
        pairs += f" and {anchors['count']} anchors"
    file = shlex.quote(str(out))
    head = f"{'Learned' if training else 'Made'} {knob.name} ({knob.method}){pairs} in {seconds:.1f} s."
    return f"{head}\n" + facts(
        {
            **stopped,
            "weights": f"{len(knob.parts)}, " + ("dense" if ranks == [0] else f"of rank {ranks[-1]}"),
            "cosine": None if cosine is None else f"{cosine:.3f} between theta+ - theta and theta- - theta",
            "written to": out,
            "next": f'trimtab generate {shlex.quote(args.model)} "..." --knob {file} --strength 1',
        }
    )


def _tied(record: dict[str, Any]) -> str:
    """Say where the share decided nothing: of answers of unequal length the shorter is the likelier at any rate."""
    return f" (a tie of {record['tied']} settings: the mildest is taken)" if record["tied"] > 1 else ""


def _preferred(record: dict[str, Any]) -> float:
    chosen = record["chosen"]
    return next(row for row in record["table"] if {key: row[key] for key in chosen} == chosen)["preference"]
