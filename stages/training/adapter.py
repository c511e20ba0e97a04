"""Stages - the adapter of a training: where it begins, what the reference is beside it, and how it is kept.

The frozen weights are the start model's in `training.dtype`; factors, gradients and optimizer are float32 and all that
DeepSpeed's optimizer sees. A reference that must be in memory is the same model with the adapter off, or with the
adapter that the iteration began with: one model is held, whatever the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.adapter import ADAPTER, adapter_in, base_content, is_adapter_only, read_adapter_config
from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError
from stages.models.adapters import (
    REFERENCE,
    adapter_checkpoint,
    add_adapter,
    import_peft,
    load_adapter,
    merge,
    save_adapter,
    switched,
)
from stages.models.lazy import torch
from stages.models.policy import QUANTISED, load_causal_lm
from stages.training.streams import hash_seed

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

    from stages.training.config import AdapterConfig, TrainingConfig


class TrainedAdapter:
    """The adapter that a training moves, inside its policy."""

    def __init__(self, config: TrainingConfig, policy: str, start: str | None, device: str):
        """policy: what is trained, a model or a checkpoint with an adapter of the model `start`."""
        assert config.adapter is not None
        self.config, self.settings = config, config.adapter
        self.base = start or policy
        dtype = QUANTISED + config.dtype if self.settings.name == "qlora" else config.dtype
        self.policy = load_causal_lm(self.base, dtype, device)
        self.policy.requires_grad_(False)
        torch.manual_seed(config.seed)  # the first factor of a new adapter is random
        adapter = adapter_in(policy) if start is not None else None
        if adapter is None:
            add_adapter(self.policy, lora_config(self.settings))
        else:
            check_same_shape(self.settings, adapter)
            load_adapter(self.policy, adapter)
        self.reference: str | None = None
        """Name of the adapter that is the reference; None: none, the base model is."""

    def hold_reference(self, directory: str) -> None:
        """Let `as_reference` mean the model of a directory: the base model, or a checkpoint of its adapter.

        Raises: ConfigError for any other model.
        """
        if Path(directory).resolve() == Path(self.base).resolve():
            return
        adapter = adapter_in(directory)
        if adapter is None:
            raise ConfigError(
                f"the reference {directory} is another model than {self.base}, which the adapter belongs to, and would "
                "have to be held beside it: set reference to iterate or start, or train without training.adapter"
            )
        load_adapter(self.policy, adapter, REFERENCE)
        self.reference = REFERENCE

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model with the reference's adapter in effect, without gradients."""
        with switched(self.policy, self.reference), torch.no_grad():
            yield self.policy

    def state(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Return what a checkpoint to resume from keeps: the trained parameters. In place of DeepSpeed's own."""
        return {name: value.data for name, value in self.policy.named_parameters() if value.requires_grad}

    def seed_dropout(self, step: int, rank: int) -> None:
        """Make the dropout of a step depend on nothing but its number and the rank: a resumed training repeats it."""
        if self.settings.dropout:
            torch.manual_seed(hash_seed(self.config.seed, step, rank))

    def export(self, directory: Path) -> None:
        """Write the adapter and, unless the settings say otherwise, the base model's float32 weights merged with it.

        Raises: ContractError if a weight is not finite.
        """
        save_adapter(self.policy, directory / ADAPTER)
        if self.settings.save_merged:
            merge(self.base, directory / ADAPTER, directory, self.config.save_dtype)
        else:
            adapter_checkpoint(self.base, directory)


def lora_config(settings: AdapterConfig) -> LoraConfig:
    """Return the settings by peft's names."""
    return import_peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if settings.targets == "auto" else list(settings.targets),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
    )


def check_same_shape(settings: AdapterConfig, adapter: Path) -> None:
    """Raises: ConfigError if a stored adapter cannot be gone on with under these settings."""
    stored = read_adapter_config(adapter)
    expected = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
    }
    for name, value in expected.items():
        if stored.get(name) != value:
            raise ConfigError(
                f"the adapter in {adapter} has {name} {stored.get(name)}, and training.adapter says {value}: set it so, "
                "or start a new adapter with training.adapter.continue: false"
            )


def check_adapters(config: TrainingConfig, inputs: Mapping[str, ArtifactRef]) -> None:
    """Compare the adapters among a training's inputs with the model that they shall belong to.

    Raises: ConfigError for an adapter of another base model.
    """
    start = inputs.get("start")
    if start is None and "policy" in inputs and is_adapter_only(inputs["policy"].path):
        raise ConfigError(
            f"the policy ({inputs['policy'].path}) keeps an adapter and no weights: give the model it belongs to as the "
            "input `start` and train with training.adapter, or keep merged weights (training.adapter.save_merged)"
        )
    if config.adapter is None or start is None:
        return
    for role in ("policy", "reference"):
        ref = inputs.get(role)
        adapter = adapter_in(ref.path) if ref is not None else None
        if ref is None or ref.content == start.content:
            continue
        if adapter is None or base_content(adapter) != start.content:
            raise ConfigError(
                f"the {role} ({ref.path}) has no adapter of the model {start.path}: set training.adapter.continue: "
                "false, which starts a new adapter on the policy"
            )
