"""A second run of the decoder beside a call, cut short after a block: same tokens, a cache of its own, other weights.

While it runs, nothing that `Adapter.write` put on the model acts: what is seen is the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.adapter.calls import CallInfo, write_note
from trimtab.errors import AdapterError, CacheError

if TYPE_CHECKING:
    from trimtab.adapter.stream import Adapter


class Aside:
    """Whether a model is in a run aside, and so whether hooks that write are to keep still."""

    def __init__(self) -> None:
        self.on = False


_ASIDE: WeakKeyDictionary[nn.Module, Aside] = WeakKeyDictionary()
"""By a model's first block, which wrappers share."""
_LOOKS = ("output_hidden_states", "output_attentions", "return_dict")
"""Arguments by which a caller asks to see more, and which would make the run aside look too."""


def aside_of(block: nn.Module) -> Aside:
    """Return the state that all adapters of one model share."""
    return _ASIDE.setdefault(block, Aside())


class Stop(Exception):
    """Ends a forward pass early; never leaves the function that asks for it."""


def stop(aside: Aside, within: bool, module: nn.Module, args: object, output: object) -> None:
    """Be a hook that ends the forward pass: the one aside if `within`, else the model's own."""
    if aside.on == within:
        raise Stop


def hidden_of(output: object) -> Tensor:
    """Return the hidden states of a block's output: a tensor in most models, the first of a tuple or list in others."""
    hidden = cast(Sequence[object], output)[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = f"a tensor of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(output).__name__
        several = " (several residual streams side by side?)" if isinstance(hidden, Tensor) else ""
        raise AdapterError(f"A decoder block must return hidden states [batch, tokens, width]; got {got}{several}.")
    return hidden


def run_aside(
    adapter: Adapter, layers: Sequence[int], arguments: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Run the decoder on `arguments` up to the highest of `layers`; return these blocks' outputs, `[B, T, D]` each.

    `weights` stand in for parameters, by their names in the model; those of the decoder alone can be replaced. Outputs
    keep what autograd, forward or reverse, knows of them.
    """
    flag = aside_of(adapter.blocks[0])
    seen: dict[int, Tensor] = {}

    def look(layer: int, _module: nn.Module, _args: object, output: object) -> None:
        seen[layer] = hidden_of(output)

    given = {name: value for name, value in arguments.items() if name not in _LOOKS}
    with ExitStack() as exits:
        for layer in layers:
            exits.callback(adapter.blocks[layer].register_forward_hook(partial(look, layer)).remove)
        exits.callback(adapter.blocks[max(layers)].register_forward_hook(partial(stop, flag, True)).remove)
        exits.enter_context(_set(flag))
        try:
            if weights:
                own = {name.removeprefix(adapter.decoder_path): value for name, value in weights.items()}
                torch.func.functional_call(adapter.decoder, own, (), given)
            else:
                adapter.decoder(**given)
        except Stop:
            pass
    return seen


@contextmanager
def _set(flag: Aside) -> Generator[None]:
    before, flag.on = flag.on, True
    try:
        yield
    finally:
        flag.on = before


def second_cache(adapter: Adapter, call: CallInfo) -> Any:
    """Return an empty KV cache like that of a call which begins with one, or asks for one; None where it does not."""
    if call.cache is not None:
        twin = copy.deepcopy(call.cache)
        for subject in ("", "streams"):
            write_note(twin, None, subject)
        return twin
    if not call.caching:
        return None
    from transformers import DynamicCache

    return DynamicCache(config=adapter.text_config)


def with_cache(call: CallInfo, cache: Any, name: str) -> dict[str, Any]:
    """Return the arguments of a call with another cache in place of its own."""
    given = {key: value for key, value in call.arguments.items() if value is not call.cache or value is None}
    if cache is not None:
        return {**given, name: cache, "use_cache": True}
    return {**given, "use_cache": False} if "use_cache" in given else given


def cache_tensors(cache: object) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """Return the floating tensors in a KV cache, and for each what puts another in its place; always in one order."""
    found: list[tuple[Callable[[Tensor], None], Tensor]] = []
    seen: set[int] = set()

    def visit(holder: Any) -> None:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        entries: Iterable[tuple[Any, Any]]
        if isinstance(holder, dict):
            entries = cast(dict[Any, Any], holder).items()
        elif isinstance(holder, list):
            entries = enumerate(cast(list[Any], holder))
        else:
            entries = [(key, value) for key, value in vars(holder).items() if not key.startswith("_trimtab")]
        for key, value in list(entries):
            if isinstance(value, Tensor):
                if value.is_floating_point():
                    found.append((partial(_put, holder, key), value))
            elif isinstance(value, dict | list) or "cache" in type(value).__module__:
                visit(value)

    if cache is not None:
        visit(cache)
    return found


def _put(holder: Any, key: Any, value: Tensor) -> None:
    if isinstance(holder, dict | list):
        cast(Any, holder)[key] = value
    else:
        setattr(holder, key, value)


def parameters_to(adapter: Adapter, layer: int) -> list[str]:
    """Return the names of the parameters that the decoder uses up to and including a block.

    Those of blocks are all that the blocks have; what comes before the blocks is found by running two tokens.
    """
    inside = {id(module): number for number, block in enumerate(adapter.blocks) for module in block.modules()}
    called: set[int] = set()
    running: list[bool] = []

    def note(module: nn.Module, _args: object) -> None:
        if running:
            called.add(id(module))

    prefix = adapter.decoder_path
    own = {name: module for name, module in adapter.decoder.named_modules() if id(module) not in inside}
    with ExitStack() as exits:
        begins = adapter.decoder.register_forward_pre_hook(lambda _module, _args: running.append(True))
        exits.callback(begins.remove)
        for module in own.values():
            exits.callback(module.register_forward_pre_hook(note).remove)
        ids = torch.zeros(1, 2, dtype=torch.long, device=adapter.input_device)
        with torch.no_grad():
            adapter.run_to(0, input_ids=ids)
    names = [f"{prefix}{name}." if name else prefix for name, module in own.items() if id(module) in called]
    known = dict(adapter.model.named_parameters())
    before = [name for name in known if name.rpartition(".")[0] + "." in names]
    blocks = [f"{adapter.path}.{number}." for number in range(layer + 1)]
    within = [name for name in known if name.startswith(tuple(blocks))]
    tied = [name for name in before + within if not name.startswith(prefix)]
    if tied or not before + within:
        raise CacheError(f"Weights of {type(adapter.model).__name__} lie outside of its decoder: {tied[:3]}.")
    return [*before, *within]
