"""Traps that peers fell into and that no other file holds: options that nobody can use, names that nobody checks."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import trimtab
from trimtab import artifact, check
from trimtab.capture import capture
from trimtab.cli import VERBS, main
from trimtab.contrast import answer_side, contrast_pairs
from trimtab.errors import AdapterError, OptionError, UnknownName
from trimtab.exchange import export, import_knob, pull, push
from trimtab.types import check_where

TESTS = Path(__file__).parent


def calls_in_tests() -> dict[str, tuple[int, set[str]]]:
    """For each name that is called in tests: the most positional arguments, and every keyword.

    Keywords that come out of a dictionary (`**options`) count by the keys of every dictionary in the same file.
    """
    found: dict[str, tuple[int, set[str]]] = defaultdict(lambda: (0, set()))
    for path in TESTS.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        keys = {
            key.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
        keys |= {word.arg for node in ast.walk(tree) if _is_call(node, "dict") for word in node.keywords if word.arg}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                most, words = found[name]
                given = {word.arg for word in node.keywords if word.arg}
                spread = keys if any(word.arg is None for word in node.keywords) else set[str]()
                found[name] = (max(most, len(node.args)), words | given | spread)
    return found


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == name


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in trimtab.__all__:
        yield name, getattr(trimtab, name)
    for module in (artifact, check):
        yield from ((name, value) for name in module.__all__ if inspect.isfunction(value := getattr(module, name)))
    exchanged = {"export": export, "import_knob": import_knob, "push": push, "pull": pull}
    yield from {"capture": capture, "contrast_pairs": contrast_pairs, "answer_side": answer_side, **exchanged}.items()
    for owner in (trimtab.Knob, trimtab.Pairs, trimtab.Rack):
        for name, member in inspect.getmembers(owner, callable):
            if not name.startswith("_") and name in vars(owner):
                yield name, member


def test_every_public_parameter_is_exercised() -> None:
    calls, never = calls_in_tests(), set[str]()
    for name, function in dict(public_callables()).items():
        parameters = list(inspect.signature(function).parameters.values())
        most, words = calls.get(name, (0, set()))
        parameters = [p for p in parameters if p.name != "self"]
        for index, parameter in enumerate(parameters):
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            by_place = index < most and parameter.kind is not parameter.KEYWORD_ONLY
            if not by_place and parameter.name not in words:
                never.add(f"{name}({parameter.name}=)")
    assert not never


REQUIRED = {
    "pairs": "prefworld Hello --chosen-system Hi --out x.jsonl",
    "learn": "prefworld prefworld:math --out x.safetensors",
    "tune": "prefworld --knob x.safetensors --pairs prefworld:math --out y.safetensors",
    "compose": "prefworld --knob x.safetensors --prefer prefworld:math --out y.json",
    "eval": "prefworld --task prefworld:math",
    "train": "dpo prefworld prefworld:math --out x",
    "generate": "prefworld Hello",
    "chat": "prefworld",
    "serve": "prefworld --engine vllm",
    "bench": "serve http://127.0.0.1:8000",
    "export": "prefworld --knob x.safetensors --to gguf --out x.gguf",
    "import": "prefworld x.gguf --out x.safetensors",
    "inspect": "x.safetensors",
    "push": "x.safetensors ana/math",
    "pull": "ana/math",
    "check": "prefworld",
    "reproduce": "palrs",
    "demo": "",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_option_and_names_the_known_ones(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, *REQUIRED[verb].split(), "--jsonn"]) == 2
    said = capsys.readouterr().err
    assert "--jsonn" in said
    assert "--json" in said.replace("--jsonn", "")


@pytest.mark.parametrize(
    ("choose", "known"),
    [
        (lambda: check_where("everywhere"), "completion"),
        (lambda: trimtab.Rack()["math"], "none"),
        (lambda: check.default_config("lama"), "llama"),
        (lambda: trimtab.load("prefworld", dtype="float8"), "bfloat16"),
        (lambda: trimtab.Pairs.from_records([], duplicates="keep all"), "drop"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(choose: Callable[[], object], known: str) -> None:
    with pytest.raises((UnknownName, OptionError, AdapterError)) as error:
        choose()
    assert known in str(error.value)
