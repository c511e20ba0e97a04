"""Stages - a sandbox for code that a model wrote, as lm-eval's metric `code_eval` (HumanEval, MBPP).

    stages/running/supervise.py  ends the whole tree when it is terminated or when its parent dies
      -> set-up                  makes new namespaces: user, mount, network, pid, ipc, uts
         -> first process        builds the root directory, gives up every right; when it dies the kernel ends the rest
            -> the program       has limits on memory, time, processes and files, and sees none of the parent's
                                 environment variables, descriptors or processes

The program sees the interpreter and the system's libraries, read-only, and an empty /tmp; no home, no store, no /proc,
no network. It is in a `chroot`, where Linux grants no user namespace, so it cannot get rights over what it sees either.
What remains is the kernel: against a program that knows a hole in it, use a machine that can be thrown away.

This file is also run as a script by `python -I -S`, so it imports the standard library alone. Linux 5.12 or later
(mount_setattr).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from math import ceil, comb
from pathlib import Path
from typing import IO, Any, NoReturn

SECONDS = 3.0
"""For one program, as in code_eval."""
START_SECONDS = 60.0
"""For the sandbox to be ready."""
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


class CodeEval:
    """A replacement for `evaluate.load("code_eval")`: pass@k, with each program in a process of its own.

    With n programs of a task, c of them passing: pass@k = mean over tasks of 1 - C(n - c, k) / C(n, k)
    (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """

    def __init__(self, sandboxed: bool = True):
        self.sandboxed = sandboxed

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        timeout: float = SECONDS,
        **_: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """({"pass@1": ...}, the verdict on each program by task).

        references: a test per task; predictions: programs per task. A k above the number of programs of some task has
        no rate. Raises: TransientError if a sandbox cannot be set up.
        """
        verdicts = {}
        for task, (programs, test) in enumerate(zip(predictions, references, strict=True)):
            verdicts[task] = [
                (number, self._verdict(f"{program}\n{test}", timeout)) for number, program in enumerate(programs)
            ]
        counts = [(len(group), sum(verdict["passed"] for _, verdict in group)) for group in verdicts.values()]
        rates = {}
        for size in k:
            if all(total >= size for total, _ in counts):
                estimates = [1 - comb(total - passed, size) / comb(total, size) for total, passed in counts]
                rates[f"pass@{size}"] = sum(estimates) / len(estimates)
        return rates, verdicts

    def _verdict(self, program: str, timeout: float) -> dict[str, Any]:
        from data_contracts.errors import TransientError

        try:
            result = run(program, timeout, self.sandboxed)
        except NoSandbox as error:  # `check` set one up before the model was loaded, so another try may succeed
            raise TransientError(
                f"the sandbox for code that a model wrote could not be set up this time: {error}"
            ) from None
        return {"passed": result == "passed", "result": result}


class NoSandbox(RuntimeError):
    """The sandbox could not be set up; the program was not started."""


def check(sandboxed: bool = True) -> None:
    """Run a small program, to see whether programs can be run on this machine. Raises: ConfigError."""
    from data_contracts.errors import ConfigError

    try:
        result = run("import heapq\nassert heapq.nsmallest(1, [2, 1]) == [1]", START_SECONDS, sandboxed)
    except NoSandbox as error:
        result = str(error)
    if result != "passed":
        raise ConfigError(
            f"code that the model writes cannot be run in a sandbox on this machine: {result}. Allow unprivileged user "
            "namespaces (in a container: unshare and mount in its seccomp profile), leave such tasks out by `only`, "
            "or, on a machine that holds nothing else and can be thrown away, set evaluation.runtime.sandbox: false"
        )


def run(program: str, seconds: float = SECONDS, sandboxed: bool = True) -> str:
    """Run a program to its end: "passed", an exception's name, "timed out" or "ended early". Raises: NoSandbox."""
    token = secrets.token_hex()
    libraries = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    request = {
        "program": program,
        "token": token,
        "seconds": seconds,
        "sandboxed": sandboxed,
        "path": libraries,
        "roots": [sys.prefix, sys.base_prefix],
    }
    from stages.running.supervise import supervisor_options  # not above: the set-up runs this file without packages

    supervisor = Path(__file__).parents[1] / "running" / "supervise.py"
    # The program's working directory; in a mount namespace, where its root directory is built.
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryFile() as stdin,
    ):
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SELFPLAY_TREE") if name in os.environ}
        environment |= {"PATH": "/usr/bin:/bin", "HOME": "/tmp" if sandboxed else directory, "LANG": "C.UTF-8"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(supervisor), *supervisor_options(0), sys.executable, "-I", "-S", __file__],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            start_new_session=True,
            env=environment,
        )
        assert process.stdout is not None
        try:
            greeting = _read_until(process.stdout, READY, START_SECONDS)
            if greeting != READY:
                raise NoSandbox((greeting or b"no word from it").decode(errors="replace"))
            verdict = _read_until(process.stdout, b"\n", seconds)
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
    if verdict is None:
        return "timed out"
    text = verdict.decode(errors="replace").strip()
    if secrets.compare_digest(text.encode(), token.encode()):
        return "passed"
    return text[:100] or "ended early"


def _read_until(pipe: IO[bytes], end: bytes, seconds: float) -> bytes | None:
    """The bytes up to and with `end`, or to the end of the pipe, or the first 1000. None if that takes too long."""
    text, deadline = b"", time.monotonic() + seconds
    while not text.endswith(end) and len(text) < 1000:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        if not (byte := os.read(pipe.fileno(), 1)):
            break
        text += byte
    return text


# --- inside the sandbox


def main() -> NoReturn:
    """Set the sandbox up as the request on stdin says, run the program, write the verdict on stdout."""
    request = json.load(sys.stdin.buffer)
    # The program gets no descriptor but the null device; the verdict goes to `out`.
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    try:
        if request["sandboxed"]:
            _enter_namespaces()
            if child := os.fork():
                os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            _build_root([*SYSTEM, *request["roots"]])
            _give_up_rights()
            if child := os.fork():
                os.waitpid(child, 0)
                os._exit(0)
        _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _limit(request["seconds"])
    except OSError as error:
        os.write(out, f"{error.filename or error.strerror} ({os.strerror(error.errno or 0)})".encode())
        os._exit(1)
    sys.path += request["path"]
    os.write(out, READY)
    try:
        exec(compile(request["program"], "program", "exec"), {})
    except BaseException as error:
        verdict = type(error).__name__
    else:
        verdict = request["token"]
    os.write(out, verdict.encode()[:100] + b"\n")
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
    os.mkdir("tmp")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _call("mount", b"tmpfs", b"tmp", b"tmpfs", MS_NOSUID | MS_NODEV, f"size={DISK},nr_inodes=4096,mode=1777".encode())
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


def _limit(seconds: float) -> None:
    """Set the program's limits, or the machine's own where they are lower."""
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises: OSError."""
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


if __name__ == "__main__":
    main()
