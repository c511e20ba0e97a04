"""Tasks - the engine Ray: one task per piece of work and node, on a running cluster. The only file that imports ray."""

# ray is no dependency: it is installed where the profile is used.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError, TransientError
from data_contracts.installation import import_paths
from data_contracts.store import Store
from tasks.execution.base import Work
from tasks.execution.config import ExecutionConfig
from tasks.execution.remote import Request, at_fault, run_request


class RayTasks:
    """A Ray cluster. Raises: ConfigError if ray is not installed, or the cluster cannot be reached."""

    def __init__(
        self, execution: ExecutionConfig, store: Store, log: Callable[[str], None], inherit: Sequence[int] = ()
    ):
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "execution.profile is ray, and this interpreter has no ray: pip install ray, on every node"
            ) from None
        self.ray, self.execution, self.store = ray, execution, store
        if not ray.is_initialized():
            try:
                ray.init(
                    execution.address,
                    runtime_env={"env_vars": import_paths()},
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"no Ray cluster at {execution.address!r} ({str(error).splitlines()[0]}): start one with "
                    "`ray start --head`"
                ) from None

    def start(self, work: Work) -> RayHandle:
        """Start a piece of work. Raises: ConfigError if no node has so many GPUs, or the cluster too few nodes."""
        largest = max((node["Resources"].get("GPU", 0) for node in self.ray.nodes() if node["Alive"]), default=0)
        if work.gpus > largest:
            raise ConfigError(
                f"{work.name} asks for {work.gpus} GPUs on a node; the largest node of the Ray cluster has {largest:g}"
            )
        alive = sum(node["Alive"] for node in self.ray.nodes())
        if work.nodes > alive:
            raise ConfigError(f"{work.name} asks for {work.nodes} nodes; the Ray cluster has {alive}")
        return RayHandle(self.ray, work, self.store)


class RayHandle:
    """One piece of work: a task for each of its nodes."""

    def __init__(self, ray: Any, work: Work, store: Store):
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.ray, self.request = ray, Request(work, store.root)
        self.group = None
        if work.nodes > 1:
            self.group = placement_group([{"CPU": 1, "GPU": work.gpus}] * work.nodes, strategy="STRICT_SPREAD")
        # max_retries=0: the run decides whether a lost task is tried again.
        remote = ray.remote(num_cpus=1, num_gpus=work.gpus, max_retries=0)(_run)
        self.tasks = []
        for rank in range(work.nodes):
            strategy: Any = "SPREAD"  # workers on the same node would leave the others' memory and network idle
            if self.group is not None:
                strategy = PlacementGroupSchedulingStrategy(self.group, rank)
            task = remote.options(name=work.name, scheduling_strategy=strategy)
            self.tasks.append(task.remote(str(self.request.path), self.request.token, rank))

    def has_ended(self) -> bool:
        ready, waiting = self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)
        for rank in range(len(self.tasks)):
            self.request.check_clock(rank)
        return self.request.is_settled(not waiting, any(self._failure(task) is not None for task in ready))

    def _failure(self, task: Any) -> Exception | None:
        """The exception that a finished task raised, or None."""
        try:
            self.ray.get(task, timeout=0)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                return error.cause
            return error
        except self.ray.exceptions.RayError as error:
            return error
        return None

    def error(self) -> Exception | None:
        return at_fault(self._error_of(rank, self._failure(task)) for rank, task in enumerate(self.tasks))

    def _error_of(self, rank: int, failure: Exception | None) -> Exception | None:
        if failure is None or isinstance(failure, ConfigError):
            return failure
        return self.request.error(rank, f"Ray says {type(failure).__name__}") or TransientError(str(failure))

    def cancel(self) -> None:
        for task in self.tasks:
            self.ray.cancel(task, force=True)
        if self.group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self.group)
        self.request.remove()


def _run(path: str, token: str, rank: int) -> None:
    """Run a request on a node of the cluster; Ray sets CUDA_VISIBLE_DEVICES."""
    run_request(Path(path), token, rank)
