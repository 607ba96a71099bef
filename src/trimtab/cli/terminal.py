"""What is printed where: results on stdout, progress, warnings and remarks on stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from trimtab.errors import TrimtabWarning

# Control characters but newline and tab, and halves of surrogate pairs: what a model or a file says must not command
# the terminal, nor fail to print.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# Messages speak Python; these of its keywords are options here.
_KEYWORD = re.compile(
    r"\b(device|duplicates|file|format|length_match|licence|search|selection|to|where)"
    r"""=(?:'([^']*)'|"([^"]*)")(?: or '([^']*)')?"""
)

# Words that are English too are options only where a message says what they are; a recipe's fields follow a colon.
_OPTION = re.compile(
    r"\b(?:max_new_tokens|batch_size|length_match|token_budget|broken_budget|top_p|chosen_system|rejected_system)\b"
    r"|(?<!: )(?<!, )\b(?:lora_rank|kl_items|judge_items|learning_rates|gamma_ratio)\b"
    r"|(?<!: )\b(?:epochs|patience|workers|betas|samples)(?= counts | are )"
)


def as_options(message: str) -> str:
    """Write the keywords in a message as options of the command line.

    >>> as_options("Pass duplicates='drop' to leave it out.")
    'Pass --duplicates drop to leave it out.'
    """
    message = message.replace("pass strict=False", "pass --no-strict")
    message = re.sub(r"\blayer=(?=NUMBER|\d)", "--layer ", message)
    message = message.replace("ass replace_card=True", "ass --replace-card")
    message = message.replace("thinking=(opening, closing)", "--thinking OPENING CLOSING")

    def as_option(found: re.Match[str]) -> str:
        other = f" or {found[4]}" if found[4] else ""
        value = found[3] if found[2] is None else found[2]
        return f"--{found[1].replace('_', '-')} {shlex.quote(value)}{other}"

    message = _KEYWORD.sub(as_option, message)
    return _OPTION.sub(lambda found: "--" + found[0].replace("_", "-"), message)


def harmless(text: str) -> str:
    """Replace control characters, newline and tab excepted, and what is no character at all."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


STDOUT = "<stdout>"


def write(text: str, *, end: str = "\n") -> None:
    """Print on stdout at once; raises `OSError` that names it where that fails, as on a full disk."""
    with _named():
        print(text, end=end, flush=True)


def flush() -> None:
    """Bring out what was printed by others, such as help; raises like `write`."""
    with _named():
        sys.stdout.flush()


def say(text: str, *, end: str = "\n") -> None:
    """Print on stderr at once; where that fails, the work it speaks of goes on without."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Send what is left for a stream nowhere: Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _named() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from None


@contextmanager
def plain_warnings() -> Generator[None]:
    """Show each warning once, in one line on stderr, without the source line that Python would add."""
    seen: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        text = " ".join(as_options(str(message)).splitlines())
        if text not in seen:
            seen.add(text)
            say(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", TrimtabWarning)
        warnings.showwarning = show
        yield


class Terminal:
    """Where one run prints; with `json`, stdout holds JSON only, one object per line; `quiet` prints no result."""

    def __init__(self, *, json: bool) -> None:
        self.json, self.quiet = json, False

    def result(self, record: Mapping[str, Any], text: str) -> None:
        """Print a result: the record as one line of JSON, or the text."""
        if not self.quiet:
            write(json.dumps(record) if self.json else harmless(text))

    def stream(self, piece: str) -> None:
        """Print a piece of an answer at once, unless stdout is for JSON."""
        if not self.json:
            write(harmless(piece), end="")

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        say(harmless(text))

    @contextmanager
    def working(
        self, what: str, *, counted: bool = False, printing: bool = False
    ) -> Generator[Callable[[int, int], None]]:
        """Show on a terminal that long work goes on; call what is yielded with the steps done, and those of all.

        `counted` shows a bar and both numbers. `printing` says that results are printed meanwhile: on a terminal they
        show enough, and would cross the bar.
        """
        if self.quiet or not sys.stderr.isatty() or (printing and sys.stdout.isatty()):
            yield lambda done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        numbers = [BarColumn(), MofNCompleteColumn()] if counted else []
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), *numbers, TimeElapsedColumn()]
        # stdout is left alone: it may go to a file, and rich would draw it to the terminal.
        with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
