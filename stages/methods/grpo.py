"""Method - GRPO: clipped policy gradient with rewards centred in each prompt's group, and a KL penalty per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, supplied
from stages.methods.preferences import group_advantages
from stages.models.lazy import torch
from stages.models.numerics import masked_mean

if TYPE_CHECKING:
    import numpy as np


class GRPO(Method):
    SOURCE = "Shao et al. 2024, Eq. 3-4 (arXiv:2402.03300)"
    NEEDS = frozenset({"reference", "old_policy", "advantage"})
    SIDES = ("chosen",)
    PAIRING = "each"
    WEIGHTS = None
    REFERENCE = "start"

    class Config(MethodConfig):
        """Vetted setting: beta 0.04, clip 0.2, with groups of 8 at a learning rate of 1e-6."""

        name: Literal["grpo"] = "grpo"
        eps_low: float = Field(0.2, ge=0, lt=1)
        """How far the probability ratio may fall below 1 before its gradient stops."""
        eps_high: float = Field(0.2, ge=0)
        """How far it may rise above 1."""
        beta: float = Field(0.04, ge=0)
        """Weight of the KL penalty; 0-0.1."""
        ddof: Literal[0, 1] = 1
        """Degrees of freedom taken off in the group's standard deviation; 1 is the sample's, as in TRL."""
        advantage_eps: float = Field(1e-4, ge=0)
        """Added to the standard deviation: a group of equal rewards has advantage 0."""

    @staticmethod
    def row_values(config: Config, scores: np.ndarray, win_rates: np.ndarray) -> dict[str, np.ndarray]:
        """A_i = (r_i - mean r) / (std r + eps) of a prompt's K candidates. [K] -> [K]."""
        return {"advantage": group_advantages(scores, config.ddof, config.advantage_eps)}

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = mean_t [ -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + beta k3 ].

        rho = pi / pi_old, k3 = e^d - d - 1 with d = log pi_ref - log pi.
        Shapes: logps, old_logps and reference_logps [B, T] of one response a row, advantage A [B] -> loss [B], a mean
        over the response's tokens.
        On-policy: -A + beta k3.

        >>> from stages.methods.base import Responses
        >>> side = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.0, -0.5]])  # B = 1, T = 2
        >>> rows = Pairs(side._replace(old_logps=side.logps - 0.1), values={"advantage": torch.tensor([2.0])})
        >>> GRPO.pair_loss(GRPO.Config(), rows).loss  # rho = e^0.1 is inside the clip: -2 e^0.1
        tensor([-2.2103])
        """
        side, advantage = pairs.chosen, pairs.values["advantage"].unsqueeze(-1)
        old_logps = supplied(side.old_logps, "old_policy")
        reference_logps = supplied(side.reference_logps, "reference")
        zero = torch.zeros((), dtype=side.logps.dtype, device=side.logps.device)
        # Masked before exp: what padding holds must reach neither the value nor the gradient.
        ratio = torch.exp(torch.where(side.mask, side.logps - old_logps, zero))
        clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        gap = torch.where(side.mask, reference_logps - side.logps, zero)
        k3 = torch.expm1(gap) - gap
        is_clipped = (ratio * advantage > clipped * advantage).to(ratio.dtype)
        metrics = {"clipped": masked_mean(is_clipped, side.mask), "kl": masked_mean(k3, side.mask)}
        return PairLoss(masked_mean(config.beta * k3 - gain, side.mask), single_metrics(pairs, **metrics))
