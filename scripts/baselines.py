"""Train the baselines of Preference Vectors on PrefWorld and measure them on validation items, as rows of Markdown.

    python scripts/baselines.py                      all of them
    python scripts/baselines.py bfpo reward-soup     some of them

Of each: the share of full answers to benign requests and of refusals of harmful ones, sampled and greedy, facts known,
and the processor seconds of what was trained for it. One rate and one beta for all, no grid: see docs/baselines.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache

from transformers import PreTrainedModel

from trimtab.artifact.delta import DeltaKnob
from trimtab.evals.tasks import run_task
from trimtab.pairs import Pairs
from trimtab.prefworld import world
from trimtab.render import load
from trimtab.train import Loss, train
from trimtab.train.labels import relabel
from trimtab.train.rewards import Method, reinforce, task_reward
from trimtab.train.soup import soup
from trimtab.weights.delta import difference
from trimtab.weights.live import applied

FAMILIES = ("helpful", "harmless")
PAIRS, HELD, PROMPTS, MEASURED = 100, 30, 200, 100
RATES = {"pairs": 3e-5, "rewards": 1e-4}
BETA = 0.1
STEPS = 40

MODEL, TOKENIZER = load("prefworld")
SECONDS: dict[str, float] = {}
"""Processor seconds of each training."""


@cache
def pairs(split: world.Split, by: str) -> Pairs:
    """Draw pairs of both families, or of one, and put their answers in the order of a label or of the family."""
    size = PAIRS if split == "train" else HELD
    both = {family: world.pairs(family, size, split=split) for family in FAMILIES}
    if by in both:
        return both[by]
    joint = both["helpful"] + both["harmless"]
    return joint if by == "joint" else relabel(relabel(joint, "helpful"), by)  # pyright: ignore[reportArgumentType]


@cache
def trained(loss: Loss, by: str) -> PreTrainedModel:
    """Train on pairs in the order of `by`."""
    begun = time.process_time()
    made = train(
        MODEL,
        TOKENIZER,
        pairs("train", by),
        loss=loss,
        validation=pairs("validation", by),
        learning_rates=(RATES["pairs"],),
        betas=(BETA,),
    ).model
    SECONDS[f"{loss} {by}"] = time.process_time() - begun
    return made


@cache
def rewarded(family: str, method: Method = "rloo") -> PreTrainedModel:
    """Train on a family's exact grader."""
    begun = time.process_time()
    tasks = world.task(family, "train", PROMPTS), world.task(family, "validation", 60)
    made = reinforce(
        MODEL,
        TOKENIZER,
        tasks[0].prompts,
        task_reward(*tasks),
        method=method,
        validation=tasks[1].prompts,
        learning_rate=RATES["rewards"],
        steps=STEPS,
        answers=4,
        max_new_tokens=tasks[0].max_new_tokens,
    ).model
    SECONDS[f"{method} {family}"] = time.process_time() - begun
    return made


def mixed(makes: Callable[[str], PreTrainedModel], name: str) -> DeltaKnob:
    """Average the models that are made for each family."""
    return soup([difference(makes(family), MODEL, name=family) for family in FAMILIES], name=name)


BASELINES: dict[str, Callable[[], PreTrainedModel | DeltaKnob]] = {
    "base": lambda: MODEL,
    "dpo-helpful": lambda: trained("dpo", "helpful"),
    "dpo-harmless": lambda: trained("dpo", "harmless"),
    "joint-dpo": lambda: trained("dpo", "joint"),
    "dpo-safe-first": lambda: trained("dpo", "safe-first"),
    "bfpo": lambda: trained("bfpo", "joint"),
    "dpo-soup": lambda: mixed(lambda family: trained("dpo", family), "dpo-soup"),
    "rloo-helpful": lambda: rewarded("helpful"),
    "rloo-harmless": lambda: rewarded("harmless"),
    "reward-soup": lambda: mixed(rewarded, "reward-soup"),
    "grpo-helpful": lambda: rewarded("helpful", "grpo"),
    "grpo-harmless": lambda: rewarded("harmless", "grpo"),
}


def rates(model: PreTrainedModel) -> list[float]:
    """Return the shares on validation items: help sampled and greedy, refusals sampled and greedy, facts greedy."""
    asked = [(family, temperature) for family in FAMILIES for temperature in (1.0, 0.0)] + [("facts", 0.0)]
    return [
        run_task(model, TOKENIZER, world.task(family, "validation", MEASURED), temperature=temperature).accuracy
        for family, temperature in asked
    ]


def main() -> None:
    """Print a row for each baseline that is named, as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="BASELINE", help=f"of {', '.join(BASELINES)} (default: all)")
    for kind, rate in RATES.items():
        parser.add_argument(f"--{kind}-rate", type=float, default=rate, metavar="X", help=f"default {rate:g}")
    args = parser.parse_args()
    RATES.update(pairs=args.pairs_rate, rewards=args.rewards_rate)
    names = args.names or list(BASELINES)
    for name in names:
        if name not in BASELINES:
            parser.error(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    print("| baseline | full answers | greedy | refusals | greedy | facts | seconds |\n|---|---|---|---|---|---|---|")
    for name in names:
        before = dict(SECONDS)
        made = BASELINES[name]()
        if isinstance(made, DeltaKnob):
            with applied(MODEL, {made: 1.0}):
                cells = rates(MODEL)
        else:
            cells = rates(made)
        took = sum(SECONDS.values()) - sum(before.values())
        shown = " | ".join(f"{cell:.2f}".removeprefix("0") for cell in cells)
        print(f"| {name} | {shown} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
