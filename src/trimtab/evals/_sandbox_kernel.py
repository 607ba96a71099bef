"""What the kernel itself enforces on a sandboxed program: namespaces, limits, Landlock, a filter of system calls.

Each layer is optional and says whether the platform granted it. Standard library only: this runs in the helper.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Any

NO_NETWORK, READ_ONLY, OWN_TREE = "no network", "read-only files", "own process tree"
NAMESPACES = ((0x40000000, NO_NETWORK), (0x00020000, READ_ONLY), (0x20000000, OWN_TREE))
"""Flags of unshare(2), and what each namespace gives."""

LOADER = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
"""Where the libraries lie that extension modules of the standard library are linked with."""

# Landlock, https://docs.kernel.org/userspace-api/landlock.html: the rights over files that each version knows, as bits,
# and how many bytes of its attributes. Network rights come with version 4, signals and abstract sockets with version 6.
LANDLOCK = {1: (13, 8), 2: (14, 8), 3: (15, 8), 4: (15, 16), 5: (16, 16), 6: (16, 24)}
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS, AUDIT_ARCH

# System calls by number on x86_64 and aarch64 (- where it has none). What Landlock or namespaces cover is here as well:
# either may be missing.
CALLS = """
    fork 57 -            vfork 58 -             execve 59 221          execveat 322 281       setsid 112 157
    setpgid 109 154      tkill 200 130          rt_sigqueueinfo 129 138 rt_tgsigqueueinfo 297 240
    pidfd_open 434 434   pidfd_getfd 438 438    pidfd_send_signal 424 424
    ptrace 101 117       process_vm_readv 310 270  process_vm_writev 311 271  kcmp 312 272  userfaultfd 323 282
    socket 41 198        socketpair 53 199      io_uring_setup 425 425 perf_event_open 298 241 bpf 321 280
    mount 165 40         umount2 166 39         pivot_root 155 41      chroot 161 51          unshare 272 97
    setns 308 268        open_tree 428 428      move_mount 429 429     fsopen 430 430         fsmount 432 432
    mount_setattr 442 442
    add_key 248 217      request_key 249 218    keyctl 250 219         memfd_create 319 279
    shmget 29 194        msgget 68 186          semget 64 190          mq_open 240 180
    setpriority 141 140  ioprio_set 251 30      sched_setaffinity 203 122 sched_setscheduler 144 119
    sched_setparam 142 118
    mknod 133 -          mknodat 259 33         mkdir 83 -             mkdirat 258 34         rmdir 84 -
    link 86 -            linkat 265 37          symlink 88 -           symlinkat 266 36       creat 85 -
    unlink 87 -          unlinkat 263 35        rename 82 -            renameat 264 38        renameat2 316 276
    chmod 90 -           fchmod 91 52           fchmodat 268 53        fchmodat2 452 452
    chown 92 -           lchown 94 -            fchown 93 55           fchownat 260 54
    truncate 76 45       ftruncate 77 46        fallocate 285 47
    utime 132 -          utimes 235 -           futimesat 261 -        utimensat 280 88
    setxattr 188 5       lsetxattr 189 6        fsetxattr 190 7
    removexattr 197 14   lremovexattr 198 15    fremovexattr 199 16
"""
OWN = "kill 62 129  tgkill 234 131"  # their first argument must be this process
OWN_OR_ZERO = "prlimit64 302 261"
CLONE, CLONE3 = "clone 56 220", "clone3 435 435"

EPERM, ENOSYS = 1, 38


# --- limits and privileges ------------------------------------------------------------------------------------------


def limit(memory_mb: int, seconds: float, *, threads: bool) -> list[str]:
    """Lower this process's limits for good; returns those that the platform granted.

    Without `threads` it can start neither processes nor threads, which this limit cannot tell apart.
    """
    try:
        import resource
    except ImportError:  # Windows
        return []
    # The wall clock, which allows a second for the start of a process, comes first; this is for a child that escapes.
    cpu = math.ceil(seconds) + 3
    wanted = (
        ("memory", "RLIMIT_AS", memory_mb << 20),
        ("cpu time", "RLIMIT_CPU", cpu),
        ("file size", "RLIMIT_FSIZE", 0),
        ("processes", "RLIMIT_NPROC", 0),  # to which Linux does not hold root
        ("descriptors", "RLIMIT_NOFILE", 32),
        ("core dumps", "RLIMIT_CORE", 0),
    )
    granted: list[str] = []
    for name, constant, value in wanted:
        if name == "processes" and threads:
            continue
        with contextlib.suppress(AttributeError, ValueError, OSError):  # what macOS and others do not offer
            resource.setrlimit(getattr(resource, constant), (value, value))
            granted.append(name)
    return granted


def drop_privileges() -> None:
    """Give up Linux capabilities, which root and the owner of a fresh user namespace have."""
    if sys.platform == "linux":
        libc = _libc()
        with contextlib.suppress(AttributeError):
            import ctypes

            libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
            libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that forked it ends, whatever ended that."""
    if sys.platform == "linux":
        _libc().prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG


# --- namespaces -----------------------------------------------------------------------------------------------------


def isolate() -> list[str]:
    """Move this process into namespaces of its own, as far as the kernel allows; returns what that gives."""
    if sys.platform != "linux":
        return []
    libc = _libc()
    if libc.unshare(NAMESPACES[0][0]) != 0:  # not privileged: a user namespace may lend the right
        libc.unshare(0x10000000)
    granted = [gain for flag, gain in NAMESPACES if libc.unshare(flag) == 0]
    if READ_ONLY in granted and not _freeze_files(libc):
        granted.remove(READ_ONLY)
    if OWN_TREE in granted:
        first = os.fork()  # the first child is process 1 of the new tree: when it ends, so do all others
        if first:
            os.waitpid(first, 0)
            os._exit(0)
        die_with_parent()
    return granted


def _freeze_files(libc: Any) -> bool:
    import ctypes

    private, recursive, read_only = 1 << 18, 0x8000, (ctypes.c_uint64 * 4)(1, 0, 0, 0)
    libc.mount(None, b"/", None, ctypes.c_ulong(private | 1 << 14), None)
    mount_setattr = 442  # the same number on every architecture; Linux 5.12
    return libc.syscall(ctypes.c_long(mount_setattr), -100, b"/", recursive, read_only, ctypes.c_size_t(32)) == 0


# --- Landlock -------------------------------------------------------------------------------------------------------


def close_files(readable: Iterable[str]) -> bool:
    """Close the file system to this process for good, but for reading `readable`, the loader's folders and /dev/null.

    Needs `drop_privileges` first. Says whether the kernel has Landlock (Linux 5.13, and not switched off).
    """
    if sys.platform != "linux":
        return False
    import ctypes

    libc = _libc()
    create, add, restrict = 444, 445, 446  # the same numbers on every architecture
    version = libc.syscall(ctypes.c_long(create), None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights, size = LANDLOCK[min(version, max(LANDLOCK))]
    handled = struct.pack("<QQQ", (1 << rights) - 1, 0b11, 0b11)[:size]
    ruleset = libc.syscall(ctypes.c_long(create), handled, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    rules = [(path, EXECUTE | READ_FILE | READ_DIR) for path in (*readable, *LOADER)]
    for path, allowed in (*rules, (os.getcwd(), READ_DIR), (os.devnull, READ_FILE | WRITE_FILE)):
        with contextlib.suppress(OSError):  # not there, so nothing to allow
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                allowed &= ~READ_DIR  # which a file cannot have
            libc.syscall(ctypes.c_long(add), ruleset, 1, struct.pack("<Qi", allowed, place), 0)
            os.close(place)
    done = libc.syscall(ctypes.c_long(restrict), ruleset, 0) == 0
    os.close(ruleset)
    return done


# --- system calls ---------------------------------------------------------------------------------------------------


def filter_calls() -> bool:
    """Refuse for good the system calls that start processes, reach others, open sockets or change files.

    Threads may be started, and this process may signal itself. Needs `drop_privileges` first. Says whether the kernel
    has seccomp and the architecture is one whose calls are known here.
    """
    if sys.platform != "linux" or os.uname().machine not in ARCHITECTURES:
        return False
    import ctypes

    program = b"".join(_filter(os.uname().machine, os.getpid()))
    code = ctypes.create_string_buffer(program)
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    return _libc().prctl(22, 2, fprog, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _filter(machine: str, pid: int) -> Iterator[bytes]:
    """Yield the instructions of the filter, in classic BPF over `struct seccomp_data`; see seccomp(2)."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, any_bit, at_least, give = 0x20, 0x15, 0x45, 0x35, 0x06
    number_at, architecture_at, argument_at = 0, 4, 16  # the low half of the first argument
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | EPERM, 0x00050000 | ENOSYS

    def step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    yield step(load, architecture_at)
    yield step(equal, architecture, 1, 0)
    yield step(give, kill)  # a call in the manner of another architecture, with numbers of its own
    yield step(load, number_at)
    yield step(at_least, 0x40000000, 0, 1)  # x32
    yield step(give, refuse)
    for call in _numbers(CALLS, column):
        yield step(equal, call, 0, 1)
        yield step(give, refuse)
    for call in _numbers(CLONE3, column):  # its flags lie in memory; the C library then falls back on `clone`
        yield step(equal, call, 0, 1)
        yield step(give, unknown)
    for call in _numbers(CLONE, column):
        yield step(equal, call, 0, 4)
        yield step(load, argument_at)
        yield step(any_bit, 0x00010000, 1, 0)  # CLONE_THREAD
        yield step(give, refuse)
        yield step(give, allow)
    for calls, others in ((OWN, pid), (OWN_OR_ZERO, 0)):
        for call in _numbers(calls, column):
            yield step(equal, call, 0, 5)
            yield step(load, argument_at)
            yield step(equal, pid, 2, 0)
            yield step(equal, others, 1, 0)
            yield step(give, refuse)
            yield step(give, allow)
    yield step(give, allow)


def _numbers(calls: str, column: int) -> list[int]:
    words = calls.split()
    return [int(number) for number in words[1 + column :: 3] if number != "-"]


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)
