"""Knobs from one gradient of the weights: a lookahead (COLD-FD), or the step itself, as a weight difference.

Paper: K. Sharma, S. Trivedi, arXiv:2603.06495. What it does not compare with is the step taken: theta - eta G costs one
forward pass and no second stream.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from trimtab.adapter import Adapter, parameters_to
from trimtab.artifact import DeltaKnob, LookaheadKnob, LowRank
from trimtab.artifact.checks import check_labels
from trimtab.artifact.lookahead import Backend
from trimtab.artifact.parts import Part, labelled, parts_of
from trimtab.capture import evaluating, residual_norms, weight_gradients
from trimtab.checkpoint import Checkpoint, describe_model, fingerprint, learned_from
from trimtab.errors import OptionError, PairsError, TrainError, TrimtabWarning, unknown_name
from trimtab.evals.likelihood import render_texts
from trimtab.lookahead import Stream, mean_lengths
from trimtab.losses import Loss, LossFn, read_loss
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.selection import doubts_of_lengths, doubts_of_one, layers_between
from trimtab.team import ALONE, Team
from trimtab.types import Where, check_strength, check_where
from trimtab.weights.lowrank import relative_error, truncate
from trimtab.weights.rows import embedding_scale, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER = "arXiv:2603.06495"
RANK = 16
GAIN = 0.2
"""Alpha at strength 1 of a lookahead before tuning."""
SHARE = 0.01
"""Length of a step at strength 1 before tuning, as a share of the length of the weights that it changes."""
CALIBRATED = 16
"""Pairs on whose answers the length of displacements is measured."""


def learn_lookahead(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    name: str = "knob",
    loss: str | LossFn | Loss = "dpo",
    layers: Sequence[int] | None = None,
    first: float = 0.0,
    last: float = 0.8,
    rank: int | None = RANK,
    where: Where = "all",
    backend: Backend = "exact",
    step: float | None = None,
    per_token: bool = False,
    token_budget: int = 8192,
    seed: int = 0,
    licence: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
) -> LookaheadKnob:
    """Learn how the stream would move under one gradient step on the pairs, as a knob that moves it so (COLD-FD).

    The gradient of `loss` (see `trimtab.losses.read_loss`) by the embedding and the blocks up to the highest candidate
    layer is kept as a product of `rank` for each matrix (None keeps all of it). Candidate layers are as for
    `trimtab.learn`; the highest is active until tuning chooses, or `knob.with_(layers=...)` does, which may name
    several. Strength 1 is an alpha of 0.2 before tuning: the mean displacement over the answers of up to 16 pairs, in
    multiples of the mean residual norm there. `diagnostics` holds the gradient's norm, by which the paper's eta is
    `alpha * norms[layer] / scales[layer]`, the share of its squared norm that the rank kept, and what it cost.

    A `TrimtabWarning` says so where there is a single pair, and where a loss that sums over tokens compares answers of
    unequal lengths; `diagnostics["warnings"]` keeps them.

    `where`, `backend`, `step` and `per_token` are stored in the knob, see `trimtab.artifact.LookaheadKnob`; `seed` is
    of the decomposition of large matrices. `checkpoint` is a folder that keeps the gradient. `progress` is called with
    the pairs that are done and their number; `team` is as for `trimtab.learn`. Memory while learning: the gradient in
    float32, beside the model.

    Raises what `capture_gradients` raises, `KnobError` for a model whose attention has no forward-mode derivative, and
    `TrainError` where there is no gradient.
    """
    adapter, asked = Adapter(model), read_loss(loss)
    _check(pairs, rank, name, licence)
    check_where(where)
    if backend not in get_args(Backend):
        raise unknown_name("backend", str(backend), get_args(Backend))
    if step is not None and backend == "exact":
        raise OptionError(f"A step is of backend='scaled'; got {step!r} for the exact one, which takes none.")
    step = None if step is None else check_strength(step, "step")
    if step is not None and step <= 0:
        raise OptionError(f"The step is a number of gradients, above 0; got {step!r}.")
    wanted = adapter.layers(layers_between(adapter.n_layers, first, last) if layers is None else layers)
    adapter.check_plain("learning")
    begun = time.perf_counter()
    with evaluating(model):
        used = parameters_to(adapter, wanted[-1])
    names, thin = used.names, {n for n in used.names if n in used.called and _is_matrix(model, n)}
    parts, told = _gradient(
        model, tokenizer, pairs, names, thin, asked, rank, token_budget, seed, checkpoint, progress, team, "cold-fd"
    )
    norms = residual_norms(model, tokenizer, pairs, wanted, token_budget=token_budget, team=team)
    length = math.hypot(*(float(model.get_parameter(n).detach().float().norm()) for n in names))
    guess = {layer: norm * told["gradient_norm"] / length for layer, norm in norms.items()}
    options: dict[str, Any] = {"layers": wanted, "first": first, "last": last, "rank": rank, "loss": str(asked)}
    options |= {"where": where, "backend": backend, "step": step, "per_token": per_token}
    options |= {"token_budget": token_budget, "seed": seed}
    knob = LookaheadKnob(
        name,
        "cold-fd",
        parts,
        norms,
        guess,
        tuple(wanted),
        adapter.path,
        GAIN,
        where,
        backend,
        provenance=learned_from(model, tokenizer, pairs, PAPER, options, licence),
    )
    answers = _answers(adapter, tokenizer, pairs[:CALIBRATED], token_budget)
    with evaluating(model), torch.no_grad():
        # A step is as long as the scales say: those of a first one, by a guess, tell how long the second has to be.
        for _ in range(1 if backend == "exact" else 2):
            scales = mean_lengths(adapter, knob, answers)
            if not all(scales.values()):
                raise TrainError(
                    "The gradient moves the stream nowhere. Check that chosen and rejected answers differ."
                )
            knob = replace(knob, scales=scales)
    told |= {"seconds": time.perf_counter() - begun, "warnings": _doubts(tokenizer, pairs, asked)}
    top = (wanted[-1],)
    made = replace(knob, layers=top, step=step, per_token=per_token, diagnostics=told)
    Stream(adapter, made)  # a step that no dtype resolves is refused before it is saved
    return made


def learn_step(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    name: str = "knob",
    loss: str | LossFn | Loss = "dpo",
    rank: int | None = RANK,
    token_budget: int = 8192,
    seed: int = 0,
    licence: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
) -> DeltaKnob:
    """Take one gradient step on the pairs, and return it as a weight knob: -G, all layers, no second stream.

    With `rank` the knob holds every linear layer's part as a product of that rank, and each row of a batch can have a
    strength of its own; None keeps all weights, dense. At strength 1 the step is `SHARE` as long as the weights that it
    changes, before tuning: a loss's scale cancels. `diagnostics` holds both lengths, by which the paper's eta is
    `alpha * step_norm / gradient_norm`.

    Other arguments, warnings and errors: see `learn_lookahead`.
    """
    adapter, asked = Adapter(model), read_loss(loss)
    adapter.check_plain("learning")
    _check(pairs, rank, name, licence)
    begun = time.perf_counter()
    names = [n for n, _ in model.named_parameters() if rank is None or is_linear(model, n)]
    thin = set(names) if rank is not None else set[str]()
    parts, told = _gradient(
        model, tokenizer, pairs, names, thin, asked, rank, token_budget, seed, checkpoint, progress, team, "one-step"
    )
    length = math.hypot(*(float(model.get_parameter(n).detach().float().norm()) for n in parts))
    norm, step = DeltaKnob(name, "one-step", parts).norm(), SHARE * length
    options: dict[str, Any] = {"rank": rank, "loss": str(asked), "token_budget": token_budget, "seed": seed}
    told |= {"step_norm": step, "seconds": time.perf_counter() - begun, "warnings": _doubts(tokenizer, pairs, asked)}
    return DeltaKnob(
        name,
        "one-step",
        {n: _times(part, -step / norm) for n, part in parts.items()},
        provenance=learned_from(model, tokenizer, pairs, PAPER, options, licence),
        diagnostics=told,
    )


def _check(pairs: Pairs, rank: int | None, name: str, licence: str | None) -> None:
    check_labels(name, licence)
    if not isinstance(pairs, Pairs) or not len(pairs):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PairsError(f"pairs must be Pairs, and at least one; got {pairs!r}. Pass Pairs.from_records(...).")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"rank counts from 1; got {rank!r}.")


def _gradient(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    names: Sequence[str],
    thin: Collection[str],
    loss: Loss,
    rank: int | None,
    token_budget: int,
    seed: int,
    checkpoint: str | Path | None,
    progress: Callable[[int, int], None],
    team: Team,
    kind: str,
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Return the gradient by parameter, those of `thin` cut to a rank, and what a record says of it."""
    loss.check_checkpoint(checkpoint)

    def compute() -> dict[str, Tensor]:
        found = weight_gradients(
            model, tokenizer, pairs, names, loss=loss, token_budget=token_budget, progress=progress, team=team
        )
        parts: dict[str, Part] = {}
        square, lost = 0.0, 0.0
        for name in names:
            gradient = found.pop(name)
            size = float(gradient.double().square().sum())
            square += size
            if rank is not None and size and name in thin:
                low = truncate(gradient, rank=rank, seed=seed)
                lost += size * relative_error(gradient, low) ** 2
                parts[name] = LowRank(low.a.cpu(), low.b.cpu())
            elif size:
                parts[name] = gradient.cpu()
        if not parts:
            raise TrainError(
                f"The loss {loss} has no gradient on these pairs: it asks for nothing more, or answers do not differ."
            )
        told = torch.tensor([math.sqrt(square), 1 - lost / square], dtype=torch.float64)
        return {**labelled(parts), "told": told}

    job = {
        "work": f"a gradient of weights for {kind}",
        "loss": str(loss),
        "rank": rank,
        "token budget": token_budget,
        "seed": seed,
    }
    job |= {"pairs": pairs.hash(), "targets": _targets(loss, pairs)}
    job |= {"weights": fingerprint([*names]), "of a rank": fingerprint(sorted(thin))}
    kept = team.first(lambda: Checkpoint(checkpoint, lambda: {**job, **describe_model(model, tokenizer)}))
    tensors = kept.tensors("gradient", compute)
    norm, energy = tensors.pop("told").tolist()
    return parts_of(tensors), {"gradient_norm": norm, "energy": energy, "weights": len(names)}


def _doubts(tokenizer: PreTrainedTokenizerBase, pairs: Pairs, loss: Loss) -> list[str]:
    """Warn of what may make the knob mean something else than it seems to, and return the warnings."""
    notes = doubts_of_one(len(pairs))
    if loss.sums_tokens:
        renderer = Renderer(tokenizer)
        sides = (
            [renderer.response_length(p.prompt, p.chosen) for p in pairs],
            [renderer.response_length(p.prompt, p.rejected) for p in pairs],
        )
        notes += doubts_of_lengths([fmean(side) for side in sides], "loss='dpo:per=token', or pairs of equal lengths")
    for note in notes:
        warnings.warn(note, TrimtabWarning, stacklevel=3)
    return notes


def _targets(loss: Loss, pairs: Pairs) -> str:
    """Return a hash of what the loss wants beside the answers, which the pairs' own hash does not cover."""
    return fingerprint([(loss.texts(pair, n), loss.shares(pair, n)) for n, pair in enumerate(pairs, 1)])


def _is_matrix(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a parameter's gradient can act as a product of two thin matrices, beside its module."""
    return is_linear(model, name) or embedding_scale(model.get_submodule(name.rpartition(".")[0])) is not None


def _times(part: Part, factor: float) -> Part:
    return LowRank(part.a, part.b * factor) if isinstance(part, LowRank) else part * factor


def _answers(
    adapter: Adapter, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, token_budget: int
) -> list[tuple[Mapping[str, Tensor], Tensor]]:
    """Return the model's inputs for both answers of the pairs, and which of their tokens are the answer's."""
    prompts = [pair.prompt for pair in pairs] * 2
    texts = render_texts(tokenizer, prompts, [p.chosen for p in pairs] + [p.rejected for p in pairs], closing=False)
    renderer, batches = Renderer(tokenizer), list[tuple[Mapping[str, Tensor], Tensor]]()
    size = max(1, token_budget // max(len(text.ids) for text in texts))
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        padded = renderer.pad([text.ids for text in some], side="right")
        counted = torch.zeros_like(padded.input_ids, dtype=torch.bool)
        for row, text in enumerate(some):
            counted[row, text.start : len(text.ids)] = True
        device = adapter.input_device
        batches.append(({k: v.to(device) for k, v in padded._asdict().items()}, counted.to(device)))
    return batches
