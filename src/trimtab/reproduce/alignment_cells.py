"""The steps of the Alignment Vectors reproduction: vectors, curves, the grid and its 27 targets, prompts, stages.

Every step returns plain JSON values and depends on its arguments alone, so that it can be kept and taken up again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch

from trimtab.artifact import DeltaKnob
from trimtab.compose import Goal, choose_setting
from trimtab.errors import TrainError
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
STANDARD = ("expert", "generic", "avoidance")


# --- vectors and lambda ---------------------------------------------------------------------------------------------


def vector(bench: LevelBench, domain: str, way: str) -> Record:
    """Learn a domain's vector, keep it, and say what it took."""
    knob, record = _learned(bench, domain, way, bench.recipe.learning_rates)
    knob.save(bench.knob_file("vector", way, domain))
    return record


def _learned(bench: LevelBench, domain: str, way: str, rates: Sequence[float]) -> tuple[DeltaKnob, Record]:
    recipe, sizes, source = bench.recipe, bench.sizes, bench.recipe.domains[domain]
    pairs = bench.data.pairs(source, "train", sizes.pairs)
    if way == "anchored":
        pairs += bench.data.anchors([s for d, s in recipe.domains.items() if d != domain], sizes.anchors)
    knob = learn_weights(
        bench.model,
        bench.tokenizer,
        pairs,
        method="alignment-vector",
        name=domain,
        validation=bench.data.pairs(source, "validation", sizes.validation_pairs),
        lora_rank=recipe.lora_rank,
        learning_rates=rates,
        betas=[recipe.beta],
        epochs=sizes.epochs,
    )
    trained = knob.diagnostics["training"]["plus"]
    table = [{key: row[key] for key in ("learning_rate", "preference", "steps", "seconds")} for row in trained["table"]]
    seconds = {"seconds": trained["run"]["seconds"], "grid_seconds": trained["grid"]["seconds"]}
    return knob, {**trained["chosen"], **seconds, "table": table, "norm": knob.norm()}


def sweep(bench: LevelBench, domain: str, way: str) -> Record:
    """Measure a vector along lambda, and choose on validation the mildest that serves each level as well as the best.

    `rows` hold the likeliest level of test questions and the level of sampled answers; `chosen` a lambda by level.
    """
    knob = bench.vector(domain, way)
    rows = _curve(bench, domain, lambda strength: {knob: strength}, sampled=True)
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
    """Measure every combination of strengths once, on validation questions; this table serves all targets."""
    knobs = {domain: bench.vector(domain, way) for domain in bench.recipe.domains}
    values = thinned(bench.recipe.grid, bench.sizes.grid_every)
    begun, merging, rows = time.perf_counter(), 0.0, list[Record]()
    for strengths in product(values, repeat=len(knobs)):
        at = time.perf_counter()
        with applied(bench.model, dict(zip(knobs.values(), strengths, strict=True))):
            merging += time.perf_counter() - at
            rows.append({"setting": list(strengths), "likeliest": bench.likeliest("validation")})
    return {"rows": rows, "seconds": time.perf_counter() - begun, "merge_seconds": merging / len(rows)}


def combine(bench: LevelBench, way: str, table: Sequence[Record]) -> Record:
    """Choose from the table for every combination of levels, without the model, and test each choice once.

    The rule is "worst": the preference accuracy of the domain that comes off worst. `choice_seconds` are of one choice.
    """
    names = list(bench.recipe.domains)
    measured = [tried(dict(zip(names, row["setting"], strict=True)), row["likeliest"]) for row in table]
    knobs = {domain: bench.vector(domain, way) for domain in names}
    tests: dict[tuple[float, ...], Record] = {}
    rows: list[Record] = []
    for levels in product(STANDARD, repeat=len(names)):
        goal = Goal({name_of(d, level): 1.0 for d, level in zip(names, levels, strict=True)}, rule="worst")
        begun = time.perf_counter()
        chosen = choose_setting(measured, goal)
        seconds = time.perf_counter() - begun
        setting = tuple(chosen.setting.values())
        if setting not in tests:
            with applied(bench.model, dict(zip(knobs.values(), setting, strict=True))):
                tests[setting] = {"test": bench.likeliest("test"), "rails": bench.rails()}
        rows.append(
            {
                "levels": list(levels),
                "setting": list(setting),
                "validation": goal.value(chosen.scores),
                "choice_seconds": seconds,
                **tests[setting],
            }
        )
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
    for levels in product(STANDARD, repeat=len(bench.recipe.domains)):
        asked = " ".join(chosen[d][level] for d, level in zip(bench.recipe.domains, levels, strict=True))
        rows.append({"levels": list(levels), "test": bench.likeliest("test", before=_system(asked))})
    return {"sentences": chosen, "rows": rows}


def _system(text: str) -> tuple[Message, ...]:
    return (Message("system", text),)


def joint(bench: LevelBench, combination: str, rate: float) -> Record:
    """Train DPO for one combination on the pairs of all domains together; `seconds` are of the one run."""
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
        learning_rates=[rate],
        betas=[recipe.beta],
        lora_rank=recipe.lora_rank,
        epochs=sizes.epochs,
    )
    row = trained.record["table"][0]
    found: Record = {"levels": combination.split(), "seconds": row["seconds"], "steps": row["steps"]}
    with _instead(bench, trained.adapter):
        return found | {"test": bench.likeliest("test"), "rails": bench.rails()}


@contextmanager
def _instead(bench: LevelBench, adapter: Any) -> Generator[None]:
    with applied(bench.model, {DeltaKnob("trained", "lora", adapter): 1.0}):
        yield


# --- other domains --------------------------------------------------------------------------------------------------


def matrix(bench: LevelBench, strengths: Mapping[str, Mapping[str, float]]) -> Record:
    """Turn each domain's vector to the lambda that validation chose for experts, and test all domains and guardrails.

    As learned in each way (`strengths` by way and domain), and plain vectors with each one's projection onto the others
    taken out and its length restored, at a lambda of its own. `cosines` are of the plain vectors.
    """
    names = list(bench.recipe.domains)
    found: Record = {"base": {"test": bench.likeliest("test"), "rails": bench.rails()}}

    def measure(knobs: Mapping[str, DeltaKnob], settings: Mapping[str, Mapping[str, float]]) -> Record:
        rows: Record = {}
        for domain, setting in settings.items():
            with applied(bench.model, {knobs[name]: value for name, value in setting.items()}):
                rows[domain] = {"setting": setting, "test": bench.likeliest("test"), "rails": bench.rails()}
        return rows

    for way, own in strengths.items():
        settings = {d: {o: float(o == d) * own[d] for o in names} for d in names}
        found[way] = measure({d: bench.vector(d, way) for d in names}, settings)
    knobs = {domain: bench.vector(domain, "plain") for domain in names}
    gram = _gram(list(knobs.values()))
    norms = np.sqrt(np.diag(gram))
    straight: dict[str, dict[str, float]] = {}
    kept: dict[str, float] = {}
    for i, domain in enumerate(names):
        weight = apart(gram, i)
        kept[domain] = float(np.sqrt(weight @ gram @ weight) / norms[i])
        turned = dict(zip(names, (weight / max(kept[domain], 1e-6)).tolist(), strict=True))

        def at(strength: float, turned: Mapping[str, float] = turned) -> dict[DeltaKnob, float]:
            return {knobs[name]: strength * value for name, value in turned.items()}

        strength = _best_of(_curve(bench, domain, at), domain, "expert")
        straight[domain] = {name: strength * value for name, value in turned.items()}
    found["orthogonal"] = measure(knobs, straight)
    return found | {"cosines": (gram / np.outer(norms, norms)).tolist(), "kept": kept}


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
    if trained.adapter is None:
        raise TrainError("The sibling stage has no adapter.")
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
