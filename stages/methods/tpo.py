"""Method - TPO and TPO-L: a reference-free pair loss, held in place by the likelihood of a third, gold response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import (
    Method,
    MethodConfig,
    PairLoss,
    Pairs,
    logistic,
    mean_weights,
    preference_margin,
)
from stages.models.numerics import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class TPO(Method):
    VERSION = "1"
    SOURCE = "Saeidi et al. 2024, triple preference optimisation (arXiv:2405.16681)"
    NEEDS = frozenset()
    DROP_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, alpha 1 (ours). TPO-L: length_normalised, beta 10, gamma 3."""

        name: Literal["tpo"] = "tpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature; 0.01-0.5 on sums, 2-10 on means."""
        alpha: float = Field(1.0, ge=0)
        """Weight of the gold response's negative log-likelihood."""
        length_normalised: bool = False
        """TPO-L: mean instead of summed log-probabilities."""
        gamma: float = Field(0.0, ge=0)
        """Target margin of TPO-L, absolute; 0-5."""

    @staticmethod
    def token_count(config: Config, pairs: Pairs) -> Tensor:
        return (pairs.gold or pairs.chosen).mask.sum(-1)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (log pi(y_w) - log pi(y_l)) - gamma), token_loss = -alpha log pi(y_gold).

        Shapes: see Pairs; `gold` None means the chosen response. Returns: unreduced losses [B]; the likelihood is a mean per token
        over the whole step. Token weights act on the preference term only.
        """
        chosen, rejected, gold = pairs.chosen, pairs.rejected, pairs.gold or pairs.chosen
        mean = (mean_weights(chosen), mean_weights(rejected)) if config.length_normalised else None
        margin, metrics = preference_margin(pairs, config.beta, mean, (chosen.logps, rejected.logps), -config.gamma)
        return PairLoss(logistic(margin), metrics, -config.alpha * masked_sum(gold.logps, gold.mask))
