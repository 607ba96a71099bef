"""BiPO (Cao et al., arXiv:2406.00045): a steering vector trained with the loss of DPO, in both directions at once.

The loss for a sign d, drawn anew for every batch, with the model without the vector as the reference:

    -log sigmoid(d * beta * (log(p(chosen; d v) / p(chosen)) - log(p(rejected; d v) / p(rejected))))
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.artifact.checks import check_labels
from trimtab.capture import residual_norms
from trimtab.checkpoint import Checkpoint, describe_model, learned_from
from trimtab.errors import OptionError, TrainError, TrimtabWarning
from trimtab.pairs import Pairs
from trimtab.selection import layers_between
from trimtab.train import split_pairs
from trimtab.train.steered import START, STEP_SHARES, SteeredPairs, Training, best_row, frozen
from trimtab.types import THOUGHTS, Site, Where, check_seed, check_several, check_where

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER = "arXiv:2406.00045"
POSITION = "trained"
"""The position of the knob's sites: no token is read."""


def learn_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    name: str = "knob",
    layers: Sequence[int] | None = None,
    first: float = 0.0,
    last: float = 0.8,
    where: Where = "all",
    validation: Pairs | None = None,
    beta: float = 0.1,
    learning_rates: Sequence[float] | None = None,
    epochs: int = 20,
    patience: int = 3,
    batch_size: int = 4,
    weight_decay: float = 0.05,
    seed: int = 0,
    licence: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Knob:
    """Train a vector at every candidate layer with BiPO; return the knob at the layer with the best validation loss.

    The vectors start at zero, in float32, and are added to the block's output on the tokens of `where` ("thinking" and
    "answer" are not known before a text is read, and refused); the model is frozen. `layers`, `first`, `last`: the
    candidates, as for `trimtab.learn`. Of several `learning_rates` each layer keeps the vector with the lowest
    validation loss, of equal ones that of the smallest rate; None stands for rates by `STEP_SHARES`. AdamW, a warm-up
    (`WARM_UP`) and a cosine over all `epochs`. The paper's `weight_decay` of 0.05 never reached its trainer (0 there).

    After every epoch the loss of `validation`, the mean over both signs, is taken; it starts at log 2. Once `patience`
    epochs, past the warm-up, have not lowered it by `MIN_IMPROVEMENT` together, the run ends, and its best vector
    counts. Without `validation` three tenths of the prompts are held out of `pairs`. A layer whose loss never falls
    below log 2 keeps its zero vector, and a `TrimtabWarning` names it.

    Strength 1 adds the vector as it was trained. `knob.diagnostics["table"]` holds what each run went through, on
    validation pairs: `preference` is the share whose chosen answer is the likelier one at strength 1, `margin` and
    `margin_reversed` the mean log-likelihood ratios at 1 and -1, `chosen` the mean log-likelihood of chosen answers at
    1. A `TrimtabWarning` says so where that is below the model's own (`diagnostics["base"]`): the loss only asks that
    rejected answers fall further, and a long vector may break the language.

    `progress` is called with the runs that are done and their number. `checkpoint` is a folder that keeps finished
    runs, layer by layer and rate by rate: the same call goes on there after it was stopped or killed, to the same knob
    bit for bit.

    Raises `TrainError` where no vector lowers the loss, `PairsError` for pairs that the model's context cannot hold or
    that share prompts with `validation`, and `OptionError` for other options.
    """
    adapter = Adapter(model)
    adapter.check_plain("learning")
    check_labels(name, licence)
    rates = None if learning_rates is None else sorted(set(check_several(learning_rates, "learning_rates")))
    options: dict[str, Any] = {
        "layers": adapter.layers(layers_between(adapter.n_layers, first, last) if layers is None else layers),
        "first": first,
        "last": last,
        "where": where,
        "beta": beta,
        "learning_rates": rates,
        "step_shares": list(STEP_SHARES) if learning_rates is None else None,
        "epochs": epochs,
        "patience": patience,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "seed": check_seed(seed),
    }
    _check(options)
    used, held = split_pairs(pairs, validation, seed)
    told = {"count": len(held), "hash": held.hash(), "held_out_of_pairs": validation is None}
    kept = Checkpoint(
        checkpoint,
        lambda: (
            {"work": "training vectors", **describe_model(model, tokenizer), **options}
            | {"pairs": pairs.hash(), "validation": told}
        ),
    )
    norms = kept.step(
        "norms",
        lambda: {str(i): norm for i, norm in residual_norms(model, tokenizer, pairs, options["layers"]).items()},
    )
    with frozen(model):
        seen, unseen = (SteeredPairs(model, tokenizer, some, where) for some in (used, held))
        training = Training(seen, unseen, {int(layer): norm for layer, norm in norms.items()}, options, kept)
        vectors, table = training.run(progress)
    best = {layer: best_row(table, layer) for layer in vectors}
    sites = {layer: Site(layer, POSITION) for layer in vectors}
    ranking = sorted(best, key=lambda layer: best[layer]["validation_loss"])
    base = training.base()
    notes = [*_zeros(best), *_costs(best[ranking[0]]["chosen"], base["chosen"])]
    for note in notes:
        warnings.warn(note, TrimtabWarning, stacklevel=2)
    return Knob(
        name=name,
        method="bipo",
        vectors={sites[layer]: vector for layer, vector in vectors.items()},
        norms=training.norms,
        site=sites[ranking[0]],
        gain=best[ranking[0]]["alpha"],
        where=where,
        provenance=learned_from(model, tokenizer, pairs, PAPER, {**options, "validation": told}, licence),
        diagnostics={
            "table": table,
            "selection": {
                "rule": "validation loss",
                "site": str(sites[ranking[0]]),
                "table": [[str(sites[layer]), best[layer]["validation_loss"]] for layer in ranking],
            },
            "base": base,
            "starting_loss": START,
            "seconds": sum(row["seconds"] for row in table),
            "peak_bytes": max((row["peak_bytes"] for row in table if row["peak_bytes"] is not None), default=None),
            "warnings": notes,
        },
    )


def _zeros(best: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Say which layers learned nothing; raises `TrainError` where none did."""
    zero = [layer for layer, row in best.items() if not row["vector_norm"]]
    said = f"The validation loss never fell below the {START:.4f} (log 2) that it started from"
    ways = "Try more pairs, more epochs, or other learning_rates, larger ones first."
    if len(zero) == len(best):
        raise TrainError(f"{said}, at any of {len(best)} layers, so there is no vector. {ways}")
    return [f"{said} at layers {', '.join(map(str, zero))}, whose vectors are zero. {ways}"] if zero else []


def _costs(chosen: float, base: float) -> list[str]:
    """Say so where the chosen answers themselves, in mean nats, became less likely than under the model alone."""
    if chosen >= base:
        return []
    return [
        f"At strength 1 the chosen answers of validation are less likely than without the knob (log-likelihood "
        f"{chosen:.4g} against {base:.4g}): the vector lowers the rejected ones further, and may break the language. "
        "Choose a smaller gain with trimtab.tune."
    ]


# --- options ----------------------------------------------------------------------------------------------------------


def _check(options: Mapping[str, Any]) -> None:
    if check_where(options["where"]) in THOUGHTS:
        raise OptionError(
            f"where={options['where']!r} depends on tokens that mark thoughts, which answers of pairs need not hold. "
            "Train on 'completion' tokens, and set where with knob.with_ or trimtab.tune."
        )
    for name in ("epochs", "patience", "batch_size"):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} counts from 1; got {value!r}.")
    rates, beta, decay = options["learning_rates"], options["beta"], options["weight_decay"]
    if rates is not None and (not rates or not all(0 < rate < math.inf for rate in rates)):
        raise OptionError(f"Learning rates are positive numbers, and there is at least one; got {rates}.")
    if not 0 < beta < 1000:
        raise OptionError(f"Beta lies between 0 and 1000, both excluded; got {beta!r}.")
    if not 0 <= decay < 1:
        raise OptionError(f"The weight decay lies between 0 and 1, 1 excluded; got {decay!r}.")
