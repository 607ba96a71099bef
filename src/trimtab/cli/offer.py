"""What `trimtab serve` offers: knobs by name, and panels of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from trimtab.cli.sources import load_knobs, named_file, two_named
from trimtab.errors import OptionError
from trimtab.types import is_knob_name

if TYPE_CHECKING:
    from trimtab.artifact import AnyKnob, Rack


class Offer(NamedTuple):
    """What a server offers: a rack, and settings of its knobs by the names of panels."""

    rack: Rack
    panels: dict[str, dict[str, float]]


def load_offer(entries: Sequence[str]) -> Offer:
    """Load knobs and panels from `FILE` or `NAME=FILE`; panels may share knobs that do the same."""
    from trimtab.artifact import Rack, load_panel
    from trimtab.engines.admission import engine_digest

    knobs: dict[str, AnyKnob] = {}
    panels: dict[str, dict[str, float]] = {}
    for entry in entries:
        name, path = named_file(entry)
        if path.suffix != ".json":
            added = load_knobs([entry], None).rack
        else:
            added, setting = load_panel(path)
            label = name or path.stem
            if label in panels:
                raise OptionError(f"Two panels are named {label!r}. Name them yourself: --knob NAME={path}.")
            if not is_knob_name(label) or ":" in label:
                raise OptionError(
                    f"A panel is asked for as MODEL:NAME, which {label!r} cannot spell. Name it: NAME={path}."
                )
            panels[label] = setting
        for key, knob in added.items():
            held = knobs.setdefault(key, knob)
            if (engine_digest(held), held.safe_range) != (engine_digest(knob), knob.safe_range):
                raise two_named(key)
    return Offer(Rack(**knobs), panels)
