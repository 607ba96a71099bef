"""Pairs to a knob, in seconds: read activations, take directions, describe every candidate site, choose one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.capture import capture
from trimtab.checkpoint import learned_from
from trimtab.errors import OptionError, PairsError, TrimtabWarning, unknown_name
from trimtab.methods import METHODS, TRAINED, Method
from trimtab.ops import alpha_from_multiplier, alpha_from_palrs, describe_site, lengths_vary, regress_out_lengths
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.selection import doubts, layers_between, rank_sites
from trimtab.texts import FORMATS, Format, expand_positions
from trimtab.types import Site, Where, check_seed, check_where

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Selection = Literal["eq3_cosine", "max_relative_norm", "probe_auc", "fixed"]
Scale = Literal["raw", "mean_chosen_norm", "mean_residual_norm"]
LengthMatch = Literal["off", "bucket", "regress"]


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
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Knob:
    """Learn a knob from pairs; about a hundred do, and it takes seconds.

    Every candidate site (layers x positions) is read, described in `knob.diagnostics["sites"]` (by the pairs' plain
    differences, whatever the method makes of them) and stored; tuning chooses among them on validation data, which is
    better than any rule that sees these pairs only. None stands for what the method's paper does.

    `format`, `positions`, `token_budget`, `checkpoint`: see `trimtab.capture.capture`. Without a chat template the
    answers are read after their prompts, with a warning. `layers`: the candidates; None keeps those that lie between
    `first` and `last` as fractions of the depth, which by default leaves out the last fifth. `selection`: "eq3_cosine"
    (Eq. 3 of PaLRS as we read it: the difference most aligned with the mean chosen activation; mind the warning about
    norms), "max_relative_norm", "probe_auc" (held-out separation of the answers), or "fixed", which takes `site`.

    `scale` is what strength 1 means before tuning: "raw" (the vector as it is), "mean_chosen_norm" (Eq. 4 of PaLRS:
    strength is the paper's alpha) or "mean_residual_norm" (strength is our alpha). `where` is stored in the knob.
    `length_match`: "bucket" keeps the pairs whose answers are about equally long, "regress" removes what a straight
    line in length explains. `options` go to the method, `seed` to whatever is drawn.
    `progress` is called with the number of texts that were read and that of all.

    Warns (`TrimtabWarning`) of what may make the knob mean something else than it seems to, and keeps the warnings in
    `knob.diagnostics["warnings"]`.
    """
    if not isinstance(pairs, Pairs):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PairsError(f"pairs must be Pairs; got {type(pairs).__name__}. Pass Pairs.from_records(...).")
    plan = _plan(model, tokenizer, method, format, positions, layers, first, last, selection, site)
    _check_options(scale, where, length_match, seed)
    own = {**plan.method.defaults, **({"seed": seed} if "seed" in plan.method.defaults else {})}
    own.update(plan.method.check({} if options is None else options))

    used = _equally_long(tokenizer, pairs) if length_match == "bucket" else pairs
    evidence = capture(
        model,
        tokenizer,
        used,
        positions=plan.positions,
        layers=plan.layers,
        format=plan.format,
        token_budget=token_budget,
        checkpoint=checkpoint,
        progress=progress,
    )
    chosen, rejected = evidence.chosen, evidence.rejected  # [N, S, D]
    if length_match == "regress":
        chosen, rejected = regress_out_lengths(chosen, rejected, evidence.lengths)
    vectors = dict(zip(evidence.sites, plan.method.run(chosen, rejected, own), strict=True))
    statistics = {s: describe_site(chosen[:, i], rejected[:, i], seed=seed) for i, s in enumerate(evidence.sites)}
    ranking = rank_sites(statistics, plan.selection, plan.site)
    best = ranking[0].site

    lengths, width = evidence.lengths.double().mean(dim=0).tolist(), chosen.shape[-1]
    notes = [*plan.notes, *_doubts(statistics[best], plan.selection, width, length_match, evidence.lengths)]
    for note in notes:
        warnings.warn(note, TrimtabWarning, stacklevel=2)
    settings: dict[str, Any] = {"format": plan.format, "positions": list(plan.positions), "layers": list(plan.layers)}
    settings |= {"first": first, "last": last, "selection": plan.selection, "scale": scale, "where": where}
    settings |= {"length_match": length_match, "seed": seed, "token_budget": token_budget, **own}
    return Knob(
        name=name,
        method=method,
        vectors=vectors,
        norms=evidence.norms,
        site=best,
        gain=_gain(scale, float(vectors[best].norm()), statistics[best]["mu_plus_norm"], evidence.norms[best.layer]),
        where=where,
        provenance=learned_from(model, tokenizer, used, plan.method.paper, settings, licence),
        diagnostics={
            "sites": {str(s): dict(values) for s, values in statistics.items()},
            "selection": {
                "rule": plan.selection,
                "site": str(best),
                "table": [[str(s), score] for s, score in ranking],
            },
            "mean_lengths": {"chosen": lengths[0], "rejected": lengths[1]},
            "norm_tokens": evidence.norm_tokens,
            "pairs_left_out": len(pairs) - len(used),
            "warnings": notes,
        },
    )


# What to read


@dataclass(frozen=True)
class _Plan:
    method: Method
    format: Format
    positions: tuple[str, ...]
    layers: tuple[int, ...]
    selection: str
    site: Site | None
    notes: tuple[str, ...]


def _plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    format: Format | None,
    positions: Sequence[str] | str | None,
    layers: Sequence[int] | None,
    first: float,
    last: float,
    selection: str | None,
    site: Site | str | None,
) -> _Plan:
    """Settle everything the caller left open by the method, the template and the model."""
    if method not in METHODS:
        if method in TRAINED:
            raise OptionError(f"{method} trains weights: use trimtab.learn_weights(..., method={method!r}).")
        raise unknown_name("method", method, METHODS)
    adapter, renderer, entry = Adapter(model), Renderer(tokenizer), METHODS[method]
    fixed = _fixed_site(adapter, site)
    rule = _rule(entry, selection, fixed)
    asked = (positions,) if isinstance(positions, str) else tuple(positions) if positions is not None else None
    if asked is None and fixed is not None:
        asked = (fixed.position,)
    notes: list[str] = []
    if format is None:
        format = _format_for(asked) or entry.format
        if format == "response_as_user" and not renderer.has_template:
            format = "question_response"
            notes.append(
                "This tokenizer has no chat template, so answers are read after their prompts "
                "(format='question_response')."
            )
    if asked is None:
        asked = (entry.position or _default_position(renderer, format),)
    kept = layers_between(adapter.n_layers, first, last) if layers is None else [adapter.layer(i) for i in layers]
    if fixed is not None and layers is None:
        kept = [*kept, fixed.layer]
    names = expand_positions(renderer, asked, format)
    if fixed is not None and (fixed.layer not in kept or fixed.position not in names):
        raise unknown_name(
            "site", str(fixed), (str(Site(layer, name)) for layer in sorted(set(kept)) for name in names)
        )
    return _Plan(entry, format, names, tuple(sorted(set(kept))), rule, fixed, tuple(notes))


def _fixed_site(adapter: Adapter, site: Site | str | None) -> Site | None:
    if site is None:
        return None
    parsed = Site.parse(site) if isinstance(site, str) else site
    return Site(adapter.layer(parsed.layer), parsed.position)


def _rule(method: Method, selection: str | None, site: Site | None) -> str:
    rule = selection or (method.selection if site is None else "fixed")
    if rule == "validation":
        raise OptionError(
            "Choosing a site by validation needs data that learning has not seen: learn with another rule, then pass "
            "the knob and held-out pairs to trimtab.tune."
        )
    if rule not in get_args(Selection):
        raise unknown_name("selection", rule, get_args(Selection))
    if (rule == "fixed") != (site is not None):
        got = f"selection={rule!r} and site={None if site is None else str(site)!r}"
        raise OptionError(f"A site goes with selection='fixed', and selection='fixed' needs a site; got {got}.")
    return rule


def _format_for(positions: Sequence[str] | None) -> Format | None:
    """Return the format in which the positions exist, if they exist in one only."""
    groups = {position.partition("[")[0] for position in positions or ()}
    if "post_instruction" in groups:
        return "response_as_user"
    return "question_response" if "response_end" in groups else None


def _default_position(renderer: Renderer, format: Format) -> str:
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if format == "response_as_user":
        return "post_instruction"
    return "response_end" if renderer.closing_count() else "last"


def _check_options(scale: str, where: str, length_match: str, seed: int) -> None:
    for what, got, known in (
        ("scale", scale, get_args(Scale)),
        ("length_match", length_match, get_args(LengthMatch)),
    ):
        if got not in known:
            raise unknown_name(what, str(got), known)
    check_where(where)
    check_seed(seed)


def _doubts(
    at: Mapping[str, float | None], selection: str, width: int, length_match: str, lengths: Tensor
) -> list[str]:
    """Say what may make the knob mean something else; `lengths [N, 2]` are the tokens of the answers."""
    chosen, rejected = lengths.double().mean(dim=0).tolist()
    alike = length_match == "regress" and chosen != rejected and not lengths_vary(lengths)
    notes = [
        "length_match='regress' changed nothing: the chosen answers are all equally long, and so are the rejected "
        "ones, so that no line in length can be drawn within either side."
    ]
    unmatched = (chosen, rejected) if length_match == "off" or alike else None
    return [*(notes if alike else ()), *doubts(at, selection, width, unmatched, len(lengths))]


def _equally_long(tokenizer: PreTrainedTokenizerBase, pairs: Pairs, ratio: float = 1.25) -> Pairs:
    """Keep the pairs whose answers differ in length by at most `ratio`, in tokens."""
    renderer = Renderer(tokenizer)
    kept = Pairs(
        pair
        for pair in pairs
        for lengths in [[renderer.response_length(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]]
        if max(lengths) <= ratio * min(lengths)
    )
    if not len(kept):
        raise PairsError(
            f"None of the {len(pairs)} pairs has answers whose lengths differ by at most {ratio - 1:.0%}. "
            "Use length_match='regress'."
        )
    return kept


def _gain(scale: str, vector_norm: float, chosen_norm: float | None, residual_norm: float) -> float:
    if scale == "raw":
        return alpha_from_multiplier(1.0, vector_norm, residual_norm)
    return alpha_from_palrs(1.0, chosen_norm or 0.0, residual_norm) if scale == "mean_chosen_norm" else 1.0
