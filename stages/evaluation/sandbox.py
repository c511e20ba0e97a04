"""Stages - code that a model wrote, run where it can do no harm: lm-eval's metric `code_eval` (HumanEval, MBPP) with a sandbox around each program.

    ../running/supervise.py  ends the whole tree on a word of ours, and when we die
      -> set-up              namespaces of its own: user, mount, network, pid, ipc, uts
         -> first process    builds the root directory, gives up every right; when it dies the kernel ends all that is left
            -> the program   limits on memory, time, processes and files; sees no environment, no descriptor and no process of ours

The program sees the interpreter and the system's libraries, read-only, and an empty /tmp; no home, no store, no /proc, no network. It is in
a `chroot`, where Linux grants no user namespace, so it cannot get rights over what it sees either. What remains is the kernel: against a
program that knows a hole in it, use a machine that can be thrown away.

Run as a file by `python -I -S`, so it imports the standard library alone. Linux 5.12 or later (mount_setattr).
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
from typing import Any, NoReturn

SECONDS = 3.0
"""For one program, as in code_eval."""
START_SECONDS = 60.0
MEMORY, PROCESSES, FILE_SIZE, DISK = 1 << 30, 4, 1 << 20, "16m"
"""Address space of a process, processes of a program, and what it may write."""
NOBODY = 65534
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 38, 9
CAPABILITY_VERSION_3 = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)


class CodeEval:
    """What `evaluate.load("code_eval")` gives: pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1), each program in a process of its own."""

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
        """`predictions`: programs for each test of `references`. Returns: {"pass@1": ...} and what came of each program."""
        told = {
            task: [(number, self._verdict(program + "\n" + test, timeout)) for number, program in enumerate(programs)]
            for task, (programs, test) in enumerate(zip(predictions, references, strict=True))
        }
        counts = [(len(verdicts), sum(verdict["passed"] for _, verdict in verdicts)) for verdicts in told.values()]
        rates = {
            f"pass@{n}": sum(1 - comb(total - passed, n) / comb(total, n) for total, passed in counts) / len(counts)
            for n in k
            if all(total >= n for total, _ in counts)
        }
        return rates, told

    def _verdict(self, program: str, timeout: float) -> dict[str, Any]:
        from data_contracts.errors import TransientError

        try:
            said = run(program, timeout, self.sandboxed)
        except NoSandbox as error:  # it was there before the model was loaded
            raise TransientError(
                f"the sandbox for code that a model wrote could not be set up this time: {error}"
            ) from None
        return {"passed": said == "passed", "result": said}


class NoSandbox(RuntimeError):
    """The program was not started."""


def check(sandboxed: bool = True) -> None:
    """Whether programs can be run here, by running one. Raises: ConfigError."""
    from data_contracts.errors import ConfigError

    try:
        said = run("import heapq\nassert heapq.nsmallest(1, [2, 1]) == [1]", START_SECONDS, sandboxed)
    except NoSandbox as error:
        said = str(error)
    if said != "passed":
        raise ConfigError(
            f"code that the model writes cannot be run in a sandbox on this machine: {said}. Allow unprivileged user namespaces (in a container: "
            "unshare and mount in its seccomp profile), leave such tasks out by `only`, or, on a machine that holds nothing else and can be "
            "thrown away, set evaluation.runtime.sandbox: false"
        )


def run(program: str, seconds: float = SECONDS, sandboxed: bool = True) -> str:
    """Run it to its end. Returns: "passed", or why it did not: the exception's name, "timed out", "ended early". Raises: NoSandbox."""
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
    # One directory for both: where the program works, or (in a mount namespace) where its root is put together.
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as place,
        tempfile.TemporaryFile() as stdin,
    ):
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SELFPLAY_TREE") if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(supervisor), *supervisor_options(0), sys.executable, "-I", "-S", __file__],
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=place, start_new_session=True,
            env=kept | {"PATH": "/usr/bin:/bin", "HOME": "/tmp" if sandboxed else place, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            said = _listen(process.stdout, b"+", START_SECONDS)
            if said != b"+":
                raise NoSandbox((said or b"no word from it").decode(errors="replace"))
            said = _listen(process.stdout, b"\n", seconds)
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
    if said is None:
        return "timed out"
    text = said.decode(errors="replace").strip()
    return "passed" if secrets.compare_digest(text.encode(), token.encode()) else text[:100] or "ended early"


def _listen(pipe: Any, end: bytes, seconds: float) -> bytes | None:
    """What is said up to `end`, or to the end of the pipe, or as much as anyone has reason to say. None: too slow."""
    said, deadline = b"", time.monotonic() + seconds
    while not said.endswith(end) and len(said) < 1000:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        if not (more := os.read(pipe.fileno(), 1)):
            break
        said += more
    return said


# --- inside


def main() -> NoReturn:
    request = json.load(sys.stdin.buffer)
    # The program gets no descriptor but the null device; its words go to `out`.
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    try:
        if request["sandboxed"]:
            _leave_the_machine()
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
        os.write(out, f"{error.filename or error.strerror} ({os.strerror(error.errno)})".encode())
        os._exit(1)
    sys.path += request["path"]
    os.write(out, b"+")
    try:
        exec(compile(request["program"], "program", "exec"), {})
    except BaseException as error:
        said = type(error).__name__
    else:
        said = request["token"]
    os.write(out, said.encode()[:100] + b"\n")
    os._exit(0)


def _leave_the_machine() -> None:
    """New namespaces, in which we are an unprivileged user of theirs: a helper outside says which, as it has the right to."""
    uid, gid, us = os.geteuid(), os.getegid(), os.getpid()
    reading, writing = os.pipe()
    if not (helper := os.fork()):
        os.close(writing)
        if not os.read(reading, 1):
            os._exit(1)
        # To root and its own number no limit on processes applies, so root gets a second user to become.
        with suppress(OSError):
            if uid == 0:
                _write_maps(us, f"0 0 1\n{NOBODY} {NOBODY} 1", f"0 0 1\n{NOBODY} {NOBODY} 1")
                os._exit(0)
        with suppress(OSError):
            Path(f"/proc/{us}/setgroups").write_text("deny")
            _write_maps(us, f"{NOBODY} {uid} 1", f"{NOBODY} {gid} 1")
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


def _write_maps(process: int, users: str, groups: str) -> None:
    Path(f"/proc/{process}/uid_map").write_text(users)
    Path(f"/proc/{process}/gid_map").write_text(groups)


def _build_root(visible: list[str]) -> None:
    """The working directory becomes the root: what is visible, read-only, and an empty /tmp."""
    here = os.getcwd()
    _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"tmpfs", here.encode(), b"tmpfs", MS_NOSUID, f"size={DISK},nr_inodes=4096,mode=755".encode())
    os.chdir(here)
    done: list[str] = []
    for path in sorted(set(visible)):
        if not os.path.exists(path) or path == "/" or any(path.startswith(other + "/") for other in done):
            continue
        copy = here + path
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        if os.path.isdir(path):
            os.mkdir(copy)
        else:
            os.close(os.open(copy, os.O_CREAT | os.O_WRONLY))
        _call("mount", path.encode(), copy.encode(), None, MS_BIND | MS_REC, None)
        done.append(path)
    os.mkdir("tmp")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, here.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _call("mount", b"tmpfs", b"tmp", b"tmpfs", MS_NOSUID | MS_NODEV, f"size={DISK},nr_inodes=4096,mode=1777".encode())
    os.chroot(here)
    os.chdir("/tmp")


def _give_up_rights() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # a change of user takes it away, so only now


def _limit(seconds: float) -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CPU: ceil(seconds) + 1, resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_NPROC: PROCESSES, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _call(name: str, *arguments: Any) -> None:
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


if __name__ == "__main__":
    main()
