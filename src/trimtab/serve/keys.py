"""API keys: read from files or the environment, kept as digests, compared in constant time.

A key is never taken from the command line, where `ps` shows it to everybody on the machine, and stands in no message
and no log: a line of the log tells keys apart by a name that is new with every start of the server.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trimtab.errors import OptionError, TrimtabWarning, brief
from trimtab.files import read_bytes, reason

USER_VARIABLE = "TRIMTAB_API_KEY"
ADMIN_VARIABLE = "TRIMTAB_ADMIN_KEY"
SHORTEST = 16
"""Fewest characters of a key: one that nobody guesses."""
_FILE_LIMIT = 2**20


class Caller(NamedTuple):
    """Whose key came with a request."""

    name: str
    """A few hexadecimal digits that tell keys apart while the server runs, and say nothing of the key."""
    admin: bool


@dataclass(frozen=True)
class Keys:
    """The digests of all keys; `of` makes one of keys as they are written."""

    users: tuple[bytes, ...] = ()
    admins: tuple[bytes, ...] = ()
    salt: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, users: tuple[str, ...] = (), admins: tuple[str, ...] = ()) -> Keys:
        """Keep keys by their digests; raises `OptionError` for a key that is for both."""
        if set(users) & set(admins):
            raise OptionError("One key is an API key and an admin key. Whoever has the one would have both: take two.")
        salt = secrets.token_bytes(16)
        made = [tuple(_digest(salt, key.encode()) for key in dict.fromkeys(group)) for group in (users, admins)]
        return cls(made[0], made[1], salt)

    def find(self, key: bytes) -> Caller | None:
        """Return whose key this is, or None. Every key is compared, whichever it is, and each in constant time."""
        digest = _digest(self.salt, key)
        same = [hmac.compare_digest(digest, known) for known in (*self.users, *self.admins)]
        return Caller(digest.hex()[:12], any(same[len(self.users) :])) if any(same) else None


def _digest(salt: bytes, key: bytes) -> bytes:
    """Return the sha256 of a key, salted: the log's names of keys are no help to whoever wants to guess one."""
    return hashlib.sha256(salt + key).digest()


def load_keys(
    file: str | Path | None = None, admin_file: str | Path | None = None, environment: Mapping[str, str] = os.environ
) -> Keys:
    """Read keys from files, one per line, and from TRIMTAB_API_KEY and TRIMTAB_ADMIN_KEY.

    Raises `OptionError` that names the place of a key that cannot be one, and never the key; warns of a file that
    others can read.
    """
    users, admins = _from_file(file), _from_file(admin_file)
    return Keys.of((*users, *_from(environment, USER_VARIABLE)), (*admins, *_from(environment, ADMIN_VARIABLE)))


def _from(environment: Mapping[str, str], variable: str) -> list[str]:
    key = environment.get(variable)
    return [] if key is None else [_checked(key.strip(), variable)]


def _from_file(path: str | Path | None) -> list[str]:
    if path is None:
        return []
    shown = brief(str(path), 240)
    try:
        text = read_bytes(path, _FILE_LIMIT).decode()
        mode = os.stat(path).st_mode
    except OSError as error:
        raise OptionError(f"Cannot read the keys in {shown}: {reason(error)}.") from None
    except UnicodeDecodeError:
        raise OptionError(f"{shown} holds no keys: it is not text. Write one key per line.") from None
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        warnings.warn(
            f"Others on this machine can get at the keys in {shown}. Try: chmod 600", TrimtabWarning, stacklevel=3
        )
    lines = ((number, re.split(r"(?:^|\s)#", line)[0].strip()) for number, line in enumerate(text.splitlines(), 1))
    keys = [_checked(key, f"line {number} of {shown}") for number, key in lines if key]
    if not keys:
        raise OptionError(f"{shown} holds no keys. Write one per line, or leave the option out.")
    return keys


def _checked(key: str, place: str) -> str:
    if len(key) < SHORTEST:
        raise OptionError(
            f"The key in {place} has {len(key)} characters; at least {SHORTEST} are needed. "
            'Try: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(f"The key in {place} has characters that no header can carry. Use letters and digits.")
    return key
