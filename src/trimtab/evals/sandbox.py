"""Run model-written Python, many programs fast, in a helper process under limits.

How: one helper (isolated interpreter, empty environment, own session, empty working directory) forks a child for each
program. The child makes a process group of its own, lowers its limits for good, gives up privileges, closes its
descriptors and runs the program; the helper watches the clock, and the process that wants the answer, and kills the
group. Where the platform allows, the helper first moves into namespaces of its own (no network, a read-only file
system, a process tree that is emptied after each program), and each child shuts itself in: Landlock closes all files
but the standard library, a filter of system calls forbids new processes, signals, sockets and changes to files.
`Sandbox.isolation` says what was granted. An audit hook, which Python code cannot remove, refuses the same on every
platform, and with it ctypes and the frames of other code. Without `os.fork` a fresh process runs each program, slower
and under the clock alone.

Programs write no file at all, a scratch file neither: no solution in HumanEval or MBPP needs one. They see the standard
library and no other package, and what they print goes nowhere. They are repeatable: strings hash, and `random` starts,
the same way in every one.

What it protects against: the mistakes and the opportunism of generated code. Endless loops, floods, memory and fork
bombs, exits, damage to files and to other processes, printing or spraying a success message, patching builtins. With
`call` and `passes` expected results never enter the child, so there is nothing to win by reaching the harness.

What it does not: it is no security boundary. Code *written to* break out of CPython may forge the success of `run`,
whose tests share a process with the code they test (an object that is equal to everything already passes them), and
where `isolation` names no kernel layer it may harm what the user's account can harm. Run hostile code in a virtual
machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, cast

from trimtab.errors import OptionError, SandboxError
from trimtab.evals import _sandbox_worker as worker

FORK = hasattr(os, "fork")
GRACE = 20.0
"""Seconds beyond a program's own before a silent helper is given up: a busy machine is slow, not broken."""

START = (
    "import sys; sys.path.insert(0, sys.argv.pop()); "
    "from trimtab.evals._sandbox_worker import main; del sys.path[0]; main()"
)
"""What the helper's interpreter, which sees the standard library alone, is told to run."""


@dataclass(frozen=True)
class CallResult:
    """What one call returned, as plain JSON values, or why it did not: `error` is None if and only if it returned."""

    value: object = None
    error: str | None = None


@dataclass(frozen=True)
class RunResult:
    """Whether a program ran to its end, and what stopped it if not."""

    ok: bool
    error: str | None = None


class _Reply(NamedTuple):
    frames: list[str]
    ending: str
    gains: list[str]


class Sandbox:
    """Run programs apart from this process; a context manager, started by its first program.

    `timeout` is in seconds of wall time for a whole program, its calls included; `memory_mb` bounds its address space.
    Not for use from several threads at once.

    >>> with Sandbox() as sandbox:
    ...     sandbox.call("def double(x): return 2 * x", "double", [[4], ["a"], [None]])
    ... # doctest: +NORMALIZE_WHITESPACE
    [CallResult(value=8, error=None), CallResult(value='aa', error=None),
     CallResult(value=None, error="TypeError: unsupported operand type(s) for *: 'int' and 'NoneType'")]
    """

    def __init__(self, timeout: float = 2.0, memory_mb: int = 256) -> None:
        if memory_mb < 64:
            raise OptionError(f"The memory must be at least 64 MB, which Python itself needs; got {memory_mb!r}.")
        self._timeout = _seconds(timeout)
        self._memory_mb = memory_mb
        self._fork = FORK
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._errors: IO[bytes] | None = None
        self._isolation = ""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the helper; a later program starts a new one."""
        process, self._process = self._process, None
        folder, self._folder = self._folder, None
        errors, self._errors = self._errors, None
        if process is not None:
            _end(process)
        if errors is not None:
            errors.close()
        if folder is not None:
            folder.cleanup()

    @property
    def isolation(self) -> str:
        """Say which protections this platform granted, e.g. `a fork per program; no network; limits on memory, ...`."""
        self._ensure_started()
        return self._isolation

    def call(self, code: str, function: str, argument_lists: Sequence[Sequence[object]]) -> list[CallResult]:
        """Execute `code`, then call `function(*arguments)` for each list; one result for each, in order.

        Arguments and values are JSON values (tuples become lists; True, 1 and 1.0 stay apart; dictionary keys are
        strings): anything else is an error of the call, or `OptionError` in the arguments. If `code` itself fails,
        every call has its error. Calls share the state that `code` left; what came before a timeout or an exit is kept.
        """
        calls = [_plain(list(arguments), f"argument list {index}") for index, arguments in enumerate(argument_lists)]
        reply = self._submit({"code": code, "function": function, "calls": calls})
        loaded, *results = [_parse(frame) for frame in reply.frames] or [CallResult(error=reply.ending)]
        if loaded.error is not None:
            return [loaded] * len(calls)
        missing = CallResult(error=reply.ending)
        return (results + [missing] * len(calls))[: len(calls)]

    def run(self, program: str, timeout: float | None = None) -> RunResult:
        """Run a whole program, e.g. code with its asserts; ok only if it ran to its last line.

        The program's `__name__` is not `__main__`, and leaving early by `sys.exit` or `os._exit` is a failure.
        """
        reply = self._submit({"code": program, "function": "", "calls": []}, timeout)
        error = _parse(reply.frames[0]).error if reply.frames else reply.ending
        return RunResult(error is None, error)

    def passes(self, code: str, function: str, cases: Sequence[tuple[Sequence[object], object]]) -> bool:
        """Tell whether `function(*arguments)` equals the expected value in every case.

        The comparison is made here, on JSON values, and tells True, 1 and 1.0 apart; a tuple equals the same list, and
        NaN equals NaN.
        """
        if not cases:
            raise OptionError("passes() needs at least one case: without one, every program would pass.")
        expected = [_plain(value, f"the expected value of case {index}") for index, (_, value) in enumerate(cases)]
        results = self.call(code, function, [arguments for arguments, _ in cases])
        return all(
            result.error is None and _same(result.value, value) for result, value in zip(results, expected, strict=True)
        )

    # --- the helper -------------------------------------------------------------------------------------------------

    def _submit(self, job: dict[str, object], timeout: float | None = None) -> _Reply:
        seconds = self._timeout if timeout is None else _seconds(timeout)
        job |= {"timeout": seconds, "memory_mb": self._memory_mb}
        for _ in range(2):
            self._ensure_started()  # which probes the helper, so a broken sandbox is not blamed on the program
            reply = self._exchange(job) if self._fork else self._once(job)
            if reply is not None:
                return reply
            self.close()
        return _Reply([], "killed its sandbox", [])

    def _ensure_started(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        if self._folder is not None and not self._fork:
            return
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="trimtab-sandbox-", ignore_cleanup_errors=True)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the sandbox is
        try:
            if self._fork:
                self._process = _launch("serve", self._folder.name, self._errors)
            probe: dict[str, object] = {"code": None, "timeout": GRACE, "memory_mb": self._memory_mb}
            reply = self._exchange(probe) if self._fork else self._once(probe)
            if reply is None or not reply.frames:
                raise SandboxError(f"The sandbox's helper does not answer. {self._complaint(reply)}".strip())
            limits, layers = cast(tuple[list[str], list[str]], json.loads(reply.frames[0]))
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise SandboxError(f"The sandbox could not start {sys.executable!r}: {error}") from error
            raise
        bounds = f"limits on {', '.join(limits) or 'time alone'}"
        self._isolation = "; ".join([*reply.gains, *layers, bounds, "files, processes and sockets refused"])

    def _complaint(self, reply: _Reply | None) -> str:
        """Return the last words of the helper, for an error message."""
        assert self._errors is not None
        self._errors.seek(0)
        words = self._errors.read().decode("utf-8", "replace").strip()
        return f"Its probe {reply.ending}. {words[-500:]}" if reply else words[-500:]

    def _exchange(self, job: dict[str, object]) -> _Reply | None:
        """Send one job to the helper; None when it died or fell silent."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + cast(float, job["timeout"]) + GRACE
        try:
            _write(process.stdin.fileno(), worker.pack(json.dumps(job).encode()), deadline)
            head = _read(process.stdout.fileno(), worker.HEADER.size, deadline)
            body = _read(process.stdout.fileno(), worker.HEADER.unpack(head)[0], deadline) if head else None
        except BrokenPipeError:
            return None
        except BaseException:  # an interrupt: the reply that is still to come would be taken for the next job's
            self.close()
            raise
        return _Reply(**json.loads(body)) if body else None

    def _once(self, job: dict[str, object]) -> _Reply | None:
        """Run one job in a process of its own."""
        assert self._folder is not None
        assert self._errors is not None
        token = secrets.token_bytes(worker.TOKEN_BYTES)
        request = json.dumps({**job, "token": token.hex()}).encode()
        late = False
        process = _launch("once", self._folder.name, self._errors)
        try:
            try:
                output, _ = process.communicate(request, timeout=cast(float, job["timeout"]) + 1.0)  # + start-up
            except subprocess.TimeoutExpired:
                late = True
                process.kill()
                output, _ = process.communicate()
        finally:
            _end(process)
        frames = worker.Frames(token)
        frames.feed(output)
        ending = "wrote to the result channel" if frames.spoiled else "timeout" if late else "exited before its end"
        return _Reply(frames.payloads, ending, ["a process per program"])


def _seconds(timeout: float) -> float:
    if not 0 < timeout < 3600:
        raise OptionError(f"The timeout must be between 0 and 3600 seconds; got {timeout!r}.")
    return timeout


def _launch(mode: str, folder: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    # Not `-I`, which would ignore PYTHONHASHSEED: nothing else of the environment goes in, so `-P -s` isolate as well.
    environment = {"PYTHONHASHSEED": "0"}
    if os.name == "nt":
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    root = str(Path(worker.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-s", "-S", "-B", "-c", START, mode, root],
        bufsize=0 if mode == "serve" else -1,  # 0: requests are written here, by `_write`
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a helper end its program and itself, or kill it; close the pipes."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # half a request was still waiting to be sent
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)  # a helper whose pipe closes kills the group of its program, which is not its own
    with contextlib.suppress(ProcessLookupError):
        if os.name == "posix":
            os.killpg(process.pid, 9)
        process.kill()
    process.wait()


def _write(descriptor: int, data: bytes, deadline: float) -> None:
    """Write all of `data`, or as much as is taken before the deadline."""
    import select

    rest = memoryview(data)
    while rest and select.select([], [descriptor], [], max(0.0, deadline - time.monotonic()))[1]:
        rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]  # so many bytes at once never wait


def _read(descriptor: int, count: int, deadline: float) -> bytes | None:
    """Read exactly `count` bytes; None when the stream ends or the deadline passes first."""
    import select

    parts: list[bytes] = []
    while count:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        part = os.read(descriptor, count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _parse(frame: str) -> CallResult:
    """Read one message of a child, which may have been written by the program itself."""
    try:
        message: object = json.loads(frame)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not message.keys() & {"value", "error"}:  # pyright: ignore[reportUnknownMemberType]
        return CallResult(error="unreadable result")
    fields = cast(dict[str, object], message)
    return CallResult(error=str(fields["error"])) if "error" in fields else CallResult(value=fields["value"])


def _plain(value: object, what: str) -> object:
    try:
        return worker.plain(value)
    except (TypeError, RecursionError) as error:
        raise OptionError(f"Values that go into the sandbox must be JSON values; in {what}: {error}.") from None


def _same(left: object, right: object) -> bool:
    """Compare JSON values and their types; NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list):
        pair = cast(list[object], left), cast(list[object], right)
        return len(pair[0]) == len(pair[1]) and all(map(_same, *pair))
    if isinstance(left, dict):
        first, second = cast(dict[str, object], left), cast(dict[str, object], right)
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return left == right or (left != left and right != right)
