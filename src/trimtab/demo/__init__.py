"""The whole story on the bundled model: pairs to knobs, tuned, tested once beside their controls."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trimtab.artifact import Knob
from trimtab.demo.report import markdown, summary
from trimtab.errors import OptionError, TuneError
from trimtab.evals.report import plot_tuning
from trimtab.evals.stats import paired_bootstrap, wilson
from trimtab.evals.tasks import Outcome, Task, run_task
from trimtab.files import write_atomically
from trimtab.learn import learn
from trimtab.prefworld import world
from trimtab.prefworld.families import GUARDRAILS
from trimtab.render import load
from trimtab.tune import tune
from trimtab.types import Site, Where
from trimtab.workers import open_pool

__all__ = ["run", "summary"]

KNOBS = ("math", "code")
POSITIONS = ("post_instruction", "demonstrated")
GAINS = (0.2, 0.3, 0.4)
STRENGTHS = (-1.0, 0.5, 1.0, 1.5)
LAST = 0.85
"""Candidate layers end before the last block: its output goes straight to the logits, where a direction is a bias on
the next token, and random or shuffled ones steer by that alone. Beyond alpha 0.4 copying suffers. Both were settled
on the validation split, after a first run had shown them on the test split (`docs/log.md`)."""
WHERE: tuple[Where, ...] = ("prompt", "context")
"""Maths is decided at the prompt's last token and code at all the others, so both are tried. The answer's own tokens
are left alone: a knob does not need them, and there random directions of the same norm gain a few points by upsetting
the answer. Settled on the validation split (`scripts/controls.py`, `docs/log.md`)."""
OPTIONS = {"equal_weight": True}
"""The pairs differ more in how far their answers lie apart than in which way: with plain means the cosine of shuffled
pairs with the knob has a standard deviation of 0.2 to 0.4, with equal weights 0.07 (`docs/log.md`)."""
Progress = Callable[[str], None]


class _Sizes(NamedTuple):
    """How many items the demo uses."""

    pairs: int = 100
    test: int = 300
    sampled: int = 200
    validation: int = 40
    guard: int = 75
    draws: int = 5
    finalists: int = 3


QUICK = _Sizes(pairs=16, test=10, sampled=10, validation=6, guard=4, draws=1, finalists=1)
"""For tests of the plumbing; its figures mean nothing."""


class _Bench:
    """What one worker process holds: the model and its tokenizer."""

    def __init__(self, model: str, seed: int, size: _Sizes) -> None:
        loaded = load(model, dtype="float32")
        self.model, self.tokenizer, self.seed, self.size = loaded.model, loaded.tokenizer, seed, size
        self.drawn: dict[tuple[str, int], Task] = {}  # a task remembers the programs that it has tested

    def outcome(self, name: str, knob: Knob | None, strength: float, n: int, temperature: float = 0.0) -> Outcome:
        """Answer the first `n` test items of a task under a knob."""
        task = self.drawn.get((name, n)) or world.task(name, "test", n, seed=self.seed)
        self.drawn[name, n] = task
        setting = {knob: strength} if knob else {}
        return run_task(self.model, self.tokenizer, task, setting, temperature=temperature, seed=self.seed)

    def learned(self, name: str, kind: str, draw: int = 0, site: Site | None = None) -> Knob:
        """Learn a knob, or a control: random directions, or pairs of which exactly half are turned round.

        `site` reads that site only, which saves most of the time.
        """
        pairs = world.pairs(name, self.size.pairs, seed=self.seed)
        if kind == "shuffled":
            pairs = pairs.flip_balanced(seed=draw)
        return learn(
            self.model,
            self.tokenizer,
            pairs,
            method="random" if kind == "random" else "palrs",
            name=name,
            positions=(site.position,) if site else POSITIONS,
            layers=[site.layer] if site else None,
            last=LAST,
            options={} if kind == "random" else OPTIONS,
            seed=self.seed + draw,
        )

    def tuned(self, name: str, kind: str) -> tuple[Knob | None, float, float]:
        """Learn, then choose site, tokens and gain on the validation split; return the knob and the seconds of both.

        A control is taken through the whole choice too; None means that tuning refused it: its pairs agree on no
        direction, or none of its settings keeps the budget.
        """
        begun = time.perf_counter()
        knob = self.learned(name, kind)
        learning = time.perf_counter() - begun
        try:
            knob = tune(
                knob,
                self.model,
                self.tokenizer,
                world.pairs(name, 24, split="validation", seed=self.seed),
                task=world.task(name, "validation", self.size.validation, seed=self.seed),
                guardrails=[world.task(g, "validation", self.size.guard, seed=self.seed) for g in GUARDRAILS],
                gains=GAINS,
                where=WHERE,
                finalists=self.size.finalists,
                strengths=STRENGTHS,
                dose_response=kind == "knob",
            )
        except TuneError:
            if kind == "knob":
                raise
            return None, learning, 0.0
        return knob, learning, time.perf_counter() - begun - learning

    def control(self, knob: Knob, kind: str, draw: int) -> Knob:
        """Put a random direction, or the vector of balanced label flips, at the knob's site with its alpha."""
        if kind == "shuffled":
            vector = self.learned(knob.name, kind, draw, knob.site).vectors[knob.site]
        else:
            vector = torch.randn(knob.width, generator=torch.Generator().manual_seed(1000 * self.seed + draw))
        return Knob(knob.name, kind, {knob.site: vector}, knob.norms, knob.site, knob.gain, knob.where)


# A process pool hands its workers nothing but arguments: what a worker keeps between jobs has to be a global. Only
# `_open` sets it, in a process that this module has started.
_bench: _Bench | None = None


def _open(model: str, seed: int, size: _Sizes) -> None:
    global _bench
    _bench = _Bench(model, seed, size)


def _tuned(name: str, kind: str, file: str | None) -> tuple[Knob | None, float, float]:
    assert _bench is not None
    knob, learning, tuning = _bench.tuned(name, kind)
    if knob and file:
        knob.save(file)
    return knob, learning, tuning


def _outcome(name: str, knob: Knob | None, strength: float, n: int, temperature: float = 0.0) -> Outcome:
    assert _bench is not None
    return _bench.outcome(name, knob, strength, n, temperature)


def _control_outcomes(knob: Knob, kind: str, draw: int, sizes: dict[str, int]) -> dict[str, Outcome]:
    assert _bench is not None
    made = _bench.control(knob, kind, draw)
    return {name: _bench.outcome(name, made, 1.0, n) for name, n in sizes.items()}


class _Demo:
    """The plan: what is asked of the workers, and how their outcomes become the report's tables."""

    def __init__(self, pool: Executor, size: _Sizes, progress: Progress) -> None:
        self.pool, self.size, self.progress = pool, size, progress
        self.tasks = (*KNOBS, *GUARDRAILS)
        self.base = {name: pool.submit(_outcome, name, None, 0.0, size.test) for name in self.tasks}

    def ask(self, knob: Knob, retuned: Mapping[str, Knob | None]) -> dict[str, Any]:
        """Submit every test of one knob and its controls; the results are awaited in `table`.

        `retuned` holds each control at the site, tokens and gain that were chosen for itself.
        """
        own, size, submit = knob.name, self.size, self.pool.submit
        only_own = {own: size.test}
        everywhere: dict[str, int] = {task: size.test for task in self.tasks}  # noqa: C420  # or the keys are literals
        asked: dict[str, Any] = {"knob": {t: submit(_outcome, t, knob, 1.0, size.test) for t in self.tasks}}
        for condition, strength in (("knob_negative", -1.0), ("knob_half", 0.5)):
            asked[condition] = {t: submit(_outcome, t, knob, strength, size.test) for t in self.tasks}
        for kind in ("random", "shuffled"):
            asked[kind] = [
                (f"draw {d}", submit(_control_outcomes, knob, kind, d, only_own if d else everywhere))
                for d in range(size.draws)
            ]
        asked["retuned"] = {
            kind: submit(_outcome, own, control, 1.0, size.test) if control else None
            for kind, control in retuned.items()
        }
        asked["sampled"] = {
            "base": submit(_outcome, own, None, 0.0, size.sampled, 1.0),
            "knob": submit(_outcome, own, knob, 1.0, size.sampled, 1.0),
            "knob_negative": submit(_outcome, own, knob, -1.0, size.sampled, 1.0),
        }
        return asked

    def table(self, own: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Wait for a knob's tests and set out accuracies and paired differences."""
        draws = {kind: [(label, f.result()) for label, f in asked[kind]] for kind in ("random", "shuffled")}
        table: dict[str, Any] = {}
        for name in self.tasks:
            base = self.base[name].result()
            entry: dict[str, Any] = {"base": _cell(base, base)}
            for condition in ("knob", "knob_negative", "knob_half"):
                entry[condition] = _cell(base, asked[condition][name].result())
            for kind, made in draws.items():
                cells = [{"draw": label, **_cell(base, out[name])} for label, out in made if name in out]
                if name == own and kind in asked["retuned"]:
                    made_anew = asked["retuned"][kind]
                    # A control that tuning refuses leaves the base model as it is.
                    label = "chosen anew" if made_anew else "refused by tuning, so nothing is turned"
                    out = made_anew.result() if made_anew else base
                    cells.append({"draw": label, **_cell(base, out)})
                # Of several draws the one that gains most counts: a control must not gain.
                entry[kind] = {**max(cells, key=lambda c: c["difference"]), "draws": cells}
            table[name] = entry
            self.progress(f"{own}: tested on {name}")
        sampled = {label: future.result() for label, future in asked["sampled"].items()}
        target = world.target_side(own)
        table[own]["sampled"] = {label: _cell(sampled["base"], out) for label, out in sampled.items()}
        table[own]["side_share"] = {label: out.share(target) for label, out in sampled.items()}
        table[own]["accuracy_within_side"] = {label: out.accuracy_within(target) for label, out in sampled.items()}
        return table

    def sample(self, own: str, asked: Mapping[str, Any], seed: int) -> dict[str, str]:
        """Return a test question that the base model got wrong and the knob right (else the first), both answered."""
        base, steered = self.base[own].result(), asked["knob"][own].result()
        better = [i for i, (a, b) in enumerate(zip(base.scores, steered.scores, strict=True)) if b > a]
        i = better[0] if better else 0
        question = world.items(own, "test", self.size.test, seed=seed)[i].prompt
        return {"prompt": question, "base": base.answers[i], "knob": steered.answers[i]}


def _cell(base: Outcome, out: Outcome) -> dict[str, Any]:
    """Summarise an outcome: accuracy, and the paired difference to base on the same items, with 95 % intervals."""
    n = len(out.scores)
    mean, difference = wilson(round(float(out.scores.sum())), n), paired_bootstrap(base.scores[:n], out.scores)
    return {
        "n": n,
        "accuracy": mean.estimate,
        "low": mean.low,
        "high": mean.high,
        "difference": difference.estimate,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "degenerate": float(np.mean(out.degenerate)),
    }


def run(
    out: Path | str = "out/demo",
    *,
    seed: int = 0,
    quick: bool = False,
    model: str = "prefworld",
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Learn, tune and test the two knobs; write `report.json`, `report.md` and plots to `out`; return the report.

    Within a run everything is chosen on the validation split, and the test split is used once, at the end. Work is
    spread over two processes, so a script that calls this needs the usual `if __name__ == "__main__":`. Raises
    `OptionError` for a seed out of range.
    """
    if not 0 <= seed < 2**32:
        raise OptionError(f"The seed is a whole number from 0 to 2**32 - 1; got {seed}.")
    folder, size, begun = Path(out), QUICK if quick else _Sizes(), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    progress("measuring the bundled model without knobs; learning and tuning on the validation split")
    with open_pool(max(1, min(2, os.cpu_count() or 1)), _open, (model, seed, size)) as pool:
        files = {name: folder / f"{name}.knob.safetensors" for name in KNOBS}
        chosen = {name: pool.submit(_tuned, name, "knob", str(files[name])) for name in KNOBS}
        demo = _Demo(pool, size, progress)
        controls = {
            (name, kind): pool.submit(_tuned, name, kind, None) for kind in ("shuffled", "random") for name in KNOBS
        }
        seconds = {"learn": 0.0, "tune": 0.0}
        knobs: dict[str, Knob] = {}
        for name, future in chosen.items():
            knob, learning, tuning = future.result()
            assert knob is not None
            seconds["learn"] += learning
            seconds["tune"] += tuning
            knobs[name] = knob
            progress(f"{name}: site {knob.site}, {knob.where} tokens, gain {knob.gain:g}; testing")
        retuned = {key: future.result()[0] for key, future in controls.items()}
        asked = {
            name: demo.ask(knobs[name], {kind: control for (own, kind), control in retuned.items() if own == name})
            for name in KNOBS
        }
        results = {name: demo.table(name, asked[name]) for name in KNOBS}
        samples = {name: demo.sample(name, asked[name], seed) for name in KNOBS}
    report: dict[str, Any] = {
        "model": model,
        "versions": {p: version(p) for p in ("trimtab", "torch", "transformers")}
        | {"python": platform.python_version()},
        "seed": seed,
        "seconds": {**seconds, "total": time.perf_counter() - begun},
        "chosen": {
            name: {"layer": k.site.layer, "position": k.site.position, "where": k.where, "gain": k.gain}
            for name, k in knobs.items()
        },
        "results": results,
        "sizes": size._asdict(),
        "warnings": {name: list(k.diagnostics["warnings"]) for name, k in knobs.items()},
        "tuning": {name: dict(k.tuning or {}) for name, k in knobs.items()},
        "samples": samples,
    }
    write_atomically(folder / "report.md", markdown(report).encode())
    for name in KNOBS:
        plot_tuning(report["tuning"][name], name, folder)
    write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return report
