"""Stages - how fast a training is: tokens per second, and on GPUs the part of their peak that model FLOPs make up (MFU).

    MFU = 6 N t / (s p n),  N parameters, t tokens in s seconds, p peak FLOP/s of a GPU, n GPUs; 4 N with an adapter

(PaLM, appendix B, without attention's part; as in stages/running/cost.py). t counts every response with its prompt, as
the records do: packing, which computes a shared prompt once, shows as higher utilisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.models.lazy import torch
from stages.running.cost import TRAIN, TRAIN_ADAPTER, parameters
from stages.running.gpus import peak_flops

if TYPE_CHECKING:
    from stages.training.batches import WeightedPair
    from stages.training.config import TrainingConfig

SPEEDS = ("tokens_per_second", "mfu")


class Speed:
    """The speed of the steps of one training."""

    def __init__(self, policy: str, dtype: str, device: str, world_size: int, per_parameter: int = TRAIN):
        self.flops_per_token = per_parameter * parameters(policy)
        peak = None
        if device == "cuda" and dtype == "bfloat16":
            peak = peak_flops(torch.cuda.get_device_name())
        self.peak = None if peak is None else peak * world_size
        """FLOP/s of all ranks; None: not known, as of a CPU."""

    def of(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return the numbers of SPEEDS that can be told."""
        rate = tokens / max(seconds, 1e-9)
        speed = {"tokens_per_second": rate}
        if self.peak is not None:
            speed["mfu"] = self.flops_per_token * rate / self.peak
        return speed


def train_flops(config: TrainingConfig) -> int:
    """Return the FLOPs per parameter and token of a training: frozen weights need no gradient of their own."""
    return TRAIN if config.adapter is None else TRAIN_ADAPTER


def sequence_tokens(rows: Sequence[WeightedPair], sides: Sequence[str]) -> int:
    """Return the tokens of all responses, each with its prompt."""
    return sum(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in sides if row[f"{side}_ids"])


def mean_speed(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the speed over all steps: each counts by its seconds."""
    means = {}
    for name in SPEEDS:
        measured = [step for step in steps if name in step]
        if seconds := sum(step["seconds"] for step in measured):
            means[name] = sum(step[name] * step["seconds"] for step in measured) / seconds
    return means
