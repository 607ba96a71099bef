"""Hostile and broken knob files, panels and places: one clear error each, no code run, nothing half loaded."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
from trimtab.artifact import OPERATIONS, KernelExamples, Knob, Rack, load_panel, save_panel
from trimtab.cli import main
from trimtab.errors import KnobError
from trimtab.files import read_bytes
from trimtab.types import Site

LONGEST = 500
PROPERTY = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def is_clear(message: str) -> bool:
    return 20 < len(message) <= LONGEST and message.isprintable()


def refusals(path: str | Path) -> list[str]:
    """Load a knob in every way there is; return the messages, and fail where one of them does not raise `KnobError`."""
    Path("panel.json").write_text(json.dumps({"knobs": {"good": {"path": "good"}, "bad": {"path": str(path)}}}))
    ways: list[Callable[[], object]] = [
        lambda: Knob.load(path),
        lambda: Rack(good="good", bad=path),
        lambda: load_panel("panel.json"),
    ]
    messages: list[str] = []
    for way in ways:
        with pytest.raises(KnobError) as caught:
            way()
        messages.append(str(caught.value))
    return messages


def test_there_are_hundreds_of_hostile_files_and_no_two_are_the_same() -> None:
    files = [case for found in hostile.cases().values() for case in found]
    print(hostile.table())
    assert len({case.data for case in files}) == len(files) >= 200
    assert len({(case.kind, case.name) for case in files}) == len(files)
    assert all(hostile.cases().values())


def test_the_file_that_every_hostile_one_is_made_from_is_a_knob() -> None:
    Path("good").write_bytes(hostile.VALID)
    knob = Knob.load("good")
    assert knob.name == "math"
    assert [str(site) for site in knob.vectors] == ["1/last", "2/last"]
    assert knob.vectors[knob.site].numpy().tobytes() == hostile.VECTORS["vector/1/last"]
    knob.save("again")
    assert Path("again").read_bytes() == hostile.VALID  # two writers that share no line agree on every byte


def test_the_file_that_every_hostile_kernel_is_made_from_is_a_knob() -> None:
    Path("good").write_bytes(hostile.KERNEL)
    knob = Knob.load("good")
    assert knob.kernel is not None
    assert str(knob.kernel) == "kernel softmax at temperature 0.5 over 3 examples"
    hostile.check_sound(knob, Path("again"))
    assert Path("again").read_bytes() == hostile.KERNEL


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_hostile_files_are_one_clear_error_each_in_every_way_of_loading(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("good").write_bytes(hostile.VALID)
    for case in hostile.cases()[kind]:
        Path("bad").write_bytes(case.data)
        messages = refusals("bad")
        assert main(["inspect", "bad"]) == 2, case.name
        out, err = capsys.readouterr()
        assert not out, case.name
        assert err.count("\n") == 1, case.name
        messages.append(err.removesuffix("\n"))
        if kind not in ("cut", "bit", "length", "checksum"):  # the check that is meant for it finds it
            assert "checksum" not in messages[0], case.name
        assert all(is_clear(message) and "'bad'" in message for message in messages), (case.name, messages)
    assert sorted(os.listdir()) == ["bad", "good", "panel.json"]  # nothing ran, nothing was written


def test_what_is_no_regular_file_is_one_clear_error_and_never_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("good").write_bytes(hostile.VALID)
    Path("places").mkdir()
    made = hostile.places(Path("places"))
    before = sorted(os.listdir("places"))
    for name, path in made.items():
        assert all(map(is_clear, refusals(path))), name
        with pytest.raises(KnobError) as caught:
            load_panel(path)
        assert is_clear(str(caught.value)), name
        assert main(["inspect", path]) == 2, name
        out, err = capsys.readouterr()
        assert not out, name
        assert err.count("\n") == 1, name
        assert len(err) < LONGEST, name
    assert sorted(os.listdir("places")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "it is a folder, not a regular file"),
        ("pipe", "it is a pipe, not a regular file"),
        ("piped", "it is a pipe, not a regular file"),
        ("socket", "it is a socket, not a regular file"),
        ("zero", "it is a device, not a regular file"),
        ("broken", "there is no such file"),
        ("here", "symbolic links"),
        ("sparse", "at most 1073741824 are read"),
        ("null\0character", "no file has such a name"),
        ("file/k", "not a directory"),
    ],
)
def test_the_message_says_what_stands_there(name: str, message: str) -> None:
    with pytest.raises(KnobError, match=message):
        Knob.load(hostile.places(Path())[name])


def test_a_file_that_may_not_be_read_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("k").write_bytes(hostile.VALID)

    def forbidden(path: str, _flags: int) -> int:  # permissions do not bind root, so they cannot be used here
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(KnobError, match=r"^Cannot load a knob from 'k': permission denied\.$"):
        Knob.load("k")


@pytest.mark.parametrize("change", [-1, -100, -len(hostile.VALID), 1])
def test_a_file_that_shrinks_or_grows_while_it_is_read_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    path = Path("k")
    path.write_bytes(hostile.VALID)
    real = os.fstat

    def then_changed(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        os.truncate(path, len(hostile.VALID) + change)
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", then_changed)
        with pytest.raises(KnobError, match="it changed while it was read"):
            Knob.load(path)


def test_a_pipe_that_takes_the_place_of_the_file_at_the_last_moment_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path("k")
    path.write_bytes(hostile.VALID)
    real = os.stat

    def then_swapped(*args: Any, **options: Any) -> os.stat_result:
        status = real(*args, **options)
        path.unlink()
        os.mkfifo(path)
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", then_swapped)
        with pytest.raises(OSError, match="it is a pipe"):
            read_bytes(path, 10**6)


@pytest.mark.parametrize("name", hostile.PANELS)
def test_hostile_panels_are_one_clear_error_each(name: str) -> None:
    Path("k").write_bytes(hostile.VALID)
    text = hostile.PANELS[name]
    Path("panel.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KnobError) as caught:
        load_panel("panel.json")
    assert is_clear(str(caught.value)), caught.value
    assert sorted(os.listdir()) == ["k", "panel.json"]


def test_a_knob_may_have_the_name_of_a_parameter_on_a_rack_and_in_a_panel() -> None:
    Path("k").write_bytes(hostile.VALID)
    save_panel("panel.json", dict.fromkeys(("self", "knobs", "cls", "../x"), ("k", 0.5)))
    assert list(load_panel("panel.json").rack) == ["self", "knobs", "cls", "../x"]


LIMITED = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
import hostile, torch
from trimtab.artifact import Knob, Rack, load_panel
from trimtab.cli import main
from trimtab.errors import KnobError
from pathlib import Path
Knob.load("good")
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
with open("gigabyte", "wb") as file:
    file.write(hostile.VALID)
    file.truncate(2**30)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tried = 0
for case in (case for found in hostile.cases().values() for case in found):
    Path("bad").write_bytes(case.data)
    try:
        Knob.load("bad")
    except KnobError:
        tried += 1
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
places = list(hostile.places(Path("places")).values())
for path in places:
    try:
        Knob.load(path)
    except KnobError:
        tried += 1
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))
try:
    Knob.load("gigabyte")
except KnobError as error:
    said = str(error)
status = [main(["inspect", path]) for path in ("bad", "gigabyte", "places/sparse", "places/pipe", "places/zero")]
print(json.dumps({"tried": tried - len(places), "grown": grown, "said": said, "status": status}))
"""


def test_hostile_files_take_little_memory_whatever_they_claim() -> None:
    Path("good").write_bytes(hostile.VALID)
    Path("places").mkdir()
    tests = str(Path(hostile.__file__).parent)
    done = subprocess.run([sys.executable, "-c", LIMITED, tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tried"] == sum(map(len, hostile.cases().values()))
    assert found["grown"] < 300, "megabytes more than a valid knob takes"
    assert "it does not fit into memory" in found["said"]
    assert found["status"] == [2] * 5
    assert len(done.stderr.splitlines()) == 5
    assert sorted(os.listdir()) == ["bad", "gigabyte", "good", "places"]


# Any change at all


def test_every_byte_of_the_file_is_covered_by_the_checksum() -> None:
    for place in range(len(hostile.VALID)):
        changed = bytearray(hostile.VALID)
        changed[place] ^= 0x20  # turns the case of a letter: JSON stays JSON
        Path("k").write_bytes(changed)
        with pytest.raises(KnobError):
            Knob.load("k")


edits = st.lists(
    st.tuples(st.integers(0, len(hostile.VALID) - 1), st.binary(max_size=6), st.integers(0, 6)), max_size=4
)


@PROPERTY
@given(edits, st.booleans(), st.integers(0, len(hostile.VALID)) | st.none())
def test_a_mutated_file_is_refused_or_is_the_same_knob(
    changes: list[tuple[int, bytes, int]], seal: bool, end: int | None
) -> None:
    data = hostile.unsealed(hostile.VALID) if seal else hostile.VALID
    for place, new, gone in changes:
        data = data[:place] + new + data[place + gone :]
    data = hostile.sealed(data[:end]) if seal else data[:end]
    assert_refused_or_sound(data, exact=not seal)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
field_changes = st.dictionaries(st.sampled_from(sorted(hostile.HEADER)) | st.text(max_size=8), json_values, max_size=3)


@PROPERTY
@given(field_changes, st.sets(st.sampled_from(sorted(hostile.HEADER)), max_size=1))
def test_a_header_of_any_json_is_refused_or_makes_a_sound_knob(changes: dict[str, Any], gone: set[str]) -> None:
    header = {name: value for name, value in {**hostile.HEADER, **changes}.items() if name not in gone}
    assert_refused_or_sound(hostile.knob_file(header))


@PROPERTY
@given(st.dictionaries(st.text(max_size=12) | st.sampled_from(["__metadata__", *hostile.VECTORS]), json_values))
def test_a_safetensors_header_of_any_json_is_refused_or_makes_a_sound_knob(outer: dict[str, Any]) -> None:
    assert_refused_or_sound(hostile.framed(json.dumps(outer).encode(), b"".join(hostile.VECTORS.values())))
    assert_refused_or_sound(hostile.knob_file(tensors={**hostile.entries(hostile.VECTORS), **outer}))


def assert_refused_or_sound(data: bytes, *, exact: bool = False) -> None:
    """Check that a file raises `KnobError`, or holds a knob that can be shown, applied, saved and read back."""
    Path("k").write_bytes(data)
    try:
        knob = Knob.load("k")
    except KnobError as error:
        message = str(error)
        assert is_clear(message), message
        return
    assert not exact or data == hostile.VALID
    hostile.check_sound(knob, Path("again"))


# Full disks and failing writes


def two_knobs() -> tuple[Knob, Knob]:
    Path("good").write_bytes(hostile.VALID)
    one = Knob.load("good")
    Path("good").unlink()
    return one, one.with_(name="two")


FAILURES: dict[str, tuple[str, BaseException, str]] = {
    "the disk is full": ("fsync", OSError(28, "No space left on device"), "no space left on device"),
    "the disk is broken": ("fsync", OSError(5, "Input/output error"), "input/output error"),
    "the disk is full when the name is made": ("replace", OSError(28, "No space left on device"), "no space left"),
    "the folder may not be changed": ("replace", PermissionError(13, "Permission denied"), "permission denied"),
    "the folder is read-only": ("open", OSError(30, "Read-only file system"), "read-only file system"),
    "Ctrl-C while it is written": ("fsync", KeyboardInterrupt(), ""),
    "Ctrl-C before the name is made": ("replace", KeyboardInterrupt(), ""),
}


@pytest.mark.parametrize("what", ["knob", "panel"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_write_that_fails_is_one_clear_error_and_leaves_the_old_file_alone(
    monkeypatch: pytest.MonkeyPatch, failure: str, what: str
) -> None:
    one, two = two_knobs()
    function, error, message = FAILURES[failure]
    one.save("k") if what == "knob" else save_panel("k", {"a": ("x", 1)})
    before = Path("k").read_bytes()

    really_open = io.open

    def fails(*args: Any, **options: Any) -> Any:
        if function == "open" and "x" not in args[1]:  # it can be read
            return really_open(*args, **options)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("io.open" if function == "open" else f"os.{function}", fails)
        with pytest.raises(KnobError if message else KeyboardInterrupt) as caught:
            two.save("k") if what == "knob" else save_panel("k", {"b": ("x", 1)})
    if message:
        assert str(caught.value).startswith("Cannot write 'k': ")
        assert message in str(caught.value)
    assert Path("k").read_bytes() == before
    assert os.listdir() == ["k"]


def test_a_write_that_fails_half_way_is_one_clear_error_and_leaves_the_old_file_alone() -> None:
    # A limit on the size of files is a full disk that needs no privileges.
    code = (
        "import os, resource, sys, torch\nfrom trimtab.artifact import Knob\nfrom trimtab.cli import main\n"
        "from trimtab.errors import KnobError\n"
        "from trimtab.types import Site\n"
        "s = Site(0, 'last')\nk = Knob('a', 'm', {s: torch.ones(10_000)}, {0: 1.0}, s, 1.0)\nk.save('k')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n    (2 * k).save('k')\nexcept KnobError as error:\n    print(error)\n"
        "assert os.listdir() == ['k'], os.listdir()\nassert Knob.load('k').gain == 1.0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Cannot write 'k': file too large. Nothing there was changed.\n"


def test_what_cannot_be_written_to_is_a_clear_error_and_is_left_as_it_is() -> None:
    one, _ = two_knobs()
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("file").write_bytes(b"x")
    Path("full").symlink_to("/dev/full")  # a link, so that no mistake could replace the device
    Path("loop").symlink_to("loop2")
    Path("loop2").symlink_to("loop")
    for path, message in {
        "folder": "it is a folder; pass the name of a file in it",
        "pipe": "it is a pipe, not a regular file",
        "full": "it is a device, not a regular file",
        "file/k": "not a directory|file exists",
        "x" * 300: "file name too long",
        "null\0": "(?i)no file can have (such a|the) name",
        "/proc/k": "no such file|permission denied|read-only",
        "": "it is a folder",
        "..": "it is a folder",
    }.items():
        for save in (one.save, lambda path: save_panel(path, {"a": ("x", 1)})):
            with pytest.raises(KnobError, match=message) as caught:
                save(path)
            assert is_clear(str(caught.value))
    assert sorted(os.listdir()) == ["file", "folder", "full", "loop", "loop2", "pipe"]
    assert Path("full").is_symlink()
    assert Path("file").read_bytes() == b"x"
    one.save("loop")  # a link is replaced, not followed, so that one in a circle is no trouble
    assert Knob.load("loop").name == "math"
    name = "ж" * 127  # 254 bytes of at most 255: what is added while writing must still fit
    one.save(name)
    assert Knob.load(name).name == "math"
    one.save(Path("new") / "folder" / "k")
    assert os.listdir(Path("new") / "folder") == ["k"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provenance": {1: "a", "1": "b"}}, "two fields '1'"),
        ({"provenance": {"x": json.loads("[" * 200 + "]" * 200)}}, "nested too deeply"),
        ({"diagnostics": {"text": "x" * 9 * 2**20}}, "at most 8388608 are read"),
        ({"provenance": {"x": 10**5000}}, "cannot be written as JSON"),
        ({"provenance": {"x": float("nan")}}, "cannot be written as JSON"),
        ({"provenance": {"x": {1, 2}}}, "cannot be written as JSON"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(changes: dict[str, Any], message: str) -> None:
    one, _ = two_knobs()
    with pytest.raises(KnobError, match=message) as caught:
        one.with_(**changes).save("k")
    assert is_clear(str(caught.value))
    assert os.listdir() == []


KILLED = """
import json, os, random, signal, sys, time
import torch
from pathlib import Path
from trimtab.artifact import Knob
from trimtab.types import Site
torch.set_num_threads(1)
site = Site(0, "last")
knobs = [Knob(name, "m", {site: torch.full((width,), value)}, {0: 1.0}, site, 1.0)
         for name, value, width in (("one", 1.0, 30_000), ("two", 2.0, 90_000))]
whole = []
for knob in knobs:
    knob.save("k")
    whole.append(Path("k").read_bytes())
draw = random.Random(0)
found = {"one": 0, "two": 0, "parts": 0}
for _ in range(20):
    child = os.fork()
    if not child:
        while True:
            for knob in knobs:
                knob.save("k")
    time.sleep(draw.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert Path("k").read_bytes() in whole
    knob = Knob.load("k")
    assert torch.equal(knob.vectors[site], {k.name: k for k in knobs}[knob.name].vectors[site])
    found[knob.name] += 1
left = [name for name in os.listdir() if name != "k"]
assert all(name.startswith(".k.") and name.endswith(".part") for name in left), left
found["parts"] = len(left)
print(json.dumps(found))
"""


def test_a_knob_killed_at_twenty_moments_of_saving_is_always_a_whole_file() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["one"] + found["two"] == 20


# Properties of sound knobs

names = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters=",="), min_size=1, max_size=100
).filter(str.isprintable)
sites = st.builds("{}/{}".format, st.integers(0, 9999), st.from_regex(r"\A[a-z_]{1,20}(\[-?[0-9]{1,3}\])?\Z"))
objects = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)
positive = st.floats(1e-300, 1e30)


@st.composite
def examples(draw: st.DrawFn, places: list[Site], width: int) -> KernelExamples:
    count = draw(st.integers(1, 3))
    values = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=count * width, max_size=count * width)
    matrix = values.map(lambda flat: torch.tensor(flat).reshape(count, width))
    return KernelExamples(
        kind=draw(st.sampled_from(["cosine", "softmax", "linear"])),
        temperature=draw(st.floats(1e-6, 1e6)),
        keys={place: draw(matrix) for place in places},
        values={place: draw(matrix) for place in places},
        scales={place: draw(st.just(0.0) | st.floats(1e-3, 1e300)) for place in places},
    )


@st.composite
def knobs(draw: st.DrawFn, single: bool = False) -> Knob:
    places = [Site.parse(text) for text in draw(st.sets(sites, min_size=1, max_size=1 if single else 4))]
    width = 4 if single else draw(st.integers(1, 9))
    number = st.floats(-100, 100, width=32) if single else st.floats(width=32, allow_nan=False, allow_infinity=False)
    vectors = {place: torch.tensor(draw(st.lists(number, min_size=width, max_size=width))) for place in places}
    operation = "add" if single else draw(st.sampled_from(OPERATIONS))
    kernel = draw(examples(places, width)) if operation == "kernel" else None
    norm = st.floats(0.01, 100) if single else positive
    return Knob(
        name=draw(names),
        method=draw(names),
        vectors=vectors,
        norms={place.layer: draw(norm) for place in places},
        site=draw(st.sampled_from(places)),
        gain=draw(st.floats(0, 10) if single else st.just(0.0) | st.floats(0, 1e8)),
        where=draw(st.sampled_from(["all", "prompt", "context", "completion"])),
        operation=operation,
        kernel=kernel,
        provenance={} if single else draw(objects),
        diagnostics=draw(objects),
        tuning=draw(st.none() | objects.filter(lambda value: "safe_range" not in value)),
    )


@PROPERTY
@given(knobs())
def test_any_knob_comes_back_from_its_file_bit_for_bit(knob: Knob) -> None:
    hostile.check_sound(knob, Path("k"))


@PROPERTY
@given(knobs(single=True), st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), st.floats(-8, 8))
def test_arithmetic_with_knobs_is_that_of_vectors(a: Knob, values: list[float], factor: float) -> None:
    b = Knob("b", "m", {a.site: torch.tensor(values)}, {a.site.layer: 3.0}, a.site, 0.7, where=a.where)
    ours, theirs = a.addend(1.0), b.addend(1.0)
    room = 1e-5 * (1 + float(ours.norm()) + float(theirs.norm()))

    def same(left: torch.Tensor, right: torch.Tensor) -> None:
        assert float((left.double() - right.double()).norm()) <= room * (1 + abs(factor))

    same((a + b).addend(1.0), ours + theirs)
    same((a + b).addend(1.0), (b + a).addend(1.0))
    same((a - b).addend(1.0), -(b - a).addend(1.0))
    same((factor * a).addend(1.0), a.addend(factor))
    same((factor * (a + b)).addend(1.0), (factor * a + factor * b).addend(1.0))
    same((2 * a).addend(1.0), (a + a).addend(1.0))
    same((-a).addend(1.0), -ours)
    same((-1 * -a).addend(1.0), ours)
    same((a + 0 * b).addend(1.0), ours)
    assert not (0 * a).addend(1.0).any()
    assert not (a - a).addend(1.0).any()
