"""Flows - the settings of a whole run: the sections of the stages, the models, the prompts, read from a YAML file.

Sections are composed here and defined beside their code. The file is long (over 350 lines) because it is one class and
the reader of its YAML: every method of `RunConfig` derives one stage's settings from several sections.
"""

from __future__ import annotations

import copy
import glob
import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config, load_yaml, parse, read_yaml
from data_contracts.errors import ConfigError
from data_contracts.installation import provided, provided_beside
from data_contracts.redaction import secret_in
from flows.tournament import TournamentConfig
from flows.warm_start import WarmStartConfig
from stages.evaluation.promotion import GateConfig
from stages.evaluation.stage import EvaluationConfig
from stages.methods import METHODS
from stages.methods.base import Method
from stages.models.turn_settings import TurnConfig
from stages.registry import Named
from stages.sampling.stage import SamplingConfig
from stages.scoring.pairing import PAIRINGS
from stages.scoring.stage import ScoringConfig
from stages.stage import EARLIER, STAGES
from stages.training.stage import TrainingConfig
from stages.training.streams import LIVE_REFERENCE, PADDED
from stages.weighting.stage import WeightingConfig
from stages.weighting.weights import WEIGHTS
from tasks.data.preparation import Reads
from tasks.data.source import PromptsConfig
from tasks.execution.config import ExecutionConfig
from tasks.trackers import TrackingConfig

PATHS = ("path", "file", "train", "heldout", "source")
"""Settings that hold a path, wherever they stand."""
NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


class ModelsConfig(Config):
    """Models beside the policy.

    What a method needs and is not given here is trained by the run itself, as `auxiliary` says.
    """

    teacher: ModelRef | None = None
    """Frozen; for SWIFT's weights (any tokenizer) and for distillation."""
    reward_model: ModelRef | None = None
    """TGDPO: trained on preferences before; the policy's tokenizer."""
    positive: ModelRef | None = None
    """TIS-DPO: pi+."""
    negative: ModelRef | None = None
    """TIS-DPO: pi-."""


class Every(Config):
    """The reference follows the policy in steps (COMAL)."""

    every: int = Field(ge=1)
    """Iterations after which the policy becomes the reference; 1: `iterate`."""


AUXILIARY_METHOD = {"name": "dpo", "beta": 0.1}
REFINABLE = ("sample", "score", "weigh")
"""Stages whose output another package's stage may refine."""
RUN_LEVEL_FIELDS = (("training", "method"), ("training", "seed"), ("sampling", "seed"), ("heldout_sampling", "seed"))
"""(section, field) that a run sets for its stages; they may not be set in the section too."""
TRAINABLE_ROLES = ("positive", "negative", "reward_model")


class RunConfig(Config):
    """One self-play run.

    Hand-written files say only what differs from the defaults; the resolved form is kept in the records.
    """

    name: str = Field(pattern=NAME, max_length=60)
    """Lower case, digits, dashes: names the run in the store, in Prefect and in MLflow."""
    policy: ModelRef
    """The start model; each iteration's checkpoint is the next policy."""
    iterations: int = Field(3, ge=1, le=1000)
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Seeds sampling, prompt parts and training order."""
    prompts: PromptsConfig
    method: Annotated[Named, METHODS]
    """The loss and its settings, e.g. {name: sppo}."""
    reference: Literal["iterate", "start"] | Every | ModelRef | None = None
    """The model that log-ratios are against: iterate, the policy as the iteration finds it; start, the model the run
    began with; {every: k}, the policy of every k-th iteration (COMAL); {path: DIR} or {hub_id: ID}, a fixed model of
    the policy's tokenizer. None: the method's own."""
    history: int | None = Field(None, ge=1, le=len(EARLIER) + 1)
    """How many of the last policies the loss compares with (MNPO), the current one included. None: the method's own."""
    sampling: SamplingConfig = SamplingConfig()
    scoring: ScoringConfig
    weighting: WeightingConfig = WeightingConfig()
    training: TrainingConfig = TrainingConfig()
    warm_start: WarmStartConfig | None = None
    """Train the start model on the training prompts' own responses first, e.g. {method: {name: sft}}; what comes out is
    the policy of iteration 0 and the start model of all that follows. None: `policy` as it is."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Peak rate of each iteration; the last one goes on. Empty: training.learning_rate for all."""
    models: ModelsConfig = ModelsConfig()
    auxiliary: TrainingConfig | None = None
    """How missing positive, negative and reward models are trained on the iteration's pairs (the negative one on
    swapped pairs), by DPO unless `method` says otherwise. None: TIS-DPO (D).
    """
    mix_previous: bool = False
    """From the second iteration on, train on the previous iteration's pairs too, under the new reference (official
    SPIN and SWIFT code).
    """
    evaluation: EvaluationConfig
    gate: GateConfig = GateConfig()
    """Whether a policy that is not better goes on."""
    tournament: TournamentConfig | None = None
    """Win rates between all iterations and other models, by any scorer."""
    refine: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Stages of other packages that make another artifact of the kind they read (a filter of generations, say), by
    name, with their settings; they run in this order, after the stage whose output they read.
    """
    heldout_sampling: SamplingConfig | None = None
    """How held-out answers are drawn. None: like `sampling`, one answer per prompt."""
    execution: ExecutionConfig = ExecutionConfig()
    """Where the work runs. Never changes what comes out."""
    tracking: TrackingConfig = TrackingConfig()
    """Trackers that get a copy beside MLflow. Never changes what comes out."""

    @model_validator(mode="before")
    @classmethod
    def _old_places(cls, data: Any) -> Any:
        """`evaluation.gate` and `evaluation.tournament` are fields of the run now; where they were is still read."""
        evaluation = data.get("evaluation") if isinstance(data, dict) else None
        if not isinstance(evaluation, dict) or not (
            moved := [name for name in ("gate", "tournament") if name in evaluation]
        ):
            return data
        if both := [name for name in moved if name in data]:
            raise ValueError(
                f"`evaluation.{both[0]}` is the old place of `{both[0]}`, which is given too: remove the old one"
            )
        for name in moved:
            warnings.warn(
                f"`evaluation.{name}` is `{name}` now: move it one level up in the run config",
                FutureWarning,
                stacklevel=2,
            )
        remaining = {name: value for name, value in evaluation.items() if name not in moved}
        return data | {name: evaluation[name] for name in moved} | {"evaluation": remaining}

    @field_validator("refine")
    @classmethod
    def _refinements(cls, refine: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in refine.items():
            try:
                stage = STAGES[name]
            except KeyError:
                raise ValueError(f"no stage is called {name!r}, here or in another package") from None
            if stage.after not in REFINABLE:
                raise ValueError(
                    f"the stage {name} comes after none of {', '.join(REFINABLE)}, so it cannot refine their output"
                )
            stage.parse(settings)
        return refine

    @field_validator("auxiliary", mode="before")
    @classmethod
    def _auxiliary_models_are_trained_by_dpo(cls, value: Any) -> Any:
        """Unless it says otherwise: the trainer's own default is the method of a self-play run, which is not what
        TIS-DPO (D) and TGDPO use.
        """
        if isinstance(value, dict):
            return {"method": AUXILIARY_METHOD} | value
        return value

    @model_validator(mode="after")
    def _no_secrets(self) -> RunConfig:
        if name := secret_in(self.model_dump(mode="json")):
            raise ValueError(
                f"{name} holds a key or a password, and settings are written to records, logs and MLflow: export it in "
                "the shell instead (every stage inherits it), and take it out of the settings"
            )
        return self

    @model_validator(mode="after")
    def _one_place_each(self) -> RunConfig:
        for section, field in RUN_LEVEL_FIELDS:
            settings = getattr(self, section)
            if settings is None:
                continue
            default = type(settings).model_fields[field].get_default(call_default_factory=True)
            if getattr(settings, field) != default:
                raise ValueError(f"{section}.{field} is set by the run's own `{field}`: remove it there")
        self._refuse_unread_sides()
        self._refuse_unread_models()
        self._refuse_warm_start_on_pairs()
        if self.spec.WEIGHTS is None and self.weights.name != "ones":
            raise ValueError(
                f"the method {self.method.name} has no place for per-token weights: remove weighting.weights"
            )
        for role in self.roles:
            if role == "teacher" and self.models.teacher is None:
                raise ValueError(f"{self.method.name} with the weights {self.weights.name} needs models.teacher")
        return self

    def _refuse_unread_sides(self) -> None:
        """Raises: ValueError if the method and the pairing do not agree on what a row is."""
        needs, name = PAIRINGS.get(self.pairing), self.method.name
        is_single = self.spec.sides(self.method) == ("chosen",)
        if self.sampling.num_candidates < needs.candidates:
            raise ValueError(f"pairs of candidates ({self.pairing}) need sampling.num_candidates >= 2")
        if is_single and needs.candidates and not needs.is_single:
            raise ValueError(
                f"{name} as set trains on single responses: set scoring.pairing to each or truth, not {self.pairing}"
            )
        if is_single and not needs.is_single:
            raise ValueError(
                f"{name} as set trains on single responses, and pairing {self.pairing} makes pairs, of which "
                "nobody would read the rejected side: set scoring.pairing to truth, with prompts.columns {response: "
                "chosen}"
            )
        if self.pairing == "given_each" and "win_rates" not in self.spec.needs(self.method):
            raise ValueError(
                f"{name} does not tell a bad answer from a good one, and pairing given_each makes rows of both: set "
                "scoring.pairing to truth, with prompts.columns {response: chosen}"
            )
        compared = self.spec.needs(self.method) & {"win_rates", "scores", "advantage", "log_z"}
        if compared and self.pairing == "generations":
            raise ValueError(
                f"{name} reads the {' and '.join(sorted(compared))} of generations, and "
                "pairing generations scores none: set scoring.pairing to each, with a scoring.scorer"
            )
        if not is_single and needs.is_single:
            raise ValueError(f"{name} as set trains on pairs, and pairing {self.pairing} makes single responses")
        if needs.needs_scores and self.scoring.scorer is None:
            raise ValueError(f"pairing {self.pairing} needs scoring.scorer")

    def _refuse_unread_models(self) -> None:
        """Raises: ValueError for a reference or a history that the method does not read."""
        needs, name = self.spec.needs(self.method), self.method.name
        if self.reference is not None and not needs & {"reference", *LIVE_REFERENCE}:
            raise ValueError(f"the method {name} compares with no reference: remove `reference`")
        if len(self.opponents) != self.policies_compared:
            raise ValueError(
                f"the method {name} compares with one policy, and `history` is {self.history}: remove it, or use mnpo"
            )

    def _refuse_warm_start_on_pairs(self) -> None:
        """Raises: ValueError for a warm start whose responses the run does not read, or whose model a role would miss."""
        if self.warm_start is None:
            return
        if not {"chosen", "rejected"}.isdisjoint(PAIRINGS.get(self.pairing).texts):
            raise ValueError(
                f"warm_start trains on the prompts' `response`, and pairing {self.pairing} reads `chosen` and `rejected`: "
                "train the start model in a run of its own (method: {name: sft}) and give its checkpoint as `policy`"
            )
        if self.weighting.positive_system is not None or self.weighting.negative_system is not None:
            raise ValueError(
                "weighting.positive_system and negative_system put questions to `policy` as it is, which warm_start "
                "trains: train it in a run of its own (method: {name: sft}) and give its checkpoint as `policy`"
            )

    @model_validator(mode="after")
    def _adapters_fit(self) -> RunConfig:
        adapter = self.training.adapter
        if adapter is None:
            return self
        rule, name = self.reference_rule, self.method.name
        if self.live_reference and isinstance(rule, ModelRef):
            raise ValueError(
                f"{name} holds its reference while it trains; with training.adapter that is the policy's own model with "
                "the adapter off, so `reference` cannot be another model: set it to iterate or start, or train without"
            )
        if self.live_reference and not adapter.goes_on and rule != "iterate":
            raise ValueError(
                f"{name} holds its reference while it trains, and with training.adapter.continue: false the frozen "
                "weights are the last policy's: set reference: iterate, or continue: true"
            )
        if not adapter.save_merged and self.auxiliary_training().adapter != adapter:
            raise ValueError(
                "auxiliary trains on policies that keep an adapter only: remove auxiliary.adapter (it is then "
                "training.adapter's), or set training.adapter.save_merged: true"
            )
        trains_helpers = any(getattr(self.models, role) is None for role in self.roles if role in TRAINABLE_ROLES)
        if trains_helpers and self.auxiliary_training().runtime.zero_stage == 3:
            raise ValueError(
                "auxiliary trains an adapter too, which ZeRO 3 cannot: set auxiliary.runtime.zero_stage: 2"
            )
        samplings = (self.sampling, self.heldout_sampling or self.sampling)
        if not adapter.save_merged and adapter.use_dora and any(item.backend.name == "vllm" for item in samplings):
            raise ValueError(
                "vLLM serves no adapter with use_dora: set training.adapter.save_merged: true, or another backend"
            )
        return self

    @property
    def reference_rule(self) -> Literal["iterate", "start"] | Every | ModelRef:
        """The run's `reference`, or the method's own."""
        return self.reference or self.spec.REFERENCE

    @property
    def policies_compared(self) -> int:
        """The run's `history`, or the method's own."""
        return self.history or self.spec.HISTORY

    @property
    def opponents(self) -> tuple[float, ...]:
        """Weight of each of the last policies in what the loss compares with, newest first."""
        return self.spec.opponents(self.method, self.policies_compared)

    @property
    def spec(self) -> type[Method]:
        """What the method declares."""
        return METHODS.get(self.method.name)

    @property
    def pairing(self) -> str:
        """How rows are made. A method of single responses that reads their win rates takes given pairs apart (KTO)."""
        pairing = self.scoring.pairing or self.spec.PAIRING
        is_single = self.spec.sides(self.method) == ("chosen",)
        if pairing == "given" and is_single and "win_rates" in self.spec.needs(self.method):
            return "given_each"
        return pairing

    @property
    def reads(self) -> Reads:
        """What the run reads of its training prompts beside the prompt."""
        pairing = PAIRINGS.get(self.pairing)
        if self.warm_start is not None:
            return "response"
        if self.prompts.answers_from_teacher or not pairing.texts:
            return "prompts"
        if "response" in pairing.texts:
            return "response"
        if pairing.is_single:
            return "answers"
        return "pair"

    @property
    def weights(self) -> Any:
        """Settings of the weight provider."""
        return self.weighting.weights or WEIGHTS.config(self.spec.WEIGHTS or "ones")

    @property
    def roles(self) -> list[str]:
        """Models that the run needs beside policy and reference."""
        needs = {need.removesuffix("_unshifted") for need in WEIGHTS.get(self.weights.name).needs(self.weights)}
        if "teacher_logits" in self.spec.needs(self.method) or self.prompts.answers_from_teacher:
            needs.add("teacher")
        return [role for role in ("teacher", *TRAINABLE_ROLES) if role in needs]

    @property
    def baselines(self) -> dict[str, ModelRef]:
        """Models that only play in the tournament."""
        if self.tournament is None:
            return {}
        return self.tournament.baselines

    def settings_of(self, stage: str) -> Config:
        """The section of a stage, as the user wrote it."""
        if stage in self.refine:
            return STAGES[stage].parse(self.refine[stage])
        return getattr(self, STAGES[stage].section)

    def refinements_after(self, stage: str) -> list[tuple[str, Config]]:
        """The `refine` stages that read the output of this one, with their settings."""
        return [(name, self.settings_of(name)) for name in self.refine if STAGES[name].after == stage]

    @property
    def live_reference(self) -> bool:
        """Whether training holds the reference model in memory beside the policy."""
        return bool(self.spec.needs(self.method) & LIVE_REFERENCE)

    def sampling_for_training(self) -> SamplingConfig:
        return self.sampling.model_copy(update={"seed": self.seed})

    def sampling_for_heldout(self) -> SamplingConfig:
        """The held-out seed does not depend on the iteration: policies are compared on common random numbers."""
        base = self.heldout_sampling or self.sampling.model_copy(update={"num_candidates": 1})
        return base.model_copy(update={"seed": self.seed})

    def scoring_for_pairs(self) -> ScoringConfig:
        return self.scoring.model_copy(update={"pairing": self.pairing, **self.turn_settings()})

    def turn_settings(self) -> dict[str, Any]:
        """How conversations become tokens: the sampler's settings are everybody's."""
        return {name: getattr(self.sampling, name) for name in TurnConfig.model_fields}

    def evaluation_of_policies(self) -> EvaluationConfig:
        """How the run's policies are measured: given texts of held-out prompts are tokenised as the sampler would."""
        return self.evaluation.model_copy(update=self.turn_settings())

    def weighting_for_pairs(self) -> WeightingConfig:
        """What the weigh stage must supply, from what the method declares."""
        needs = self.spec.needs(self.method)
        packing = self.training.runtime.packing and not needs & PADDED
        return self.weighting.model_copy(
            update={
                "runtime": self.weighting.runtime.model_copy(update={"packing": packing}),
                "weights": self.weights,
                "dtype": self.training.dtype,
                "quantised": self.training.adapter is not None and self.training.adapter.name == "qlora",
                "reference": "reference" in needs,
                "old_policy": "old_policy" in needs,
                "history": self.opponents if len(self.opponents) > 1 else (),
                "teacher_tokens": "teacher_logits" in needs,
                "drop_identical": self.spec.drops_identical(self.method),
                **(self.turn_settings() if self.writes_prompts_anew else TurnConfig().model_dump()),
            }
        )

    @property
    def writes_prompts_anew(self) -> bool:
        """Whether the weigh stage tokenises prompts: for a teacher, or under another system prompt."""
        needs = WEIGHTS.get(self.weights.name).needs(self.weights) | self.spec.needs(self.method)
        systems = (self.weighting.positive_system, self.weighting.negative_system)
        return bool(needs & {"teacher", "teacher_unshifted", "teacher_logits"}) or systems != (None, None)

    def training_for(self, iteration: int) -> TrainingConfig:
        update: dict[str, Any] = {"method": self.method, "seed": self.seed}
        if self.learning_rates:
            update["learning_rate"] = self.learning_rates[min(iteration, len(self.learning_rates) - 1)]
        return self.training.model_copy(update=update)

    def warm_start_run(self) -> RunConfig:
        """The run of single responses whose one iteration is the warm start: its settings of score, weigh and train.

        An adapter is merged: self-play starts from a whole model.
        """
        assert self.warm_start is not None
        lengths = ("max_response_tokens", "max_total_tokens", "max_drop_rate", "runtime")
        scoring = {name: getattr(self.scoring, name) for name in lengths}
        adapter = self.training.adapter
        if adapter is not None:
            adapter = adapter.model_copy(update={"goes_on": False, "save_merged": True})
        spans = {"schedule_epochs": None, "warmup_steps": None, "checkpoints": ()}
        training = dict(self.warm_start) | spans | {"adapter": adapter}
        update = {
            "method": self.warm_start.method,
            "scoring": ScoringConfig(pairing="truth", **scoring),
            "weighting": WeightingConfig(runtime=self.weighting.runtime),
            "training": self.training.model_copy(update=training),
            "learning_rates": (),
            "reference": None,
            "history": None,
            "warm_start": None,
        }
        return self.model_copy(update=update)

    def auxiliary_training(self) -> TrainingConfig:
        """Settings of the auxiliary trainings. Default: TIS-DPO (D)'s, on the run's own hardware settings."""
        training = self.auxiliary or self.training
        runtime = training.runtime.model_copy(update={"may_leave_a_side": True})
        if self.auxiliary is not None:
            adapter = self.auxiliary.adapter or self.training.adapter
            return self.auxiliary.model_copy(update={"seed": self.seed, "runtime": runtime, "adapter": adapter})
        update = {
            "runtime": runtime,
            "method": METHODS.config(AUXILIARY_METHOD),
            "learning_rate": 1e-5,
            "batch_size": 16,
            "epochs": 1,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "seed": self.seed,
            "checkpoints": (),
        }
        return self.training.model_copy(update=update)


def load_run(
    path: Path | str, overrides: dict[str, Any] | None = None, changes: dict[str, Any] | None = None
) -> RunConfig:
    """A run config from YAML. `overrides`: dotted keys, e.g. {"training.learning_rate": 1e-6}. `changes`: settings
    nested as in the file, merged into it before the overrides.

    A file may begin with `extends: other.yaml` (or a list, later ones win), relative to itself: only what differs is
    written. Other paths in a file are looked for beside it, then in the working directory; those of `overrides` in the
    working directory only. Paths that begin with deploy/ are at last looked for in the installation
    (data_contracts/installation.py). Raises: ConfigError.
    """
    path = provided(os.fspath(path))
    settings = merge(read_run(Path(path)), changes or {})
    return parse(RunConfig, apply(settings, overrides or {}), path)


def apply(data: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`data` with single settings replaced, by dotted name."""
    data = copy.deepcopy(data)
    # Names first: another plug-in's name takes its section's old settings away.
    for key in sorted(overrides, key=lambda key: not key.endswith(".name")):
        _set(data, key, overrides[key])
    return data


def read_run(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file on top of the ones it extends, not yet validated."""
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself, through {', '.join(map(str, seen))}")
    data = _with_paths_beside(path.parent, read_yaml(path))
    parents = data.pop("extends", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(
            f"{path}: `extends` must name a file, or a list of files, relative to this one; got {parents!r}"
        )
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, read_run(provided_beside(path.parent, parent), (*seen, path.resolve())))
    return merge(merged, data)


def _with_paths_beside(directory: Path, value: Any, key: str = "") -> Any:
    """Settings in which a relative path that exists in `directory` is absolute; all others are as they were written."""
    if isinstance(value, dict):
        return {name: _with_paths_beside(directory, item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_paths_beside(directory, item, key) for item in value]
    if key not in PATHS or not isinstance(value, str) or Path(value).is_absolute() or "\0" in value:
        return value
    is_beside = glob.glob(value, root_dir=directory) or (directory / value).exists()
    if not is_beside or Path.cwd().samefile(directory):
        return value
    return str(directory.resolve() / value)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section; a plug-in of another name replaces the one below it as a whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = value
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = merge(old, value)
    return merged


def parse_assignment(text: str) -> tuple[str, Any]:
    """`training.learning_rate=1e-6` -> ("training.learning_rate", 1e-06); the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override looks like section.field=value, got {text!r}")
    return key, load_yaml(value, f"the value of the override {text!r}")


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"the override {dotted!r} goes through {parent!r}, which is not a section")
    if parents and last == "name" and data.get("name", value) != value:
        data.clear()  # as in a file that extends another one: the settings were of another plug-in
    data[last] = value
