"""The sandbox: what programs return, what they cannot do, and that it still answers after each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.errors import OptionError, SandboxError
from trimtab.evals import _sandbox_worker as worker
from trimtab.evals import sandbox as module
from trimtab.evals.sandbox import CallResult, RunResult, Sandbox

ALIVE = "def f(): return 7"

needs_fork = pytest.mark.skipif(not module.FORK, reason="no os.fork on this platform")


@pytest.fixture(scope="module", params=["fork", "process"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """One sandbox for the whole file, in each way of running: every test also shows that the last left it usable."""
    if request.param == "fork" and not module.FORK:
        pytest.skip("no os.fork on this platform")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORK", request.param == "fork")
        running = Sandbox(timeout=1.0)
    with running:
        yield running


# --- what programs return -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, 1, 1.0, -0.5, 10**30, "", "é\n\ud800", [], [1, [2.0, [True]]], {"a": {"b": None}}],
    ids=repr,
)
def test_json_values_keep_their_types(sandbox: Sandbox, value: object) -> None:
    (result,) = sandbox.call("def f(x): return x", "f", [[value]])
    assert repr(result.value) == repr(value)
    assert result.error is None


def test_tuples_become_lists_and_enumerations_what_they_hold(sandbox: Sandbox) -> None:
    code = "import enum\nclass E(str, enum.Enum): A = 'a'\ndef f(x): return (1, (x, E.A))"
    assert sandbox.call(code, "f", [[(2, 3)]]) == [CallResult([1, [[2, 3], "a"]])]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(:", "SyntaxError: invalid syntax"),
        ("x = \0", "SyntaxError: source code string cannot contain null bytes"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def g(): return 1", "AttributeError: module 'program' has no attribute 'f'"),
        ("def f(): return undefined", "NameError: name 'undefined' is not defined"),
        ("def f(a): return 1", "TypeError: f() missing 1 required positional argument"),
        ("def f(): return {1, 2}", "TypeError: a set is not a JSON value"),
        ("def f(): return {1: 2}", "TypeError: dictionary key 1 is not a string"),
        ("def f(): exit()", "SystemExit"),
        ("def f():\n  x = []\n  x.append(x)\n  return x", "RecursionError"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "E"),
    ],
)
def test_errors_are_named(sandbox: Sandbox, code: str, error: str) -> None:
    (result,) = sandbox.call(code, "f", [[]])
    assert result.value is None
    assert result.error is not None
    # Python 3.12 raises SyntaxError for null bytes where 3.11 raises ValueError
    assert result.error.replace("ValueError: source", "SyntaxError: source").startswith(error)


def test_each_call_has_its_own_result(sandbox: Sandbox) -> None:
    results = sandbox.call("def f(x): return 10 // x", "f", [[1], [0], [5]])
    assert [result.value for result in results] == [10, None, 2]
    assert results[1].error == "ZeroDivisionError: integer division or modulo by zero"


@pytest.mark.parametrize(("stop", "ending"), [("time.sleep(9)", "timeout"), ("os._exit(0)", "exited before its end")])
def test_what_came_before_a_stop_is_kept(sandbox: Sandbox, stop: str, ending: str) -> None:
    code = f"import os, time\ndef f(x):\n  if x == 2: {stop}\n  return x"
    results = sandbox.call(code, "f", [[1], [2], [3]])
    assert results == [CallResult(1), CallResult(error=ending), CallResult(error=ending)]


def test_no_calls_is_no_results(sandbox: Sandbox) -> None:
    assert sandbox.call("1 / 0", "f", []) == []


def test_arguments_changed_by_one_call_are_fresh_in_the_next(sandbox: Sandbox) -> None:
    shared = [1]
    results = sandbox.call("def f(x):\n  x.append(2)\n  return x", "f", [[shared], [shared]])
    assert [result.value for result in results] == [[1, 2], [1, 2]]
    assert shared == [1]


def test_programs_are_repeatable(sandbox: Sandbox) -> None:
    code = "import random\ndef f(): return [random.random(), list({'red', 'green', 'blue', 'black'})]"
    with Sandbox() as other:
        assert sandbox.call(code, "f", [[]]) == sandbox.call(code, "f", [[]]) == other.call(code, "f", [[]])


def test_ordinary_library_code_works(sandbox: Sandbox) -> None:
    program = (
        "import collections, dataclasses, enum, functools, heapq, itertools, json, logging, re, string, typing\n"
        "@dataclasses.dataclass\nclass P:\n  x: 'int' = 1\n"
        "Q = collections.namedtuple('Q', 'a b')\nclass R(typing.NamedTuple):\n  a: int\n"
        "logging.warning('once')\nprint('said')\nassert P() == P(1) and Q(1, 2).b == 2 and __name__ != '__main__'\n"
        "import difflib, contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()) as said: print('caught')\nassert said.getvalue() == 'caught\\n'"
    )
    assert sandbox.run(program) == RunResult(True)


# --- comparing ------------------------------------------------------------------------------------------------------


def test_passes_needs_every_case_and_the_exact_type(sandbox: Sandbox) -> None:
    code = "def f(x): return x"
    assert sandbox.passes(code, "f", [([1], 1), ([[True, None]], (True, None)), ([{"a": 0.5}], {"a": 0.5})])
    for argument, expected in [(1, 2), (1, True), (True, 1), (1, 1.0), ([1], [1, 1]), ({"a": 1}, {"b": 1}), ("1", 1)]:
        assert not sandbox.passes(code, "f", [([0], 0), ([argument], expected)]), (argument, expected)
    assert sandbox.passes("def f(): return float('nan')", "f", [([], float("nan"))])


def test_an_object_that_equals_everything_does_not_pass(sandbox: Sandbox) -> None:
    code = "class Any(int):\n  def __eq__(self, other): return True\n  __ne__ = None\n"
    assert not sandbox.passes(code + "def f(): return Any(3)", "f", [([], 4)])
    assert not sandbox.passes(code.replace("int", "object") + "def f(): return Any()", "f", [([], 4)])


def test_expected_values_never_leave_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    pack = worker.pack
    monkeypatch.setattr(worker, "pack", lambda payload: sent.append(payload) or pack(payload))
    with Sandbox() as watched:
        assert not watched.passes("def f(x): return x", "f", [(["argument-1"], "expected-1")])
    traffic = b"".join(sent)
    assert b"argument-1" in traffic
    assert b"expected-1" not in traffic


# --- what programs cannot do ----------------------------------------------------------------------------------------

HOSTILE = {
    "sys.exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "os._exit": ("import os; os._exit(0)", "exited before its end"),
    "exit from a clean-up": ("import os\nclass D:\n  def __del__(self): os._exit(0)\nD()", "exited before its end"),
    "endless loop": ("while True: pass", "timeout"),
    "endless sleep": ("import time; time.sleep(99)", "timeout"),
    "output flood": ("while True: print('x' * 9999)", "timeout"),
    "catching everything": ("while True:\n  try: x\n  except BaseException: pass", "timeout"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "one huge list": ("x = [0] * 10**10", "MemoryError"),
    "many strings": ("x = []\nwhile True: x.append('x' * 10**6)", "MemoryError"),
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "subprocess": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "shell": ("import os; os.system('true')", "PermissionError"),
    "exec": ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
    "killing": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "network": ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    "reading files": ("open('/etc/passwd')", "PermissionError"),
    "climbing from the library": ("import os; open(os.__file__ + '/../../../../../etc/passwd')", "PermissionError"),
    "other descriptors": ("open(3, 'wb')", "PermissionError"),
    "foreign memory": ("import ctypes", "ImportError"),
    "standard input": ("input()", "EOFError"),
    "abort": ("import os; os.abort()", "killed by signal 6"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
}


@pytest.mark.parametrize(("program", "error"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_program_fails_and_the_sandbox_still_answers(sandbox: Sandbox, program: str, error: str) -> None:
    result = sandbox.run(program)
    assert not result.ok
    if error != "killed by signal 6" or sandbox._fork:  # without fork, the signal is not seen
        assert (result.error or "").startswith(error)
    assert sandbox.call(ALIVE, "f", [[]]) == [CallResult(7)]


FORGERIES = {
    "printing": "print('{\"value\": null}')",
    "writing to every descriptor": (
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'\\0\\0\\0\\x0e{\"value\":null}' * 2)\n"
        "  except OSError: pass"
    ),
    "walking the frames": (
        "import sys\nhave = sys._getframe(1).f_locals\nhave['write'](have['channel'], have['success'])"
    ),
    "walking a traceback": "try: 1 / 0\nexcept Exception as error: error.__traceback__.tb_frame.f_back",
    "walking a generator": "g = (g.gi_frame for _ in [0])\nnext(g)",
    "tracing": "import sys\nsys.settrace(lambda *a: None)",
    "asking the collector": "import gc\ngc.get_objects()",
    "asking the main module": "import __main__\n__main__.execute",
    "a new hook": "import sys\nsys.addaudithook(lambda *a: None)\nopen('/etc/passwd')",
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=list(FORGERIES))
def test_success_cannot_be_claimed_before_the_end(sandbox: Sandbox, forgery: str) -> None:
    assert not sandbox.run(f"{forgery}\nimport os; os._exit(0)").ok
    assert not sandbox.run(f"{forgery}\nassert False").ok


@pytest.mark.parametrize(
    "patch",
    [
        "import builtins\nfor name in dir(builtins):\n  if name[0] != '_': setattr(builtins, name, None)",
        "import json, os\njson.dumps = os.write = os._exit = lambda *a, **k: b''",
        "import sys\nsys.modules.clear()",
        "import math; math.pi = 3",
    ],
)
def test_patches_end_with_their_program(sandbox: Sandbox, patch: str) -> None:
    assert not sandbox.run(patch + "\nraise AssertionError").ok
    assert sandbox.passes("import math\ndef f(): return [len('abc'), math.pi > 3]", "f", [([], [3, True])])


def test_threads_left_running_do_not_hold_up_the_result(sandbox: Sandbox) -> None:
    code = (
        "import threading, time\ndef spin():\n  while True: time.sleep(0.01)\n"
        "try:\n  for daemon in (True, False): threading.Thread(target=spin, daemon=daemon).start()\n"
        "except RuntimeError: pass  # no new threads on this platform\n"
    )
    started = time.monotonic()
    assert sandbox.run(code, timeout=30) == RunResult(True)
    assert time.monotonic() - started < 15


def test_results_are_bounded(sandbox: Sandbox) -> None:
    results = sandbox.call("def f(n): return 'x' * n", "f", [[10], [10**7], [10]])
    assert results[0] == CallResult("x" * 10)
    assert [result.error for result in results[1:]] == ["results larger than 1048576 bytes"] * 2


def test_unreadable_results_are_errors_of_the_program(sandbox: Sandbox) -> None:
    code = "import json\njson.dumps = lambda *a: {}\ndef f(): return 1"
    for text in ("'1' * 6000", "'[' * 200_000", "'[]'", "'{}'", "'nonsense'"):
        assert sandbox.call(code.replace("{}", text, 1), "f", [[]]) == [CallResult(error="unreadable result")], text


def test_memory_is_limited_to_what_was_asked() -> None:
    program = "x = bytearray(300 << 20)"
    with Sandbox(timeout=10, memory_mb=256) as small, Sandbox(timeout=10, memory_mb=512) as large:
        if "memory" not in small.isolation:
            pytest.skip("this platform does not limit memory")
        assert small.run(program).error == "MemoryError"
        assert large.run(program).ok


def test_files_can_be_neither_written_nor_removed(sandbox: Sandbox, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("unharmed")
    tmp_path.chmod(0o777)
    for deed in ("open(p, 'w')", "open(p, 'a')", "os.open(p, os.O_RDWR)", "os.remove(p)", "os.rename(p, p + '2')"):
        assert "PermissionError" in (sandbox.run(f"import os; p = {str(victim)!r}; {deed}").error or ""), deed
    assert "PermissionError" in (sandbox.run("open('new', 'w')").error or "")
    assert victim.read_text() == "unharmed"
    assert list(tmp_path.iterdir()) == [victim]


def test_environment_and_descriptors_stay_outside(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os\ndef f():\n  fds = []\n  for fd in range(256):\n    try: fds.append(os.fstat(fd) and fd)\n"
        "    except OSError: pass\n  return [sorted(os.environ), len(fds), os.listdir('.')]"
    )
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with Sandbox() as fresh:
        for one in (sandbox, fresh):
            (result,) = one.call(code, "f", [[]])
            assert isinstance(result.value, list)
            names, descriptors, files = result.value
            assert set(names) <= {"PYTHONHASHSEED", "LC_CTYPE", "SYSTEMROOT", "__CF_USER_TEXT_ENCODING"}
            assert descriptors == 4  # three to nowhere and the result channel
            assert files == []


# --- the sandbox itself ---------------------------------------------------------------------------------------------


def test_isolation_is_described(sandbox: Sandbox) -> None:
    how = "a fork per program" if sandbox._fork else "a process per program"
    assert sandbox.isolation.startswith(how)
    assert sandbox.isolation.endswith("files, processes and sockets refused")


@needs_fork
def test_hundreds_of_programs_go_through_one_helper() -> None:
    with Sandbox() as quick:
        assert quick.run("x = 1").ok
        helper = quick._process
        for number in range(300):
            assert quick.passes("def f(x): return x * x", "f", [([number], number * number)])
        assert quick._process is helper


@needs_fork
def test_a_helper_that_dies_is_replaced_and_closing_leaves_nothing() -> None:
    box = Sandbox()
    assert box.run("x = 1").ok
    first = box._process
    assert first is not None
    os.killpg(first.pid, 9)
    assert box.run("x = 1").ok
    second, folder = box._process, box._folder
    assert second is not None
    assert folder is not None
    assert second.pid != first.pid
    box.close()
    box.close()
    assert second.poll() is not None
    assert not Path(folder.name).exists()
    with box:
        assert box.run("x = 1").ok  # a closed sandbox starts again


@needs_fork
def test_an_interrupted_call_does_not_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with Sandbox() as box:
        assert box.call("def f(): return 'old'", "f", [[]])[0].value == "old"
        with monkeypatch.context() as patch:
            patch.setattr(module, "_read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                box.call("def f(): return 'interrupted'", "f", [[]])
        assert box.call("def f(): return 'new'", "f", [[]])[0].value == "new"


@needs_fork
def test_a_program_that_kills_its_helper_twice_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Sandbox._exchange
    with Sandbox() as box, monkeypatch.context() as patch:
        patch.setattr(Sandbox, "_exchange", lambda self, job: None if job["code"] == "deadly" else exchange(self, job))
        assert box.run("deadly") == RunResult(False, "killed its sandbox")
        assert box.run("x = 1").ok


@pytest.mark.parametrize("fork", [True, False])
def test_a_sandbox_that_cannot_work_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fork: bool) -> None:
    monkeypatch.setattr(module, "FORK", fork and module.FORK)
    with monkeypatch.context() as patch:
        patch.setattr(module, "START", "raise RuntimeError('out of order')")
        with Sandbox() as box, pytest.raises(SandboxError, match=r"(?s)does not answer.*out of order"):
            box.run("x = 1")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with Sandbox() as box, pytest.raises(SandboxError, match=r"could not start.*missing"):
        box.run("x = 1")


@needs_fork
@pytest.mark.parametrize("size", [1, 10**6])  # the second does not fit into a pipe
def test_a_silent_helper_is_given_up(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "GRACE", 0.1)
    with Sandbox(timeout=0.1) as box:
        monkeypatch.setattr(module, "START", "import time; time.sleep(60)")
        with pytest.raises(SandboxError, match="does not answer"):
            box.run("x = 1")
        box._process = module._launch("serve", "/", subprocess.DEVNULL)
        assert box._exchange({"code": "#" * size, "timeout": 0.1}) is None


def test_wrong_use_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="between 0 and 3600 seconds; got 0"):
        Sandbox(timeout=0)
    with pytest.raises(OptionError, match=r"at least 64 MB.*got 8"):
        Sandbox(memory_mb=8)
    with Sandbox() as box:
        with pytest.raises(OptionError, match="got -1"):
            box.run("x = 1", timeout=-1)
        with pytest.raises(OptionError, match="argument list 1: a set is not"):
            box.call(ALIVE, "f", [[], [{1}]])
        with pytest.raises(OptionError, match="expected value of case 0: dictionary key 1"):
            box.passes(ALIVE, "f", [([], {1: 1})])
        with pytest.raises(OptionError, match="at least one case"):
            box.passes(ALIVE, "f", [])


# --- the layers below the audit hook, each on its own ---------------------------------------------------------------


def outside(script: str, *arguments: str) -> str:
    """Run a script that has imported the worker as `w` and the kernel's layers as `k`, in a process of its own."""
    head = (
        f"import os, sys; sys.path.insert(0, {str(Path(worker.__file__).parents[2])!r})\n"
        "from trimtab.evals import _sandbox_kernel as k, _sandbox_worker as w\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + script, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_namespaces_give_what_they_promise(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("unharmed")
    gains = outside(
        "gains = k.isolate(); print(*gains, sep=',')\nk.drop_privileges()\n"
        "import ctypes, socket\n"
        "if 'no network' in gains: assert [name for _, name in socket.if_nameindex()] == ['lo']\n"
        "if 'own process tree' in gains: assert os.getpid() == 1\n"
        "if 'read-only files' in gains:\n"
        "  assert ctypes.CDLL(None).umount2(b'/proc', 2) == -1\n"
        "  try: os.remove(sys.argv[1])\n"
        "  except OSError as error: assert error.errno == 30, error\n"
        "  else: raise AssertionError('removed')\n",
        str(victim),
    )
    assert victim.exists()
    if not gains.strip():
        pytest.skip("this platform grants no namespaces")


@needs_fork
def test_without_namespaces_programs_are_still_stopped() -> None:
    out = outside(
        "job = dict(function='', calls=[], timeout=0.5, memory_mb=256)\n"
        "for code in ('x = 1', 'while True: pass', 'import os; os._exit(0)', 'x = [0] * 10**10',\n"
        "             'import os; os.abort()', 'x = 1'):\n"
        "  reply = w.run_job(dict(job, code=code), own_tree=False)\n"
        "  print(reply['frames'], reply['ending'], sep='|')\n"
    )
    assert out.splitlines() == [
        "['{\"value\":null}']|exited before its end",
        "[]|timeout",
        "[]|exited before its end",
        '[\'{"error": "MemoryError"}\']|exited before its end',
        "[]|killed by signal 6",
        "['{\"value\":null}']|exited before its end",
    ]
