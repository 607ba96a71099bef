"""Find the decoder blocks of any causal language model, and read and write the residual stream there.

The only file that registers hooks, knows paths of layers, or looks into the outputs of blocks and the caches of models.
Layer `i` is the output of decoder block `i`, 0-based, before any final norm; it is read and written at that same point.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trimtab.errors import AdapterError

WriteFn = Callable[[Tensor], Tensor]
"""Takes a block's output `[B, T, D]` and returns its replacement; must not edit its argument in place."""


class _Stop(Exception):
    """Ends a forward pass early; never leaves `Adapter.run_to`."""


@dataclass
class Reading:
    """What `Adapter.read` saw in the latest forward: `acts[layer]` is `[B, T, D]`, detached, in the model's dtype."""

    acts: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


@dataclass(frozen=True)
class CallInfo:
    """One forward call of the decoder, as its arguments describe it.

    `attention_mask` is `[B, total]` with 1 for real tokens, or the `[B, 1, T, total]` form that static caches use.
    `ids` are the tokens `[B, T]`, None where the model was given embeddings. `caching` says whether the caller handed
    in a KV cache or asked for one; a default of the model does not count.
    """

    batch: int
    tokens: int
    device: torch.device
    attention_mask: Tensor | None = None
    ids: Tensor | None = None
    cache: Any = None
    caching: bool = False

    def past(self, known: int | None = None) -> int:
        """Count the columns already in the KV cache, padding included; `known` serves caches that do not count."""
        if self.cache is None:
            return 0
        if not hasattr(self.cache, "get_seq_length"):
            if known is not None:
                return known
            raise AdapterError(f"Cannot tell the length of a KV cache of type {type(self.cache).__name__}.")
        try:
            length = self.cache.get_seq_length()
        except ValueError:  # states of linear attention and nothing else: they have no length
            if not self.cache.has_previous_state():
                return 0
            if known:
                return known
            kind = type(self.cache).__name__
            raise AdapterError(
                f"Cannot tell the length of a {kind} of recurrent states made elsewhere. Make it inside steer()."
            ) from None
        if isinstance(length, Tensor) and length.device.type != "cpu" and self.tokens == 1 and known is not None:
            return known  # reading the length would wait for the accelerator at every token
        return int(length)

    def real_tokens(self, past: int) -> Tensor | None:
        """Mark the tokens of this call that are not padding, `[B, T]` bool; None if all of them are real.

        Looks at the values of the mask, which on an accelerator waits for it: once per prefill, not per token.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        if mask.dim() == 2:
            real = mask[:, past : past + self.tokens] if mask.shape[1] > self.tokens else mask
            real = real != 0
        else:  # a token always attends to itself, unless it is padding: read the diagonal
            own = mask[:, 0].diagonal(past, -2, -1)
            real = own if own.dtype == torch.bool else own == 0
        if real.shape[-1] != self.tokens:
            raise AdapterError(
                f"Cannot find the {self.tokens} new tokens, after {past} cached ones, in an attention mask of shape "
                f"{tuple(mask.shape)}. Pass a mask of shape [batch, {past + self.tokens}]."
            )
        return None if bool(real.all()) else real.expand(self.batch, -1)


_NOTE = "_trimtab_note"


def read_note(cache: object) -> object:
    """Return what `write_note` left on a KV cache, or None; a copy of the cache has it too."""
    return getattr(cache, _NOTE, None)


def write_note(cache: object, note: object) -> bool:
    """Leave a note on a KV cache; returns False where it takes none, as a list of states does."""
    try:
        object.__setattr__(cache, _NOTE, note)
    except (AttributeError, TypeError):
        return False
    return True


class Adapter:
    """The residual stream of one model.

    Finds the `ModuleList` of `num_hidden_layers` blocks in the text part of `model`, and refuses to guess: if none or
    several fit, it raises `AdapterError` with the candidates, one of which can be passed as `layers_path`.
    """

    def __init__(self, model: nn.Module, *, layers_path: str | None = None) -> None:
        _refuse_virtual_tokens(model)
        self.model = model
        self.path = layers_path if layers_path is not None else _find_blocks(model)
        self.blocks: list[nn.Module] = list(_module_list(model, self.path))
        self._decoder = _caller_of(model, self.path)
        text_config = _text_config(model)
        width = getattr(text_config, "hidden_size", None)
        if not isinstance(width, int):
            raise AdapterError(f"The configuration of {type(model).__name__} has no hidden_size; got {width!r}.")
        self.hidden_size = width
        window = getattr(text_config, "max_position_embeddings", None)
        self.context_length = window if isinstance(window, int) and window > 0 else None

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the blocks' outputs: that of their parameters (never one of eight bits), or float32."""
        if getattr(_text_config(self.model), "residual_in_fp32", False):  # Mamba, whatever its parameters are
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

    def layer(self, index: int) -> int:
        """Resolve a layer number, counting from the end if negative; the only place where that is done."""
        if not -self.n_layers <= index < self.n_layers:
            raise AdapterError(
                f"There is no layer {index}: {type(self.model).__name__} has {self.n_layers} layers, "
                f"0 to {self.n_layers - 1} (or -{self.n_layers} to -1)."
            )
        return index % self.n_layers

    @contextmanager
    def read(self, layers: Iterable[int]) -> Generator[Reading]:
        """Record the outputs of some blocks; sees what `write` left there, in whatever order the two are entered.

        Keys of `Reading.acts` are resolved layer numbers. Every forward replaces the tensors of the one before.
        """
        reading = Reading()
        with ExitStack() as exits, _compiled_code_sees_hooks():
            for layer in {self.layer(index) for index in layers}:
                hook = partial(_record, reading.acts, layer)
                exits.callback(self.blocks[layer].register_forward_hook(hook).remove)
            yield reading

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
        resolved = {self.layer(index): function for index, function in functions.items()}
        if len(resolved) != len(functions):
            raise AdapterError(f"A layer is written twice: got {sorted(functions)} with {self.n_layers} layers.")
        with ExitStack() as exits, _compiled_code_sees_hooks():
            if before is not None:
                hook = _never_compiled(partial(_announce, before))
                exits.callback(self._decoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if after is not None:
                hook = _never_compiled(partial(_hand_over, after))
                exits.callback(self._decoder.register_forward_hook(hook).remove)
            for layer, function in resolved.items():
                hook = partial(_replace, layer, self.hidden_size, function)
                # prepend: hooks that only look, ours or those behind output_hidden_states, see the new stream
                exits.callback(self.blocks[layer].register_forward_hook(hook, prepend=True).remove)
            yield

    def run_to(self, layer: int, **inputs: object) -> None:
        """Run the model on `inputs` up to and including block `layer`; the blocks above and the LM head never run.

        Use it inside `read`. No KV cache is made unless `inputs` say so. Gradients are recorded if torch does.
        """
        if "use_cache" in _parameters(self.model):
            inputs.setdefault("use_cache", False)
        handle = self.blocks[self.layer(layer)].register_forward_hook(_stop)
        try:
            self.model(**inputs)
        except _Stop:
            pass
        finally:
            handle.remove()


# Finding the blocks


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuse the prompt, prefix and P-tuning of PEFT: positions would count tokens that no text has."""
    config = cast(Any, getattr(model, "active_peft_config", None))  # of a PeftModel
    if getattr(config, "is_prompt_learning", False):
        kind, count = getattr(config.peft_type, "value", config.peft_type), config.num_virtual_tokens
        raise AdapterError(
            f"This {type(model).__name__} puts {count} virtual tokens before every prompt ({kind}), so that positions "
            "are not those of the text. Use model.get_base_model(), or an adapter that adds no tokens, such as LoRA."
        )


def _text_config(model: nn.Module) -> Any:
    """Return the configuration of the model's text part, or None if the model has no configuration."""
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return cast(Any, config).get_text_config()
    except ValueError as error:
        raise AdapterError(f"The configuration of {type(model).__name__} has several text parts: {error}") from error


def _find_blocks(model: nn.Module) -> str:
    """Return the path of the only `ModuleList` in the text part that has one entry per hidden layer."""
    name = type(model).__name__
    config = _text_config(model)
    count = getattr(config, "num_hidden_layers", None)
    lists = _outer_lists(model)
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(f"{name} is an encoder-decoder model; Trimtab works on decoder-only models.")
    get_decoder = getattr(model, "get_decoder", None)
    text = get_decoder() if callable(get_decoder) else model
    inside = {id(module) for module in text.modules()} if isinstance(text, nn.Module) else set[int]()
    if not any(id(blocks) in inside for blocks in lists.values()):  # some call the LM head their decoder
        inside = {id(blocks) for blocks in lists.values()}
    fitting = [path for path, blocks in lists.items() if len(blocks) == count and id(blocks) in inside]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{path} ({len(blocks)})" for path, blocks in lists.items()) or "none"
    problem = "Cannot find" if not fitting else "Cannot choose"
    wanted = f" of {count} blocks" if isinstance(count, int) else ""
    raise AdapterError(f'{problem} the decoder layers{wanted} in {name}. Candidates: {found}. Pass layers_path="...".')


def _outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every `ModuleList` with its path, those nested in another left out (the experts of a block, say)."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():  # parents come before their children
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = module
    return lists


def _module_list(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        known = ", ".join(_outer_lists(model)) or "none"
        raise AdapterError(f"{type(model).__name__} has no list of layers at {path!r}. Lists: {known}.")
    return blocks


def _caller_of(model: nn.Module, path: str) -> nn.Module:
    """Return the innermost module above the blocks that has a `forward`: the decoder that runs them."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        # containers such as ModuleDict have none of their own
        if type(module).forward is not nn.Module.forward:
            return module
    return model


# Looking into calls


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _announce(
    before: Callable[[CallInfo], None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Describe a call of the decoder from its arguments."""
    named = {**(dict(zip(_parameters(module), args, strict=False)) if args else {}), **kwargs}
    first = next((named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), None)
    if first is None:  # a home-made decoder
        first = next((value for value in named.values() if isinstance(value, Tensor) and value.dim() >= 2), None)
    if first is None:
        raise AdapterError(f"Cannot tell batch and length from a decoder call with arguments {sorted(named)}.")
    cache = _cache_in(named)
    ids = named.get("input_ids")
    before(
        CallInfo(
            batch=int(first.shape[0]),
            tokens=int(first.shape[1]),
            device=first.device,
            attention_mask=_one_mask(named.get("attention_mask")),
            ids=ids if isinstance(ids, Tensor) else None,
            cache=cache,
            caching=cache is not None or named.get("use_cache") is True,
        )
    )


def _hand_over(after: Callable[[object], None], module: nn.Module, args: object, output: object) -> None:
    """Pass on the KV cache that a decoder returns, in a `ModelOutput` or in a tuple."""
    if isinstance(output, Mapping):
        cache = _cache_in(cast(Mapping[str, object], output))
    else:
        parts = cast(tuple[object, ...], output) if isinstance(output, tuple) else ()
        cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
    if cache is not None:
        after(cache)


def _cache_in(named: Mapping[str, object]) -> Any:
    caches = (named.get(name) for name in ("past_key_values", "cache_params", "state"))
    return next((value for value in caches if value is not None), None)


def _one_mask(mask: object) -> Tensor | None:
    """Return the mask of full attention where a model keeps one mask per kind of attention."""
    if isinstance(mask, Mapping):
        kinds = cast(Mapping[str, object], mask)
        mask = kinds.get("full_attention", next(iter(kinds.values()), None))
    if mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
        return mask
    got = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise AdapterError(
        f"Cannot tell padding from an attention mask of this kind: {got}. Pass one of shape [batch, tokens], or choose "
        'another attention, as in model.set_attn_implementation("sdpa").'
    )


class Generating(NamedTuple):
    """What `generate` of transformers is doing around a forward call."""

    assisted: bool
    """Guesses, of a draft model or looked up in the prompt, come in the same call as the prompt."""
    pieces: bool
    """The prompt comes in pieces."""
    beams: bool
    """Rows change places between calls."""
    guided: bool
    """A second prompt runs beside the first (classifier-free guidance)."""


def generating() -> Generating | None:
    """Look up the stack for the `generate` of transformers that is running; None outside of it.

    A forward call cannot tell its prompt from guesses that follow it, nor a piece of a prompt from all of it; only the
    settings of the generation say so, and they are nowhere but in that frame.
    """
    if torch.compiler.is_compiling():  # the first compilation of all, inside `steer`: no frames to look at
        return None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            found = frame.f_locals
            config = found.get("generation_config")
            if config is None:
                return None
            mode = config.get_generation_mode(found.get("assistant_model"))
            return Generating(
                assisted=str(getattr(mode, "value", mode)) == "assisted_generation",
                pieces=getattr(config, "prefill_chunk_size", None) is not None,
                beams=(getattr(config, "num_beams", None) or 1) > 1,
                guided=(getattr(config, "guidance_scale", None) or 1) != 1,
            )
        frame = frame.f_back
    return None


# The hooks


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
        dynamo.reset()


def _hidden(output: object) -> Tensor:
    """Return the hidden states of a block's output: a tensor in most models, the first of a tuple or list in others."""
    hidden = cast(Sequence[object], output)[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = f"a tensor of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(output).__name__
        several = " (several residual streams side by side?)" if isinstance(hidden, Tensor) else ""
        raise AdapterError(f"A decoder block must return hidden states [batch, tokens, width]; got {got}{several}.")
    return hidden


def _record(acts: dict[int, Tensor], layer: int, module: nn.Module, args: object, output: object) -> None:
    acts[layer] = _hidden(output).detach()


def _stop(module: nn.Module, args: object, output: object) -> None:
    raise _Stop


def _replace(layer: int, width: int, function: WriteFn, module: nn.Module, args: object, output: object) -> object:
    hidden = _hidden(output)
    new = function(hidden)
    if new.shape != hidden.shape or hidden.shape[-1] != width:
        raise AdapterError(
            f"The residual stream at layer {layer} has shape {tuple(hidden.shape)} and its replacement "
            f"{tuple(new.shape)}; both must be [batch, tokens, {width}]."
        )
    if not isinstance(output, tuple | list):
        return new
    return type(output)((new, *cast(Sequence[object], output)[1:]))
