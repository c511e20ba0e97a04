"""Method - SPIN: the ground truth against the policy's own generation; the reference is the previous iterate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, hinge, logistic, preference_margin
from stages.models.lazy import torch


class SPIN(Method):
    VERSION = "1"
    PAIRING = "truth_vs_generation"
    SOURCE = "Chen et al. 2024, Eq. 4.7 (arXiv:2401.01335)"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1 (the official code uses 5.0 in its last iteration), logistic loss."""

        name: Literal["spin"] = "spin"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature (the paper's lambda); 0.1 in the official code."""
        loss: Literal["logistic", "hinge", "exponential", "squared"] = "logistic"
        """l(t) = log(1 + e^-t), max(0, 1 - t), e^-t or (1 - t)^2."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (LR(truth) - LR(generation))); logistic is DPO with these pairs.

        Shapes: see Pairs. Returns: unreduced loss [B].
        """
        margin, metrics = preference_margin(pairs, config.beta)
        return PairLoss(_LOSSES[config.loss](margin), metrics)


_LOSSES = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": lambda margin: torch.exp(-margin),
    "squared": lambda margin: (1 - margin) ** 2,
}
