"""The whole story on the bundled model: pairs to knobs, tuned, tested once beside their controls."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.artifact import Knob
from trimtab.errors import TuneError
from trimtab.evals.stats import paired_bootstrap, wilson
from trimtab.evals.tasks import Outcome, Task, run_task
from trimtab.learn import learn
from trimtab.prefworld import world
from trimtab.prefworld.families import GUARDRAILS
from trimtab.render import load
from trimtab.tune import tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KNOBS = ("math", "code")
POSITIONS = ("post_instruction", "demonstrated")
CONDITIONS = ("base", "knob", "knob_negative", "knob_half", "random", "shuffled")
Progress = Callable[[str], None]


class _Sizes:
    """How many items the demo uses; `quick` is for tests of the plumbing, its figures mean nothing."""

    def __init__(self, quick: bool) -> None:
        self.pairs = 20 if quick else 100
        self.test = 12 if quick else 300
        self.validation = 8 if quick else 60
        self.guard = 6 if quick else 50
        self.draws = 1 if quick else 3
        self.finalists = 1 if quick else 3


class _Demo:
    """One run: model, sizes, and the outcomes of the base model, which every comparison shares."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        quick: bool,
        progress: Progress,
    ) -> None:
        self.model, self.tokenizer, self.seed, self.progress = model, tokenizer, seed, progress
        self.size = _Sizes(quick)
        self.seconds = {"learn": 0.0, "tune": 0.0}
        self.tests = {name: world.task(name, "test", self.size.test, seed=seed) for name in (*KNOBS, *GUARDRAILS)}
        self.base = {name: self.run(task, {}) for name, task in self.tests.items()}

    def run(self, task: Task, setting: Mapping[Knob, float], temperature: float = 0.0) -> Outcome:
        return run_task(self.model, self.tokenizer, task, setting, temperature=temperature, seed=self.seed)

    def learn(self, name: str, *, method: str = "palrs", flip: int | None = None) -> Knob:
        """Learn a knob from the training pairs; with `flip`, from pairs of which exactly half are turned round."""
        pairs = world.pairs(name, self.size.pairs, seed=self.seed)
        if flip is not None:
            pairs = pairs.flip_balanced(seed=flip)
        return learn(
            self.model, self.tokenizer, pairs, method=method, name=name, positions=POSITIONS, last=1.0, seed=self.seed
        )

    def tune(self, knob: Knob, name: str, *, dose_response: bool) -> Knob:
        """Choose site and gain on the validation split."""
        return tune(
            knob,
            self.model,
            self.tokenizer,
            world.pairs(name, 24, split="validation", seed=self.seed),
            task=world.task(name, "validation", self.size.validation, seed=self.seed),
            guardrails=[world.task(g, "validation", self.size.guard, seed=self.seed) for g in GUARDRAILS],
            finalists=self.size.finalists,
            dose_response=dose_response,
        )

    def controls(self, knob: Knob, name: str) -> dict[str, list[tuple[str, Knob]]]:
        """Make random directions and vectors of balanced label flips, at the knob's site and alpha.

        The first shuffled draw also goes through the whole choice of site and gain, as the knob itself did.
        """
        made: dict[str, list[tuple[str, Knob]]] = {"random": [], "shuffled": []}
        for draw in range(self.size.draws):
            noise = torch.randn(knob.width, generator=torch.Generator().manual_seed(1000 * self.seed + draw))
            made["random"].append((f"random {draw}", _with_vector(knob, noise)))
            flipped = self.learn(name, flip=draw)
            made["shuffled"].append((f"shuffled {draw}", _with_vector(knob, flipped.vectors[knob.site])))
            if draw == 0:
                try:
                    made["shuffled"].append(("shuffled 0, tuned", self.tune(flipped, name, dose_response=False)))
                except TuneError:
                    self.progress("the shuffled control found no setting within the budget")
        return made

    def test(self, knob: Knob, name: str) -> dict[str, Any]:
        """Test a tuned knob once, on its own task, the other knob's, and every guardrail."""
        controls = self.controls(knob, name)
        table: dict[str, Any] = {}
        for task_name, task in self.tests.items():
            base = self.base[task_name]
            entry: dict[str, Any] = {"base": _cell(base, base)}
            for condition, strength in (("knob", 1.0), ("knob_negative", -1.0), ("knob_half", 0.5)):
                entry[condition] = _cell(base, self.run(task, {knob: strength}))
            for condition, draws in controls.items():
                cells = [{"draw": label, **_cell(base, self.run(task, {k: 1.0}))} for label, k in draws]
                # Of several draws the one that gains most counts: a control must not gain.
                entry[condition] = {**max(cells, key=lambda c: c["accuracy"]), "draws": cells}
            table[task_name] = entry
            self.progress(f"{name}: tested on {task_name}")
        own = self.tests[name]
        runs = {"base": self.run(own, {}, 1.0), "knob": self.run(own, {knob: 1.0}, 1.0)}
        sampled = {label: _cell(runs["base"], out) for label, out in runs.items()}
        table[name]["sampled"] = sampled
        table[name]["side_share"] = {label: out.share(own.target) for label, out in runs.items()}
        table[name]["accuracy_within_side"] = {label: out.accuracy_within(own.target) for label, out in runs.items()}
        return table

    def samples(self, knob: Knob, name: str) -> dict[str, str]:
        """Return a test question that the base model got wrong and the knob right, with both answers."""
        task, base = self.tests[name], self.base[name]
        steered = self.run(Task(name, task.prompts[:60], task.grade, max_new_tokens=task.max_new_tokens), {knob: 1.0})
        better = [i for i, s in enumerate(steered.scores) if s > base.scores[i]]
        i = better[0] if better else 0
        return {"prompt": str(task.prompts[i]), "base": base.answers[i], "knob": steered.answers[i]}


def _with_vector(knob: Knob, vector: torch.Tensor) -> Knob:
    """Put another direction at a knob's site, with the knob's alpha."""
    return Knob(
        f"{knob.name} control", "random", {knob.site: vector.float()}, knob.norms, knob.site, knob.gain, knob.where
    )


def _cell(base: Outcome, out: Outcome) -> dict[str, Any]:
    """Summarise an outcome: accuracy with its interval, and the paired difference to base with its own."""
    mean = wilson(round(float(out.scores.sum())), len(out.scores))
    gain = paired_bootstrap(base.scores, out.scores)
    return {
        "n": len(out.scores),
        "accuracy": mean.estimate,
        "low": mean.low,
        "high": mean.high,
        "gain": gain.estimate,
        "gain_low": gain.low,
        "gain_high": gain.high,
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

    Everything is chosen on the validation split; the test split is used once, at the end.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    progress("loading the bundled model and measuring it without knobs")
    loaded = load(model)
    demo = _Demo(loaded.model, loaded.tokenizer, seed, quick, progress)
    knobs: dict[str, Knob] = {}
    for name in KNOBS:
        start = time.perf_counter()
        raw = demo.learn(name)
        demo.seconds["learn"] += time.perf_counter() - start
        start = time.perf_counter()
        progress(f"{name}: learned from {demo.size.pairs} pairs; tuning on the validation split")
        knobs[name] = demo.tune(raw, name, dose_response=True)
        demo.seconds["tune"] += time.perf_counter() - start
        knobs[name].save(folder / f"{name}.knob.safetensors")
    results = {name: demo.test(knob, name) for name, knob in knobs.items()}
    report: dict[str, Any] = {
        "model": model,
        "versions": {p: version(p) for p in ("trimtab", "torch", "transformers")} | {"python": platform.python_version()},
        "seed": seed,
        "seconds": {**demo.seconds, "total": time.perf_counter() - begun},
        "chosen": {
            name: {"layer": k.site.layer, "position": k.site.position, "gain": k.gain} for name, k in knobs.items()
        },
        "results": results,
        "tuning": {name: dict(k.tuning or {}) for name, k in knobs.items()},
        "samples": {name: demo.samples(knob, name) for name, knob in knobs.items()},
    }
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    for name in KNOBS:
        _plots(report["tuning"][name], name, folder)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    for knob, tasks in report["results"].items():
        for task, entry in tasks.items():
            cells = [f"{100 * entry['base']['accuracy']:.1f}"]
            for condition in CONDITIONS[1:]:
                c = entry[condition]
                cells.append(
                    f"{100 * c['accuracy']:.1f} ({100 * c['gain']:+.1f}; {100 * c['gain_low']:+.1f} to "
                    f"{100 * c['gain_high']:+.1f})"
                )
            rows.append([knob, task, *cells])
    return rows


HEADS = ("knob", "task", "base", "strength 1", "strength -1", "strength 0.5", "random", "shuffled")


def _facts(report: Mapping[str, Any]) -> list[str]:
    """Say in sentences what the table leaves out."""
    lines: list[str] = []
    for name, chosen in report["chosen"].items():
        own = report["results"][name][name]
        sampled, share, within = own["sampled"], own["side_share"], own["accuracy_within_side"]
        lines.append(
            f"{name}: layer {chosen['layer']}, {chosen['position']}, gain {chosen['gain']:g}. Sampled accuracy "
            f"{100 * sampled['base']['accuracy']:.1f} to {100 * sampled['knob']['accuracy']:.1f} percent; share of the "
            f"preferred side {100 * share['base']:.1f} to {100 * share['knob']:.1f}; accuracy within that side "
            f"{_percent(within['base'])} to {_percent(within['knob'])}. Safe range of strengths "
            f"{report['tuning'][name]['safe_range'][0]:g} to {report['tuning'][name]['safe_range'][1]:g}."
        )
    s = report["seconds"]
    lines.append(f"Learning took {s['learn']:.1f} s, tuning {s['tune']:.1f} s, everything {s['total']:.0f} s.")
    return lines


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}"


NOTE = (
    "Accuracy in percent on the test split; in brackets the paired difference to base with its 95 % bootstrap interval. "
    "Of the control draws the one that gains most is shown."
)


def summary(report: Mapping[str, Any]) -> str:
    """Return the report as plain text for a terminal."""
    rows = [list(HEADS), *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines += ["", NOTE, "", *_facts(report)]
    for name, sample in report["samples"].items():
        lines += ["", f"[{name}] {sample['prompt']}", f"  base:       {_indent(sample['base'])}"]
        lines += [f"  strength 1: {_indent(sample['knob'])}"]
    return "\n".join(lines)


def _indent(text: str) -> str:
    return text.replace("\n", "\n" + " " * 14)


def _markdown(report: Mapping[str, Any]) -> str:
    lines = ["# Trimtab demo", "", f"Model: {report['model']}, seed {report['seed']}.", ""]
    lines += ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(report)]
    lines += ["", NOTE, ""] + [f"- {fact}" for fact in _facts(report)] + [""]
    for name in KNOBS:
        lines += [f"## {name}", "", f"![dose-response](dose_response_{name}.png)", f"![sites](sites_{name}.png)", ""]
        sample = report["samples"][name]
        lines += ["Question:", "", "```", sample["prompt"], "```", "", "Base:", "", "```", sample["base"], "```", ""]
        lines += ["Strength 1:", "", "```", sample["knob"], "```", ""]
    return "\n".join(lines)


def _plots(tuning: Mapping[str, Any], name: str, folder: Path) -> None:
    """Draw the dose-response and the heat map of sites and gains, both on validation data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curve: Sequence[Mapping[str, Any]] = tuning["dose_response"]
    x = [row["strength"] for row in curve]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    top.plot(x, [100 * row["score"] for row in curve], "o-", label=name, linewidth=2)
    for rail in tuning["guardrails"]:
        top.plot(x, [100 * row["guardrails"][rail] for row in curve], ".--", label=rail)
    top.plot(x, [100 * row["broken"] for row in curve], ":", color="grey", label="broken answers")
    top.axvspan(*tuning["safe_range"], alpha=0.1, color="green", label="safe range")
    top.set(ylabel="percent of validation items", title=f"Dose-response of the {name} knob", ylim=(-3, 103))
    top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    bottom.plot(x, [row["kl"] for row in curve], "k.-")
    bottom.set(xlabel="strength (1 is the calibrated dose)", ylabel="KL to base\n(nats per token)")
    figure.savefig(folder / f"dose_response_{name}.png", dpi=130)
    plt.close(figure)
    ranking: Sequence[Mapping[str, Any]] = tuning["ranking"]
    sites = sorted({r["site"] for r in ranking}, key=lambda s: (s.split("/")[1], int(s.split("/")[0])))
    gains = sorted({r["gain"] for r in ranking})
    grid = np.full((len(sites), len(gains)), np.nan)
    for r in ranking:
        grid[sites.index(r["site"]), gains.index(r["gain"])] = r["margin"]
    bound = float(np.nanpercentile(np.abs(grid), 90))
    figure, axes = plt.subplots(figsize=(6.5, 0.32 * len(sites) + 1.8), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(gains)), [f"{g:g}" for g in gains])
    axes.set_yticks(range(len(sites)), [f"layer {s.replace('/', ', ')}" for s in sites], fontsize=8)
    tested = {(row["site"], row["gain"]): row["score"] for row in tuning["table"]}
    for (site, gain), score in tested.items():
        axes.text(gains.index(gain), sites.index(site), f"{100 * score:.0f}", ha="center", va="center", fontsize=7)
    axes.set(xlabel="alpha (multiples of the mean residual norm)", title=f"{name}: margin gained by site and gain")
    figure.colorbar(image, label="nats (teacher-forced)\nnumbers: score of finalists, percent")
    figure.savefig(folder / f"sites_{name}.png", dpi=130)
    plt.close(figure)
