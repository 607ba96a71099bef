"""What the released algorithm computes, on this model: rounding, half a pair, a scale; and what steering costs here."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.artifact import LookaheadKnob, LowRank
from trimtab.capture import capture_gradients, residual_norms
from trimtab.errors import KnobError
from trimtab.ops import cosine
from trimtab.render import Renderer
from trimtab.reproduce.bench import after
from trimtab.reproduce.cold_cells import Behaviours, Record
from trimtab.reproduce.cold_systems import ColdBench, candidate_layers, learned
from trimtab.runtime import steer
from trimtab.train.steps import learn_lookahead
from trimtab.types import Site

EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LOSSES = ("sft", "dpo:per=token")
"""Those of the released code, per token."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXTS, TOKENS, ROUNDS = 12, 24, 5


def facts(behaviours: Behaviours) -> Record:
    """Measure the released steps beside the exact derivative, its pair gradient beside ours, both back ends beside."""
    bench, name = behaviours.bench, next(iter(behaviours.validation))
    pairs, layer = behaviours.pairs(name, bench.sizes.pairs, 0), candidate_layers(bench)[-1]
    prompts = behaviours.validation[name].prompts[:TEXTS]
    renderer = Renderer(bench.tokenizer)
    texts = renderer.pad([renderer.prompt_ids(after((), prompt)) for prompt in prompts], side="right")
    inputs = {key: value.to(Adapter(bench.model).input_device) for key, value in texts._asdict().items()}
    real = texts.attention_mask.bool()
    steps: list[Record] = []
    agreement: dict[str, float] = {}
    for loss in LOSSES:
        knob = learn_lookahead(bench.model, bench.tokenizer, pairs, loss=loss, layers=[layer], rank=None)
        exact = _displaced(bench, knob, layer, inputs)[real]
        scaled = _displaced(bench, knob.with_(backend="scaled"), layer, inputs)[real]
        agreement[loss] = cosine(scaled.flatten(), exact.flatten())
        wanted = -exact * knob.scales[layer] / (knob.gain * knob.norms[layer])  # J G
        for dtype, epsilon in product(DTYPES, EPSILONS):
            found = _released(bench, knob, layer, inputs, real, wanted, DTYPES[dtype], epsilon)
            steps.append({"loss": loss, "dtype": dtype, "epsilon": epsilon, **found})
    return {"layer": layer, "steps": steps, "agreement": agreement, "kernel": _kernel(bench, behaviours, name, layer)}


def _displaced(bench: ColdBench, knob: LookaheadKnob, layer: int, inputs: Mapping[str, Tensor]) -> Tensor:
    adapter, found = Adapter(bench.model), list[Tensor]()
    for setting in ({}, {knob: 1.0}):
        with torch.no_grad(), steer(adapter, setting), adapter.read([layer]) as reading:
            bench.model(**inputs)
        found.append(reading.acts[layer].float().cpu())
    return found[1] - found[0]


def _released(
    bench: ColdBench,
    knob: LookaheadKnob,
    layer: int,
    inputs: Mapping[str, Tensor],
    real: Tensor,
    wanted: Tensor,
    dtype: torch.dtype,
    epsilon: float,
) -> Record:
    """Add epsilon G to a copy of the weights, rounded as they are stored, run both, subtract and divide."""
    plain = torch.nn.Module.to(copy.deepcopy(bench.model), dtype)
    moved = copy.deepcopy(plain)
    changed, count = 0, 0
    with torch.no_grad():
        for name, part in knob.parts.items():
            weight = moved.get_parameter(name)
            before = weight.clone()
            gradient = part.dense() if isinstance(part, LowRank) else part
            weight.copy_((weight.float() + epsilon * gradient.to(weight.device)).to(dtype))
            changed, count = changed + int((weight != before).sum()), count + weight.numel()
        found: list[Tensor] = []
        for model in (plain, moved):
            adapter = Adapter(model)
            with adapter.read([layer]) as reading:
                adapter.run_to(layer, **inputs)
            found.append(reading.acts[layer].float().cpu())
    difference = ((found[1] - found[0]) / epsilon)[real]
    row: Record = {"changed": changed / count, "cosine": cosine(difference.flatten(), wanted.flatten())}
    row["length"] = float(difference.norm() / wanted.norm())
    try:
        with steer(plain, {knob.with_(backend="scaled", step=epsilon): 1.0}):
            row["refused"] = False
    except KnobError as error:
        row["refused"] = str(error)
    return row


def _kernel(bench: ColdBench, behaviours: Behaviours, name: str, layer: int) -> Record:
    """Compare what is left of a pair's gradient where the second forward overwrites the first, and eta with norms."""
    pairs = behaviours.pairs(name, bench.sizes.pairs, 0)
    norm = residual_norms(bench.model, bench.tokenizer, pairs, [layer])[layer]
    found: Record = {}
    for loss in LOSSES:
        evidence = capture_gradients(bench.model, bench.tokenizer, pairs, loss=loss, layers=[layer])
        assert evidence.sites == (Site(layer, "last_prompt"),)
        total, first = evidence.gradients[:, 0].mean(0), evidence.first[:, 0].mean(0)
        found[loss] = {"share_of_norm_at_eta_1": float(total.norm()) / norm}
        if loss.startswith("dpo"):
            found[loss] |= {
                "cosine_of_rejected_side": cosine(total - first, total),
                "cosine_of_chosen_side": cosine(first, total),
            }
    return found


def speed(behaviours: Behaviours) -> Record:
    """Time decoding, token by token, of every way to steer beside the plain model: medians of interleaved rounds."""
    bench, name = behaviours.bench, next(iter(behaviours.validation))
    pairs, held = behaviours.pairs(name, bench.sizes.pairs, 0), behaviours.held(name)
    top = candidate_layers(bench)[-1]
    renderer, adapter = Renderer(bench.tokenizer), Adapter(bench.model)
    ids = torch.tensor(
        [renderer.prompt_ids(after((), behaviours.validation[name].prompts[0]))], device=adapter.input_device
    )
    ladders = {system: learned(bench, system, pairs, held, 0) for system in ("diffmean", "one-step", "cold-fd")}
    ways: dict[str, Any] = {"plain": {}}
    for system, ladder in ladders.items():
        ways[system] = ladder.at(ladder.sites[-1], ladder.doses[0]).knobs
    (ahead,) = ways["cold-fd"]
    ways["cold-fd-exact"] = {ahead.with_(backend="exact"): 1.0}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, setting in ways.items():
            with steer(bench.model, setting):
                spent = _decode(bench, ids)
            if turn:
                seconds[way].append(spent)
    plain = seconds["plain"]
    knob = ladders["cold-fd"].knob
    assert isinstance(knob, LookaheadKnob)
    blocks = adapter.n_layers
    return {
        "layer": top,
        "seconds_per_token": statistics.median(plain) / TOKENS,
        "ratios": {
            way: statistics.median(a / b for a, b in zip(own, plain, strict=True)) for way, own in seconds.items()
        },
        "of_steps": {"cold-fd": 1 + (top + 1) / blocks, "cold-fd-exact": 1 + 2 * (top + 1) / blocks},
        "knob_values": knob.pruned(Site(top, "lookahead")).described()["values"],
        "weights_of_a_copy": sum(bench.model.get_parameter(part).numel() for part in knob.parts),
    }


def _decode(bench: ColdBench, ids: Tensor) -> float:
    run: Any = bench.model.generate
    begun = time.perf_counter()
    run(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - begun
