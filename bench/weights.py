"""What weight knobs cost, as ratios of medians from interleaved runs.

Dense: putting a difference in place and taking it out again, beside copying the weights that it touches twice. Low
rank: generation under a strength per row, beside the plain model's and beside directions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.artifact import DeltaKnob, Knob, LowRank
from trimtab.runtime import steer
from trimtab.types import Site
from trimtab.weights.live import applied


def model(width: int, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make a random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=8
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def low_rank(lm: LlamaForCausalLM, rank: int, name: str) -> DeltaKnob:
    """Make a random difference of a rank on every linear layer of the blocks."""
    parts: dict[str, Any] = {
        label: LowRank(1e-3 * torch.randn(rank, p.shape[1]), 1e-3 * torch.randn(p.shape[0], rank))
        for label, p in lm.named_parameters()
        if label.endswith("_proj.weight")
    }
    return DeltaKnob(name, "random", parts)


def interleaved(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every way once a round, and drop the first round, which warms up; each returns its seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            seconds[name].append(run())
    return {name: taken[1:] for name, taken in seconds.items()}


def ratio(taken: list[float], plain: list[float]) -> float:
    """Return the median ratio of two ways, round by round."""
    return round(statistics.median(a / b for a, b in zip(taken, plain, strict=True)), 3)


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Return what runs it and says how long it took."""

    def measured() -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    return measured


def dense(width: int, layers: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Compare apply and undo with two copies, and check that the bits are those from before."""
    lm = model(width, layers, dtype)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    knobs = [
        DeltaKnob(name, "random", {label: (1e-3 * torch.randn(p.shape)).to(dtype) for label, p in before.items()})
        for name in ("one", "two")
    ]

    def turn(setting: Mapping[DeltaKnob, float]) -> None:
        with applied(lm, setting):
            pass

    def copy() -> None:
        for _ in range(2):
            _held = [p.clone() for p in before.values()]  # all at once, as whoever puts them back has to hold them

    ways = {
        "two copies": timed(copy),
        "one knob": timed(lambda: turn({knobs[0]: 0.5})),
        "two knobs": timed(lambda: turn(dict.fromkeys(knobs, 0.5))),
    }
    seconds = interleaved(ways, rounds)
    same = all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    size = sum(p.numel() * p.element_size() for p in before.values())
    ratios = {name: ratio(taken, seconds["two copies"]) for name, taken in seconds.items()}
    return {"dtype": str(dtype), "MB": size >> 20, "ratio to two copies": ratios, "undone bit for bit": same}


def rows(width: int, layers: int, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Compare generation under a strength per row with the plain model's."""
    lm = model(width, layers, torch.float32)
    ids = torch.randint(3, 4096, (batch, 32))
    site = Site(layers // 2, "last")
    way = Knob("way", "random", {site: torch.randn(width)}, {site.layer: 1.0}, site, 1e-3)
    settings: dict[str, Any] = {"plain": {}, "a direction": [{way: 1 + row / 10} for row in range(batch)]}
    for count, rank in ((1, 8), (1, 32), (4, 8)):
        knobs = [low_rank(lm, rank, f"k{i}") for i in range(count)]
        name = f"{count} knob{'s' * (count > 1)} of rank {rank}"
        settings[name] = [{knobs[row % count]: 1 + row / 10} for row in range(batch)]

    def run(setting: Any) -> Callable[[], float]:
        def measured() -> float:
            with steer(lm, setting):
                return timed(
                    lambda: lm.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=tokens,
                        min_new_tokens=tokens,
                        do_sample=False,
                        pad_token_id=0,
                    )
                )()

        return measured

    seconds = interleaved({name: run(setting) for name, setting in settings.items()}, rounds)
    return {
        "rows": batch,
        "tokens": tokens,
        "ratio to plain": {n: ratio(s, seconds["plain"]) for n, s in seconds.items()},
    }


def main() -> None:
    """Print both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    kinds = (torch.float32, torch.bfloat16)
    found = {
        "dense": [dense(args.width, args.layers, dtype, args.rounds) for dtype in kinds],
        "low rank, a strength per row": [
            rows(args.width // 2, args.layers, batch, args.tokens, args.rounds) for batch in (1, 8, 32)
        ],
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
