"""What a worker of the Alignment Vectors reproduction holds, and how the level of a model is read off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimtab.artifact import DeltaKnob
from trimtab.compose import Tried
from trimtab.evals.likelihood import Text, log_likelihoods, render_texts
from trimtab.evals.tasks import run_task
from trimtab.generate import generate
from trimtab.prefworld import world
from trimtab.render import load
from trimtab.reproduce.alignment_recipe import LEVELS, LevelData, Question, Recipe, Sizes
from trimtab.reproduce.data import Split
from trimtab.types import Message
from trimtab.weights.delta import random_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Likeliest = dict[str, list[int]]
"""By domain the likeliest level of every question, counted as in `LEVELS`; -1 where a broken model has none."""


class LevelBench:
    """One model with the recipe's questions; rendered texts are kept, since many settings are measured on them."""

    def __init__(self, name: str, recipe: Recipe, sizes: Sizes, root: Path, out: Path) -> None:
        loaded = load(name, dtype=recipe.dtype)
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.recipe, self.sizes, self.data, self.out = recipe, sizes, LevelData(root, recipe.data_seed), out
        self._vectors: dict[tuple[str, str], DeltaKnob] = {}
        self._texts: dict[tuple[str, Split, tuple[Message, ...]], list[Text]] = {}

    def questions(self, domain: str, split: Split) -> list[Question]:
        """Draw the questions that choose, or test."""
        n = self.sizes.validation if split == "validation" else self.sizes.test
        return self.data.questions(self.recipe.domains[domain], split, n)

    def likeliest(
        self, split: Split, domains: Sequence[str] | None = None, before: tuple[Message, ...] = ()
    ) -> Likeliest:
        """Return which level's answer has the highest mean log-probability per token, of the model as it is now.

        Tokens that close the answer count. `before` are turns that stand before every question.
        """
        return {domain: self._likeliest(domain, split, before) for domain in domains or self.recipe.domains}

    def _likeliest(self, domain: str, split: Split, before: tuple[Message, ...]) -> list[int]:
        key = (domain, split, before)
        if key not in self._texts:
            drawn = self.questions(domain, split)
            prompts = [(*before, Message("user", q.prompt)) for q in drawn for _ in LEVELS]
            self._texts[key] = render_texts(self.tokenizer, prompts, [a for q in drawn for a in q.answers])
        texts = self._texts[key]
        lengths = np.array([len(text.ids) - text.start for text in texts])
        found = log_likelihoods(self.model, self.tokenizer, [(text, {}) for text in texts]) / lengths
        rows = np.nan_to_num(found, nan=-np.inf).reshape(-1, len(LEVELS))  # [n, levels]
        return [int(row.argmax()) if np.isfinite(row).any() else -1 for row in rows]

    def generated(self, domain: str, n: int, *, before: tuple[Message, ...] = (), seed: int = 0) -> list[int]:
        """Return the level of sampled answers (temperature 1) to test questions; empty where nothing grades them.

        PrefWorld's answers are texts of known languages, so that the grade is exact; -1 is an answer at no level.
        """
        drawn = self.questions(domain, "test")[:n]
        items = [q.item for q in drawn if q.item is not None]
        if not items:
            return []
        prompts = [(*before, Message("user", item.prompt)) for item in items]
        made = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.sizes.max_new_tokens,
            temperature=1.0,
            seed=seed,
            batch_size=self.sizes.batch_size,
            strict=None,
        )
        sides = [world.side_of(item, g.text) for item, g in zip(items, made, strict=True)]
        return [LEVELS.index(side) if side in LEVELS else -1 for side in sides]

    def rails(self, split: Split = "test") -> dict[str, list[float]]:
        """Return the scores of every guardrail's questions, greedy."""
        tasks = [self.data.task(source, split, self.sizes.guard) for source in self.recipe.guardrails]
        size = self.sizes.batch_size
        return {t.name: run_task(self.model, self.tokenizer, t, batch_size=size).scores.tolist() for t in tasks}

    def vector(self, domain: str, kind: str) -> DeltaKnob:
        """Return the vector that an earlier step learned, multiplied out: it is put into the weights many times.

        "random" has random entries, as long as the plain vector in every weight.
        """
        if (domain, kind) not in self._vectors:
            if kind == "random":
                self._vectors[domain, kind] = random_like(self.vector(domain, "plain"), seed=len(self._vectors))
            else:
                self._vectors[domain, kind] = DeltaKnob.load(self.knob_file("vector", kind, domain)).dense_copy()
        return self._vectors[domain, kind]

    def turned(self, way: str, setting: Mapping[str, float]) -> dict[DeltaKnob, float]:
        """Return the vectors that bring domains to their strengths, in one of the ways of `VECTORS`."""
        below = "anchored-avoidance" if way == "anchored" else way
        return {
            self.vector(d, below if strength < 0 else way): abs(strength) if below != way else strength
            for d, strength in setting.items()
        }

    def knob_file(self, *words: str) -> Path:
        """Return where a step keeps its knob."""
        return self.out / "knobs" / f"{'-'.join(words)}.knob.safetensors"


def share(levels: Sequence[int], level: str) -> float:
    """Return the share of questions at a level.

    >>> share([0, 2, 2, -1], "expert")
    0.5
    """
    return float(np.mean([found == LEVELS.index(level) for found in levels]))


def tried(setting: Mapping[str, float], likeliest: Likeliest, excess: Mapping[str, float] | None = None) -> Tried:
    """Return a measured setting as composing takes it: a preference per domain and level, 0 or 1 per question."""
    items = {
        name_of(domain, level): (np.array(levels) == number).astype(float)
        for domain, levels in likeliest.items()
        for number, level in enumerate(LEVELS)
    }
    return Tried(setting, items, excess=excess or {})


def name_of(domain: str, level: str) -> str:
    """Name the preference for a domain's level."""
    return f"{domain}: {level}"
