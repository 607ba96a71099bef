"""Forward-mode derivatives of a model's own code: one level at a time, with rules that read a weight once.

A derivative is carried beside each value that has one (torch's dual tensors), and no architecture is named.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_LEVEL = threading.RLock()
"""Torch has one level of forward mode for the whole process."""
_MISSING = ("forward AD", "forward mode", "forward-mode", "jvp")
"""What torch says of a function without a forward-mode derivative holds one of these."""


class NoDerivative(Exception):
    """A part of the code has no forward-mode derivative; never leaves the lookahead's stream."""


@contextmanager
def forward_mode() -> Generator[None]:
    """Carry derivatives inside the context; other threads wait for their turn.

    Attention takes the implementation that torch can derive. Raises `NoDerivative` where there is none.
    """
    _load()
    try:
        with _LEVEL, forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _Rules():
            yield
    except NotImplementedError as error:
        raise NoDerivative(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        if "Nested" in str(error) or not any(word in str(error) for word in _MISSING):
            raise
        raise NoDerivative(str(error).splitlines()[0]) from error


def dual(value: Tensor, derivative: Tensor) -> Tensor:
    """Return a value with its derivative, of its shape and dtype."""
    return forward_ad.make_dual(value, derivative)


def halves(value: object) -> tuple[Any, Tensor | None]:
    """Return a value and its derivative, if it has one."""
    return forward_ad.unpack_dual(value) if isinstance(value, Tensor) else (value, None)


def derivative(value: Tensor) -> Tensor:
    """Return the derivative of a value, zeros where it has none."""
    plain, own = halves(value)
    return torch.zeros_like(plain) if own is None else own


@cache
def _load() -> None:
    """Let torch load its rules for forward mode, with which it uses what it has deprecated itself, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with _LEVEL, forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


class _Rules(TorchFunctionMode):
    """Derive products and sums where only some of the operands have a derivative.

    Torch writes a missing derivative out as zeros, those of a linear layer's weights too and at every token, which more
    than doubles what a layer costs. Here its weights are read once, for values and derivatives together.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = None if kwargs else _RULES.get(func)
        made = None if rule is None else rule(func, *args)
        return func(*args, **(kwargs or {})) if made is None else made


def _linear(_func: object, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    (x, dx), (w, dw), (b, db) = halves(inputs), halves(weight), halves(bias)
    if dx is None:
        return None
    y, dy = linear(torch.stack([x, dx]), w)
    dy = dy if dw is None else dy + linear(x, dw)
    return dual(y if b is None else y + b, dy if db is None else dy + db)


def _conv1d(func: object, bias: Tensor, inputs: Tensor, weight: Tensor) -> Tensor | None:
    return _linear(func, inputs, weight.t(), bias)


def _times(func: Callable[..., Tensor], one: object, other: object) -> Tensor | None:
    (a, da), (b, db) = halves(one), halves(other)
    if (da is None) == (db is None):
        return None
    return dual(func(a, b), func(a if da is None else da, b if db is None else db))


def _plus(func: Callable[..., Tensor], one: object, other: object) -> Tensor | None:
    (a, da), (b, db) = halves(one), halves(other)
    moved = da if db is None else db
    if moved is None or (da is not None and db is not None):
        return None
    total = func(a, b)
    if total.shape != moved.shape or total.dtype != moved.dtype:
        return None
    return dual(total, moved.clone())  # a sum may be added to in place, its operand's derivative not


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    linear: _linear,
    torch.addmm: _conv1d,  # in the module of that name, which GPT-2 has
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _times),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _plus),
}
"""By function: what takes it and its arguments, and returns a result with its derivative, or None to leave it be."""
