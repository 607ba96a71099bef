"""Whether a mixed batch comes out as each request does alone: tried on every model before it serves anybody.

A model whose layers keep states of their own, mix tokens, or take their positions from elsewhere would answer wrongly,
and nothing else would say so; nor would a version of transformers in which a seam means something else.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from trimtab.adapter import Adapter
from trimtab.artifact import Knob
from trimtab.engines.continuous.requests import Request, Sampling, Step
from trimtab.engines.slots import Plan, knob_digest, plan_request
from trimtab.errors import AdapterError, EngineError
from trimtab.runtime import steer
from trimtab.types import Site, Where

NEW = 3
"""Tokens that each request of the trial makes."""
LENGTHS = (5, 9, 7)
CLOSE = {torch.float32: 0.02, torch.float64: 0.02}
"""By how much a log-probability may differ in these dtypes, for the order of sums; by `ROUGH` in others."""
ROUGH = 0.5


class Expected(NamedTuple):
    """A request of the trial, and what plain transformers makes of it."""

    request: Request
    plan: Plan | None
    tokens: list[int]
    logprobs: list[float]
    leads: list[float]
    """By how much each token is likelier than the next one."""


def expectations(adapter: Adapter) -> list[Expected]:
    """Run three requests by themselves: one bare, one steered throughout, one steered from its last prompt token on."""
    middle = adapter.n_layers // 2
    generator = torch.Generator().manual_seed(0)
    rows = adapter.vocabulary or 2
    prompts = [torch.randint(rows, (length,), generator=generator).tolist() for length in LENGTHS]
    vector = torch.randn(adapter.hidden_size, generator=generator)
    with torch.no_grad(), adapter.read([middle]) as reading:
        adapter.run_to(middle, input_ids=_row(adapter, prompts[0]))
    norm = float(reading.acts[middle][0].float().norm(dim=-1).mean())
    wheres: list[Where | None] = [None, "all", "completion"]
    found: list[Expected] = []
    for prompt, where in zip(prompts, wheres, strict=True):
        site = Site(middle, "last")
        knob = None
        if where is not None:
            knob = Knob("trial", "random", {site: vector}, {middle: norm}, site, gain=1.0, where=where)
        found.append(_alone(adapter, prompt, knob))
    return found


def _row(adapter: Adapter, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(ids)], device=adapter.input_device)


def _alone(adapter: Adapter, prompt: list[int], knob: Knob | None) -> Expected:
    dose: Mapping[Knob, float] = {} if knob is None else {knob: 1.0}
    ids, logprobs, leads = list(prompt), [], []
    with torch.no_grad(), steer(adapter, dose, prompt_lengths=[len(prompt)]):
        for _ in range(NEW):
            logits = adapter.model(input_ids=_row(adapter, ids), use_cache=False).logits[0, -1]
            best = logits.float().log_softmax(-1).topk(2)
            ids.append(int(best.indices[0]))
            logprobs.append(float(best.values[0]))
            leads.append(float(best.values[0] - best.values[1]))
    plan = None if knob is None else plan_request({knob_digest(knob): (knob, 1.0)}, adapter.dtype)
    request = Request(prompt, NEW, sampling=Sampling(logprobs=0))
    return Expected(request, plan, ids[len(prompt) :], logprobs, leads)


def compare(
    adapter: Adapter,
    expected: Sequence[Expected],
    run: Callable[[Request, Plan | None, Callable[[Step], None]], object],
    *,
    seconds: float = 600,
) -> None:
    """Run the same requests together, by `run`, and raise `AdapterError` where one comes out otherwise."""
    close = CLOSE.get(adapter.dtype, ROUGH)
    steps: list[queue.SimpleQueue[Step]] = [queue.SimpleQueue() for _ in expected]
    for one, box in zip(expected, steps, strict=True):
        try:
            run(one.request, one.plan, box.put)
        except EngineError:  # the one before has ended the loop
            raise _differs(adapter, math.inf) from None
    for one, box in zip(expected, steps, strict=True):
        for token, logprob, lead in zip(one.tokens, one.logprobs, one.leads, strict=True):
            try:
                made = box.get(timeout=seconds).token
            except queue.Empty:
                raise _differs(adapter, math.inf) from None
            off = math.inf if made is None or made.logprob is None else abs(made.logprob - logprob)
            if off <= close and made is not None and made.id != token and lead <= close:
                break  # two tokens as likely as each other: from here on the texts differ by rights
            if not off <= close or made is None or made.id != token:
                raise _differs(adapter, off)


def _differs(adapter: Adapter, off: float) -> AdapterError:
    what = "fails on" if math.isinf(off) else f"puts a log-probability off by {off:.2g} on"
    return AdapterError(
        f"transformers' continuous batching {what} this {type(adapter.model).__name__}, where a batch of three "
        "requests was compared with each by itself. Use trimtab.generate, or the engine 'vllm'."
    )
