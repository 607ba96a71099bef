"""Find strengths of several knobs for a goal, on validation data, and write them as a panel.

A panel stands wherever a knob does, as in `trimtab generate MODEL "..." --knob panel.json`. Knobs of all kinds mix;
tune them first, and each knob's safe range bounds its strengths. Data must be what learning has not seen and what the
panel will not be tested on: parts of PrefWorld are taken from its validation split, and of a benchmark three questions
in ten.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.cli import options
from trimtab.cli.options import given, writable
from trimtab.cli.sources import TASKS, check_knobs, load_task, named_file, open_model, two_named
from trimtab.cli.tables import columns, facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, unknown_name
from trimtab.types import check_strength, format_setting, parse_setting

if TYPE_CHECKING:
    from trimtab.artifact import Rack
    from trimtab.compose import Composed

COMPOSE = ("rule", "budget", "broken_budget", "search", "trials", "seed", "batch_size", "checkpoint")
"""Options that go to `trimtab.compose` under their own names."""
SHOWN = 10
"""Rows of the front that are printed."""
REPORT = ("compose.json", "compose.html")
"""What a report's folder holds; a test compares with what is written."""


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument(
        "--knob", action="append", required=True, metavar="[NAME=]FILE", help="a knob of any kind; may be repeated"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the panel, a .json file")
    parser.add_argument("--report", metavar="DIR", help="write the record and a page with plots to this folder")
    parser.add_argument("--no-strict", action="store_true", help="warn of a knob from another model, do not refuse it")
    options.add_checkpoint(parser)
    goal = parser.add_argument_group("what decides")
    goal.add_argument(
        "--prefer",
        action="append",
        default=[],
        metavar="TASK[=WEIGHT]",
        help=f"what should get better, by how much it counts (default weight 1, 0 reports only): {TASKS}; may be "
        "repeated",
    )
    goal.add_argument(
        "--target", action="append", default=[], metavar="TASK=SCORE", help="a score to come close to; may be repeated"
    )
    goal.add_argument(
        "--guardrail", action="append", default=[], metavar="TASK", help="what must not get worse; may be repeated"
    )
    goal.add_argument(
        "--floor", action="append", default=[], metavar="NAME=SCORE", help="a score that must be kept; may be repeated"
    )
    goal.add_argument("--rule", metavar="RULE", help="sum, or worst: what comes off worst decides (default sum)")
    goal.add_argument(
        "--grader", default="exact_match", help="contains, exact_answer, exact_match or refusal (default exact_match)"
    )
    goal.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="cut answers to files' prompts there (default 128)"
    )
    goal.add_argument("--budget", type=float, metavar="X", help="share a guardrail may lose (default 0.02)")
    goal.add_argument("--broken-budget", type=float, metavar="X", help="share of answers that may break (default 0.05)")
    search = parser.add_argument_group("what is tried")
    search.add_argument("--search", metavar="HOW", help="tpe, nsga2 or grid (default tpe)")
    search.add_argument("--trials", type=int, metavar="N", help="settings that tpe and nsga2 ask for, 60 by default")
    search.add_argument(
        "--bounds",
        action="append",
        default=[],
        metavar="NAME=LOW,HIGH",
        help="strengths of a knob (default: its safe range, or -1 to 1.5); may be repeated",
    )
    search.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="[NAME=]LIST",
        help="strengths for --search grid, of all knobs or of one, as in math=0,0.5,1; may be repeated",
    )
    search.add_argument("--seed", type=int, metavar="N", help="of the search (default 0)")
    search.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default 128)")


def run(args: Namespace, terminal: Terminal) -> None:
    """Compose, write the panel and the report, and print what decided."""
    out, report = _panel_file(args.out), None if args.report is None else _report_folder(args.report)
    if args.max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens is 1 or more; got {args.max_new_tokens}.")
    if not args.prefer and not args.target:
        raise OptionError("There is no goal. Pass --prefer TASK, or --target TASK=SCORE.")
    both = {text.partition("=")[0] for text in args.prefer} & {text.rpartition("=")[0] for text in args.target}
    if both:
        raise OptionError(f"{min(both)} has a weight and a target. Leave its --prefer out.")
    weighed, aimed = [_wanted(text, 1.0) for text in args.prefer], [_wanted(text, None) for text in args.target]
    floors = parse_setting(",".join(args.floor))
    with terminal.working("Preparing"):
        from trimtab.artifact.rack import check_panel_place
        from trimtab.checkpoint import remove
        from trimtab.compose import compose
        from trimtab.compose.page import write_report
        from trimtab.evals.tasks import GRADERS

        if args.grader not in GRADERS:
            raise unknown_name("grader", args.grader, GRADERS)
        check_panel_place(out)
        rack, files = _load_rack(args.knob)
        tasks, targets, guardrails = (
            [load_task(text, grader=args.grader, max_new_tokens=args.max_new_tokens) for text in texts]
            for texts in ([want.task for want in weighed], [want.task for want in aimed], args.guardrail)
        )
    with open_model(args, terminal) as loaded:
        check_knobs(rack, loaded, strict=not args.no_strict)
        with options.resumable(args.checkpoint), terminal.working("Composing", counted=True) as progress:
            composed = compose(
                rack,
                loaded.model,
                loaded.tokenizer,
                [*tasks, *targets],
                weights={task.name: want.number for task, want in zip(tasks, weighed, strict=True)},
                targets={task.name: want.number for task, want in zip(targets, aimed, strict=True)},
                guardrails=guardrails,
                floors=floors,
                bounds=_bounds(args.bounds),
                grid=_grid(args.grid, rack),
                progress=progress,
                **given(args, *COMPOSE),
            )
    composed.save(out, files)
    if report is not None:
        write_report(composed.record, report)
    places = {"out": str(out), **({} if report is None else {"report": str(report)})}
    terminal.result({**composed.record, **places}, _text(composed, args, out, report))
    if args.checkpoint is not None:
        remove(args.checkpoint)


# What the options say


def _panel_file(text: str) -> Path:
    path = writable(text)
    if path.suffix != ".json":
        raise OptionError(f"--out {text!r} is a panel, which is told from knobs by its suffix. Let it end in .json.")
    return path


def _report_folder(text: str) -> Path:
    """Check that a report can be written there, and that nothing but another one is replaced."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise OptionError(f"--report is a folder to write to; got {text!r}.")
    strangers = sorted(file.name for file in path.iterdir() if file.name not in REPORT) if path.is_dir() else []
    if strangers:
        raise OptionError(f"--report {text!r} holds other files, {strangers[0]!r} for one. Choose another folder.")
    writable(str(path / REPORT[0]))
    return path


def _load_rack(entries: Sequence[str]) -> tuple[Rack, dict[str, Path]]:
    """Load the knobs, and say where each lies; panels are refused, since their strengths would be lost."""
    from trimtab.artifact import AnyKnob, Rack, load_knob

    knobs: dict[str, AnyKnob] = {}
    files: dict[str, Path] = {}
    for name, path in map(named_file, entries):
        if path.suffix == ".json":
            raise OptionError(f"{str(path)!r} is a panel. Pass its knobs, one --knob NAME=FILE each.")
        knob = load_knob(path)
        key = name or knob.name
        if key in knobs:
            raise two_named(key)
        knobs[key], files[key] = knob, path
    return Rack(**knobs), files


class _Wanted(NamedTuple):
    """A task as it is written, and the weight or the target that it has."""

    task: str
    number: float


def _wanted(text: str, otherwise: float | None) -> _Wanted:
    """Read `TASK=NUMBER`, or `TASK` where there is a number otherwise; a file may have an equals sign in its name."""
    task, equals, number = text.rpartition("=")
    if equals and not Path(text).exists():
        return _Wanted(task, check_strength(number, f"number of {task!r}"))  # pyright: ignore[reportArgumentType]
    if otherwise is None:
        raise OptionError(f"--target takes TASK=SCORE, as in prefworld:concise=0.8; got {text!r}.")
    return _Wanted(text, otherwise)


def _bounds(texts: Sequence[str]) -> dict[str, tuple[float, float]] | None:
    found: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, ends = text.rpartition("=")
        values = _numbers(ends, "--bounds", text)
        if not name or len(values) != 2:
            raise OptionError(f"--bounds takes NAME=LOW,HIGH, as in math=-1,1.5; got {text!r}.")
        found[name] = values[0], values[1]
    return found or None


def _grid(texts: Sequence[str], rack: Rack) -> dict[str, list[float]] | None:
    """Read `LIST`, for all knobs, and `NAME=LIST`, for one."""
    found: dict[str, list[float]] = {}
    for text in texts:
        name, equals, values = text.rpartition("=")
        strengths = _numbers(values, "--grid", text)
        found |= {name: strengths} if equals else {key: strengths for key in rack if key not in found}
    return found or None


def _numbers(text: str, option: str, whole: str) -> list[float]:
    try:
        return options.numbers(text)
    except ArgumentTypeError as error:
        raise OptionError(f"{option} {whole!r}: {error}.") from None


# What is printed


def _text(composed: Composed, args: Namespace, out: Path, report: Path | None) -> str:
    record = composed.record
    goal, bias, base, chosen = record["goal"], record["selection_bias"], record["base"], record["chosen"]
    wanted = [*(f"{name} x {weight:g}" for name, weight in goal["weights"].items())]
    wanted += [f"{name} at {score:g}" for name, score in goal["targets"].items()]
    head = facts(
        {
            "composed": f"{', '.join(record['knobs'])} in {record['seconds']:.1f} s",
            "goal": f"{goal['rule']} of {', '.join(wanted)}",
            "strengths": format_setting(chosen["setting"]),
            "gain": f"{record['gain']:.3g} over base; the best of {bias['settings']} useless settings would seem to "
            f"gain {bias['expected']:.2g}",
            "written to": out,
            "report": report and report / REPORT[1],
            "next": f'trimtab generate {shlex.quote(args.model)} "..." --knob {shlex.quote(str(out))}',
        }
    )
    shown = [record["trials"][number] for number in record["front"]]
    if len(shown) > SHOWN:
        shown = sorted(shown, key=lambda row: -row["value"])[:SHOWN]
    more = f", the best {SHOWN} of {len(record['front'])}" if len(record["front"]) > SHOWN else ""
    rows = [["base", *_measures(base)], ["chosen", *_measures(chosen)]]
    rows += [[format_setting(row["setting"]), *_measures(row)] for row in shown]
    heads = ["setting", *base["scores"], *base["guardrails"], "broken", "KL", "value"]
    return "\n\n".join([head, f"the Pareto front{more}\n{columns(heads, rows)}", _cross_talk(record)])


def _measures(row: Mapping[str, Any]) -> list[object]:
    return [*row["scores"].values(), *row["guardrails"].values(), row["broken"], row["kl"], row["value"]]


def _cross_talk(record: Mapping[str, Any]) -> str:
    rows: list[list[object]] = []
    for knob, found in record["cross_talk"].items():
        cells = [f"{c['estimate']:+.2f} ({c['low']:+.2f} to {c['high']:+.2f})" for c in found["changes"].values()]
        rows.append([f"{knob} at {found['strength']:g}", *cells])
    tasks = next(iter(record["cross_talk"].values()))["changes"]
    return f"cross-talk: change of each score by each knob alone\n{columns(['knob', *tasks], rows)}"
