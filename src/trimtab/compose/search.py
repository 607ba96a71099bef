"""Which settings are tried: a grid, or what Optuna asks for next; the only file that imports Optuna."""
# Optuna is an extra, so it may be missing where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

from trimtab.errors import MissingDependency, OptionError, unknown_name
from trimtab.types import check_strength

Search = Literal["tpe", "nsga2", "grid"]
INSTALL = 'This search needs Optuna. Install it with: pip install "trimtab[compose]"'
UNTUNED = (-1.0, 1.5)
"""Bounds of a knob that was not tuned: around strength 1, which is the dose its method or its training gave it."""
GRID = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Strengths of Preference Vectors' heat map (arXiv:2504.20106, Figure 2)."""

Bounds = Mapping[str, tuple[float, float]]
Setting = dict[str, float]
TRIALS = 60


class Answer(NamedTuple):
    """What a setting is worth: one value per objective, larger is better, and what it exceeds, 0 or less being kept."""

    values: list[float]
    excess: Mapping[str, float]


def bounds_of(safe_ranges: Mapping[str, tuple[float, float] | None], given: Bounds | None) -> Bounds:
    """Return each knob's lowest and highest strength: as given, else its safe range, else `UNTUNED`.

    Raises `OptionError` for bounds that do not hold 0, which is off, and something besides.
    """
    for name in given or {}:
        if name not in safe_ranges:
            raise unknown_name("knob", name, safe_ranges)
    found: dict[str, tuple[float, float]] = {}
    for name, safe in safe_ranges.items():
        low, high = (given or {}).get(name) or safe or UNTUNED
        low, high = check_strength(low, f"bound of {name!r}"), check_strength(high, f"bound of {name!r}")
        if not (low <= 0 <= high and low < high):
            whose = "The bounds" if name in (given or {}) else "The safe range"
            raise OptionError(
                f"{whose} of {name!r} must hold 0, which is off, and more; got {low:g} to {high:g}. "
                "Give the knob bounds, or leave it out."
            )
        found[name] = low, high
    return found


def alone_at(bounds: tuple[float, float]) -> float:
    """Return the strength at which a knob is measured alone: 1, or the bound that comes before it."""
    low, high = bounds
    return min(1.0, high) if high > 0 else max(-1.0, low)


def grid_settings(
    bounds: Bounds, grid: Sequence[float] | Mapping[str, Sequence[float]] | None, *, bounded: bool
) -> list[Setting]:
    """Return every combination of the knobs' strengths: those of `grid`, else those of `GRID` within the bounds."""
    if isinstance(grid, Mapping):
        for name in grid:
            if name not in bounds:
                raise unknown_name("knob", name, bounds)
        missing = [name for name in bounds if name not in grid]
        if missing:
            raise OptionError(f"The grid has no strengths for {', '.join(missing)}.")
    if grid is not None and bounded:
        raise OptionError("A grid of your own has its bounds in it. Pass one of the two.")
    values: list[list[float]] = []
    for name, (low, high) in bounds.items():
        own = grid[name] if isinstance(grid, Mapping) else GRID if grid is None else grid
        strengths = [check_strength(value, f"strength of {name!r}") for value in own]
        if not strengths:
            raise OptionError(f"The grid of {name!r} is empty.")
        values.append([s for s in strengths if low <= s <= high] if grid is None else strengths)
    return [dict(zip(bounds, combination, strict=True)) for combination in product(*values)]


class Plan(NamedTuple):
    """Settings that are measured first, or, of a grid, all; and how many there are to be."""

    first: list[Setting]
    total: int


def plan(
    reach: Bounds,
    search: Search,
    trials: int | None,
    grid: Sequence[float] | Mapping[str, Sequence[float]] | None,
    *,
    bounded: bool,
) -> Plan:
    """Plan the base model, each knob alone, and a grid or all knobs at once."""
    if search not in get_args(Search):
        raise unknown_name("search", str(search), get_args(Search))
    base, full = dict.fromkeys(reach, 0.0), {name: alone_at(ends) for name, ends in reach.items()}
    first = [base, *(base | {name: strength} for name, strength in full.items())]
    if search == "grid":
        if trials is not None:
            raise OptionError(
                'Trials are those of "tpe" and "nsga2"; a grid has as many as combinations. Leave it out.'
            )
        settings = _distinct([*first, *grid_settings(reach, grid, bounded=bounded)])
        return Plan(settings, len(settings))
    if grid is not None:
        raise OptionError(f"The grid is that of search='grid'; got search={search!r}.")
    load_optuna()
    settings = _distinct([*first, full])
    total = TRIALS if trials is None else trials
    if total < len(settings):
        raise OptionError(
            f"Trials must be at least {len(settings)}: the base model, each knob alone, and all at once; got {total}."
        )
    return Plan(settings, total)


def _distinct(settings: Sequence[Setting]) -> list[Setting]:
    return list({tuple(setting.values()): setting for setting in settings}.values())


def ask_optuna(
    search: Search,
    bounds: Bounds,
    first: Sequence[Setting],
    measure: Callable[[Setting], Answer],
    *,
    objectives: int,
    trials: int,
    seed: int,
) -> None:
    """Measure `trials` settings, `first` before all others, each asked for in the light of those before it.

    "tpe" (tree-structured Parzen estimator, multivariate) takes one objective, "nsga2" any number, with a tenth of the
    trials as its population, from 4 to 50. Both prefer settings that exceed nothing. Strengths are rounded to two
    places. The same answers to the same seed bring the same questions, which is how an interrupted search goes on.
    """
    load_optuna()
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.samplers import NSGAIISampler, TPESampler

    seed %= 2**32  # numpy's older generators take no more
    with _quiet(optuna):
        if search == "tpe":
            sampler: Any = TPESampler(seed=seed, multivariate=True)
        else:
            sampler = NSGAIISampler(seed=seed, population_size=min(50, max(4, trials // 10)))
        directions: Any = ["maximize"] * objectives
        study = optuna.create_study(directions=directions, sampler=sampler)
        for setting in first:
            study.enqueue_trial(dict(setting))
    distributions: Any = {name: FloatDistribution(*ends) for name, ends in bounds.items()}
    for number in range(trials):
        with _quiet(optuna):
            trial = study.ask(distributions)
        drawn = {n: min(max(round(trial.params[n], 2) + 0.0, low), high) for n, (low, high) in bounds.items()}
        answer = measure(first[number] if number < len(first) else drawn)
        with _quiet(optuna):
            for name, amount in answer.excess.items():
                trial.set_constraint(name, amount)
            study.tell(trial, answer.values)


def load_optuna() -> None:
    """Import Optuna; raises `MissingDependency` unless it is there."""
    if find_spec("optuna") is None:
        raise MissingDependency(INSTALL)
    import_module("optuna")


@contextmanager
def _quiet(optuna: Any) -> Generator[None]:
    """Keep Optuna's remarks, which are on by default, off the terminal, and its logging as the process had it."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
