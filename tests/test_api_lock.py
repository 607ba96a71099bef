"""The public surface, held to `api.txt`: names of the package, parameters, fields, methods, verbs and their options.

python tests/test_api_lock.py    accept the surface as it is now
"""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab
from trimtab.artifact import DeltaKnob, LookaheadKnob, Panel
from trimtab.cli import parsers
from trimtab.compose import Composed, Goal
from trimtab.evals.tasks import Task
from trimtab.generate import Generation
from trimtab.methods import Method
from trimtab.render import Loaded
from trimtab.runtime import Steering
from trimtab.types import Message, Pair, Site

LOCK = Path(__file__).with_name("api.txt")
ACCEPT = "python tests/test_api_lock.py"

RETURNED = (
    Composed,
    DeltaKnob,
    Generation,
    Goal,
    Loaded,
    LookaheadKnob,
    Message,
    Method,
    Pair,
    Panel,
    Site,
    Steering,
    Task,
)
"""Classes of what public functions take and return, beside the public classes themselves."""


KINDS = {"KEYWORD_ONLY": "keyword", "VAR_POSITIONAL": "rest", "VAR_KEYWORD": "keywords"}
"""What a parameter is called that is not the ordinary one."""


class Shown:
    """A default, written so that it reads the same in every run: functions and objects by what they are."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        text = repr(self.value)
        return f"<{type(self.value).__name__}>" if " at 0x" in text else text


def plain_signature(function: object) -> inspect.Signature:
    """Return a signature without annotations."""
    assert callable(function)
    found, empty = inspect.signature(function), inspect.Parameter.empty
    return inspect.Signature(
        [
            p.replace(annotation=empty, default=p.default if p.default is empty else Shown(p.default))
            for p in found.parameters.values()
        ]
    )


def parameters(function: object) -> Iterator[str]:
    """Yield a line per parameter: what it is, its name and its default."""
    for parameter in plain_signature(function).parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
        yield f"    {KINDS.get(parameter.kind.name, 'parameter')} {parameter.name}{default}"


def members(kind: type) -> Iterator[str]:
    """Yield what a class has beside what it is made of; bases of ours count, others do not."""
    names = {name for base in kind.__mro__ if base.__module__.startswith("trimtab") for name in vars(base)}
    for name in sorted(names - plain_signature(kind).parameters.keys()):
        if name.startswith("_") and name not in ("__add__", "__mul__", "__neg__", "__sub__"):
            continue
        member = inspect.getattr_static(kind, name)
        if isinstance(member, staticmethod | classmethod):
            yield f"    static {name}{plain_signature(getattr(kind, name))}"
        elif inspect.isfunction(member):
            yield f"    method {name}{plain_signature(member)}"
        else:
            yield f"    value {name}"


def described(name: str, value: object) -> Iterator[str]:
    """Yield the lines of one public name."""
    yield f"{'class' if isinstance(value, type) else 'function'} {name}"
    yield from parameters(value)
    if isinstance(value, type):
        yield from members(value)


def command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines of one verb: what stands without dashes, and the options with what they take."""
    yield f"verb {name}"
    for action in parser._actions:
        if not action.option_strings:
            yield f"    argument {action.dest}{'...' if action.nargs in ('*', '+') else ''}"
            continue
        metavar = action.metavar or action.dest.upper()
        taken = "" if action.nargs == 0 else f" {metavar if isinstance(metavar, str) else ' '.join(metavar)}"
        known = f" of {', '.join(map(str, action.choices))}" if action.choices else ""
        default = "" if action.default in (None, [], False, argparse.SUPPRESS) else f" = {action.default!r}"
        notes = [" required"] * action.required + [" repeated"] * (type(action).__name__ == "_AppendAction")
        yield f"    option {'/'.join(action.option_strings)}{taken}{known}{default}{''.join(notes)}"


def surface() -> str:
    """Return the whole public surface as text, one thing per line."""
    lines: list[str] = []
    for name in trimtab.__all__:
        lines += [*described(f"trimtab.{name}", getattr(trimtab, name)), ""]
    for kind in sorted(RETURNED, key=lambda kind: kind.__name__):
        lines += [*described(f"{kind.__module__}.{kind.__name__}", kind), ""]
    for name, parser in parsers()[0].items():
        lines += [*command(name, parser), ""]
    return "\n".join(lines)


@pytest.mark.quick
def test_the_public_surface_is_as_it_was_agreed() -> None:
    locked, now = LOCK.read_text(encoding="utf-8"), surface()
    changes = difflib.unified_diff(locked.splitlines(), now.splitlines(), LOCK.name, "now", lineterm="", n=1)
    assert locked == now, (
        "The public surface has changed:\n"
        + "\n".join(changes)
        + f"\n\nIf that is meant: run `{ACCEPT}`, and say it in CHANGELOG.md in one sentence. If not, others' programs "
        "would break: take it back."
    )


if __name__ == "__main__":
    LOCK.write_text(surface(), encoding="utf-8")
