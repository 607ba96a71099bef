"""What knobs at their strengths come to where they are written down for good: vectors, and differences of weights."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.artifact import AnyKnob, DeltaKnob, Knob, LookaheadKnob
from trimtab.checkpoint import versions
from trimtab.errors import KnobError, OptionError, brief
from trimtab.files import reason
from trimtab.runtime import Dose
from trimtab.types import check_strength

RECORD = "trimtab.json"


class Constant(NamedTuple):
    """The same at every token, whatever stands there."""

    addends: dict[int, Tensor]  # [D] float32 by layer
    weights: dict[DeltaKnob, float]
    """Weight knobs with their strengths."""


def constant(dose: Dose) -> Constant:
    """Return what a setting does to every token; raises `KnobError` for a knob that does not do the same to each."""
    addends: dict[int, Tensor] = {}
    weights: dict[DeltaKnob, float] = {}
    for knob, value in dose.items():
        strength = check_strength(value, f"strength of {knob.name!r}")
        _check(knob)
        if not knob.alpha(strength):
            continue
        if isinstance(knob, DeltaKnob):
            weights[knob] = strength
            continue
        assert isinstance(knob, Knob)
        for layer, addend in knob.addends(strength).items():
            addends[layer] = addends[layer] + addend if layer in addends else addend
    addends = {layer: addends[layer] for layer in sorted(addends) if addends[layer].any()}
    if not addends and not weights:
        raise OptionError("Nothing is turned: every strength is 0, and there is nothing to write down.")
    for layer, addend in addends.items():
        if not bool(torch.isfinite(addend).all()):
            raise OptionError(f"At these strengths the vector of layer {layer} holds values that are not finite.")
    return Constant(addends, weights)


def _check(knob: AnyKnob) -> None:
    """Raise `KnobError` with the reason why a knob is no constant."""
    if isinstance(knob, LookaheadKnob):
        raise KnobError(
            f"Knob {knob.name!r} looks ahead: what it adds comes from a second run of the model at every token, and no "
            "vector holds that. Learn the step itself (method one-step), whose weights can be exported."
        )
    if isinstance(knob, Knob) and knob.operation != "add":
        raise KnobError(
            f"Knob {knob.name!r} ({knob.operation}) looks at the stream at every token, and what is exported is the "
            "same at all of them. Export knobs that add."
        )
    if knob.where != "all":
        raise KnobError(
            f"Knob {knob.name!r} steers {knob.where!r} tokens, and what is exported acts on every token. Export it "
            "with where='all' if that is meant, which is another knob than the one that was tuned; or serve it by vLLM."
        )


def refuse_weights(found: Constant, home: str, instead: str) -> None:
    """Raise `KnobError` where a home that holds vectors would have to hold weights."""
    for knob in found.weights:
        raise KnobError(f"{home} holds one vector per layer; knob {knob.name!r} is a difference of weights. {instead}")


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Give a folder to fill that takes the name `folder` when the context ends, and is gone if that ends with an error.

    Raises `OptionError` where something is there already: nothing is replaced, and an empty folder is nothing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{str(folder)!r} exists, and nothing in it is replaced. Choose another folder.")
    part = folder.parent / f".{folder.name[:50]}.{secrets.token_hex(4)}.part"
    try:
        part.mkdir(parents=True)
        yield part
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise KnobError(f"Cannot write {brief(str(folder), 240)}: {reason(error)}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_record(folder: Path, dose: Dose, base: str) -> None:
    """Say in `trimtab.json` what a folder holds: the model beneath, each knob with strength and provenance."""
    knobs = [
        {
            "name": knob.name,
            "strength": strength,
            "alpha": knob.alpha(strength),
            **{name: getattr(knob, name) for name in ("kind", "method", "gain", "safe_range")},
            "provenance": dict(knob.provenance),
        }
        for knob, strength in dose.items()
    ]
    record = {"tool": f"trimtab {versions()['trimtab']}", "base_model": base, "knobs": knobs}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
