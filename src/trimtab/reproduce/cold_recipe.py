"""What the COLD-Steer reproduction runs: behaviours, tasks, groups, systems, doses, sizes and thresholds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trimtab.errors import OptionError, unknown_name
from trimtab.reproduce.recipe import BenchRecipe, BenchSizes, Domain
from trimtab.reproduce.toml import check_counts, read_recipe

SYSTEMS: dict[str, str] = {
    "examples": "in-context examples",
    "diffmean": "DiffMean (CAA)",
    "diffmean-piecewise": "DiffMean, piecewise",
    "diffmean-projection": "DiffMean, projection",
    "pca": "PCA",
    "icv": "ICV",
    "bipo": "BiPO, stopped by validation",
    "bipo-released": "BiPO, two epochs at 1e-3",
    "few-step-lora": "few-step LoRA (DPO)",
    "one-step": "one step, rank 16",
    "cold-kernel": "COLD-Kernel, unit",
    "cold-kernel-softmax": "COLD-Kernel, softmax",
    "cold-kernel-released": "COLD-Kernel, rejected side only",
    "cold-fd": "COLD-FD",
    "random": "random direction",
}
"""Systems by name, with their titles. "cold-kernel-released" holds what the released code's pair loss leaves."""
BASELINES = ("diffmean", "bipo", "few-step-lora")
"""What the headline compares with, the best of them on validation: learned from every number of pairs."""
CURVES = ("diffmean", "bipo", "few-step-lora", "one-step", "cold-kernel", "cold-fd")
"""Systems that are learned from every number of pairs."""
WRITING = ("examples", "diffmean", "bipo", "few-step-lora", "one-step", "cold-kernel", "cold-fd", "random")
"""Systems whose answers are generated."""
POLLS = ("diffmean", "one-step", "cold-kernel", "cold-kernel-softmax", "cold-fd", "random")
"""Systems that are turned to the opinions of a group."""


@dataclass(frozen=True)
class Sizes(BenchSizes):
    """How many items everything uses."""

    pairs: int = 50
    seeds: int = 3
    validation: int = 40
    """Questions of a behaviour that choose, each asked with its options both ways round; `test` of them test."""
    counts: tuple[int, ...] = (5, 10, 20, 50, 100, 250, 500, 1000)
    curves: int = 2
    """Behaviours, the first of the recipe, that are learned from every number of pairs."""
    written_validation: int = 24
    written: int = 80
    """Prompts whose answers are generated, to choose and to test."""
    polls: int = 48
    """Survey questions that are learned from, as many that choose, and twice as many that test."""
    layers: int = 4
    """Candidate layers, evenly spaced below `last`."""


@dataclass(frozen=True)
class Thresholds:
    """From where on a claim holds; settled before the run."""

    gain: float = 0.02
    """Something gains where the lower end of the interval lies above this share of probability, or of items."""
    loss: float = 0.02
    """A control gains nothing where the interval stays below this."""
    share: float = 0.95
    """Few examples do where the lower end of the share of the best baseline's effect lies above this."""
    divergence: float = 0.0
    """Opinions come closer to a group's where the lower end of the fall of KL, in nats, lies above this."""


@dataclass(frozen=True)
class Recipe(BenchRecipe):
    """A whole reproduction; without `writing` or `groups` these parts are left out."""

    behaviours: dict[str, str] = field(default_factory=dict[str, str])
    """`prefworld:FAMILY`, or `caa:FOLDER` with CAA's training file, whose test file lies in the folder's twin."""
    writing: dict[str, Domain] = field(default_factory=dict[str, Domain])
    groups: str = ""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    last: float = 0.8
    """Candidate layers end at this fraction of the depth."""
    alphas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    """Doses of what moves the stream, in multiples of the mean residual norm; the middle one ranks the layers."""
    steps: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0)
    """Doses of weights, in multiples of a difference."""
    removals: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.5, 1.0)
    """Shares of the component along a direction that a projection takes away; less than 0 adds to it."""
    shots: tuple[int, ...] = (1, 2, 4, 8)
    kl_budget: float = 0.5
    """The largest KL to the base model, in nats per token of its answers to guardrails, that a choice may have."""
    sizes: Sizes = field(default_factory=Sizes)
    quick: Sizes = field(default_factory=Sizes)
    thresholds: Thresholds = field(default_factory=Thresholds)


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe of COLD-Steer: the name of one that comes along, or a TOML file; raises `OptionError`."""
    recipe, place = read_recipe(Recipe, name), str(name)
    if not (recipe.models and recipe.behaviours and recipe.systems):
        raise OptionError(f"{place}: a recipe needs models, behaviours and systems.")
    for system in recipe.systems:
        if system not in SYSTEMS:
            raise unknown_name(f"system of {place}", system, SYSTEMS)
    for source in recipe.behaviours.values():
        if source.partition(":")[0] not in ("prefworld", "caa"):
            raise OptionError(f"{place}: a behaviour is prefworld:FAMILY or caa:FOLDER; got {source!r}.")
    if recipe.groups not in ("", "prefworld:opinions"):
        raise OptionError(f"{place}: groups are prefworld:opinions, or left out; got {recipe.groups!r}.")
    limits = [(f"thresholds.{key}", value) for key, value in asdict(recipe.thresholds).items()]
    for key, value in (*limits, ("kl_budget", recipe.kl_budget)):
        if not 0 <= value < math.inf:
            raise OptionError(f"{place}: {key} is finite and not negative; got {value:g}.")
    if not 0 < recipe.last <= 1:
        raise OptionError(f"{place}: last is a share of the layers, above 0 and at most 1; got {recipe.last:g}.")
    positive: dict[str, tuple[float, ...]] = {"alphas": recipe.alphas, "steps": recipe.steps, "shots": recipe.shots}
    for key, values in positive.items():
        if not values or min(values) <= 0 or list(values) != sorted(values):
            raise OptionError(f"{place}: {key} are positive and rise, and there is at least one; got {list(values)}.")
    for sizes in (recipe.sizes, recipe.quick):
        check_counts(sizes, place)
    return recipe
