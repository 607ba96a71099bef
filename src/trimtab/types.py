"""Small frozen values shared by every part, and the notation they follow.

Letters in shapes: `B` rows of a batch, `T` tokens, `N` pairs, `S` sites, `L` layers, `D` hidden width, `K` knobs.
Layer `i` is the output of decoder block `i`, 0-based, before any final norm; it is read and written at that same point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, cast

from trimtab.errors import OptionError, unknown_name

Where = Literal["all", "prompt", "context", "completion", "thinking", "answer"]
"""Which tokens are steered, for a prompt of P tokens in absolute positions.

`prompt` is 0..P-1, `completion` is P-1 and later (P-1 predicts the first new token), `all` is both. `context` is
0..P-2, what `completion` leaves: the model reads under the knob and decides without it. `thinking` and `answer` split
`completion` for models that think first: a token belongs to the thoughts from the marker that opens them up to the
token before the one that closes them.
"""

WHERE: tuple[Where, ...] = ("all", "prompt", "context", "completion", "thinking", "answer")

Markers = tuple[Sequence[int], Sequence[int]]
"""The token ids that open a model's thoughts, and those that close them."""

LATER: frozenset[Where] = frozenset(("completion", "thinking", "answer"))
"""Those that leave every token before the prompt's last one alone."""

THOUGHTS: frozenset[Where] = frozenset(("thinking", "answer"))
"""Those that depend on what the tokens say."""

Setting = Mapping[str, float]
"""Knob names to strengths, e.g. `{"math": 0.8, "concise": -1}`."""


ROLES = ("system", "user", "assistant")
"""Who may speak in a conversation."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """A prompt with the answer that is preferred and the one that is not.

    `prompt` holds every turn before the answer, system line included; `meta` holds the record's other fields.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    meta: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, order=True)
class Site:
    """Where the residual stream is read: a layer and a position rule.

    >>> Site.parse("4/post_instruction[-1]")
    Site(layer=4, position='post_instruction[-1]')
    """

    layer: int
    position: str

    def __str__(self) -> str:
        return f"{self.layer}/{self.position}"

    @staticmethod
    def parse(text: str) -> Site:
        """Read a site back from its text form `layer/position`."""
        layer, slash, position = text.partition("/")
        if not slash or not position or not re.fullmatch(r"0|[1-9][0-9]{0,8}", layer):
            raise OptionError(f"A site is written layer/position, e.g. 4/last; got {text[:60]!r}.")
        return Site(int(layer), position)


def is_knob_name(text: str) -> bool:
    """Tell whether a knob can have the name: 1 to 100 printable characters, no space, comma or equals sign."""
    return re.fullmatch(r"[^\s,=]{1,100}", text) is not None and text.isprintable()


def is_unicode(text: str) -> bool:
    """Tell whether a tokenizer can take the text: halves of surrogate pairs are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_strength(value: float, name: str = "strength") -> float:
    """Return `value` as a float, or raise `OptionError` if it is not a finite number."""
    if isinstance(value, bool):
        raise OptionError(f"The {name} must be a number; got {value!r}.")
    if isinstance(value, str) and not value.isascii():  # digits of other alphabets
        raise OptionError(f"The {name} must be a number; got {value!r}.")
    try:
        number = float(value.replace("_", "x") if isinstance(value, str) else value)  # 1_0 is Python's spelling
    except OverflowError:
        raise OptionError(f"The {name} must be finite; got a whole number beyond every float.") from None
    except (TypeError, ValueError):
        raise OptionError(f"The {name} must be a number; got {value!r}.") from None
    if not math.isfinite(number):
        raise OptionError(f"The {name} must be finite; got {value!r}.")
    return number


def check_several(values: object, name: str) -> list[float]:
    """Return several numbers as a list, or raise `OptionError` for a number alone, and for what is no number."""
    found = list(cast(Iterable[object], values)) if isinstance(values, Iterable) else []
    if not isinstance(values, Iterable) or any(isinstance(v, bool) or not isinstance(v, Real) for v in found):
        raise OptionError(f"{name} are several numbers, as in [0.1, 0.2], or [0.1] for one; got {values!r}.")
    return cast(list[float], found)


def check_count(value: int, name: str) -> None:
    """Raise `OptionError` for what is no whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"{name} is a whole number, 1 or more; got {value!r}.")


def check_seed(value: object) -> int:
    """Return `value` if it can seed torch's generators, or raise `OptionError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise OptionError(f"The seed is a whole number from 0 to 2**63 - 1; got {value!r}.")
    return value


def check_where(value: object) -> Where:
    """Return `value` if it names tokens to steer, or raise `UnknownName` with the names there are."""
    if value not in WHERE:
        raise unknown_name("where", str(value), WHERE)
    return value


def parse_setting(text: str) -> dict[str, float]:
    """Read a knob setting from its text form.

    >>> parse_setting("math=0.8, concise=-1")
    {'math': 0.8, 'concise': -1.0}
    """
    setting: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise OptionError(f"A knob setting is written name=strength, e.g. math=0.8,concise=-1; got {part!r}.")
        if name in setting:
            raise OptionError(f"Knob {name!r} is set twice in {text!r}.")
        setting[name] = check_strength(value, f"strength of {name!r}")  # pyright: ignore[reportArgumentType]
    return setting


def format_setting(setting: Setting) -> str:
    """Write a knob setting in its text form.

    >>> format_setting({"math": 0.8, "concise": -1})
    'math=0.8,concise=-1'
    """
    return ",".join(f"{name}={strength:g}" for name, strength in setting.items())
