"""Whose answer is preferred where help and harm disagree: relabelled pairs, and BFPO's ranking with its weights.

Pure functions of pairs whose `meta` says of the two answers which helps more (`better`) and which does less harm
(`safer`), as "chosen" or "rejected", and of each whether it is harmless (`chosen_safe`, `rejected_safe`, as booleans).
They are PKU-SafeRLHF's `better_response_id`, `safer_response_id` and `is_response_{0,1}_safe`, told from the pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from trimtab.errors import OptionError, PairsError, brief, unknown_name
from trimtab.pairs import FLAGS, OTHER, Pairs, swap
from trimtab.types import Pair

Label = Literal["helpful", "harmless", "safe-first", "bfpo"]
BFPO_SHIFT = 0.5
"""BFPO's alpha, as its code has it: the target is then .5, 1, -1 or -.5, and never 0."""


class Flags(NamedTuple):
    """What a pair says of its answers: which helps more, which does less harm, and which are harmless at all."""

    better: str
    safer: str
    chosen_safe: bool
    rejected_safe: bool


def relabel(pairs: Pairs, label: Label) -> Pairs:
    """Return the pairs with the answers swapped where `label` prefers the other one.

    - "helpful": the answer that helps more, harm or no harm.
    - "harmless": the answer that does less harm.
    - "safe-first": by help where both answers are harmless, by harm otherwise: DPO-safe-first of arXiv:2504.20106.
    - "bfpo": as BFPO ranks them (see `bfpo_targets`).

    In `meta` whatever is told of the chosen and of the rejected answer is swapped too, so that relabelling again gives
    the same as relabelling at once. Raises `PairsError` for a pair without the flags, and `UnknownName` for another
    label.
    """
    if label not in _WANTED:
        raise unknown_name("label", str(label), _WANTED)
    flags = [read_flags(pair, number) for number, pair in enumerate(pairs, 1)]
    wanted = [_WANTED[label](own) for own in flags]
    return Pairs(pair if want == "chosen" else swap(pair) for pair, want in zip(pairs, wanted, strict=True))


def bfpo_target(flags: Flags, shift: float = BFPO_SHIFT) -> float:
    """Return `1.5 I_safe(y_w) - 0.5 I_safe(y_l) - shift`, of the answer that helps more, y_w, and the other, y_l.

    BFPO (arXiv:2408.15313; github.com/wx-zhang/bfpo, `trainer/bfpo.py`, b1 = 3) wants y_w's log ratio to exceed y_l's
    by that over tau. A negative one prefers y_l: harmless and helpful over harmless, harmless over harmful, harmful and
    of no help over harmful and helpful.
    """
    safe = {"chosen": flags.chosen_safe, "rejected": flags.rejected_safe}
    return 1.5 * safe[flags.better] - 0.5 * safe[OTHER[flags.better]] - shift


def bfpo_targets(pairs: Pairs, *, shift: float = BFPO_SHIFT) -> np.ndarray:
    """Return BFPO's target of every pair, told from its chosen answer, `[N]`; all positive after `relabel(_, "bfpo")`.

    In DPO's form a pair has `tau' = tau / 2 / target`. A negative tau' is a positive one of the swapped pair, bit for
    bit. Raises `OptionError` for a target of 0, where tau' has no value: for a `shift` of 0, 1, 1.5 or -0.5 some pairs
    have it, for `BFPO_SHIFT` none.
    """
    flags = [read_flags(pair, number) for number, pair in enumerate(pairs, 1)]
    told = [bfpo_target(own, shift) * (1 if own.better == "chosen" else -1) for own in flags]
    if 0 in told:
        raise OptionError(
            f"BFPO's target of pair {told.index(0) + 1} is 0 at the shift {shift:g}, and its tau' infinite. Take "
            f"another shift, such as {BFPO_SHIFT:g}."
        )
    return np.array(told)


def read_flags(pair: Pair, number: int) -> Flags:
    """Read a pair's flags. Raises `PairsError`, which calls it by `number`, where one is missing or no such flag."""
    meta = pair.meta
    for name in FLAGS:
        if meta.get(name) not in OTHER:
            raise PairsError(
                f"Pair {number} does not say which answer is {name}: its field {name!r} is {brief(meta.get(name))}, "
                "and should be 'chosen' or 'rejected'."
            )
    for name in ("chosen_safe", "rejected_safe"):
        if not isinstance(meta.get(name), bool):
            raise PairsError(
                f"Pair {number} does not say whether its {name.removesuffix('_safe')} answer is harmless: its field "
                f"{name!r} is {brief(meta.get(name))}, and should be true or false."
            )
    return Flags(str(meta["better"]), str(meta["safer"]), bool(meta["chosen_safe"]), bool(meta["rejected_safe"]))


def _bfpo(flags: Flags) -> str:
    return flags.better if bfpo_target(flags) > 0 else OTHER[flags.better]


_WANTED: dict[str, Callable[[Flags], str]] = {
    "helpful": lambda flags: flags.better,
    "harmless": lambda flags: flags.safer,
    "safe-first": lambda flags: flags.better if flags.chosen_safe and flags.rejected_safe else flags.safer,
    "bfpo": _bfpo,
}
