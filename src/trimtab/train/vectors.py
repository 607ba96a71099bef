"""Knobs whose evidence is training: DPO on the pairs, and on the pairs swapped; the weights' difference is the knob."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from trimtab.artifact import DeltaKnob, LowRank
from trimtab.artifact.checks import check_labels
from trimtab.artifact.parts import Part, parts_of, without_zeros
from trimtab.checkpoint import Checkpoint, describe_model, learned_from, remove
from trimtab.errors import OptionError, PairsError, TrainError, unknown_name
from trimtab.methods import TRAINED
from trimtab.pairs import Pairs
from trimtab.train import GRIDS, Trained, train
from trimtab.types import check_seed, check_several
from trimtab.weights.delta import STORED, difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WeightMethod = Literal["preference-vector", "alignment-vector"]
RANK = 16
LEARNING_RATES = (1e-5, 1e-4)
"""Rates that are tried where none are given: those of an adapter; all weights want smaller ones (`train.GRIDS`)."""
BETAS = (0.1,)
NOTHING = "Training changed no weight, so there is no difference. Try larger learning_rates."


def learn_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    method: WeightMethod = "preference-vector",
    name: str = "knob",
    validation: Pairs | None = None,
    anchors: Pairs | None = None,
    lora_rank: int | None = RANK,
    learning_rates: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    epochs: int = 10,
    max_steps: int | None = None,
    patience: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "float32",
    licence: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DeltaKnob:
    """Train what a weight knob needs with DPO, from `model` and with it as the reference, and return the knob.

    "preference-vector" (arXiv:2504.20106, eq. 2): theta+ - theta-, of a training with the pairs and of one with chosen
    and rejected swapped, both at the setting that the first one chose. "alignment-vector" (arXiv:2410.19206):
    theta_aligned - theta_base, one training. Strength 1 is the paper's coefficient 1. `model` itself stays as it is.

    With `lora_rank` an adapter is trained and the knob is of low rank, twice `lora_rank` for a preference vector, with
    nothing lost; such a knob can have another strength in every row of a batch. None trains all weights in float32, and
    the knob is dense, stored in `dtype` (float32, bfloat16, float16), rounded after subtraction.

    `anchors` are pairs on which nothing should change, as of topics that the knob must leave alone. Every training gets
    them as they are and swapped: the loss of DPO over both is least where the margin is that of `model`. Which answer
    is the chosen one plays no part.

    `validation`, `learning_rates`, `betas`, `epochs`, `max_steps`, `patience`, `batch_size`, `seed`: see
    `trimtab.train.train`; None stands for `LEARNING_RATES`, or with all weights for those of `train`, and for `BETAS`.
    `diagnostics` holds the records of the trainings, the norms by weight and, of a preference vector, the cosine of
    theta+ - theta and theta- - theta (about -0.5 to -0.7 in the paper's models). `progress` is called with the settings
    that are trained and their number.

    `checkpoint` is a folder that keeps finished trainings, and the finished settings of the one that is under way: the
    same call goes on there after it was stopped or killed. Raises what `train` raises, `PairsError` for anchors whose
    prompts are learned from too, and `TrainError` where training changed no weight.
    """
    if method not in TRAINED:
        raise unknown_name("method", str(method), get_args(WeightMethod))
    if not isinstance(pairs, Pairs) or not len(pairs):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PairsError(f"pairs must be Pairs, and at least one; got {pairs!r}. Pass Pairs.from_records(...).")
    check_labels(name, licence)
    used = pairs
    if anchors is not None and validation is None:  # an anchor is neither held out nor counted as preferred
        used, validation = pairs.split(seed=seed)
    still = _both_ways(anchors, pairs, validation)
    if dtype not in STORED:
        raise unknown_name("dtype", str(dtype), STORED)
    rates = (GRIDS["dpo"][0] if lora_rank is None else LEARNING_RATES) if learning_rates is None else learning_rates
    rates = check_several(rates, "learning_rates")
    run: dict[str, Any] = {"epochs": epochs, "max_steps": max_steps, "patience": patience, "batch_size": batch_size}
    run["seed"] = check_seed(seed)
    options: dict[str, Any] = {
        "lora_rank": lora_rank,
        "learning_rates": rates,
        "betas": check_several(BETAS if betas is None else betas, "betas"),
        **run,
        "dtype": dtype,
        **({} if anchors is None else {"anchors": {"count": len(anchors), "hash": anchors.hash()}}),
    }
    held = {} if validation is None else {"plus": validation, "minus": validation.swapped()}
    total = len(set(rates)) * len(set(options["betas"])) + (method == "preference-vector")
    settings_done = count(1)

    def advance(done: int, of: int) -> None:
        progress(next(settings_done), total)

    kept = Checkpoint(
        checkpoint,
        lambda: (
            {"work": "learning weights", **describe_model(model, tokenizer), **options, "pairs": pairs.hash()}
            | {"validation": None if validation is None else validation.hash()}
        ),
    )
    begun = time.perf_counter()

    def side(label: str, own_pairs: Pairs, rates: Sequence[float], betas: Sequence[float]) -> tuple[DeltaKnob, Any]:
        """Train one side, or take it from the checkpoint; return its difference to the base and its record."""
        own = None if checkpoint is None else Path(checkpoint) / label
        base = model if lora_rank is not None or model.dtype == torch.float32 else copy.deepcopy(model).float()

        @cache
        def trained() -> Trained:
            settings: dict[str, Any] = {"validation": held.get(label), "lora_rank": lora_rank, **run}
            settings |= {"learning_rates": rates, "betas": betas, "checkpoint": own, "progress": advance}
            return train(base, tokenizer, own_pairs + still, **settings)

        record = kept.step(f"{label} record", lambda: trained().record)
        tensors = kept.tensors(label, lambda: _parts(trained(), base).tensors())
        if own is not None:
            remove(own)
        return DeltaKnob(name, method, parts_of(tensors)), record

    plus, record = side("plus", used, rates, options["betas"])
    knob, records, diagnostics = plus, {"plus": record}, dict[str, Any]()
    if method == "preference-vector":
        chosen = record["chosen"]
        minus, records["minus"] = side("minus", used.swapped(), [chosen["learning_rate"]], [chosen["beta"]])
        knob = plus - minus
        diagnostics["cosine_plus_minus"] = cosine_of_sides(plus, minus, knob)
    diagnostics |= {"norms": knob.norms(), "training": records, "seconds": time.perf_counter() - begun}
    return DeltaKnob(
        name,
        method,
        {label: _stored(part, STORED[dtype]) for label, part in knob.parts.items()},
        provenance=learned_from(model, tokenizer, pairs, TRAINED[method], options, licence),
        diagnostics=diagnostics,
    )


def _both_ways(anchors: Pairs | None, *others: Pairs | None) -> Pairs:
    """Return the anchors as they are and swapped; raise for what cannot be held still."""
    if anchors is None:
        return Pairs(())
    if not isinstance(anchors, Pairs) or not len(anchors):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PairsError(f"Anchors are Pairs, and at least one; got {anchors!r}.")
    twice = len(anchors) - len({(pair.prompt, pair.chosen, pair.rejected) for pair in anchors})
    if twice:
        raise PairsError(f"{twice} of {len(anchors)} anchors are given twice, and would count twice. Give each once.")
    prompts = {pair.prompt for pairs in others if pairs is not None for pair in pairs}
    both = sum(pair.prompt in prompts for pair in anchors)
    if both:
        raise PairsError(f"{both} of {len(anchors)} anchors ask what pairs ask too; leave them out of one of the two.")
    return anchors + anchors.swapped()


def _parts(trained: Trained, base: PreTrainedModel) -> DeltaKnob:
    """Return what training added to the base model; raises `TrainError` where that is nothing."""
    if trained.adapter is None:
        try:
            return difference(trained.model, base, name="side")
        except OptionError:
            raise TrainError(NOTHING) from None
    changed = without_zeros(trained.adapter)
    if not changed:
        raise TrainError(NOTHING)
    return DeltaKnob("side", "lora", changed)


def cosine_of_sides(plus: DeltaKnob, minus: DeltaKnob, between: DeltaKnob) -> float:
    """Return the cosine of `plus` and `minus` by the law of cosines, `between` being plus - minus.

    From norms alone: nothing is multiplied out.
    """
    a, b, c = plus.norm(), minus.norm(), between.norm()
    return (a * a + b * b - c * c) / (2 * a * b)


def _stored(part: Part, dtype: torch.dtype) -> Part:
    return LowRank(part.a.to(dtype), part.b.to(dtype)) if isinstance(part, LowRank) else part.to(dtype)
