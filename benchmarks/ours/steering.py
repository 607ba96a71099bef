"""Steered generation and scoring: one setting, a setting per row, baked, and many knobs at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import bare
from benchmarks.models import model_of, steered_layers, tokenizer, vectors
from benchmarks.ways import Way, directly
from trimtab.artifact import Knob
from trimtab.exchange.checkpoint import write_checkpoint
from trimtab.exchange.constant import constant
from trimtab.render import load
from trimtab.runtime import Dose, steer
from trimtab.types import Site


def knob_of(added: dict[int, Tensor], name: str = "random") -> Knob:
    """Make a knob that adds these vectors, one for each layer, at strength 1."""
    first, *others = (Site(layer, "last") for layer in added)
    return Knob(
        name=name,
        method="random",
        vectors={Site(layer, "last"): vector for layer, vector in added.items()},
        norms=dict.fromkeys(added, 1.0),
        site=first,
        gain=float(added[first.layer].double().norm()),
        also=tuple(others),
    )


def knob_for(model: Any) -> Knob:
    """Make the knob that all ways have in common: one vector at four layers."""
    return knob_of(vectors(steered_layers(model.config.num_hidden_layers), model.config.hidden_size))


def baked_copy(model: Any, knob: Knob, device: str) -> Any:
    """Bake a knob at strength 1 into a checkpoint; return its model.

    Its weights are copied into ordinary memory, as the plain model's are: reading those of a mapped file takes longer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "baked"
        write_checkpoint(folder, constant({knob: 1.0}), {knob: 1.0}, model, tokenizer())
        found = load(folder, dtype=model.dtype, device=device).model
    for parameter in found.parameters():
        parameter.data = parameter.data.clone()
    return found


def by_row(knob: Knob, rows: int) -> list[Dose]:
    """Give every row a strength of its own."""
    return [{knob: 1 + row / rows} for row in range(rows)]


def steered(model: Any, settings: Dose | Sequence[Dose], run: Callable[[], Tensor]) -> Way:
    """Run under a setting; turning it on and off counts."""

    def action() -> Tensor:
        with steer(model, settings):
            return run()

    return directly(action)


def generating(options: dict[str, Any]) -> dict[str, Way]:
    """Generate plainly, with one knob at four layers, with a setting per row, and with the knob baked."""
    model, ids = model_of(options), bare.ids_of(options)
    knob = knob_for(model)

    def run() -> Tensor:
        return bare.generate(model, ids, options["new"])

    @lru_cache(maxsize=1)
    def baked() -> Any:
        return baked_copy(model, knob, options["device"])

    return {
        "plain": bare.generating(options),
        "trimtab": steered(model, {knob: 1.0}, run),
        "trimtab, a setting per row": steered(model, by_row(knob, options["rows"]), run),
        "trimtab, baked": directly(lambda: bare.generate(baked(), ids, options["new"])),
    }


def scoring(options: dict[str, Any]) -> dict[str, Way]:
    """Compute logits plainly, with one knob at four layers, and with a setting per row."""
    model, ids = model_of(options), bare.ids_of(options)
    knob = knob_for(model)

    def run() -> Tensor:
        return bare.score(model, ids)

    return {
        "plain": bare.scoring(options),
        "trimtab": steered(model, {knob: 1.0}, run),
        "trimtab, a setting per row": steered(model, by_row(knob, options["rows"]), run),
    }


def mixing(options: dict[str, Any]) -> dict[str, Way]:
    """Generate with so many knobs turned at once, in every row at other strengths."""
    model, ids = model_of(options), bare.ids_of(options)
    depth, width, rows = model.config.num_hidden_layers, model.config.hidden_size, options["rows"]
    knobs = [knob_of(vectors([number % depth], width), f"knob{number}") for number in range(options["knobs"])]
    settings = [{knob: (1 + row + number) / 100 for number, knob in enumerate(knobs)} for row in range(rows)]
    run = steered(model, settings, lambda: bare.generate(model, ids, options["new"]))
    return {"plain": bare.generating(options), "trimtab, a setting per row": run}
