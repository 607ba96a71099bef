"""Pairs to a knob, in seconds: read activations, take directions, describe every candidate site, choose one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from trimtab.artifact import KernelExamples, Knob
from trimtab.artifact.checks import check_labels
from trimtab.capture import Evidence, GradientEvidence, capture, capture_gradients
from trimtab.checkpoint import learned_from
from trimtab.errors import OptionError, PairsError, TrimtabWarning, unknown_name
from trimtab.kernels import Kernel, check_kernel
from trimtab.losses import Loss, LossFn, read_loss
from trimtab.methods.cold_kernel import example_values
from trimtab.ops import alpha_from_multiplier, alpha_from_palrs, describe_site, lengths_vary, regress_out_lengths
from trimtab.pairs import Pairs
from trimtab.plans import Plan, Selection, make_plan
from trimtab.render import Renderer
from trimtab.selection import doubts, doubts_of_lengths, doubts_of_one, rank_sites
from trimtab.team import ALONE, Team
from trimtab.texts import Format
from trimtab.types import Site, Where, check_seed, check_where

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scale = Literal["raw", "mean_chosen_norm", "mean_residual_norm"]
LengthMatch = Literal["off", "bucket", "regress"]

KEPT = 256
"""Pairs whose activations are kept, where a method needs the means of all and only the diagnostics look at pairs."""
STEP = 0.2
"""Alpha at strength 1 of a gradient before tuning: how long a gradient is depends on the loss's scale."""


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
    scale: Scale | None = None,
    loss: str | LossFn | Loss | None = None,
    where: Where = "all",
    length_match: LengthMatch = "off",
    options: Mapping[str, object] | None = None,
    seed: int = 0,
    token_budget: int = 8192,
    licence: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
) -> Knob:
    """Learn a knob from pairs; about a hundred do, and it takes seconds.

    Every candidate site (layers x positions) is read, described in `knob.diagnostics["sites"]` (by the pairs' plain
    differences, whatever the method makes of them) and stored; tuning chooses among them on validation data, which is
    better than any rule that sees these pairs only. None stands for what the method's paper does. Methods of means
    (palrs, diffmean without `equal_weight`, random) keep the activations of `KEPT` pairs at most, spread evenly; of
    the diagnostics `pairwise_cosine` and `probe_auc`, and so `selection="probe_auc"`, are of those, and all else is of
    all pairs.

    `format`, `positions`, `token_budget`, `checkpoint`: see `trimtab.capture.capture`. Without a chat template the
    answers are read after their prompts, with a warning. Methods whose evidence is gradients read those of `loss`, by
    default "dpo" (see `trimtab.losses.read_loss`), at one or several of `trimtab.capture.GRADIENT_POSITIONS`. `layers`:
    the candidates; None keeps those that lie between `first` and `last` as fractions of the depth, which by default
    leaves out the last fifth. `selection`: "eq3_cosine" (Eq. 3 of PaLRS as we read it: the difference most aligned with
    the mean chosen activation; mind the warning about norms), "max_relative_norm", "probe_auc" (held-out separation of
    the answers), "first_order" (of gradients, and of them alone: how fast the mean loss falls with alpha), or "fixed",
    which takes `site`.

    `scale` is what strength 1 means before tuning: "raw" (the vector as it is; of gradients COLD-Steer's eta of 1,
    which may be far too little or too much), "mean_chosen_norm" (Eq. 4 of PaLRS: strength is the paper's alpha) or
    "mean_residual_norm" (strength is our alpha). None is "raw", and of gradients an alpha of `STEP`. `where` is stored
    in the knob.
    `length_match`: "bucket" keeps the pairs whose answers are about equally long, "regress" removes what a straight
    line in length explains. `options` go to the method, `seed` to whatever is drawn: "cold-kernel" takes
    `{"kernel": "cosine" | "softmax" | "linear", "temperature": 1.0}`, whose knob keeps the pairs' gradients and weighs
    them by the stream at every token (see `trimtab.kernels.kernel_weights`).
    `progress` is called with the number of texts that were read and that of all. `team` (see `trimtab.team.open_team`):
    processes that read the pairs together, each of which returns the knob.

    Warns (`TrimtabWarning`) of what may make the knob mean something else than it seems to, and keeps the warnings in
    `knob.diagnostics["warnings"]`.
    """
    if not isinstance(pairs, Pairs):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PairsError(f"pairs must be Pairs; got {type(pairs).__name__}. Pass Pairs.from_records(...).")
    check_labels(name, licence)
    plan = make_plan(model, tokenizer, method, format, positions, layers, first, last, selection, site)
    _check_options(scale, where, length_match, seed)
    own = {**plan.method.defaults, **({"seed": seed} if "seed" in plan.method.defaults else {})}
    own.update(plan.method.check({} if options is None else options))
    asked = read_loss("dpo" if loss is None else loss)

    used = _equally_long(tokenizer, pairs) if length_match == "bucket" else pairs
    reading: dict[str, Any] = {
        "layers": plan.layers,
        "token_budget": token_budget,
        "checkpoint": checkpoint,
        "progress": progress,
        "team": team,
    }
    if loss is not None and not plan.gradients:
        raise OptionError(f"A loss is of methods whose evidence is gradients; got loss={loss!r} for {method}.")
    if plan.gradients:
        _check_gradients(scale, length_match, own)
        evidence, vectors, statistics, kernel = _from_gradients(model, tokenizer, used, plan, asked, own, seed, reading)
    else:
        evidence, vectors, statistics, kernel = _from_activations(
            model, tokenizer, used, plan, length_match, own, seed, reading
        )
    ranking = rank_sites(statistics, plan.selection, plan.site)
    best = ranking[0].site

    lengths, width = evidence.lengths.double().mean(dim=0).tolist(), evidence.chosen.shape[-1]
    if plan.gradients:
        found = _doubts_of_gradients(len(used), lengths, compared=length_match == "off" and asked.sums_tokens)
    else:
        found = _doubts(statistics[best], plan.selection, width, length_match, evidence.lengths)
    notes = [*plan.notes, *found]
    for note in notes:
        warnings.warn(note, TrimtabWarning, stacklevel=2)
    settings: dict[str, Any] = {"format": plan.format, "positions": list(plan.positions), "layers": list(plan.layers)}
    settings |= {"first": first, "last": last, "selection": plan.selection, "scale": scale, "where": where}
    settings |= {"length_match": length_match, "seed": seed, "token_budget": token_budget, **own}
    settings |= {"loss": str(asked) if plan.gradients else None}
    length = float(vectors[best].norm()) if kernel is None else kernel.scales[best]
    return Knob(
        name=name,
        method=method,
        vectors=vectors,
        norms=evidence.norms,
        site=best,
        gain=STEP
        if plan.gradients and scale is None
        else _gain(scale, length, statistics[best]["mu_plus_norm"], evidence.norms[best.layer]),
        where=where,
        operation="add" if kernel is None else "kernel",
        kernel=kernel,
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
            "pairs_kept": len(evidence.kept),
            "prompts_run_once": evidence.shared,
            "pairs_left_out": len(pairs) - len(used),
            "warnings": notes,
        },
    )


# Evidence

Found = tuple[Evidence, dict[Site, Tensor], dict[Site, dict[str, float | None]], KernelExamples | None]
"""What was read, the vector and the diagnostics of every site, and the examples of a kernel that weighs them."""


def _from_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    plan: Plan,
    length_match: str,
    own: Mapping[str, object],
    seed: int,
    reading: Mapping[str, Any],
) -> Found:
    means_do = plan.method.of_means and not own.get("equal_weight") and length_match != "regress"
    keep = KEPT if means_do else None
    evidence = capture(model, tokenizer, pairs, positions=plan.positions, format=plan.format, keep=keep, **reading)
    chosen, rejected = evidence.chosen, evidence.rejected  # [N, S, D]
    if length_match == "regress":
        chosen, rejected = regress_out_lengths(chosen, rejected, evidence.lengths)
    sampled = len(chosen) < len(pairs)
    # Of means alone, one pair that stands for all makes what all of them make.
    whole = (evidence.means[0][None], evidence.means[1][None]) if sampled else (chosen, rejected)
    vectors = dict(zip(evidence.sites, plan.method.run(*whole, own), strict=True))
    statistics: dict[Site, dict[str, float | None]] = {}
    for i, site in enumerate(evidence.sites):
        of_all = (evidence.means[:, i], evidence.parts[:, :, i]) if sampled else None
        statistics[site] = describe_site(chosen[:, i], rejected[:, i], seed=seed, whole=of_all)
    return evidence, vectors, statistics, None


def _from_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    plan: Plan,
    loss: Loss,
    own: Mapping[str, object],
    seed: int,
    reading: Mapping[str, Any],
) -> Found:
    """Describe the sites by minus the pairs' gradients, in place of differences; lengths and norms are as ever."""
    found = capture_gradients(model, tokenizer, pairs, loss=loss, positions=plan.positions, **reading)
    again = {name: reading[name] for name in ("layers", "token_budget", "team")}
    evidence = capture(
        model, tokenizer, pairs, positions=("response_mean",), format="question_response", keep=1, **again
    )
    vectors = dict(zip(found.sites, plan.method.run(found.gradients, found.activations, own), strict=True))
    none = torch.zeros_like(found.gradients[:, 0])
    statistics: dict[Site, dict[str, float | None]] = {}
    for i, site in enumerate(found.sites):
        described = describe_site(-found.gradients[:, i], none, seed=seed)
        described["first_order"] = (described["r_norm"] or 0.0) * evidence.norms[site.layer]
        statistics[site] = described
    return evidence, vectors, statistics, _kernel(found, own)


def _kernel(found: GradientEvidence, own: Mapping[str, object]) -> KernelExamples | None:
    """Return the examples where the method's kernel depends on the input."""
    kernel = own.get("kernel", "unit")
    if kernel == "unit":
        return None
    values = example_values(found.gradients).float()
    return KernelExamples.weigh(
        cast(Kernel, kernel),
        cast(float, own["temperature"]),
        dict(zip(found.sites, found.activations.unbind(1), strict=True)),
        dict(zip(found.sites, values.unbind(1), strict=True)),
    )


def _check_gradients(scale: str | None, length_match: str, own: Mapping[str, object]) -> None:
    check_kernel(own.get("kernel", "unit"), cast(float, own.get("temperature", 1.0)))
    if scale == "mean_chosen_norm":
        raise OptionError("scale='mean_chosen_norm' is of methods that read answers; of gradients take raw, or none.")
    if length_match == "regress":
        raise OptionError("length_match='regress' is of methods that read answers; of gradients take 'bucket'.")


def _check_options(scale: str | None, where: str, length_match: str, seed: int) -> None:
    for what, got, known in (
        ("scale", "raw" if scale is None else scale, get_args(Scale)),
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


def _doubts_of_gradients(count: int, lengths: Sequence[float], *, compared: bool) -> list[str]:
    """Say the same of gradients, which have no norms of activations; `compared`: answers, by sums over tokens."""
    return [*doubts_of_one(count), *(doubts_of_lengths(lengths, "length_match='bucket'") if compared else ())]


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


def _gain(scale: str | None, vector_norm: float, chosen_norm: float | None, residual_norm: float) -> float:
    if scale in (None, "raw"):
        return alpha_from_multiplier(1.0, vector_norm, residual_norm)
    return alpha_from_palrs(1.0, chosen_norm or 0.0, residual_norm) if scale == "mean_chosen_norm" else 1.0
