"""Tasks - work on another machine: the request and its outcome travel through the store.

    <store>/work/.<token>.tmp-<host>-<pid>/      named after the process that asks, like a temporary file
        request.json                             what to run
        hello-<rank>.json                        the node that took it, and its clock
        alive-<rank>                             locked while the node works on it
        outcome-<rank>.json                      how it ended: the node's last act

An engine (Prefect, Ray, Slurm) has to call `run_request` on a node, or `python -m tasks.execution.remote REQUEST
TOKEN`, and to see whether that process is still alive.
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
"""Time that a network file system may take to show a new file on another node."""
MAX_SKEW_SECONDS = 30.0
"""Clocks further apart than this confuse leases, heartbeats and the order of events."""
OUTCOME_WITHIN_SECONDS = 10.0
"""Time that the other nodes get to write their outcomes once a node has failed; then they are ended."""


class Request:
    """A piece of work written to the store for other machines; `remove` it when the work is over."""

    def __init__(self, work: Work, store_root: Path):
        self.work, self.token = work, uuid.uuid4().hex
        self.directory = temporary_beside(store_root / "work" / self.token)
        self.path = self.directory / "request.json"
        self.directory.mkdir(parents=True)
        self.began = time.time()
        self.greeted: set[int] = set()
        self.failed_at: float | None = None
        write_atomic(self.path, json.dumps(work._asdict() | {"log_file": str(work.log_file), "token": self.token}))

    def read(self, name: str, rank: int = 0) -> dict[str, Any] | None:
        """A node's `hello` or `outcome`; None if it has not written it."""
        try:
            return dict(json.loads((self.directory / f"{name}-{rank}.json").read_text()))
        except (OSError, ValueError):
            return None

    def check_clock(self, rank: int) -> None:
        """Compare a node's clock with this one's, once. Raises: ConfigError beyond MAX_SKEW_SECONDS."""
        if rank in self.greeted or (hello := self.read("hello", rank)) is None:
            return
        self.greeted.add(rank)
        early, late = self.began - hello["time"], hello["time"] - time.time()
        if max(early, late) > MAX_SKEW_SECONDS:
            direction = "behind" if early > late else "ahead of"
            raise ConfigError(
                f"the clock of {hello['host']} is {max(early, late):.0f} s {direction} that of {os.uname().nodename}: "
                "run a time service (chrony or systemd-timesyncd) on every node, and start again"
            )

    def is_lost(self, rank: int) -> bool:
        """Whether a node took the work and died without an outcome: the kernel drops the lock of a dead process."""
        if self.read("hello", rank) is None or self.read("outcome", rank) is not None:
            return False
        try:
            with open(self.directory / f"alive-{rank}") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return self.read("outcome", rank) is None  # it may have ended between the two looks

    def is_settled(self, all_ended: bool, any_failed: bool) -> bool:
        """Whether the work is over: all nodes have ended, or one failed and the others had time for their outcomes."""
        if self.failed_at is None and any_failed:
            self.failed_at = time.monotonic()
        return all_ended or (self.failed_at is not None and time.monotonic() - self.failed_at > OUTCOME_WITHIN_SECONDS)

    def error(self, rank: int, engine: str) -> Exception | None:
        """Why a node's part failed, or None. `engine`: the engine's words about the end, in place of an outcome."""
        outcome = self.read("outcome", rank)
        if outcome is None:
            return TransientError(f"{self.work.name} was lost: {engine}; its log: {self.work.log_file}")
        if "error" in outcome:
            return BY_NAME.get(outcome["error"]["type"], StageError)(outcome["error"]["message"])
        return None

    def remove(self) -> None:
        """Delete the request and its outcomes."""
        shutil.rmtree(self.directory, ignore_errors=True)


def at_fault(errors: Iterable[Exception | None]) -> Exception | None:
    """Pick the error to report, if any: a node's own failure before one caused by a lost peer (TransientError)."""
    failures = [error for error in errors if error is not None]
    own_failures = [error for error in failures if not isinstance(error, TransientError)]
    return next(iter(own_failures + failures), None)


def run_request(
    path: Path, token: str, rank: int = 0, log: Callable[[str], None] = print, grace: float = VISIBLE_WITHIN_SECONDS
) -> None:
    """Run a request on this machine and write its outcome.

    grace: seconds within which the request must become visible here.
    Raises: ConfigError if the store is not shared with the machine that asked; what the stage raises.
    """
    request = _read(path, token, grace)
    # Held until the outcome is written, or this process is gone.
    alive = open(path.with_name(f"alive-{rank}"), "a")  # noqa: SIM115
    fcntl.flock(alive, fcntl.LOCK_EX)
    hello = {"host": os.uname().nodename, "time": time.time(), "pid": os.getpid()}
    write_atomic(path.with_name(f"hello-{rank}.json"), json.dumps(hello))
    outcome: dict[str, Any] = {}
    try:
        env, log_file = request["env"], Path(request["log_file"])
        if request["nodes"] > 1:
            env |= {NODE_RANK: str(rank), NODES: str(request["nodes"]), RENDEZVOUS: token}
        if rank > 0:
            log_file = log_file.with_name(f"{log_file.stem}-node{rank}.log")
        with some_gpus(request["gpus"], log, env) as gpu_env:
            if request["gpus"]:
                check_cuda(request["python"] or sys.executable)
            run_stage(
                request["arguments"],
                log_file=log_file,
                log=log,
                python=request["python"],
                env=env | gpu_env,
                timeout=request["timeout"],
            )
    except BaseException as error:
        failure = error
        if not isinstance(error, PipelineError):
            failure = TransientError(f"{type(error).__name__}: {error}")
        outcome["error"] = {"type": type(failure).__name__, "message": f"{failure} [on {os.uname().nodename}]"}
        raise
    finally:
        if path.parent.is_dir():  # the run may have ended and removed its request
            write_atomic(path.with_name(f"outcome-{rank}.json"), json.dumps(outcome))
        alive.close()


def _read(path: Path, token: str, grace: float) -> dict[str, Any]:
    """The request, once it is visible. Its token proves that this node sees the same store: the engine passed it too.

    Raises: ConfigError if it is not visible within `grace` seconds.
    """
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
                f"{os.uname().nodename} does not see {path}, which the run has just written: the store is not shared "
                "between the nodes. Mount the same file system under the same path on all of them, and point "
                "SELFPLAY_STORE (or --store) there"
            )
        time.sleep(min(1.0, grace / 10))


PRINT_TORCH_VERSION = """
import importlib.util, pathlib
spec = importlib.util.find_spec("torch")
print(pathlib.Path(spec.origin).with_name("version.py").read_text() if spec else "")
"""


def check_cuda(python: str) -> None:
    """Compare the torch of an interpreter with this machine's GPU driver, without importing torch.

    Raises: ConfigError if that torch has no CUDA, or one that the driver is too old for.
    """
    command = [python, "-c", PRINT_TORCH_VERSION]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        listing = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return  # the stage's own error will be clearer
    version, cuda = re.search(r"__version__ = '([^']+)'", text), re.search(r"cuda[^=\n]*= '(\d+)\.(\d+)'", text)
    driver = re.search(r"CUDA Version: (\d+)\.(\d+)", listing)
    if version and not cuda:
        raise ConfigError(
            f"torch {version[1]} of {python} on {os.uname().nodename} is built without CUDA, and the work has GPUs: "
            "install the gpu lock there (make venv LOCK=gpu), or name another interpreter in the stage's runtime.python"
        )
    if version and cuda and driver and int(cuda[1]) > int(driver[1]):
        raise ConfigError(
            f"torch {version[1]} of {python} is built for CUDA {cuda[1]}.{cuda[2]}, the driver of "
            f"{os.uname().nodename} knows CUDA {driver[1]}.{driver[2]} at most: update the driver, or install a torch "
            "built for that CUDA"
        )


def main(arguments: Sequence[str]) -> int:
    """python -m tasks.execution.remote REQUEST TOKEN; returns the exit code. The rank is Slurm's, Kubernetes' or 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ranks = [os.environ[name] for name in (NODE_RANK, "SLURM_NODEID", "JOB_COMPLETION_INDEX") if name in os.environ]
    rank = int(ranks[0]) if ranks else 0
    try:
        run_request(Path(arguments[0]), arguments[1], rank)
    except PipelineError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
