"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from trimtab.cli.terminal import write
from trimtab.errors import OptionError
from trimtab.files import is_knob_file
from trimtab.types import WHERE, is_unicode


class Parser(ArgumentParser):
    """An argument parser that raises `OptionError` instead of printing its usage, and knows no abbreviations."""

    def __init__(
        self, *, prog: str, description: str, epilog: str | None = None, add_help: bool = True, usage: str | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # argparse takes -1,1,2 and -1e3 for options; no option of ours begins like a number
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Raise the parser's complaint."""
        raise OptionError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own swallows what goes wrong: help on a full disk would be silence
        if file in (None, sys.stdout):
            write(message, end="")
        else:
            file.write(message)

    def refuse_repeated(self, words: Sequence[str]) -> None:
        """Raise `OptionError` for an option that is given twice, of which all but the last would be lost."""
        given = [word.partition("=")[0] for word in words[: words.index("--") if "--" in words else None]]
        for action in self._actions:
            if action.nargs != 0 and type(action).__name__ != "_AppendAction":
                found = [word for word in given if word in action.option_strings]
                if len(found) > 1:
                    raise OptionError(f"{found[0]} is given {len(found)} times, and takes one value. Give it once.")

    def long_options(self) -> list[str]:
        """Return every option that starts with two dashes."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


# Groups of options


def add_model(parser: ArgumentParser) -> None:
    """Add the model and how it is loaded."""
    parser.add_argument("model", metavar="MODEL", help="prefworld (bundled), a local folder, or a hub name")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default auto: as stored)")
    parser.add_argument("--device", help="cpu, cuda, ..., or auto for all devices (default cpu)")


def add_engine(parser: ArgumentParser, engines: Sequence[str]) -> None:
    """Add which engine runs the model, the first by default, and its own options."""
    default = "" if len(engines) == 1 else f" (default {engines[0]})"
    parser.add_argument(
        "--engine",
        choices=engines,
        default=engines[0] if default else None,
        required=not default,
        help=f"what runs the model{default}",
    )
    parser.add_argument(
        "--engine-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of vLLM's own, as in tensor_parallel_size=2; may be repeated",
    )


def add_knobs(parser: ArgumentParser, *, thinking: bool = True) -> None:
    """Add knobs and their setting, and unless `thinking` is False the markers of thoughts."""
    parser.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a knob, or a panel (a .json file of knobs with strengths); may be repeated",
    )
    setting = parser.add_mutually_exclusive_group()
    setting.add_argument("--strength", metavar="S", help="strength of every knob (default 1, or what the panel says)")
    setting.add_argument(
        "--set", metavar="SETTING", help="strengths by name, as in math=0.8,concise=-1; knobs not named are off"
    )
    parser.add_argument("--where", help="steer these tokens: " + ", ".join(WHERE) + " (default: as the knob says)")
    if thinking:
        parser.add_argument(
            "--thinking",
            nargs=2,
            metavar=("OPENING", "CLOSING"),
            help="what opens and closes thoughts, for --where thinking or answer (default: as the tokenizer has it)",
        )
    parser.add_argument("--no-strict", action="store_true", help="warn of a knob from another model, do not refuse it")


def add_decoding(parser: ArgumentParser) -> None:
    """Add how answers are drawn."""
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="cut answers there (default 128)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 0.0)")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest share (default 1.0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")


def add_checkpoint(parser: ArgumentParser) -> None:
    """Add the folder of finished steps."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="keep finished steps here; the same command takes the job up again after it was stopped, and removes "
        "them once the result is written",
    )


@contextmanager
def resumable(checkpoint: str | None) -> Generator[None]:
    """Let an interrupt of work with a checkpoint say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint is None:
            raise
        raise KeyboardInterrupt(
            f"{checkpoint!r} keeps the finished steps; the same command goes on from there"
        ) from None


def given(args: Namespace, *names: str) -> dict[str, Any]:
    """Return the options that the user gave; the others keep the defaults of the function they go to."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


# Values; argparse names the option when one of these raises ArgumentTypeError


def names(text: str) -> list[str]:
    """Read a list of names with commas between them."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("the list is empty")
    return found


def numbers(text: str) -> list[float]:
    """Read a list of numbers with commas between them."""
    try:
        return [float(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as in 0.2,0.5; got {text!r}") from None


LAYERS_LIMIT = 10_000


def layers(text: str) -> list[int]:
    """Read layers, alone or as ranges.

    >>> layers("0,3-5,-1")
    [0, 3, 4, 5, -1]
    """
    found: list[int] = []
    for part in names(text):
        match = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"expected layers as in 2,4-6; got {text!r}")
        low = int(match[1])
        high = low if match[2] is None else int(match[2])
        if max(abs(low), high) >= LAYERS_LIMIT:
            raise argparse.ArgumentTypeError(f"no model has so many layers; got {part!r}")
        if low > high or (low < 0 and match[2] is not None):
            raise argparse.ArgumentTypeError(f"a range of layers goes upwards from 0 or more; got {part!r}")
        found += range(low, high + 1)
    return found


def assignments(texts: Iterable[str], option: str = "--option") -> dict[str, object]:
    """Read `name=value` texts of an option; a value is JSON where it can be, else text."""
    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise OptionError(f"{option} takes name=value; got {text!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def output_file(text: str) -> Path:
    """Check before any work is done that a knob can be written there; its folder is made if it is missing."""
    path = writable(text)
    if path.suffix == ".json":
        raise OptionError(
            f"--out {text!r} ends in .json, which is how panels are told from knobs. Choose another name."
        )
    if path.exists() and not is_knob_file(path):
        raise OptionError(f"--out {text!r} exists and is no knob, so it is not replaced. Choose another name.")
    return path


def writable(text: str) -> Path:
    """Check before any work is done that a file can be written there; its folder is made if it is missing."""
    if not text:
        raise OptionError("--out is empty; pass the name of a file.")
    path = Path(text)
    if path.is_dir():
        raise OptionError(f"--out {text!r} is a folder; pass the name of a file in it.")
    return _in_its_folder(path)


def new_folder(text: str) -> Path:
    """Check before any work is done that a folder can be made there; one that holds something is refused."""
    if not text:
        raise OptionError("--out is empty; pass the name of a folder.")
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise OptionError(f"--out {text!r} is a file; pass the name of a folder.")
    if path.is_dir() and any(path.iterdir()):
        raise OptionError(f"--out {text!r} is not empty, and nothing in it is replaced. Choose another folder.")
    return _in_its_folder(path)


def _in_its_folder(path: Path) -> Path:
    """Make the folder that a path lies in, and check that it can be written to."""
    text = str(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise OptionError(f"--out {text!r} cannot be written: {str(path.parent)!r} is a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OptionError(f"--out {text!r} cannot be written: {error.strerror}.") from None
    return path


def input_file(text: str, what: str) -> Path:
    """Check that there is such a file; `what` says in the message what the file should be."""
    if not text:
        raise OptionError(f"The name of a file is empty; expected {what}.")
    path = Path(text)
    if path.is_dir():
        raise OptionError(f"{text!r} is a folder; expected {what}.")
    if path.exists() and not path.is_file():
        raise OptionError(f"{text!r} is a pipe or a device and no regular file; expected {what}.")
    if not path.is_file():
        raise OptionError(f"There is no file {text!r}; expected {what}.")
    return path


def input_folder(text: str, option: str) -> Path:
    """Check that there is such a folder; `option` is named in the message."""
    if not text or not Path(text).is_dir():
        raise OptionError(f"{option} takes a folder with safetensors; there is none at {text!r}.")
    return Path(text)


def text_lines(lines: Iterable[str], source: str) -> Iterator[str]:
    """Yield the lines of a file; bytes that are not UTF-8 are an error that names the file."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise OptionError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def unicode_text(text: str, place: str) -> str:
    """Refuse halves of surrogate pairs, which bytes that are not UTF-8 become in arguments: no tokenizer takes them."""
    if not is_unicode(text):
        raise OptionError(f"{place} is not Unicode text: {text[:60]!r}.")
    return text
