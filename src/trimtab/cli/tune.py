"""Choose a knob's site, tokens and gain on held-out pairs (of weights, the gain), under a budget for guardrails.

Pairs, task and guardrails must be data that learning has not seen, and not what the knob will be tested on: parts of
PrefWorld are taken from its validation split, and of a benchmark (caa, gsm8k, humaneval, mbpp, mmlu, pairs,
pairs-per-token, truthfulqa-mc1, truthfulqa-mc2, xstest-safe, xstest-unsafe) three questions in ten. Without a task the
margin between the pairs' answers decides.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options
from trimtab.cli.options import given, input_file, output_file
from trimtab.cli.sources import TASKS, load_pairs, load_task, open_model
from trimtab.cli.tables import counted, facts, tuning_text
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, unknown_name

if TYPE_CHECKING:
    from trimtab.artifact import AnyKnob

TUNE = ("gains", "where", "finalists", "strengths", "agreement", "budget", "broken_budget", "batch_size", "checkpoint")
"""Options that go to `trimtab.tune` under their own names."""


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument("--knob", required=True, metavar="FILE", help="the knob, as learned")
    parser.add_argument("--pairs", required=True, metavar="PAIRS", help="held-out pairs: a file, or prefworld:math")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the tuned knob")
    parser.add_argument("--duplicates", default="error", help="error, drop or keep pairs seen before (default error)")
    parser.add_argument("--no-strict", action="store_true", help="warn of a knob from another model, do not refuse it")
    options.add_checkpoint(parser)
    goal = parser.add_argument_group("what decides")
    goal.add_argument("--task", metavar="TASK", help=f"what should get better: {TASKS}")
    goal.add_argument(
        "--guardrail", action="append", default=[], metavar="TASK", help="what must not get worse; may be repeated"
    )
    goal.add_argument(
        "--grader", default="exact_match", help="contains, exact_answer, exact_match or refusal (default exact_match)"
    )
    goal.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="cut answers to files' prompts there (default 128)"
    )
    goal.add_argument("--budget", type=float, metavar="X", help="share a guardrail may lose (default 0.02)")
    goal.add_argument("--broken-budget", type=float, metavar="X", help="share of answers that may break (default 0.05)")
    search = parser.add_argument_group("what is tried")
    search.add_argument(
        "--gains", type=options.numbers, metavar="LIST", help="alphas as in 0.2,0.5; of weights, multiples"
    )
    search.add_argument(
        "--where",
        type=options.names,
        metavar="LIST",
        help="tokens to steer, as in prompt,context (default: the knob's)",
    )
    search.add_argument("--finalists", type=int, metavar="N", help="sites with tokens that answer the task (default 3)")
    search.add_argument("--strengths", type=options.numbers, metavar="LIST", help="of the dose-response, as in -1,1,2")
    search.add_argument("--agreement", type=float, metavar="COS", help="of the pairs' halves on a site (default 0.2)")
    search.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default 128)")


def run(args: Namespace, terminal: Terminal) -> None:
    """Tune, save, and print the tables that decided."""
    out = output_file(args.out)
    if out.resolve() == Path(args.knob).resolve():
        raise OptionError(f"--out {args.out!r} is the knob itself, whose other sites would be lost. Name another file.")
    file = input_file(args.knob, "a knob file")
    if args.max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens is 1 or more; got {args.max_new_tokens}.")
    with terminal.working("Preparing"):
        from trimtab.artifact import load_knob
        from trimtab.checkpoint import remove
        from trimtab.evals.tasks import GRADERS
        from trimtab.tune import tune

        if args.grader not in GRADERS:
            raise unknown_name("grader", args.grader, GRADERS)

        knob = load_knob(file)
        pairs = load_pairs(args.pairs, split="validation", duplicates=args.duplicates)
        task, *guardrails = [
            load_task(text, grader=args.grader, max_new_tokens=args.max_new_tokens) if text else None
            for text in [args.task, *args.guardrail]
        ]
    with open_model(args, terminal) as loaded:
        knob.check(loaded.model, loaded.tokenizer, strict=not args.no_strict)
        working = terminal.working(f"Tuning {knob.name}", counted=True)
        with options.resumable(args.checkpoint), working as progress:
            tuned = tune(
                knob,
                loaded.model,
                loaded.tokenizer,
                pairs,
                task=task,
                guardrails=[rail for rail in guardrails if rail is not None],
                progress=progress,
                **given(args, *TUNE),
            )
    tuned.save(out)
    terminal.result(_record(tuned, out), _text(tuned, args, out))
    if args.checkpoint is not None:
        remove(args.checkpoint)


def _record(knob: AnyKnob, out: Path) -> dict[str, Any]:
    tuning = knob.tuning or {}
    shown = (
        "task",
        "guardrails",
        "budget",
        "pairs",
        "pairs_hash",
        "options",
        "base",
        "selection_bias",
        "table",
        "dose_response",
        "safe_range",
        "seconds",
    )
    return {
        "knob": knob.name,
        "site": _site(knob),
        "where": knob.where,
        "gain": knob.gain,
        **{key: tuning.get(key) for key in shown},
        "out": str(out),
    }


def _site(knob: AnyKnob) -> str | None:
    """Return where the stream is moved; weights have no site."""
    return None if knob.kind == "delta" else str(knob.site)


def _gain(knob: AnyKnob) -> str | None:
    if knob.operation == "ablate":
        return None
    what = f"alpha {knob.gain:g}" if _site(knob) else f"{knob.gain:g} times the difference"
    return f"{knob.gain:g}: strength 1 is {what}"


def _text(knob: AnyKnob, args: Namespace, out: Path) -> str:
    from trimtab.artifact.card import describe_safe_range

    tuning = knob.tuning or {}
    file = shlex.quote(str(out))
    head = facts(
        {
            "tuned": f"{knob.name} on {counted(tuning['pairs'], 'pair')} in {tuning['seconds']:.1f} s",
            "site": _site(knob),
            "steers": f"{knob.where} tokens" if _site(knob) else None,
            "gain": _gain(knob),
            "safe range": f"strengths {describe_safe_range(knob)}" if knob.safe_range else None,
            "written to": out,
            "next": f'trimtab generate {shlex.quote(args.model)} "..." --knob {file}',
        }
    )
    return "\n\n".join(filter(None, [head, tuning_text(tuning, _site(knob) or "weights", knob.where, knob.gain)]))
