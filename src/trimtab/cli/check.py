"""Check that a model's residual stream is read and written where Trimtab thinks.

MODEL is a folder or a hub name, or the name of an architecture such as qwen3, which is checked on a small random twin
built from its default configuration. Each check is ok, refused (Trimtab will not, and says why) or failed (it would be
silently wrong: do not steer this model, and report it).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli import options
from trimtab.cli.quiet import quiet_transformers
from trimtab.cli.sources import WORLD, open_model
from trimtab.cli.tables import columns
from trimtab.cli.terminal import Terminal
from trimtab.errors import OptionError

if TYPE_CHECKING:
    from trimtab.check import Report

FAILED = 1
"""Exit status when a check failed or was refused."""


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    options.add_model(parser)
    parser.add_argument("--twin", action="store_true", help="check a small random twin; weights are not loaded")
    parser.add_argument("--layers-path", metavar="PATH", help="where the decoder blocks are, as in model.layers")


def run(args: Namespace, terminal: Terminal) -> int:
    """Print what each check found; the status is 1 unless all are ok."""
    report = _report(args, terminal)
    rows = [[finding.name, finding.verdict, finding.said] for finding in report.findings]
    head = f"{report.model} ({report.architecture}): {report.verdict}"
    record: dict[str, Any] = {**asdict(report), "verdict": report.verdict}
    terminal.result(record, f"{head}\n{columns(['check', 'verdict', ''], rows)}")
    return 0 if report.verdict == "ok" else FAILED


def _report(args: Namespace, terminal: Terminal) -> Report:
    known = args.model == WORLD or Path(args.model).expanduser().is_dir() or "/" in args.model
    if known and not args.twin:
        with open_model(args, terminal) as loaded, terminal.working("Checking"):
            from trimtab.check import check

            return check(loaded.model, name=args.model, layers_path=args.layers_path)
    ignored = [f"--{name}" for name in ("dtype", "device") if getattr(args, name) is not None]
    if ignored:
        raise OptionError(f"A twin is float32 and on the CPU; leave {' and '.join(ignored)} out.")
    with terminal.working("Building a twin"):
        from trimtab.check import check, default_config, twin
        from trimtab.render import load_config

        with quiet_transformers():
            config = load_config(args.model) if known else default_config(args.model)
            model = twin(config)
    with terminal.working("Checking"), quiet_transformers():
        return check(model, name=f"random twin of {args.model}", layers_path=args.layers_path)
