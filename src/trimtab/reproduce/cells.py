"""The steps of a reproduction: each one system learned, chosen on validation and tested, or one curve measured.

Every step returns plain JSON values and depends on its arguments alone, so that it can be kept and taken up again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.artifact import Knob
from trimtab.errors import TrainError, TuneError
from trimtab.evals.cost import Cost, measured
from trimtab.evals.stats import selection_bias
from trimtab.evals.tasks import AnyTask
from trimtab.learn import learn
from trimtab.ops import alpha_from_palrs
from trimtab.pairs import Pairs
from trimtab.reproduce.bench import Bench, System, first, summary
from trimtab.reproduce.data import overlap
from trimtab.reproduce.recipe import Domain, Recipe, Sizes, Steering, Training
from trimtab.train import Trained, train
from trimtab.train.loops import load_trainers
from trimtab.tune import tune
from trimtab.types import Message, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]
PBench = Bench[Recipe, Sizes]


def cost_record(cost: Cost) -> Record:
    """Return a cost as JSON values."""
    return {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes}


# --- without learning -----------------------------------------------------------------------------------------------


def base(bench: PBench, domain: Domain) -> Record:
    """Test the model as it is; `overlap` counts test questions that any pair which is learned from asks too."""
    sizes = bench.sizes
    drawn = [(sizes.pairs, sizes.seeds), (sizes.many_pairs, sizes.many_seeds)]
    drawn += [(count, sizes.count_seeds) for count in sizes.counts]
    pairs = [pair for n, seeds in drawn for seed in range(seeds) for pair in bench.pairs(domain, n, seed)]
    shared = overlap(pairs, bench.task(domain.task, "test", sizes.test))
    return {"test": bench.measure(bench.base, domain), "overlap": shared}


def examples(bench: PBench, domain: Domain, seed: int) -> Record:
    """Show pairs' chosen answers as earlier turns, as many as validation finds best, and test."""
    pairs = bench.pairs(domain, bench.sizes.pairs, seed)
    rows: list[Record] = []
    with measured() as tuning:
        for shots in sorted(n for n in bench.recipe.shots if n <= len(pairs)):
            system = System(bench.model, before=_shown(pairs, shots))
            rows.append({"shots": shots, **bench.validate(system, domain)})
    best = max(rows, key=lambda row: (row["within_budget"], row["score"], -row["shots"]))
    system = System(bench.model, before=_shown(pairs, best["shots"]))
    test = bench.measure(system, domain, seed=seed)
    costs = {"learn": cost_record(Cost()), "tune": cost_record(tuning)}
    return {"shots": best["shots"], "table": rows, **costs, "test": test}


def _shown(pairs: Pairs, shots: int) -> tuple[Message, ...]:
    return tuple(turn for pair in pairs[:shots] for turn in (*pair.prompt, Message("assistant", pair.chosen)))


# --- steering -------------------------------------------------------------------------------------------------------


def steered(bench: PBench, domain: Domain, way: Steering, n: int, seed: int, file: Path, *, controls: bool) -> Record:
    """Learn from `n` pairs, choose on validation, test once; a knob that tuning refuses leaves the model as it is.

    The knob goes to `file`. With `controls` a random direction and the vector of shuffled pairs are put at the knob's
    site with its alpha and tested too, and so is strength -1.
    """
    pairs = bench.pairs(domain, n, seed)
    if way.shuffled:
        pairs = pairs.flip_balanced(seed=seed)
    with measured() as learning:
        knob = _learned(bench, way, pairs, seed)
    record: Record = {"pairs": len(pairs), "learn": cost_record(learning)}
    refusal = ""
    with measured() as tuning:
        try:
            knob = _tuned(bench, domain, way, knob)
        except TuneError as error:
            refusal = str(error)
    record["tune"] = cost_record(tuning)
    if refusal:
        return record | {"refused": refusal, "test": bench.measure(bench.base, domain, seed=seed)}
    knob.save(file)
    chosen = {"site": str(knob.site), "where": knob.where, "gain": knob.gain}
    found = {key: (knob.tuning or {})[key] for key in ("base", "table", "selection_bias")}
    record |= {"chosen": chosen, "validation": found}
    record |= {"diagnostics": knob.diagnostics["sites"][str(knob.site)], "warnings": list(knob.diagnostics["warnings"])}
    record["test"] = bench.measure(System(bench.model, {knob: 1.0}), domain, seed=seed)
    if controls:
        record["controls"] = _controls(bench, domain, way, knob, n, seed)
    return record


def _learned(bench: PBench, way: Steering, pairs: Pairs, seed: int, site: Site | None = None) -> Knob:
    return learn(
        bench.model,
        bench.tokenizer,
        pairs,
        method=way.method,
        positions=(site.position,) if site else way.positions or None,
        layers=[site.layer] if site else None,
        last=bench.recipe.last,
        selection=None if way.selection == "validation" or site else way.selection,
        length_match=way.length_match,
        options=way.options,
        seed=seed,
    )


def _tuned(bench: PBench, domain: Domain, way: Steering, knob: Knob) -> Knob:
    sizes = bench.sizes
    return tune(
        knob if way.selection == "validation" else knob.pruned(),
        bench.model,
        bench.tokenizer,
        bench.held_out(domain, "validation"),
        task=bench.task(domain.task, "validation", sizes.validation),
        guardrails=bench.guardrails("validation"),
        gains=bench.recipe.gains,
        where=way.where,
        rank_pairs=min(sizes.rank_pairs, sizes.validation_pairs),
        finalists=sizes.finalists,
        budget=bench.recipe.budget,
        dose_response=False,
        batch_size=sizes.batch_size,
    )


def _controls(bench: PBench, domain: Domain, way: Steering, knob: Knob, n: int, seed: int) -> Record:
    """Test strength -1, a random direction and shuffled pairs, all at the knob's site with its alpha."""
    shuffled = _learned(bench, way, bench.pairs(domain, n, seed).flip_balanced(seed=seed), seed, knob.site)
    noise = torch.randn(knob.width, generator=torch.Generator().manual_seed(seed))
    kinds = {"random": noise, "shuffled": shuffled.vectors[knob.site]}
    record: Record = {}
    for kind, vector in kinds.items():
        control = Knob(knob.name, kind, {knob.site: vector}, knob.norms, knob.site, knob.gain, knob.where)
        record[kind] = bench.score(System(bench.model, {control: 1.0}), domain)
    task = bench.task(domain.task, "test", bench.sizes.test)
    sampled, reverse = first(task, bench.sizes.sampled), System(bench.model, {knob: -1.0})
    record["reversed"] = {
        "greedy": summary(task, bench.run(reverse, task)),
        "sampled": summary(sampled, bench.run(reverse, sampled, temperature=1.0, seed=seed)),
    }
    return record


# --- curves, on validation questions --------------------------------------------------------------------------------


def dose(bench: PBench, domain: Domain, file: Path) -> Record:
    """Measure a knob on validation questions over the recipe's alphas, and at what the paper calls alpha 1 (Eq. 4)."""
    knob = Knob.load(file)
    paper = alpha_from_palrs(
        1.0, knob.diagnostics["sites"][str(knob.site)]["mu_plus_norm"], knob.norms[knob.site.layer]
    )
    rows: list[Record] = []
    for alpha in sorted({0.0, paper, *bench.recipe.curve}):
        system = System(bench.model, {knob: alpha / knob.gain} if alpha else {})
        rows.append({"alpha": alpha, **bench.validate(system, domain)})
    return {"chosen_alpha": knob.gain, "paper_alpha_1": paper, "rows": rows}


def site_map(bench: PBench, domain: Domain, way: Steering, file: Path) -> Record:
    """Score every layer and position at the knob's tokens and alpha, on validation questions."""
    tuned = Knob.load(file)
    knob = learn(
        bench.model,
        bench.tokenizer,
        bench.pairs(domain, bench.sizes.pairs, 0),
        method=way.method,
        positions=("post_instruction", "demonstrated") if way.method == "palrs" else way.positions or None,
        last=1.0,
        options=way.options,
    )
    task = bench.task(domain.task, "validation", bench.sizes.validation)
    rows: list[Record] = []
    for site in knob.vectors:
        system = System(bench.model, {knob.with_(site=site, gain=tuned.gain, where=tuned.where): 1.0})
        rows.append({"layer": site.layer, "position": site.position, "score": bench.run(system, task).accuracy})
    return {"where": tuned.where, "alpha": tuned.gain, "rows": rows}


def chosen_on_test(bench: PBench, domain: Domain, way: Steering) -> Record:
    """Do what must not be done, and label it so: choose site and dose on the test questions that are then reported.

    All tokens are steered, as in the paper. The setting chosen on the first half is scored there and on the other half.
    """
    knob = _learned(bench, way, bench.pairs(domain, bench.sizes.pairs, 0), 0)
    n = min(bench.sizes.map_items, bench.sizes.test // 2)
    whole = bench.task(domain.task, "test", bench.sizes.test)
    task = first(whole, n)
    before = bench.run(bench.base, whole).scores

    def answered(site: Site, gain: float, items: AnyTask) -> np.ndarray:
        return bench.run(System(bench.model, {knob.with_(site=site, gain=gain, where="all"): 1.0}), items).scores

    tried = {(site, gain): answered(site, gain, task) for site in knob.vectors for gain in bench.recipe.gains}
    (site, gain), scores = max(tried.items(), key=lambda entry: float(entry[1].mean()))
    rest = answered(site, gain, whole)[n:]
    bias = selection_bias(before[:n], list(tried.values()))
    return {
        "site": str(site),
        "alpha": gain,
        "settings": len(tried),
        "items": n,
        "base": float(before[:n].mean()),
        "score": float(scores.mean()),
        "base_elsewhere": float(before[n:].mean()),
        "score_elsewhere": float(rest.mean()),
        "selection_bias": bias.expected,
    }


# --- training -------------------------------------------------------------------------------------------------------


def grid(bench: PBench, domain: Domain, way: Training, n: int) -> Record:
    """Train with every learning rate and beta on one draw of pairs; validation chooses, as it does for knobs."""

    def score(model: PreTrainedModel) -> float:
        found = bench.validate(System(model), domain)
        return found["score"] if found["within_budget"] else found["score"] - 1

    rates = tuple(sorted(way.learning_rates))[: bench.sizes.grid]
    betas = tuple(sorted(way.betas, reverse=True))[: max(1, bench.sizes.grid // len(rates))]
    load_trainers()
    with measured() as cost:
        record = _train(bench, domain, way, n, 0, rates, betas, score).record
    return {"record": record, "tune": cost_record(cost)}


def trained(bench: PBench, domain: Domain, way: Training, n: int, seed: int, setting: tuple[float, float]) -> Record:
    """Train at one setting with early stopping on validation pairs, and test once."""
    load_trainers()
    system, record = bench.base, Record()
    with measured() as cost:
        try:
            made = _train(bench, domain, way, n, seed, (setting[0],), (setting[1],), None)
            system, record = System(made.model), {"record": made.record}
        except TrainError as error:  # a draw of pairs on which it diverges leaves the model as it is
            record = {"refused": str(error)}
    return {**record, "learn": cost_record(cost), "test": bench.measure(system, domain, seed=seed)}


def _train(
    bench: PBench,
    domain: Domain,
    way: Training,
    n: int,
    seed: int,
    learning_rates: tuple[float, ...],
    betas: tuple[float, ...],
    score: Callable[[PreTrainedModel], float] | None,
) -> Trained:
    return train(
        bench.model,
        bench.tokenizer,
        bench.pairs(domain, n, seed),
        loss=way.loss,
        validation=bench.held_out(domain, "validation"),
        learning_rates=learning_rates,
        betas=None if way.loss == "sft" else betas,
        epochs=bench.sizes.epochs,
        patience=way.patience,
        batch_size=way.batch_size,
        lora_rank=way.lora_rank or None,
        seed=seed,
        score=score,
    )
