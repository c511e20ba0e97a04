"""Tasks - the engine `local`: processes of this machine, children of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from data_contracts.errors import ConfigError
from data_contracts.store import Store
from tasks.execution.base import Work
from tasks.execution.config import ExecutionConfig
from tasks.execution.gpus import some_gpus, visible_gpus
from tasks.launch import StageProcess


class Local:
    """This machine. inherit: file descriptors (locks) that the processes keep open."""

    def __init__(
        self, execution: ExecutionConfig, store: Store, log: Callable[[str], None], inherit: Sequence[int] = ()
    ):
        self.log, self.inherit = log, inherit
        self.handles: list[LocalHandle] = []

    def start(self, work: Work) -> LocalHandle:
        if work.nodes > 1:
            raise ConfigError(
                f"{work.name} asks for {work.nodes} nodes, and the profile local has one machine: set "
                "execution.profile to process-pool, kubernetes, ray or slurm, or start the other nodes by hand "
                "(docs/cluster.md)"
            )
        # `start` blocks until GPUs are free. Those of works started before it never would be: `perform` polls only
        # afterwards.
        needed = work.gpus + sum(handle.gpus for handle in self.handles if not handle.is_over)
        visible = len(visible_gpus(work.env)) if needed else 0
        if needed > visible:
            raise ConfigError(
                f"the workers of {work.name.rpartition('-w')[0] or work.name} ask for {needed} GPUs or more at once, "
                f"and this machine shows {visible}: lower execution.workers or execution.gpus, or choose a "
                "profile with more machines"
            )
        self.handles.append(LocalHandle(work, self.log, self.inherit))
        return self.handles[-1]


class LocalHandle:
    """A stage's process tree, with its GPUs."""

    def __init__(self, work: Work, log: Callable[[str], None], inherit: Sequence[int]):
        self.failure: Exception | None = None
        self.gpus, self.is_over = work.gpus, False
        with ExitStack() as stack:
            pinned = stack.enter_context(some_gpus(work.gpus, log, work.env))
            self.stage = StageProcess(
                work.arguments,
                log_file=work.log_file,
                log=log,
                python=work.python,
                env=work.env | pinned,
                inherit=inherit,
                timeout=work.timeout,
            )
            stack.callback(self.stage.end)
            self.resources = stack.pop_all()

    def has_ended(self) -> bool:
        if self.is_over:
            return True
        try:
            if not self.stage.wait(0):
                return False
        except Exception as error:  # it ran too long, and is ended like any other
            self.failure = error
        self.cancel()
        return True

    def error(self) -> Exception | None:
        if self.failure is None:
            try:
                self.stage.check()
            except Exception as error:
                self.failure = error
        return self.failure

    def cancel(self) -> None:
        self.is_over = True
        self.resources.close()
