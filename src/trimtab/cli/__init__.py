"""The command line: one file per verb; results on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from trimtab.cli import (
    bench,
    chat,
    check,
    compose,
    demo,
    eval,
    export,
    generate,
    import_,
    inspect,
    learn,
    pairs,
    pull,
    push,
    reproduce,
    serve,
    train,
    tune,
)
from trimtab.cli.options import Parser
from trimtab.cli.terminal import STDOUT, Terminal, as_options, flush, give_up, plain_warnings, say
from trimtab.errors import OptionError, TrimtabError, unknown_name

VERBS: dict[str, ModuleType] = {
    "pairs": pairs,
    "learn": learn,
    "tune": tune,
    "compose": compose,
    "eval": eval,
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "export": export,
    "import": import_,
    "inspect": inspect,
    "push": push,
    "pull": pull,
    "check": check,
    "reproduce": reproduce,
    "demo": demo,
}
"""Each has `add_options(parser)` and `run(args, terminal)`; the first line of its docstring is its help. What `run`
returns is the exit status, None being 0."""

MENDABLE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: see docs/reference/cli.md for what each means."""
    words = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    try:
        with plain_warnings():
            try:
                status = _run(words)
            except SystemExit as stop:
                if stop.code not in (None, 0):
                    raise
                status = 0  # argparse has shown the help, or the version
            flush()  # a closed pipe must show here, and not when Python exits
    except TrimtabError as error:
        return _fail(str(error))
    except KeyboardInterrupt as stop:
        say("\ntrimtab: " + "; ".join(["interrupted", *map(str, stop.args)]))
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left
        give_up(sys.stdout)
        return PIPE_CLOSED
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        if error.filename == STDOUT:
            give_up(sys.stdout)
            return _fail(f"Cannot write to stdout: {error.strerror}.")
        return _fail(f"{error.strerror}: {str(error.filename)!r}.")
    finally:
        say("", end="")  # what others have printed there must not fail when Python exits
    return status


def _open_closed_streams() -> None:
    """Put nothing in the place of a stream that was closed before we began, as cron does: Python has None there."""
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def _run(words: list[str]) -> int:
    by_verb, top = parsers()
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb.startswith("-"):
        top.parse_args(words)  # ends with the help or the version, or raises
        verb = ""
    if not verb:
        top.print_help(sys.stderr)
        raise OptionError(f"Pass a verb: {', '.join(VERBS)}.")
    if verb not in VERBS:
        raise unknown_name("verb", verb, VERBS)
    by_verb[verb].refuse_repeated(rest)
    # Intermixed, so that prompts may stand behind options; argparse cannot do that below its own sub-parsers.
    args, extra = by_verb[verb].parse_known_intermixed_args(rest)
    if extra:
        _refuse(by_verb[verb], extra[0])
    return VERBS[verb].run(args, Terminal(json=args.json)) or 0


def parsers() -> tuple[dict[str, Parser], Parser]:
    """Return the parser of each verb, and the one above them, which knows the help and the version."""
    top = Parser(
        prog="trimtab",
        description="Learn a preference from a few pairs of answers, and turn it like a knob at inference.",
        epilog="trimtab VERB --help lists the options of a verb.",
    )
    top.add_argument("--version", action="version", version=f"trimtab {_version()}")
    verbs = top.add_subparsers(metavar="VERB", title="verbs")
    by_verb: dict[str, Parser] = {}
    for name, module in VERBS.items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        by_verb[name] = verbs.add_parser(name, help=summary, description=summary, epilog=rest.strip() or None)
        module.add_options(by_verb[name])
        # a server prints its log: it knows the option only to refuse it in words of its own
        told = argparse.SUPPRESS if module is serve else "print JSON, and nothing else, on stdout"
        by_verb[name].add_argument("--json", action="store_true", help=told)
    return by_verb, top


def _refuse(parser: Parser, word: str) -> NoReturn:
    if word.startswith("-"):
        raise unknown_name(f"option of {parser.prog}", word.partition("=")[0], parser.long_options())
    raise OptionError(f"{parser.prog} has no place for {word!r}. See {parser.prog} --help.")


def _fail(message: str) -> int:
    say(f"trimtab: {' '.join(as_options(message).splitlines())}")
    return MENDABLE


def _version() -> str:
    try:
        return version("trimtab")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
