"""What steering costs: decode tokens per second with and without knobs, interleaved in one run, as ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.artifact import Knob
from trimtab.runtime import steer
from trimtab.types import Site

LAYERS, WIDTH = 8, 512


def knob(layer: int, width: int) -> Knob:
    """Make a knob with a random direction at a small dose."""
    site = Site(layer, "last")
    return Knob(f"random{layer}", "random", {site: torch.randn(width)}, {layer: 1.0}, site, 1e-3)


def main() -> None:
    """Print the median ratio of steered to plain decoding time for each way of steering."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=WIDTH, intermediate_size=1408, num_hidden_layers=LAYERS, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 4096, (args.rows, 32))
    knobs = [knob(layer, WIDTH) for layer in range(0, LAYERS, 2)]
    all_rows = dict.fromkeys(knobs, 1.0)
    by_row = [{knobs[row % len(knobs)]: 1.0 + row / 10} for row in range(args.rows)]
    ways = {"plain": {}, "strength 0": dict.fromkeys(knobs, 0.0), "4 layers": all_rows, "a setting per row": by_row}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds + 1):
        for name, settings in ways.items():
            with steer(model, settings):
                begun = time.process_time()
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=args.tokens,
                    min_new_tokens=args.tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
                seconds[name].append(time.process_time() - begun)
    plain = seconds["plain"][1:]  # the first round warms up
    ratios = {n: statistics.median(a / b for a, b in zip(s[1:], plain, strict=True)) for n, s in seconds.items()}
    print(json.dumps({"rows": args.rows, "tokens": args.tokens, "ratio of CPU time to plain": ratios}, indent=1))


if __name__ == "__main__":
    main()
