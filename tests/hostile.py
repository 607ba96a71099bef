"""Hostile and broken knob files, panels and places, each the same on every run.

    python tests/hostile.py        print how many there are of each kind

Every file but those of the kinds "cut", "bit", "length" and "checksum" carries a checksum that is right, so that what
is wrong with it is found by the check meant for it, and not by the checksum. The files are made without the code that
writes knobs.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import socket
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.artifact import Knob

WIDTH = 8
BLANK = "0" * 64
MARKER = "EXECUTED"
"""The file, in the working folder, that a hostile pickle would make."""

HEADER: dict[str, Any] = {
    "format_version": 1,
    "sha256": BLANK,
    "kind": "steering",
    "name": "math",
    "method": "palrs",
    "site": "1/last",
    "gain": 0.5,
    "norms": {"1": 4.0, "2": 7.5},
    "where": "completion",
    "operation": "add",
    "provenance": {"paper": "arXiv:2509.23982", "options": {"seed": 0}},
    "diagnostics": {"warnings": ["mind the gap"]},
    "tuning": {"safe_range": [-0.5, 1.5]},
}

# What a terminal, a file system or a reader of logs could fall for.
NAMES = {
    "path": "../../etc/passwd",
    "backslashes": "..\\..\\x",
    "null character": "a\0b",
    "newline": "a\nlicence   CC0",
    "carriage return": "a\rb",
    "ANSI escape": "\x1b[2J\x1b[31mred",
    "terminal title": "\x1b]0;title\x07",
    "C1 control": "a\x9bb",
    "bidi override": "a\u202egnp.exe",
    "zero width": "a\u200bb",
    "half a surrogate pair": "a\ud800",
    "line separator": "a\u2028b",
    "very long": "x" * 100_000,
    "empty": "",
    "spaces": " a b ",
}


class Case(NamedTuple):
    """A file that is no knob: what kind of wrong, its name, and its bytes."""

    kind: str
    name: str
    data: bytes


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


VECTORS = {
    "vector/1/last": floats(*(i - 3.5 for i in range(WIDTH))),
    "vector/2/last": floats(*(0.25 * i + 1 for i in range(WIDTH))),
}


def sealed(data: bytes) -> bytes:
    """Put the sha256 of a file where it has a blank for it."""
    return data.replace(BLANK.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def unsealed(data: bytes) -> bytes:
    """Put the blank back, so that a changed file can be sealed anew."""
    said = data.partition(b'sha256\\": \\"')[2][:64]
    return data.replace(said, BLANK.encode(), 1)


def framed(outer: bytes, body: bytes = b"") -> bytes:
    return sealed(struct.pack("<Q", len(outer)) + outer + body)


def entries(vectors: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    start = 0
    for name, data in vectors.items():
        found[name] = {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [start, start + len(data)]}
        start += len(data)
    return found


def knob_file(header: Any = None, vectors: dict[str, bytes] = VECTORS, tensors: Any = None) -> bytes:
    """Build a knob file: `header` as an object or as text, `tensors` as safetensors describes them."""
    text = header if isinstance(header, str) else json.dumps(HEADER if header is None else header)
    outer = {"__metadata__": {"trimtab": text}, **(entries(vectors) if tensors is None else tensors)}
    data = json.dumps(outer, separators=(",", ":")).encode()
    return framed(data + b" " * (-len(data) % 8), b"".join(vectors.values()))  # vectors begin at a multiple of 8


def header_with(**changes: Any) -> dict[str, Any]:
    return {**HEADER, **changes}


VALID = knob_file()
EXAMPLES = {"kind": "softmax", "temperature": 0.5, "scales": {"1/last": 1.5, "2/last": 2.0}}
MATRICES = {
    f"{part}/{site}": floats(*((i * step) % 7 - 3.25 for i in range(3 * WIDTH)))
    for step, part in enumerate(("key", "value"), 2)
    for site in ("1/last", "2/last")
}


def kernel_file(
    examples: Any = EXAMPLES, matrices: dict[str, bytes] = MATRICES, shape: Any = (3, WIDTH), **changes: Any
) -> bytes:
    """Build the file of a kernel knob; `shape` is that of its first matrix, and `changes` go to its header."""
    data = {**matrices, **VECTORS}
    found = entries(data)
    for name in matrices:
        found[name]["shape"] = [3, len(matrices[name]) // 12]
    found[next(iter(matrices))]["shape"] = shape
    return knob_file({**header_with(operation="kernel", kernel=examples), **changes}, data, found)


KERNEL = kernel_file()


class _Opens:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARKER, "w")


def cut() -> Iterator[tuple[str, bytes]]:
    end = 8 + struct.unpack("<Q", VALID[:8])[0]
    places = {0, 1, 7, 8, 9, 10, 16, 100, end // 2, end - 1, end, end + 1, end + 4, end + 32, len(VALID) - 1}
    places |= set(random.Random(1).sample(range(len(VALID)), 15))
    for place in sorted(places):
        yield f"at byte {place}", VALID[:place]
    yield "the last vector is missing", VALID[:-32]
    yield "the first byte is missing", VALID[1:]
    yield "the length is missing", VALID[8:]
    yield "a byte more", VALID + b"\0"
    yield "the file twice", VALID * 2
    yield "a page of zeros at the end", VALID + bytes(4096)
    yield "zeros where the vectors were", VALID[:end] + bytes(len(VALID) - end)
    yield "zeros in the middle", VALID[:200] + bytes(100) + VALID[300:]


def bit() -> Iterator[tuple[str, bytes]]:
    draw = random.Random(2)
    end = 8 + struct.unpack("<Q", VALID[:8])[0]
    for part, start, stop, count in (("length", 0, 8, 8), ("header", 8, end, 30), ("vectors", end, len(VALID), 16)):
        for place in sorted(draw.sample(range(start, stop), count)):
            flipped = bytearray(VALID)
            flipped[place] ^= 1 << draw.randrange(8)
            yield f"in the {part}, byte {place}", bytes(flipped)


def length() -> Iterator[tuple[str, bytes]]:
    true = struct.unpack("<Q", VALID[:8])[0]
    for claim in (0, 1, true - 1, true + 1, len(VALID), len(VALID) - 8, 10**8 + 1, 2**30, 2**31, 2**32 + true,
                  2**62, 2**63, 2**64 - 1):  # fmt: skip
        yield f"{claim}", struct.pack("<Q", claim) + VALID[8:]
    yield "of a header of 9 MB that is there", framed(b"{" + b" " * 9 * 2**20 + b"}")
    yield "big-endian", struct.pack(">Q", true) + VALID[8:]


def offsets() -> Iterator[tuple[str, bytes]]:
    size = 4 * WIDTH
    for name, first, second in (
        ("overlap", [0, size], [size // 2, size // 2 + size]),
        ("the same", [0, size], [0, size]),
        ("a hole before", [4, size + 4], [size + 4, 2 * size + 4]),
        ("a hole between", [0, size], [size + 4, 2 * size + 4]),
        ("end before start", [size, 0], [size, 2 * size]),
        ("beyond the file", [0, size], [2**40, 2**40 + size]),
        ("beyond 64 bits", [0, size], [2**64, 2**64 + size]),
        ("negative", [-size, 0], [0, size]),
        ("floats", [0.0, float(size)], [float(size), 2.0 * size]),
        ("text", ["0", "32"], ["32", "64"]),
        ("one number", [0], [size]),
        ("three numbers", [0, size, size], [size, 2 * size, 0]),
        ("null", None, None),
        ("too short for the shape", [0, size - 4], [size - 4, 2 * size]),
        ("too few in all", [0, size], [size, 2 * size - 4]),
    ):
        tensors = entries(VECTORS)
        for entry, wrong in zip(tensors.values(), (first, second), strict=True):
            entry["data_offsets"] = wrong
        yield name, knob_file(tensors=tensors)
    tensors = entries(VECTORS)
    del tensors["vector/1/last"]["data_offsets"]
    yield "missing", knob_file(tensors=tensors)


def twice() -> Iterator[tuple[str, bytes]]:
    text, body = json.dumps(HEADER), b"".join(VECTORS.values())
    outer = unsealed(VALID)[8 : -len(body)].rstrip()
    for field in HEADER:
        again = f'{text[:-1]}, "{field}": {json.dumps(HEADER[field])}}}'
        yield f"the header's {field}", knob_file(again)
    yield "a norm", knob_file(text.replace('"norms": {', '"norms": {"1": 9.0, '))
    yield "in the provenance", knob_file(text.replace('"provenance": {', '"provenance": {"paper": 1, '))
    metadata = outer[1 : outer.index(b',"vector/1/last"')]
    yield "the metadata", framed(b"{" + metadata + b", " + outer[1:], body)
    yield "Trimtab's header", framed(outer.replace(b'{"trimtab"', b'{"trimtab": "{}", "trimtab"', 1), body)
    first = json.dumps(entries(VECTORS)["vector/1/last"]).encode()
    yield "a tensor", framed(outer[:-1] + b', "vector/1/last": ' + first + b"}", body)
    yield "a dtype", framed(outer.replace(b'"dtype"', b'"dtype": "F16", "dtype"', 1), body)


def dtype() -> Iterator[tuple[str, bytes]]:
    sizes = {"F16": 2, "BF16": 2, "F64": 8, "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
    sizes |= {"I64": 8, "U64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1}
    for name, size in sizes.items():
        data = {"vector/1/last": bytes(size * WIDTH)}
        entry = {"dtype": name, "shape": [WIDTH], "data_offsets": [0, size * WIDTH]}
        yield name, knob_file(vectors=data, tensors={"vector/1/last": entry})
    for name in ("F4", "F6_E2M3", "F128", "", "f32", "float32", "torch.float32", " F32", None, 32, True, ["F32"], {}):
        tensors = entries(VECTORS)
        tensors["vector/2/last"]["dtype"] = name
        yield repr(name), knob_file(tensors=tensors)
    for label, name in NAMES.items():
        if name:
            tensors = entries(VECTORS)
            tensors["vector/1/last"]["dtype"] = name
            yield f"named with {label}", knob_file(tensors=tensors)
    tensors = entries(VECTORS)
    del tensors["vector/1/last"]["dtype"]
    yield "missing", knob_file(tensors=tensors)


def shape() -> Iterator[tuple[str, bytes]]:
    for wrong in ([], [0], [-WIDTH], [1, WIDTH], [WIDTH, 1], [2, 4], [WIDTH - 1], [WIDTH + 1], [10**12], [2**63],
                  [2**64], [2**32, 2**32], [2**62, 0], [10**12, 10**12, 0], [8.0], ["8"], [None], [True], None, 8,
                  "8", {}, [[8]]):  # fmt: skip
        tensors = entries(VECTORS)
        tensors["vector/1/last"]["shape"] = wrong
        yield f"{wrong!r}", knob_file(tensors=tensors)
    tensors = entries(VECTORS)
    tensors["vector/1/last"]["shape"] = [WIDTH] + [1] * 1000
    yield "of a thousand dimensions", knob_file(tensors=tensors)
    yield "of another width at another site", knob_file(vectors={**VECTORS, "vector/2/last": floats(1, 2, 3)})
    matrix = {"dtype": "F32", "shape": [2, WIDTH], "data_offsets": [0, 8 * WIDTH]}
    both = {"vector/1/last": b"".join(VECTORS.values())}
    yield "of a matrix", knob_file(vectors=both, tensors={"vector/1/last": matrix})
    for name, wrong in (("empty", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
                        ("a number", {"dtype": "F32", "shape": [], "data_offsets": [0, 4]})):  # fmt: skip
        data = bytes(wrong["data_offsets"][1])
        yield f"of {name}", knob_file(vectors={"vector/1/last": data}, tensors={"vector/1/last": wrong})


def values() -> Iterator[tuple[str, bytes]]:
    for name, word in (("NaN", 0x7FC00000), ("signalling NaN", 0x7F800001), ("inf", 0x7F800000), ("-inf", 0xFF800000)):
        for site in VECTORS:
            for place in (0, WIDTH - 1):
                data = bytearray(VECTORS[site])
                data[4 * place : 4 * place + 4] = struct.pack("<I", word)
                yield f"{name} at {place} of {site}", knob_file(vectors={**VECTORS, site: bytes(data)})


def tensors() -> Iterator[tuple[str, bytes]]:
    yield "none", knob_file(vectors={})
    yield "not that of the active site", knob_file(vectors={"vector/2/last": VECTORS["vector/2/last"]})
    for name in ("weight", "vector", "vector/", "vector/last", "vector/x/last", "vector/01/last", "vector/ 1/last",
                 "vector/+1/last", "vector/1_0/last", "vector/\u0663/last", "vector/-1/last", "vector/1.5/last",
                 "vector/1e3/last", f"vector/{10**30}/last", "vector/" + "9" * 5000 + "/last", "vector/3/",
                 "vector/1/../../x", "vector/1//etc/passwd", "vector/1/last[", "vector/1/last[x]", "vector/1/last\n",
                 "Vector/1/last", "vector/1/last/last", "__metadata__ "):  # fmt: skip
        yield repr(name)[:60], knob_file(vectors={**VECTORS, name: VECTORS["vector/2/last"]})
    for label, name in NAMES.items():
        yield f"a name with {label}", knob_file(vectors={**VECTORS, name: VECTORS["vector/2/last"]})
        yield f"a position with {label}", knob_file(vectors={**VECTORS, f"vector/2/{name}": VECTORS["vector/2/last"]})
    for wrong in (None, [], "F32", 3):
        yield f"described by {wrong!r}", knob_file(tensors={**entries(VECTORS), "vector/1/last": wrong})
    crowd = {f"vector/{i}/last": b"" for i in range(9000)}
    yield "nine thousand empty ones", knob_file(vectors=crowd)


WRONG_TYPES: dict[str, list[Any]] = {
    "kind": [None, True, 1, [], {}],
    "name": [None, False, 3, ["math"], {}],
    "method": [None, True, 2.5, [], {"a": 1}],
    "site": [None, True, 1, ["1", "last"], {"layer": 1, "position": "last"}],
    "gain": [None, True, False, "0.5", [], [0.5], {}],
    "norms": [None, True, 4.0, "4", [4.0, 7.5]],
    "where": [None, True, 0, ["all"], {}],
    "operation": [None, True, 0, ["add"], {}],
    "provenance": [None, True, 0, "paper", [["paper", 1]]],
    "diagnostics": [None, True, 0, "fine", []],
    "tuning": [True, 0, "safe", [], [[0, 1]]],
    "sha256": [None, True, 0, [], {}],
}


def fields() -> Iterator[tuple[str, bytes]]:
    for name in HEADER:
        yield f"no {name}", knob_file({key: value for key, value in HEADER.items() if key != name})
    for name in ("extra", "Name", "vectors", "__class__", "name ", *(name for name in NAMES.values() if name)):
        yield f"one more, {name[:20]!r}", knob_file(header_with(**{name: 1}))


def types() -> Iterator[tuple[str, bytes]]:
    for name, wrong in WRONG_TYPES.items():
        for value in wrong:
            yield f"{name} is {value!r}", knob_file(header_with(**{name: value}))


def ranges() -> Iterator[tuple[str, bytes]]:
    for gain in (-0.5, -1e-300, 10**400, -(10**400), 1.7e308, 1e39):
        yield f"gain {str(gain)[:12]}", knob_file(header_with(gain=gain))
    for site in ("x", "1", "/", "1/", "/last", "last/1", "9/last", "-1/last", "01/last", "1.0/last", "1e0/last",
                 f"{10**30}/last", "9" * 5000 + "/last", "1/../../x", "1/last/..", "1/last ", "1/last[-1", "1/LAST[]",
                 "\u0661/last", "1\\last"):  # fmt: skip
        yield f"site {site[:20]!r}", knob_file(header_with(site=site))
    for norms in ({}, {"1": 4.0}, {"2": 7.5}, {"1": 0.0, "2": 1.0}, {"1": -4.0, "2": 1.0}, {"1": None, "2": 1.0},
                  {"1": "4", "2": 1.0}, {"1": True, "2": 1.0}, {"1": 10**400, "2": 1.0}, {"one": 1.0}, {"01": 1.0},
                  {**HEADER["norms"], "01": 4.0}, {**HEADER["norms"], "-1": 4.0}, {**HEADER["norms"], " 3": 4.0},
                  {**HEADER["norms"], "3": 0.0}, {**HEADER["norms"], "1_0": 1.0}, {**HEADER["norms"], "1.5": 1.0},
                  {**HEADER["norms"], str(10**30): 1.0}, {**HEADER["norms"], "": 1.0}, {"1": [4.0], "2": 1.0}
                  ):  # fmt: skip
        yield f"norms {norms}"[:80], knob_file(header_with(norms=norms))
    for name in ("kind", "where", "operation"):
        for wrong in ("", "ADD", "delta", "all ", "completions"):
            yield f"{name} {wrong!r}", knob_file(header_with(**{name: wrong}))
    for bounds in ([], [1], [2, 1], [0, 1, 2], ["0", "1"], [None, 1], [True, 2], "wide", 3, {"low": 0}, [10**400, 0]):
        yield f"safe range {bounds}"[:60], knob_file(header_with(tuning={"safe_range": bounds}))
    for field in ("name", "method", "site", "kind", "where", "operation"):
        for label, name in NAMES.items():
            if field != "method" or label not in ("path", "backslashes", "spaces"):  # fine for a text that is shown
                text = name if field != "site" else f"1/{name}"
                if not (field == "name" and label in ("path", "backslashes")):
                    yield f"{field} with {label}", knob_file(header_with(**{field: text}))
    yield "name with commas", knob_file(header_with(name="math,code"))
    yield "name with an equals sign", knob_file(header_with(name="math=1"))


def json_text() -> Iterator[tuple[str, bytes]]:
    text = json.dumps(HEADER)
    for name, wrong in {
        "empty": "", "spaces": "  ", "an open brace": "{", "cut": text[:-1], "a tail": text + "x", "twice": text * 2,
        "a list": f"[{text}]", "text": json.dumps(text), "null": "null", "true": "true", "a number": "1",
        "single quotes": text.replace('"', "'"), "a trailing comma": text[:-1] + ",}",
        "a comment": text[:-1] + "/* */}", "a null character": text + "\0", "a byte order mark": "\ufeff" + text,
        "NaN": text.replace("0.5", "NaN", 1), "Infinity": text.replace("0.5", "Infinity", 1),
        "-Infinity in the provenance": text.replace('"seed": 0', '"seed": -Infinity'),
        "a float beyond every float": text.replace("0.5", "1e400", 1),
        "one in the diagnostics": text.replace('["mind the gap"]', "[1e999]"),
        "a number of 10,000 digits": text.replace("0.5", "9" * 10_000, 1),
        "a number of 1,000,000 digits in the provenance": text.replace('"seed": 0', '"seed": ' + "9" * 10**6),
        "100,000 lists in each other": "[" * 100_000, "as many closed": "[" * 100_000 + "]" * 100_000,
        "as many in the provenance": text.replace('"seed": 0', '"seed": ' + "[" * 100_000 + "]" * 100_000),
        "100,000 objects in each other": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "500 lists in each other, in the tuning": text.replace("[-0.5, 1.5]", "[" * 500 + "]" * 500),
        "hexadecimal": text.replace("0.5", "0x1", 1), "a plus sign": text.replace("0.5", "+0.5", 1),
        "a leading zero": text.replace("0.5", "00.5", 1), "a raw newline": text.replace("math", "ma\nth", 1),
        "a wrong escape": text.replace("math", "\\x41", 1),
    }.items():  # fmt: skip
        yield name, knob_file(wrong)
    outer = json.dumps({"__metadata__": {"trimtab": text}, **entries(VECTORS)})
    body = b"".join(VECTORS.values())
    for name, wrong in {
        "the outer header a list": f"[{outer}]", "null outside": "null", "nothing outside": "",
        "cut outside": outer[:-1],
        "NaN outside": outer.replace("[8]", "[NaN]", 1), "a tail outside": outer + "}",
        "100,000 lists outside": '{"a":' + "[" * 100_000, "UTF-16 outside": outer.encode("utf-16").decode("latin-1"),
        "a million empty lists": '{"__metadata__": [' + "[]," * 10**6 + "[]]}",
    }.items():  # fmt: skip
        yield name, framed(wrong.encode("latin-1"), body)
    yield "a byte order mark outside", framed(b"\xef\xbb\xbf" + outer.encode(), body)
    yield "bytes that are not UTF-8", framed(outer.encode().replace(b"math", b"ma\xffh", 1), body)
    yield "an overlong slash", framed(outer.encode().replace(b"math", b"\xc0\xafth", 1), body)


def metadata() -> Iterator[tuple[str, bytes]]:
    for wrong in (None, [], "x", 3, True, {}, {"trimtab": None}, {"trimtab": 3}, {"trimtab": {}}, {"Trimtab": "{}"},
                  {"format": "pt"}):  # fmt: skip
        outer = json.dumps({"__metadata__": wrong, **entries(VECTORS)}).encode()
        yield f"{wrong!r}", framed(outer, b"".join(VECTORS.values()))
    yield "missing", framed(json.dumps(entries(VECTORS)).encode(), b"".join(VECTORS.values()))
    more = {"__metadata__": {"trimtab": json.dumps(HEADER), "other": 3}, **entries(VECTORS)}
    yield "a number beside", framed(json.dumps(more).encode(), b"".join(VECTORS.values()))


def version() -> Iterator[tuple[str, bytes]]:
    for wrong in (
        0,
        2,
        99,
        -1,
        10**30,
        int("9" * 4000),
        1.0,
        1.5,
        "1",
        "",
        "2.0",
        "x" * 10**5,
        None,
        True,
        [1],
        {"major": 1},
    ):
        yield f"{wrong!r}"[:50], knob_file(header_with(format_version=wrong))


def checksum() -> Iterator[tuple[str, bytes]]:
    outer = json.loads(VALID[8 : 8 + struct.unpack("<Q", VALID[:8])[0]])
    true = json.loads(outer["__metadata__"]["trimtab"])
    said: str = true["sha256"]
    other = json.dumps(HEADER).replace("0.5", "0.6", 1)
    text = json.dumps(true)
    yield "of zeros", VALID.replace(said.encode(), BLANK.encode())
    for name, wrong in {
        "one digit off": said[:-1] + ("0" if said[-1] != "0" else "1"), "in capitals": said.upper(), "cut": said[:-1],
        "empty": "", "md5": said[:32], "with a prefix": "sha256:" + said, "longer": said + "0", "other signs": "é" * 64,
        "in another alphabet": "\u0660" * 64,
    }.items():  # fmt: skip
        yield name, knob_file(json.dumps(header_with(sha256=wrong)))
    for name, before, after in (
        ("the gain was changed", "0.5", "0.6"), ("the name was changed", '"math"', '"code"'),
        ("the licence was changed", '"paper"', '"licence"'), ("a space was added", '"kind": ', '"kind":  '),
        ("the site was changed", "1/last", "2/last"), ("the operation was changed", '"add"', '"ablate"'),
    ):  # fmt: skip
        yield name, knob_file(text.replace(before, after, 1))
    yield "that of another knob", knob_file(other).replace(b"0.6", b"0.5", 1)
    yield "vectors swapped", VALID[:-64] + VALID[-32:] + VALID[-64:-32]
    yield "a sign turned", VALID[:-1] + bytes([VALID[-1] ^ 0x80])


def foreign() -> Iterator[tuple[str, bytes]]:
    for protocol in range(6):
        yield f"a pickle that runs code, protocol {protocol}", pickle.dumps(_Opens(), protocol)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        # The layout of torch.save: torch.load of it, with pickles allowed, would run code.
        zipped.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps(_Opens(), 2))
        zipped.writestr(zipfile.ZipInfo("archive/version"), "3\n")
    yield "a file of torch.save that runs code", archive.getvalue()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(zipfile.ZipInfo("zeros"), bytes(10**7))
    yield "a zip bomb", bomb.getvalue()
    yield "a knob compressed with gzip", gzip.compress(VALID, mtime=0)
    yield "a gzip bomb", gzip.compress(bytes(10**7), mtime=0)
    yield "a pickle behind a header", struct.pack("<Q", 2) + b"{}" + pickle.dumps(_Opens(), 4)
    inside = {**VECTORS, "vector/2/last": pickle.dumps(_Opens(), 4)[:32].ljust(32, b".")}
    yield "a pickle in the place of a vector", knob_file(vectors=inside, tensors={**entries(VECTORS), "weight": 3})
    yield from {
        "a panel": b'{"knobs": {"a": {"path": "k", "strength": 1}}}', "a list in JSON": b"[1, 2, 3]",
        "GGUF": b"GGUF\3\0\0\0" + bytes(64), "NumPy": b"\x93NUMPY\1\0" + bytes(120),
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "PDF": b"%PDF-1.7\n" + bytes(64), "ELF": b"\x7fELF\2\1\1" + bytes(64), "HTML": b"<!DOCTYPE html><html></html>",
        "a script": b"#!/bin/sh\ntouch EXECUTED\n", "Python": b"open('EXECUTED', 'w')\n",
        "tar": b"x".ljust(512, b"\0") * 20,
        "text in UTF-16": "a knob".encode("utf-16"), "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "zeros": bytes(4096), "0xff": b"\xff" * 4096, "eight zeros": bytes(8), "only a length": struct.pack("<Q", 2),
        "an empty safetensors file": struct.pack("<Q", 2) + b"{}", "YAML": b"knobs:\n  - !!python/object:os.system\n",
    }.items()  # fmt: skip
    for seed in range(8):
        yield f"noise {seed}", random.Random(seed).randbytes(200 + 400 * seed)


def kernel() -> Iterator[tuple[str, bytes]]:
    bare = header_with(operation="kernel")
    yield "an operation without a kernel", knob_file(bare)
    for operation in ("add", "ablate", "piecewise"):
        yield f"a kernel with operation {operation}", kernel_file(operation=operation)
    yield "a kernel without examples", knob_file({**bare, "kernel": EXAMPLES})
    yield "examples without a kernel", knob_file(bare, {**MATRICES, **VECTORS})
    for wrong in (None, True, 0, "softmax", [], {}, [EXAMPLES]):
        yield f"a kernel that is {wrong!r}", kernel_file(wrong)
    for name in EXAMPLES:
        yield f"no {name}", kernel_file({key: value for key, value in EXAMPLES.items() if key != name})
    for name, wrong in (
        *(("kind", kind) for kind in (None, 0, ["softmax"], "unit", "Softmax", "", *NAMES.values())),
        *(("temperature", t) for t in (None, True, "1", [], 0, -1.0, 1e-30, 1e300, 10**400)),
        *(("scales", scales) for scales in (None, 1.0, [], {}, {"1/last": 1.5}, {**EXAMPLES["scales"], "3/last": 1.0})),
        *(("scales", {"1/last": scale, "2/last": 1.0}) for scale in (None, True, "1", [], -1.0, 10**400, 1e-300)),
        ("extra", 1),
    ):
        yield f"{name} {wrong!r}"[:70], kernel_file({**EXAMPLES, name: wrong})
    for wrong in ([3 * WIDTH], [0, WIDTH], [WIDTH, 3], [1, 3, WIDTH], [2, WIDTH], [3, WIDTH, 1], [3, -WIDTH], None):
        yield f"a matrix of shape {wrong}", kernel_file(shape=wrong)
    for name, data in MATRICES.items():
        rest = {other: matrix for other, matrix in MATRICES.items() if other != name}
        yield f"no {name}", kernel_file(matrices=rest)
        first = (3, WIDTH - (name == "key/1/last"))
        yield f"{name} of another width", kernel_file(matrices={**MATRICES, name: data[:-12]}, shape=first)
        for what, word in (("NaN", 0x7FC00000), ("inf", 0x7F800000)):
            yield f"{what} in {name}", kernel_file(matrices={**MATRICES, name: data[:-4] + struct.pack("<I", word)})
    narrow = {name: data[:-12] for name, data in MATRICES.items()}
    yield "all of another width than the vectors", kernel_file(matrices=narrow, shape=(3, WIDTH - 1))
    for name in ("weight", "key/", "key/x", "value/3/last", "key/3/last", "Key/1/last", "keys/1/last", "key/01/last"):
        yield f"a stray {name}", kernel_file(matrices={**MATRICES, name: MATRICES["key/1/last"]})


KINDS = {
    "cut": cut, "bit": bit, "length": length, "offsets": offsets, "twice": twice, "dtype": dtype, "shape": shape,
    "values": values, "tensors": tensors, "fields": fields, "types": types, "ranges": ranges, "json": json_text,
    "metadata": metadata, "version": version, "checksum": checksum, "foreign": foreign, "kernel": kernel,
}  # fmt: skip
"""Kind of wrong to the files of that kind."""


@functools.cache
def cases() -> dict[str, list[Case]]:
    """List the files of each kind; no two have the same bytes, and the valid one is not among them."""
    seen = {VALID, KERNEL}
    found: dict[str, list[Case]] = {kind: [] for kind in KINDS}
    for kind, make in KINDS.items():
        for name, data in make():
            if data not in seen:
                found[kind].append(Case(kind, name, data))
            seen.add(data)
    return found


def places(folder: Path) -> dict[str, str]:
    """Make paths, in an empty folder, at which there is no regular file to read; a name to each."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "here").symlink_to(folder / "there")
    (folder / "there").symlink_to(folder / "here")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "piped").symlink_to(folder / "pipe")
    (folder / "file").write_bytes(VALID)
    with open(folder / "sparse", "wb") as file:
        file.truncate(2**40)
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(folder)  # the name of a socket has at most about a hundred bytes
        try:
            listener.bind("socket")
        finally:
            os.chdir(before)
    names = ("folder", "pipe", "here", "broken", "zero", "piped", "sparse", "socket", "nowhere", "file/k", "x" * 300,
             "null\0character")  # fmt: skip
    return {name[:20]: str(folder / name) for name in names} | {"/dev/null": "/dev/null", "/dev/zero": "/dev/zero",
                                                                "nameless": ""}  # fmt: skip


PANELS: dict[str, str | bytes] = {
    "empty": "", "cut": '{"knobs": ', "a list": "[]", "null": "null", "text": '"knobs"', "no knobs": "{}",
    "knobs null": '{"knobs": null}', "knobs a list": '{"knobs": []}', "one field more": '{"knobs": {}, "extra": 1}',
    "knobs twice": '{"knobs": {}, "knobs": {}}', "deep": "[" * 100_000, "not UTF-8": b'{"knobs": {"\xff": 1}}',
    "a name twice": '{"knobs": {"a": {"path": "k"}, "a": {"path": "k"}}}', "a pickle": pickle.dumps(_Opens(), 4),
    "entry a number": '{"knobs": {"a": 1}}', "entry a path": '{"knobs": {"a": "k"}}',
    "entry null": '{"knobs": {"a": null}}', "no path": '{"knobs": {"a": {"strength": 1}}}',
    "path a number": '{"knobs": {"a": {"path": 3}}}', "path null": '{"knobs": {"a": {"path": null}}}',
    "path empty": '{"knobs": {"a": {"path": ""}}}', "path a folder": '{"knobs": {"a": {"path": ".."}}}',
    "path nowhere": '{"knobs": {"a": {"path": "nowhere"}}}', "path to zeros": '{"knobs": {"a": {"path": "/dev/zero"}}}',
    "path with a null character": '{"knobs": {"a": {"path": "k\\u0000"}}}',
    "path with an escape": '{"knobs": {"a": {"path": "\\u001b[2J"}}}',
    "path very long": '{"knobs": {"a": {"path": "' + "x" * 10**5 + '"}}}',
    "path half a surrogate pair": '{"knobs": {"a": {"path": "\\ud800"}}}',
    "path to itself": '{"knobs": {"a": {"path": "panel.json"}}}',
    "second knob missing": '{"knobs": {"a": {"path": "k"}, "b": {"path": "nowhere"}}}',
    "a misspelt strength": '{"knobs": {"a": {"path": "k", "strenght": 0.1}}}',
    "strength text": '{"knobs": {"a": {"path": "k", "strength": "1"}}}',
    "strength null": '{"knobs": {"a": {"path": "k", "strength": null}}}',
    "strength true": '{"knobs": {"a": {"path": "k", "strength": true}}}',
    "strength a list": '{"knobs": {"a": {"path": "k", "strength": [1]}}}',
    "strength NaN": '{"knobs": {"a": {"path": "k", "strength": NaN}}}',
    "strength 1e400": '{"knobs": {"a": {"path": "k", "strength": 1e400}}}',
    "strength of 400 digits": '{"knobs": {"a": {"path": "k", "strength": ' + "9" * 400 + "}}}",
    "name empty": '{"knobs": {"": {"path": "k"}}}', "name with a space": '{"knobs": {"a b": {"path": "k"}}}',
    "name with an equals sign": '{"knobs": {"a=1": {"path": "k"}}}',
    "name with an escape": '{"knobs": {"\\u001b[2J": {"path": "k"}}}',
    "name very long": '{"knobs": {"' + "x" * 10**5 + '": {"path": "k"}}}',
    "two megabytes": '{"knobs": {' + " " * 2 * 2**20 + "}}",
}  # fmt: skip
"""Panels that are none, by name; `k` beside them is a knob."""


def check_sound(knob: Knob, path: Path) -> None:
    """Check that a knob can be shown and applied, and comes back from a file bit for bit."""
    assert all(c.isprintable() or c == "\n" for c in knob.card())
    assert torch.isfinite(knob.addend(1.0)).all()
    knob.save(path)
    back = Knob.load(path)
    assert list(back.vectors) == list(knob.vectors)
    for site, vector in knob.vectors.items():
        assert back.vectors[site].numpy().tobytes() == vector.numpy().tobytes()
    for name in ("name", "method", "norms", "site", "gain", "where", "operation", "kind"):
        assert getattr(back, name) == getattr(knob, name), name
    assert (back.kernel is None) == (knob.kernel is None)
    if back.kernel is not None and knob.kernel is not None:
        assert back.kernel.header() == knob.kernel.header()
        ours, theirs = back.kernel.tensors(), knob.kernel.tensors()
        assert {name: t.numpy().tobytes() for name, t in ours.items()} == {
            name: t.numpy().tobytes() for name, t in theirs.items()
        }
    for name in ("provenance", "diagnostics", "tuning"):
        assert json.dumps(getattr(back, name)) == json.dumps(getattr(knob, name)), name  # tells -0.0 from 0, 1 from 1.0
    before = path.read_bytes()
    back.save(path)
    assert path.read_bytes() == before


def table() -> str:
    """Return how many files there are of each kind, as a table in Markdown."""
    counts = Counter({kind: len(files) for kind, files in cases().items()})
    rows = [*counts.items(), ("**knob files in all**", counts.total()), ("panels", len(PANELS))]
    return "\n".join(["| kind | files |", "|---|---|", *(f"| {kind} | {count} |" for kind, count in rows)])


if __name__ == "__main__":
    print(table())
