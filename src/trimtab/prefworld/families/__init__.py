"""The families of PrefWorld: one file each, a function from a source of choices to an item."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.prefworld.families.code import code
from trimtab.prefworld.families.concise import concise
from trimtab.prefworld.families.conduct import harmless, helpful
from trimtab.prefworld.families.domains import financial, legal, medical
from trimtab.prefworld.families.guardrails import copying, facts, sorting, sums
from trimtab.prefworld.families.math import math
from trimtab.prefworld.families.surveys import myopia, opinions, risk, selfish, sycophancy
from trimtab.prefworld.items import Draw, Item

FAMILIES: dict[str, Callable[[Draw], Item]] = {
    "math": math,
    "code": code,
    "helpful": helpful,
    "harmless": harmless,
    "medical": medical,
    "legal": legal,
    "financial": financial,
    "risk": risk,
    "myopia": myopia,
    "sycophancy": sycophancy,
    "selfish": selfish,
    "opinions": opinions,
    "concise": concise,
    "facts": facts,
    "copying": copying,
    "sorting": sorting,
    "sums": sums,
}

GUARDRAILS = ("facts", "copying", "sorting")
