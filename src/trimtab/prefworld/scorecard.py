"""Measure whether the habits of PrefWorld are there, are carried, and can be steered."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.artifact import Knob
from trimtab.capture import Format, capture
from trimtab.evals.likelihood import pair_margins
from trimtab.evals.tasks import Prompt, Task, run_task
from trimtab.methods import METHODS
from trimtab.pairs import Pairs
from trimtab.prefworld.families import FAMILIES, GUARDRAILS
from trimtab.prefworld.families.surveys import GROUPS, STANCES, opinion_distribution
from trimtab.prefworld.habits import HABITS, system_line
from trimtab.prefworld.items import Draw, Item
from trimtab.prefworld.world import MAX_NEW_TOKENS, grade, items, lead_stance, pairs, side_of, task
from trimtab.render import load
from trimtab.types import Message, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALPHAS = (0.15, 0.3, 0.5, 0.8, 1.2)
READINGS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("response_as_user", ("post_instruction",)),
    ("question_response", ("response_end", "demonstrated", "response_mean")),
)
GROUP = GROUPS[0]


def on_side(item: Item, text: str, side: str) -> bool:
    """Tell whether an answer is on a side; for opinions, whether it is the group's leading stance."""
    if item.family == "opinions":
        return text.strip() == lead_stance(side, item)
    return side_of(item, text) == side


def _asked(family: str, drawn: Sequence[Item], prompts: Sequence[Prompt]) -> Task:
    return Task(
        family, tuple(prompts), lambda answers: grade(drawn, answers), max_new_tokens=MAX_NEW_TOKENS.get(family, 64)
    )


def carry_over(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, *, n: int = 100, unseen: bool = False
) -> dict[str, dict[str, float]]:
    """Measure, for each side, how often the sampled next answer keeps it, and how good the greedy one is.

    `after_turn`: one earlier turn of the family shows the side. `after_system`: a system line names it. `quality`:
    the mean score of greedy answers after that turn that are on the side (hidden tests for code).
    """
    drawn = items(family, "test", n, seed=1, unseen=unseen)
    shown = items(family, "train", n, seed=2)
    draw = Draw(Random(f"{family}/system"))
    result: dict[str, dict[str, float]] = {}
    for side in HABITS[family]:
        after = [
            (Message("user", s.prompt), Message("assistant", s.answers[side]), Message("user", d.prompt))
            for s, d in zip(shown, drawn, strict=True)
        ]
        named = [(Message("system", system_line(draw, family, side)), Message("user", d.prompt)) for d in drawn]
        row: dict[str, float] = {}
        for name, prompts in (("after_turn", after), ("after_system", named)):
            out = run_task(model, tokenizer, _asked(family, drawn, prompts), temperature=1.0, seed=3)
            row[name] = float(np.mean([on_side(d, a, side) for d, a in zip(drawn, out.answers, strict=True)]))
        greedy = run_task(model, tokenizer, _asked(family, drawn, after))
        kept = [s for s, d, a in zip(greedy.scores, drawn, greedy.answers, strict=True) if on_side(d, a, side)]
        row["quality"] = float(np.mean(kept)) if kept else float("nan")
        result[side] = row
    return result


def opinion_distance(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int = 60) -> dict[str, float]:
    """Return the total variation between each named group's true answer distribution and the model's."""
    drawn, draw = items("opinions", "test", n, seed=5), Draw(Random("groups"))
    result: dict[str, float] = {}
    for group in GROUPS:
        system = system_line(draw, "opinions", group)
        prompts = [(Message("system", system), Message("user", d.prompt)) for d in drawn]
        scores = [pair_margins(model, tokenizer, _answers(prompts, stance), [{}])[0].chosen for stance in STANCES]
        p = np.exp(np.stack(scores, 1))  # [n, 4]
        truth = []
        for d in drawn:
            index = d.truth["statement"]
            assert isinstance(index, int)
            truth.append(opinion_distribution(group, index))
        result[group] = float(np.abs(p / p.sum(1, keepdims=True) - np.array(truth)).sum(1).mean() / 2)
    return result


def _answers(prompts: Sequence[tuple[Message, ...]], answer: str) -> Pairs:
    other = STANCES[(STANCES.index(answer) + 1) % len(STANCES)]
    records = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in p],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": other}],
        }
        for p in prompts
    ]
    return Pairs.from_records(records, duplicates="keep")


def read_knobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, *, n: int = 100) -> list[Knob]:
    """Take plain differences of means of `n` training pairs at every reading, layer and position."""
    sides = (GROUP, GROUPS[3]) if family == "opinions" else None
    # Groups may agree by chance; more items are drawn than are kept.
    learned = pairs(family, n * 2 if sides else n, sides=sides)[:n]
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
    """Order (knob at a site, alpha) by how far +alpha and -alpha drive the margin of validation pairs apart."""
    sides = (GROUP, GROUPS[3]) if family == "opinions" else None
    held = pairs(family, n, split="validation", sides=sides)
    spots = [(k.with_(site=s, gain=a), a) for k in knobs for s in k.vectors for a in ALPHAS]
    settings = [{k: sign} for k, _ in spots for sign in (1.0, -1.0)]
    scored = pair_margins(model, tokenizer, held, settings, answer_tokens=16)
    # The margin alone would reward doses that destroy the longer answer: each sign must also help its own answer.
    base = pair_margins(model, tokenizer, held, [{}], answer_tokens=16)[0]
    gains = []
    for plus, minus in zip(scored[::2], scored[1::2], strict=True):
        helped = (plus.chosen - base.chosen).mean(), (minus.rejected - base.rejected).mean()
        gains.append(float(helped[0] + helped[1]) + 0.1 * float((plus.margin - minus.margin).mean()))
    order = np.argsort(gains)[::-1]
    return [spots[i] for i in order]


def steerability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    *,
    n: int = 100,
    tried: int = 3,
) -> dict[str, Any]:
    """Measure the sampled share of the first side at the first turn at -alpha, 0 and +alpha, and facts at +alpha.

    The `tried` best settings of `ranked_settings`, each at another site, are measured; the best that keeps facts
    within two points counts.
    """
    knobs = read_knobs(model, tokenizer, family)
    spots = ranked_settings(model, tokenizer, family, knobs)
    drawn, facts = items(family, "validation", n, seed=4), task("facts", "validation", n)
    side = GROUP if family == "opinions" else next(iter(drawn[0].answers))
    asked = _asked(family, drawn, [d.prompt for d in drawn])
    base_facts = run_task(model, tokenizer, facts).accuracy

    def share(setting: dict[Knob, float]) -> float:
        out = run_task(model, tokenizer, asked, setting, temperature=1.0, seed=5)
        return float(np.mean([on_side(d, a, side) for d, a in zip(drawn, out.answers, strict=True)]))

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
    alphas: Sequence[float] = (0.25, 0.5, 1.0),
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


def scorecard(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int = 100, families: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure quality, carry-over and steerability of every family, seen and unseen wordings beside each other."""
    card: dict[str, Any] = {"n": n, "guardrails": {}, "first_turn": {}, "carry_over": {}, "steerability": {}}
    chosen = list(families or FAMILIES)
    for family in (*GUARDRAILS, "sums"):
        card["guardrails"][family] = {
            "seen": run_task(model, tokenizer, task(family, "test", n)).accuracy,
            "unseen": run_task(model, tokenizer, task(family, "test", min(n, 30), unseen=True)).accuracy,
        }
    for family in (f for f in chosen if f in HABITS):
        if family in ("math", "code"):
            card["first_turn"][family] = {
                "greedy": run_task(model, tokenizer, task(family, "test", n)).accuracy,
                "sampled": run_task(model, tokenizer, task(family, "test", n), temperature=1.0).accuracy,
            }
        card["carry_over"][family] = carry_over(model, tokenizer, family, n=n)
        if family in ("math", "code", "helpful", "harmless"):
            card["carry_over"][family + " (unseen wordings)"] = carry_over(model, tokenizer, family, n=n, unseen=True)
        card["steerability"][family] = steerability(model, tokenizer, family, n=n)
        print(
            family,
            json.dumps({k: card[k].get(family) for k in ("first_turn", "carry_over", "steerability")}),
            flush=True,
        )
    if "opinions" in chosen:
        card["opinion_distance"] = opinion_distance(model, tokenizer)
    return card


def main() -> None:
    """Write the scorecard of a model folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="prefworld")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--table", nargs="*", default=[], help="families whose table of sites is measured too")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    card = scorecard(model, tokenizer, n=args.n, families=args.families)
    card["tables"] = {family: site_table(model, tokenizer, family, n=args.n) for family in args.table}
    print(json.dumps({k: v for k, v in card.items() if k != "tables"}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
