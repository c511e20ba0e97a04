"""Tasks - the settings of execution: which engine runs the work, in how many pieces, on what hardware.

No engine is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from data_contracts.config import Runtime
from data_contracts.redaction import without_secrets
from stages.stage import STAGES, check_variables
from tasks.execution.engines import profiles
from tasks.execution.gpus import machine_has_gpus


def _known_profile(name: str) -> str:
    if name not in profiles():
        raise ValueError(f"no engine is called {name!r}; there are {', '.join(profiles())}")
    return name


Profile = Annotated[str, AfterValidator(_known_profile), WithJsonSchema({"type": "string", "enum": profiles()})]
"""The name of an engine (engines.py)."""


class ExecutionConfig(Runtime):
    """Where the work of a run executes. Artifacts are the same under every profile; a run may change it half-way."""

    profile: Profile = "local"
    """local: processes of this machine. process-pool, kubernetes: runs of the flow `stage-work` in a Prefect work pool.

    ray: tasks of a Ray cluster. slurm: sbatch jobs.
    """
    workers: dict[str, int] = Field(default_factory=dict)
    """Shard workers by stage, e.g. {sample: 8, weigh: 4}; 1 for a stage that is not named. Each loads its model once.
    """
    gpus: dict[str, int] = Field(default_factory=dict)
    """GPUs of one worker by stage.

    Not named: sample has its tensor_parallel_size, train its num_processes, others 1; none where nodes have none, or
    this machine under the profile local.
    """
    nodes: int = Field(1, ge=1)
    """Machines there are: what `plan` reckons with."""
    gpus_per_node: int | None = Field(None, ge=0)
    """None: as many as this machine shows."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Of one GPU. None: as this machine shows."""
    host_memory_gib: float | None = Field(None, gt=0)
    """Of one node. None: as this machine has."""
    pool: str = "selfplay-work"
    """process-pool, kubernetes: the work pool."""
    job_variables: dict[str, Any] = Field(default_factory=dict)
    """process-pool, kubernetes: more job variables of the pool's template, e.g. {image: ..., node_selector: {...}}."""
    address: str = "auto"
    """ray: the cluster, e.g. ray://head:10001, or auto for the one this machine belongs to."""
    sbatch: tuple[str, ...] = ()
    """slurm: more options of sbatch, e.g. ["--partition=gpu", "--account=me"]."""
    setup: str = ""
    """slurm: shell lines before the work, e.g. "module load cuda"."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment variables for all work."""
    start_timeout_seconds: float = Field(3600, gt=0)
    """How long work may wait for its place (a queue, a node that comes up) before the run gives up."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        return without_secrets(check_variables(env))

    @model_validator(mode="after")
    def _known_stages(self) -> ExecutionConfig:
        for field, least in (("workers", 1), ("gpus", 0)):
            for name, count in getattr(self, field).items():
                if name not in STAGES:
                    raise ValueError(f"execution.{field}: no stage is called {name!r}; there are {', '.join(STAGES)}")
                if count < least:
                    raise ValueError(f"execution.{field}.{name} must be at least {least}, got {count}")
        for name, stage in STAGES.items():
            if not stage.is_sharded and self.workers_of(name) > 1:
                advice = "; set training.runtime.num_processes and num_nodes" if name == "train" else ""
                raise ValueError(f"execution.workers.{name}: the stage {name} has no shards to share{advice}")
        return self

    def workers_of(self, stage: str) -> int:
        return self.workers.get(stage, 1)

    def gpus_of(self, stage: str, settings: Any) -> int:
        """GPUs of one worker of a stage, by what its own settings say they need."""
        if stage in self.gpus:
            return self.gpus[stage]
        on_cpu = self.gpus_per_node == 0 or getattr(settings.runtime, "device", "auto") == "cpu"
        if on_cpu or (self.profile == "local" and self.gpus_per_node is None and not machine_has_gpus()):
            return 0
        if stage == "train":
            return settings.runtime.num_processes
        backend = getattr(getattr(settings, "backend", None), "runtime", None)
        return getattr(backend, "tensor_parallel_size", 1)
