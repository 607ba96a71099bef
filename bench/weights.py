"""What weight knobs cost: dense ones to put in and take out, low-rank ones row by row, as ratios within one run.

Dense: seconds to put a knob into the weights and take it out again, over seconds to copy the touched weights once (a
clone); at most 2 is wanted. Low rank: seconds of steered over plain model, every row with a mixture of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.artifact import DeltaKnob, Knob, LowRank
from trimtab.artifact.parts import Part
from trimtab.runtime import Dose, steer
from trimtab.types import Site
from trimtab.weights.live import applied

VOCABULARY, PROMPT, NEW, PREFILL = 4096, 4, 16, 32


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """Make a random model; a block has about 17 width^2 weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    return LlamaForCausalLM(config).eval()


def weight_knob(model: nn.Module, make: Callable[[torch.Size], Part], name: str) -> DeltaKnob:
    """Make a random knob on every matrix of the blocks."""
    matrices = {n: p.shape for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
    return DeltaKnob(name, "random", {n: make(shape) for n, shape in matrices.items()})


def low_rank(rank: int) -> Callable[[torch.Size], Part]:
    """Return what makes a small random part of a rank."""
    return lambda shape: LowRank(0.01 * torch.randn(rank, shape[1]), 0.01 * torch.randn(shape[0], rank))


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def ratios(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, float]:
    """Return the median over rounds of each way's time over that of the way `to`, of the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(own, seconds[to], strict=True)) for name, own in seconds.items()
    }


def dense(width: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Time putting dense knobs in and out, for weights and differences of two dtypes."""
    rows: list[dict[str, Any]] = []
    for dtype, stored in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ):
        model = llama(width, layers).to(dtype)
        knob = weight_knob(model, lambda shape, stored=stored: (0.01 * torch.randn(shape)).to(stored), "dense")
        touched = [model.get_parameter(name).detach() for name in knob.parts]
        before = [weight.clone() for weight in touched]
        for memory, forget in (("fresh", fresh_memory), ("used before", lambda: None)):
            seconds: dict[str, list[float]] = {"copy": [], "apply": [], "undo": [], "apply and undo": []}
            for turn in range(rounds + 1):
                forget()
                copy = timed(lambda touched=touched: [weight.clone() for weight in touched])
                forget()
                context = applied(model, {knob: 0.7})
                there = timed(context.__enter__)
                back = timed(lambda context=context: context.__exit__(None, None, None))
                if turn:  # the first round warms up
                    for name, value in zip(seconds, (copy, there, back, there + back), strict=True):
                        seconds[name].append(value)
            rows.append(
                {
                    "weights": str(dtype)[6:],
                    "difference": str(stored)[6:],
                    "memory": memory,
                    "millions": sum(weight.numel() for weight in touched) / 1e6,
                    "copy, seconds": statistics.median(seconds["copy"]),
                    **{name: ratio for name, ratio in ratios(seconds, "copy").items() if name != "copy"},
                }
            )
        if not all(torch.equal(model.get_parameter(n), b) for n, b in zip(knob.parts, before, strict=True)):
            raise SystemExit("The weights did not come back bit for bit.")
    return rows


def fresh_memory() -> None:
    """Give freed memory back, so that what comes next gets pages it has not used, as at its first time."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def by_row(width: int, layers: int, rounds: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Time prefill and decoding of batches whose rows all have another mixture of low-rank knobs."""
    model = llama(width, layers)
    way = [
        Knob(f"way{i}", "random", {Site(i, "last"): torch.randn(width)}, {i: 1.0}, Site(i, "last"), 1e-3)
        for i in range(layers)
    ]
    knobs = {
        f"{count} of rank {rank}": [weight_knob(model, low_rank(rank), f"k{i}") for i in range(count)]
        for count in (1, 4)
        for rank in (8, 16, 64)
    }
    rows: list[dict[str, Any]] = []
    for size in sizes:
        ways: dict[str, list[Dose]] = {"plain": [{}] * size}
        for name, own in {"steering": way, **knobs}.items():
            ways[name] = [{knob: 0.5 + row / size + i for i, knob in enumerate(own)} for row in range(size)]
        for stage in ("prefill", "decode"):
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(rounds + 1):
                for name, settings in ways.items():
                    with steer(model, settings), torch.inference_mode():
                        spent = timed(lambda stage=stage, size=size: run(model, stage, size))
                    if turn:
                        seconds[name].append(spent)
            plain, steered = ratios(seconds, "plain"), ratios(seconds, "steering")
            for name in knobs:
                rows.append(
                    {
                        "stage": stage,
                        "rows": size,
                        "knobs": name,
                        "steering / plain": plain["steering"],
                        "weights / plain": plain[name],
                        "weights / steering": steered[name],
                    }
                )
    return rows


def run(model: LlamaForCausalLM, stage: str, size: int) -> None:
    """Read a prompt, or decode from a short one."""
    ids = torch.arange(size * PREFILL).reshape(size, PREFILL) % (VOCABULARY - 3) + 3
    if stage == "prefill":
        model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
        return
    ids = ids[:, :PROMPT]
    limits = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **limits)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows as aligned columns."""
    cells = [[*rows[0]], *([f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="each measures every way once (default 5)")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: shows that all runs")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file too")
    args = parser.parse_args()
    torch.manual_seed(0)
    rounds = min(args.rounds, 2) if args.quick else args.rounds
    found = {
        "dense": dense(*((256, 4) if args.quick else (1024, 16)), rounds),
        "by row": by_row(*((256, 2, rounds, (1, 8)) if args.quick else (1024, 2, rounds, (1, 8, 32)))),
    }
    threads = torch.get_num_threads()
    print(f"Dense knobs, in copies of the touched weights ({threads} threads)\n{table(found['dense'])}\n")
    print(f"Low-rank knobs, another mixture in every row ({threads} threads)\n{table(found['by row'])}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"threads": threads, "rounds": rounds, **found}, file, indent=1)


if __name__ == "__main__":
    main()
