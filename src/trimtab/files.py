"""Read and write files that may be broken, hostile or cut short: regular files only, strict JSON, atomic writes."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

NESTING_LIMIT = 100
"""How many lists and objects of JSON may stand in each other."""


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a regular file whole; raises `OSError` for anything else, and for more than `limit` bytes.

    Nothing is mapped into memory: a mapped file that shrinks meanwhile would end the process. `reason` says in words
    what the error is.
    """
    try:
        with open_regular(path) as (file, size):
            if size > limit:
                raise OSError(f"it has {size} bytes; at most {limit} are read")
            data = file.read(size + 1)
    except MemoryError:
        raise OSError(errno.ENOMEM, "it does not fit into memory") from None
    if len(data) != size:
        raise OSError("it changed while it was read")
    return data


@contextmanager
def open_regular(path: str | Path) -> Generator[tuple[BinaryIO, int]]:
    """Open a regular file for reading, with its size; raises `OSError` for anything else, which is never waited for."""
    try:
        _refuse_special(os.stat(path).st_mode)  # before it is opened: a pipe would block, a device may act on it
    except ValueError:  # os.stat of a name with a null character
        raise OSError(errno.EINVAL, "no file has such a name") from None
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        _refuse_special(status.st_mode)  # another thing may stand there by now
        yield file, status.st_size


def is_knob_file(path: str | Path) -> bool:
    """Tell a knob by its start, which is that of a safetensors file with Trimtab's header; an empty file counts too."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4096)
    return not start or (start[8:9] == b"{" and b'"trimtab"' in start)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: str | Path) -> Generator[BinaryIO]:
    """Open a file that takes the place of `path` when the context ends, and is gone if that ends with an error.

    A reader, or whoever looks after a crash, sees the old file or the new, never a part. Missing folders are made; a
    link is replaced, not followed. Raises `OSError` that names `path`; the old file is then as it was. A process that
    is killed while it writes leaves `.NAME.XXXXXXXX.part` in the folder: nobody reads it, and it can be deleted. No
    later call does so, since it could be the work of a writer that is alive.
    """
    path = Path(path)
    # A name may have 255 bytes; fifty characters leave room for what is added, whatever the alphabet.
    part = path.parent / f".{path.name[:50]}.{secrets.token_hex(4)}.part"
    try:
        refuse_special_target(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with suppress(OSError):  # what nobody else may read stays so
                os.chmod(part, stat.S_IMODE(os.stat(path).st_mode))
            os.replace(part, path)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:  # write and fsync do not say of which file they speak
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from None
    if os.name == "posix":  # the rename itself must reach the disk too; not every file system lets one ask for that
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def refuse_special_target(path: str | Path) -> None:
    """Never put a file in the place of a device or a pipe: the rename would delete it. Raises `OSError`."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have such a name", str(path)) from None
    except OSError:  # nothing there, or a broken link; whatever else is wrong, writing says so
        return
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder; pass the name of a file in it")
    _refuse_special(mode)


def reason(error: OSError) -> str:
    """Return in words why a file could not be read or written, as the end of a sentence, without a full stop."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def parse_json(text: str | bytes, *, deepest: int = NESTING_LIMIT) -> Any:
    """Read JSON as RFC 8259 has it, in UTF-8; raises `ValueError` that says what is wrong.

    Python's own reader takes more: NaN, numbers beyond every float, and of fields of one name it keeps the last.
    """
    too_deep = f"it is nested too deeply: more than {deepest} lists and objects stand in each other"
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value: Any = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise ValueError(too_deep) from None
    level: list[Any] = [value]
    for _ in range(deepest):
        level = [part for item in level for part in _parts(item) if isinstance(part, dict | list)]
    if level:  # what is nested more deeply than this is not safe to print, compare or write
        raise ValueError(too_deep)
    return value


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(fields)
    if len(found) != len(fields):
        twice = next(name for name, count in Counter(name for name, _ in fields).items() if count > 1)
        raise ValueError(f"it has two fields {twice[:40]!r} in one object")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number; JSON has null for what is not known")
    return value


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse_special(mode: int) -> None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")
