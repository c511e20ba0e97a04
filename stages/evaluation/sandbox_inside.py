"""Stages - the inside of the sandbox: namespaces, root directory, limits and filter, then the program and its verdict.

A script of its own, run by `python -I -S`, so it imports the standard library alone. Linux 5.12 or later
(mount_setattr), x86-64 or arm64 (the filter's numbers of system calls). sandbox.py says what the processes are.

stdin: 16 digits, the length of the request; the request as JSON; the test to the end of the file, which is read after
the fork, so that the program's process never holds it. stdout: READY, then one line with the verdict.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import resource
import socket
import struct
import sys
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

MEMORY, PROCESSES, FILE_SIZE, DISK = 1 << 30, 4, 1 << 20, "16m"
"""Address space of a process, processes of a program, bytes of a file, size of /tmp."""
READY = b"+"
"""Written by the sandbox when the program is about to start."""
NOBODY = 65534
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 38, 9
CAPABILITY_VERSION_3 = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 22, 2
KEYCTL_JOIN_SESSION_KEYRING = 1
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
"""The only families of sockets: the network namespace does not hold AF_VSOCK, and AF_ALG is the kernel's own code."""
IO_URING = (425, 426, 427)
DENIED = {
    "x86_64": (
        0xC000003E,
        41,  # socket
        250,  # keyctl
        # System V memory, semaphores, messages; ptrace and the memory of other processes; keys; namespaces and mounts;
        # modules, other kernels, tracing, userfaultfd, files by handle, other processes' descriptors.
        (29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71, 101, 310, 311, 312, 248, 249, 250, 272, 308, 165, 166, 155),
        (175, 176, 313, 246, 320, 298, 321, 323, 303, 304, 438, 103, 163, 167, 168, 442, 428, 429, 430, 431, 432, 433),
    ),
    "aarch64": (
        0xC00000B7,
        198,
        219,
        (
            194,
            195,
            196,
            197,
            190,
            191,
            192,
            193,
            186,
            187,
            188,
            189,
            117,
            270,
            271,
            272,
            217,
            218,
            219,
            97,
            268,
            40,
            39,
        ),
        (
            41,
            105,
            106,
            273,
            104,
            294,
            241,
            280,
            282,
            264,
            265,
            438,
            116,
            89,
            224,
            225,
            442,
            428,
            429,
            430,
            431,
            432,
            433,
        ),
    ),
}
"""By machine: its name for the kernel's audit, the numbers of socket and keyctl, and the calls that a program may not
make."""
X32 = 0x40000000
"""Bit of the numbers of a second table of calls, which the filter does not know."""


def main() -> NoReturn:
    """Set the sandbox up as the request on stdin says, run the program, write the verdict on stdout."""
    verdict = _sibling("sandbox_verdict")
    # The program gets no descriptor but the null device and the one it answers on; the verdict goes to `out`.
    asked, out, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    request = json.loads(_read(asked, int(_read(asked, 16))))
    try:
        if request["sandboxed"]:
            _enter_namespaces()
            if child := os.fork():
                os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            _build_root([*SYSTEM, *request["roots"]])
            _give_up_rights()
        _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process of the same user reads or writes the judging one
        if request["sandboxed"]:
            _filter_calls()
    except OSError as error:
        os.write(out, f"{error.filename or error.strerror} ({os.strerror(error.errno or 0)})".encode())
        os._exit(1)
    sys.path += request["path"]
    ours, theirs = socket.socketpair()
    os.write(out, READY)
    if not os.fork():
        for descriptor in (asked, out, ours.detach()):
            os.close(descriptor)
        _limit(request["seconds"], PROCESSES)
        verdict.answer(request["program"], theirs)
    theirs.close()
    _limit(request["seconds"], None)
    line = verdict.judge(_read(asked, 1 << 24).decode(), ours)
    os.write(out, line.encode(errors="replace")[:200] + b"\n")
    os._exit(0)


def _enter_namespaces() -> None:
    """Move this process into new namespaces, as an unprivileged user of them.

    A helper that stays outside writes the user maps, which this process may not.
    """
    uid, gid, pid = os.geteuid(), os.getegid(), os.getpid()
    reading, writing = os.pipe()
    if not (helper := os.fork()):
        os.close(writing)
        if not os.read(reading, 1):
            os._exit(1)
        # The kernel never limits root's processes, so root gets a second user to become.
        with suppress(OSError):
            if uid == 0:
                _write_maps(pid, f"0 0 1\n{NOBODY} {NOBODY} 1", f"0 0 1\n{NOBODY} {NOBODY} 1")
                os._exit(0)
        with suppress(OSError):
            Path(f"/proc/{pid}/setgroups").write_text("deny")
            _write_maps(pid, f"{NOBODY} {uid} 1", f"{NOBODY} {gid} 1")
            os._exit(0)
        os._exit(1)
    os.close(reading)
    try:
        _call("unshare", NAMESPACES)
        os.write(writing, b"x")
    finally:
        os.close(writing)
        refused = os.waitpid(helper, 0)[1]
    if refused:
        raise OSError(1, "no user of its own")


def _write_maps(pid: int, users: str, groups: str) -> None:
    Path(f"/proc/{pid}/uid_map").write_text(users)
    Path(f"/proc/{pid}/gid_map").write_text(groups)


def _build_root(visible: list[str]) -> None:
    """Make the working directory the root directory: the visible paths, read-only, and an empty /tmp."""
    root = os.getcwd()
    _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID, f"size={DISK},nr_inodes=4096,mode=755".encode())
    os.chdir(root)
    # Before the visible paths: the interpreter itself may lie below /tmp.
    os.mkdir("tmp")
    _call("mount", b"tmpfs", b"tmp", b"tmpfs", MS_NOSUID | MS_NODEV, f"size={DISK},nr_inodes=4096,mode=1777".encode())
    bound: list[str] = []
    for path in sorted(set(visible)):
        if not os.path.exists(path) or path == "/" or any(path.startswith(other + "/") for other in bound):
            continue
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _call("mount", path.encode(), target.encode(), None, MS_BIND | MS_REC, None)
        bound.append(path)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    writable = (ctypes.c_uint64 * 4)(0, MOUNT_ATTR_RDONLY, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, f"{root}/tmp".encode(), 0, writable, ctypes.sizeof(writable))
    os.chroot(root)
    os.chdir("/tmp")


def _give_up_rights() -> None:
    """Become nobody, without any capability, and die with the parent."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # last, because a change of user clears it


def _limit(seconds: float, processes: int | None) -> None:
    """Set a process's limits, or the machine's own where they are lower."""
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))


def _filter_calls() -> None:
    """Leave the user's session keyring, then deny this process and its children the calls of DENIED for good.

    Raises: OSError on a machine whose numbers of calls are not known here, or whose kernel has no filters.
    """
    if platform.machine() not in DENIED:
        raise OSError(38, os.strerror(38), f"no filter of system calls for {platform.machine()}")
    architecture, socket_call, keyctl, *groups = DENIED[platform.machine()]
    with suppress(OSError):  # a kernel without keyrings has nothing to leave
        _call("syscall", keyctl, KEYCTL_JOIN_SESSION_KEYRING, None)
    denied = sorted({number for group in groups for number in group} | set(IO_URING))
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF_LD|ABS|W, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
    kill, deny, allow = 0x80000000, 0x00050001, 0x7FFF0000  # the process; EPERM; SECCOMP_RET_ALLOW
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, X32), (answer, 0, 0, deny)]
    for number in denied:
        program += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    program += [(equal, 1, 0, socket_call), (answer, 0, 0, allow), (load, 0, 0, 16)]  # the first argument's low word
    for family in FAMILIES:
        program += [(equal, 0, 1, int(family)), (answer, 0, 0, allow)]
    program += [(answer, 0, 0, deny)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0)


def _sibling(name: str) -> Any:
    """A module of this directory, read before the root directory hides it. No package is on the path here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(descriptor: int, count: int) -> bytes:
    """Up to `count` bytes, fewer at the end of the file."""
    data = b""
    while len(data) < count and (more := os.read(descriptor, count - len(data))):
        data += more
    return data


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises: OSError."""
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


if __name__ == "__main__":
    main()
