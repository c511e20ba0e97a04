"""Method - TPO and TPO-L: a reference-free pair loss, held in place by the likelihood of a third, gold response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, mean_weights, preference_margin
from stages.models.numerics import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class TPO(Method):
    SOURCE = "Saeidi et al. 2024, triple preference optimisation (arXiv:2405.16681)"
    NEEDS = frozenset[str]()
    DROPS_IDENTICAL = False

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

        Shapes: logps and weights [B, T] of both sides, logps of `gold` [B, T'] (None: the chosen response) -> loss and
        token_loss [B]; the likelihood is a mean per token over the whole step. Token weights act on the preference term
        only.

        >>> from stages.methods.base import Responses
        >>> chosen, rejected = Responses.unpadded([[-1.0, -0.5]]), Responses.unpadded([[-2.0]])  # B = 1, T = 2 and 1
        >>> result = TPO.pair_loss(TPO.Config(), Pairs(chosen, rejected, gold=Responses.unpadded([[-0.4]])))
        >>> result.loss, result.token_loss  # l(0.1 (-1.5 + 2)), 0.4
        (tensor([0.6685]), tensor([0.4000]))
        """
        chosen, rejected = pairs.both()
        gold = pairs.gold or chosen
        means = None
        if config.length_normalised:
            means = (mean_weights(chosen), mean_weights(rejected))
        margin, metrics = preference_margin(pairs, config.beta, means, (chosen.logps, rejected.logps), -config.gamma)
        return PairLoss(logistic(margin), metrics, -config.alpha * masked_sum(gold.logps, gold.mask))
