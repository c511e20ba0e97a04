"""Method - KTO: single responses labelled good or bad, measured against the policy's drift on mismatched prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, weighted_sum
from stages.models.lazy import torch
from stages.models.numerics import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class KTO(Method):
    VERSION = "1"
    SOURCE = "Ethayarajh et al. 2024, Eq. 7-8 (arXiv:2402.01306)"
    NEEDS = frozenset({"reference", "mismatched", "win_rates"})
    SIDES = ("chosen",)
    PAIRING = "each"
    DROP_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, both labels at weight 1."""

        name: Literal["kto"] = "kto"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        lam_d: float = Field(1.0, ge=0)
        """Weight of desirable responses; lam_d n_d : lam_u n_u should be 1-4/3."""
        lam_u: float = Field(1.0, ge=0)
        """Weight of undesirable responses."""

    @staticmethod
    def step_values(config: Config, pairs: Pairs) -> dict[str, Tensor]:
        """Log-ratio of each mismatched pair: prompt and a response that belongs to another one."""
        return {"mismatched_log_ratio": masked_sum(pairs.mismatched.log_ratio(), pairs.mismatched.mask)}

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = lam_d (1 - sigmoid(beta (LR - z0))) or lam_u (1 - sigmoid(beta (z0 - LR))).

        z0 = max(0, mean log-ratio of mismatched responses), over the whole optimizer step and without gradient. A response is desirable
        where its win rate is at least 1/2. Shapes: see Pairs, one response a row. Returns: unreduced loss [B]. At policy = reference
        with weights 1: 1/2.
        """
        z0 = pairs.step["mismatched_log_ratio"].clamp_min(0)
        desirable = pairs.win_rate_chosen >= 0.5
        reward = config.beta * weighted_sum(pairs.chosen.log_ratio(), pairs.chosen)
        gain = reward - config.beta * z0
        loss = torch.where(desirable, config.lam_d * torch.sigmoid(-gain), config.lam_u * torch.sigmoid(gain))
        return PairLoss(loss, single_metrics(pairs, rewards=reward, desirable=desirable, z0=z0.expand_as(reward)))
