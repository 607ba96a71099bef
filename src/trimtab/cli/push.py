"""Push a knob to the Hugging Face hub, with a model card that says what it is and what it was measured to do.

Needs a login: `hf auth login`, or HF_TOKEN. The repository is made if it does not exist.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from trimtab.cli.options import input_file
from trimtab.cli.tables import facts
from trimtab.cli.terminal import Terminal


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("knob", metavar="KNOB", help="a knob file of any kind; it is pushed as it is")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub")
    parser.add_argument("--licence", help="of the knob, where it states none, as in apache-2.0")
    parser.add_argument("--private", action="store_true", help="make a repository that only you see")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch, made if missing (default main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: names the knob)")
    parser.add_argument(
        "--replace-card", action="store_true", help="replace a README.md that Trimtab did not write, or that was edited"
    )
    parser.add_argument(
        "--dry-run", metavar="DIR", help="write what would be pushed into a new or empty folder, and push nothing"
    )


def run(args: Namespace, terminal: Terminal) -> None:
    """Push, and say where the knob is."""
    path = input_file(args.knob, "a knob file")
    with terminal.working("Reading"):
        from trimtab.cli.quiet import quiet_hub
        from trimtab.exchange.hub import push
    with terminal.working(f"Pushing {path.name}"), quiet_hub():
        pushed = push(
            path,
            args.repo,
            licence=args.licence,
            private=args.private,
            message=args.message,
            revision=args.revision,
            replace_card=args.replace_card,
            dry_run=args.dry_run,
        )
    lines = {
        "pushed": None if args.dry_run is not None else pushed.url,
        "would go to": None if args.dry_run is None else pushed.url,
        "commit": pushed.commit,
        "files": ", ".join(pushed.files),
        "written to": args.dry_run,
        "next": None if args.dry_run is not None else f"trimtab pull {args.repo}",
    }
    record = {**pushed._asdict(), "files": list(pushed.files), "dry_run": args.dry_run}
    terminal.result(record, facts(lines))
