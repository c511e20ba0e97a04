"""python -m stages.running.supervise [--parent PID] [--grace S] -- COMMAND...: run a command and leave no process of it
behind.

All descendants are ended when the command ends, when this process receives SIGTERM, SIGINT or SIGHUP, and when the
parent of this process dies, however it dies. Standard library only: starts in some 30 ms and works in any interpreter.

How: PR_SET_PDEATHSIG signals this process when its parent dies; PR_SET_CHILD_SUBREAPER makes orphaned descendants
children of this process instead of init's; the kernel sends SIGKILL to the command if this process is killed with -9.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Protocol

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send the signal `number` to this process when the thread that started it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def descendants(root: int | None = None) -> list[int]:
    """The living processes below `root` (default: this process), parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = file.read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry))
    below, parents = [], [root or os.getpid()]
    while parents:
        for child in children.get(parents.pop(), []):
            below.append(child)
            parents.append(child)
    return below


def signal_all(processes: list[int], number: int) -> None:
    """Send a signal to each process that still lives."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def processes_with(marker: str) -> list[int]:
    """The processes that inherited the environment entry `marker` (NAME=value), wherever in the tree they are now."""
    entry_bytes, marked = marker.encode(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if entry_bytes in file.read().split(b"\0"):
                        marked.append(int(entry))
            except OSError:
                continue
    return marked


def supervisor_options(grace: float = 10.0) -> list[str]:
    """The options that a caller puts between this module's name and the command.

    They name the caller: it may die before this module has asked the kernel to watch it.
    """
    return ["--parent", str(os.getpid()), "--grace", str(grace), "--"]


def main(arguments: list[str]) -> int:
    parent, grace = os.getppid(), 10.0
    while arguments and arguments[0].startswith("--"):
        name, arguments = arguments[0], arguments[1:]
        if name == "--":
            break
        value, arguments = arguments[0], arguments[1:]
        if name == "--parent":
            parent = int(value)
        elif name == "--grace":
            grace = float(value)
        else:
            raise SystemExit(f"stages.running.supervise: no option {name}")
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the kernel watched it, maybe before our first line
        return 143
    supervisor = os.getpid()

    def start() -> Child:
        return subprocess.Popen(
            arguments,
            start_new_session=True,
            close_fds=False,
            preexec_fn=lambda: die_with_supervisor(supervisor),
        )

    return supervise(start, grace)


def die_with_supervisor(supervisor: int) -> None:
    """Have the kernel kill this process, a new child of the supervisor, when the supervisor ends."""
    die_with_parent()
    if os.getppid() != supervisor:
        os._exit(143)


class Child(Protocol):
    """A process that was started, as subprocess.Popen shows it."""

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        ...


def supervise(start: Callable[[], Child], grace: float, is_deserted: Callable[[], bool] = lambda: False) -> int:
    """Start a child, wait for it and end what it leaves behind; returns its exit code, 128 + signal for a signal.

    is_deserted: asked twenty times a second; once it says so, the tree is ended as at SIGTERM.
    """
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: signals.append(received))
    child = start()
    deadline = None
    while (code := child.poll()) is None:
        if not signals and is_deserted():
            signals.append(signal.SIGTERM)
        if signals and deadline is None:
            deadline = time.monotonic() + grace
            signal_all(descendants(), signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            signal_all(descendants(), signal.SIGKILL)
        time.sleep(0.05)
    _end_descendants(grace)
    if signals:
        return 128 + signals[0]
    if code >= 0:
        return code
    return 128 - code


def _end_descendants(grace: float) -> None:
    """End what the command left behind: no process of its tree may keep a GPU, a port or a lock."""
    signal_all(descendants(), signal.SIGTERM)
    end = time.monotonic() + min(grace, 5.0)
    while descendants() and time.monotonic() < end:
        time.sleep(0.05)
    while remaining := descendants():
        signal_all(remaining, signal.SIGKILL)
        time.sleep(0.05)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
