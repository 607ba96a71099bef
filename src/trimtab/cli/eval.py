"""Measure a model without knobs and under a setting: tasks, preference, side effects, cost; once, on unseen data.

Data must be what neither learning nor tuning has seen: parts of PrefWorld are taken from its test split. Without --knob
the bare model is measured. A judge is any OpenAI-compatible endpoint; its key is read from an environment variable.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.cli import options
from trimtab.cli.findings import Row, evaluation_tables
from trimtab.cli.options import given, input_file, writable
from trimtab.cli.sources import (
    BENCHMARK_NAMES,
    TASKS,
    check_knobs,
    load_knobs,
    load_pairs,
    load_task,
    open_model,
    setting_from,
    warn_outside,
)
from trimtab.cli.tables import columns, facts, markdown
from trimtab.cli.terminal import Terminal, harmless
from trimtab.errors import OptionError, unknown_name
from trimtab.files import write_atomically

if TYPE_CHECKING:
    from trimtab.evals.evaluation import Evaluation
    from trimtab.evals.judge import Judge

EVALUATE = (
    "sampled",
    "temperature",
    "seed",
    "batch_size",
    "max_new_tokens",
    "kl_items",
    "judge_items",
    "checkpoint",
)
"""Options that go to `trimtab.evals.evaluate.evaluate` under their own names."""
TITLE = "# Trimtab evaluation"
"""First line of a report in Markdown, by which one is known that may be replaced."""


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    options.add_knobs(parser, thinking=False)
    parser.add_argument("--out", metavar="FILE", help="where to write the report: .json (everything) or .md")
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default 128)")
    options.add_checkpoint(parser)
    data = parser.add_argument_group("what is measured")
    data.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="TASK",
        help=f"{TASKS}; may be repeated. Benchmarks, by their test questions: {BENCHMARK_NAMES}",
    )
    data.add_argument(
        "--guardrail", action="append", default=[], metavar="TASK", help="what must not get worse; may be repeated"
    )
    data.add_argument(
        "--grader", default="exact_match", help="contains, exact_answer, exact_match or refusal (default exact_match)"
    )
    data.add_argument("--pairs", metavar="PAIRS", help="held-out pairs: a file, or prefworld:math")
    data.add_argument("--duplicates", default="error", help="error, drop or keep pairs seen before (default error)")
    data.add_argument(
        "--neutral", metavar="FILE", help="neutral text for perplexity: paragraphs (.txt, .md), or records with text"
    )
    data.add_argument("--kl-items", type=int, metavar="N", help="answers per task for the KL to base (default 16)")
    draws = parser.add_argument_group("how answers are drawn")
    draws.add_argument("--sampled", action="store_true", default=None, help="ask the tasks a second time, sampled")
    draws.add_argument("--temperature", type=float, metavar="T", help="of the sampled answers (default 1.0)")
    draws.add_argument("--seed", type=int, metavar="N", help="of the sampled answers (default 0)")
    draws.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="cut answers to prompts from files there (default 128)"
    )
    judge = parser.add_argument_group("who judges answers, besides the graders")
    judge.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint, as in http://localhost:8000/v1")
    judge.add_argument("--judge-model", metavar="NAME", help="the model to ask there")
    judge.add_argument(
        "--judge-key", metavar="VARIABLE", help="environment variable that holds the key (default OPENAI_API_KEY)"
    )
    judge.add_argument("--judge-cache", metavar="DIR", help="keep the judge's replies here, and take those that are")
    judge.add_argument(
        "--judge-items", type=int, metavar="N", help="prompts judged, of the pairs or else of each task (default 100)"
    )


def run(args: Namespace, terminal: Terminal) -> None:
    """Measure, write the report, and print it."""
    out = None if args.out is None else _report_file(args.out)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens is 1 or more; got {args.max_new_tokens}.")
    if args.batch_size is not None and args.batch_size < 1:
        raise OptionError(f"--batch-size is 1 or more; got {args.batch_size}.")
    if args.temperature is not None and not args.sampled:
        raise OptionError("--temperature is that of sampled answers. Add --sampled.")
    neutral = None if args.neutral is None else input_file(args.neutral, "a file of neutral text")
    with terminal.working("Preparing"):
        from trimtab.checkpoint import remove
        from trimtab.evals.effects import load_texts
        from trimtab.evals.evaluate import evaluate
        from trimtab.evals.tasks import GRADERS

        if args.grader not in GRADERS:
            raise unknown_name("grader", args.grader, GRADERS)
        judge = _judge(args)
        panel = load_knobs(args.knob, args.where)
        setting = setting_from(args, panel)
        tokens = 128 if args.max_new_tokens is None else args.max_new_tokens
        tasks, guardrails = (
            [load_task(text, grader=args.grader, max_new_tokens=tokens, split="test") for text in texts]
            for texts in (args.task, args.guardrail)
        )
        pairs = None
        if args.pairs is not None:
            pairs = load_pairs(args.pairs, split="test", duplicates=args.duplicates)
        texts = None if neutral is None else load_texts(neutral)
    with open_model(args, terminal) as loaded:
        check_knobs(panel.rack, loaded, strict=not args.no_strict)
        warn_outside(panel.rack, setting)
        dose = panel.rack.resolve(setting)
        with options.resumable(args.checkpoint), terminal.working("Evaluating", counted=True) as progress:
            found = evaluate(
                loaded.model,
                loaded.tokenizer,
                tasks,
                dose or (),
                guardrails=guardrails,
                pairs=pairs,
                neutral=texts,
                judge=judge,
                progress=progress,
                **given(args, *EVALUATE),
            )
    if out is not None:
        _write(found, args, out)
    record = found.record()
    terminal.result(record if out is None else {**record, "out": str(out)}, _text(record, args, out))
    if args.checkpoint is not None:
        remove(args.checkpoint)


def _judge(args: Namespace) -> Judge | None:
    named = {"model": args.judge_model, "key_variable": args.judge_key, "cache": args.judge_cache}
    asked = {name: value for name, value in named.items() if value is not None}
    if args.judge is None:
        if asked or args.judge_items is not None:
            raise OptionError("There is no judge. Pass --judge URL --judge-model NAME.")
        return None
    if args.judge_model is None:
        raise OptionError("--judge needs --judge-model, the name of a model that it serves.")
    from trimtab.evals.judge import Judge

    return Judge(base_url=args.judge, **asked)


# The report


def _report_file(text: str) -> Path:
    """Check before any work is done that a report can be written there, and that nothing else is replaced."""
    path = writable(text)
    if path.suffix not in (".json", ".md"):
        raise OptionError(f"--out {text!r} is a report, and ends in .json (everything) or .md.")
    if path.exists():
        with path.open("rb") as file:
            start = file.read(100)
        if start.strip() and not start.startswith(TITLE.encode()) and b'"trimtab": "evaluation"' not in start:
            raise OptionError(f"--out {text!r} exists and is no report, so it is not replaced. Choose another name.")
    return path


def _write(found: Evaluation, args: Namespace, out: Path) -> None:
    if out.suffix == ".json":
        found.save(out)
        return
    import json

    record = found.record()
    parts = [TITLE, _subject(record)]
    for table in evaluation_tables(record):
        parts += [table.sentence, markdown(table.heads, table.rows)]
    parts += [f"Note: {note}" for note in record["notes"]]
    parts += ["## Spec", f"```json\n{json.dumps(record['spec'], indent=1)}\n```"]
    write_atomically(out, harmless("\n\n".join(parts) + "\n").encode())


def _text(record: Row, args: Namespace, out: Path | None) -> str:
    parts = [_subject(record)]
    parts += [f"{table.sentence}\n{columns(table.heads, table.rows)}" for table in evaluation_tables(record)]
    parts += [f"note: {note}" for note in record["notes"]]
    hint = None if record["settings"] else f"trimtab eval {shlex.quote(args.model)} --knob FILE ..."
    parts.append(facts({"written to": out, "next": hint}))
    return "\n\n".join(filter(None, parts))


def _subject(record: Row) -> str:
    """Say what is compared, and on which model."""
    knobs = [
        f"{k['knob']} at strength {k['strength']:g} ({_dose(k)}, {_place(k)})"
        for k in (record["spec"]["settings"] or [[]])[0]
    ]
    model = record["spec"]["model"]["model"]
    return f"{model} without knobs, and with {' and '.join(knobs)}." if knobs else f"{model} without knobs."


def _dose(knob: Row) -> str:
    return "an ablation" if knob["operation"] == "ablate" else f"alpha {knob['alpha']:g}"


def _place(knob: Row) -> str:
    """Say where a knob acts: at a layer, or several, on some tokens, or in the weights."""
    if "layers" in knob:
        layers = ", ".join(map(str, knob["layers"]))
        return f"layer{'s' if len(knob['layers']) > 1 else ''} {layers}, {knob['where']} tokens"
    if "site" not in knob:
        return f"{knob['weights']} weight matrices" if knob["weights"] > 1 else "one weight matrix"
    return f"layer {knob['site'].replace('/', ', ')}, {knob['where']} tokens"
