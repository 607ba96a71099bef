"""Train on preference pairs with DPO, SimPO, SFT or BFPO, tuned on validation pairs: the baseline beside a knob.

The grid of learning rates and betas is tried on validation pairs, each run stops early, and the best one is written as
a model folder that every other verb takes. Needs the `train` extra.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options
from trimtab.cli.options import given, new_folder
from trimtab.cli.sources import load_pairs, load_task, open_model
from trimtab.cli.tables import columns, counted, facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import unknown_name

if TYPE_CHECKING:
    from trimtab.evals.tasks import AnyTask

TRAIN = (
    "learning_rates",
    "betas",
    "gamma_ratio",
    "lora_rank",
    "epochs",
    "max_steps",
    "patience",
    "batch_size",
    "seed",
    "checkpoint",
)
"""Options that go to `trimtab.train.train` under their own names."""
LOSSES = ("dpo", "simpo", "sft", "bfpo")
RECORD = "training.json"


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "loss", metavar="LOSS", help="dpo, simpo, sft, or bfpo for pairs that say which answers are harmless"
    )
    options.add_model(parser)
    parser.add_argument("pairs", metavar="PAIRS", help="pairs to train on: a file, or prefworld:math")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the trained model, new or empty")
    parser.add_argument("--validation", metavar="PAIRS", help="held-out pairs (default: three tenths of PAIRS)")
    parser.add_argument(
        "--task", metavar="TASK", help="what the model is for decides the grid: validation questions, as for tune"
    )
    parser.add_argument("--duplicates", default="error", help="error, drop or keep pairs seen before (default error)")
    options.add_checkpoint(parser)
    grid = parser.add_argument_group("the grid")
    rates = "default 1e-6,1e-5 (sft: 1e-5,1e-4)"
    grid.add_argument("--learning-rates", type=options.numbers, metavar="LIST", help=rates)
    grid.add_argument(
        "--betas",
        type=options.numbers,
        metavar="LIST",
        help="default 0.1,0.3 (dpo, bfpo) or 2,10 (simpo); sft has none",
    )
    grid.add_argument("--gamma-ratio", type=float, metavar="X", help="simpo alone: gamma over beta (default 0.5)")
    run = parser.add_argument_group("each run")
    run.add_argument("--lora-rank", type=int, metavar="N", help="train an adapter of this rank (default: all weights)")
    run.add_argument("--epochs", type=int, metavar="N", help="at most (default 10)")
    run.add_argument("--max-steps", type=int, metavar="N", help="end after so many steps")
    run.add_argument("--patience", type=int, metavar="N", help="looks without improvement before it stops (default 2)")
    run.add_argument("--batch-size", type=int, metavar="N", help="pairs of a step (default 16)")
    run.add_argument("--seed", type=int, metavar="N", help="of order and adapter (default 0)")


def run(args: Namespace, terminal: Terminal) -> None:
    """Train, write the model's folder, and print the grid."""
    if args.loss not in LOSSES:
        raise unknown_name("loss", args.loss, LOSSES)
    out = new_folder(args.out)
    pairs = load_pairs(args.pairs, split="train", duplicates=args.duplicates)
    held = load_pairs(args.validation, split="validation", duplicates=args.duplicates) if args.validation else None
    with terminal.working("Preparing"):
        from trimtab.checkpoint import remove
        from trimtab.evals.tasks import run_task
        from trimtab.train import train
        from trimtab.train.loops import load_trainers

        task = load_task(args.task, grader="exact_match", max_new_tokens=128) if args.task else None
        load_trainers()  # before the model is loaded, which may take long
    with open_model(args, terminal) as (model, tokenizer):
        working = terminal.working(f"Training on {counted(len(pairs), 'pair')} ({args.loss})", counted=True)
        with options.resumable(args.checkpoint), working as progress:
            trained = train(
                model,
                tokenizer,
                pairs,
                loss=args.loss,
                validation=held,
                score=None if task is None else lambda made: run_task(made, tokenizer, task).accuracy,
                scored_by=None if task is None else _named(args.task, task),
                progress=progress,
                **given(args, *TRAIN),
            )
        _write(trained.model, tokenizer, trained.record, out)
    terminal.result({**trained.record, "out": str(out)}, _text(trained.record, out))
    if args.checkpoint is not None:
        remove(args.checkpoint)


def _named(text: str, task: AnyTask) -> str:
    """Name a task so that no other has the name: what was typed names the grader, the file holds the true answers."""
    from trimtab.checkpoint import fingerprint

    parts = dict.fromkeys([text, text.rpartition(":")[0], *text.split(":")])
    files = [Path(part).read_bytes() for part in parts if Path(part).is_file()]
    return f"{task.name} {fingerprint([text, task.prompts, files])[:12]}"


def _write(model: Any, tokenizer: Any, record: dict[str, Any], out: Path) -> None:
    """Write the model beside its place and move it there, so that a folder of that name is whole."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, as checked
        made.rename(out)


def _text(record: dict[str, Any], out: Path) -> str:
    chosen, table = record["chosen"], record["table"]
    at_best = next(row for row in table if {key: row[key] for key in chosen} == chosen)
    beta = "" if record["loss"] == "sft" else f", beta {chosen['beta']:g}"
    tied = f"; a tie of {record['tied']} settings: the mildest is taken" if record["tied"] > 1 else ""
    used, held = record["pairs"]["count"], record["validation"]["count"]
    head = facts(
        {
            "trained": f"{record['loss']} on {counted(used, 'pair')}, {held} held out",
            "chosen": f"learning rate {chosen['learning_rate']:g}{beta}, by {record['chosen_by']} on validation{tied}",
            "stopped": f"after {at_best['steps']} steps; the weights are those of step {at_best['best_step']}",
            "seconds": f"{record['run']['seconds']:.1f} for this run, {record['grid']['seconds']:.1f} for the grid",
            "written to": out,
            "next": f'trimtab generate {shlex.quote(str(out))} "..."',
        }
    )
    heads = ["", "rate", "beta", "score", "preference", "margin", "best loss", "best step", "steps", "seconds"]
    rows = [
        [
            "*" if row is at_best else "",
            row["learning_rate"],
            row["beta"] or None,
            row["score"],
            row["preference"],
            row["margin"],
            min((value for value in row["validation_losses"] if value is not None), default=None),
            row["best_step"],
            row["steps"],
            row["seconds"],
        ]
        for row in table
    ]
    return f"{head}\n\nthe grid on validation pairs (* chosen)\n{columns(heads, rows)}"
