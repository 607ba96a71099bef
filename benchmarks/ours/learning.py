"""Learning a knob from pairs, beside training on the same pairs."""

from __future__ import annotations

import warnings
from typing import Any

import trimtab
from benchmarks.ways import Way, directly
from trimtab.errors import TrimtabWarning
from trimtab.prefworld import world
from trimtab.train import train

FAMILY = "math"
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rates": (1e-4,), "betas": (0.1,)},
    "simpo": {"learning_rates": (1e-4,), "betas": (2.0,)},
}
"""One of each, of those that suit a model as small as the bundled one."""


def learning(options: dict[str, Any]) -> dict[str, Way]:
    """Learn by PaLRS; train by DPO and by SimPO at one setting, with early stopping on held-out pairs."""
    model, tokenizer = trimtab.load("prefworld")
    pairs = world.pairs(FAMILY, options["pairs"])

    def learn() -> None:
        trimtab.learn(model, tokenizer, pairs)

    def training(loss: Any) -> Way:
        def run() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TrimtabWarning)
                train(model, tokenizer, pairs, loss=loss, max_steps=options.get("steps"), **SETTINGS[loss])

        return directly(run)

    return {"trimtab": directly(learn), "DPO": training("dpo"), "SimPO": training("simpo")}
