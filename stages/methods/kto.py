"""Method - KTO: single responses labelled good or bad, measured against the policy's drift on mismatched prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, supplied, weighted_sum
from stages.models.lazy import torch
from stages.models.numerics import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class KTO(Method):
    SOURCE = "Ethayarajh et al. 2024, Eq. 7-8 (arXiv:2402.01306)"
    NEEDS = frozenset({"reference", "mismatched", "win_rates"})
    SIDES = ("chosen",)
    PAIRING = "each"

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
        return mismatched_log_ratio(pairs)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = lam_d (1 - sigmoid(beta (LR - z0))) or lam_u (1 - sigmoid(beta (z0 - LR))).

        z0 = max(0, mean log-ratio of mismatched responses), over the whole optimizer step and without gradient. A
        response is desirable where its win rate is at least 1/2.
        Shapes: logps, reference_logps and weights [B, T] of one response a row, win rates [B] -> loss [B].
        At policy = reference with weights 1: 1/2.

        >>> from stages.methods.base import Responses
        >>> side = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> drift = {"mismatched_log_ratio": torch.tensor(0.2)}
        >>> rows = Pairs(side, win_rate_chosen=torch.tensor([0.8]), step_means=drift)
        >>> KTO.pair_loss(KTO.Config(), rows).loss  # 1 - sigmoid(0.1 (0.6 - 0.2))
        tensor([0.4900])
        """
        z0 = pairs.step_means["mismatched_log_ratio"].clamp_min(0)
        desirable = supplied(pairs.win_rate_chosen, "win_rates") >= 0.5
        reward = config.beta * weighted_sum(pairs.chosen.log_ratio(), pairs.chosen)
        gain = reward - config.beta * z0
        loss = torch.where(desirable, config.lam_d * torch.sigmoid(-gain), config.lam_u * torch.sigmoid(gain))
        return PairLoss(loss, single_metrics(pairs, rewards=reward, desirable=desirable, z0=z0.expand_as(reward)))


def mismatched_log_ratio(pairs: Pairs) -> dict[str, Tensor]:
    """Log-ratio [B] of each prompt with the response of another row, by its name in Pairs.step_means."""
    side = supplied(pairs.mismatched, "mismatched")
    return {"mismatched_log_ratio": masked_sum(side.log_ratio(), side.mask)}
