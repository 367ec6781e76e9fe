"""Runs a program that a model wrote and tells whether it came to its end.

Nobody has read the program, so it gets as little as possible: a process of its own with an empty environment,
limits on processor time and memory, an end by the clock, no way to put a byte into a file, and a filter of
system calls that refuses new processes, sockets and signals to others. Where the kernel allows user
namespaces (`isolation` tells), it also has a network of its own, which is empty, a process tree of its own,
which dies with its first process, and sees every file system read-only. That bounds accidents and ordinary
malice, not attacks on the kernel: for models that you distrust, put the whole evaluation into a virtual
machine. Linux on x86-64 and arm64.
"""

import contextlib
import ctypes
import errno
import functools
import os
import platform
import resource
import secrets
import signal
import subprocess
import sys
from pathlib import Path

SECONDS = 5.0  # on the clock, interpreter's start included
MEMORY = 1 << 30  # bytes of address space
NAMESPACES = "unshare --user --map-root-user --net --pid --mount --ipc --fork --kill-child=KILL --".split()


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program runs to its last line within its limits."""
    return run(program, seconds, isolation())


@functools.cache
def isolation() -> str:
    """What this machine can give: "namespaces" and filter, "filter" alone, or "none", and nothing is run."""
    return next((how for how in ("namespaces", "filter") if run("", 10.0, how)), "none")


def run(program: str, seconds: float, how: str) -> bool:
    """One program. The sign that it came to its end is a secret written to a pipe after its last line: an
    exit code of 0 it could have from anywhere."""
    secret = secrets.token_hex(16)
    reader, writer = os.pipe()
    ending = f"\nimport os\nos.write({writer}, b'{secret}')\n"
    command = [sys.executable, "-I", str(Path(__file__).resolve()), how, str(int(seconds) + 1)]
    try:
        process = subprocess.Popen(
            [*NAMESPACES, *command] if how == "namespaces" else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            pass_fds=(writer,),
            start_new_session=True,
        )
    except FileNotFoundError:  # no `unshare` here
        os.close(reader)
        os.close(writer)
        return False
    os.close(writer)
    try:
        process.communicate((program + ending).encode("utf-8", "replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started may still be there
        process.wait()
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 64) == secret.encode()
    except BlockingIOError:  # empty, and something still holds the other end
        return False
    finally:
        os.close(reader)


# ---------------------------------------------------------------- in the new process, before the program


def confine(how: str, seconds: int) -> None:
    """Give up what the program shall not have, and become the interpreter that reads it from stdin."""
    if how == "namespaces":
        read_only()
    limits = {"CPU": seconds, "AS": MEMORY, "FSIZE": 0, "NOFILE": 64, "CORE": 0}  # FSIZE: but for pipes
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    give_up_powers()
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-"], {"OMP_NUM_THREADS": "1"})


class MountAttributes(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def read_only() -> None:
    """Every file system, those mounted below / included."""
    mount_setattr, here, recursive, readonly = 442, -100, 0x8000, 1
    attributes = MountAttributes(set=readonly)
    arguments = (mount_setattr, here, b"/", recursive, ctypes.byref(attributes), ctypes.sizeof(attributes))
    check(ctypes.CDLL(None, use_errno=True).syscall(*arguments), "mount_setattr")


def check(result: int, call: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{call} refused")


# System calls by number: what starts processes, opens sockets, signals others, changes files. Threads are
# made by clone with CLONE_THREAD and stay allowed; clone3 and openat2 hide their flags behind a pointer, so
# they do not exist for the program, and the C library falls back to clone and openat.
CALLS = {
    "x86_64": dict(
        arch=0xC000003E, clone=56, openat=257, open=2, fork=57, vfork=58, socket=41, kill=62, tkill=200,
        sigqueue=129, ptrace=101, creat=85, truncate=76, rename=82, rmdir=84, unlink=87, unlinkat=263,
        renameat=264, renameat2=316,
    ),
    "aarch64": dict(
        arch=0xC00000B7, clone=220, openat=56, socket=198, kill=129, tkill=130, sigqueue=138, ptrace=117,
        truncate=45, unlinkat=35, renameat=38, renameat2=276,
    ),
}  # fmt: skip
EVERYWHERE = dict(clone3=435, openat2=437, pidfd_signal=424, io_uring=425)
CLONE_THREAD = 0x10000
WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000


class Instruction(ctypes.Structure):
    """struct sock_filter: a jump goes `yes` or `no` instructions ahead."""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("first", ctypes.POINTER(Instruction))]


def call_filter() -> list[tuple[int, int, int, int]]:
    """The filter as BPF, (code, yes, no, k), over seccomp_data {number, architecture, address, arguments}."""
    calls = {**CALLS[platform.machine()], **EVERYWHERE}
    arch, flagged = calls.pop("arch"), {name: calls.pop(name) for name in ("clone", "openat")}
    refuse, unknown = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    lines += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, refuse)]  # x32, the same calls by other numbers
    for name, number in calls.items():
        verdict = unknown if name in ("clone3", "open", "openat2") else refuse
        lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, verdict)]
    # Arguments of 8 bytes begin at 16, and a jump of 0, 1 or 2 ends at one of the two verdicts.
    lines += [(EQUAL, 0, 4, flagged["clone"]), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD)]
    lines += [(RETURN, 0, 0, refuse), (RETURN, 0, 0, ALLOW)]
    lines += [(EQUAL, 0, 3, flagged["openat"]), (LOAD, 0, 0, 16 + 2 * 8), (ANY_BIT, 0, 1, WRITING)]
    return [*lines, (RETURN, 0, 0, refuse), (RETURN, 0, 0, ALLOW)]


def give_up_powers() -> None:
    """No capability survives the exec (root inside the namespace could undo all this), and the filter is
    on."""
    drop_capability, no_new_privileges, set_filter, by_program = 24, 38, 22, 2
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(drop_capability, capability, 0, 0, 0)  # an error where there is none of this number
    check(libc.prctl(no_new_privileges, 1, 0, 0, 0), "no_new_privs")
    lines = call_filter()
    program = Program(len(lines), (Instruction * len(lines))(*lines))
    check(libc.prctl(set_filter, by_program, ctypes.byref(program), 0, 0), "seccomp")


if __name__ == "__main__":
    confine(sys.argv[1], int(sys.argv[2]))
