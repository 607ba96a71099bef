"""Files of records: JSON lines, JSON, CSV, TSV and Parquet, strictly read, each record with the place it stands at."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, cast

from trimtab.errors import MissingDependency, PairsError, brief
from trimtab.files import parse_json

FIELDS = ("prompt", "chosen", "rejected")
"""What a record of a pair is made of; whatever else it holds is kept as it is."""


class Placed(NamedTuple):
    """A record and where it was found, as in "Line 3", "Item 3" or "Row 3"."""

    place: str
    record: object


def read_file(path: str | Path) -> list[Placed]:
    """Read the records of a file, in the way that its suffix names: one of `READERS`, and `.gz` after it if packed.

    JSON has to be JSON: a key that an object gives twice, and NaN, are refused and not guessed at. The first line of
    a table (CSV, TSV) names its columns; its cells are text, or in the columns `FIELDS` a JSON list of messages.
    Raises `PairsError` that names the line, item or row, and `MissingDependency` for Parquet without pyarrow.
    """
    file = Path(path)
    packed = file.suffix.lower() == PACKED and bool(Path(file.stem).suffix)
    suffix = (Path(file.stem) if packed else file).suffix
    reader = READERS.get(suffix.lower())
    try:
        with file.open("rb") as stream:
            if reader is None:
                got = f"the suffix {suffix!r}" if suffix else "no suffix"
                known = ", ".join(sorted(READERS))
                raise PairsError(
                    f"Cannot tell what {str(path)!r} holds: it has {got}. Known: {known}. Rename it; packed by gzip it "
                    f"is read too, with {PACKED} after that."
                )
            data = stream.read()
        if packed:
            data = gzip.decompress(data)
    except PairsError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PairsError(f"Cannot unpack {str(path)!r}: {str(error).rstrip('.')}.") from None
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        raise PairsError(f"Cannot read {str(path)!r}: {getattr(error, 'strerror', error)}.") from None
    try:
        return reader(data)
    except PairsError as error:
        raise PairsError(f"{path}: {error}") from None


def kind(value: object) -> str:
    """Say what a value is, in the words of JSON.

    >>> kind([1])
    'a list'
    """
    names = {
        "dict": "an object",
        "list": "a list",
        "str": "text",
        "bool": "true or false",
        "int": "a number",
        "float": "a number",
        "bytes": "bytes",
        "NoneType": "null",
    }
    return names.get(type(value).__name__, f"a {type(value).__name__}")


# Text


def _text(data: bytes) -> str:
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise PairsError(
            "The file is not text: it holds zero bytes, as binary files and UTF-16 do. Save it as UTF-8, or give it "
            "the suffix of what it is."
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        begin = data.rfind(b"\n", 0, error.start) + 1
        line, column = data.count(b"\n", 0, begin) + 1, error.start - begin + 1
        raise PairsError(
            f"Line {line} is not UTF-8: byte {column} of the line is {data[error.start]:#04x}. Save the file as UTF-8."
        ) from None


# JSON


def _json_lines(data: bytes) -> list[Placed]:
    lines = [(f"Line {n}", line) for n, line in enumerate(_text(data).split("\n"), 1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("["):
        raise PairsError(f"{lines[0][0]} starts a list; a file that holds one list of records is named .json.")
    return [Placed(place, _parse(line, place)) for place, line in lines]


def _json(data: bytes) -> list[Placed]:
    text = _text(data)
    if not text.strip():
        return []
    records = _parse(text, "The file")
    if not isinstance(records, list):
        raise PairsError(f"The file holds {kind(records)}; a .json file of records holds a list of them.")
    return [Placed(f"Item {n}", record) for n, record in enumerate(cast(list[object], records), 1)]


def _parse(text: str, place: str) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        hint = ""
        if error.msg == "Extra data":
            hint = " A file with one record per line is named .jsonl, and each line holds one."
        raise PairsError(f"{place} is not JSON: {error.msg} at {line}column {error.colno}.{hint}") from None
    except ValueError as error:
        raise PairsError(f"{place} cannot be read: {error}.") from None


def _first_repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


# Tables


def _csv(data: bytes) -> list[Placed]:
    return _table(_text(data), ",", "commas")


def _tsv(data: bytes) -> list[Placed]:
    return _table(_text(data), "\t", "tabs")


def _table(text: str, delimiter: str, named: str) -> list[Placed]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    found: list[Placed] = []
    while True:
        place = f"Line {reader.line_num + 1}"  # where a row starts: a quoted cell may go on over several lines
        try:
            cells = next(reader, None)
        except csv.Error as error:
            hint = ". Use .jsonl for longer texts" if "limit" in str(error) else ""
            raise PairsError(f"{place} cannot be read as cells separated by {named}: {error}{hint}.") from None
        if cells is None:
            return found
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _header(cells, place, named)
            continue
        if len(cells) != len(header):
            raise PairsError(
                f"{place} has {len(cells)} cells; the header has {len(header)}. A cell that holds {named}, quotes or "
                "line breaks stands in double quotes."
            )
        columns = dict(zip(header, cells, strict=True))
        if not columns.get("prompt", "").strip():
            columns.pop("prompt", None)  # the answers may hold it
        record = {name: _cell(cell, f"{place}, {name}") if name in FIELDS else cell for name, cell in columns.items()}
        found.append(Placed(place, record))


def _header(cells: Sequence[str], place: str, named: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1:
        raise PairsError(f"{place} has one column, {brief(names[0])}; columns are separated by {named}.")
    twice = _first_repeated(names)
    if twice is not None:
        raise PairsError(f"{place} has two columns {brief(twice)}. Rename one of them.")
    return names


def _cell(text: str, place: str) -> object:
    """Return the messages that a cell lists, or else its text."""
    if not re.match(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""", text):
        return text
    try:
        return _parse(text, place)
    except PairsError as error:
        hint = " Lists of messages are written by json.dumps, and not by str." if "'" in text[:20] else ""
        raise PairsError(f"{error}{hint}") from None


def _parquet(data: bytes) -> list[Placed]:
    if find_spec("pyarrow") is None:
        raise MissingDependency("Reading .parquet needs pyarrow. Install it with: pip install pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(pyarrow.BufferReader(data)) as file:
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PairsError(f"The file cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    return [Placed(f"Row {n}", row) for n, row in enumerate(rows, 1)]


PACKED = ".gz"

READERS: dict[str, Callable[[bytes], list[Placed]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""Suffixes of files of pairs, in lower case."""
