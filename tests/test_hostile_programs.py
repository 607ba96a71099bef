"""Hostile programs: each attack first succeeds outside the sandbox, and then has no effect inside it.

An attack defines `attack()`. What it did is judged by what it returned and by the traces it left at its targets.
Inside, it is run against the whole sandbox, and then with the audit hook off against each kernel layer that should hold
it alone, so that no layer hides that another one is broken. All is harmless: few forks, small files, mild signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trimtab.evals import _sandbox_worker as worker
from trimtab.evals import sandbox as module
from trimtab.evals.sandbox import CallResult, RunResult, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacks and the layers are Linux's")

SOURCE = str(Path(worker.__file__).parents[2])
SECRET = "hunter-2-secret"
NAME = f"trim{os.getpid() % 10**7}"  # one for each worker of the suite; a name has 15 bytes at most
NAMED = f"import ctypes, os\nctypes.CDLL(None).prctl(15, b'{NAME}')\nwhile True: pass"

# --- one layer alone ------------------------------------------------------------------------------------------------

OFF = {  # layer: how to switch it off in the helper, and the words of `isolation` that say it is on
    "hook": ("w.guard = lambda: None", ""),
    "limits": ("k.limit = lambda *_, **__: []", "limits on memory"),
    "namespaces": ("k.isolate = lambda: []", "own process tree"),
    "privileges": ("k.drop_privileges = lambda: k._libc().prctl(38, 1, 0, 0, 0)", ""),
    "landlock": ("k.close_files = lambda _: False", "no files but the library"),
    "seccomp": ("k.filter_calls = lambda: False", "no system calls for processes"),
}


def alone(layer: str) -> str:
    """Return a start command for a helper that has lost every layer but one; every one for `none`."""
    losses = "; ".join(off for name, (off, _) in OFF.items() if name != layer)
    return (
        "import sys; sys.path.insert(0, sys.argv.pop()); from trimtab.evals import _sandbox_worker as w; k = w.kernel; "
        f"del sys.path[0]; {losses}; w.main()"
    )


@pytest.fixture(scope="module")
def boxes() -> Iterator[dict[str, Sandbox]]:
    """Sandboxes by layer, the whole one under `all`, all of them started by their first use."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Sandbox(timeout=4.0)) for name in ("all", "none", *OFF)}


def landlock_version() -> int:
    import ctypes

    return ctypes.CDLL(None).syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), 1)


def ready(boxes: dict[str, Sandbox], layer: str, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Return the sandbox with this layer, started; skips where the platform does not grant it."""
    layer, version = layer.rstrip("0123456789"), int(layer.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
    box = boxes[layer]
    if version > landlock_version():
        pytest.skip(f"this needs version {version} of Landlock; here it is {landlock_version()}")
    if layer == "privileges" and os.geteuid():
        pytest.skip("only root has privileges to lose")
    if layer != "all":
        monkeypatch.setattr(module, "START", alone(layer))
        if layer in OFF and OFF[layer][1] not in box.isolation:
            pytest.skip(f"this platform does not grant {layer}: {box.isolation}")
    assert box.run("x = 1").ok
    return box


# --- targets --------------------------------------------------------------------------------------------------------

VICTIM = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"hit"))
os.write(1, b"ready")
while True: signal.pause()
"""


class Targets:
    """What the attacks aim at: a home with a secret, a folder with a file, listeners, and a process with a handler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret, self.file = folder / "home" / ".token", folder / "file"
        self.secret.parent.mkdir()
        self.secret.write_text(SECRET)
        self.file.write_text("unharmed")
        self.file.chmod(0o644)
        self.fresh = folder / "fresh"
        self.stream = socket.create_server(("127.0.0.1", 0))
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", 0))
        self.local, self.abstract = (socket.socket(socket.AF_UNIX) for _ in range(2))
        self.local.bind(str(folder / "socket"))
        self.abstract.bind(f"\0trimtab-{os.getpid()}-{folder.name}")
        for listener in (self.stream, self.datagrams, self.local, self.abstract):
            listener.setblocking(False)
        self.local.listen()
        self.abstract.listen()
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", VICTIM], stdout=subprocess.PIPE, env={"TOKEN": SECRET}, process_group=0
        )
        assert self.process.stdout is not None
        assert os.read(self.process.stdout.fileno(), 5) == b"ready"
        os.set_blocking(self.process.stdout.fileno(), False)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for listener in (self.stream, self.datagrams, self.local, self.abstract):
            listener.close()

    def aim(self) -> dict[str, object]:
        return {
            "secret": str(self.secret),
            "home": str(self.secret.parent),
            "file": str(self.file),
            "folder": str(self.folder),
            "fresh": str(self.fresh),
            "port": self.stream.getsockname()[1],
            "udp": self.datagrams.getsockname()[1],
            "socket": str(self.folder / "socket"),
            "abstract": self.abstract.getsockname().decode(),
            "pid": self.process.pid,
            "name": NAME,
        }

    def heard(self, listener: socket.socket) -> bool:
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            if listener is self.datagrams:
                return bool(listener.recv(99))
            listener.accept()[0].close()
            return True
        return False

    def hit(self) -> bool:
        time.sleep(0.05)
        assert self.process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            return os.read(self.process.stdout.fileno(), 3) == b"hit"
        return False


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[Targets]:
    aims = Targets(tmp_path)
    yield aims
    aims.close()


def daemons() -> list[int]:
    """Return the processes that carry the daemon's name."""
    return [pid for pid, name, _ in processes() if name == NAME]


def processes() -> Iterator[tuple[int, str, int]]:
    """Yield the pid, name and session of every process that is not a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = stat.read_text().rpartition(") ")
            if tail[0] != "Z":
                yield int(stat.parent.name), head.partition("(")[2], int(tail.split()[3])


def end_daemons() -> bool:
    """Tell whether a daemon is alive, and end it."""
    found = daemons()
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return bool(found)


# --- attacks --------------------------------------------------------------------------------------------------------

Evidence = Callable[[Targets, object], bool]


@dataclass(frozen=True)
class Attack:
    """The body of `attack()`, what shows that it had its effect, and the kernel layers that hold it alone.

    A number after `landlock` is the version that it takes.
    """

    body: str
    evidence: Evidence
    layers: str = ""


def returned(value: object) -> Evidence:
    return lambda _, got: got == value


def at_least(value: int) -> Evidence:
    return lambda _, got: isinstance(got, int) and got >= value


def leaked(_: Targets, got: object) -> bool:
    return SECRET in str(got)


def made(targets: Targets, _: object) -> bool:
    return targets.fresh.exists() or targets.fresh.is_symlink()


def harmed(targets: Targets, _: object) -> bool:
    return targets.file.read_text() != "unharmed"


def hit(targets: Targets, _: object) -> bool:
    return targets.hit()


def heard(name: str) -> Evidence:
    return lambda targets, _: targets.heard(getattr(targets, name))


ATTACKS = {
    # processes
    "forking many times": Attack(
        "pids = []\nfor _ in range(20):\n  pid = os.fork()\n  if not pid: time.sleep(1); os._exit(0)\n"
        "  pids.append(pid)\nreturn len(pids)",
        at_least(1),
        "seccomp",
    ),
    "a subprocess": Attack("import subprocess\nreturn subprocess.call(['/bin/true'])", returned(0), "seccomp landlock"),
    "a subprocess without an audit event": Attack(
        "from multiprocessing import util\nreturn os.waitpid(util.spawnv_passfds(b'/bin/true', [b'true'], ()), 0)[1]",
        returned(0),
        "seccomp landlock",
    ),
    "another program in its place": Attack("os.execv('/bin/sh', ['sh', '-c', 'echo > ' + AIM['fresh']])", made),
    "a daemon that leaves its session": Attack(
        "if os.fork(): time.sleep(0.3); return 'forked'\nos.setsid()\nif os.fork(): os._exit(0)\n"
        "try: import ctypes; ctypes.CDLL(None).prctl(15, AIM['name'].encode())\nexcept ImportError: pass\n"
        "os.closerange(0, 3); time.sleep(9); os._exit(0)",
        lambda _, got: end_daemons(),
        "seccomp namespaces",
    ),
    "a signal": Attack("os.kill(AIM['pid'], 10)", hit, "seccomp namespaces landlock6"),
    "a signal to a group": Attack("os.killpg(AIM['pid'], 10)", hit, "seccomp namespaces landlock6"),
    "a signal without an audit event": Attack(
        "import signal\nsignal.pidfd_send_signal(os.pidfd_open(AIM['pid']), 10)", hit, "seccomp namespaces"
    ),
    "making another process slow": Attack(
        "os.setpriority(os.PRIO_PROCESS, AIM['pid'], 19)",
        lambda targets, _: os.getpriority(os.PRIO_PROCESS, targets.process.pid) == 19,
        "seccomp namespaces privileges",
    ),
    "taking another process's descriptors": Attack(
        "import resource\nresource.prlimit(AIM['pid'], resource.RLIMIT_NOFILE, (9, 9))",
        lambda targets, _: "Max open files            9 " in Path(f"/proc/{targets.process.pid}/limits").read_text(),
        "seccomp namespaces",
    ),
    "tracing another process": Attack(
        "import ctypes\nreturn ctypes.CDLL(None).ptrace(0x4206, AIM['pid'], None, None)",  # PTRACE_SEIZE
        returned(0),
        "seccomp namespaces privileges",
    ),
    "foreign memory": Attack("import ctypes\nreturn ctypes.string_at(b'abc').decode()", returned("abc")),
    # reading
    "the secret of a home": Attack("return open(AIM['secret']).read()", leaked, "landlock"),
    "a descriptor to the secret": Attack("return os.read(os.open(AIM['secret'], 0), 99).decode()", leaked, "landlock"),
    "the names in a home": Attack(
        "return [*os.listdir(AIM['home']), *(e.name for e in os.scandir(AIM['home']))]",
        lambda _, got: ".token" in str(got),
        "landlock",
    ),
    "the users of the machine": Attack(
        "return open('/etc/passwd').read()", lambda _, got: "root" in str(got), "landlock"
    ),
    "the environment of another process": Attack(
        "return open(f\"/proc/{AIM['pid']}/environ\").read()", leaked, "landlock privileges"
    ),
    "its own environment": Attack("return dict(os.environ)", leaked),
    "a link that lies there": Attack("return open(AIM['link']).read()", leaked, "landlock"),
    # the network
    "a connection": Attack(
        "import socket\nsocket.create_connection(('127.0.0.1', AIM['port']), 2).close()",
        heard("stream"),
        "seccomp namespaces landlock4",
    ),
    "a datagram": Attack(
        "import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', AIM['udp']))",
        heard("datagrams"),
        "seccomp namespaces",
    ),
    "a local socket": Attack("import socket\nsocket.socket(1).connect(AIM['socket'])", heard("local"), "seccomp"),
    "an abstract socket": Attack(
        "import socket\nsocket.socket(1).connect(AIM['abstract'])", heard("abstract"), "seccomp namespaces landlock6"
    ),
    "a name": Attack(
        "import socket\nreturn [a[4][0] for a in socket.getaddrinfo('localhost', 80)]",
        lambda _, got: "127.0.0.1" in str(got) or "::1" in str(got),
    ),
    # writing
    "overwriting": Attack("with open(AIM['file'], 'w') as f: f.write('harmed')", harmed, "namespaces landlock"),
    "truncating": Attack("os.truncate(AIM['file'], 0)", harmed, "namespaces landlock seccomp"),
    "deleting": Attack("os.remove(AIM['file'])", lambda t, _: not t.file.exists(), "namespaces landlock seccomp"),
    "a link to write through": Attack(
        "os.symlink(AIM['file'], AIM['fresh'])\nwith open(AIM['fresh'], 'w') as f: f.write('harmed')",
        lambda t, got: harmed(t, got) or made(t, got),
        "namespaces landlock seccomp",
    ),
    "a hard link": Attack("os.link(AIM['file'], AIM['fresh'])", made, "namespaces landlock seccomp"),
    "one huge file": Attack(
        "with open(AIM['fresh'], 'wb') as f: f.write(bytes(1 << 20))",
        lambda targets, _: made(targets, _) and targets.fresh.stat().st_size > 0,
        "namespaces landlock limits",
    ),
    "many small files": Attack(
        "for i in range(99): open(f\"{AIM['fresh']}{i}\", 'w').close()",
        lambda targets, _: any(targets.folder.glob("fresh*")),
        "namespaces landlock",
    ),
    "a pipe with a name": Attack("os.mkfifo(AIM['fresh'])", made, "namespaces landlock seccomp"),
    "changing permissions": Attack(
        "os.chmod(AIM['file'], 0o600)",
        lambda targets, _: targets.file.stat().st_mode & 0o777 == 0o600,
        "namespaces seccomp",
    ),
    "changing times": Attack(
        "os.utime(AIM['file'], (1, 1))", lambda targets, _: targets.file.stat().st_mtime == 1, "namespaces seccomp"
    ),
    "shared memory that stays": Attack(
        "import _posixshmem\nos.close(_posixshmem.shm_open('/' + AIM['name'], os.O_CREAT | os.O_RDWR, 0o600))",
        lambda *_: _taken_away(Path("/dev/shm") / NAME),
        "namespaces landlock",
    ),
    "at the exit": Attack("import atexit\natexit.register(lambda: open(AIM['fresh'], 'w'))", made),
    "in a destructor": Attack(
        "class D:\n  def __del__(self, open=open): open(AIM['fresh'], 'w').close()\nglobal d\nd = D()",
        made,
    ),
    # memory
    "much memory": Attack("return len([bytearray(64 << 20) for _ in range(5)])", returned(5), "limits"),
    "a map of memory": Attack("import mmap\nreturn len(mmap.mmap(-1, 320 << 20))", at_least(320 << 20), "limits"),
    "a file in memory": Attack(
        "fd = os.memfd_create('x')\nreturn os.write(fd, bytes(1 << 20))", at_least(1), "limits seccomp"
    ),
    "a bomb of zeros": Attack(
        "import zlib\nsqueeze = zlib.compressobj(1, wbits=-15)\n"
        "piece = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)\n"  # repeated: quick
        "return len(zlib.decompress(piece * 300 + squeeze.flush(), wbits=-15))",
        returned(300 << 20),
        "limits",
    ),
    # the sandbox itself
    "patching the harness": Attack(
        "import trimtab.evals._sandbox_worker as w\nw.pack = None\nreturn 'patched'", returned("patched")
    ),
}


def _taken_away(path: Path) -> bool:
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def program(attack: Attack, targets: Targets, link: str) -> str:
    body = "\n".join("  " + line for line in attack.body.splitlines())
    return f"import os, sys, time\nAIM = {targets.aim() | {'link': link}!r}\ndef attack():\n{body}\n"


def strike_outside(code: str) -> object:
    """Run the attack in an ordinary process; returns its value, None where it left without one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + "import json\nprint(json.dumps(attack()), flush=True)"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": SOURCE, "TOKEN": SECRET},
    )
    assert not done.stderr, done.stderr
    return json.loads(done.stdout or "null")


def skip_unprivileged_tracing(name: str) -> None:
    if name == "tracing another process" and os.geteuid():
        pytest.skip("Yama may keep users from tracing")


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_succeeds_outside(targets: Targets, name: str) -> None:
    skip_unprivileged_tracing(name)
    link = targets.folder / "link"
    link.symlink_to(targets.secret)
    attack = ATTACKS[name]
    assert not attack.evidence(targets, None)
    assert attack.evidence(targets, strike_outside(program(attack, targets, str(link))))


def strike_inside(box: Sandbox, targets: Targets, attack: Attack) -> CallResult:
    """Run the attack in the sandbox, in whose folder a link points to the secret."""
    assert box._folder is not None
    link = Path(box._folder.name) / "link"
    link.symlink_to(targets.secret)
    (result,) = box.call(program(attack, targets, "link"), "attack", [[]])
    link.unlink()
    return result


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.layers])
def test_attack_succeeds_in_a_sandbox_without_layers(
    boxes: dict[str, Sandbox], targets: Targets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unprivileged_tracing(name)
    result = strike_inside(ready(boxes, "none", monkeypatch), targets, ATTACKS[name])
    assert ATTACKS[name].evidence(targets, result.value), result


CASES = [
    pytest.param(name, layer, id=f"{name}-{layer}")
    for name, attack in ATTACKS.items()
    for layer in ("all", *attack.layers.split())
]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_attack_has_no_effect_inside(
    boxes: dict[str, Sandbox], targets: Targets, name: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    box = ready(boxes, layer, monkeypatch)
    result = strike_inside(box, targets, ATTACKS[name])
    assert not ATTACKS[name].evidence(targets, result.value), result
    assert targets.process.poll() is None
    assert not daemons()
    assert box.call("def f(): return 7", "f", [[]]) == [CallResult(7)]


# --- floods, hangs and crashes --------------------------------------------------------------------------------------


def test_endless_output_goes_nowhere(boxes: dict[str, Sandbox], capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os\nfor _ in range({}):\n  for fd in (1, 2): os.write(fd, b'x' * 10_000)\n"
    done = subprocess.run([sys.executable, "-c", code.format(50)], capture_output=True)
    assert len(done.stdout) == len(done.stderr) == 500_000
    box = boxes["all"]
    assert box.run(code.format(10**9), timeout=0.5) == RunResult(False, "timeout")
    assert capfd.readouterr() == ("", "")
    assert box._errors is not None
    assert box._errors.seek(0, os.SEEK_END) == 0


def test_a_flood_in_the_result_channel_is_cut_off(boxes: dict[str, Sandbox]) -> None:
    code = (
        "import os\nwhile True:\n  for fd in range(3, 64):\n    try: os.write(fd, b'x' * 65536)\n"
        "    except OSError: pass\n"
    )
    source, channel = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[channel]) as process:
        os.close(channel)
        taken = sum(len(os.read(source, 1 << 16)) for _ in range(64))
        process.kill()
    os.close(source)
    assert taken > 1 << 18
    started = time.monotonic()
    assert boxes["all"].run(code) == RunResult(False, "wrote to the result channel")
    assert time.monotonic() - started < 3  # at the first bytes, and not at the timeout
    assert boxes["all"].run("x = 1").ok


# What each program does within a second to an ordinary process that runs it (its return code, None: it is still there),
# and how it ends in the sandbox. One that closes its result channel may be killed before it leaves by itself.
KILLED = "killed by signal 9"
ENDINGS = {
    "threads that spin": (
        "import threading\ndef spin():\n  while True: pass\n"
        "for _ in range(4): threading.Thread(target=spin, daemon=True).start()\nspin()",
        None,
        "timeout",
    ),
    "deaf to signals": (
        "import os, signal\nfor n in (1, 2, 3, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\n"
        "signal.raise_signal(15); signal.alarm(1)\nwhile True: pass",
        None,
        "timeout",
    ),
    "closing every descriptor": ("import os\nos.closerange(0, 256)\nos._exit(3)", 3, ("exited before its end", KILLED)),
    "the stack of C": (
        "import sys\nsys.setrecursionlimit(10**8)\n"
        "class A:\n  def __getattr__(self, name): return getattr(self, name + 'x'[:0])\nA().b",
        -signal.SIGSEGV,
        "killed by signal 11",
    ),
    "a signal to its group": ("import ctypes\nctypes.CDLL(None).kill(0, 9)", -signal.SIGKILL, "ImportError"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_hangs_and_crashes_end_with_their_program(boxes: dict[str, Sandbox], name: str) -> None:
    code, status, error = ENDINGS[name]
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.5 if status is None else 30)
        assert process.poll() == status
        process.kill()
    box = boxes["all"]
    started = time.monotonic()
    result = box.run(code, timeout=1.0 if error == "timeout" else 20.0)
    assert (result.error or "").startswith(error)
    assert time.monotonic() - started < 15
    assert box.run("x = 1").ok


@pytest.mark.parametrize("layer", ["none", "namespaces"])
def test_a_program_is_a_process_group_of_its_own(
    boxes: dict[str, Sandbox], layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = ready(boxes, layer, monkeypatch)
    helper = box._process
    assert box.run("import os\nos.kill(0, 9)") == RunResult(False, KILLED)
    assert box._process is helper
    assert box.run("x = 1").ok
    # without namespaces, what it forked dies with its group when its time is over
    assert box.run("import os\nos.fork()\n" + NAMED, timeout=0.7) == RunResult(False, "timeout")
    assert wait_until(lambda: not daemons(), 2.0)


# --- no orphans -----------------------------------------------------------------------------------------------------

OWNER = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite that runs in the background has not
from trimtab.evals import sandbox as module
module.START = sys.argv[1]
box = module.Sandbox(timeout=60)
print(box.isolation and box._process.pid, flush=True)
if sys.argv[2] == "forked" and not os.fork():
    threading.Event().wait(30)  # holds the helper's pipes open
box.run(sys.argv[3])
"""


def session(leader: int) -> list[int]:
    """Return the processes of a session: the helper's own is never left by what it starts."""
    return [pid for pid, _, its in processes() if its == leader]


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("layer", ["limits", "namespaces"])
@pytest.mark.parametrize("ending", ["kill", "interrupt", "forked"])
def test_no_program_outlives_the_process_that_wants_its_answer(ending: str, layer: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", OWNER, alone(layer), ending, NAMED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": SOURCE},
        process_group=0,
    )
    assert owner.stdout is not None
    helper = int(owner.stdout.readline())
    try:
        assert wait_until(lambda: bool(daemons()))
        assert set(daemons()) <= set(session(helper))
        os.kill(owner.pid, signal.SIGINT if ending == "interrupt" else signal.SIGKILL)
        owner.wait(20)
        assert wait_until(lambda: not session(helper))
        assert not daemons()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(owner.pid, signal.SIGKILL)
        owner.stdout.close()
        for pid in session(helper):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_closing_in_the_middle_of_a_program_ends_it(boxes: dict[str, Sandbox], monkeypatch: pytest.MonkeyPatch) -> None:
    box = ready(boxes, "limits", monkeypatch)
    assert box._process is not None
    helper = box._process.pid
    job = {"code": "while True: pass", "function": "", "calls": [], "timeout": 30.0, "memory_mb": 256}
    module._write(box._process.stdin.fileno(), worker.pack(json.dumps(job).encode()), time.monotonic() + 9)
    assert wait_until(lambda: len(session(helper)) == 2)
    box.close()
    assert not session(helper)
