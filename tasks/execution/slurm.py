"""Tasks - the engine Slurm: one sbatch job per piece of work, with the nodes and GPUs that it needs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_contracts.errors import ConfigError, TransientError
from data_contracts.installation import ROOT
from data_contracts.store import Store
from tasks.execution.base import Work
from tasks.execution.config import ExecutionConfig
from tasks.execution.remote import VISIBLE_WITHIN_SECONDS, Request, at_fault

FINAL = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
)
"""Job states that do not change any more."""
LOOK_EVERY_SECONDS = 2.0
"""Polling interval that a shared slurmctld tolerates."""


def script(work: Work, execution: ExecutionConfig, request: Path, token: str) -> str:
    """The batch script: directives, environment, and one task on each node that runs the request."""
    options = [
        f"--job-name={work.name}",
        f"--nodes={work.nodes}",
        "--ntasks-per-node=1",
        f"--output={request.with_name('slurm-%j.log')}",
    ]
    options += [f"--gpus-per-node={work.gpus}"] * bool(work.gpus)
    options += [f"--time={round(work.timeout / 60) + 5}"] if work.timeout else []
    # --no-requeue: the run decides what a job that was cut off means, and starts it again from its shards or last
    # checkpoint.
    options += ["--no-requeue", *execution.sbatch]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "set -euo pipefail"]
    lines += [execution.setup] if execution.setup else []
    lines += [
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"cd {shlex.quote(str(ROOT))}",
    ]
    if work.nodes > 1:
        # The first node's name is the ranks' meeting point; the port follows from the job, so that two jobs on a node
        # do not meet.
        lines += [
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_ADDR",
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        ]
    command = [sys.executable, "-m", "tasks.execution.remote", str(request), token]
    lines += [f"exec srun --kill-on-bad-exit=1 {shlex.join(command)}"]
    return "\n".join(lines) + "\n"


class Slurm:
    """The Slurm of this machine. Raises: ConfigError if it has no sbatch."""

    def __init__(
        self, execution: ExecutionConfig, store: Store, log: Callable[[str], None], inherit: Sequence[int] = ()
    ):
        if shutil.which("sbatch") is None:
            raise ConfigError("there is no sbatch on this machine; start the run on a login or submit node")
        self.execution, self.store, self.log = execution, store, log

    def start(self, work: Work) -> SlurmHandle:
        return SlurmHandle(work, self.execution, self.store, self.log)


class SlurmHandle:
    """One job."""

    def __init__(self, work: Work, execution: ExecutionConfig, store: Store, log: Callable[[str], None]):
        self.work, self.execution, self.request = work, execution, Request(work, store.root)
        self.state, self.next_look, self.began = "", 0.0, time.monotonic()
        path = self.request.path.with_name("job.sh")
        path.write_text(script(work, execution, self.request.path, self.request.token))
        answer = _submit(path, work.name)
        self.job = answer.split(";")[0].strip()
        log(f"{work.name} is Slurm job {self.job}")

    def has_ended(self) -> bool:
        if self.state in FINAL or time.monotonic() < self.next_look:
            return self.state in FINAL
        self.next_look = time.monotonic() + LOOK_EVERY_SECONDS
        for rank in range(self.work.nodes):
            self.request.check_clock(rank)
        process = subprocess.run(
            ["squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T"],
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode == 0:
            self.state = process.stdout.strip() or "COMPLETED"  # Slurm forgets a job some minutes after its end
        elif "Invalid job id" in process.stderr:
            self.state = "COMPLETED"
        if self.state == "PENDING" and time.monotonic() - self.began > self.execution.start_timeout_seconds:
            raise TransientError(
                f"Slurm job {self.job} ({self.work.name}) has waited {self.execution.start_timeout_seconds:.0f} s for "
                "its place: see `squeue --start`, or raise execution.start_timeout_seconds"
            )
        return self.state in FINAL

    def error(self) -> Exception | None:
        # The node's file system may be slower than Slurm; a job that was killed has no outcome.
        patience = VISIBLE_WITHIN_SECONDS if self.state == "COMPLETED" else 5.0
        end = time.monotonic() + patience
        while self.request.read("outcome") is None and time.monotonic() < end:
            time.sleep(0.2)
        if self.request.read("outcome") is None and (refusal := _refusal(self.request.directory)):
            return ConfigError(refusal)
        engine = f"Slurm job {self.job} is {self.state}"
        return at_fault(self.request.error(rank, engine) for rank in range(self.work.nodes))

    def cancel(self) -> None:
        if self.state not in FINAL:
            subprocess.run(["scancel", self.job], capture_output=True, check=False)
        self.request.remove()


def _refusal(directory: Path) -> str | None:
    """The ConfigError of a node that could not read the request, if its output is visible here."""
    for path in directory.glob("slurm-*.log"):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("ConfigError: "):
                return line.removeprefix("ConfigError: ")
    return None


def _submit(path: Path, name: str) -> str:
    """sbatch's answer to a script. Raises: ConfigError with Slurm's own words."""
    process = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if process.returncode:
        raise ConfigError(
            f"Slurm takes no job for {name}: {process.stderr.strip()}. "
            "Check execution.sbatch and execution.gpus against "
            "`sinfo -o '%P %D %G'`"
        )
    return process.stdout
