"""The records of a run as scores: by model, domain and system, with all seeds together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.reproduce.recipe import Recipe, Sizes
from trimtab.reproduce.steps import Key

Records = Mapping[Key, Any]
Matrix = np.ndarray

GREEDY = ("greedy", "scores")
RIGHT = ("preference", "right")


def grid_key(model: str, domain: str, name: str, count: int, sizes: Sizes) -> Key:
    """Return the key of the grid that chooses a training's settings: of many pairs, that of fewer may do."""
    return (model, "grid", domain, name, str(count if _own_grid(count, sizes) else sizes.pairs))


def _own_grid(count: int, sizes: Sizes) -> bool:
    return count != sizes.many_pairs or sizes.many_grid


class Evidence:
    """The records of a run, as scores `[S, N]` by model, domain and system."""

    def __init__(self, records: Records, recipe: Recipe, sizes: Mapping[str, Sizes], command: str) -> None:
        self.records = {key: records[key] for key in sorted(records, key=lambda key: (len(key), key[-1], key))}
        self.recipe, self.models, self.command = recipe, list(sizes), command
        self.sizes = sizes[self.models[0]]  # pairs are as many for every model
        self._sizes = sizes

    def found(self, model: str, kind: str, domain: str, *rest: object) -> list[Any]:
        """Return the records of all seeds of one system."""
        key = (model, kind, domain, *map(str, rest))
        return [record for at, record in self.records.items() if at[: len(key)] == key and len(at) <= len(key) + 1]

    def grid(self, model: str, domain: str, name: str, count: int) -> Any:
        """Return the record of the grid that chose the settings of a training."""
        return self.records[grid_key(model, domain, name, count, self._sizes[model])]

    def tuned_seconds(self, model: str, domain: str, name: str, count: int) -> list[float]:
        """Return the seconds of a training with all that chose its settings: its grid, which holds the chosen run.

        Where the grid was that of fewer pairs, the run comes on top of it.
        """
        search = self.grid(model, domain, name, count)["tune"]["seconds"]
        if _own_grid(count, self._sizes[model]):
            return [search]
        return [search + record["learn"]["seconds"] for record in self.found(model, "train", domain, name, count)]

    def scores(self, what: Sequence[str], model: str, kind: str, domain: str, *rest: object) -> Matrix:
        """Return the scores at a path of the tests, such as `("greedy", "scores")`, of all seeds: `[S, N]`."""
        return np.array([_at(record["test"], what) for record in self.found(model, kind, domain, *rest)], dtype=float)

    def main(self, model: str, domain: str, what: Sequence[str], n: int | None = None) -> Matrix:
        """Return the scores of the way to steer that the claims speak of."""
        return self.scores(what, model, "steer", domain, self.recipe.main, n or self.sizes.pairs)

    def controls(self, model: str, domain: str) -> list[Any]:
        """Return what was tested at the main way's own site and alpha, of the seeds whose knob was not refused."""
        found = self.found(model, "steer", domain, self.recipe.main, self.sizes.pairs)
        return [record["controls"] for record in found if "controls" in record]


def _at(record: Any, path: Sequence[str]) -> Any:
    for name in path:
        record = record[name]
    return record
