"""How much one client may ask for: requests per minute, and requests at a time, in bounded memory."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from trimtab.serve.refusal import Refusal, retry_after

PLACES = 10_000
"""Clients that are remembered one by one."""


@dataclass
class _Bucket:
    tokens: float
    filled: float
    """When `tokens` was last brought up to date."""
    live: int = 0


class Limits:
    """A token bucket per client, which holds a minute's requests, and a count of its requests in progress.

    A client whose bucket is full again is forgotten, as it is like a new one. Where `places` clients are known,
    newcomers share one bucket: a flood of addresses gains nothing by it.
    """

    def __init__(
        self,
        rate: float | None = None,
        concurrency: int | None = None,
        *,
        places: int = PLACES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rate, self.concurrency, self.places, self.clock = rate, concurrency, places, clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()  # the longest unused first
        self._crowd = _Bucket(self._capacity, clock())

    @property
    def _capacity(self) -> float:
        return max(self.rate or 1.0, 1.0)

    @contextmanager
    def admitted(self, client: str) -> Generator[None]:
        """Count a request while the context lasts; raises `Refusal` that names the limit which the client is at."""
        bucket = self.charge(client)
        if self.concurrency is not None and bucket.live >= self.concurrency:
            raise Refusal(
                429,
                f"At most {self.concurrency} requests of one client are worked on at a time. Wait for one to end.",
                code="concurrency_limit_exceeded",
                headers=retry_after(1),
            )
        bucket.live += 1
        try:
            yield
        finally:
            bucket.live -= 1

    def charge(self, client: str) -> _Bucket:
        """Take a token from a client's bucket; raises `Refusal` where there is none."""
        bucket = self._bucket(client)
        if self.rate is None:
            return bucket
        now = self.clock()
        bucket.tokens = min(self._capacity, bucket.tokens + (now - bucket.filled) * self.rate / 60)
        bucket.filled = now
        if bucket.tokens < 1:
            wait = (1 - bucket.tokens) * 60 / self.rate
            raise Refusal(
                429,
                f"At most {self.rate:g} requests a minute are taken of one client. Come again in {wait:.1f} s.",
                code="rate_limit_exceeded",
                headers=retry_after(wait),
            )
        bucket.tokens -= 1
        return bucket

    def _bucket(self, client: str) -> _Bucket:
        known = self._buckets.get(client)
        if known is None:
            self._forget()
            if len(self._buckets) >= self.places:
                return self._crowd
            known = self._buckets[client] = _Bucket(self._capacity, self.clock())
        self._buckets.move_to_end(client)
        return known

    def _forget(self) -> None:
        """Drop a few clients that are as new ones; each call drops more than it makes room for, so that none waits."""
        full = 60 * self._capacity / self.rate if self.rate else 0.0  # seconds until any bucket is full
        for _ in range(min(4, len(self._buckets))):
            client, bucket = next(iter(self._buckets.items()))
            if bucket.live:
                self._buckets.move_to_end(client)
            elif self.clock() - bucket.filled >= full:
                del self._buckets[client]
            else:
                return


def client_of(address: str) -> str:
    """Return what stands for one client among addresses: of IPv6 the first 64 bits, all of which one site has.

    >>> client_of("2001:db8::1") == client_of("2001:db8::2")
    True
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
