"""The small machine that reads pickles: it knows a dozen names, calls nothing, and makes records that do nothing."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from trimtab.errors import KnobError, brief

STEPS_LIMIT, ENTRIES_LIMIT = 200_000, 10_000
"""Most operations of a pickle, and entries of its dictionaries: vectors of a model take a few thousand."""
_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
}
_ORDERED, _NESTED, _ENCODE = "collections OrderedDict", "torch.storage _load_from_bytes", "_codecs encode"
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_OBJECT = "steering_vectors.steering_vector SteeringVector"
ALLOWED = frozenset({*_DTYPES, _ORDERED, _TENSOR, _PARAMETER, _NESTED, _ENCODE, _OBJECT})
"""What a pickle may name, as `module name`."""


@dataclass
class SteeringVector:
    """The fields of an object of steering-vectors."""

    layer_activations: object = None
    layer_type: object = "decoder_block"


class _Name(NamedTuple):
    """A function or a class that a pickle has named, and that is never looked up."""

    name: str


@dataclass
class Storage:
    """The numbers beneath tensors; `data` is there once the file has been read."""

    dtype: torch.dtype
    count: int
    data: bytes | None = None


class View(NamedTuple):
    """A tensor: where in a storage it begins, and how it lies there."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Machine:
    """Runs pickles from one stream, one after the other, on values that do nothing."""

    data: bytes
    nested: Callable[[bytes], object] | None = None
    """Reads a file of torch within the pickle, as Python's pickle writes storages; torch's own files hold none."""
    storages: dict[str, Storage] = field(default_factory=dict[str, Storage])
    steps: int = 0
    entries: int = 0

    def __post_init__(self) -> None:
        self.stream = io.BytesIO(self.data)

    def run(self) -> object:
        """Run one pickle to its end and return its value; memory beyond the file's is some records of it."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for operation, argument, _ in pickletools.genops(self.stream):
            self.steps += 1
            if self.steps > STEPS_LIMIT:
                raise KnobError(f"it is a pickle of more than {STEPS_LIMIT} operations.")
            name = operation.name
            if name == "STOP":
                break
            if name in _CONSTANTS:
                self.stack.append(argument)
            elif name in _VALUES:
                self.stack.append(_VALUES[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name == "INST":
                raise _named(str(argument))
            elif name not in ("PROTO", "FRAME"):
                raise KnobError(f"it is a pickle that does more ({name}) than tensors need.")
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        """Take what lies above the last mark, and go on with what lies below."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, count: int | None) -> None:
        """Make a tuple of so many values, or of those above the mark."""
        items = tuple(self.to_mark()) if count is None else self.take(count)
        self.stack.append(items)

    def list_of(self, _: object) -> None:
        items = self.to_mark()
        self.stack.append(items)

    def dictionary_of(self, _: object) -> None:
        items = self.to_mark()
        self.stack.append({})
        self.fill(items)

    def mark(self, _: object) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def take(self, count: int) -> tuple[Any, ...]:
        """Take so many values."""
        if len(self.stack) < count:
            raise KnobError("it is a pickle that takes what is not there.")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def put(self, number: object) -> None:
        self.memo[len(self.memo) if number is None else int(str(number))] = self.stack[-1]

    def get(self, number: object) -> None:
        self.stack.append(self.memo[int(str(number))])

    def fill(self, pairs: list[Any]) -> None:
        """Put entries into the dictionary on top; keys are numbers or texts, which are quick to compare."""
        target = self.stack[-1]
        self.entries += len(pairs)
        if type(target) is not dict or self.entries > ENTRIES_LIMIT:
            raise KnobError(f"it fills what is no dictionary, or one of more than {ENTRIES_LIMIT} entries.")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (int, str) or (type(key) is int and abs(key) >= 2**63):
                raise KnobError(
                    f"it holds a dictionary whose keys are no numbers or texts, {type(key).__name__} for one."
                )
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise KnobError("it appends to what is no list.")
        self.stack[-1].extend(items)

    def name(self, said: object) -> None:
        """Note a name; nothing is looked up."""
        if said is None:
            said = " ".join(part if isinstance(part, str) else "?" for part in self.take(2))
        if said not in ALLOWED:
            raise _named(str(said))
        self.stack.append(_Name(str(said)))

    def stored(self, _: object) -> None:
        """Note a storage, by what torch calls its persistent id."""
        (told,) = self.take(1)
        word, kind, key, _place, count, *view = told
        dtype = _DTYPES.get(kind.name) if isinstance(kind, _Name) else None
        if word != "storage" or dtype is None or type(key) is not str or type(count) is not int or any(view):
            raise KnobError("it names a storage as torch.save does not.")
        known = self.storages.setdefault(key, Storage(dtype, count))
        if (known.dtype, known.count) != (dtype, count):
            raise KnobError("it describes one storage in two ways.")
        self.stack.append(known)

    def reduce(self, _: object) -> None:
        """Make the record of what a call would return."""
        called, args = self.take(2)
        name = called.name if isinstance(called, _Name) else ""
        made: object = None
        if name == _ORDERED and args == ():
            made = {}
        elif name == _TENSOR and isinstance(args[0], Storage):
            made = View(args[0], int(args[1]), tuple(map(int, args[2])), tuple(map(int, args[3])))
        elif name == _PARAMETER and isinstance(args[0], View):
            made = args[0]
        elif name == _NESTED and self.nested is not None and type(args[0]) is bytes:
            made = self.nested(args[0])
        elif name == _ENCODE and type(args[0]) is str and args[1:] == ("latin1",):
            made = args[0].encode("latin1")
        if made is None or (name == _NESTED and not isinstance(made, Storage)):
            raise KnobError(f"it calls {brief(name.replace(' ', '.') or type(called).__name__)} as tensors do not.")
        self.stack.append(made)

    def new(self, _: object) -> None:
        called, args = self.take(2)
        if called != _Name(_OBJECT) or args != ():
            raise KnobError("it makes an object that is none of steering-vectors.")
        self.stack.append(SteeringVector())

    def build(self, _: object) -> None:
        target, state = self.take(2)
        if not isinstance(target, SteeringVector) or type(state) is not dict or not state.keys() <= vars(target).keys():
            raise KnobError("it gives a state to what is no object of steering-vectors.")
        vars(target).update(state)
        self.stack.append(target)


_CONSTANTS = frozenset(
    """
    INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    BINBYTES8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    """.split()
)
_VALUES: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": Machine.mark,
    "TUPLE": lambda machine, _: machine.tuple_of(None),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": Machine.list_of,
    "APPEND": lambda machine, _: machine.extend([*machine.take(1)]),
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "DICT": Machine.dictionary_of,
    "SETITEM": lambda machine, _: machine.fill([*machine.take(2)]),
    "SETITEMS": lambda machine, _: machine.fill(machine.to_mark()),
    **dict.fromkeys(("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"), Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), Machine.get),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), Machine.name),
    "BINPERSID": Machine.stored,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new,
    "BUILD": Machine.build,
}
"""What is known beyond constants. There is no operation that takes values away, so that names are what they seem."""


def _named(name: str) -> KnobError:
    said = brief(name.replace(" ", ".", 1) if name.count(" ") == 1 and "?" not in name else "what cannot be told")
    if name.startswith("numpy") or (name.startswith("torch ") and name.endswith("Storage")):
        return KnobError(f"it holds {said}, and tensors of floats are taken. Save the vectors as such.")
    return KnobError(
        f"it is a pickle that would run {said}, and only tensors are taken. If you trust its source, load it with the "
        "tool that wrote it, and save the tensors alone."
    )
