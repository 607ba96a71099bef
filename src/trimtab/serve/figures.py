"""What a load came to: requests and tokens per second, how long people waited, and what went wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Outcome:
    """One request, in seconds of one clock: when it began, when pieces of text came, how it ended.

    `begun` is when the request was due, so that waiting for a place counts, and what the server asked to wait after
    429 too: it is what whoever asked has waited.
    """

    begun: float
    pieces: list[float] = field(default_factory=list[float])
    ended: float = 0.0
    tokens: int | None = None  # as the server counts them
    retries: int = 0
    finished: bool = False  # the server said that the answer is whole
    disconnected: bool = False
    error: str | None = None
    said: str = ""

    def fail(self, kind: str, said: str) -> None:
        """Count as an error of a kind, with what was said of it."""
        self.error, self.said = kind, said


@dataclass(frozen=True)
class Spread:
    """Of many numbers, by nearest rank: each is one that was measured."""

    median: float
    p90: float
    p99: float


def spread(numbers: Iterable[float]) -> Spread | None:
    """Return median, 90th and 99th percentile, or None where there is nothing.

    >>> spread(range(1, 101))
    Spread(median=50, p90=90, p99=99)
    """
    ranked = sorted(numbers)
    if not ranked:
        return None
    return Spread(*(ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True)
class Failure:
    """Requests that failed in one way, and what the first of them was told."""

    count: int
    first: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a load measured; times are in seconds, of whole answers alone, and None where there was none.

    `retries` counts refusals with 429 that were waited for, which are no errors. `tokens` are those of whole answers,
    as the server's `usage` has them; of a server without, pieces of text are counted, and each may hold several.
    `inter_token_latency` is the time between two pieces of text.
    """

    model: str
    requests: int
    answered: int
    disconnected: int
    errors: dict[str, Failure]
    retries: int
    seconds: float
    requests_per_second: float
    tokens: int
    tokens_per_second: float
    tokens_from: Literal["usage", "pieces", "both"] | None
    time_to_first_token: Spread | None
    inter_token_latency: Spread | None
    end_to_end_latency: Spread | None


def figures(model: str, outcomes: Sequence[Outcome], seconds: float) -> Figures:
    """Sum up the requests of a load that took so many seconds in all."""
    whole = [one for one in outcomes if one.error is None and not one.disconnected]
    tokens = sum(len(one.pieces) if one.tokens is None else one.tokens for one in whole)
    sources: set[Literal["usage", "pieces"]] = {"pieces" if one.tokens is None else "usage" for one in whole}
    gaps = (later - earlier for one in whole for earlier, later in zip(one.pieces, one.pieces[1:], strict=False))
    return Figures(
        model=model,
        requests=len(outcomes),
        answered=len(whole),
        disconnected=sum(one.error is None and one.disconnected for one in outcomes),
        errors=_errors(outcomes),
        retries=sum(one.retries for one in outcomes),
        seconds=seconds,
        requests_per_second=len(whole) / seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        tokens_from="both" if len(sources) > 1 else next(iter(sources), None),
        time_to_first_token=spread(one.pieces[0] - one.begun for one in whole if one.pieces),
        inter_token_latency=spread(gaps),
        end_to_end_latency=spread(one.ended - one.begun for one in whole),
    )


def _errors(outcomes: Sequence[Outcome]) -> dict[str, Failure]:
    failed = [one for one in outcomes if one.error is not None]
    first = {one.error: one.said for one in reversed(failed)}
    counts = Counter(one.error for one in failed)
    return {str(kind): Failure(count, first[kind]) for kind, count in counts.most_common()}
