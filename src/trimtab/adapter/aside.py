"""A second run of the decoder beside a call, cut short after a block: same tokens, a cache of its own, other weights.

While it runs, nothing that `Adapter.write` put on the model acts: what is seen is the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.adapter.calls import CallInfo, write_note
from trimtab.errors import AdapterError

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
    hidden = output
    if not isinstance(hidden, Tensor) and isinstance(output, tuple | list) and output:
        hidden = cast(Sequence[object], output)[0]
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
    """Return an empty KV cache like that of a call which begins with one, or makes one; None where it does not."""
    if call.cache is not None:
        twin = copy.deepcopy(call.cache)
        for subject in ("", "streams"):
            write_note(twin, None, subject)
        return twin
    default = call.arguments.get("use_cache") is None and bool(getattr(adapter.text_config, "use_cache", False))
    if not (call.caching or default):
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


class Used(NamedTuple):
    """Parameters of the decoder up to a block, by name, and those of them whose module was called."""

    names: list[str]
    called: set[str]


def parameters_to(adapter: Adapter, layer: int) -> Used:
    """Return the parameters that the decoder uses up to and including a block, found by running two tokens.

    Those of blocks are all that the blocks have, called or not: an expert may get no token, and some modules lend their
    weights without being called. Raises `AdapterError` where nothing is found, or weights lie outside of the decoder.
    """
    blocks = {id(module): number for number, block in enumerate(adapter.blocks) for module in block.modules()}
    running: list[bool] = []
    called: set[int] = set()

    def note(module: nn.Module, _args: object) -> None:
        if running:
            called.add(id(module))

    paths = {path: module for path, module in adapter.model.named_modules() if blocks.get(id(module), 0) <= layer}
    with ExitStack() as exits:
        begins = adapter.decoder.register_forward_pre_hook(lambda _module, _args: running.append(True))
        exits.callback(begins.remove)
        for module in paths.values():
            exits.callback(module.register_forward_pre_hook(note).remove)
        ids = torch.zeros(1, 2, dtype=torch.long, device=adapter.input_device)
        with torch.no_grad():
            adapter.run_to(layer, input_ids=ids)
    owners = {name: paths.get(name.rpartition(".")[0]) for name, _ in adapter.model.named_parameters()}
    inside = [n for n, module in owners.items() if module is not None and id(module) in blocks]
    before = [n for n, module in owners.items() if n not in inside and module is not None and id(module) in called]
    stray = [name for name in (*before, *inside) if not name.startswith(adapter.decoder_path)]
    if stray or not inside:
        raise AdapterError(
            f"Weights of {type(adapter.model).__name__} that its first blocks use lie outside of its decoder, "
            f"{', '.join(stray[:3]) or 'all of them'}: no gradient of them can be followed. Pass layers_path for "
            "another list of blocks."
        )
    return Used([*before, *inside], {name for name, module in owners.items() if id(module) in called})
