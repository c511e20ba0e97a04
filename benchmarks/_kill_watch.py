"""Shared by `kills`: the files of a store as they appear (inotify), and the processes of one play by their environment."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data_contracts.files import process_state
from stages.running.supervise import die_with_parent, processes_with, signal_all

LIBC = ctypes.CDLL(None, use_errno=True)
IN_CLOSE_WRITE, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x8, 0x80, 0x100, 0x200
IN_ISDIR, IN_ONLYDIR = 0x40000000, 0x01000000
DEEDS = {IN_CLOSE_WRITE: "written", IN_MOVED_TO: "renamed", IN_CREATE: "created", IN_DELETE: "deleted"}
HEADER = struct.Struct("iIII")
SETTLE_SECONDS = 25.0
"""What a killed tree may take to end: a supervisor's grace of 10 s, and as long again on a busy machine."""
PATIENCE_SECONDS = 900
"""For the one Prefect server of all plays: a busy machine is no fault of the run."""
PATTERNS = (
    (re.compile(r"\.tmp-.*"), ".tmp"),
    (re.compile(r"\.events-.*\.jsonl"), ".events-*.jsonl"),
    (re.compile(r"uploading\..*"), "uploading.*"),
    (re.compile(r"[0-9a-f]{12,}"), "*"),
    (re.compile(r"(lease-|part-|scores-|dropped-|heldout-|iter_|step|set_aside/)[0-9-]+"), r"\1*"),
    (re.compile(r"steps/\d+"), "steps/*"),
)
"""What differs from run to run in the name of a file."""


class FileEvent(NamedTuple):
    """Something that happened to a file of a store."""

    name: str
    """Relative to the store; keys, process ids and counters are a `*`."""
    deed: str
    """created, written (closed after writing), renamed (to this name) or deleted."""

    def __str__(self) -> str:
        return f"{self.name} {self.deed}"


def name_of(path: str) -> str:
    """Return a path relative to the store with everything that differs between two runs replaced."""
    for pattern, replacement in PATTERNS:
        path = pattern.sub(replacement, path)
    return path


class Watch:
    """The file events of a directory and all below it, as the kernel reports them."""

    def __init__(self, root: Path):
        self.root = root
        self.descriptor = LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self.directories: dict[int, str] = {}
        self.pending: list[FileEvent] = []
        self._add("")
        self.pending.clear()  # what was there before the watch began

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def _add(self, relative: str) -> None:
        """Watch a directory; what appeared in it before the watch did counts as created."""
        path = os.path.join(self.root, relative)
        if relative.split("/")[0] == "prefect":  # a database that writes all the time, and no part of the store
            return
        mask = IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_ONLYDIR
        number = LIBC.inotify_add_watch(self.descriptor, os.fsencode(path), mask)
        if number < 0:  # gone again, or a link
            return
        self.directories[number] = relative
        try:
            entries = list(os.scandir(path))
        except OSError:
            return
        for entry in entries:
            below = os.path.join(relative, entry.name)
            self.pending.append(FileEvent(name_of(below), "created"))
            if entry.is_dir(follow_symlinks=False):
                self._add(below)

    def read(self, seconds: float) -> list[FileEvent]:
        """Return the events since the last call; wait up to `seconds` for the first."""
        if not self.pending:
            select.select([self.descriptor], [], [], seconds)
        try:
            data = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            data = b""
        position = 0
        while position < len(data):
            number, mask, _, length = HEADER.unpack_from(data, position)
            name = data[position + HEADER.size : position + HEADER.size + length].rstrip(b"\0")
            position += HEADER.size + length
            if number not in self.directories or not name:
                continue
            relative = os.path.join(self.directories[number], os.fsdecode(name))
            self.pending += [FileEvent(name_of(relative), deed) for bit, deed in DEEDS.items() if mask & bit]
            if mask & IN_ISDIR and mask & (IN_CREATE | IN_MOVED_TO):
                self._add(relative)
        events, self.pending = self.pending, []
        return events


class Process(NamedTuple):
    pid: int
    role: str
    """flow, server, forkserver, supervisor, rank or stage."""
    command: str


def role_of(command: str) -> str:
    """Return the part that a process plays in a run, from its command line; forks of the fork server write their own."""
    if "stages.running.supervise" in command:
        return "supervisor"
    if "prefect.server" in command:
        return "server"
    if "stages.training.rank" in command:
        return "rank"
    if "stages.forkserver" in command:
        return "forkserver"
    return "stage"


class Play:
    """One command of the pipeline with all its processes, which carry `marker` in their environment.

    start: what begins the command and returns its process id
    """

    def __init__(self, start: Callable[[Mapping[str, str]], int], environment: Mapping[str, str], marker: str):
        self.marker = marker
        name, _, value = marker.partition("=")
        self.pid = start({**environment, name: value})
        self.code: int | None = None
        self.began = time.monotonic()

    def processes(self) -> list[Process]:
        """Return the living processes, oldest first."""
        living: list[Process] = []
        for pid in sorted({*processes_with(self.marker), *([self.pid] if self.code is None else [])}):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if process_state(pid):
                role = "flow" if pid == self.pid else role_of(command)
                living.append(Process(pid, role, " ".join(command.split())))
        return living

    def strike(self, number: int, pids: Sequence[int], pause: float) -> None:
        """Send a signal; after SIGSTOP wait `pause` seconds and send SIGCONT."""
        signal_all(list(pids), number)
        if number == signal.SIGSTOP:
            time.sleep(pause)
            signal_all(list(pids), signal.SIGCONT)

    def has_ended(self, seconds: float) -> bool:
        """Wait up to `seconds` for the end of the command itself."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                return False
            else:
                time.sleep(0.02)
        return True

    def remaining(self, seconds: float = SETTLE_SECONDS) -> list[Process]:
        """Wait up to `seconds` until no process is left; return those that are, and end them."""
        deadline = time.monotonic() + seconds
        while (living := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        signal_all([process.pid for process in living], signal.SIGKILL)
        return living


def start_anew(command: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str]) -> int:
    """Start a command as a process of its own; returns its id."""
    with open(log, "ab") as file:
        files = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, start_new_session=True, preexec_fn=die_with_parent, **files
        )
    process.returncode = 0  # whoever plays it waits for it
    return process.pid


def start_forked(words: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str]) -> int:
    """Fork this process, which has imported the pipeline, and run `selfplay WORDS` there; returns its id.

    The command is the same as `python -m flows WORDS`, only 6 s of imports are left out of each of its starts.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()  # a harness that is killed leaves no run behind
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
            os.dup2(source, number)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        from flows.cli.commands import main

        code = main(list(words))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # As at the end of an interpreter: what libraries have registered runs, buffers are written.
        with suppress(BaseException):
            threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up(config: Path, store: Path) -> None:
    """Import what a run imports, so that forks of this process need not; leave an empty database of MLflow's in
    `store`, for the same reason."""
    from data_contracts.store import Store
    from flows.cli import play, server, status  # noqa: F401
    from flows.compare import compare  # noqa: F401
    from flows.config import load_run
    from flows.preflight import preflight
    from flows.report.page import render  # noqa: F401
    from tasks.tracking import import_client

    store.mkdir()
    uri = f"sqlite:///{store}/mlflow.db"
    server.ANSWER_SECONDS = PATIENCE_SECONDS
    import_client()(tracking_uri=uri, registry_uri=uri).search_experiments()
    preflight(load_run(config), Store(store))


@contextmanager
def prefect_server_apart(home: Path) -> Iterator[None]:
    """Have a Prefect server in a process tree of its own, and its settings in this process's environment."""
    code = (
        "import json, os, sys, pathlib\nbefore = dict(os.environ)\nfrom flows.cli import server\n"
        f"server.START_SECONDS = {PATIENCE_SECONDS}\n"
        "with server.prefect_server(pathlib.Path(sys.argv[1])):\n"
        "    print('@' + json.dumps({k: v for k, v in os.environ.items() if before.get(k) != v}), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        line = next((line for line in server.stdout if line.startswith("@")), None)
        if line is None:
            raise SystemExit(f"the Prefect server did not start; see {home}/server.log")
        os.environ |= json.loads(line[1:])
        yield
    finally:
        server.stdin.close()
        server.wait(60)
