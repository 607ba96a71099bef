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

from trimtab.addends import ALPHAS, sum_addends
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
    added: list[tuple[Knob, float]] = []
    weights: dict[DeltaKnob, float] = {}
    for knob, value in dose.items():
        strength = check_strength(value, f"strength of {knob.name!r}")
        _check(knob)
        if not knob.alpha(strength):
            continue
        if not abs(knob.alpha(strength)) <= ALPHAS:
            raise OptionError(
                f"Strength {strength:g} of {knob.name!r} is too large: alpha is {knob.alpha(strength):g}, and beyond "
                f"{ALPHAS:g} there is nothing but overflow."
            )
        if isinstance(knob, DeltaKnob):
            weights[knob] = strength
            continue
        assert isinstance(knob, Knob)
        added.append((knob, strength))
    addends = {layer: addend for layer, addend in sorted(sum_addends(added).items()) if addend.any()}
    if not addends and not weights:
        why = "the knobs cancel" if added else "every strength is 0"
        raise OptionError(f"Nothing is turned: {why}, and there is nothing to write down.")
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


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Give a folder to fill that takes the name `folder` when the context ends, and is gone if that ends with an error.

    Raises `OptionError` where something is there already: nothing is replaced, and an empty folder is nothing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{str(folder)!r} exists, and nothing in it is replaced. Choose another folder.")
    part = folder.parent / f".{folder.name[:50]}.{secrets.token_hex(4)}.part"
    try:
        with _written(folder):
            part.mkdir(parents=True)
        yield part
        with _written(folder):
            if folder.is_dir():
                folder.rmdir()
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _written(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise KnobError(f"Cannot write {brief(str(folder), 240)}: {reason(error)}.") from None


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
