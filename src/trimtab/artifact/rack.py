"""Knobs under names: a rack in memory, and a panel, which is a file of named knobs with strengths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

from trimtab.artifact.checks import check_knob_name
from trimtab.artifact.delta import DeltaKnob
from trimtab.artifact.file import number, refuse_to_replace, save_bytes
from trimtab.artifact.knob import Knob
from trimtab.artifact.large import stored_kind
from trimtab.artifact.lookahead import LookaheadKnob
from trimtab.errors import KnobError, OptionError, brief, unknown_name
from trimtab.files import parse_json, read_bytes, reason
from trimtab.types import Setting, check_strength, parse_setting

PANEL_LIMIT = 2**20
"""Longest panel that is read, in bytes."""


AnyKnob = Knob | DeltaKnob | LookaheadKnob
"""A knob of any kind."""


def load_knob(path: str | Path) -> AnyKnob:
    """Read a knob file of any kind; raises `KnobError` that names what is wrong with a damaged or foreign file."""
    if not isinstance(path, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise KnobError(f"A knob file is named by its path; got {brief(path)}.")
    kinds = {"delta": DeltaKnob, "lookahead": LookaheadKnob}
    return kinds.get(stored_kind(path) or "", Knob).load(path)


class Rack(Mapping[str, AnyKnob]):
    """Names for knobs; paths are loaded at once.

    Example: `Rack(math="math.knob.safetensors", concise=knob)`. The rack's names count, not those inside the knobs.
    """

    def __init__(self, /, **knobs: AnyKnob | str | Path) -> None:
        for name, knob in knobs.items():
            check_knob_name(name)
            if not isinstance(knob, AnyKnob | str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionError(f"A rack holds knobs, or paths of knob files; {name!r} is {brief(knob)}.")
        self._knobs = {name: load_knob(knob) if isinstance(knob, str | Path) else knob for name, knob in knobs.items()}

    def resolve(self, setting: Setting | str) -> dict[AnyKnob, float]:
        """Turn names and strengths into knobs and strengths; names of one knob add up, zeros stay.

        A setting may be text, as in "math=0.8,concise=-1". Raises `UnknownName` for a name that is not on the rack,
        `OptionError` for what is no setting and for a strength that is not finite.
        """
        if isinstance(setting, str):
            setting = parse_setting(setting)
        if not isinstance(setting, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"A setting maps names to strengths, as in {{'math': 0.8}}; got {brief(setting)}.")
        strengths: dict[AnyKnob, float] = {}
        for name, strength in setting.items():
            if name not in self._knobs:
                raise unknown_name("knob", name, self._knobs)
            knob = self._knobs[name]
            strengths[knob] = strengths.get(knob, 0.0) + check_strength(strength, f"strength of {name!r}")
        return strengths

    def __getitem__(self, name: str) -> AnyKnob:
        if name not in self._knobs:
            raise unknown_name("knob", name, self._knobs)
        return self._knobs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._knobs)

    def __len__(self) -> int:
        return len(self._knobs)

    def __repr__(self) -> str:
        return f"Rack({', '.join(self._knobs)})"


class Panel(NamedTuple):
    """A rack with the strengths at which its knobs stand."""

    rack: Rack
    setting: dict[str, float]


def save_panel(path: str | Path, knobs: Mapping[str, tuple[str | Path, float]]) -> None:
    """Write a panel, atomically: a name, the path of the knob's file, and a strength for each knob.

    Paths are stored as they lie from the panel's folder, if they lie in it, so that the folder can be moved. Raises
    `KnobError` for what is no name, file and strength, where writing fails, and where a file stands that is no panel.
    """
    folder = _real(path).parent
    entries: dict[str, dict[str, object]] = {}
    if not isinstance(knobs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise KnobError(f"A panel holds a file and a strength for each name; got {brief(knobs)}.")
    for name, entry in knobs.items():
        check_knob_name(name)
        match entry:
            case (str() | Path() as file, strength):
                place = _real(file)
            case _:
                raise KnobError(f"A panel holds the path of a file and a strength for {name!r}; got {brief(entry)}.")
        stored = place.relative_to(folder) if place.is_relative_to(folder) else place
        entries[name] = {"path": stored.as_posix(), "strength": check_strength(strength, f"strength of {name!r}")}
    check_panel_place(path)
    save_bytes(path, (json.dumps({"knobs": entries}, indent=2) + "\n").encode())


def check_panel_place(path: str | Path) -> None:
    """Raise `KnobError` where a file stands that is no panel, and so would not be replaced by one."""
    refuse_to_replace(path, "panel", _is_panel)


def _real(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(path))  # Path.resolve raises of links in a circle
    except ValueError:
        raise KnobError(f"No file can have the name {brief(str(path), 240)}.") from None


def _is_panel(path: Path) -> bool:
    """Tell a panel by its one field; an empty file may be replaced too."""
    data = read_bytes(path, PANEL_LIMIT)
    try:
        content: object = parse_json(data) if data else {"knobs": {}}
    except ValueError:
        return False
    return isinstance(content, Mapping) and list(cast(Mapping[str, object], content)) == ["knobs"]


def load_panel(path: str | Path) -> Panel:
    """Read a panel and load its knobs; raises `KnobError` that names what is wrong with the file."""
    try:
        content: object = parse_json(read_bytes(path, PANEL_LIMIT))
    except OSError as error:
        raise KnobError(f"Cannot read a panel from {brief(str(path), 240)}: {reason(error)}.") from None
    except ValueError as error:
        raise KnobError(f"Cannot read a panel from {brief(str(path), 240)}: it is not JSON ({error}).") from None
    knobs = cast(Mapping[str, object], content).get("knobs") if isinstance(content, Mapping) else None
    if not isinstance(knobs, Mapping) or len(cast(Mapping[str, object], content)) > 1:
        raise KnobError(
            f"{brief(str(path), 240)} is not a panel; a panel is "
            '{"knobs": {name: {"path": ..., "strength": ...}}} and nothing else.'
        )
    loaded: dict[str, AnyKnob | str | Path] = {}
    setting: dict[str, float] = {}
    for name, entry in cast(Mapping[str, object], knobs).items():
        check_knob_name(name)
        fields = cast(Mapping[str, object], entry) if isinstance(entry, Mapping) else {}
        file = fields.get("path")
        if not isinstance(file, str) or not fields.keys() <= {"path", "strength"}:
            raise KnobError(
                f"Knob {name!r} of panel {brief(str(path), 240)} needs a path (text) and a strength (a number), "
                f"and nothing else; got {brief(entry)}."
            )
        try:
            setting[name] = number(fields.get("strength", 1.0), "strength")
        except KnobError as error:
            raise KnobError(f"Knob {name!r} of panel {brief(str(path), 240)} cannot be set: {error}") from None
        loaded[name] = load_knob(Path(path).parent / file)
    return Panel(Rack(**loaded), setting)
