"""Tasks - the execution engines by profile; an engine's library is imported only when its profile is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from data_contracts.errors import ConfigError
from data_contracts.store import Store
from stages.registry import entry_points_of

if TYPE_CHECKING:
    from tasks.execution.base import Executor
    from tasks.execution.config import ExecutionConfig

ENGINES = {
    "local": "tasks.execution.local:Local",
    "process-pool": "tasks.execution.pool:Pool",
    "kubernetes": "tasks.execution.pool:Pool",
    "ray": "tasks.execution.ray_tasks:RayTasks",
    "slurm": "tasks.execution.slurm:Slurm",
}
"""Profile -> "module:Class", called as Class(execution, store, log, inherit).

Another package adds an engine by an entry point in the group `selfplay.engines`."""


def profiles() -> list[str]:
    """The names of all engines, those of other packages last."""
    return [*ENGINES, *sorted(entry_points_of("engines").names - ENGINES.keys())]


def executor_for(
    execution: ExecutionConfig, store: Store, log: Callable[[str], None], inherit: Sequence[int]
) -> Executor:
    """The engine of the run's profile.

    log: takes lines for people. inherit: file descriptors (locks) that processes on this machine keep open.
    Raises: ConfigError if the engine is not installed or cannot be reached.
    """
    targets = {point.name: point.value for point in entry_points_of("engines")} | ENGINES
    module, _, name = targets[execution.profile].partition(":")
    try:
        engine = getattr(importlib.import_module(module), name)
    except Exception as error:  # another package's module may fail in any way
        raise ConfigError(
            f"the engine {execution.profile!r} ({targets[execution.profile]}) does not load: {type(error).__name__}: "
            f"{error}"
        ) from error
    return engine(execution, store, log, inherit)
