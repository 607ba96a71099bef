"""Mistakes that steering is known for, each a few lines put into the package, for `check` to see.

A mistake is named by what it does. It takes the place of one function, which it is given as `old`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from trimtab import addends, positions, runtime
from trimtab.adapter import Adapter, CallInfo
from trimtab.positions import Follower
from trimtab.runtime import Steering


class Mistake(NamedTuple):
    """Where a mistake is made, what takes the place of what is there, and a check that must fail."""

    owner: Any
    name: str
    wrong: Callable[[Any], Any]
    seen_by: str


# read


def reads_the_input(old: Any) -> Any:
    return lambda aside, look, layer, module, args, output: look(layer, args[0].detach())


def counts_from_the_embeddings(old: Any) -> Any:
    """Layer i is entry i of hidden_states, the input of block i: both reading and writing think so."""

    def made(self: Adapter, *args: Any, **options: Any) -> None:
        old(self, *args, **options)
        self.blocks = [self.blocks[0], *self.blocks[:-1]]

    return made


def ends_after_the_final_norm(old: Any) -> Any:
    """The last layer is the last entry of hidden_states: both reading and writing think so."""

    def made(self: Adapter, *args: Any, **options: Any) -> None:
        old(self, *args, **options)
        self.blocks[-1] = self.model.get_submodule("model.norm")

    return made


# write


def one_layer_late(old: Any) -> Any:
    return lambda adapter, knob, site: min(old(adapter, knob, site) + 1, adapter.n_layers - 1)


def twice(old: Any) -> Any:
    return lambda self, layer, hidden: old(self, layer, old(self, layer, hidden))


# zero


def keeps_away_from_zero(old: Any) -> Any:
    return lambda dose: {knob: strength or 1e-6 for knob, strength in old(dose).items()}


def steers_in_half_precision(old: Any) -> Any:
    @contextmanager
    def counted(self: Steering) -> Iterator[None]:
        with old(self), torch.autocast("cpu", torch.bfloat16):
            yield

    return counted


def forgets_the_finally(old: Any) -> Any:
    @contextmanager
    def counted(self: Steering) -> Iterator[None]:
        yield
        self.clear()

    return counted


# positions


def forgets_the_mask(old: Any) -> Any:
    return lambda self, call: {"all": None, "prompt": None, "context": None, "completion": None}


def counts_from_each_call(old: Any) -> Any:
    return lambda prompt, past, tokens, real: old(prompt, 0, tokens, real)


def steers_padding(old: Any) -> Any:
    return lambda self, call: {w: None for w, m in old(self, call).items()}


# cache


def steers_the_prompt_only(old: Any) -> Any:
    return lambda self, layer, hidden: old(self, layer, hidden) if hidden.shape[1] > 1 else hidden


def steers_the_last_token_of_each_call(old: Any) -> Any:
    return lambda self, layer, hidden: torch.cat([hidden[:, :-1], old(self, layer, hidden)[:, -1:]], 1)


def steers_new_tokens_twice(old: Any) -> Any:
    """Once by their mask and once more by the shortcut for decode steps."""
    return lambda self, layer, hidden: old(self, layer, old(self, layer, hidden) if hidden.shape[1] == 1 else hidden)


# padding


def expects_padding_on_the_right(old: Any) -> Any:
    def real_tokens(self: CallInfo, past: int) -> Any:
        real = old(self, past)
        return None if real is None else real.sort(1, descending=True).values

    return real_tokens


def counts_padding(old: Any) -> Any:
    """Padding is left alone, but counted."""

    def compare(prompt: Any, past: int, tokens: int, real: Any) -> Any:
        masks = old(prompt, past, tokens, None)
        return masks if real is None else {w: real if m is None else m & real for w, m in masks.items()}

    return compare


def thins_the_vector_by_padding(old: Any) -> Any:
    """A mean over columns that should have been one over tokens."""

    def before(self: Steering, follower: Follower, call: CallInfo) -> None:
        old(self, follower, call)
        if (real := call.real_tokens(call.past(0))) is not None:
            share = real.float().mean(1)[:, None, None]
            self._masks = {w: None if m is None else m * share for w, m in self._masks.items()}

    return before


# rows


def first_row_for_all(old: Any) -> Any:
    return lambda rows, layers: {key: t[:1].expand_as(t) for key, t in old(rows, layers).items()}


def rows_in_reverse(old: Any) -> Any:
    """Rows were sorted, and not put back."""
    return lambda rows, layers: {key: t.flip(0) for key, t in old(rows, layers).items()}


MISTAKES = {
    "the input of the block is read": Mistake(sys.modules[Adapter.__module__], "_look", reads_the_input, "read"),
    "layers counted from the embeddings": Mistake(Adapter, "__init__", counts_from_the_embeddings, "read"),
    "last layer after the final norm": Mistake(Adapter, "__init__", ends_after_the_final_norm, "read"),
    "one layer late": Mistake(addends, "_fitting_layer", one_layer_late, "write"),
    "the vector twice": Mistake(Steering, "_apply", twice, "write"),
    "strength 0 is a small one": Mistake(runtime, "check_dose", keeps_away_from_zero, "zero"),
    "half precision inside": Mistake(Steering, "counted", steers_in_half_precision, "zero"),
    "hooks stay after an error": Mistake(Steering, "counted", forgets_the_finally, "zero"),
    "no mask": Mistake(Follower, "masks", forgets_the_mask, "positions"),
    "positions of the call": Mistake(positions, "_compare", counts_from_each_call, "positions"),
    "padding steered": Mistake(Follower, "masks", steers_padding, "positions"),
    "decode steps unsteered": Mistake(Steering, "_apply", steers_the_prompt_only, "cache"),
    "last token of each call": Mistake(Steering, "_apply", steers_the_last_token_of_each_call, "cache"),
    "new tokens twice": Mistake(Steering, "_apply", steers_new_tokens_twice, "cache"),
    "padding thought on the right": Mistake(CallInfo, "real_tokens", expects_padding_on_the_right, "padding"),
    "padding counted": Mistake(positions, "_compare", counts_padding, "padding"),
    "weaker the more padding": Mistake(Steering, "_before", thins_the_vector_by_padding, "padding"),
    "one row's knob for all": Mistake(addends, "_sum_addends", first_row_for_all, "rows"),
    "rows in reverse": Mistake(addends, "_sum_addends", rows_in_reverse, "rows"),
}
