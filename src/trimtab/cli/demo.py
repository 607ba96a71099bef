"""Tell the whole story on PrefWorld, offline: learn two knobs, tune them, test them once beside controls."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from trimtab.cli.quiet import quiet_transformers
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--out", default="out/demo", metavar="DIR", help="for report and plots (default out/demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data and sampling (default 0)")


def run(args: Namespace, terminal: Terminal) -> None:
    """Run the demo and print its table, or its report as JSON."""
    if not args.out:
        raise OptionError("--out is empty; pass the name of a folder.")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {args.out!r} is a file; pass a folder.")
    with terminal.working("Demo"), quiet_transformers():
        from trimtab import demo

        report = demo.run(out, seed=args.seed, progress=terminal.note)
    terminal.result(report, f"{demo.summary(report)}\n\nReport and plots are in {out}.")
