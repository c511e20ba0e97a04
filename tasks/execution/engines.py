"""Tasks - the execution engine of each profile; an engine's library is imported only when its profile is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_contracts.store import Store
from tasks.execution.base import Executor
from tasks.execution.config import ExecutionConfig


def executor_for(
    execution: ExecutionConfig, store: Store, log: Callable[[str], None], inherit: Sequence[int]
) -> Executor:
    """The engine of the run's profile.

    log: takes lines for people. inherit: file descriptors (locks) that local processes keep open.
    Raises: ConfigError if the engine is not installed or cannot be reached.
    """
    profile = execution.profile
    if profile == "local":
        from tasks.execution.local import Local

        return Local(log, inherit)
    if profile in ("process-pool", "kubernetes"):
        from tasks.execution.pool import Pool

        return Pool(execution, store, log)
    if profile == "ray":
        from tasks.execution.ray_tasks import RayTasks

        return RayTasks(execution, store, log)
    from tasks.execution.slurm import Slurm

    return Slurm(execution, store, log)
