"""Flows - the settings of a warm start: a training on the prompts' own responses, before self-play begins."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from data_contracts.config import Config
from stages.methods import METHODS
from stages.registry import Named


class WarmStartConfig(Config):
    """How the start model is trained on the `response` of every training prompt. The defaults are those of the alignment
    handbook's fine-tuning, but for the batch (128 there). All that is not here (adapter, arithmetic, clipping, hardware)
    is `training`'s.
    """

    method: Annotated[Named, METHODS] = Field(default_factory=lambda: METHODS.config("sft"), validate_default=True)
    """A method of single responses that needs no other model: sft."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak rate."""
    epochs: int = Field(1, ge=1, le=10_000)
    batch_size: int = Field(64, ge=1)
    """Responses per optimizer step."""
    optimizer: Literal["rmsprop", "adamw"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Part of the steps in which the rate rises."""

    @field_validator("method")
    @classmethod
    def _trains_on_given_responses(cls, method: Named) -> Named:
        spec = METHODS.get(method.name)
        needs = sorted(spec.needs(method))
        is_single = spec.sides(method) == ("chosen",)
        if needs or not is_single:
            reason = f"needs {', '.join(needs)}" if is_single else "trains on pairs"
            raise ValueError(
                f"{method.name} {reason}; a warm start trains on one given response per prompt and knows no other model: "
                "set warm_start.method to {name: sft}"
            )
        return method
