"""Pairs to a knob, in seconds: capture activations, take directions, describe every site, choose one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import Knob, model_identity
from trimtab.capture import FORMATS, Evidence, Format, capture, expand_positions
from trimtab.errors import OptionError, PairsError, TrimtabWarning, unknown_name
from trimtab.methods import METHODS, Method
from trimtab.ops import alpha_from_multiplier, alpha_from_palrs, describe_site, regress_out_lengths
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.types import WHERE, Site, Where

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Selection = Literal["eq3_cosine", "max_relative_norm", "probe_auc", "fixed"]
Scale = Literal["raw", "mean_chosen_norm", "mean_residual_norm"]
LengthMatch = Literal["off", "bucket", "regress"]

SCORES = {"eq3_cosine": "cos_r_mu", "max_relative_norm": "relative_norm", "probe_auc": "probe_auc"}
"""Selection rules, and the diagnostic whose largest value each of them looks for."""

LENGTH_RATIO = 1.25
"""Answers within this ratio of lengths count as equally long for `length_match="bucket"`."""

Statistics = Mapping[Site, Mapping[str, float | None]]


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    method: str = "palrs",
    name: str = "knob",
    format: Format | None = None,
    positions: Sequence[str] | str | None = None,
    layers: Sequence[int] | None = None,
    first: float = 0.0,
    last: float = 0.8,
    selection: Selection | None = None,
    site: Site | str | None = None,
    scale: Scale = "raw",
    where: Where = "all",
    length_match: LengthMatch = "off",
    options: Mapping[str, object] | None = None,
    seed: int = 0,
    token_budget: int = 8192,
    licence: str | None = None,
) -> Knob:
    """Learn a knob from pairs; about a hundred do, and it takes seconds.

    Every candidate site (layers x positions) is read, described in `knob.diagnostics["sites"]` and stored;
    `trimtab.tune` chooses among them on validation data, which is better than any rule that sees the pairs only.
    None means what the method's paper does.

    `format` and `positions`: see `trimtab.capture.capture`. Without a chat template answers are read after their
    prompt, with a warning. `layers`: candidates; None keeps the layers between `first` and `last`, as fractions of the
    depth (layer i of n reaches from i/n to (i+1)/n), so that the last fifth is left out.
    `selection`: "eq3_cosine" (Eq. 3 of PaLRS as we read it: the difference most aligned with the mean chosen
    activation; prefers gaps of norm, see the warning), "max_relative_norm", "probe_auc" (held-out separation of the
    answers), or "fixed", which takes `site`. `scale` is what strength 1 means before tuning: "raw" (the vector as it
    is), "mean_chosen_norm" (Eq. 4: strength is PaLRS's alpha), "mean_residual_norm" (strength is our alpha).
    `length_match`: "bucket" keeps the pairs whose answers are about equally long, "regress" removes what a straight
    line in length explains. `options` go to the method, `seed` to whatever is drawn.

    Warns (`TrimtabWarning`) and notes in the diagnostics what may make the knob mean something else than it seems to.
    """
    settings = _settle(
        _Settings(
            method=method, format=format, positions=(positions,) if isinstance(positions, str) else positions,
            layers=layers, first=first, last=last, selection=selection, site=site, scale=scale, where=where,
            length_match=length_match, options=options or {}, seed=seed, token_budget=token_budget,
        ),
        Adapter(model), Renderer(tokenizer),
    )  # fmt: skip
    used = _equally_long(Renderer(tokenizer), pairs) if length_match == "bucket" else pairs
    evidence = capture(
        model,
        tokenizer,
        used,
        positions=settings.positions or (),
        layers=settings.layers,
        format=settings.format or "question_response",
        token_budget=token_budget,
    )
    chosen, rejected = evidence.chosen, evidence.rejected
    if length_match == "regress":
        chosen, rejected = regress_out_lengths(chosen, rejected, evidence.lengths)
    vectors = METHODS[method].run(chosen, rejected, settings.options)  # [S, D]
    statistics = {s: describe_site(chosen[:, i], rejected[:, i], seed=seed) for i, s in enumerate(evidence.sites)}
    table = rank_sites(statistics, settings)
    return _knob(name, settings, evidence, vectors, statistics, table, _provenance(model, tokenizer, used, licence))
