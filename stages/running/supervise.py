"""python -m stages.running.supervise [--parent PID] [--grace S] -- COMMAND...: run a command so that nothing of it survives.

The whole tree below ends when the command ends, when this process is asked to (SIGTERM, SIGINT, SIGHUP), and when the parent of this
process dies, however it died. Standard library only: starts in some 30 ms and works in any interpreter.

How: PR_SET_PDEATHSIG tells us of the parent's death; PR_SET_CHILD_SUBREAPER makes orphans of the tree ours instead of init's; the command
itself gets SIGKILL from the kernel should this process be killed with -9.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(how: int = signal.SIGKILL) -> None:
    """Have the kernel send `how` to this process when the thread that started it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, how, 0, 0, 0)


def descendants(root: int | None = None) -> list[int]:
    """Living processes below `root` (default: this process), parents before children."""
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
    found, todo = [], [root or os.getpid()]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


def signal_all(processes: list[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def processes_with(marker: str) -> list[int]:
    """Processes that inherited the environment entry `marker` (NAME=value), wherever in the tree they are now."""
    wanted, found = marker.encode(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if wanted in file.read().split(b"\0"):
                        found.append(int(entry))
            except OSError:
                continue
    return found


def supervisor_options(grace: float = 10.0) -> list[str]:
    """What a caller puts between this module's name and the command: it says who it is, lest it die before the kernel is asked to tell of that."""
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
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew of our wish, maybe before our first line
        return 143
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: asked.append(got))
    here = os.getpid()

    def bound() -> None:
        die_with_parent()
        if os.getppid() != here:
            os._exit(143)

    child = subprocess.Popen(arguments, start_new_session=True, close_fds=False, preexec_fn=bound)
    deadline = None
    while (code := child.poll()) is None:
        if asked and deadline is None:
            deadline = time.monotonic() + grace
            signal_all(descendants(), signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            signal_all(descendants(), signal.SIGKILL)
        time.sleep(0.05)
    # The command is gone: nothing of its tree may keep a GPU, a port or a lock.
    signal_all(descendants(), signal.SIGTERM)
    end = time.monotonic() + min(grace, 5.0)
    while descendants() and time.monotonic() < end:
        time.sleep(0.05)
    while left := descendants():
        signal_all(left, signal.SIGKILL)
        time.sleep(0.05)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
    return 128 + asked[0] if asked else (code if code >= 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
