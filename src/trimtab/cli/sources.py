"""What a verb works on: models, knobs with their setting, pairs and tasks, from files or from PrefWorld."""

from __future__ import annotations

import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from trimtab.cli.options import assignments, input_file
from trimtab.cli.quiet import quiet_transformers
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, PairsError, TrimtabError, TrimtabWarning, unknown_name
from trimtab.types import Setting, check_strength, check_where, parse_setting

if TYPE_CHECKING:
    from trimtab.artifact import AnyKnob, Panel, Rack
    from trimtab.engines.vllm.offline import Engine
    from trimtab.evals.tasks import AnyTask
    from trimtab.pairs import Duplicates, Pairs
    from trimtab.render import Loaded
    from trimtab.team import Team

WORLD = "prefworld"
WORLD_COUNT = 100
"""Pairs or questions drawn from a family of PrefWorld where no count is given."""
WORLD_LIMIT = 10_000

# Models


@contextmanager
def open_model(args: Namespace, terminal: Terminal) -> Generator[Loaded]:
    """Load the model that the options name; meanwhile transformers keeps its bars and remarks to itself."""
    with ExitStack() as stack:
        with terminal.working(f"Loading {args.model}"):
            from trimtab.render import load

            local = args.model == WORLD or Path(args.model).expanduser().is_dir()
            # The bars of a download are for the user to see.
            stack.enter_context(quiet_transformers(bars=not local and sys.stderr.isatty()))
            loaded = load(args.model, dtype=args.dtype or "auto", device=args.device)
        yield loaded


def vllm_options(args: Namespace) -> tuple[str, dict[str, object]]:
    """Return what vLLM is to load, a hub name or a folder, and the options that the user gave it.

    Sets `VLLM_NO_USAGE_STATS` unless the user has: what is run here is nobody's business.
    """
    from trimtab.engines.vllm.launch import model_options

    source, own = model_options(args.model)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    dtype = {"dtype": args.dtype} if args.dtype else {}
    return source, {**own, **dtype, **assignments(args.engine_option, "--engine-option")}


@contextmanager
def open_vllm(args: Namespace, terminal: Terminal, rack: Rack) -> Generator[Engine]:
    """Start vLLM in this process; its log, of errors only unless the environment says otherwise, goes to stderr."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    model, own = vllm_options(args)
    with ExitStack() as stack:
        with terminal.working(f"Starting vLLM with {args.model}"):
            from trimtab.engines.vllm.offline import Engine

            try:
                engine = stack.enter_context(Engine(model, rack, strict=not args.no_strict, options=own))
            except TrimtabError:
                raise
            except (ValueError, TypeError, RuntimeError, OSError) as error:  # of vLLM's, which says more above
                raise OptionError(f"vLLM does not start: {str(error).strip().splitlines()[0]}") from None
        yield engine


@contextmanager
def open_workers(args: Namespace, terminal: Terminal) -> Generator[Team]:
    """Join the processes that torchrun has started, if it has; all but the first keep quiet, each on its own GPU."""
    from trimtab.team import open_team

    with open_team() as team:
        if not team.leads:
            terminal.quiet = True
            warnings.simplefilter("ignore", TrimtabWarning)  # the first one says it
        if team.size > 1 and args.device == "cuda":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        yield team


def refuse_workers(team: Team, method: str) -> None:
    """Raise `OptionError` for a method that several processes cannot share."""
    if team.size > 1:
        raise OptionError(f"{method} trains in one process. Start it without torchrun.")


# Knobs


def load_knobs(entries: Sequence[str], where: str | None) -> Panel:
    """Load knobs and panels from `FILE` or `NAME=FILE`; a knob stands at 1 and a panel's knobs where it says.

    `where` replaces the tokens that the knobs steer, and with them what tuning found of others.
    """
    from trimtab.artifact import DeltaKnob, Panel, Rack, load_knob, load_panel

    tokens = None if where is None else check_where(where)
    if tokens is not None and not entries:
        raise OptionError("--where needs a knob. Add --knob FILE.")
    knobs: dict[str, AnyKnob] = {}
    setting: dict[str, float] = {}
    for entry in entries:
        name, path = named_file(entry)
        if path.suffix == ".json":
            if name:
                raise OptionError(f"A panel names its knobs itself: pass --knob {path}, without {name}=.")
            panel = load_panel(path)
            added = {key: (panel.rack[key], strength) for key, strength in panel.setting.items()}
        else:
            knob = load_knob(path)
            added = {name or knob.name: (knob.with_(name=name) if name else knob, 1.0)}
        for key, (knob, strength) in added.items():
            if key in knobs:
                raise two_named(key)
            knobs[key] = knob if isinstance(knob, DeltaKnob) or not tokens else knob.with_(where=tokens)
            setting[key] = strength
    return Panel(Rack(**knobs), setting)


def named_file(entry: str) -> tuple[str, Path]:
    """Read `FILE` or `NAME=FILE`; the name is empty where none is given."""
    name, equals, file = entry.partition("=")
    if not equals or Path(entry).exists():
        name, file = "", entry
    elif not name:
        raise OptionError(f"--knob takes FILE or NAME=FILE; got {entry!r}.")
    return name, input_file(file, "a knob file")


def two_named(name: str) -> OptionError:
    """Build the error for a second knob of a name."""
    return OptionError(f"Two knobs are named {name!r}. Name them yourself: --knob NAME=FILE.")


def setting_from(args: Namespace, panel: Panel) -> dict[str, float]:
    """Return the setting that --strength or --set asks for, or else the panel's own."""
    asked = "--strength" if args.strength is not None else "--set" if args.set is not None else None
    if asked and not panel.rack:
        raise OptionError(f"{asked} needs a knob. Add --knob FILE.")
    if args.strength is not None:
        return dict.fromkeys(panel.rack, check_strength(args.strength))
    if args.set is not None:
        setting = parse_setting(args.set)
        panel.rack.resolve(setting)  # names that are not there
        return setting
    return panel.setting


def check_knobs(rack: Rack, loaded: Loaded, *, strict: bool) -> None:
    """Compare every knob with the model; raises `KnobError`, or warns where not `strict`."""
    for knob in rack.values():
        knob.check(loaded.model, loaded.tokenizer, strict=strict)


ADDING = ("add", "piecewise", "kernel", "lookahead")
"""Operations whose strength is a length."""
LARGE_ALPHA = 3.0
"""A rough guess, in mean residual norms: tuned gains on the bundled model are 0.4, and few papers go beyond 1."""


def warn_outside(rack: Rack, setting: Setting) -> None:
    """Warn of strengths outside the range that tuning found safe, and of untuned knobs at those that drown the text."""
    for name, strength in setting.items():
        knob = rack[name]
        bounds = knob.safe_range
        if bounds is None and knob.operation in ADDING and abs(knob.alpha(strength)) > LARGE_ALPHA:
            warnings.warn(
                f"Strength {strength:g} of {name!r} adds {abs(knob.alpha(strength)):.3g} times the mean residual norm; "
                "answers are likely to break. Tune the knob, or try smaller strengths.",
                TrimtabWarning,
                stacklevel=2,
            )
        elif bounds is not None and not bounds[0] <= strength <= bounds[1]:
            warnings.warn(
                f"Strength {strength:g} of {name!r} lies outside its safe range, {bounds[0]:g} to {bounds[1]:g}; "
                "beyond it tuning measured nothing, or broken answers, or fallen guardrails.",
                TrimtabWarning,
                stacklevel=2,
            )


# Pairs and tasks


Split = Literal["train", "validation", "test"]
"""Of PrefWorld; files are taken whole."""


class WorldPart(NamedTuple):
    """A family of PrefWorld, and how many of its questions."""

    family: str
    size: int


def held_out_of(text: str) -> str:
    """Return what to pass for held-out pairs, beside pairs that were learned from: a world has splits of its own."""
    return text if text.startswith(f"{WORLD}:") else "HELD_OUT.jsonl"


def world_part(text: str) -> WorldPart | None:
    """Read `prefworld:FAMILY` or `prefworld:FAMILY:COUNT`; None for anything else, which is a file."""
    world, _, rest = text.partition(":")
    if world != WORLD or Path(text).exists():
        return None
    from trimtab.prefworld.families import FAMILIES

    family, colon, count = rest.partition(":")
    if family not in FAMILIES:
        raise unknown_name("family of PrefWorld", family, FAMILIES)
    if colon and not (count.isdecimal() and int(count) > 0):
        raise OptionError(f"A part of PrefWorld is written prefworld:math or prefworld:math:200; got {text!r}.")
    if colon and int(count) > WORLD_LIMIT:
        raise OptionError(f"PrefWorld draws at most {WORLD_LIMIT} at a time; got {text!r}.")
    return WorldPart(family, int(count) if colon else WORLD_COUNT)


def load_pairs(text: str, *, split: Split, duplicates: Duplicates) -> Pairs:
    """Load pairs from a file, or draw them from a split of PrefWorld: the same name gives the same pairs."""
    from trimtab.pairs import Pairs

    part = world_part(text)
    if part is None:
        path = input_file(text, "a JSON or JSONL file of pairs (or CSV, TSV, Parquet), or prefworld:FAMILY")
        return Pairs.load(path, duplicates=duplicates)
    from trimtab.prefworld import world

    pairs = world.pairs(part.family, part.size, split=split)
    if not len(pairs):
        raise PairsError(f"The answers of PrefWorld's family {part.family!r} have one side only: there are no pairs.")
    return pairs


TASKS = "FILE[:GRADER] with prompt and answer per item, BENCHMARK:FILE[:COUNT], or prefworld:FAMILY[:COUNT]"
"""How a task is written, for the help of every verb that takes one."""
BENCHMARK_NAMES = (
    "caa, gsm8k, humaneval, mbpp, mmlu, pairs, pairs-per-token, truthfulqa-mc1, truthfulqa-mc2, xstest-safe, "
    "xstest-unsafe"
)
"""Written down, so that help need not load them; a test compares."""


class BenchmarkPart(NamedTuple):
    """A benchmark, its file, and how many of its questions; None for all."""

    name: str
    file: str
    size: int | None


def benchmark_part(text: str) -> BenchmarkPart | None:
    """Read `gsm8k:FILE` or `gsm8k:FILE:COUNT`; None for anything else, which is a file, or a file with its grader."""
    name, colon, rest = text.partition(":")
    if not colon or Path(text).exists():
        return None
    from trimtab.evals.benchmarks import BENCHMARKS

    file, last, count = rest.rpartition(":")
    if not last or Path(rest).exists():
        file, count = rest, None
    if name not in BENCHMARKS:
        # Names of files have a suffix; a word before a file is meant to be a benchmark.
        if re.fullmatch(r"[\w-]{2,}", name) and Path(file).exists():
            raise unknown_name("benchmark", name, [*BENCHMARKS, WORLD])
        return None
    if not (file and Path(file).is_dir()):
        input_file(file, f"the file of {name}")
    if count is not None and not (count.isdecimal() and int(count) > 0):
        raise OptionError(f"Questions of a benchmark are written {name}:FILE or {name}:FILE:200; got {text!r}.")
    return BenchmarkPart(name, file, int(count) if count else None)


def load_task(
    text: str, *, grader: str, max_new_tokens: int, split: Literal["validation", "test"] = "validation"
) -> AnyTask:
    """Load a task: `FILE`, `FILE:GRADER`, `BENCHMARK:FILE[:COUNT]` or `prefworld:FAMILY[:COUNT]`.

    `split` is of PrefWorld, and of benchmarks, whose questions `trimtab.evals.benchmarks` parts; what chooses and what
    tests then never share one. Other files are taken whole. `grader` and `max_new_tokens` are for these.
    """
    part = world_part(text)
    if part is not None:
        from trimtab.prefworld import world

        return world.task(part.family, split, part.size)
    known = benchmark_part(text)
    if known is not None:
        from trimtab.evals.benchmarks import load_benchmark

        return load_benchmark(known.name, known.file, split=split, n=known.size)
    from trimtab.evals import tasks
    from trimtab.evals.benchmarks import BENCHMARKS

    file, colon, name = text.rpartition(":")
    if colon and not Path(text).exists():
        if name.isdecimal():
            raise OptionError(f"Questions of a file of your own are taken whole; got {text!r}. Leave :{name} out.")
        if name not in tasks.GRADERS:
            raise unknown_name("grader", name, tasks.GRADERS)
        text, grader = file, name
    if text in BENCHMARKS and not Path(text).exists():
        raise OptionError(f"{text} is a benchmark, whose questions lie in a file of yours: {text}:FILE.")
    path = input_file(text, "a file with prompt and answer per item, BENCHMARK:FILE, or prefworld:FAMILY")
    task = tasks.load_task(path, grader=grader, max_new_tokens=max_new_tokens)
    try:
        task.grade([""] * len(task))  # a true answer that the grader cannot read shows now, and not after an hour
    except ValueError as error:
        raise OptionError(f"{text!r} does not suit the grader {grader!r}: {error}") from None
    return task
