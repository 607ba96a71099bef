"""The systems that Preference Vectors are compared among, as knobs: made of what was trained, and kept in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.artifact import DeltaKnob
from trimtab.errors import TrainError
from trimtab.reproduce.preference_recipe import Recipe
from trimtab.train import Loss
from trimtab.train.soup import soup
from trimtab.weights.delta import random_like
from trimtab.weights.merge import cosine_matrix, sign_conflict, singular_task_interference

LOSSES: Mapping[str, Loss] = {"joint-dpo": "dpo", "dpo-safe-first": "dpo", "bfpo": "bfpo"}
"""Baselines that are one training on both preferences, and their losses."""
VECTOR = "preference-vector"
"""The system of the first two vectors, each at strength 1."""


Rates = Mapping[str, float | None]
"""The learning rate that validation chose for what goes by a name; None where nothing could be trained."""


def trained_names(recipe: Recipe) -> list[str]:
    """Return what is trained: a vector for each preference, joint baselines, and one model for each of two rewards."""
    return [*recipe.preferences, *LOSSES, *(f"reward-{name}" for name in recipe.two)]


def plus_names(recipe: Recipe) -> list[str]:
    """Return the positive halves of the first two vectors, whose rates are chosen for themselves."""
    return [f"{name} plus" for name in recipe.two]


def flipped_names(recipe: Recipe) -> list[str]:
    """Return the controls: vectors of the first two preferences from pairs of which exactly half are turned round."""
    return [f"{name} flipped" for name in recipe.two]


def systems(recipe: Recipe) -> list[str]:
    """Return what is tested in full: the model as it is, the vectors in every combination wanted, and the baselines."""
    more = list(recipe.preferences)[2:]
    added = [f"{VECTOR} +{name}" for name in more] + ([f"{VECTOR} +all"] if len(more) > 1 else [])
    alone = [f"only {name}" for name in recipe.preferences]
    baselines = ["positive-only", "norm-matched", "random", "flipped", *LOSSES, "dpo-soup", "reward-soup"]
    return ["base", VECTOR, *added, *alone, *baselines]


class Systems:
    """Finds and combines what was trained, by name, rate and seed."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder

    def setting(self, name: str, rates: Rates, seed: int) -> dict[DeltaKnob, float] | None:
        """Return the knobs of a system, with their strengths; None where what it needs could not be trained."""
        two = self.recipe.two
        if name == "base":
            return {}
        if name == VECTOR or name.startswith((f"{VECTOR} +", "only ")):
            wanted = [*two]
            if name.startswith("only "):
                wanted = [name.removeprefix("only ")]
            elif name != VECTOR:
                more = name.removeprefix(f"{VECTOR} +")
                wanted += [n for n in self.recipe.preferences if n not in two and more in (n, "all")]
            return {self.load(n, rates, seed): 1.0 for n in wanted}
        if name in LOSSES:
            knob = self.find(name, rates, seed)
            return None if knob is None else {knob: 1.0}
        if name == "reward-soup":
            made = [knob for n in two if (knob := self.find(f"reward-{n}", rates, seed)) is not None]
            return {soup(made, name=name): 1.0} if len(made) == len(two) else None
        if name == "flipped":
            flipped = [knob for n in flipped_names(self.recipe) if (knob := self.find(n, rates, seed)) is not None]
            return dict.fromkeys(flipped, 1.0) if len(flipped) == len(two) else None
        only = [self.load(n, rates, seed) for n in plus_names(self.recipe)]
        if name == "dpo-soup":
            return {soup(only, name=name): 1.0}
        if name == "positive-only":
            return dict.fromkeys(only, 1.0)
        vectors = [self.load(n, rates, seed) for n in two]
        if name == "norm-matched":
            return {o: v.norm() / o.norm() for o, v in zip(only, vectors, strict=True)}
        assert name == "random", name
        return {random_like(vectors[0] + vectors[1], seed=seed): 1.0}

    def file(self, name: str, rate: float, seed: int) -> Path:
        """Return where what was trained under a name at a rate is kept."""
        return self.folder / f"{name.replace(' ', '-').replace('/', '-')}-{rate:g}-{seed}.knob.safetensors"

    def find(self, name: str, rates: Rates, seed: int) -> DeltaKnob | None:
        """Read what was trained at the rate that was chosen for it; None where nothing was."""
        rate = rates[name]
        if rate is None or not (file := self.file(name, rate, seed)).exists():
            return None
        return DeltaKnob.load(file)

    def load(self, name: str, rates: Rates, seed: int) -> DeltaKnob:
        """Read what was trained; raises `TrainError` where nothing was."""
        knob = self.find(name, rates, seed)
        if knob is None:
            raise TrainError(f"{name} could not be trained with the pairs of seed {seed}.")
        return knob

    def geometry(self, rates: Rates) -> dict[str, Any]:
        """Return how the vectors lie to each other: cosines over all weights, sign conflicts, task interference."""
        names = list(self.recipe.preferences)
        knobs = [self.load(name, rates, 0) for name in names]
        labels = sorted(set.intersection(*(set(knob.parts) for knob in knobs)))
        deltas = [[knob.dense(label) for label in labels] for knob in knobs]
        flat = [torch.cat([delta.flatten() for delta in own]) for own in deltas]
        matrices = [i for i, delta in enumerate(deltas[0]) if delta.dim() == 2]
        interference = [singular_task_interference([own[i] for own in deltas[:2]]) for i in matrices]
        return {
            "names": names,
            "cosines": cosine_matrix(deltas).tolist(),
            "sign_conflicts": [[sign_conflict(a, b) for b in flat] for a in flat],
            "interference": float(np.mean([one.raw for one in interference])),
            "interference_normed": float(np.mean([one.normed for one in interference])),
            "norms": {name: knob.norm() for name, knob in zip(names, knobs, strict=True)},
        }
