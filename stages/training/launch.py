"""Stages - the ranks of a training: one process each on this node, and what their exit codes mean.

A rank finds its GPU by its number among the GPUs that this process sees: CUDA_VISIBLE_DEVICES is inherited as it is, so
a lock of the pipeline, Slurm or Ray may have put any numbers or UUIDs into it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_contracts.errors import BY_NAME, ConfigError, PipelineError, StageError, TransientError
from stages.models.lazy import torch
from stages.models.policy import pick_device
from stages.running.rendezvous import Meeting
from stages.running.supervise import signal_all
from stages.training.config import TrainingRuntime

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL for the ranks that a failed rank leaves behind."""


def start_ranks(out: Path, runtime: TrainingRuntime, meeting: Meeting, node: int) -> int:
    """Run this node's ranks of `python -m stages.training.rank OUT`; returns their exit code (`exit_code_of`).

    Raises: ConfigError if this process sees fewer GPUs than there are ranks.
    """
    device = pick_device(runtime.device)
    if device == "cuda" and (seen := torch.cuda.device_count()) < runtime.num_processes:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"training.runtime.num_processes is {runtime.num_processes}, and this process sees {seen} GPUs "
            f"(CUDA_VISIBLE_DEVICES is {visible}): lower it, or give the stage more GPUs (execution.gpus.train)"
        )
    environment = dict(os.environ)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // runtime.num_processes))
    command = [sys.executable, "-m", "stages.training.rank", str(out)]
    ranks = rank_environments(runtime.num_processes, runtime.num_nodes, node, meeting)
    return run_processes(command, [environment | rank for rank in ranks])


def rank_environments(processes: int, nodes: int, node: int, meeting: Meeting) -> list[dict[str, str]]:
    """The variables by which torch.distributed knows each rank of this node."""
    return [
        {
            "RANK": str(node * processes + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(nodes * processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": meeting.address,
            "MASTER_PORT": str(meeting.port),
        }
        for local_rank in range(processes)
    ]


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run the command once per environment until all processes end, or one fails; then the others are ended too."""
    processes = [subprocess.Popen(command, env=environment) for environment in environments]
    try:
        while not any(codes := [process.poll() for process in processes]) and None in codes:
            time.sleep(0.05)
        return exit_code_of([code for code in codes if code])
    finally:
        _end(processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    signal_all([process.pid for process in processes if process.poll() is None], signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_code_of(failures: Sequence[int]) -> int:
    """The code of the rank at fault; 0 without failures. A rank that only lost another one (75) is not at fault."""
    at_fault = [code for code in failures if code != TransientError.exit_code]
    return next(iter([*at_fault, *failures]), 0)


def error_of(code: int) -> type[PipelineError]:
    """The class of error that a rank's exit code stands for: its own, or TransientError for a rank that was killed."""
    if code < 0:
        return TransientError
    return next((error for error in BY_NAME.values() if error.exit_code == code), StageError)
