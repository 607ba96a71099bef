"""What a reproduction runs: data, methods, grids, sizes and the thresholds of its claims, read from a TOML file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import OptionError, unknown_name
from trimtab.methods import METHODS
from trimtab.reproduce.toml import check_counts, read_recipe
from trimtab.types import Where


@dataclasses.dataclass(frozen=True)
class Domain:
    """One preference: where its pairs come from, and the task that shows whether it took hold."""

    pairs: str
    """`prefworld:FAMILY`, or a file of pairs, which is split by prompt into training, validation and test."""
    task: str
    """`prefworld:FAMILY` or `BENCHMARK:FILE`; validation and test questions are drawn apart."""


@dataclasses.dataclass(frozen=True)
class Steering:
    """One way to steer: how the vector is learned, and what validation chooses."""

    title: str
    method: str = "palrs"
    positions: tuple[str, ...] = ()
    """Empty: what the method's paper reads."""
    selection: Literal["validation", "eq3_cosine", "max_relative_norm", "probe_auc"] = "validation"
    """`validation`, or a rule of `trimtab.learn` that fixes the site before tuning."""
    where: tuple[Where, ...] = ("prompt",)
    length_match: Literal["off", "bucket", "regress"] = "off"
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    control: bool = False
    """A control must not gain."""
    shuffled: bool = False
    """Half of the pairs are turned round before learning."""


@dataclasses.dataclass(frozen=True)
class Training:
    """One way to train, on the same pairs."""

    title: str
    loss: Literal["dpo", "simpo", "sft"]
    learning_rates: tuple[float, ...]
    betas: tuple[float, ...]
    """Empty for SFT, which has none."""
    patience: int = 2
    batch_size: int = 16
    lora_rank: int = 0
    """Of the adapter; 0 trains all weights."""


@dataclasses.dataclass(frozen=True)
class BenchSizes:
    """How many items a bench draws, for any paper."""

    pairs: int = 100
    validation: int = 40
    validation_pairs: int = 24
    guard: int = 75
    test: int = 300
    test_guard: int = 150
    test_pairs: int = 100
    sampled: int = 200
    epochs: int = 10
    max_new_tokens: int = 100_000
    """Answers are cut there, or where their task cuts them if that is earlier."""
    batch_size: int = 128


@dataclasses.dataclass(frozen=True)
class BenchRecipe:
    """What a bench takes from the recipe of any paper."""

    title: str
    models: tuple[str, ...]
    guardrails: tuple[str, ...] = ()
    dtype: str = "auto"
    budget: float = 0.02
    """The share of items that a guardrail may lose where settings are chosen."""
    data_seed: int = 0
    """Of the questions that choose and test; the seeds of the pairs count up from 0."""


@dataclasses.dataclass(frozen=True)
class Sizes(BenchSizes):
    """How many items everything uses."""

    many_pairs: int = 1000
    seeds: int = 5
    many_seeds: int = 2
    counts: tuple[int, ...] = (10, 25, 50, 400)
    count_seeds: int = 3
    map_items: int = 100
    rank_pairs: int = 8
    finalists: int = 3
    grid: int = 100
    """Settings of a training grid that are tried, of the mildest first."""
    many_grid: bool = True
    """Whether `many_pairs` get a grid of their own; they take what the grid of `pairs` chose where not."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """From where on a claim holds; settled before the run."""

    gain: float = 0.02
    """A method gains where the lower end of the interval lies above this share of items."""
    loss: float = 0.02
    """A guardrail is kept, and a control gains nothing, where the interval stays within this share of items."""
    enough: float = 0.05
    """More pairs bring nothing where the upper end lies below this share of items."""
    ratio: float = 3.0
    """A method is faster where the lower end of the ratio of seconds lies above this."""


@dataclasses.dataclass(frozen=True)
class Recipe(BenchRecipe):
    """A whole reproduction."""

    domains: dict[str, Domain] = dataclasses.field(default_factory=dict[str, Domain])
    steering: dict[str, Steering] = dataclasses.field(default_factory=dict[str, Steering])
    training: dict[str, Training] = dataclasses.field(default_factory=dict[str, Training])
    last: float = 0.8
    """Candidate layers end at this fraction of the depth."""
    gains: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    curve: tuple[float, ...] = (-0.4, -0.2, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)
    """Alphas of the dose curve, in multiples of the mean residual norm."""
    shots: tuple[int, ...] = (1, 2, 4)
    """How many pairs stand before the question as answered turns, one of them chosen on validation."""
    main: str = "palrs"
    """The way to steer that the claims speak of."""
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    others: Sizes = dataclasses.field(default_factory=Sizes)
    """What models after the first use; what a file leaves out is as in `sizes`."""
    quick: Sizes = dataclasses.field(default_factory=Sizes)
    """What `--quick` uses instead; what a file leaves out is as in `sizes`."""
    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe of PaLRS: the name of one that comes with the package, or a TOML file; raises `OptionError`."""
    recipe = read_recipe(Recipe, name, like_sizes=("others", "quick"))
    _check(recipe, str(name))
    return recipe


def _check(recipe: Recipe, place: str) -> None:
    """Raise for what would fail only after hours, or make a claim hold that should not."""
    if not (recipe.models and recipe.domains and recipe.steering):
        raise OptionError(f"{place}: a recipe needs models, domains and ways to steer.")
    if recipe.main not in recipe.steering:
        raise unknown_name(f"way to steer in {place}", recipe.main, recipe.steering)
    for way in recipe.steering.values():
        if way.method not in METHODS:
            raise unknown_name(f"method of {place}: {way.title}", way.method, METHODS)
    limits = [(f"thresholds.{name}", value) for name, value in dataclasses.asdict(recipe.thresholds).items()]
    for name, value in (*limits, ("budget", recipe.budget)):
        if not 0 <= value < math.inf:
            raise OptionError(f"{place}: {name} is finite and not negative; got {value:g}.")
    if not 0 < recipe.last <= 1:
        raise OptionError(f"{place}: last is a share of the layers, above 0 and at most 1; got {recipe.last:g}.")
    positive: dict[str, tuple[float, ...]] = {"gains": recipe.gains, "shots": recipe.shots}
    for name, way in recipe.training.items():
        positive[f"training.{name}: learning_rates"] = way.learning_rates
        if way.loss != "sft":
            positive[f"training.{name}: betas"] = way.betas
        elif way.betas:
            raise OptionError(f"{place}: training.{name}: SFT has no beta; got {list(way.betas)}.")
    for name, values in positive.items():
        if not values or not all(0 < value < math.inf for value in values):
            raise OptionError(f"{place}: {name} are positive numbers, at least one; got {list(values)}.")
    _check_sizes(recipe, place)


def _check_sizes(recipe: Recipe, place: str) -> None:
    for sizes in (recipe.sizes, recipe.others, recipe.quick):
        check_counts(sizes, place)
    for name in ("pairs", "many_pairs"):
        first, other = getattr(recipe.sizes, name), getattr(recipe.others, name)
        if first != other:
            raise OptionError(f"{place}: models are compared at the same {name}; got {first} and, for others, {other}.")
    if max(recipe.sizes.counts) not in recipe.others.counts:
        raise OptionError(
            f"{place}: others.counts needs the largest of counts, {max(recipe.sizes.counts)}; got "
            f"{list(recipe.others.counts)}."
        )
