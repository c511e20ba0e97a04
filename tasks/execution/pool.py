"""Tasks - the engine Prefect: a run of the deployment `stage-work` per piece of work and node, in a work pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Crashed, Pending

from data_contracts.errors import ConfigError, TransientError
from data_contracts.store import Store
from tasks.execution.base import Work
from tasks.execution.config import ExecutionConfig
from tasks.execution.remote import Request, at_fault

LOOK_EVERY_SECONDS = 1.0


class Pool:
    """A work pool. Raises: ConfigError if the server has no such pool, or no deployment of `stage-work` in it."""

    def __init__(
        self, execution: ExecutionConfig, store: Store, log: Callable[[str], None], inherit: Sequence[int] = ()
    ):
        self.execution, self.store, self.log = execution, store, log
        self.deployment = f"stage-work/{execution.pool}"
        kind = {"process-pool": "process", "kubernetes": "kubernetes"}[execution.profile]
        with get_client(sync_client=True) as client:
            try:
                pool = client.read_work_pool(execution.pool)
            except ObjectNotFound:
                raise ConfigError(
                    f"there is no work pool {execution.pool!r}: make it with `prefect work-pool create "
                    f"{execution.pool} --type {kind}` (the server asked is {client.api_url.host}:{client.api_url.port})"
                ) from None
            if pool.type != kind:
                raise ConfigError(
                    f"the work pool {execution.pool!r} is of type {pool.type}, and the profile {execution.profile} "
                    f"wants {kind}: set execution.pool to a pool of that type"
                )
            try:
                client.read_deployment_by_name(self.deployment)
            except ObjectNotFound:
                file = {"process": "deploy/prefect/work.yaml", "kubernetes": "deploy/kubernetes/prefect.yaml"}[kind]
                raise ConfigError(
                    f"there is no deployment {self.deployment}: `prefect --no-prompt deploy --prefect-file {file} "
                    "--all` makes it for the pool that the file names"
                ) from None

    def start(self, work: Work) -> PoolHandle:
        return PoolHandle(work, self)


class PoolHandle:
    """One piece of work: a flow run for each of its nodes."""

    def __init__(self, work: Work, pool: Pool):
        self.request, self.pool = Request(work, pool.store.root), pool
        self.states: dict[UUID, State] = {}
        """Flow run -> the state that was read last."""
        self.next_look, self.began = 0.0, time.monotonic()
        variables = dict(pool.execution.job_variables)
        if pool.execution.profile == "kubernetes":
            variables.setdefault("gpu_count", work.gpus)
        self.runs: list[UUID] = []
        for rank in range(work.nodes):
            run: Any = run_deployment(  # decorated: the type checker sees a coroutine
                pool.deployment,
                parameters={"request": str(self.request.path), "token": self.request.token, "rank": rank},
                flow_run_name=work.name if work.nodes == 1 else f"{work.name}-node{rank}",
                timeout=0,
                job_variables=variables or None,
            )
            self.runs.append(run.id)

    def has_ended(self) -> bool:
        if time.monotonic() < self.next_look:
            return False
        self.next_look = time.monotonic() + LOOK_EVERY_SECONDS
        with get_client(sync_client=True) as client:
            for rank, run in enumerate(self.runs):
                self.request.check_clock(rank)
                self.states[run] = client.read_flow_run(run).state or Pending()
        waiting = [run for run in self.runs if self.states[run].is_scheduled() or self.states[run].is_pending()]
        execution = self.pool.execution
        if waiting and time.monotonic() - self.began > execution.start_timeout_seconds:
            raise TransientError(
                f"{self.request.work.name} has waited {execution.start_timeout_seconds:.0f} s for a worker of the pool "
                f"{execution.pool!r}: start one (`prefect worker start --pool {execution.pool}`), or raise "
                "execution.start_timeout_seconds"
            )
        ended = [rank for rank in range(len(self.runs)) if self._node_has_ended(rank)]
        failed = any(self.error_of(rank) is not None for rank in ended)
        return self.request.is_settled(len(ended) == len(self.runs), failed)

    def _node_has_ended(self, rank: int) -> bool:
        """Whether a node's part is over. A worker that dies with its machine leaves its run Running: ask the store."""
        if self.states[self.runs[rank]].is_final():
            return True
        return self.request.read("outcome", rank) is not None or self.request.is_lost(rank)

    def error_of(self, rank: int) -> Exception | None:
        """Why a node's part failed, or None."""
        state = self.states[self.runs[rank]]
        if state.is_completed():
            return None
        message = state.message or ""
        if self.request.read("outcome", rank) is None and "ConfigError: " in message:
            return ConfigError(message.partition("ConfigError: ")[2])
        return self.request.error(rank, f"its flow run is {state.name} ({message or 'no reason given'})")

    def error(self) -> Exception | None:
        return at_fault(self.error_of(rank) for rank in range(len(self.runs)) if self._node_has_ended(rank))

    def cancel(self) -> None:
        try:
            with get_client(sync_client=True) as client:
                for rank, run in enumerate(self.runs):
                    state = self.states.get(run)
                    if self.request.is_lost(rank):
                        client.set_flow_run_state(run, Crashed(message="its process is gone"), force=True)
                    elif (state is None or not state.is_final()) and self.request.read("outcome", rank) is None:
                        client.set_flow_run_state(run, Cancelling(), force=True)
        except Exception as error:  # of any kind: the work stops by itself once the run's lock is free
            self.pool.log(f"could not cancel {self.request.work.name}: {error}")
        self.request.remove()
