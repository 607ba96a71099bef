"""Measure on validation items what a control gains: which tokens are steered, and what shuffled pairs keep of a knob.

Prints two tables in Markdown, in a minute or two: scores of the maths and code knobs by steered tokens beside the best
of several random directions, and the standard deviation of the cosine between a knob and vectors of shuffled pairs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping

import torch

from trimtab.artifact import Knob
from trimtab.capture import capture
from trimtab.errors import TrimtabWarning
from trimtab.evals.tasks import run_task
from trimtab.learn import learn
from trimtab.ops import cosine, mean_difference
from trimtab.prefworld import world
from trimtab.render import load
from trimtab.types import WHERE, Site

SITES = {"math": Site(4, "demonstrated"), "code": Site(3, "post_instruction[-2]")}
SHUFFLES = 200


def doses(knob: Knob, alpha: float) -> Mapping[str, Mapping[Knob, float]]:
    """Return a setting for each choice of tokens; the last token alone is the prompt less the context."""
    turned = {where: knob.with_(where=where, gain=alpha) for where in WHERE}
    return {where: {knob: 1.0} for where, knob in turned.items()} | {
        "last prompt token": {turned["prompt"]: 1.0, turned["context"]: -1.0}
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=0.4)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--draws", type=int, default=5, help="random directions")
    args = parser.parse_args()
    warnings.simplefilter("ignore", TrimtabWarning)
    model, tokenizer = load("prefworld", dtype="float32")
    print("| family, site | steers | bare | knob | best random |\n|---|---|---|---|---|")
    shuffled: list[str] = []
    for family, site in SITES.items():
        pairs = world.pairs(family, seed=args.seed)
        knob = learn(model, tokenizer, pairs, name=family, site=site, selection="fixed", options={"equal_weight": True})
        task = world.task(family, "validation", args.items, seed=args.seed)
        bare = run_task(model, tokenizer, task).accuracy
        drawn = [
            Knob(
                family,
                "random",
                {site: torch.randn(knob.width, generator=torch.Generator().manual_seed(draw))},
                knob.norms,
                site,
                1.0,
            )
            for draw in range(args.draws)
        ]
        for where, dose in doses(knob, args.alpha).items():
            score = run_task(model, tokenizer, task, dose).accuracy
            best = max(run_task(model, tokenizer, task, doses(r, args.alpha)[where]).accuracy for r in drawn)
            print(f"| {family}, {site} | {where} | {bare:.2f} | {score:.2f} | {best:.2f} |", flush=True)
        read = capture(
            model, tokenizer, pairs, positions=[site.position], layers=[site.layer], format="response_as_user"
        )
        for equal in (False, True):
            truth = mean_difference(read.chosen, read.rejected, equal_weight=equal)[0]
            cosines: list[float] = []
            for seed in range(SHUFFLES):
                order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
                swap = (order < len(pairs) // 2)[:, None, None]
                sides = torch.where(swap, read.rejected, read.chosen), torch.where(swap, read.chosen, read.rejected)
                cosines.append(cosine(mean_difference(*sides, equal_weight=equal)[0], truth))
            plain = mean_difference(read.chosen, read.rejected)[0]
            spread = torch.tensor(cosines).std()
            shuffled.append(f"| {family}, {site} | {equal} | {cosine(plain, truth):.3f} | {spread:.2f} |")
    print("\n| family, site | equal weight | cosine to the plain mean | sd of the cosine of shuffled pairs |")
    print("|---|---|---|---|", *shuffled, sep="\n")


if __name__ == "__main__":
    main()
