"""Tasks - several workers on one artifact: start them, watch, retry a failed shard once, name one that fails again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_contracts import lease
from data_contracts.config import Config
from data_contracts.errors import ConfigError
from stages.execute import LOCK_HELD, REMOTE
from stages.running.claims import WORKER, forget, poison, raise_poison, starts
from stages.running.history import EVENTS
from stages.stage import STAGES
from tasks.execution.base import Executor, Work, perform
from tasks.execution.config import ExecutionConfig
from tasks.execution.engines import executor_for
from tasks.launch import Progress, run_stage


def run_work(
    stage: str,
    config: Config,
    directory: Path,
    store: Any,
    execution: ExecutionConfig,
    lock: int,
    log: Callable[[str], None],
    on_progress: Callable[[Progress], None],
) -> None:
    """Have the stage's spec in `directory` worked off where `execution` says; the caller holds the artifact's lock,
    and looks at the result.

    Raises: what `run_stage` raises; StageError for shards that failed twice.
    """
    runtime = getattr(config, "runtime", None)
    name = f"{directory.parent.name}-{directory.name}"
    env = {LOCK_HELD: name, **lease.inherited_environment(name), **execution.env, **getattr(runtime, "env", {})}
    arguments = (stage, str(directory / "spec.json"))
    python, timeout = getattr(runtime, "python", None), getattr(runtime, "timeout_seconds", None)
    workers = execution.workers_of(stage)
    if execution.profile == "local" and workers == 1:
        run_stage(
            arguments,
            log_file=directory / "stage.log",
            log=log,
            on_progress=on_progress,
            python=python,
            env=env,
            inherit=[lock],
            timeout=timeout,
        )
        return
    if execution.profile != "local":
        env[REMOTE] = "1"
    executor = executor_for(execution, store, log, [lock])
    gpus = execution.gpus_of(stage, config)
    base = Work(
        f"{stage}-{directory.name[:8]}",
        arguments,
        directory / "stage.log",
        env,
        python,
        gpus,
        getattr(runtime, "num_nodes", 1),
        timeout,
    )
    progress = Progress()

    def tick() -> None:
        num_done, total = _shards(directory)
        progress.done, progress.total, progress.unit = num_done, total, "shards"
        on_progress(progress)

    if STAGES[stage].is_sharded and workers > 1:
        _share(executor, base, workers, directory, log, tick)
        base = base._replace(gpus=0)  # what is left is to look at the whole and sign
    (error,) = perform(executor, [base], tick)
    if error is not None:
        raise error


def _share(
    executor: Executor, base: Work, workers: int, directory: Path, log: Callable[[str], None], tick: Callable[[], None]
) -> None:
    """Workers until every shard is made, or has failed twice."""
    logs = directory / ".workers"
    logs.mkdir(exist_ok=True)
    forget(directory)
    works = [
        base._replace(
            name=f"{base.name}-w{number}",
            log_file=logs / f"{number}.log",
            env=base.env | {WORKER: f"{number}/{workers}"},
        )
        for number in range(workers)
    ]
    with open(directory / EVENTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "share", "time": time.time(), "workers": workers}) + "\n")
    tried = 0

    def again(work: Work, error: Exception) -> bool:
        """A worker that was lost over a shard is replaced, for there may be more; one that was lost before its first
        shard would be again.
        """
        nonlocal tried
        log(f"{work.name} failed: {str(error).splitlines()[0]}")
        before, tried = tried, starts(directory)
        num_done, total = _shards(directory)
        return not isinstance(error, ConfigError) and tried > before and (num_done < total or not total)

    failures = [error for error in perform(executor, works, tick, again=again) if error is not None]
    if refused := [error for error in failures if isinstance(error, ConfigError)]:
        raise refused[0]
    if poisoned := poison(directory):
        raise_poison(base.arguments[0], poisoned)
    if len(failures) == workers:  # whoever ends well leaves nothing undone
        raise failures[0]


def _shards(directory: Path) -> tuple[int, int]:
    """How many of the planned shards are there."""
    try:
        plan = json.loads((directory / ".plan").read_text())
    except (OSError, ValueError):
        return 0, 0
    return len(list(directory.glob("part-?????.parquet"))), max(1, -(-plan["items"] // plan["size"]))
