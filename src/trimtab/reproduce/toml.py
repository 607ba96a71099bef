"""Recipes as dataclasses: read from TOML files, every key known and every value of the type that its field has."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from trimtab.errors import OptionError, brief, unknown_name

T = TypeVar("T")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("trimtab.reproduce") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(kind: type[T], name: str | Path, *, like_sizes: tuple[str, ...] = ("quick",)) -> T:
    """Read a recipe of a kind: the name of one that comes with the package, or a TOML file.

    What the tables `like_sizes` leave out is as in the table `sizes`. Raises `OptionError` for a file that is none, and
    for what does not belong there or has the wrong type.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise OptionError(f"There is no file {str(path)!r}. Recipes that come along: {', '.join(recipe_names())}.")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif str(name) in recipe_names():
        text = (resources.files("trimtab.reproduce") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    elif path.exists():
        raise OptionError(f"A recipe's file ends in .toml; got {str(path)!r}.")
    else:
        raise unknown_name("recipe", str(name), recipe_names())
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"The recipe {str(name)!r} is no TOML: {error}.") from None
    sizes: object = table.get("sizes")
    for part in like_sizes:
        if isinstance(sizes, dict) and isinstance(table.setdefault(part, {}), dict):
            table[part] = {**sizes, **table[part]}
    return _build(kind, table, str(name))


def check_counts(sizes: object, place: str) -> None:
    """Raise `OptionError` for a number in a dataclass of sizes that does not count from 1; False may stand for one."""
    for field in dataclasses.fields(cast(Any, sizes)):
        value = getattr(sizes, field.name)
        many = value if isinstance(value, tuple) else (value,)
        if not many or any(number < 1 and number is not False for number in cast(tuple[Any, ...], many)):
            raise OptionError(f"{place}: {field.name} counts from 1; got {value}.")


def _build(kind: type[T], table: object, place: str) -> T:
    """Make a dataclass of a TOML table; what is left out has its default, what is not known is an error."""
    if not isinstance(table, Mapping):
        raise OptionError(f"{place} is a table; got {brief(table)}.")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in cast(Mapping[str, object], table).items():
        if key not in fields:
            raise unknown_name(f"key of {place}", key, fields)
        values[key] = _value(hints[key], value, f"{place}: {key}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OptionError(f"{place} lacks {', '.join(missing)}.")
    return kind(**values)


def _value(hint: Any, value: object, place: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(cast(type[Any], hint), value, place)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in parts:
            raise unknown_name(f"value of {place}", str(value), parts)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise OptionError(f"{place} is a list; got {brief(value)}.")
        return tuple(_value(parts[0], item, place) for item in cast(list[object], value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise OptionError(f"{place} is a table; got {brief(value)}.")
        if parts[1] is Any:
            return dict(cast(Mapping[str, Any], value))
        return {
            key: _value(parts[1], item, f"{place}.{key}") for key, item in cast(Mapping[str, object], value).items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{place} is a finite number; got {value}.")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise OptionError(f"{place} is {'a number' if hint in (int, float) else hint.__name__}; got {brief(value)}.")
    return value
