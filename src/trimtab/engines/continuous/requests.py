"""What a request to the engine is, and what it gives back, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trimtab.engines.admission import Admitted

Ending = Literal["", "stop", "length", "error"]
"""Why an answer is over: an end token, its length, or a failure; empty while it goes on."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are drawn.

    `temperature` 0 is greedy. `top_p` keeps the likeliest tokens that hold this share. The same `seed` draws the same
    tokens, whatever else is in the batch; None draws anew. `logprobs` asks for the log-probability of every token, and
    for as many alternatives; it is that of the model's own distribution, at temperature 1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """A prompt and what to do with it."""

    ids: Sequence[int]
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer, and belong to it no more."""
    knobs: Admitted | None = None
    sampling: Sampling = Sampling()
    projections: bool = False
    """Whether every token comes with the components of the residual stream along the knobs' directions."""


class Token(NamedTuple):
    """A token of an answer."""

    id: int
    logprob: float | None
    """None unless the request asks for log-probabilities."""
    top: Sequence[tuple[int, float]]
    """The likeliest tokens with their log-probabilities, best first."""
    projections: Mapping[str, float]
    """By the names of knobs: where the token was predicted, in multiples of the mean residual norm at the layer."""


class Step(NamedTuple):
    """What one step of the engine has brought for a request."""

    token: Token | None
    """None where the answer is over without another one: its end token is left out."""
    ending: Ending = ""
    error: str = ""
    """What a client may be told of a failure."""
