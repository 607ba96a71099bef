"""The steps of the Alignment Vectors reproduction: vectors, curves, the grid and its 27 targets, prompts, stages.

Every step returns plain JSON values and depends on its arguments alone, so that it can be kept and taken up again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from trimtab.artifact import DeltaKnob
from trimtab.compose import Goal, choose_setting
from trimtab.pairs import Pairs
from trimtab.reproduce.alignment_bench import LevelBench, name_of, share, tried
from trimtab.reproduce.alignment_recipe import LEVELS, better_than_others, thinned
from trimtab.train import train
from trimtab.train.vectors import learn_weights
from trimtab.types import Message
from trimtab.weights.live import applied

Record = dict[str, Any]
At = Callable[[float], Mapping[DeltaKnob, float]]
"""What lambda means: strengths of knobs."""


# --- vectors and lambda ---------------------------------------------------------------------------------------------


def vector(bench: LevelBench, domain: str, kind: str) -> Record:
    """Learn a domain's vector of a kind of `VECTORS`, keep it, and say what it took."""
    knob, record = _learned(bench, domain, kind, bench.recipe.learning_rates)
    knob.save(bench.knob_file("vector", kind, domain))
    return record


def _learned(bench: LevelBench, domain: str, kind: str, rates: Sequence[float]) -> tuple[DeltaKnob, Record]:
    recipe, sizes, source = bench.recipe, bench.sizes, bench.recipe.domains[domain]
    pairs = bench.data.pairs(source, "train", sizes.pairs)
    held = bench.data.pairs(source, "validation", sizes.validation_pairs)
    if kind == "anchored-avoidance":
        pairs, held = pairs.swapped(), held.swapped()
    others = [s for d, s in recipe.domains.items() if d != domain]
    knob = learn_weights(
        bench.model,
        bench.tokenizer,
        pairs,
        method="alignment-vector",
        name=domain,
        validation=held,
        anchors=None if kind == "plain" else bench.data.anchors(others, sizes.anchors),
        lora_rank=recipe.lora_rank,
        learning_rates=rates,
        betas=[recipe.beta],
        epochs=sizes.epochs,
    )
    return knob, {**_spent(knob.diagnostics["training"]["plus"]), "norm": knob.norm()}


def _spent(record: Mapping[str, Any]) -> Record:
    """Return what a training's record says of the setting that was chosen, and of the seconds with it and with all."""
    table = [{key: row[key] for key in ("learning_rate", "preference", "steps", "seconds")} for row in record["table"]]
    seconds = {"seconds": record["run"]["seconds"], "grid_seconds": record["grid"]["seconds"]}
    return {**record["chosen"], **seconds, "table": table}


def sweep(bench: LevelBench, domain: str, way: str) -> Record:
    """Turn a domain along lambda, and choose on validation the mildest that serves each level as well as the best.

    `rows` hold the likeliest level of test questions and the level of sampled answers; `chosen` a lambda by level.
    """
    rows = _curve(bench, domain, lambda strength: bench.turned(way, {domain: strength}), sampled=True)
    return {"rows": rows, "chosen": {level: _best_of(rows, domain, level) for level in LEVELS}}


def _curve(bench: LevelBench, domain: str, at: At, *, sampled: bool = False) -> list[Record]:
    """Measure a domain's levels along lambda, on validation questions and, with `sampled`, on test questions too."""
    rows: list[Record] = []
    for strength in thinned(bench.recipe.lambdas, bench.sizes.lambda_every):
        with applied(bench.model, at(strength)):
            row: Record = {"lambda": strength, "validation": bench.likeliest("validation", [domain])[domain]}
            if sampled:
                row["test"] = bench.likeliest("test", [domain])[domain]
                row["generated"] = bench.generated(domain, bench.sizes.sampled)
        rows.append(row)
    return rows


def _best_of(rows: Sequence[Record], domain: str, level: str) -> float:
    table = [tried({domain: row["lambda"]}, {domain: row["validation"]}) for row in rows]
    return choose_setting(table, Goal({name_of(domain, level): 1.0})).setting[domain]


# --- 27 combinations ------------------------------------------------------------------------------------------------


def grid(bench: LevelBench, way: str) -> Record:
    """Measure every combination of strengths once, on validation questions; this table serves all targets.

    Guardrails are measured where it matters: under the model as it is, and under the best few settings for each target.
    """
    recipe, sizes = bench.recipe, bench.sizes
    strengths = recipe.grids["plain" if way == "random" else way]
    values = thinned(strengths, sizes.grid_every * (sizes.control_every if way == "random" else 1))
    begun, merging, rows = time.perf_counter(), 0.0, list[Record]()
    for setting in product(values, repeat=len(recipe.domains)):
        at = time.perf_counter()
        with applied(bench.model, bench.turned(way, dict(zip(recipe.domains, setting, strict=True)))):
            merging += time.perf_counter() - at
            rows.append({"setting": list(setting), "likeliest": bench.likeliest("validation")})
    before = bench.rails("validation")
    for row in _best_rows(bench, rows):
        with applied(bench.model, bench.turned(way, dict(zip(recipe.domains, row["setting"], strict=True)))):
            after = bench.rails("validation")
        row["excess"] = {n: float(np.mean(before[n]) - np.mean(after[n])) - recipe.budget for n in before}
    return {"rows": rows, "seconds": time.perf_counter() - begun, "merge_seconds": merging / len(rows)}


def _best_rows(bench: LevelBench, rows: Sequence[Record]) -> list[Record]:
    """Return the model as it is, and the settings that serve some target best, as many for each as are checked."""
    table = [tried(dict(zip(bench.recipe.domains, row["setting"], strict=True)), row["likeliest"]) for row in rows]
    found = {i for i, one in enumerate(table) if not one.dose}
    for levels in product(LEVELS, repeat=len(bench.recipe.domains)):
        goal = goal_of(bench.recipe.domains, levels)
        order = sorted(range(len(table)), key=lambda i: (-goal.value(table[i].scores), table[i].dose))
        found |= set(order[: bench.sizes.checked])
    return [rows[i] for i in sorted(found)]


def goal_of(domains: Iterable[str], levels: Iterable[str]) -> Goal:
    """Return the goal of a combination: the preference accuracy of the domain that comes off worst."""
    return Goal({name_of(d, level): 1.0 for d, level in zip(domains, levels, strict=True)}, rule="worst")


def combine(bench: LevelBench, way: str, table: Sequence[Record]) -> Record:
    """Choose from the table for every combination of levels, without the model, and test each choice once.

    Of the settings that keep the guardrails' budget the best wins. `choice_seconds` are of one choice.
    """
    names = list(bench.recipe.domains)
    checked = [row for row in table if "excess" in row]
    measured = [tried(dict(zip(names, r["setting"], strict=True)), r["likeliest"], r["excess"]) for r in checked]
    tests: dict[tuple[float, ...], Record] = {}
    rows: list[Record] = []
    for levels in product(LEVELS, repeat=len(names)):
        goal, begun = goal_of(names, levels), time.perf_counter()
        chosen = choose_setting(measured, goal, mildest=False)
        seconds = time.perf_counter() - begun
        setting = tuple(chosen.setting.values())
        if setting not in tests:
            with applied(bench.model, bench.turned(way, chosen.setting)):
                tests[setting] = {"test": bench.likeliest("test"), "rails": bench.rails()}
        row = {"levels": list(levels), "setting": list(setting), "validation": goal.value(chosen.scores)}
        rows.append(row | {"choice_seconds": seconds, **tests[setting]})
    return {"rows": rows, "base": {"test": bench.likeliest("test"), "rails": bench.rails()}}


def prompts(bench: LevelBench) -> Record:
    """Ask for levels in words: choose a sentence for each domain and level on validation, and test all combinations.

    A combination's system line holds the sentences of all domains.
    """
    chosen: dict[str, dict[str, str]] = {}
    for domain, by_level in bench.recipe.instructions.items():
        chosen[domain] = {}
        for level in LEVELS:
            found = [bench.likeliest("validation", [domain], before=_system(text))[domain] for text in by_level[level]]
            best = int(np.argmax([share(levels, level) for levels in found]))
            chosen[domain][level] = by_level[level][best]
    rows: list[Record] = []
    for levels in product(LEVELS, repeat=len(bench.recipe.domains)):
        asked = " ".join(chosen[d][level] for d, level in zip(bench.recipe.domains, levels, strict=True))
        rows.append({"levels": list(levels), "test": bench.likeliest("test", before=_system(asked))})
    return {"sentences": chosen, "rows": rows}


def _system(text: str) -> tuple[Message, ...]:
    return (Message("system", text),)


def joint(bench: LevelBench, combination: str) -> Record:
    """Train DPO for one combination on the pairs of all domains together, at the rate that validation chooses.

    `seconds` are of the one run that is chosen.
    """
    recipe, sizes = bench.recipe, bench.sizes
    held, used = list[Pairs](), list[Pairs]()
    for source, level in zip(recipe.domains.values(), combination.split(), strict=True):
        better = better_than_others(level)
        used.append(bench.data.pairs(source, "train", sizes.pairs, better))
        held.append(bench.data.pairs(source, "validation", sizes.validation_pairs, better))
    trained = train(
        bench.model,
        bench.tokenizer,
        sum(used[1:], used[0]),
        validation=sum(held[1:], held[0]),
        learning_rates=recipe.learning_rates,
        betas=[recipe.beta],
        lora_rank=recipe.lora_rank,
        epochs=sizes.epochs,
    )
    assert trained.adapter is not None  # a rank was given
    with applied(bench.model, {DeltaKnob("trained", "lora", trained.adapter): 1.0}):
        tested = {"test": bench.likeliest("test"), "rails": bench.rails()}
    return {"levels": combination.split(), **_spent(trained.record), **tested}


# --- other domains --------------------------------------------------------------------------------------------------


def matrix(bench: LevelBench, strengths: Mapping[str, Mapping[str, float]]) -> Record:
    """Turn each domain to the lambda that validation chose for experts, and test all domains and guardrails.

    `strengths` are by way and domain. "orthogonal" is of plain vectors; see `_orthogonal`.
    """
    settings = {way: {d: bench.turned(way, {d: own[d]}) for d in own} for way, own in strengths.items()}
    straight, geometry = _orthogonal(bench)
    found: Record = {"base": {"test": bench.likeliest("test"), "rails": bench.rails()}}
    for kind, doses in {**settings, "orthogonal": straight}.items():
        found[kind] = {}
        for domain, dose in doses.items():
            with applied(bench.model, dose):
                tested = {"test": bench.likeliest("test"), "rails": bench.rails()}
            found[kind][domain] = {"setting": {knob.name: value for knob, value in dose.items()}, **tested}
    return found | geometry


def _orthogonal(bench: LevelBench) -> tuple[dict[str, dict[DeltaKnob, float]], Record]:
    """Take each plain vector's projection onto the others out, restore its length, and choose a lambda of its own.

    Returns the strengths of all plain vectors by domain; and their cosines, with the length that was left of each.
    """
    names = list(bench.recipe.domains)
    knobs = {domain: bench.vector(domain, "plain") for domain in names}
    gram = _gram(list(knobs.values()))
    norms = np.sqrt(np.diag(gram))
    straight: dict[str, dict[DeltaKnob, float]] = {}
    kept: dict[str, float] = {}
    for i, domain in enumerate(names):
        weight = apart(gram, i)
        kept[domain] = float(np.sqrt(weight @ gram @ weight) / norms[i])
        turned = dict(zip(knobs.values(), (weight / max(kept[domain], 1e-6)).tolist(), strict=True))

        def at(strength: float, turned: Mapping[DeltaKnob, float] = turned) -> dict[DeltaKnob, float]:
            return {knob: strength * value for knob, value in turned.items()}

        straight[domain] = at(_best_of(_curve(bench, domain, at), domain, "expert"))
    return straight, {"cosines": (gram / np.outer(norms, norms)).tolist(), "kept": kept}


def _gram(knobs: Sequence[DeltaKnob]) -> np.ndarray:
    """Return the inner products of weight differences, summed over all weights."""
    found = np.zeros((len(knobs), len(knobs)))
    for name in knobs[0].parts:
        rows = torch.stack([knob.dense(name).flatten().double() for knob in knobs])
        found += (rows @ rows.T).numpy()
    return found


def apart(gram: np.ndarray, i: int) -> np.ndarray:
    """Return the weights of vectors that make vector `i` less its projection onto the span of the others.

    `gram [K, K]` holds their inner products; among vectors on one line the projection is by least squares.

    >>> apart(np.array([[1.0, 0.5], [0.5, 1.0]]), 0).tolist()
    [1.0, -0.5]
    """
    others = [j for j in range(len(gram)) if j != i]
    weight = np.zeros(len(gram))
    weight[i] = 1.0
    if others:
        weight[others] = -np.linalg.lstsq(gram[np.ix_(others, others)], gram[others, i], rcond=None)[0]
    return weight


# --- another stage --------------------------------------------------------------------------------------------------


def sibling(bench: LevelBench) -> Record:
    """Make another fine-tuning stage of the model: SFT on other preferences' chosen answers; keep it as a knob."""
    recipe, sizes = bench.recipe, bench.sizes
    used = [bench.data.sft_pairs(source, "train", sizes.pairs) for source in recipe.sibling]
    held = [bench.data.sft_pairs(source, "validation", sizes.validation_pairs) for source in recipe.sibling]
    trained = train(
        bench.model,
        bench.tokenizer,
        sum(used[1:], used[0]),
        loss="sft",
        validation=sum(held[1:], held[0]),
        learning_rates=[recipe.sibling_rate],
        lora_rank=recipe.lora_rank,
        epochs=sizes.epochs,
    )
    assert trained.adapter is not None  # a rank was given
    knob = DeltaKnob("sibling", "sft", trained.adapter)
    knob.save(bench.knob_file("sibling"))
    row = trained.record["table"][0]
    return {"seconds": row["seconds"], "validation_losses": row["validation_losses"], "norm": knob.norm()}


def stage(bench: LevelBench, domain: str, rate: float) -> Record:
    """Test the base model's vector on the sibling stage, beside the vector that the stage itself gives."""
    other = DeltaKnob.load(bench.knob_file("sibling")).dense_copy()
    with applied(bench.model, {other: 1.0}):
        native, record = _learned(bench, domain, "plain", [rate])
        found: Record = {"native_seconds": record["seconds"], "base": _all(bench, domain)}
    for kind, knob in (("transferred", bench.vector(domain, "plain")), ("native", native.dense_copy())):

        def at(strength: float, knob: DeltaKnob = knob) -> dict[DeltaKnob, float]:
            return {other: 1.0, knob: strength}

        strength = _best_of(_curve(bench, domain, at), domain, "expert")
        with applied(bench.model, at(strength)):
            found[kind] = {"lambda": strength, **_all(bench, domain)}
    return found


def _all(bench: LevelBench, domain: str) -> Record:
    return {"test": bench.likeliest("test", [domain])[domain], "rails": bench.rails()}
