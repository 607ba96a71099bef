"""The systems that Preference Vectors are compared among, as knobs: made of what was trained, and kept in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trimtab.artifact import DeltaKnob
from trimtab.artifact.parts import Part
from trimtab.reproduce.preference_recipe import Recipe
from trimtab.runtime import Dose
from trimtab.train import Loss
from trimtab.train.soup import soup

LOSSES: Mapping[str, Loss] = {"joint-dpo": "dpo", "dpo-safe-first": "dpo", "bfpo": "bfpo"}
"""Baselines that are one training on both preferences, and their losses."""
VECTOR = "preference-vector"
"""The system of the first two vectors, each at strength 1."""


def trained_names(recipe: Recipe) -> list[str]:
    """Return what is trained: a vector for each preference, joint baselines, and one model for each of two rewards."""
    return [*recipe.preferences, *LOSSES, *(f"reward-{name}" for name in recipe.two)]


def systems(recipe: Recipe) -> list[str]:
    """Return what is tested in full: the model as it is, the vectors in every combination wanted, and the baselines."""
    more = list(recipe.preferences)[2:]
    added = [f"{VECTOR} +{name}" for name in more] + ([f"{VECTOR} +all"] if len(more) > 1 else [])
    alone = [f"only {name}" for name in recipe.preferences]
    baselines = ["positive-only", "norm-matched", "random", *LOSSES, "dpo-soup", "reward-soup"]
    return ["base", VECTOR, *added, *alone, *baselines]


class Systems:
    """Finds and combines what was trained, by name, rate and seed."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder

    def setting(self, name: str, rates: Mapping[str, float], seed: int) -> Dose | None:
        """Return the knobs of a system; None where what it needs could not be trained."""
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
            return {self.load(n, rates[n], seed): 1.0 for n in wanted}
        if name in LOSSES:
            file = self.file(name, rates[name], seed)
            if name == "dpo-safe-first" and not file.exists():
                file = self.file("joint-dpo", rates["joint-dpo"], seed)  # the same pairs in the same order
            return {DeltaKnob.load(file): 1.0} if file.exists() else None
        if name == "reward-soup":
            files = [self.file(f"reward-{n}", rates[f"reward-{n}"], seed) for n in two]
            made = all(file.exists() for file in files)
            return {soup([DeltaKnob.load(file) for file in files], name=name): 1.0} if made else None
        only = [self.load(f"{n} plus", rates[n], seed) for n in two]
        if name == "dpo-soup":
            return {soup(only, name=name): 1.0}
        if name == "positive-only":
            return dict.fromkeys(only, 1.0)
        vectors = [self.load(n, rates[n], seed) for n in two]
        if name == "norm-matched":
            return {o: v.norm() / o.norm() for o, v in zip(only, vectors, strict=True)}
        assert name == "random", name
        return {_random_like(vectors[0] + vectors[1], seed): 1.0}

    def file(self, name: str, rate: float, seed: int) -> Path:
        """Return where what was trained under a name at a rate is kept."""
        return self.folder / f"{name.replace(' ', '-').replace('/', '-')}-{rate:g}-{seed}.knob.safetensors"

    def load(self, name: str, rate: float, seed: int) -> DeltaKnob:
        """Read what was trained."""
        return DeltaKnob.load(self.file(name, rate, seed))


def _random_like(knob: DeltaKnob, seed: int) -> DeltaKnob:
    """Return a difference of random entries whose norm is the knob's in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Part] = {}
    for name in knob.parts:
        like = knob.dense(name).float()
        noise = torch.randn(like.shape, generator=generator)
        drawn[name] = noise * (like.norm() / noise.norm())
    return DeltaKnob("random", "random", drawn)
