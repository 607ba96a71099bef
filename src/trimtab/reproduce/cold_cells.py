"""The steps of the COLD-Steer reproduction: a system learned, chosen on validation and tested, on one kind of task.

Every step returns plain JSON values and depends on its arguments alone, so that it can be kept and taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.errors import TrainError
from trimtab.evals.choices import ChoiceTask
from trimtab.evals.cost import Cost, measured
from trimtab.pairs import Pairs
from trimtab.prefworld.families.surveys import GROUPS
from trimtab.render import Renderer
from trimtab.reproduce.bench import System, after
from trimtab.reproduce.cold_data import (
    EVERYBODY,
    Poll,
    behaviour_questions,
    by_question,
    letter_pairs,
    letters_task,
    poll_pairs,
    poll_task,
    polls,
    shares_of,
)
from trimtab.reproduce.cold_systems import ColdBench, Ladder, chosen, learned
from trimtab.runtime import steer

Record = dict[str, Any]


def cost_record(cost: Cost) -> Record:
    """Return a cost as JSON values."""
    return {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes}


class Behaviours:
    """The questions of every behaviour, drawn once."""

    def __init__(self, bench: ColdBench, root: Path) -> None:
        self.bench, self._root = bench, root
        sizes, sources, seed = bench.sizes, bench.recipe.behaviours, bench.recipe.data_seed
        self.test = {
            name: letters_task(name, behaviour_questions(source, "test", sizes.test, seed=seed, root=root))
            for name, source in sources.items()
        }
        self._held = {
            name: behaviour_questions(
                source, "validation", sizes.validation, seed=seed, root=root, without=asked_by(self.test[name])
            )
            for name, source in sources.items()
        }
        self.validation = {name: letters_task(name, questions) for name, questions in self._held.items()}
        asked = set[str]().union(*map(asked_by, (*self.test.values(), *self.validation.values())))
        renderer = Renderer(bench.tokenizer)
        self.longest = max(asked, key=lambda prompt: len(renderer.prompt_ids(after((), prompt))))

    def pairs(self, behaviour: str, n: int, seed: int) -> Pairs:
        """Draw the pairs that one seed learns from."""
        source = self.bench.recipe.behaviours[behaviour]
        asked = asked_by(self.validation[behaviour]) | asked_by(self.test[behaviour])
        return letter_pairs(behaviour_questions(source, "train", n, seed=seed, root=self._root, without=asked))

    def held(self, behaviour: str) -> Pairs:
        """Return the validation questions as pairs, for early stopping."""
        return letter_pairs(self._held[behaviour])


def asked_by(task: ChoiceTask) -> set[str]:
    """Return a task's prompts, which are texts."""
    return {prompt for prompt in task.prompts if isinstance(prompt, str)}


def _learned(bench: ColdBench, name: str, pairs: Pairs, held: Pairs, seed: int, **options: str) -> Any:
    """Learn with what it costs; returns a ladder, or what a training said that came to nothing."""
    with measured() as cost:
        try:
            ladder: Ladder | str = learned(bench, name, pairs, held, seed, **options)
        except TrainError as error:
            ladder = str(error)
    return ladder, cost


def _chosen(bench: ColdBench, ladder: Ladder | str, score: Callable[[System], float]) -> tuple[System, Record]:
    """Choose on validation; a system that was refused leaves the model as it is."""
    if isinstance(ladder, str):
        return bench.base, {"refused": ladder, "table": [], "tune": cost_record(Cost())}
    with measured() as cost:
        system, row, rows = chosen(bench, ladder, score)
    record: Record = {"table": rows, "tune": cost_record(cost)}
    if isinstance(ladder.knob, Knob) and ladder.knob.method == "bipo":
        runs = ladder.knob.diagnostics["table"]
        epochs = ladder.knob.provenance["options"]["epochs"]
        record["converged"] = all(run["best_epoch"] < epochs for run in runs)
    if system is None:
        return bench.base, record | {"refused": "no dose keeps the budget of KL"}
    return system, record | {"chosen": row}


# --- behaviours -----------------------------------------------------------------------------------------------------


def base(behaviours: Behaviours) -> Record:
    """Test the model as it is; `letter_a` is the share of probability that it gives to (A), of which a half is fair."""
    found = {name: _letters(behaviours.bench.base, behaviours.bench, task) for name, task in behaviours.test.items()}
    return {"test": found, "side": _side_effects(behaviours, behaviours.bench.base, "")}


def behaviour(behaviours: Behaviours, name: str, system: str, n: int, seed: int, *, full: bool) -> Record:
    """Learn a behaviour from `n` pairs, choose and test; with `full` side effects are measured too."""
    bench = behaviours.bench
    pairs, held = behaviours.pairs(name, n, seed), behaviours.held(name)
    ladder, cost = _learned(bench, system, pairs, held, seed, longest=behaviours.longest)
    made, record = _chosen(bench, ladder, lambda s: bench.run(s, behaviours.validation[name]).accuracy)
    record |= {"learn": cost_record(cost), "test": _letters(made, bench, behaviours.test[name])}
    if full:
        record["side"] = _side_effects(behaviours, made, name)
    return record


def _letters(system: System, bench: ColdBench, task: ChoiceTask) -> Record:
    """Return by question the probability of the matching letter, whether it is the likelier one, and that of (A)."""
    outcome = bench.run(system, task)
    assert outcome.margins is not None
    first = [score if 0 in right else 1 - score for score, right in zip(outcome.scores, task.right, strict=True)]
    return {
        "probability": by_question(outcome.scores),
        "right": by_question((outcome.margins > 0).astype(float)),
        "letter_a": float(np.mean(first)),
    }


def _side_effects(behaviours: Behaviours, system: System, name: str) -> Record:
    """Measure what should not change: other behaviours, guardrails, KL; and how far the last layer moves."""
    bench = behaviours.bench
    others = {
        other: by_question(bench.run(system, task).scores)
        for other, task in behaviours.validation.items()
        if other != name
    }
    rails = {rail.name: bench.run(system, rail).scores.tolist() for rail in bench.guardrails("test")}
    asked = next(iter(behaviours.validation.values())).prompts[:16]
    return {"others": others, "rails": rails, "kl": bench.kl(system), "moved": _moved(bench, system, asked)}


def _moved(bench: ColdBench, system: System, prompts: Sequence[Any]) -> float | None:
    """Return how far the last layer's output at the prompts' last tokens moves, as a share of its norm.

    None for examples, after which other tokens stand before.
    """
    if system.before:
        return None
    adapter, renderer = Adapter(system.model), Renderer(bench.tokenizer)
    batch = renderer.pad([renderer.prompt_ids(after((), prompt)) for prompt in prompts], side="left")
    found: list[torch.Tensor] = []
    for knobs in ({}, system.knobs):
        lengths = batch.attention_mask.sum(1).tolist()
        with torch.no_grad(), steer(adapter, knobs, prompt_lengths=lengths), adapter.read([-1]) as reading:
            system.model(**{name: value.to(adapter.input_device) for name, value in batch._asdict().items()})
        found.append(reading.acts[adapter.n_layers - 1][:, -1].float())
    return float(((found[1] - found[0]).norm(dim=-1) / found[0].norm(dim=-1)).mean())


# --- opinions -------------------------------------------------------------------------------------------------------


class Polls:
    """Survey questions, drawn once; statements that test are in no other split."""

    def __init__(self, bench: ColdBench) -> None:
        self.bench, n, seed = bench, bench.sizes.polls, bench.recipe.data_seed
        self.validation, self.test = polls("validation", n, seed=seed), polls("test", 2 * n, seed=seed)

    def shares(self, system: System, drawn: Sequence[Poll]) -> np.ndarray:
        """Return how a system would answer, `[n, options]`."""
        outcome = self.bench.run(system, poll_task(drawn))
        assert outcome.likelihoods is not None
        values = np.array(outcome.likelihoods, dtype=float)
        odds = np.exp(values - values.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)


def divergences(wanted: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(wanted || found) in nats and total variation, by question, of shares `[n, options]`."""
    ratio = np.log(np.maximum(wanted, 1e-12)) - np.log(np.maximum(found, 1e-12))
    return (wanted * ratio).sum(axis=1), 0.5 * np.abs(wanted - found).sum(axis=1)


def opinions(asked: Polls, group: str, system: str, seed: int) -> Record:
    """Turn the model to a group's opinions, and test on other statements how near it is to each group's.

    `kl` and `tv` hold one number per question for every group; "everybody" learns from the mean of all groups.
    """
    bench = asked.bench
    if system == "base":
        return {"test": _near(asked, bench.base)}
    pairs = poll_pairs(polls("train", bench.sizes.polls, seed=seed), group)
    ladder, cost = _learned(bench, system, pairs, poll_pairs(asked.validation, group), seed, loss="distribution")
    wanted = np.array([shares_of(poll, group) for poll in asked.validation])

    def score(tried: System) -> float:
        return -float(divergences(wanted, asked.shares(tried, asked.validation))[0].mean())

    made, record = _chosen(bench, ladder, score)
    return record | {"learn": cost_record(cost), "test": _near(asked, made)}


def _near(asked: Polls, system: System) -> Record:
    found = asked.shares(system, asked.test)
    record: Record = {"kl": {}, "tv": {}, "spread": float(found.std(axis=0).mean())}
    for group in (*GROUPS, EVERYBODY):
        wanted = np.array([shares_of(poll, group) for poll in asked.test])
        kl, tv = divergences(wanted, found)
        record["kl"][group], record["tv"][group] = kl.tolist(), tv.tolist()
    return record


# --- generation -----------------------------------------------------------------------------------------------------


def writing(bench: ColdBench, name: str, system: str, seed: int) -> Record:
    """Learn from free answers, choose by the answers to validation prompts, and grade those to test prompts."""
    domain, sizes = bench.recipe.writing[name], bench.sizes
    task = bench.task(domain.task, "test", sizes.written)
    if system == "base":
        return {"test": _written(bench, bench.base, name)}
    held = bench.task(domain.task, "validation", sizes.written_validation)
    pairs, kept = bench.pairs(domain, sizes.pairs, seed), bench.held_out(domain, "validation")
    ladder, cost = _learned(bench, system, pairs, kept, seed)
    made, record = _chosen(bench, ladder, lambda s: bench.run(s, held).share(task.target))
    return record | {"learn": cost_record(cost), "test": _written(bench, made, name)}


def _written(bench: ColdBench, system: System, name: str) -> Record:
    task = bench.task(bench.recipe.writing[name].task, "test", bench.sizes.written)
    with measured() as cost:
        answered = bench.run(system, task)
    return {
        "on_side": [float(side == task.target) for side in answered.sides],
        "broken": answered.degenerate.tolist(),
        "kl": bench.kl(system),
        "seconds_per_answer": cost.seconds / len(task),
    }
