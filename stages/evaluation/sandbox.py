"""Stages - a sandbox for code that a model wrote, as lm-eval's metric `code_eval` (HumanEval, MBPP).

    stages/running/supervise.py  ends the whole tree when it is terminated or when its parent dies
      -> set-up                  makes new namespaces: user, mount, network, pid, ipc, uts (sandbox_inside.py)
         -> first process        builds the root directory, gives up every right, then runs the test and makes the
                                 verdict (sandbox_verdict.py); when it dies the kernel ends the rest
            -> the program       answers the test's calls with plain data; has limits on memory, time, processes and
                                 files, and sees none of the parent's environment variables, descriptors or processes

The program sees the interpreter and the system's libraries, read-only, and an empty /tmp; no home, no store, no /proc,
no network. It is in a `chroot`, where Linux grants no user namespace, so it cannot get rights over what it sees either.
A filter denies the system calls that lead around the namespaces (keyrings, vsock, io_uring, System V memory, ptrace).
What remains is the kernel: against a program that knows a hole in it, use a machine that can be thrown away.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import IO, Any

from stages.evaluation.sandbox_inside import READY
from stages.evaluation.sandbox_verdict import FAILED, PASSED
from stages.running.supervise import supervisor_options

SECONDS = 3.0
"""For one program, as in code_eval."""
START_SECONDS = 60.0
"""For the sandbox to be ready."""
INSIDE = str(Path(__file__).with_name("sandbox_inside.py"))


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
                (number, self._verdict(program, test, timeout)) for number, program in enumerate(programs)
            ]
        counts = [(len(group), sum(verdict["passed"] for _, verdict in group)) for group in verdicts.values()]
        rates = {}
        for size in k:
            if all(total >= size for total, _ in counts):
                estimates = [1 - comb(total - passed, size) / comb(total, size) for total, passed in counts]
                rates[f"pass@{size}"] = sum(estimates) / len(estimates)
        return rates, verdicts

    def _verdict(self, program: str, test: str, timeout: float) -> dict[str, Any]:
        from data_contracts.errors import TransientError

        try:
            result = run(program, timeout, self.sandboxed, test)
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


def run(program: str, seconds: float = SECONDS, sandboxed: bool = True, test: str = "") -> str:
    """Run a program, then a test of what it defines: "passed", an exception's name, "timed out" or "ended early".

    The test runs in another process than the program, whose functions it calls from there. Without a test "passed" is
    the program's own word that it came to its end. Raises: NoSandbox.
    """
    libraries = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    request = {
        "program": program,
        "seconds": seconds,
        "sandboxed": sandboxed,
        "path": libraries,
        "roots": [sys.prefix, sys.base_prefix],
    }
    supervisor = Path(__file__).parents[1] / "running" / "supervise.py"
    # The program's working directory; in a mount namespace, where its root directory is built.
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryFile() as stdin,
    ):
        head = json.dumps(request).encode()
        stdin.write(b"%016d" % len(head) + head + test.encode())
        stdin.seek(0)
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SELFPLAY_TREE") if name in os.environ}
        environment |= {"PATH": "/usr/bin:/bin", "HOME": "/tmp" if sandboxed else directory, "LANG": "C.UTF-8"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(supervisor), *supervisor_options(0), sys.executable, "-I", "-S", INSIDE],
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
    if text == PASSED:
        return "passed"
    error = text.removeprefix(FAILED)[:100]
    return f"an exception called {error}" if error in ("passed", "timed out") else error or "ended early"


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
