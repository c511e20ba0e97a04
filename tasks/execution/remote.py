"""Tasks - work on another machine: what it is asked travels through the store, and so does how it ended.

    <store>/work/.<token>.tmp-<host>-<pid>/      named after whoever asks, like a temporary file
        request.json                             what to run
        hello-<rank>.json                        the node that took it, its clock
        alive-<rank>                             locked while the node works on it
        outcome-<rank>.json                      how it ended: written as the last act

An engine (Prefect, Ray, Slurm) only has to run `do` on a node, or `python -m tasks.execution.remote REQUEST TOKEN`, and to know whether that
still lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data_contracts.errors import BY_NAME, ConfigError, PipelineError, StageError, TransientError, print_error
from data_contracts.files import temporary_beside, write_atomic
from tasks.execution.base import Work
from tasks.execution.gpus import some_gpus
from tasks.launch import run_stage

NODE_RANK, NODES, RENDEZVOUS = "SELFPLAY_NODE_RANK", "SELFPLAY_NODES", "SELFPLAY_RENDEZVOUS"
VISIBLE_WITHIN_SECONDS = 60.0
"""How long a network file system may take to show a new file on another node."""
MAX_SKEW_SECONDS = 30.0
"""Clocks further apart confuse leases, heartbeats and the order of events."""
LEFT_ALONE_SECONDS = 10.0
"""How long the other nodes of a piece of work may take to say what became of them when one has failed; then they are ended."""


class Request:
    """Work that is written down for another machine; removed when it is over."""

    def __init__(self, work: Work, store_root: Path):
        self.work, self.token = work, uuid.uuid4().hex
        self.directory = temporary_beside(store_root / "work" / self.token)
        self.path = self.directory / "request.json"
        self.directory.mkdir(parents=True)
        self.began = time.time()
        self.greeted: set[int] = set()
        self.failed_at: float | None = None
        write_atomic(self.path, json.dumps(work._asdict() | {"log_file": str(work.log_file), "token": self.token}))

    def read(self, what: str, rank: int = 0) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.directory / f"{what}-{rank}.json").read_text()))
        except (OSError, ValueError):
            return None

    def check_clock(self, rank: int) -> None:
        """Raises: ConfigError if the node that took the work has another time than this one."""
        hello = self.read("hello", rank) if rank not in self.greeted else None
        if hello is None:
            return
        self.greeted.add(rank)
        early, late = self.began - hello["time"], hello["time"] - time.time()
        if max(early, late) > MAX_SKEW_SECONDS:
            raise ConfigError(
                f"the clock of {hello['host']} is {max(early, late):.0f} s {'behind' if early > late else 'ahead of'} that of {os.uname().nodename}: "
                "run a time service (chrony or systemd-timesyncd) on every node, and start again"
            )

    def is_lost(self, rank: int) -> bool:
        """Whether the node's process took the work and is gone without a word: the kernel drops the lock of a dead holder."""
        if self.read("hello", rank) is None or self.read("outcome", rank) is not None:
            return False
        try:
            with open(self.directory / f"alive-{rank}") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return self.read("outcome", rank) is None  # it may have ended well in between

    def is_settled(self, everyone_ended: bool, somebody_failed: bool) -> bool:
        """One that failed ends them all, for the others would wait for it; they get a moment to say what became of them."""
        if self.failed_at is None and somebody_failed:
            self.failed_at = time.monotonic()
        return everyone_ended or (self.failed_at is not None and time.monotonic() - self.failed_at > LEFT_ALONE_SECONDS)

    def error(self, rank: int, engine: str) -> Exception | None:
        """How the work on a node ended, when the engine says that it has."""
        outcome = self.read("outcome", rank)
        if outcome is None:
            return TransientError(f"{self.work.name} was lost: {engine}; its log: {self.work.log_file}")
        if "error" in outcome:
            return BY_NAME.get(outcome["error"]["type"], StageError)(outcome["error"]["message"])
        return None

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def at_fault(errors: Iterable[Exception | None]) -> Exception | None:
    """Of what the nodes of one piece of work say, the one to go by: a node that was only left alone by another one says so (TransientError)."""
    failed = [error for error in errors if error is not None]
    return next((error for error in failed if not isinstance(error, TransientError)), failed[0] if failed else None)


def do(
    path: Path, token: str, rank: int = 0, log: Callable[[str], None] = print, grace: float = VISIBLE_WITHIN_SECONDS
) -> None:
    """Run a request on this machine. Raises: ConfigError if the store is not shared with whoever asked; what the stage raises."""
    request = _read(path, token, grace)
    alive = open(path.with_name(f"alive-{rank}"), "a")  # noqa: SIM115 - held until the outcome is written, or this process is gone
    fcntl.flock(alive, fcntl.LOCK_EX)
    write_atomic(
        path.with_name(f"hello-{rank}.json"),
        json.dumps({"host": os.uname().nodename, "time": time.time(), "pid": os.getpid()}),
    )
    outcome: dict[str, Any] = {}
    try:
        many = {NODE_RANK: str(rank), NODES: str(request["nodes"]), RENDEZVOUS: token} if request["nodes"] > 1 else {}
        with some_gpus(request["gpus"], log) as pinned:
            if request["gpus"]:
                check_cuda(request["python"] or sys.executable)
            log_file = Path(request["log_file"])
            run_stage(
                request["arguments"], log_file=log_file.with_name(f"{log_file.stem}-node{rank}.log") if rank else log_file, log=log,
                python=request["python"], env=pinned | request["env"] | many, timeout=request["timeout"],
            )  # fmt: skip
    except BaseException as error:
        kind = error if isinstance(error, PipelineError) else TransientError(f"{type(error).__name__}: {error}")
        outcome["error"] = {"type": type(kind).__name__, "message": f"{kind} [on {os.uname().nodename}]"}
        raise
    finally:
        if path.parent.is_dir():  # whoever asked may have gone, and cleaned up
            write_atomic(path.with_name(f"outcome-{rank}.json"), json.dumps(outcome))
        alive.close()


def _read(path: Path, token: str, grace: float) -> dict[str, Any]:
    """The request, and with it the proof that this node sees the same store: the token came another way."""
    end = time.monotonic() + grace
    while True:
        try:
            request = dict(json.loads(path.read_text()))
            if request["token"] == token:
                return request
        except (OSError, ValueError):
            pass
        if time.monotonic() > end:
            raise ConfigError(
                f"{os.uname().nodename} does not see {path}, which the run has just written: the store is not shared between the nodes. Mount the same "
                "file system under the same path on all of them, and point SELFPLAY_STORE (or --store) there"
            )
        time.sleep(min(1.0, grace / 10))


def check_cuda(python: str) -> None:
    """Raises: ConfigError if the torch of an interpreter cannot use this machine's GPUs. Reads version files only; no import."""
    find = "import importlib.util as u, pathlib as p; s = u.find_spec('torch'); print(p.Path(s.origin).with_name('version.py').read_text() if s else '')"
    try:
        text = subprocess.run([python, "-c", find], capture_output=True, text=True, timeout=60, check=True).stdout
        driver = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return  # the stage itself will say what is wrong
    version = re.search(r"__version__ = '([^']+)'", text)
    built, able = re.search(r"cuda[^=\n]*= '(\d+)\.(\d+)'", text), re.search(r"CUDA Version: (\d+)\.(\d+)", driver)
    if version and not built:
        raise ConfigError(
            f"torch {version[1]} of {python} on {os.uname().nodename} is built without CUDA, and the work has GPUs: install the gpu lock there "
            "(make venv LOCK=gpu), or name another interpreter in the stage's runtime.python"
        )
    if version and able and built and int(built[1]) > int(able[1]):
        raise ConfigError(
            f"torch {version[1]} of {python} is built for CUDA {built[1]}.{built[2]}, the driver of {os.uname().nodename} knows CUDA {able[1]}.{able[2]} "
            "at most: update the driver, or install a torch built for that CUDA"
        )


def main(arguments: Sequence[str]) -> int:
    """python -m tasks.execution.remote REQUEST TOKEN: the node's rank is Slurm's, or Kubernetes', or 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rank = next(
        (int(os.environ[name]) for name in (NODE_RANK, "SLURM_NODEID", "JOB_COMPLETION_INDEX") if name in os.environ), 0
    )
    try:
        do(Path(arguments[0]), arguments[1], rank)
    except PipelineError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
