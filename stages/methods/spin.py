"""Method - SPIN: the ground truth against the policy's own generation; the reference is the previous iterate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, hinge, logistic, preference_margin
from stages.models.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class SPIN(Method):
    SOURCE = "Chen et al. 2024, Eq. 4.7 (arXiv:2401.01335)"
    PAIRING = "truth_vs_generation"

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

        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference: log 2 (logistic), else 1.

        >>> from stages.methods.base import Responses
        >>> truth = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> generation = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> SPIN.pair_loss(SPIN.Config(loss="hinge"), Pairs(truth, generation)).loss  # 1 - 0.1 (0.6 + 0.1)
        tensor([0.9300])
        """
        margin, metrics = preference_margin(pairs, config.beta)
        return PairLoss(_LOSSES[config.loss](margin), metrics)


def _exponential(margin: Tensor) -> Tensor:
    return torch.exp(-margin)


def _squared(margin: Tensor) -> Tensor:
    return (1 - margin) ** 2


_LOSSES = {"logistic": logistic, "hinge": hinge, "exponential": _exponential, "squared": _squared}
