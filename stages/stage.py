"""Stages - what a stage is, and the table of all stages.

A stage reads finished artifacts and writes exactly one new artifact; nothing is passed in memory. `python -m stages
NAME SPEC.json` is the same command that a task and a human type.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from data_contracts.artifact import ArtifactRef
from data_contracts.config import Config, Runtime, parse
from data_contracts.errors import ConfigError
from data_contracts.identity import fingerprint
from data_contracts.redaction import without_secrets
from stages.registry import entry_points_of


def check_variables(env: dict[str, str]) -> dict[str, str]:
    """Return variables that a process can be started with. Raises: ValueError for others."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(
                f"{name!r} cannot be an environment variable: a name has no `=`, and neither name nor value has a NUL"
            )
    return env


class StageRuntime(Runtime):
    """How a stage is executed; shared by all of them."""

    python: str | None = None
    """Path of the interpreter that runs the stage, e.g. of an environment that has vLLM. None: the orchestrator's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if torch sees one."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment variables for the stage process. CUDA_VISIBLE_DEVICES says among which GPUs to choose."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Stop the stage after so long; None: never."""

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: dict[str, str]) -> dict[str, str]:
        return check_variables(env)

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        return without_secrets(env)


class Stage(NamedTuple):
    """One line of the table of stages: what a stage reads and writes, and where its code is."""

    name: str
    version: str
    """Bumped when the meaning of the output changes; the source is never hashed."""
    produces: str
    consumes: dict[str, str]
    """Input name -> artifact kind; a trailing "?" marks an optional input."""
    target: str
    """"module" with a `Config` class and `run(job)`; and perhaps `key_additions(config, inputs)`, see `settings`."""
    section: str
    """Field of the run config that holds its settings."""
    phase: str
    """Column of a comparison's table of seconds: generation, scoring, weights, training or evaluation."""
    unit: str
    """What its seconds grow with: candidates, pairs, or answers."""
    is_sharded: bool = True
    """Whether several workers can share its shards."""
    after: str | None = None
    """Set for a stage that makes another artifact of the kind it reads: the stage whose output it refines in every
    iteration.
    """

    def load(self) -> Any:
        """Return the stage's module."""
        return importlib.import_module(self.target)

    def parse(self, config: Any) -> Config:
        """Return plain data as settings of the stage; settings pass through. Raises: ConfigError."""
        if isinstance(config, Config):
            return config
        return parse(self.load().Config, config, f"settings of the stage {self.name}")

    def settings(self, config: Config, inputs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
        """Return the settings that enter the key: the config's identity and what the module's `key_additions` gives.

        An addition is a version for some inputs only: where a stage has come to read a certain kind of model otherwise,
        artifacts of all other models stay found.
        """
        key_additions = getattr(self.load(), "key_additions", None)
        if key_additions is None:
            return config.identity()
        return config.identity() | key_additions(config, inputs)

    def key(self, config: Config, inputs: Mapping[str, ArtifactRef]) -> str:
        """Return the key of the artifact that these settings and inputs make."""
        contents = {name: ref.content for name, ref in inputs.items()}
        return fingerprint(self.name, self.version, self.settings(config, inputs), contents)

    def check_inputs(self, inputs: Mapping[str, ArtifactRef]) -> None:
        """Raises: ConfigError for a missing, unknown or wrong kind of input."""
        kinds = {name.rstrip("?"): kind for name, kind in self.consumes.items()}
        needed = {name for name in self.consumes if not name.endswith("?")}
        if missing := needed - inputs.keys():
            raise ConfigError(f"the stage {self.name} got no input {', '.join(sorted(missing))}: name it in the spec")
        for name, ref in inputs.items():
            if name not in kinds:
                raise ConfigError(f"the stage {self.name} knows no input {name!r}; it takes {sorted(kinds)}")
            if ref.kind != kinds[name]:
                raise ConfigError(f"the stage {self.name} takes {kinds[name]} as {name!r}, got {ref.kind} {ref.key}")


class Stages(dict[str, Stage]):
    """The stages of this package by name, in the order of an iteration; others are looked up by name.

    Another package declares an entry point in the group `selfplay.stages` whose value is a `Stage`.
    """

    def __missing__(self, name: str) -> Stage:
        for point in entry_points_of("stages"):
            if point.name == name:
                return point.load()
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        try:
            return self[str(name)] is not None
        except KeyError:
            return False


EARLIER = tuple(f"earlier_policy_{number}" for number in range(1, 8))
"""Inputs of the weigh stage: the policies before the current one, newest first (MNPO)."""
MODELS = ("reference", "policy", "teacher", "positive", "negative", "reward_model", *EARLIER)
STAGES = Stages(
    (stage.name, stage)
    for stage in (
        Stage(
            "sample",
            version="1",
            produces="generations",
            consumes={"prompts": "prompts", "policy": "checkpoint"},
            target="stages.sampling.stage",
            section="sampling",
            phase="generation",
            unit="candidates",
        ),
        Stage(
            "score",
            version="1",
            produces="scored_pairs",
            consumes={
                "prompts": "prompts",
                "generations?": "generations",
                "policy?": "checkpoint",
                "start?": "checkpoint",
            },
            target="stages.scoring.stage",
            section="scoring",
            phase="scoring",
            unit="candidates",
        ),
        Stage(
            "weigh",
            version="1",
            produces="weighted_pairs",
            consumes={"pairs": "scored_pairs", "prompts?": "prompts"} | {f"{role}?": "checkpoint" for role in MODELS},
            target="stages.weighting.stage",
            section="weighting",
            phase="weights",
            unit="pairs",
        ),
        Stage(
            "train",
            version="1",
            produces="checkpoint",
            consumes={
                "pairs": "weighted_pairs",
                "more_pairs?": "weighted_pairs",
                "policy": "checkpoint",
                "reference?": "checkpoint",
                "teacher?": "checkpoint",
                "start?": "checkpoint",
            },
            target="stages.training.stage",
            section="training",
            phase="training",
            unit="pairs",
            is_sharded=False,
        ),
        Stage(
            "evaluate",
            version="1",
            produces="eval_report",
            consumes={
                "prompts": "prompts",
                "generations": "generations",
                "policy": "checkpoint",
                "start": "checkpoint",
            },
            target="stages.evaluation.stage",
            section="evaluation",
            phase="evaluation",
            unit="answers",
            is_sharded=False,
        ),
    )
)
