"""Lookahead knobs: the model and a second stream beside it, and the algorithm that was released for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.models import model_of, prompts
from benchmarks.ways import Action, Way
from trimtab.adapter import Adapter, parameters_to
from trimtab.artifact import DeltaKnob, LookaheadKnob, LowRank
from trimtab.artifact.parts import Part
from trimtab.runtime import steer

Backend = Literal["exact", "scaled"]
Turned = Callable[[], AbstractContextManager[object]]

ETA, EPS = 0.01, 1e-6
"""Of the released configuration."""
RANK = 16
BACKENDS: tuple[Backend, ...] = ("scaled", "exact")


def random_part(shape: Sequence[int], rank: int) -> Part:
    """Make a small part: whole for a vector, thin for a matrix."""
    if len(shape) == 1:
        return 0.01 * torch.randn(*shape)
    return LowRank(0.01 * torch.randn(rank, shape[1]), 0.01 * torch.randn(shape[0], rank))


def knob_of(model: LlamaForCausalLM, site: int, rank: int, backend: Backend) -> LookaheadKnob:
    """Make a knob with a random gradient of all that comes before the output of block `site`."""
    adapter = Adapter(model)
    parts = {name: random_part(model.get_parameter(name).shape, rank) for name in parameters_to(adapter, site).names}
    one = {site: 1.0}
    return LookaheadKnob("bench", "cold-fd", parts, one, one, (site,), adapter.path, 1e-3, backend=backend)


def one_step(model: LlamaForCausalLM, rank: int) -> DeltaKnob:
    """Make a random step of every linear layer."""
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return DeltaKnob("step", "one-step", {n: random_part(model.get_parameter(n).shape, rank) for n in linear}, 1e-3)


@contextmanager
def as_released(model: LlamaForCausalLM, other: LlamaForCausalLM, site: int, whole: bool) -> Generator[None]:
    """Steer as the released code does: in the hook of a block, all of a second model runs, without a KV cache.

    It runs on the tokens of the call; with `whole`, on all tokens so far, without which it knows nothing of the past.
    """
    ids: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new = kwargs["input_ids"]
        past = ids.pop() if whole and ids and new.shape[1] == 1 else new[:, :0]
        ids[:] = [torch.cat([past, new], 1)]

    def move(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen: list[Any] = []
        handle = other.model.layers[site].register_forward_hook(lambda _m, _a, out: seen.append(out))
        other(input_ids=ids[0], use_cache=False)
        handle.remove()
        return output - ETA / EPS * (seen[0][:, -output.shape[1] :] - output)

    handles = [
        model.model.register_forward_pre_hook(note, with_kwargs=True),
        model.model.layers[site].register_forward_hook(move),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def running(model: LlamaForCausalLM, turned: Turned, options: dict[str, Any]) -> Way:
    """Decode tokens after a prompt that is read beforehand, or, where none are to be decoded, read the prompt."""
    rows, prompt, new = options["rows"], options["prompt"], options["new"]
    ids = prompts(rows, prompt + new, options["device"])

    @contextmanager
    def ready() -> Generator[Action]:
        with turned(), torch.inference_mode():
            cache = DynamicCache(config=model.config)
            if not new:
                yield lambda: model(input_ids=ids, past_key_values=cache, use_cache=True) and None
                return
            model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
            yield lambda: decode(cache)

    def decode(cache: DynamicCache) -> None:
        for column in range(prompt, prompt + new):
            model(input_ids=ids[:, column : column + 1], past_key_values=cache, use_cache=True)

    return ready


def name_of(backend: Backend, site: int, rank: int = RANK) -> str:
    """Name a way."""
    return f"{backend}, layer {site}, rank {rank}"


def lookaheads(options: dict[str, Any]) -> dict[str, Way]:
    """Turn a lookahead knob with a random gradient up to a layer; and take such a step itself, without the stream."""
    torch.manual_seed(0)
    model = model_of(options)
    kinds = [(backend, site, RANK) for site in options["sites"] for backend in BACKENDS]
    kinds.append(("scaled", options["sites"][0], 4 * RANK))
    turned: dict[str, Turned] = {"plain": partial(steer, model, {})}
    for backend, site, rank in kinds:
        turned[name_of(backend, site, rank)] = partial(steer, model, {knob_of(model, site, rank, backend): 1.0})
    turned["the step taken, rank 16"] = partial(steer, model, {one_step(model, RANK): 1.0})
    return {name: running(model, way, options) for name, way in turned.items()}


def released(options: dict[str, Any]) -> dict[str, Way]:
    """Decode after a longer text by the released algorithm, which has no KV cache for its second model, and by ours."""
    torch.manual_seed(0)
    model, site = model_of(options), options["sites"][0]
    other = copy.deepcopy(model)
    turned: dict[str, Turned] = {"plain": partial(steer, model, {})}
    for backend in BACKENDS:
        turned[name_of(backend, site)] = partial(steer, model, {knob_of(model, site, RANK, backend): 1.0})
    turned["released, all tokens so far"] = partial(as_released, model, other, site, True)
    turned["released, one token without its past"] = partial(as_released, model, other, site, False)
    return {name: running(model, way, options) for name, way in turned.items()}
