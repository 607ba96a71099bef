"""The far side of the sandbox: a helper that runs one program per forked child, under limits.

Started by `sandbox.py` in an isolated interpreter, to `serve` (which forks) or to run a program `once` (for platforms
without fork). Standard library only, so that a fork copies a small process.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import struct
import sys
import time
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from trimtab.evals import _sandbox_kernel as kernel

MAX_RESULT = 1 << 20
"""Bytes that one program may return, over all its calls."""

ORPHAN = 5.0
"""Seconds beyond its own after which a program that nobody waits for ends itself, where no helper watches it."""

TOKEN_BYTES = 16
HEADER = struct.Struct(">I")

# Imported before the first fork, so that programs do not pay for them one by one.
WARM = (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq itertools "
    "operator random re statistics string typing"
).split()

FILES_CLOSED = "no files but the library"
CALLS_FILTERED = "no system calls for processes, signals and sockets"

REFUSED = frozenset(  # audit events, https://docs.python.org/3/library/audit_events.html
    "gc.get_objects gc.get_referents gc.get_referrers mmap.__new__ os.chflags os.chmod os.chown os.exec os.fork "
    "os.forkpty os.kill os.killpg os.link os.lockf os.mkdir os.posix_spawn os.remove os.removexattr os.rename os.rmdir "
    "os.setxattr os.spawn os.startfile os.startfile/2 os.symlink os.system os.truncate os.utime pty.spawn "
    "resource.prlimit resource.setrlimit signal.pthread_kill sqlite3.connect subprocess.Popen sys._current_exceptions "
    "sys._current_frames sys.setprofile sys.settrace syslog.openlog".split()
)
LISTING, HERE = ("os.listdir", "os.scandir"), (None, ".")
REFUSED_FAMILIES = ("_winapi.", "ctypes.", "shutil.", "socket.", "winreg.")
REFUSED_MODULES = frozenset({"_ctypes", "_testcapi", "_testinternalcapi", "_testlimitedcapi", "ctypes"})
REFUSED_ATTRIBUTES = frozenset({"ag_frame", "cr_frame", "gi_frame", "tb_frame"})

Job = dict[str, Any]


# --- what both sides share ------------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """Return `value` made of None, bool, int, float, str, list and dict alone; tuples become lists.

    Raises `TypeError` for anything else, dictionary keys that are not strings included: JSON would turn `1` into `"1"`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):  # by the base class: a member of an enumeration is what it holds
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        for key in value:  # pyright: ignore[reportUnknownVariableType]
            if not isinstance(key, str):
                raise TypeError(f"dictionary key {key!r} is not a string")
        return {str(key): plain(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    raise TypeError(f"a {type(value).__name__} is not a JSON value")


def pack(payload: bytes, token: bytes = b"") -> bytes:
    """Frame one message: token, length, payload."""
    return token + HEADER.pack(len(payload)) + payload


class Frames:
    """The messages of one child, split from its byte stream as they arrive."""

    def __init__(self, token: bytes) -> None:
        self.payloads: list[str] = []
        self.finished = False
        self.spoiled = False
        self._token = token
        self._pending = b""
        self._total = 0

    def feed(self, data: bytes) -> None:
        """Take more bytes; `finished` on the empty closing message, `spoiled` on bytes that nobody here wrote."""
        self._pending += data
        self._total += len(data)
        start = len(self._token) + HEADER.size
        while not (self.finished or self.spoiled):
            head = self._pending[: len(self._token)]
            self.spoiled = head != self._token[: len(head)] or self._total > 2 * MAX_RESULT
            if self.spoiled or len(self._pending) < start:
                return
            (length,) = HEADER.unpack(self._pending[len(self._token) : start])
            if len(self._pending) < start + length:
                return
            self.payloads.append(self._pending[start : start + length].decode("utf-8", "replace"))
            self._pending = self._pending[start + length :]
            if not length:
                self.payloads.pop()
                self.finished = True


# --- inside the child -----------------------------------------------------------------------------------------------


def guard() -> None:
    """Refuse files, processes, sockets, foreign memory and other frames, by an audit hook that cannot be removed."""
    for name in list(sys.modules):
        if name in REFUSED_MODULES or name.partition(".")[0] == "trimtab":
            del sys.modules[name]
    library = (*filter(None, sys.path), os.devnull)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # Names are bound here, so that a program which patches builtins does not patch the hook.
    text, number, kind, refusal = str, int, type, PermissionError

    def allowed(path: object, flags: int) -> bool:
        if kind(path) is number:
            return path in (0, 1, 2)
        if kind(path) is not text:
            return False
        return path == library[-1] or (not flags & writing and ".." not in path and path.startswith(library))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REFUSED or event.startswith(REFUSED_FAMILIES):
            raise refusal(f"{event} is refused in the sandbox")
        if event == "open" and not allowed(arguments[0], arguments[2]):
            raise refusal("files are refused in the sandbox")
        if event in LISTING and arguments[0] not in HERE and not allowed(arguments[0], 0):
            raise refusal("folders are refused in the sandbox")
        if event == "import" and arguments[0] in REFUSED_MODULES:
            raise ImportError(f"{arguments[0]} is refused in the sandbox")
        if event == "sys._getframe":
            raise ValueError("frames are refused in the sandbox")  # what the standard library's callers catch
        if event == "object.__getattr__" and arguments[1] in REFUSED_ATTRIBUTES:
            raise AttributeError(f"{arguments[1]} is refused in the sandbox")

    sys.addaudithook(hook)


def describe(error: BaseException) -> str:
    """Return `NameError: name 'x' is not defined`, cut to 300 characters."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001  the class is the program's
        text = ""
    name = type(error).__name__
    return f"{name}: {text}"[:300] if text else name


def execute(job: Job, channel: int, token: bytes) -> None:
    """Run one program and send one message for loading it and one for each call.

    Nothing here knows the expected results. What is needed to report success is bound before the program runs.
    """
    write, success, end = os.write, pack(b'{"value":null}', token), pack(b"", token)
    left = MAX_RESULT

    def send(message: dict[str, object]) -> None:
        nonlocal left
        payload = json.dumps(message).encode()
        left -= len(payload)
        if left < 0:
            payload = json.dumps({"error": f"results larger than {MAX_RESULT} bytes"}).encode()
        data = pack(payload, token)
        while data:
            data = data[write(channel, data) :]

    module = types.ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        exec(compile(job["code"], "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # noqa: BLE001  whatever the program raises is its result
        send({"error": describe(error)})
    else:
        write(channel, success)
        for arguments in job["calls"]:
            try:
                send({"value": plain(getattr(module, job["function"])(*arguments))})
            except BaseException as error:  # noqa: BLE001
                send({"error": describe(error)})
    write(channel, end)


def child(job: Job, channel: int, token: bytes) -> NoReturn:
    """Shut this process in, run the job and leave without clean-up, whatever happens."""
    leave = os._exit
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.closerange(3, channel)
        os.closerange(channel + 1, 256)
        granted, gains = shut_in(job["memory_mb"], job["timeout"])
        if job["code"] is None:  # a probe: what can this platform do?
            if "processes" in granted and _can_fork():
                granted.remove("processes")
            os.write(channel, pack(json.dumps([granted, gains]).encode(), token) + pack(b"", token))
        else:
            importlib.import_module("random").seed(0)  # after the fork, at which `random` seeds itself afresh
            guard()
            execute(job, channel, token)
    finally:
        leave(1)


def shut_in(memory_mb: int, seconds: float) -> tuple[list[str], list[str]]:
    """Put every layer of the kernel's around this process for good; returns the limits and the layers it granted."""
    kernel.drop_privileges()
    layers = {
        FILES_CLOSED: kernel.close_files(filter(None, sys.path)),
        CALLS_FILTERED: kernel.filter_calls(),
    }
    gains = [gain for gain, has in layers.items() if has]
    return kernel.limit(memory_mb, seconds, threads=CALLS_FILTERED in gains), gains


def _can_fork() -> bool:
    try:
        pid = os.fork()
    except OSError:
        return False
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


# --- the helper that forks ------------------------------------------------------------------------------------------


class Abandoned(Exception):
    """The process that wanted the answer is gone."""


def collect(source: int, token: bytes, seconds: float, watched: Sequence[int] = ()) -> tuple[Frames, bool]:
    """Read a child's messages until it is done, silent or out of time; the flag says whether time ran out.

    Raises `Abandoned` when a watched descriptor becomes readable.
    """
    frames, deadline = Frames(token), time.monotonic() + seconds
    while not (frames.finished or frames.spoiled):
        remaining = deadline - time.monotonic()
        ready = select.select([source, *watched], [], [], remaining)[0] if remaining > 0 else []
        if not ready:
            return frames, True
        if ready != [source]:
            raise Abandoned
        data = os.read(source, 1 << 16)
        if not data:
            break
        frames.feed(data)
    return frames, False


def stop(pid: int, *, own_tree: bool) -> int:
    """Kill a child with its process group, in a tree of our own with everything in it, and return its wait status."""
    for victim in (-1,) if own_tree else (-pid, pid):  # the child may not have come to make its group
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, 9)
    status = os.waitpid(pid, 0)[1]
    if own_tree:
        with contextlib.suppress(ChildProcessError):
            while True:  # orphans
                os.waitpid(-1, 0)
    return status


def run_job(job: Job, *, own_tree: bool, watched: Sequence[int] = ()) -> dict[str, object]:
    """Fork, run one job in the child and return its messages with how it ended."""
    token, helper = os.urandom(TOKEN_BYTES), os.getpid()
    source, channel = os.pipe()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        kernel.die_with_parent()
        if os.getppid() != helper:  # which is gone already
            os._exit(1)
        child(job, channel, token)
    os.close(channel)
    try:
        frames, late = collect(source, token, job["timeout"], watched)
    finally:
        status = stop(pid, own_tree=own_tree)
        os.close(source)
    if frames.spoiled:
        ending = "wrote to the result channel"
    elif late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == 24):  # SIGXCPU
        ending = "timeout"
    elif os.WIFSIGNALED(status) and not frames.finished:
        ending = f"killed by signal {os.WTERMSIG(status)}"
    else:
        ending = "exited before its end"
    return {"frames": frames.payloads, "ending": ending}


def serve() -> None:
    """Answer jobs on standard input until it closes, or the process that started this one is gone."""
    watched = [0]  # during a job nothing is sent, so that it turns readable when it closes
    with contextlib.suppress(AttributeError, OSError):  # Linux alone; others may hold the pipe open, if we were forked
        watched.append(os.pidfd_open(os.getppid()))
    gains = kernel.isolate()
    own_tree = kernel.OWN_TREE in gains
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    requests, replies = os.fdopen(0, "rb", closefd=False), os.fdopen(1, "wb", closefd=False)
    gains.insert(0, "a fork per program")
    with contextlib.suppress(Abandoned, BrokenPipeError):
        while select.select(watched, [], [])[0] == [0] and (head := requests.read(HEADER.size)):
            job = json.loads(requests.read(HEADER.unpack(head)[0]))
            reply = run_job(job, own_tree=own_tree, watched=watched)
            replies.write(pack(json.dumps({**reply, "gains": gains}).encode()))
            replies.flush()
    os._exit(0)  # replies may hold what nobody reads


def once() -> NoReturn:
    """Run the one job on standard input; its messages go to standard output."""
    job = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    # A thread of C ends this process should nobody be there to do it.
    faulthandler.dump_traceback_later(job["timeout"] + ORPHAN, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    child(job, channel, bytes.fromhex(job["token"]))


def main() -> None:
    """Do what the command line says: `serve` or `once`."""
    builtins.exit = builtins.quit = sys.exit  # `-S` leaves them out; programs use them
    {"serve": serve, "once": once}[sys.argv[1]]()
