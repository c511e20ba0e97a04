"""Stages - the optimizer of a training (torch's own on the CPU, fused kernels on GPUs) and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from stages.training.config import TrainingConfig

FAR_STEP = 1e9
"""Adam's bias correction, 1 - beta2^step, is 1 at this step."""


class FusedRMSprop(torch.optim.RMSprop):
    """RMSprop by the fused kernel of Adam: one kernel for all weights, where torch's own update takes seven.

    With beta1 = 0 Adam's first moment is the gradient, and after many steps its bias correction is 1:

        v <- alpha v + (1 - alpha) g^2,  w <- w - lr g / (sqrt(v) + eps),  g with weight_decay w added

    which is RMSprop without momentum. The gradient lies where the kernel writes the first moment, so no state is
    added: state_dict() is that of torch's RMSprop.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient. The gradients are overwritten where weights decay."""
        for group in self.param_groups:
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            squares: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, weights, gradients, squares, [], [], steps)
            if not weights:
                continue
            for step in steps:
                step += 1
            far = torch.full((), FAR_STEP, dtype=torch.float32, device=weights[0].device)
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
                weights,
                gradients,
                gradients,
                squares,
                [],
                [far] * len(weights),
                lr=group["lr"],
                beta1=0.0,
                beta2=group["alpha"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def make_optimizer(config: TrainingConfig, parameters: Iterable[Parameter], device: str) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if device == "cuda":
        return FusedRMSprop(parameters, **options)
    return torch.optim.RMSprop(parameters, **options)


def make_schedule(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning rates of a training of `num_steps` updates.

    With W warm-up steps of the T that the schedule spans, update t = 0, 1, ... has the peak rate times

        (t + 1) / W for t < W, so that the first update moves; then, with u = (t - W) / (T - W),
        1 - u (linear), (1 + cos(pi u)) / 2 (cosine), or 1 (constant_with_warmup)
    """
    planned = num_steps * (config.schedule_epochs or config.epochs) // config.epochs
    warmup = config.warmup_of(planned)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, planned - warmup)
        if config.schedule == "linear":
            return max(0.0, 1.0 - done)
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
