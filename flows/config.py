"""Flows - the settings of a whole run: the sections of the stages, the models, the prompts. Composed here, defined beside their code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config, parse, read_yaml
from data_contracts.errors import ConfigError
from stages.evaluation.stage import EvaluationConfig
from stages.methods import METHODS
from stages.sampling.stage import SamplingConfig
from stages.scoring.stage import ScoringConfig
from stages.training.stage import TrainingConfig
from stages.weighting.stage import WeightingConfig

NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


class PromptsConfig(Config):
    """Which prompts train and which measure. JSONL; see data_contracts/prompts.py."""

    train: str
    """Path of the training prompts."""
    heldout: str
    """Path of the prompts that measure; none of them may be in `train`, not even nearly."""
    per_iteration: int | None = Field(None, ge=1)
    """Prompts of an iteration. None: all of them divided by the iterations (SPPO), or all with `reuse`."""
    reuse: bool = False
    """Every iteration trains on the same prompts (SPIN, SWIFT) instead of a part of its own (SPPO)."""
    duplicate_similarity: float = Field(0.8, gt=0, le=1)
    """Word 3-gram Jaccard similarity from which a held-out prompt counts as being in the training set."""


class RunConfig(Config):
    """One self-play run. Hand-written files say only what differs from the defaults; the resolved form is kept in the records."""

    name: str = Field(pattern=NAME, max_length=60)
    """Lower case, digits, dashes: names the run in the store, in Prefect and in MLflow."""
    policy: ModelRef
    """The start model; each iteration's checkpoint is the next policy."""
    iterations: int = Field(3, ge=1, le=1000)
    seed: int = 0
    """Seeds sampling, prompt parts and training order."""
    prompts: PromptsConfig
    method: METHODS.field()
    """The loss and its settings, e.g. {name: sppo}."""
    sampling: SamplingConfig = SamplingConfig()
    scoring: ScoringConfig
    weighting: WeightingConfig = WeightingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig
    heldout_sampling: SamplingConfig | None = None
    """How held-out answers are drawn. None: like `sampling`, one answer per prompt."""

    @model_validator(mode="after")
    def _one_place_each(self) -> RunConfig:
        for section, field in (("training", "method"), ("training", "seed"), ("sampling", "seed"), ("heldout_sampling", "seed")):
            part = getattr(self, section)
            if part is not None and getattr(part, field) != type(part).model_fields[field].get_default(call_default_factory=True):
                raise ValueError(f"{section}.{field} is set by the run's own `{field}`: remove it there")
        if self.scoring.pairing in (None, "best_vs_worst") and METHODS.get(self.method.name).PAIRING == "best_vs_worst" and self.sampling.num_candidates < 2:
            raise ValueError("pairs of the best and the worst candidate need sampling.num_candidates >= 2")
        return self

    def sampling_for_training(self) -> SamplingConfig:
        return self.sampling.model_copy(update={"seed": self.seed})

    def sampling_for_heldout(self) -> SamplingConfig:
        """The held-out seed does not depend on the iteration: policies are compared on common random numbers."""
        base = self.heldout_sampling or self.sampling.model_copy(update={"num_candidates": 1})
        return base.model_copy(update={"seed": self.seed})

    def scoring_for_pairs(self) -> ScoringConfig:
        return self.scoring.model_copy(update={"pairing": self.scoring.pairing or METHODS.get(self.method.name).PAIRING})

    def training_for(self, iteration: int) -> TrainingConfig:
        return self.training.model_copy(update={"method": self.method, "seed": self.seed})


def load_run(path: Path | str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A run config from YAML. `overrides`: dotted keys, e.g. {"training.learning_rate": 1e-6}. Raises: ConfigError."""
    data = read_yaml(path)
    for key, value in (overrides or {}).items():
        _set(data, key, value)
    return parse(RunConfig, data, os.fspath(path))


def parse_assignment(text: str) -> tuple[str, Any]:
    """`training.learning_rate=1e-6` -> ("training.learning_rate", 1e-06); the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override looks like section.field=value, got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of the override {text!r} is not valid YAML: {error}") from None


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"the override {dotted!r} goes through {parent!r}, which is not a section")
    data[last] = value
