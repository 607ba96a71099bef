"""Whom a request may be for and from: its Host, against DNS rebinding, and its Origin, against other pages.

A page in a browser can send requests to any address of this machine. With rebinding, its own name leads to 127.0.0.1,
so that the browser takes the server for the page's own; the name still stands in Host.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass

from trimtab.errors import OptionError, brief
from trimtab.serve.refusal import Refusal

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Tell whether nobody but this machine reaches what listens there; raises `OptionError` for no address at all."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise OptionError(f"{brief(host)} is no address of this machine. Try 127.0.0.1.") from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


@dataclass(frozen=True)
class Hosts:
    """The names under which a server is asked for; None of `names` means any.

    With `literal`, an address that is written in digits will do too: rebinding needs a name.
    """

    names: frozenset[str] | None
    literal: bool = False

    @classmethod
    def of(cls, host: str, allowed: Collection[str] = (), *, keys: bool = False) -> Hosts:
        """Return what a server bound to `host` answers to, beyond the names that are allowed.

        Bound to loopback, that is localhost. Elsewhere it is the address in digits, or, where every request needs a
        key, which no page has, any name.
        """
        for name in allowed:
            match = _HOST.fullmatch(name)
            if not match or match[1] != name:
                raise OptionError(f"{brief(name)} is no name of a host. Write it without scheme and port.")
        names = LOOPBACK_NAMES | {name.lower() for name in allowed}
        if is_loopback(host):
            return cls(names)
        return cls(None) if keys and not allowed else cls(names, literal=True)

    def check(self, header: str | None) -> None:
        """Raise `Refusal` for a Host that is not one of these."""
        if self.names is None:
            return
        match = _HOST.fullmatch(header or "")
        name = match[1].lower() if match else ""
        if name in self.names or (self.literal and _is_address(name)):
            return
        raise Refusal(
            403,
            f"Host {brief(header or '')} is not answered, for a page that rebinds its name could be behind it. Use "
            "localhost, or start the server with --allow-host and this name.",
            code="host_not_allowed",
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def check_origin_option(origin: str) -> str:
    """Return an origin as browsers write it; raises `OptionError` for what none is."""
    if not _ORIGIN.fullmatch(origin):
        raise OptionError(
            f"{brief(origin)} is no origin. Write scheme, host and port as in http://localhost:3000; a path or * is "
            "none."
        )
    return origin.lower()


def check_origin(head: dict[str, str], allowed: Collection[str]) -> None:
    """Raise `Refusal` for a request that would change something and comes from a page of another origin.

    Browsers say so in Sec-Fetch-Site, or else in Origin, and pages cannot alter either; who sends neither is none.
    """
    origin, site = head.get("origin"), head.get("sec-fetch-site")
    if origin is not None and origin.lower() in allowed:
        return
    if site is not None:
        same = site in ("same-origin", "none")
    else:
        same = origin is None or origin.lower() == f"http://{head.get('host', '')}".lower()
    if not same:
        raise Refusal(
            403,
            f"Pages of {brief(origin or 'another origin')} may not use this server. Start it with --allow-origin and "
            "the page's origin to let them.",
            code="origin_not_allowed",
        )
