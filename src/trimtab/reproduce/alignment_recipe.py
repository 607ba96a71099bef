"""What a reproduction of Alignment Vectors runs, read from a TOML file, and the questions that it draws."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from trimtab.errors import OptionError, unknown_name
from trimtab.evals.tasks import AnyTask
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.prefworld.items import Item, Split
from trimtab.reproduce.data import WORLD, Data
from trimtab.reproduce.data import Split as HeldOut
from trimtab.reproduce.toml import check_counts, read_recipe
from trimtab.types import Message, Pair

LEVELS = ("avoidance", "generic", "expert")
"""In the order in which lambda should bring them; records count them from 0, and -1 is none of them."""
BETTER = (("expert", "generic"), ("expert", "avoidance"), ("generic", "avoidance"))
"""Chosen and rejected level of the pairs that a vector is learned from."""
VECTORS = {"plain": ("plain",), "anchored": ("anchored", "anchored-avoidance"), "random": ("plain",)}
"""What a domain is turned by, in each way, and what that takes. Plain: one vector, learned from the domain's own pairs,
as in the paper. Anchored: one towards experts above 0 and one towards avoidance below, both with anchors in the other
domains. Random: a control, random entries as long as the plain vector."""
UNSEEN_SHARE = 5
"""A file's questions: one in this many tests, one chooses, and the rest are learned from."""


@dataclass(frozen=True)
class Sizes:
    """How many items everything uses."""

    pairs: int = 100
    """Questions of a domain that are learned from; each gives three pairs."""
    anchors: int = 75
    """Questions of each other domain that hold an anchored vector, a pair of levels of each."""
    validation_pairs: int = 24
    """Questions whose pairs stop a training."""
    validation: int = 40
    test: int = 150
    sampled: int = 60
    """Test questions that are answered at every lambda, at temperature 1."""
    guard: int = 100
    epochs: int = 10
    joint: int = 4
    """Combinations that a joint DPO is trained for, the recipe's first."""
    lambda_every: int = 1
    """Of the recipe's lambdas every so many-th is measured; 0 is always among them."""
    grid_every: int = 1
    control_every: int = 2
    """As `grid_every`, of the plain grid, for random vectors."""
    checked: int = 4
    """Settings whose guardrails are measured on validation questions: so many of the best for each combination."""
    answers: int = 12
    """Answers that are timed, one at a time, in each round."""
    rounds: int = 5
    max_new_tokens: int = 64
    batch_size: int = 64


@dataclass(frozen=True)
class Thresholds:
    """From where on a claim holds; settled before the run."""

    reached: float = 22.0
    """The paper's combinations of 27."""
    goal: float = 26.5
    """All 27."""
    faster: float = 12.0
    much_faster: float = 100.0
    cheaper: float = 2.0
    loss: float = 0.02
    """A guardrail is kept where the interval stays within this share of items."""
    spread: float = 0.02
    """A vector raises another domain where the interval lies above this share of questions."""
    most: float = 0.5
    """Expert answers prevail where the interval lies above this share of questions."""
    matched: float = 0.05
    """The vector is as accurate as a prompt where it brings the level on less than this share of questions fewer."""
    transferred: float = 0.1
    """A vector transfers where it brings at most this share of questions less than the stage's own."""


@dataclass(frozen=True)
class Recipe:
    """A whole reproduction; domains are in the order of alpha, beta and gamma."""

    title: str
    models: tuple[str, ...]
    domains: dict[str, str]
    """`prefworld:FAMILY`, or a JSON lines file of `prompt`, `avoidance`, `generic` and `expert`."""
    instructions: dict[str, dict[str, tuple[str, ...]]]
    """By domain and level, sentences that ask for it; validation questions choose one."""
    learning_rates: tuple[float, ...]
    lambdas: tuple[float, ...]
    grids: dict[str, tuple[float, ...]]
    """By way of turning, strengths of each domain, all combinations of which are measured."""
    joint: tuple[str, ...] = ()
    """Combinations, a level for each domain in their order, that joint DPO is trained for."""
    sibling: tuple[str, ...] = ()
    """Families of PrefWorld, or files of pairs, whose chosen answers make the other fine-tuning stage by SFT."""
    sibling_rate: float = 3e-4
    shots: tuple[int, ...] = (0, 1, 2, 4, 6, 8)
    """Answered questions that follow the instruction where prompting is timed."""
    guardrails: tuple[str, ...] = ()
    budget: float = 0.02
    """The share of items that a guardrail may lose where strengths are chosen."""
    dtype: str = "auto"
    lora_rank: int = 16
    beta: float = 0.1
    """Of DPO."""
    data_seed: int = 0
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    quick: Sizes = dataclasses.field(default_factory=Sizes)
    """What `--quick` uses instead; what a file leaves out is as in `sizes`."""
    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)

    @property
    def ways(self) -> tuple[str, ...]:
        """Ways to turn a domain, the control apart: a single one has no other to be anchored in."""
        return ("plain", "anchored") if len(self.domains) > 1 else ("plain",)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Kinds of vectors that are learned for every domain."""
        return tuple(kind for way in self.ways for kind in VECTORS[way])


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe: the name of one that comes with the package, or a TOML file; raises `OptionError`."""
    recipe, place = read_recipe(Recipe, name), str(name)
    if not (recipe.models and recipe.domains):
        raise OptionError(f"{place}: a recipe needs a model and domains.")
    for domain in recipe.domains:
        asked = recipe.instructions.get(domain, {})
        if sorted(asked) != sorted(LEVELS) or not all(asked.values()):
            raise OptionError(f"{place}: instructions.{domain} needs sentences for each of {', '.join(LEVELS)}.")
    for combination in recipe.joint:
        levels = combination.split()
        if len(levels) != len(recipe.domains):
            raise OptionError(f"{place}: joint names a level for each domain; got {combination!r}.")
        for level in levels:
            if level not in LEVELS:
                raise unknown_name(f"level of {place}: joint", level, LEVELS)
    rates = {"learning_rates": recipe.learning_rates, "sibling_rate": (recipe.sibling_rate,), "beta": (recipe.beta,)}
    for key, values in rates.items():
        if not values or not all(0 < value < math.inf for value in values):
            raise OptionError(f"{place}: {key} must be positive; got {list(values)}.")
    for way in recipe.ways:
        if way not in recipe.grids:
            raise OptionError(f"{place}: grids needs the strengths of {way} vectors.")
    for key, values in {"lambdas": recipe.lambdas, **{f"grids.{w}": v for w, v in recipe.grids.items()}}.items():
        if 0.0 not in values or list(values) != sorted(set(values)):
            raise OptionError(f"{place}: {key} rise and hold 0, the model as it is; got {list(values)}.")
    limits = {f"thresholds.{name}": value for name, value in dataclasses.asdict(recipe.thresholds).items()}
    for key, value in {**limits, "budget": recipe.budget}.items():
        if not 0 <= value < math.inf:
            raise OptionError(f"{place}: {key} is finite and not negative; got {value:g}.")
    if recipe.lora_rank < 1:
        raise OptionError(f"{place}: lora_rank counts from 1: vectors are adapters; got {recipe.lora_rank}.")
    if not recipe.shots or min(recipe.shots) < 0:
        raise OptionError(f"{place}: shots count from 0; got {list(recipe.shots)}.")
    for sizes in (recipe.sizes, recipe.quick):
        check_counts(sizes, place)
    return recipe


def thinned(values: Sequence[float], every: int) -> list[float]:
    """Return every so many-th value, counted from 0 in both directions, and both ends."""
    at = list(values).index(0.0)
    return [v for i, v in enumerate(values) if (i - at) % every == 0 or i in (0, len(values) - 1)]


class Question(NamedTuple):
    """A question with its reference answers in the order of `LEVELS`; `item` where PrefWorld grades answers."""

    prompt: str
    answers: tuple[str, ...]
    item: Item | None = None


class LevelData:
    """Draws what a recipe names; no question is in two splits."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._seed, self._data = root, seed, Data(root, seed)

    def questions(self, source: str, split: Split, n: int) -> list[Question]:
        """Draw at most `n` questions of a domain."""
        if source.startswith(WORLD):
            drawn = world.items(source.removeprefix(WORLD), split, n, seed=self._seed)
            return [Question(item.prompt, tuple(item.answers[level] for level in LEVELS), item) for item in drawn]
        found = _read(self._root / source)
        Random(self._seed).shuffle(found)
        share = len(found) // UNSEEN_SHARE
        parts = {"test": found[:share], "validation": found[share : 2 * share], "train": found[2 * share :]}
        if not share:
            raise OptionError(f"{source!r} needs {UNSEEN_SHARE} questions or more; got {len(found)}.")
        return parts[split][:n]

    def pairs(self, source: str, split: Split, n: int, better: Sequence[tuple[str, str]] = BETTER) -> Pairs:
        """Draw the pairs of `n` questions: one for each of `better`, chosen level before rejected."""
        drawn = self.questions(source, split, n)
        return Pairs(
            Pair((Message("user", q.prompt),), q.answers[LEVELS.index(a)], q.answers[LEVELS.index(b)], {})
            for a, b in better
            for q in drawn
        )

    def anchors(self, sources: Sequence[str], n: int) -> Pairs:
        """Draw a pair of levels from each of `n` training questions."""
        random, made = Random(self._seed), list[Pair]()
        for source in sources:
            for question in self.questions(source, "train", n):
                one, other = random.sample(question.answers, 2)
                prompt = (Message("user", question.prompt),)
                made.append(Pair(prompt, one, other, {}))
        return Pairs(made)

    def task(self, source: str, split: HeldOut, n: int) -> AnyTask:
        """Draw questions of a guardrail."""
        return self._data.questions(source, split, n)

    def sft_pairs(self, source: str, split: Split, n: int) -> Pairs:
        """Draw pairs whose chosen answers make another fine-tuning stage."""
        if split == "train":
            return self._data.training_pairs(source, n, seed=self._seed)
        return self._data.held_out_pairs(source, "validation", n)


def better_than_others(level: str) -> list[tuple[str, str]]:
    """Return the pairs of levels that ask for one: it before each other.

    >>> better_than_others("generic")
    [('generic', 'avoidance'), ('generic', 'expert')]
    """
    return [(level, other) for other in LEVELS if other != level]


def _read(file: Path) -> list[Question]:
    if not file.is_file():
        raise OptionError(f"There is no file {str(file)!r} with questions. Name its folder by --data.")
    found: dict[str, Question] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
            texts = [record[key] for key in ("prompt", *LEVELS)]
        except (ValueError, KeyError, TypeError):
            texts = []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise OptionError(f"{file}: line {number} needs texts for prompt, {', '.join(LEVELS)}.")
        found.setdefault(texts[0], Question(texts[0], tuple(texts[1:])))
    return list(found.values())
