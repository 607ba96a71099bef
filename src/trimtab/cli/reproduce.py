"""Measure a paper's claims again, on PrefWorld or on models of your own, and say which of them hold.

Everything is chosen on validation data and tested once, beside controls, other methods and tuned training. Finished
steps are kept in the output folder: the same command goes on after it was stopped.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path

from trimtab.cli.quiet import quiet_transformers
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError, unknown_name

PAPERS = {
    "alignment-vectors": "trimtab.reproduce.alignment",
    "cold-steer": "trimtab.reproduce.cold",
    "palrs": "trimtab.reproduce.palrs",
    "preference-vector": "trimtab.reproduce.preference",
}
"""The modules that know a paper's recipes and steps: each has `load_recipe` and `reproduce`."""


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("paper", metavar="PAPER", help=f"of {', '.join(PAPERS)}")
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", default=[], help="prefworld or model folders (default: the recipe's)"
    )
    parser.add_argument("--recipe", metavar="NAME", help="that comes with Trimtab, or a .toml file (default: PAPER)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="for steps, knobs and report (default out/reproduce/PAPER, with --quick out/reproduce/PAPER-quick)",
    )
    parser.add_argument("--data", metavar="DIR", help="where the recipe's files lie (default data)")
    parser.add_argument("--quick", action="store_true", help="a few items only: shows that all runs, and nothing else")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default 2 for small models on a CPU)")


def run(args: Namespace, terminal: Terminal) -> None:
    """Run the protocol and print summary and claims."""
    if args.paper not in PAPERS:
        raise unknown_name("paper", args.paper, PAPERS)
    if args.out == "":
        raise OptionError("--out is empty; pass the name of a folder.")
    out = Path(args.out or f"out/reproduce/{args.paper}{'-quick' if args.quick else ''}")
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {str(out)!r} is a file; pass a folder.")
    with terminal.working("Preparing"):
        from trimtab.reproduce.document import text

        module = import_module(PAPERS[args.paper])
        recipe = module.load_recipe(args.recipe or args.paper)

    words = ["trimtab", "reproduce", args.paper, *args.models]
    words += [f"--{name}={given}" for name in ("recipe", "out", "data", "workers") if (given := getattr(args, name))]
    command = shlex.join([*words, *(["--quick"] if args.quick else [])])
    working = terminal.working(f"Reproducing {args.paper}", counted=True)
    try:
        with working as show, quiet_transformers():

            def progress(done: int, total: int, what: str) -> None:
                show(done, total)
                terminal.note(f"{done} of {total}: {what}")

            report = module.reproduce(
                recipe,
                out=out,
                data=args.data or "data",
                models=args.models,
                quick=args.quick,
                workers=args.workers,
                command=command,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{str(out)!r} keeps the finished steps; the same command goes on from there") from None
    terminal.result(report, f"{text(report)}\n\nThe report is {out / 'report.html'}.")
