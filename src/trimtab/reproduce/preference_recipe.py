"""What a reproduction of Preference Vectors runs: preferences, strengths, training, sizes and thresholds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from trimtab.errors import OptionError
from trimtab.reproduce.recipe import BenchRecipe, BenchSizes, Domain
from trimtab.reproduce.toml import check_counts, read_recipe


@dataclasses.dataclass(frozen=True)
class Training:
    """How everything is trained; rates are chosen on validation, anew for each system."""

    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    beta: float = 0.1
    lora_rank: int = 0
    """Of the adapters; 0 trains all weights."""
    patience: int = 2
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Rewards:
    """How the Reward Soup's models are trained: on the graders of the first two preferences."""

    method: Literal["rloo", "grpo"] = "rloo"
    learning_rates: tuple[float, ...] = (3e-5, 1e-4)
    steps: int = 40
    prompts: int = 200
    held: int = 60
    answers: int = 4
    kl: float = 0.05


@dataclasses.dataclass(frozen=True)
class Sizes(BenchSizes):
    """How many items everything uses."""

    seeds: int = 2
    """Draws of pairs; rates are chosen with the first."""
    reward_steps: int = 1_000
    """At most as many as `Rewards.steps`."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """From where on a claim holds; settled before the run."""

    gain: float = 0.02
    loss: float = 0.02
    seconds: float = 10.0
    """Adding a preference takes less."""
    kl: float = 0.03
    """The limit, one of the recipe's, at which weight knobs and steering knobs are compared."""


@dataclasses.dataclass(frozen=True)
class Recipe(BenchRecipe):
    """A whole reproduction: the first two preferences are traded off, the others are added later."""

    preferences: dict[str, Domain] = dataclasses.field(default_factory=dict[str, Domain])
    grid: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
    composed: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    """Strengths of each of the two, of which validation chooses."""
    strengths: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Of weight knobs beside steering knobs, in multiples of what was learned."""
    alphas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    """Of steering knobs beside weight knobs, in multiples of the mean residual norm."""
    kls: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Side effects at which the two are compared, in nats per token on guardrails."""
    training: Training = dataclasses.field(default_factory=Training)
    rewards: Rewards = dataclasses.field(default_factory=Rewards)
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    quick: Sizes = dataclasses.field(default_factory=Sizes)
    """What `--quick` uses instead; what a file leaves out is as in `sizes`."""
    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)

    @property
    def two(self) -> tuple[str, str]:
        """The preferences that are traded off."""
        first, second, *_ = self.preferences
        return first, second


RESERVED = {"base", "random", "flipped", "positive-only", "norm-matched", "joint-dpo", "dpo-safe-first", "bfpo", "both"}


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe of Preference Vectors: one that comes with the package, or a TOML file; raises `OptionError`."""
    recipe, place = read_recipe(Recipe, name), str(name)
    if not recipe.models or len(recipe.preferences) < 2:
        raise OptionError(f"{place}: a recipe needs models, and two preferences at least.")
    for name in recipe.preferences:
        if name in RESERVED or name.startswith("reward-") or name.endswith((" plus", " flipped")):
            raise OptionError(f"{place}: a preference cannot be called {name!r}, which is a baseline's name.")
    if not recipe.guardrails:
        raise OptionError(f"{place}: side effects are measured on guardrails; name one at least.")
    for sizes in (recipe.sizes, recipe.quick):
        check_counts(sizes, place)
    limits = {f"thresholds.{name}": value for name, value in dataclasses.asdict(recipe.thresholds).items()}
    for what, value in {**limits, "budget": recipe.budget}.items():
        if not 0 <= value < math.inf:
            raise OptionError(f"{place}: {what} is finite and not negative; got {value:g}.")
    if recipe.thresholds.kl not in recipe.kls:
        raise OptionError(f"{place}: thresholds.kl is one of kls, {list(recipe.kls)}; got {recipe.thresholds.kl:g}.")
    positive = {
        "training.learning_rates": recipe.training.learning_rates,
        "training.beta": (recipe.training.beta,),
        "rewards.learning_rates": recipe.rewards.learning_rates,
        "kls": recipe.kls,
        "alphas": recipe.alphas,
        "strengths": recipe.strengths,
    }
    for what, values in positive.items():
        if not values or not all(0 < value < math.inf for value in values):
            raise OptionError(f"{place}: {what} are positive numbers, at least one; got {list(values)}.")
    for what, values, needed in (
        ("grid", recipe.grid, (-1.0, 0.0, 1.0)),
        ("scales", recipe.scales, (0.0, 1.0)),
        ("composed", recipe.composed, (0.0,)),
    ):
        if list(values) != sorted(set(values)) or not set(needed) <= set(values):
            raise OptionError(f"{place}: {what} rises, and has {list(needed)} in it; got {list(values)}.")
    return recipe
