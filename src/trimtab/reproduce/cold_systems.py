"""The systems of the COLD-Steer reproduction: how each is learned, at which layers and doses it is tried, who wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.adapter import Adapter
from trimtab.artifact import AnyKnob, DeltaKnob, Knob, LookaheadKnob
from trimtab.capture import residual_norms
from trimtab.errors import TrainError
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.render import Renderer
from trimtab.reproduce.bench import Bench, System, after
from trimtab.reproduce.cold_recipe import Recipe, Sizes
from trimtab.selection import layers_between
from trimtab.train.bipo import learn_vector
from trimtab.train.loops import load_trainers
from trimtab.train.steered import STEP_SHARES
from trimtab.train.steps import learn_lookahead, learn_step
from trimtab.train.vectors import learn_weights
from trimtab.types import Message, Site

ColdBench = Bench[Recipe, Sizes]
RELEASED: dict[str, Any] = {"learning_rates": [1e-3], "epochs": 2, "batch_size": 8, "weight_decay": 0.0}
"""As long and as fast as the released code trains a vector; its loss, and our warm-up, are those of BiPO."""
FEW: dict[str, Any] = {"learning_rates": [3e-3], "max_steps": 16, "batch_size": 8}
MANY, SHOWN = 100, 6000
"""From more pairs than `MANY` a vector is trained in batches of 16 in place of the paper's 4, at the larger of the
usual rates alone, until it has been shown about `SHOWN` pairs, so that it converges in minutes."""
ANSWER = 16
"""Tokens that examples leave for an answer by letter."""
REJECTED = "negative-sft:per=answer"
"""A loss with the gradient that is left of a pair's where the rejected forward overwrites what the chosen one left."""


@dataclass(frozen=True)
class Ladder:
    """One learned system: candidate sites, doses, and the system at one of each; the first site where there is one."""

    sites: Sequence[Site | None]
    doses: Sequence[float]
    at: Callable[[Site | None, float], System]
    knob: AnyKnob | None = None


def candidate_layers(bench: ColdBench) -> list[int]:
    """Return the candidate layers: as many as the sizes say, evenly spaced, the highest one included."""
    below = layers_between(Adapter(bench.model).n_layers, 0.0, bench.recipe.last)
    count = min(bench.sizes.layers, len(below))
    return sorted({below[-1 - round(i * len(below) / count)] for i in range(count)})


def learned(
    bench: ColdBench,
    name: str,
    pairs: Pairs,
    held: Pairs,
    seed: int,
    *,
    loss: str | None = None,
    longest: str | None = None,
) -> Ladder:
    """Learn a system from pairs; `held` are validation pairs, for what is trained with early stopping.

    `loss` replaces the pair loss of gradients; the systems that have none ignore it. `longest` is the longest question
    of a behaviour: examples have to leave room for it (guardrails and writing are of short prompts). Raises
    `TrainError` where nothing can be learned.
    """
    layers, recipe = candidate_layers(bench), bench.recipe
    own: dict[str, Any] = {} if loss is None else {"loss": loss}
    model, tokenizer = bench.model, bench.tokenizer
    if name == "examples":
        shots = _that_fit(bench, pairs, longest)
        return Ladder([None], shots, lambda _site, n: System(model, before=_shown(pairs, int(n))))
    if name in ("one-step", "few-step-lora"):
        if name == "one-step":
            delta: DeltaKnob = learn_step(model, tokenizer, pairs, **own)
        else:
            load_trainers()
            epochs = -(-FEW["max_steps"] * FEW["batch_size"] // len(pairs))
            delta = learn_weights(
                model, tokenizer, pairs, method="alignment-vector", validation=held, epochs=epochs, seed=seed, **FEW
            )
        return Ladder([None], recipe.steps, lambda _site, dose: System(model, {delta.with_(gain=dose): 1.0}), delta)
    if name == "cold-fd":
        ahead = learn_lookahead(model, tokenizer, pairs, layers=layers, backend="scaled", **own)
        return _moving(bench, ahead)
    if name.startswith("bipo"):
        schedule = RELEASED if name == "bipo-released" else _converged(bench, pairs, layers[-1])
        trained = learn_vector(model, tokenizer, pairs, layers=layers[-1:], validation=held, seed=seed, **schedule)
        return _moving(bench, trained)
    reads: dict[str, Any] = {"layers": layers, "seed": seed}
    if name.startswith("cold-kernel"):
        kernel = {"cold-kernel-softmax": {"kernel": "softmax"}}.get(name, {})
        own |= {"loss": REJECTED} if name == "cold-kernel-released" else {}
        return _moving(bench, learn(model, tokenizer, pairs, method="cold-kernel", options=kernel, **reads, **own))
    method, _, form = name.partition("-")
    knob = learn(model, tokenizer, pairs, method=method, positions="last", format="question_response", **reads)
    if form == "projection":
        removed = knob.with_(operation="ablate")
        return Ladder(
            [*knob.vectors], recipe.removals, lambda site, dose: System(model, {removed.with_(site=site): dose}), knob
        )
    return _moving(bench, knob.with_(operation="piecewise") if form == "piecewise" else knob)


def _converged(bench: ColdBench, pairs: Pairs, layer: int) -> dict[str, Any]:
    """Return the schedule of a vector that is trained to convergence."""
    if len(pairs) <= MANY:
        return {"epochs": bench.sizes.epochs}
    norm = residual_norms(bench.model, bench.tokenizer, pairs[:MANY], [layer])[layer]
    rate = STEP_SHARES[-1] * norm / Adapter(bench.model).hidden_size ** 0.5
    return {"epochs": min(bench.sizes.epochs, SHOWN // len(pairs)), "batch_size": 16, "learning_rates": [rate]}


def _moving(bench: ColdBench, knob: Knob | LookaheadKnob) -> Ladder:
    """Return the ladder of what moves the stream: every candidate site at the recipe's alphas."""
    sites = [*knob.sites] if isinstance(knob, LookaheadKnob) else [*knob.vectors]

    def at(site: Site | None, alpha: float) -> System:
        return System(bench.model, {knob.with_(site=site, gain=alpha): 1.0})

    return Ladder(sites, bench.recipe.alphas, at, knob)


def _that_fit(bench: ColdBench, pairs: Pairs, longest: str | None) -> list[int]:
    """Return the recipe's numbers of examples that leave room in the model's context for the longest question."""
    shots, limit = [n for n in bench.recipe.shots if n <= len(pairs)], Adapter(bench.model).context_length
    if not shots:
        raise TrainError(f"There are {len(pairs)} examples, and the recipe shows {min(bench.recipe.shots)} or more.")
    if longest is None or limit is None:
        return shots
    renderer = Renderer(bench.tokenizer)
    room = limit - ANSWER
    fit = [n for n in shots if len(renderer.prompt_ids(after(_shown(pairs, n), longest))) <= room]
    if not fit:
        raise TrainError(f"No example fits into the model's context of {limit} tokens beside the longest question.")
    return fit


def _shown(pairs: Pairs, shots: int) -> tuple[Message, ...]:
    return tuple(turn for pair in pairs[:shots] for turn in (*pair.prompt, Message("assistant", pair.chosen)))


Row = dict[str, Any]


def chosen(bench: ColdBench, ladder: Ladder, score: Callable[[System], float]) -> tuple[System | None, Row, list[Row]]:
    """Choose site, then dose, by the largest score on validation items whose KL keeps the budget.

    The middle dose ranks the sites; the best site is tried at every dose. Returns the system (None where nothing keeps
    the budget), its row and all rows.
    """
    rows: list[Row] = []

    def tried(site: Site | None, dose: float) -> Row:
        known = [row for row in rows if row["site"] == _named(site) and row["dose"] == dose]
        if known:
            return known[0]
        system = ladder.at(site, dose)
        kl = bench.kl(system, "validation")
        row = {"site": _named(site), "dose": dose, "score": score(system), "kl": kl}
        row["allowed"] = kl is None or kl <= bench.recipe.kl_budget
        rows.append(row)
        return row

    middle = ladder.doses[len(ladder.doses) // 2]
    best = ladder.sites[0]
    if len(ladder.sites) > 1:
        ranked = {site: tried(site, middle) for site in ladder.sites}
        best = max(ladder.sites, key=lambda site: (ranked[site]["allowed"], ranked[site]["score"]))
    allowed = [row for row in [tried(best, dose) for dose in ladder.doses] if row["allowed"]]
    if not allowed:
        return None, {}, rows
    row = max(allowed, key=lambda row: (row["score"], -abs(row["dose"])))
    return ladder.at(best, row["dose"]), row, rows


def _named(site: Site | None) -> str | None:
    return None if site is None else str(site)
