"""Tasks - the engine Ray: a task with `num_gpus` per worker, on a cluster that exists. The one file that imports ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError, TransientError
from data_contracts.store import Store
from tasks.execution.base import Work
from tasks.execution.config import ExecutionConfig
from tasks.execution.remote import Request, at_fault, do
from tasks.launch import python_path


class RayTasks:
    def __init__(self, execution: ExecutionConfig, store: Store, log: Callable[[str], None]):
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
                    runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"no Ray cluster at {execution.address!r} ({str(error).splitlines()[0]}): start one with `ray start --head`"
                ) from None

    def start(self, work: Work) -> RayHandle:
        """Raises: ConfigError if no node has so many GPUs."""
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
    def __init__(self, ray: Any, work: Work, store: Store):
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.ray, self.request = ray, Request(work, store.root)
        self.group = (
            placement_group([{"CPU": 1, "GPU": work.gpus}] * work.nodes, strategy="STRICT_SPREAD")
            if work.nodes > 1
            else None
        )
        # max_retries 0: what a lost task means is decided by whoever asked.
        remote = ray.remote(num_cpus=1, num_gpus=work.gpus, max_retries=0)(_run)
        self.tasks = []
        for rank in range(work.nodes):
            # SPREAD: workers beside each other on one node would leave the others' memory and network idle.
            place = "SPREAD" if self.group is None else PlacementGroupSchedulingStrategy(self.group, rank)
            self.tasks.append(
                remote.options(name=work.name, scheduling_strategy=place).remote(
                    str(self.request.path), self.request.token, rank
                )
            )

    def has_ended(self) -> bool:
        ready, waiting = self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)
        for rank in range(len(self.tasks)):
            self.request.check_clock(rank)
        return self.request.is_settled(not waiting, any(self._failure(task) is not None for task in ready))

    def _failure(self, task: Any) -> Exception | None:
        try:
            self.ray.get(task, timeout=0)
        except self.ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
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
    """On a node of the cluster; CUDA_VISIBLE_DEVICES is set by Ray."""
    do(Path(path), token, rank)
