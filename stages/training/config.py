"""Stages - the settings of the train stage."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from data_contracts.config import Config
from data_contracts.shard_rows import ShardRows
from stages.methods import METHODS
from stages.registry import Named
from stages.stage import StageRuntime


class TrainingRuntime(StageRuntime):
    num_processes: int = Field(1, ge=1)
    """Ranks on each node, one GPU each (gloo on the CPU, nccl on GPUs)."""
    num_nodes: int = Field(1, ge=1)
    """Machines with `num_processes` ranks each; the same command runs on each of them (docs/cluster.md)."""
    collective_timeout_seconds: float = Field(1800, gt=0)
    """A rank gives up after waiting so long for the others in one operation; loading and checkpoints take minutes."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO: 1 cuts the optimizer state over the ranks, 2 the gradients too, 3 the weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory (ZeRO 1-3)."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens per micro-batch: the setting that bounds memory. A micro-batch holds at least one pair."""
    packing: bool = True
    """Compute a prompt once for its responses, without padding, where model and method allow. Moves last bits."""
    max_first_margin: float = Field(0.3, gt=0)
    """Nats of |margin| at step 1 from which the stage warns where the reference is the policy itself: both should be one
    function there, and bf16 makes them two (docs/performance.md)."""
    may_leave_a_side: bool = False
    """Whether a method of single responses may read one side of pairs. The run sets it for the models that weigh for
    TIS-DPO (S), which are fine-tuned on chosen or on rejected responses; elsewhere an unread response is refused."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more work, far less memory."""
    save_every_seconds: float = Field(900, ge=0)
    """Save a checkpoint to resume from after so long: at most this much work is lost when training is killed."""
    save_every_steps: int | None = Field(None, ge=1)
    """Save after so many steps too."""


class AdapterConfig(Config):
    """Low-rank factors that are trained in place of the weights, which stay frozen (stages/models/adapters.py)."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    name: Literal["lora", "qlora"] = "lora"
    """lora: the frozen weights in training.dtype; qlora: in 4 bits (NF4, by bitsandbytes). Factors and optimizer are
    float32."""
    rank: int = Field(16, ge=1)
    """Columns of each factor."""
    alpha: float = Field(32.0, gt=0)
    """The product of the factors is scaled by alpha / rank."""
    targets: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of the layers that get factors, e.g. [q_proj, v_proj]; auto: all linear layers but the head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what the factors read, while training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    use_dora: bool = False
    """Train the length of each row of the weights apart from its direction (DoRA)."""
    goes_on: bool = Field(True, alias="continue")
    """true: every iteration trains the same adapter of the start model; false: a new one on the merged policy."""
    save_merged: bool = True
    """false: checkpoints keep the adapter alone; samplers and log-prob passes load the start model with it."""

    @model_validator(mode="after")
    def _has_a_base(self) -> AdapterConfig:
        if self.targets != "auto" and not all(self.targets or [""]):
            raise ValueError("targets names no layer: give names such as [q_proj, v_proj], or auto")
        if not self.goes_on and not self.save_merged:
            raise ValueError(
                "continue: false starts each adapter on the merged policy, and save_merged: false keeps none"
            )
        return self


class TrainingConfig(Config):
    """Optimisation. Vetted (SPPO, SPIN): RMSprop, lr 5e-7, batch 64, linear with 10 % warm-up, clip 1."""

    NEUTRAL: ClassVar[dict[str, Any]] = {"checkpoints": (), "adapter": None, "warmup_steps": None}

    method: Annotated[Named, METHODS] = Field(default_factory=lambda: METHODS.config("sppo"), validate_default=True)
    """The loss, by name, with its settings. Set for you from the run's `method`."""
    adapter: AdapterConfig | None = None
    """Train low-rank factors instead of the weights, e.g. {name: lora, rank: 16}. None: all weights."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak rate."""
    epochs: int = Field(1, ge=1, le=10_000)
    batch_size: int = Field(64, ge=1)
    """Pairs per optimizer step, over all ranks and micro-batches."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    schedule_epochs: int | None = Field(None, ge=1, le=10_000)
    """Epochs that the schedule spans, if more than are run (SPPO's paper: 18, of which the first). None: `epochs`."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Part of the steps in which the rate rises: in equal steps to the peak, from the first update on."""
    warmup_steps: int | None = Field(None, ge=0)
    """Updates in which the rate rises, whatever their part of the training (DPO's code and its forks: 150). None:
    `warmup_ratio` says."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm; 0: never."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic; bfloat16 keeps float32 master weights."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights of the checkpoint. bfloat16 is half the size, and rounds away updates of less than 0.4 %."""
    seed: int = 0
    """Order of the pairs."""
    checkpoints: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Also keep the policy after these parts of the steps, in `steps/`; the run goes on from the best one (SPPO)."""
    runtime: TrainingRuntime = TrainingRuntime()

    def warmup_of(self, planned: int) -> int:
        """Updates of `planned` in which the rate rises."""
        return round(self.warmup_ratio * planned) if self.warmup_steps is None else self.warmup_steps

    @property
    def has_warmup(self) -> bool:
        return bool(self.warmup_ratio if self.warmup_steps is None else self.warmup_steps)

    @model_validator(mode="after")
    def _schedule_spans_the_training(self) -> TrainingConfig:
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise ValueError(
                f"training.schedule_epochs is {self.schedule_epochs} and training.epochs {self.epochs}: the schedule "
                "would end before the training does. Set schedule_epochs to as many at least, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _whole_on_each_rank(self) -> TrainingConfig:
        if self.adapter is not None and self.runtime.zero_stage == 3:
            raise ValueError(
                "training.adapter needs the whole model on each rank, and ZeRO 3 cuts it up: set runtime.zero_stage to "
                "0, 1 or 2, which cut up the adapter's state"
            )
        return self


class TrainingInputs(NamedTuple):
    """The directories of the train stage's inputs; None: not given."""

    pairs: str
    policy: str
    more_pairs: str | None = None
    reference: str | None = None
    teacher: str | None = None
    start: str | None = None
    """The model that the policy's adapter belongs to; None: an adapter starts on the policy itself."""

    def rows(self) -> ShardRows:
        """The weighted pairs of all inputs. Raises: ArtifactError if a directory holds none."""
        directories = [self.pairs] if self.more_pairs is None else [self.pairs, self.more_pairs]
        return ShardRows(directories, "weighted_pairs")
