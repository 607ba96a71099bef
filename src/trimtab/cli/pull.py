"""Pull a knob from the Hugging Face hub: one knob file, read and checked before it is put anywhere."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace

from trimtab.cli.options import output_file
from trimtab.cli.tables import facts
from trimtab.cli.terminal import Terminal
from trimtab.errors import printable


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub")
    parser.add_argument("--file", metavar="NAME", help="the knob file to take, where the repository has several")
    parser.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit (default main)")
    parser.add_argument("--out", metavar="FILE", help="the knob file to write (default: its own name, in this folder)")


def run(args: Namespace, terminal: Terminal) -> None:
    """Pull, and say what came."""
    out = None if args.out is None else output_file(args.out)
    with terminal.working("Reading"):
        from trimtab.artifact.card import describe_safe_range
        from trimtab.cli.quiet import quiet_hub
        from trimtab.exchange.hub import pull
        from trimtab.exchange.model_card import hub_name
    with terminal.working(f"Pulling {args.repo}"), quiet_hub():
        pulled = pull(args.repo, file=args.file, revision=args.revision, out="." if out is None else out)
    knob, known = pulled.knob, pulled.knob.provenance
    model = hub_name(knob) or ("prefworld" if known.get("model") == "prefworld" else "MODEL")
    record = {
        "repo": args.repo,
        "commit": pulled.commit,
        "file": pulled.file,
        "knob": knob.name,
        "kind": knob.kind,
        "method": knob.method,
        "model": known.get("model"),
        "safe_range": knob.safe_range,
        "licence": known.get("licence"),
        "out": str(pulled.path),
    }
    lines = {
        "knob": f"{knob.name} ({knob.kind}, {knob.method})",
        "model": known.get("model"),
        "safe range": describe_safe_range(knob),
        "licence": known.get("licence"),
        "from": f"{args.repo}, {pulled.file}",
        "commit": pulled.commit,
        "written to": pulled.path,
        "next": f'trimtab generate {shlex.quote(model)} "..." --knob {shlex.quote(str(pulled.path))} --strength 1',
    }
    terminal.result(record, facts({key: _one_line(value) for key, value in lines.items()}))


def _one_line(value: object) -> str | None:
    """Write a value of a stranger's header so that it cannot pose as the next line."""
    return None if value is None else printable(str(value))[:300]
