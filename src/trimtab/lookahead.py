"""The second stream of a lookahead knob (COLD-FD): how far a step down its gradient would move the residual stream.

Paper: K. Sharma, S. Trivedi, arXiv:2603.06495. The decoder runs once more on the same tokens, up to the knob's layer
and with a KV cache of its own, along the gradient: with the exact forward-mode derivative, or a small step away.
Steering at that layer's output pollutes nothing below it, so that every token, generated ones too, can be steered.

The gradient is never multiplied out: what it adds to a linear layer is the product of two thin matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapter import (
    CACHE_NAMES,
    Adapter,
    CallInfo,
    cache_tensors,
    generating,
    read_note,
    run_aside,
    second_cache,
    with_cache,
    write_note,
)
from trimtab.artifact import LookaheadKnob, LowRank
from trimtab.errors import CacheError, KnobError, OptionError
from trimtab.forward import NoDerivative, derivative, dual, forward_mode, halves
from trimtab.steplength import resolved_step
from trimtab.weights.rows import embedding_scale, is_linear

NOTE, BROKEN = "streams", -1


@dataclass
class _State:
    """What the streams of one knob know of the tokens in a KV cache; lies on that cache as a note."""

    caches: list[Any]
    rows: int
    tangents: list[Tensor | None] = field(default_factory=list["Tensor | None"])
    columns: int = 0

    def said(self) -> str:
        """Say what was seen, for a message."""
        if self.columns == BROKEN:
            return "lost track at an error"
        return f"seen {self.columns} in {self.rows}"


class Stream:
    """Runs beside a model along one knob's gradient; `begin` before each call of the decoder, then `displacement`.

    `apart`: the stream that the model computes is not the plain one below the knob's highest layer, since other knobs
    act there, or this one does; a scaled step then needs a plain run of its own to be compared with. `level`, and the
    `number` among copies of one knob, tell this stream's notes on KV caches from those of others. Raises `KnobError`
    for a knob that does not fit the model, and for a step that is too short for the model's dtype or too long; the
    message names one that works.
    """

    def __init__(
        self, adapter: Adapter, knob: LookaheadKnob, *, level: int = 0, number: int = 0, apart: bool = False
    ) -> None:
        knob.check_shapes(adapter.model)
        if knob.top >= adapter.n_layers:
            raise KnobError(
                f"Knob {knob.name!r} acts at layer {knob.top}; this {type(adapter.model).__name__} has "
                f"{adapter.n_layers} layers. Use a knob made for this model."
            )
        self._adapter, self._knob = adapter, knob
        self._exact = knob.backend == "exact"
        self._apart = (apart or len(knob.layers) > 1) and not self._exact
        top = knob.top
        self._unit = knob.norms[top] / knob.scales[top]  # makes of G a gradient that moves the stream by its own norm
        self._step = self._unit if self._exact else resolved_step(adapter.dtype, knob)
        self._along = False  # whether a run goes along the gradient
        self._weights: dict[str, Tensor] = {}
        self._table = False  # whether the table of token embeddings moves
        self._hooks = self._prepare()
        self._key = f"{level} {number} {knob.digest} {knob.backend} {top} {self._step} {self._apart}"
        self._found: dict[int, Tensor] = {}
        self._plain: dict[int, Tensor] = {}
        self._pending: _State | None = None

    @property
    def leans_on_the_model(self) -> bool:
        """Whether the model's own stream is what a scaled step is compared with."""
        return not self._exact and not self._apart

    @contextmanager
    def ready(self) -> Generator[None]:
        """Hang on the model what the runs need; it does nothing to the model's own."""
        with self._adapter.extend(self._hooks):
            yield

    def begin(self, call: CallInfo) -> None:
        """Run beside a call that the decoder is about to make."""
        self._refuse_what_it_cannot_follow(call)
        notes = _notes(call.cache)
        state = notes.get(self._key)
        past = call.past(state.columns if state else None)
        if past == 0:
            self._refuse_moving_rows()
            count = 2 if self._apart else 1
            state = _State([second_cache(self._adapter, call) for _ in range(count)], rows=call.batch)
        elif state is None or (state.columns, state.rows) != (past, call.batch):
            raise CacheError(
                f"This call continues a KV cache of {past} tokens in {call.batch} rows, of which the lookahead knob "
                f"{self._knob.name!r} has {state.said() if state else 'seen none'}, and it has to follow every token. "
                "Pass the whole prompt, inside steer()."
            )
        seen, state.columns = past + call.tokens, BROKEN  # until all runs are through
        with _no_gradients():
            self._found = self._along_gradient(call, state)
            if self._apart:
                self._plain = self._run(call, state.caches[1], {})
        state.columns = seen
        self._pending = state
        if call.cache is not None:
            self._note(call.cache, {**notes, self._key: state})

    def keep(self, cache: object) -> None:
        """Remember the latest call's tokens as those of a cache which that call has made."""
        notes = _notes(cache)
        followed = self._pending is not None and None not in self._pending.caches  # else the next call is refused
        if self._pending is not None and followed and notes.get(self._key) is not self._pending:
            self._note(cache, {**notes, self._key: self._pending})
        self._pending = None

    def displacement(self, layer: int, hidden: Tensor | None = None) -> Tensor:
        """Return what alpha 1 adds at an active layer, `[B, T, D]` float32.

        `hidden` is the layer's output in the model, of that shape, which a stream that is not apart is compared with.
        """
        knob, found = self._knob, self._found[layer].float()
        if self._exact:
            moved = found / self._step
        else:
            plain = self._plain[layer] if self._apart else hidden
            assert plain is not None
            moved = (found - plain.float()) / self._step
        if knob.per_token:
            moved = moved / moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            return moved * -knob.norms[layer]
        return moved * (-knob.norms[layer] / knob.scales[layer])

    # One run

    def _along_gradient(self, call: CallInfo, state: _State) -> dict[int, Tensor]:
        """Return the derivatives along the gradient, times the step, or the stream a step away, `[B, T, D]` each."""
        self._along = True
        try:
            if not self._exact:
                weights = {name: self._own(name) + moved for name, moved in self._weights.items()}
                return self._run(call, state.caches[0], weights)
            with forward_mode():
                _dual(state)
                weights = {name: dual(self._own(name), moved) for name, moved in self._weights.items()}
                outputs = self._run(call, state.caches[0], weights)
                _undual(state)
                return {layer: derivative(output) for layer, output in outputs.items()}
        except NoDerivative as error:
            raise KnobError(
                f"A part of this {type(self._adapter.model).__name__} has no forward-mode derivative, which the exact "
                f"back end of {self._knob.name!r} needs ({str(error)[:160]}). Use backend='scaled', or load the model "
                "with attn_implementation='eager' and, of experts, experts_implementation='eager'."
            ) from error
        finally:
            self._along = False

    def _run(self, call: CallInfo, cache: Any, weights: Mapping[str, Tensor]) -> dict[int, Tensor]:
        own = next((key for key, value in call.arguments.items() if key in CACHE_NAMES and value is call.cache), None)
        arguments = with_cache(call, cache, own or self._cache_name())
        return run_aside(self._adapter, self._knob.layers, arguments, weights)

    def _cache_name(self) -> str:
        known = signature(self._adapter.decoder.forward).parameters
        return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[0])

    def _note(self, cache: object, notes: dict[str, _State]) -> None:
        if not write_note(cache, notes, NOTE):
            raise CacheError(
                f"Cannot follow a KV cache of type {type(cache).__name__} from call to call, which the lookahead knob "
                f"{self._knob.name!r} needs. Use use_cache=False."
            )

    def _refuse_what_it_cannot_follow(self, call: CallInfo) -> None:
        """Refuse embeddings in place of tokens, whose table the gradient moves, and a dtype that nobody can see."""
        if self._table and call.ids is None:
            raise OptionError(
                f"The lookahead knob {self._knob.name!r} moves the table of embeddings too, and this call brings "
                "embeddings in place of token ids. Pass input_ids."
            )
        kind = call.device.type
        if not self._exact and torch.is_autocast_enabled(kind):
            said = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
            raise KnobError(
                f"Under autocast the model computes in {said}, for which the step of {self._knob.name!r} was not "
                "chosen. Use backend='exact', or load the model in that dtype."
            )

    def _refuse_moving_rows(self) -> None:
        around = generating()
        if around is not None and (around.beams or around.assisted):
            what = "beam search, which moves rows" if around.beams else "guesses, which are taken back"
            raise OptionError(f"Lookahead knobs cannot follow {what}. Sample, or decode greedily.")

    # The gradient

    def _own(self, name: str) -> Tensor:
        return self._adapter.model.get_parameter(name).detach()

    def _prepare(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Return what each module's output gains by a step; how far it moves other weights goes to `_weights`."""
        model, hooks = self._adapter.model, dict[str, Callable[[Tensor, Tensor], Tensor]]()
        for name, part in self._knob.parts.items():
            path, _, _ = name.rpartition(".")
            module, own = model.get_submodule(path), self._own(name)
            scale = embedding_scale(module)
            self._table = self._table or module is self._adapter.embedding
            thin = isinstance(part, LowRank) and (is_linear(model, name) or scale is not None)
            if not thin:
                whole = part.dense() if isinstance(part, LowRank) else part.float()
                self._weights[name] = self._finite((whole * self._step).to(own), name)
                continue
            assert isinstance(part, LowRank)
            factor = self._step**0.5  # on both sides: what is thin in float16 would vanish on one
            a, b = (self._finite((half.float() * factor).to(own), name) for half in part)
            if scale is None:
                a, b = (a, b) if isinstance(module, nn.Linear) else (b.T, a.T)
                hooks[path] = partial(self._linear, a, b)
            else:
                hooks[path] = partial(self._embedding, a * scale, b)
        return hooks

    def _finite(self, moved: Tensor, name: str) -> Tensor:
        if not bool(moved.isfinite().all()):
            raise KnobError(
                f"The gradient of {name!r} in {self._knob.name!r} holds values that are not finite in {moved.dtype}."
            )
        return moved

    def _linear(self, a: Tensor, b: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
        if not self._along:
            return output
        plain = halves(inputs)[0] if self._exact else inputs
        return self._moved(output, plain @ a.T @ b.T)

    def _embedding(self, a: Tensor, b: Tensor, ids: Tensor, output: Tensor) -> Tensor:
        return self._moved(output, b[ids] @ a) if self._along else output

    def _moved(self, output: Tensor, by: Tensor) -> Tensor:
        if not self._exact:
            return output + by
        plain, own = halves(output)
        return dual(plain, by if own is None else own + by)


def _notes(cache: object) -> dict[str, _State]:
    note = read_note(cache, NOTE)
    return cast(dict[str, _State], note) if isinstance(note, dict) else {}


def _dual(state: _State) -> None:
    """Put the derivatives back beside the cached keys and values; they do not outlive a level of forward mode."""
    found = cache_tensors(state.caches[0])
    for (put, tensor), tangent in zip(found, state.tangents, strict=False):
        if tangent is not None:
            put(dual(tensor, tangent))


def _undual(state: _State) -> None:
    state.tangents = []
    for put, tensor in cache_tensors(state.caches[0]):
        plain, tangent = halves(tensor)
        put(plain)
        state.tangents.append(tangent)


@contextmanager
def _no_gradients() -> Generator[None]:
    """Record nothing for a backward pass; inference mode, which knows no derivatives at all, is left meanwhile."""
    with ExitStack() as exits:
        exits.enter_context(torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext())
        exits.enter_context(torch.no_grad())
        yield


def mean_lengths(
    adapter: Adapter,
    knob: LookaheadKnob,
    batches: Sequence[tuple[Mapping[str, Tensor], Tensor]],
) -> dict[int, float]:
    """Return the mean norm of `J G` at every active layer, over the marked tokens of some batches.

    A batch is the model's inputs, and a mask `[B, T]` of the tokens that count. The knob's own scales are a guess that
    keeps numbers in range.
    """
    stream = Stream(adapter, knob, apart=True)
    sums, count = dict.fromkeys(knob.layers, 0.0), 0
    for inputs, counted in batches:
        with stream.ready(), adapter.write({}, before=stream.begin):
            adapter.run_to(0, **inputs)
        for layer in knob.layers:
            moved = stream.displacement(layer)
            moved = moved[counted.to(moved.device)]
            sums[layer] += float(moved.norm(dim=-1).sum()) * knob.scales[layer] / knob.norms[layer]
        count += int(counted.sum())
    return {layer: total / count for layer, total in sums.items()}
