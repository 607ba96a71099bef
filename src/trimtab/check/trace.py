"""Which absolute positions of each row are steered, read off the residual stream itself and not off any mask."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter, CallInfo, Reading
from trimtab.errors import AdapterError


class Broken(AssertionError):
    """A check that does not hold; its text says what was seen."""


class Trace:
    """What `tracing` saw: `steered[row][position]` says whether that token was changed at the layer.

    Positions count a row's real tokens from 0, padding not counted. Tokens that come several times (without a KV cache
    every call brings all of them) must be treated alike each time: `Broken` otherwise.
    """

    def __init__(self, layer: int, prompt_mask: Tensor, reading: Reading) -> None:
        self._layer, self._reading = layer, reading
        self._mask = prompt_mask.bool()  # [B, columns of the prompt]
        self._start = self._stop = 0  # columns of the latest call
        self._before: Tensor | None = None
        self.steered: list[dict[int, bool]] = [{} for _ in range(len(prompt_mask))]

    def positions(self) -> list[list[int]]:
        """Return the steered positions of each row, in order."""
        return [sorted(position for position, steered in row.items() if steered) for row in self.steered]

    def call(self, call: CallInfo) -> None:
        """Note a forward that begins."""
        self.finish()
        # Counted here, since recurrent states do not tell how many tokens they hold. Without a cache, or with one that
        # is not seen, a call either begins again and brings the whole prompt, or goes on.
        again = call.cache is None and call.tokens >= self._mask.shape[1]
        self._start = 0 if again else self._stop
        self._stop = self._start + call.tokens

    def keep(self, hidden: Tensor) -> Tensor:
        """Keep a block's own output."""
        self._before = hidden.clone()
        return hidden

    def finish(self) -> None:
        """Compare what the block gave with what the latest call went on with."""
        if self._before is None:
            return
        held, brought = self._before.shape[1], self._stop - self._start
        if held != brought:
            raise AdapterError(f"The blocks hold {held} tokens in a call of {brought}: their positions are not known.")
        changed = (self._reading.acts[self._layer] != self._before).any(-1).tolist()  # [B, T]
        self._before = None
        times = len(changed) // len(self._mask)
        new = torch.ones(len(self._mask), max(self._stop - self._mask.shape[1], 0), dtype=torch.bool)
        real = torch.cat([self._mask.cpu(), new], 1)
        places = (real.cumsum(1) - 1).tolist()
        for number, flags in enumerate(changed):
            row = number // times
            for column, flag in enumerate(flags, self._start):
                place = places[row][column]
                if not real[row, column]:
                    if flag:
                        raise Broken(f"Padding was steered: row {row}, column {column}.")
                elif self.steered[row].setdefault(place, flag) != flag:
                    raise Broken(f"Position {place} of row {row} was steered in one call and not in another.")


@contextmanager
def tracing(adapter: Adapter, layer: int, prompt_mask: Tensor) -> Generator[Trace]:
    """Trace one layer, inside `steer`. Whatever runs here begins with prompts padded as in `prompt_mask [B, P]`.

    The model may run a multiple of these rows (beams): neighbours count as one row.
    """
    with adapter.read([layer]) as reading:  # what the knobs have made of the block's output
        trace = Trace(layer, prompt_mask, reading)
        with adapter.write({layer: trace.keep}, before=trace.call):  # entered last: sees that output first
            yield trace
            trace.finish()


@contextmanager
def watching(model: nn.Module, path: str) -> Generator[dict[int, Tensor]]:
    """Note what each block of the list at `path` returns: without hooks and without the adapter, to judge it by.

    While it lasts, each block's `forward` is one that also takes a note.
    """
    seen: dict[int, Tensor] = {}

    def noting(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def function(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen[layer] = output[0] if isinstance(output, tuple | list) else output
            return output

        return function

    with ExitStack() as exits:
        for layer, block in enumerate(cast(nn.ModuleList, model.get_submodule(path))):
            own, forward = vars(block), block.forward
            if "forward" in own:  # most have their class's; accelerate and torch.compile give a block one of its own
                exits.callback(own.update, forward=forward)
            else:
                exits.callback(own.pop, "forward")
            own["forward"] = noting(layer, forward)
        yield seen
