"""Measure whether the habits of PrefWorld are there, are carried, and can be steered."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from trimtab.artifact import Knob
from trimtab.capture import capture
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import Prompt, Task, run_task
from trimtab.methods import METHODS
from trimtab.pairs import Pairs
from trimtab.prefworld.families import FAMILIES
from trimtab.prefworld.families.surveys import GROUPS, STANCES, opinion_distribution
from trimtab.prefworld.habits import HABITS, system_line
from trimtab.prefworld.items import Draw, Item
from trimtab.prefworld.world import MAX_NEW_TOKENS, grade, items, pairs, side_of, target_side, task
from trimtab.render import Loaded, load
from trimtab.texts import Format
from trimtab.types import Message, Pair, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALPHAS = (0.15, 0.3, 0.5, 0.8, 1.2)
READINGS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("response_as_user", ("post_instruction",)),
    ("question_response", ("response_end", "demonstrated", "response_mean")),
)
TABLES = ("math", "code")


def _asked(family: str, drawn: Sequence[Item], prompts: Sequence[Prompt]) -> Task:
    return Task(
        family, tuple(prompts), lambda answers: grade(drawn, answers), max_new_tokens=MAX_NEW_TOKENS.get(family, 64)
    )


def carry_over(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, *, n: int = 100, unseen: bool = True
) -> dict[str, dict[str, float | None]]:
    """Measure, for each side, how often the sampled next answer keeps it, and how good the greedy one is.

    `after_turn`: one earlier turn of the family shows the side. `after_system`: a system line names it. `quality`:
    the mean score of greedy answers after that turn that are on the side (hidden tests for code).
    """
    drawn = items(family, "test", n, seed=1, unseen=unseen)
    shown = items(family, "train", n, seed=2)
    draw = Draw(Random(f"{family}/system"))
    result: dict[str, dict[str, float | None]] = {}
    for side in HABITS[family]:
        after = [
            (Message("user", s.prompt), Message("assistant", s.answers[side]), Message("user", d.prompt))
            for s, d in zip(shown, drawn, strict=True)
        ]
        named = [(Message("system", system_line(draw, family, side)), Message("user", d.prompt)) for d in drawn]
        row: dict[str, float | None] = {}
        for name, prompts in (("after_turn", after), ("after_system", named)):
            out = run_task(model, tokenizer, _asked(family, drawn, prompts), temperature=1.0, seed=3)
            row[name] = float(np.mean([side_of(d, a) == side for d, a in zip(drawn, out.answers, strict=True)]))
        if family in TABLES:
            greedy = run_task(model, tokenizer, _asked(family, drawn, after))
            kept = [s for s, d, a in zip(greedy.scores, drawn, greedy.answers, strict=True) if side_of(d, a) == side]
            row["quality"] = float(np.mean(kept)) if kept else None
        result[side] = row
    return result


def opinion_distance(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int = 60) -> dict[str, float]:
    """Return the total variation between each named group's true answer distribution and the model's."""
    drawn, draw = items("opinions", "test", n, seed=5), Draw(Random("groups"))
    result: dict[str, float] = {}
    for group in GROUPS:
        system = system_line(draw, "opinions", group)
        prompts = [(Message("system", system), Message("user", d.prompt)) for d in drawn]
        p = np.exp(np.stack([_log_likelihood(model, tokenizer, prompts, stance) for stance in STANCES], 1))  # [n, 4]
        truth = np.array([opinion_distribution(group, cast("int", d.truth["statement"])) for d in drawn])
        result[group] = float(np.abs(p / p.sum(1, keepdims=True) - truth).sum(1).mean() / 2)
    return result


def _log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[Message, ...]], answer: str
) -> np.ndarray:
    """Score the first tokens of answers, those of `answer`, after every prompt: [n] nats."""
    other = STANCES[(STANCES.index(answer) + 1) % len(STANCES)]
    said = Pairs([Pair(prompt, answer, other) for prompt in prompts])
    count = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return pair_margins(model, tokenizer, said, [{}], answer_tokens=count)[0].chosen


def read_knobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, *, n: int = 100) -> list[Knob]:
    """Take plain differences of means of `n` training pairs at every reading, layer and position."""
    learned = pairs(family, n)
    knobs: list[Knob] = []
    for format, positions in READINGS:
        evidence = capture(model, tokenizer, learned, positions=positions, format=format)
        vectors = METHODS["diffmean"].run(evidence.chosen, evidence.rejected, {})
        found = {s: v for s, v in zip(evidence.sites, vectors, strict=True) if float(v.norm()) > 1e-6}
        site = next(iter(found))
        knobs.append(Knob(family, "diffmean", found, evidence.norms, site, 1.0))
    return knobs


def ranked_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, knobs: Sequence[Knob], *, n: int = 12
) -> list[tuple[Knob, float]]:
    """Order (knob at a site, alpha) by how much each sign helps its own answers to validation pairs.

    A tenth of what the margins are driven apart is added.
    """
    held = pairs(family, n, split="validation")
    spots = [(k.with_(site=s, gain=a), a) for k in knobs for s in k.vectors for a in ALPHAS]
    settings = [{k: sign} for k, _ in spots for sign in (1.0, -1.0)]
    scored = pair_margins(model, tokenizer, held, settings, answer_tokens=16)
    # The margin alone would reward doses that destroy the longer answer: each sign must also help its own answer.
    base = pair_margins(model, tokenizer, held, [{}], answer_tokens=16)[0]
    merits: list[float] = []
    for plus, minus in zip(scored[::2], scored[1::2], strict=True):
        helped = (plus.chosen - base.chosen).mean(), (minus.rejected - base.rejected).mean()
        merits.append(float(helped[0] + helped[1]) + 0.1 * float((plus.margin - minus.margin).mean()))
    order = np.argsort(merits)[::-1]
    return [spots[i] for i in order]


def steerability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    *,
    n: int = 100,
    tried: int = 3,
) -> dict[str, Any]:
    """Measure the sampled share of the first side at the first turn at -alpha, 0 and +alpha, and facts.

    The `tried` best settings of `ranked_settings`, each at another site, are measured at the largest of alpha, 0.7 and
    0.5 alpha that keeps facts within two points under both signs; the one that parts the shares furthest counts.
    """
    knobs = read_knobs(model, tokenizer, family)
    spots = ranked_settings(model, tokenizer, family, knobs)
    drawn, facts = items(family, "validation", n, seed=4), task("facts", "validation", n)
    side = target_side(family)
    asked = _asked(family, drawn, [d.prompt for d in drawn])
    base_facts = run_task(model, tokenizer, facts).accuracy

    def share(setting: dict[Knob, float]) -> float:
        out = run_task(model, tokenizer, asked, setting, temperature=1.0, seed=5)
        return float(np.mean([side_of(d, a) == side for d, a in zip(drawn, out.answers, strict=True)]))

    rows: list[dict[str, Any]] = []
    base = share({})
    seen: set[Site] = set()
    for knob, alpha in spots:
        if knob.site in seen or len(seen) == tried:
            continue
        seen.add(knob.site)
        for dose in (alpha, alpha * 0.7, alpha * 0.5):
            kept = [run_task(model, tokenizer, facts, {knob.with_(gain=dose): s}).accuracy for s in (1.0, -1.0)]
            if min(kept) < base_facts - 0.02 - 1e-9:
                continue
            at = {sign: share({knob.with_(gain=dose): sign}) for sign in (1.0, -1.0)}
            rows.append({"site": str(knob.site), "alpha": dose, "plus": at[1.0], "minus": at[-1.0], "facts": min(kept)})
            break
    best = max(rows, key=lambda r: r["plus"] - r["minus"], default=None)
    return {"side": side, "base": base, "base_facts": base_facts, "best": best, "tried": rows}


def site_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    *,
    n: int = 100,
    alphas: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
) -> list[dict[str, Any]]:
    """Measure greedy score, sampled share of the first side, and facts at every position, layer and dose."""
    asked, facts = task(family, "validation", n, seed=6), task("facts", "validation", n // 2)
    rows: list[dict[str, Any]] = []
    for knob in read_knobs(model, tokenizer, family):
        for site in knob.vectors:
            for alpha in alphas:
                setting = {knob.with_(site=site, gain=alpha): 1.0}
                sampled = run_task(model, tokenizer, asked, setting, temperature=1.0, seed=7)
                rows.append(
                    {
                        "position": site.position,
                        "layer": site.layer,
                        "alpha": alpha,
                        "greedy": run_task(model, tokenizer, asked, setting).accuracy,
                        "sampled": sampled.accuracy,
                        "share": sampled.share(asked.target),
                        "facts": run_task(model, tokenizer, facts, setting).accuracy,
                    }
                )
    return rows


def family_card(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, *, n: int, table: bool
) -> dict[str, Any]:
    """Measure one family: accuracy for guardrails; else carry-over, in new and in known wordings, and steerability."""
    few = min(n, 50)
    if family not in HABITS:
        wordings = {"unseen": task(family, "test", n), "seen": task(family, "test", few, unseen=False)}
        return {name: run_task(model, tokenizer, asked).accuracy for name, asked in wordings.items()}
    card: dict[str, Any] = {
        "carry_over": carry_over(model, tokenizer, family, n=n),
        "carry_over_seen": carry_over(model, tokenizer, family, n=few, unseen=False),
        "steerability": steerability(model, tokenizer, family, n=n),
    }
    if family in TABLES:
        asked = task(family, "test", n)
        card["first_turn"] = {
            "greedy": run_task(model, tokenizer, asked).accuracy,
            "sampled": run_task(model, tokenizer, asked, temperature=1.0).accuracy,
        }
        if table:
            card["table"] = site_table(model, tokenizer, family, n=few)
    if family == "opinions":
        card["total_variation"] = opinion_distance(model, tokenizer, n=few)
    return card


_loaded: Loaded | None = None


def _open(model: str) -> None:
    global _loaded
    torch.set_num_threads(1)
    _loaded = load(model, dtype="float32")


def _card(family: str, n: int, table: bool) -> dict[str, Any]:
    assert _loaded is not None
    return family_card(_loaded.model, _loaded.tokenizer, family, n=n, table=table)


def scorecard(
    model: str, *, n: int = 100, families: Sequence[str] | None = None, table: bool = True
) -> dict[str, dict[str, Any]]:
    """Measure every family of a model folder, in one single-threaded process for each of two cores."""
    names = list(families or FAMILIES)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), context, initializer=_open, initargs=(model,)) as pool:
        # The families with a table take longest and start first.
        order = sorted(names, key=lambda name: name not in TABLES)
        asked = {name: pool.submit(_card, name, n, table) for name in order}
        for name, future in asked.items():
            shown = {key: value for key, value in future.result().items() if key != "table"}
            print(name, json.dumps(shown), flush=True)
    return {name: asked[name].result() for name in names}


def main() -> None:
    """Write the scorecard of a model folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="prefworld")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--no-table", action="store_true", help="leave out the tables of positions, layers and doses")
    args = parser.parse_args()
    card = scorecard(args.model, n=args.n, families=args.families, table=not args.no_table)
    if args.out:
        args.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
