"""The residual stream of one model, read and written by hooks that are gone when their context ends.

Layer `i` is the output of decoder block `i`, 0-based, before any final norm; it is read and written at that same point.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.adapter.aside import Aside, Stop, aside_of, hidden_of, stop
from trimtab.adapter.blocks import callers_of, find_blocks, module_list, refuse_virtual_tokens, stretch, text_config
from trimtab.adapter.calls import CallInfo, describe_call, named_arguments, parameters, returned_cache
from trimtab.errors import AdapterError, OptionError, brief

WriteFn = Callable[[Tensor], Tensor]
"""Takes a block's output `[B, T, D]` and returns its replacement; must not edit its argument in place."""


ExtendFn = Callable[[Tensor, Tensor], Tensor]
"""Takes a module's input and output and returns the output's replacement; must not edit either in place."""

_Around = list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
"""The modules around the decoder that are being called, outermost first, with their arguments."""


@dataclass
class Reading:
    """What `Adapter.read` saw in the latest forward: `acts[layer]` is `[B, T, D]`, detached, in the model's dtype."""

    acts: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


class Adapter:
    """The residual stream of one model.

    Finds the `ModuleList` of `num_hidden_layers` blocks in the text part of `model`, and refuses to guess: if none or
    several fit, it raises `AdapterError` with the candidates, one of which can be passed as `layers_path`.
    """

    def __init__(self, model: nn.Module, *, layers_path: str | None = None) -> None:
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterError(f"A model is a torch module, such as trimtab.load(...).model; got {brief(model)}.")
        refuse_virtual_tokens(model)
        self.model = model
        self.path = layers_path if layers_path is not None else find_blocks(model)
        self.blocks: list[nn.Module] = list(module_list(model, self.path))
        *self._around, self.decoder = callers_of(model, self.path)
        self.text_config: Any = text_config(model)
        config = self.text_config
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise AdapterError(f"The configuration of {type(model).__name__} has no hidden_size; got {width!r}.")
        self.hidden_size = width
        window = getattr(config, "max_position_embeddings", None)
        self.context_length = window * stretch(config, window) if isinstance(window, int) and window > 0 else None

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model has embeddings for; None where it does not show them."""
        rows = getattr(self.embedding, "num_embeddings", None)
        return rows if isinstance(rows, int) else None

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise `AdapterError` for ids that the model has no embedding for, as the tokenizer of another makes them."""
        rows = self.vocabulary
        if rows is not None and ids and max(ids) >= rows:
            raise AdapterError(
                f"Token id {max(ids)} is beyond the {rows} embeddings of this {type(self.model).__name__}: its tokens "
                "come from the tokenizer of another model."
            )

    @property
    def has_position_table(self) -> bool:
        """Whether positions are embeddings, as in GPT-2, so that there are none beyond the context."""
        limit, tokens = self.context_length, self.embedding
        if limit is None:
            return False
        tables = (m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
        return any(limit <= table.num_embeddings <= limit + 8 for table in tables)  # OPT has two rows more

    @property
    def embedding(self) -> object:
        """The table of token embeddings; None where the model does not show it."""
        try:
            return cast(Any, self.model).get_input_embeddings()
        except (AttributeError, NotImplementedError):  # a home-made model; one whose class does not say
            return None

    @property
    def decoder_path(self) -> str:
        """What the names of the decoder's parameters begin with in the model, the dot included."""
        path = next(name for name, module in self.model.named_modules() if module is self.decoder)
        return f"{path}." if path else ""

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the blocks' outputs: that of their parameters (never one of eight bits), or float32."""
        if getattr(text_config(self.model), "residual_in_fp32", False):  # Mamba, whatever its parameters are
            return torch.float32
        parameters = (p for block in self.blocks for p in block.parameters())
        dtypes = (p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1)
        return next(dtypes, torch.get_default_dtype())

    def device(self, layer: int) -> torch.device:
        """Return the device a block computes on; off-loaded blocks count as CPU until they have run."""
        devices = (p.device for p in self.blocks[self.layer(layer)].parameters())
        return next((d for d in devices if d.type != "meta"), torch.device("cpu"))

    @property
    def input_device(self) -> torch.device:
        """Device of the first parameter, where inputs belong; that of the CPU if the whole model is off-loaded."""
        devices = (p.device for p in self.model.parameters())
        return next((d for d in devices if d.type != "meta"), torch.device("cpu"))

    def layer(self, number: int) -> int:
        """Resolve a layer number, counting from the end if negative; the only place where that is done.

        Raises `OptionError` for what is no whole number, and `AdapterError` for a layer that the model has not.
        """
        try:
            index = operator.index(number)
        except TypeError:
            index = None
        if index is None or isinstance(number, bool):
            raise OptionError(f"A layer is a whole number, and layers are a list, as in [2, 4]; got {brief(number)}.")
        if not -self.n_layers <= index < self.n_layers:
            raise AdapterError(
                f"There is no layer {number}: {type(self.model).__name__} has {self.n_layers} layers, "
                f"0 to {self.n_layers - 1} (or -{self.n_layers} to -1)."
            )
        return index % self.n_layers

    def layers(self, wanted: Iterable[int]) -> list[int]:
        """Resolve layer numbers: in order, each once; raises `OptionError` where there are none."""
        try:
            numbers = [*wanted]
        except TypeError:
            raise OptionError(f"Layers are a list of numbers, as in [2, 4]; got {brief(wanted)}.") from None
        if not numbers:
            raise OptionError("There are no layers; name at least one, or leave layers out.")
        return sorted({self.layer(number) for number in numbers})

    @contextmanager
    def steered(self) -> Generator[None]:
        """Mark the model as steered, for `check_plain`."""
        block = self.blocks[0]
        _STEERED[block] = _STEERED.get(block, 0) + 1
        try:
            yield
        finally:
            _STEERED[block] = _STEERED.get(block, 1) - 1  # the entry of a block that is being collected may be gone

    def check_plain(self, what: str) -> None:
        """Raise `AdapterError` while the model is steered, for work that has to see it as it is."""
        if _STEERED.get(self.blocks[0]):
            raise AdapterError(
                f"This {type(self.model).__name__} is being steered, and {what} would see it so. Leave steer() first."
            )

    @contextmanager
    def read(self, layers: Iterable[int]) -> Generator[Reading]:
        """Record the outputs of some blocks; sees what `write` left there, in whatever order the two are entered.

        Keys of `Reading.acts` are resolved layer numbers. Every forward replaces the tensors of the one before.
        """
        reading = Reading()
        with self.watch(layers, reading.acts.__setitem__):
            yield reading

    @contextmanager
    def watch(self, layers: Iterable[int], look: Callable[[int, Tensor], None]) -> Generator[None]:
        """Hand the outputs of some blocks to `look`, a resolved layer number and `[B, T, D]`, when each has run."""
        with ExitStack() as exits, _compiled_code_sees_hooks():
            for layer in {self.layer(index) for index in layers}:
                hook = partial(_look, aside_of(self.blocks[0]), look, layer)
                exits.callback(self.blocks[layer].register_forward_hook(hook).remove)
            yield

    @contextmanager
    def write(
        self,
        functions: Mapping[int, WriteFn],
        before: Callable[[CallInfo], None] | None = None,
        after: Callable[[object], None] | None = None,
    ) -> Generator[None]:
        """Replace the outputs of some blocks by functions of them, until the context ends, however it ends.

        `before` is called once per forward of the decoder, ahead of every function; `after` once it is through, with
        the KV cache that the decoder returns, if it returns one.
        """
        aside = aside_of(self.blocks[0])
        resolved = {self.layer(index): function for index, function in functions.items()}
        if len(resolved) != len(functions):
            raise AdapterError(f"A layer is written twice: got {sorted(functions)} with {self.n_layers} layers.")
        with ExitStack() as exits, _compiled_code_sees_hooks():
            if before is not None:
                around: _Around = []
                for module in self._around:
                    hook = _never_compiled(partial(_begin, aside, around))
                    exits.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                    hook = _never_compiled(partial(_end, aside, around))
                    exits.callback(module.register_forward_hook(hook, always_call=True).remove)
                hook = _never_compiled(partial(_announce, aside, before, around))
                exits.callback(self.decoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if after is not None:
                hook = _never_compiled(partial(_hand_over, aside, after))
                exits.callback(self.decoder.register_forward_hook(hook).remove)
            for layer, function in resolved.items():
                hook = partial(_replace, aside, layer, self.hidden_size, function)
                # prepend: hooks that only look, ours or those behind output_hidden_states, see the new stream
                exits.callback(self.blocks[layer].register_forward_hook(hook, prepend=True).remove)
            yield

    @contextmanager
    def extend(self, functions: Mapping[str, ExtendFn]) -> Generator[None]:
        """Replace the outputs of modules, by their names in the model, by functions of their input and output."""
        with ExitStack() as exits, _compiled_code_sees_hooks():
            for name, function in functions.items():
                hook = partial(_extend, function)
                exits.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def run_to(self, layer: int, **inputs: object) -> None:
        """Run the model on `inputs` up to and including block `layer`; the blocks above and the LM head never run.

        Use it inside `read`. No KV cache is made unless `inputs` say so. Gradients are recorded if torch does.
        """
        if "use_cache" in parameters(self.model):
            inputs.setdefault("use_cache", False)
        handle = self.blocks[self.layer(layer)].register_forward_hook(partial(stop, aside_of(self.blocks[0]), False))
        try:
            self.model(**inputs)
        except Stop:
            pass
        finally:
            handle.remove()


_STEERED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many contexts of `steered` a model is in, by its first block, which wrappers share."""


# The hooks


def _extend(function: ExtendFn, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return function(args[0], output)


@contextmanager
def _compiled_code_sees_hooks() -> Generator[None]:
    """Make models compiled by `torch.compile` run the hooks that are there, and no others, in this context and after.

    By default torch's compiled code does not look whether hooks came or went since it was compiled, so that steering a
    compiled model would do nothing, or would never end. The check is switched on for the process, once; code compiled
    before that is dropped and compiled again at its next call.
    """
    _check_hooks_in_compiled_code()
    try:
        yield
    finally:
        _check_hooks_in_compiled_code()  # the first compilation may have happened meanwhile


def _never_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Run a hook as Python in compiled code: what it looks at (caches, masks, the caller) is no part of a graph."""
    dynamo = sys.modules.get("torch._dynamo")
    return hook if dynamo is None else dynamo.disable(hook)


def _check_hooks_in_compiled_code() -> None:
    dynamo = sys.modules.get("torch._dynamo")  # not imported: nothing was compiled
    if dynamo is not None and dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        if getattr(dynamo.convert_frame, "FRAME_COUNTER", True):  # 0: nothing was compiled; on CUDA resetting takes 3 s
            dynamo.reset()


def _begin(aside: Aside, around: _Around, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if aside.on:
        return
    around.append((module, args, kwargs))  # read only when the decoder is called


def _end(aside: Aside, around: _Around, module: nn.Module, args: object, output: object) -> None:
    if not aside.on and around and around[-1][0] is module:  # else another's hook ended this call before ours began it
        around.pop()


def _announce(
    aside: Aside,
    before: Callable[[CallInfo], None],
    around: _Around,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if aside.on:
        return
    before(describe_call(named_arguments(module, args, kwargs), [named_arguments(*call) for call in around]))


def _hand_over(aside: Aside, after: Callable[[object], None], module: nn.Module, args: object, output: object) -> None:
    if aside.on:
        return
    cache = returned_cache(output)
    if cache is not None:
        after(cache)


def _look(
    aside: Aside, look: Callable[[int, Tensor], None], layer: int, module: nn.Module, args: object, output: object
) -> None:
    if not aside.on:
        look(layer, hidden_of(output).detach())


def _replace(
    aside: Aside, layer: int, width: int, function: WriteFn, module: nn.Module, args: object, output: object
) -> object:
    if aside.on:
        return output
    hidden = hidden_of(output)
    new = function(hidden)
    shape = hidden.shape
    if new.shape != shape or shape[-1] != width:
        raise AdapterError(
            f"The residual stream at layer {layer} has shape {tuple(shape)} and its replacement "
            f"{tuple(new.shape)}; both must be [batch, tokens, {width}]."
        )
    if output is hidden or not isinstance(output, tuple | list):
        return new
    return type(output)((new, *cast(Sequence[object], output)[1:]))
