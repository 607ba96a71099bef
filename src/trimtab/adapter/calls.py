"""What a forward call of the decoder says of itself: its tokens, its mask, its KV cache, and what runs around it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trimtab.errors import AdapterError


class CallInfo(NamedTuple):
    """One forward call of the decoder, as its arguments describe it.

    `attention_mask` is `[B, total]` with 1 for real tokens, or the `[B, 1, T, total]` form that static caches use.
    `ids` are the tokens `[B, T]`, None where the model was given embeddings. `caching` says whether the caller handed
    in a KV cache or asked for one; a default of the model does not count. `arguments` are all that the decoder is told.
    """

    batch: int
    tokens: int
    device: torch.device
    attention_mask: Tensor | None = None
    ids: Tensor | None = None
    cache: Any = None
    caching: bool = False
    arguments: Mapping[str, Any] = MappingProxyType({})

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
            real = (mask if mask.shape[1] <= self.tokens else mask[:, self._columns(past)]) != 0
        else:  # a token always attends to itself, unless it is padding: read the diagonal
            own = mask[:, 0].diagonal(past, -2, -1)
            real = own if own.dtype == torch.bool else own == 0
        if real.shape[-1] != self.tokens:
            raise AdapterError(
                f"Cannot find the {self.tokens} new tokens, after {past} cached ones, in an attention mask of shape "
                f"{tuple(mask.shape)}. Pass a mask of shape [batch, {past + self.tokens}]."
            )
        return None if bool(real.all()) else real.expand(self.batch, -1)

    def _columns(self, past: int) -> slice:
        """Return where this call's tokens stand in a mask of all tokens; states in a list do not tell what is past."""
        if self.cache is not None and not hasattr(self.cache, "get_seq_length"):
            return slice(-self.tokens, None)
        return slice(past, past + self.tokens)


CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""What models call the cache or the states that they are given and give back."""
_NOTE = "_trimtab_note"
_MAPPINGS = (dict, Mapping)  # dict first: the other takes longer, and this is asked at every token


def read_note(cache: object, subject: str = "") -> object:
    """Return what `write_note` left on a KV cache about a subject, or None; a copy of the cache has it too."""
    return getattr(cache, _NOTE + subject, None)


def write_note(cache: object, note: object, subject: str = "") -> bool:
    """Leave a note on a KV cache; returns False where it takes none, as a list of states does."""
    try:
        object.__setattr__(cache, _NOTE + subject, note)
    except (AttributeError, TypeError):
        return False
    return True


def parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module's `forward`."""
    return list(inspect.signature(module.forward).parameters)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `module` by their names."""
    return {**dict(zip(parameters(module), args, strict=False)), **kwargs} if args else dict(kwargs)


def describe_call(named: Mapping[str, Any], around: Sequence[Mapping[str, Any]] = ()) -> CallInfo:
    """Describe a call of the decoder from its arguments by name, and from those of calls `around` it, outermost first.

    Where the decoder is handed no attention mask (RWKV) the innermost of the others counts. Raises `AdapterError`
    where it is given other tokens than the module around it that was told of any.
    """
    first = _first(named)
    if first is None:  # a home-made decoder
        first = next((value for value in named.values() if isinstance(value, Tensor) and value.dim() >= 2), None)
    if first is None:
        raise AdapterError(f"Cannot tell batch and length from a decoder call with arguments {sorted(named)}.")
    cache, ids, mask, told = _cache_in(named), named.get("input_ids"), named.get("attention_mask"), None
    batch, tokens = int(first.shape[0]), int(first.shape[1])
    for outer in reversed(around):
        mask = outer.get("attention_mask") if mask is None else mask
        if told is None:
            other = _first(outer)
            told = tokens if other is first else _tokens_of(other)  # mostly the same tensor
    if told is not None and told != tokens:
        raise AdapterError(
            f"The decoder is given {tokens} tokens in a call of {told}, so that their positions are not known: "
            "this model adds tokens of its own, or leaves some out."
        )
    return CallInfo(
        batch=batch,
        tokens=tokens,
        device=first.device,
        attention_mask=_one_mask(mask),
        ids=ids if isinstance(ids, Tensor) else None,
        cache=cache,
        caching=cache is not None or named.get("use_cache") is True,
        arguments=named,
    )


def _tokens_of(value: object) -> int | None:
    return int(value.shape[1]) if isinstance(value, Tensor) and value.dim() >= 2 else None


def _first(named: Mapping[str, Any]) -> Any:
    ids = named.get("input_ids")
    return named.get("inputs_embeds") if ids is None else ids


def returned_cache(output: object) -> object:
    """Return the KV cache in a decoder's output, a `ModelOutput` or a tuple; None where there is none."""
    if isinstance(output, _MAPPINGS):
        # as a plain dict: an output of transformers warns of the names that it no longer has
        return _cache_in(dict(cast(Mapping[str, object], output).items()))
    parts = cast(tuple[object, ...], output) if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def _cache_in(named: Mapping[str, object]) -> Any:
    """Return the KV cache or recurrent states among arguments or results, by name or by what a cache can do.

    Names change: what was `past_key_values` or `cache_params` is `cache` from transformers 5.24 on. Of a cache that is
    not seen, every call would be steered as the beginning of a prompt.
    """
    for name in CACHE_NAMES:
        if (value := named.get(name)) is not None:
            return value
    others = (value for value in named.values() if value is not None and not isinstance(value, Tensor))
    return next((value for value in others if hasattr(value, "get_seq_length")), None)


def _one_mask(mask: object) -> Tensor | None:
    """Return the mask of full attention where a model keeps one mask per kind of attention."""
    if mask is not None and not isinstance(mask, Tensor) and isinstance(mask, _MAPPINGS):
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
