"""What each step of reproducing Preference Vectors does: train one thing, or measure one setting."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.artifact import AnyKnob, DeltaKnob, Knob
from trimtab.compose.goal import Goal, Tried, choose_setting
from trimtab.errors import PairsError, TrainError, TuneError
from trimtab.evals.cost import measured
from trimtab.evals.graders import is_refusal
from trimtab.evals.tasks import Task
from trimtab.learn import learn
from trimtab.pairs import Pairs
from trimtab.reproduce.bench import Bench, System
from trimtab.reproduce.cells import cost_record
from trimtab.reproduce.data import Split
from trimtab.reproduce.preference_recipe import Recipe, Sizes
from trimtab.reproduce.preference_systems import (
    LOSSES,
    VECTOR,
    Rates,
    Systems,
    flipped_names,
    plus_names,
)
from trimtab.runtime import Dose
from trimtab.train import train
from trimtab.train.labels import relabel
from trimtab.train.rewards import reinforce, task_reward
from trimtab.train.vectors import cosine_of_sides, learn_weights
from trimtab.tune import tune
from trimtab.weights.delta import difference, random_like
from trimtab.weights.live import applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]
LAST = 0.85
"""Steering knobs are read up to this fraction of the depth."""
READY = 5
"""Times that a system is put into the weights, for the seconds of it."""
COMPOSED = ("vectors", "positive-only", "random")
"""Whose strengths validation chooses: the paper's, its ablation, and a control."""


class PreferenceBench:
    """One model with its data and the folder of what was trained from it."""

    def __init__(self, bench: Bench[Recipe, Sizes], folder: Path) -> None:
        self.bench, self.systems = bench, Systems(bench.recipe, folder)
        self.recipe, self.sizes = bench.recipe, bench.sizes
        self._base_rails: dict[str, list[float]] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, name: str, rate: float, seed: int) -> Record:
        """Train what goes by a name, keep the differences as knobs, and say what validation shows of it at strength 1.

        `score` is the mean score of sampled validation answers, over the preferences that it is for, and `drop` the
        largest loss of a guardrail.
        """
        own = name.removesuffix(" flipped").removeprefix("reward-")
        goal = [own] if own in self.recipe.preferences else list(self.recipe.two)
        extra: Record = {}
        with measured() as cost:
            try:
                if name in self.recipe.preferences or name in flipped_names(self.recipe):
                    knob, extra = self._vector(name, rate, seed)
                elif name.startswith("reward-"):
                    knob = self._rewarded(goal[0], rate, seed)
                else:
                    pairs = self._joint(name, seed)
                    if self._same_as_joint(name, seed):
                        return {"same_as": "joint-dpo"}
                    knob = self._joint_model(name, pairs, rate, seed)
            except (PairsError, TrainError) as error:
                return {"refused": str(error)}
        knob.save(self.systems.file(name, rate, seed))
        return {**self.validate({knob: 1.0}, goal, seed), **extra, "cost": cost_record(cost), "norm": knob.norm()}

    def _vector(self, name: str, rate: float, seed: int) -> tuple[DeltaKnob, Record]:
        """Train on the pairs and on the pairs swapped; keep theta+ - theta, and return theta+ - theta-."""
        domain, way = self.recipe.preferences[name.removesuffix(" flipped")], self.recipe.training
        pairs, held = self.bench.pairs(domain, self.sizes.pairs, seed), self.bench.held_out(domain, "validation")
        if name in flipped_names(self.recipe):
            pairs = pairs.flip_balanced(seed=seed)
        plain = name.replace(" ", "-")  # as a knob's name has no space
        sides: list[DeltaKnob] = []
        for side, used, chosen in (("plus", pairs, held), ("minus", pairs.swapped(), held.swapped())):
            knob = learn_weights(
                self.bench.model,
                self.bench.tokenizer,
                used,
                method="alignment-vector",
                name=f"{plain}-{side}",
                validation=chosen,
                lora_rank=way.lora_rank or None,
                learning_rates=(rate,),
                betas=(way.beta,),
                epochs=self.sizes.epochs,
                patience=way.patience,
                batch_size=way.batch_size,
                seed=seed,
            )
            sides.append(knob)
        plus, minus = sides
        plus.save(self.systems.file(f"{name} plus", rate, seed))
        vector = (plus - minus).with_(name=plain, method=VECTOR)
        best = [side.diagnostics["training"]["plus"]["chosen"] for side in sides]
        return vector, {
            "cosine": cosine_of_sides(plus, minus, vector),
            "norm_plus": plus.norm(),
            "norm_minus": minus.norm(),
            "chosen": best,
        }

    def plus(self, name: str, rate: float, seed: int) -> Record:
        """Say what validation shows of the positive half of a vector, alone, at strength 1."""
        knob = DeltaKnob.load(self.systems.file(f"{name} plus", rate, seed))
        return {**self.validate({knob: 1.0}, [name], seed), "norm": knob.norm()}

    def _joint(self, name: str, seed: int) -> Pairs:
        """Return the pairs of the first two preferences, in the order that a baseline gives their answers."""
        one, other = (self.bench.pairs(self.recipe.preferences[p], self.sizes.pairs, seed) for p in self.recipe.two)
        return relabel(one + other, "safe-first") if name == "dpo-safe-first" else one + other

    def _same_as_joint(self, name: str, seed: int) -> bool:
        """Tell whether a baseline is joint DPO by another name: the same loss on the same pairs."""
        return (
            name == "dpo-safe-first"
            and LOSSES[name] == LOSSES["joint-dpo"]
            and self._joint(name, seed) == self._joint("joint-dpo", seed)
        )

    def _joint_model(self, name: str, pairs: Pairs, rate: float, seed: int) -> DeltaKnob:
        one, other = (self.bench.held_out(self.recipe.preferences[p], "validation") for p in self.recipe.two)
        held, way = one + other, self.recipe.training
        trained = train(
            self.bench.model,
            self.bench.tokenizer,
            pairs,
            loss=LOSSES[name],
            validation=relabel(held, "safe-first") if name == "dpo-safe-first" else held,
            learning_rates=(rate,),
            betas=(way.beta,),
            lora_rank=way.lora_rank or None,
            epochs=self.sizes.epochs,
            patience=way.patience,
            batch_size=way.batch_size,
            seed=seed,
        )
        return self._difference(trained.model, name)

    def _rewarded(self, name: str, rate: float, seed: int) -> DeltaKnob:
        domain, way = self.recipe.preferences[name], self.recipe.rewards
        held = self.bench.task(domain.task, "validation", min(way.held, self.sizes.validation))
        asked = self.bench.training_task(domain.task, way.prompts, seed)
        assert isinstance(held, Task)  # where there are training questions, answers are graded
        made = reinforce(
            self.bench.model,
            self.bench.tokenizer,
            asked.prompts,
            task_reward(asked, held),
            method=way.method,
            validation=held.prompts,
            learning_rate=rate,
            kl=way.kl,
            steps=min(way.steps, self.sizes.reward_steps),
            answers=way.answers,
            max_new_tokens=asked.max_new_tokens,
            lora_rank=self.recipe.training.lora_rank or None,
            seed=seed,
        )
        return self._difference(made.model, f"reward-{name}")

    def _difference(self, trained: PreTrainedModel, name: str) -> DeltaKnob:
        """Return what training changed; raises `TrainError` where that is nothing, as where no answer had a reward."""
        before = self.bench.model.state_dict()
        if all(torch.equal(weight, before[label]) for label, weight in trained.state_dict().items()):
            raise TrainError(f"Training {name} changed no weight.")
        return difference(trained, self.bench.model, name=name)

    def steer(self, name: str) -> Record:
        """Learn a steering knob from the same pairs, and let validation choose where it is read and turned."""
        domain = self.recipe.preferences[name]
        with measured() as cost:
            knob = learn(
                self.bench.model,
                self.bench.tokenizer,
                self.bench.pairs(domain, self.sizes.pairs, 0),
                name=name,
                last=LAST,
            )
            try:
                knob = tune(
                    knob,
                    self.bench.model,
                    self.bench.tokenizer,
                    self.bench.held_out(domain, "validation"),
                    task=self.bench.task(domain.task, "validation", self.sizes.validation),
                    guardrails=self.bench.guardrails("validation"),
                    where=("all", "prompt", "context"),
                    budget=self.recipe.budget,
                    dose_response=False,
                    batch_size=self.sizes.batch_size,
                )
            except TuneError as error:
                return {"refused": str(error), "cost": cost_record(cost)}
        knob.save(self.systems.file(f"steer {name}", 0, 0))
        return {"site": str(knob.site), "where": knob.where, "gain": knob.gain, "cost": cost_record(cost)}

    # --- measuring ------------------------------------------------------------------------------------------------

    def validate(self, setting: Dose, goal: Sequence[str], seed: int) -> Record:
        """Return what validation says of a setting: the mean score of the preferences `goal`, and guardrails lost."""
        system = System(self.bench.model, setting)
        scores = [self._sampled(system, name, "validation", self.sizes.validation, seed)[0] for name in goal]
        lost = self._lost(self._rails(system, "validation"))
        return {"score": float(np.mean(scores)), "drop": max(lost.values()), "kl": self.bench.kl(system, "validation")}

    def _lost(self, rails: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return which share of its validation items each guardrail loses against the model as it is."""
        if self._base_rails is None:
            self._base_rails = self._rails(self.bench.base, "validation")
        return {name: float(np.mean(self._base_rails[name]) - np.mean(scores)) for name, scores in rails.items()}

    def _sampled(
        self, system: System, name: str, split: Split, n: int, seed: int
    ) -> tuple[list[float], list[float], list[float]]:
        """Return scores of answers sampled at temperature 1, whether each refuses, and whether it is broken, `[n]`."""
        task = self.bench.task(self.recipe.preferences[name].task, split, n)
        outcome = self.bench.run(system, task, temperature=1.0, seed=seed)
        refused = [float(is_refusal(answer)) for answer in outcome.answers]
        return outcome.scores.tolist(), refused, outcome.degenerate.tolist()

    def _rails(self, system: System, split: Split) -> dict[str, list[float]]:
        return {rail.name: self.bench.run(system, rail).scores.tolist() for rail in self.bench.guardrails(split)}

    def _measure(self, setting: Dose, seed: int) -> Record:
        """Measure on test items: scores by preference, refusals of the first's, guardrails, KL, broken."""
        system = System(self.bench.model, setting)
        found = {n: self._sampled(system, n, "test", self.sizes.sampled, seed) for n in self.recipe.preferences}
        return {
            "scores": {name: values[0] for name, values in found.items()},
            "refused": found[self.recipe.two[0]][1],
            "broken": float(np.mean([values[2] for values in found.values()])),
            "guardrails": self._rails(system, "test"),
            "kl": self.bench.kl(system),
        }

    def test(self, name: str, rates: Rates, seed: int) -> Record:
        """Measure a system on test items; `ready_seconds` are of reading its knobs and putting them into the weights.

        Each of these is of one try, and the weights are as they were after it.
        """
        used = "joint-dpo" if self._same_as_joint(name, seed) else name
        setting = self.systems.setting(used, rates, seed)
        if setting is None:
            return {"refused": "it could not be trained"}
        ready: list[float] = []
        for _ in range(READY):
            begun = time.perf_counter()
            with applied(self.bench.model, self.systems.setting(used, rates, seed) or {}):
                ready.append(time.perf_counter() - begun)
        return {**self._measure(setting, seed), "ready_seconds": ready, "knobs": len(setting)}

    def grid(self, rates: Rates, seed: int) -> Record:
        """Return both preferences' test scores at every pair of strengths, `[first][second][n]`, answers sampled."""
        one, other = (self.systems.load(name, rates, seed) for name in self.recipe.two)
        found: dict[str, list[list[list[float]]]] = {name: [] for name in self.recipe.two}
        for a in self.recipe.grid:
            for name in found:
                found[name].append([])
            for b in self.recipe.grid:
                system = System(self.bench.model, {one: a, other: b})
                for name, rows in found.items():
                    rows[-1].append(self._sampled(system, name, "test", self.sizes.sampled, seed)[0])
        return found

    def scale(self, rates: Rates, seed: int) -> Record:
        """Return what happens on test items along one strength for both."""
        knobs = [self.systems.load(name, rates, seed) for name in self.recipe.two]
        return {f"{eta:g}": self._measure(dict.fromkeys(knobs, eta), seed) for eta in self.recipe.scales}

    def compose(self, what: str, rates: Rates, seed: int) -> Record:
        """Let validation choose both strengths, so that neither preference is sacrificed, and test the choice once.

        `what` is of `COMPOSED`: the vectors, their positive halves, or random differences as long as the vectors.
        """
        names = plus_names(self.recipe) if what == "positive-only" else self.recipe.two
        knobs = {own: self.systems.load(name, rates, seed) for own, name in zip(self.recipe.two, names, strict=True)}
        if what == "random":
            knobs = {name: random_like(knob, seed=seed + i) for i, (name, knob) in enumerate(knobs.items())}
        table: list[Tried] = []
        for strengths in product(self.recipe.composed, repeat=2):
            system = System(self.bench.model, dict(zip(knobs.values(), strengths, strict=True)))
            found = {n: self._sampled(system, n, "validation", self.sizes.validation, seed) for n in knobs}
            rails = self._rails(system, "validation")
            table.append(
                Tried(
                    dict(zip(knobs, strengths, strict=True)),
                    {n: np.array(values[0]) for n, values in found.items()},
                    {n: np.array(values) for n, values in rails.items()},
                    kl=self.bench.kl(system, "validation"),
                    excess={name: lost - self.recipe.budget for name, lost in self._lost(rails).items()},
                )
            )
        chosen = choose_setting(table, Goal(weights=dict.fromkeys(knobs, 1.0), rule="worst"), mildest=False)
        setting = {knobs[name]: strength for name, strength in chosen.setting.items()}
        return {"chosen": dict(chosen.setting), "validation": chosen.scores, **self._measure(setting, seed)}

    def equal(self, name: str, rates: Rates) -> Record:
        """Compare the weight knob with the steering knob at equal KL: strengths by validation, scores by test items."""
        weights, file = self.systems.load(name, rates, 0), self.systems.file(f"steer {name}", 0, 0)
        ways: dict[str, tuple[AnyKnob, Sequence[float]]] = {"weights": (weights, self.recipe.strengths)}
        if file.exists():
            steering = Knob.load(file)
            ways["activations"] = (steering, [alpha / steering.gain for alpha in self.recipe.alphas])
        found: Record = {}
        for way, (knob, strengths) in ways.items():
            tried: list[tuple[float, float, float]] = []
            for strength in strengths:
                told = self.validate({knob: strength}, [name], 0)
                tried.append((strength, told["kl"], told["score"]))
            found[way] = {"curve": tried, "at": {}}
            for limit in self.recipe.kls:
                fits = [one for one in tried if one[1] <= limit]
                strength = max(fits, key=lambda one: (one[2], -one[1]))[0] if fits else 0.0
                system = System(self.bench.model, {knob: strength})
                found[way]["at"][f"{limit:g}"] = {
                    "strength": strength,
                    "kl": self.bench.kl(system),
                    "scores": self._sampled(system, name, "test", self.sizes.sampled, 0)[0],
                }
        return found
