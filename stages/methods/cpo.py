"""Method - CPO: DPO without a reference, held in place by the likelihood of the chosen response."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin
from stages.models.numerics import masked_sum


class CPO(Method):
    SOURCE = "Xu et al. 2024, contrastive preference optimisation (arXiv:2401.08417)"
    NEEDS = frozenset[str]()
    DROPS_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, lam 1."""

        name: Literal["cpo"] = "cpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the log-probability difference; 0.01-0.5 is usual."""
        lam: float = Field(1.0, ge=0)
        """Weight of the negative log-likelihood of the chosen response."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (log pi(y_w) - log pi(y_l))), token_loss = -lam log pi(y_w).

        Shapes: logps and weights [B, T] of both sides -> loss and token_loss [B]; the likelihood is a mean per token
        over the whole step, as in TRL. Token weights act on the preference term only.

        >>> from stages.methods.base import Responses
        >>> pairs = Pairs(Responses.unpadded([[-1.0, -0.5]]), Responses.unpadded([[-2.0]]))  # B = 1, T = 2 and 1
        >>> result = CPO.pair_loss(CPO.Config(), pairs)
        >>> result.loss, result.token_loss  # l(0.1 (-1.5 + 2)), 1.5
        (tensor([0.6685]), tensor([1.5000]))
        """
        chosen, rejected = pairs.both()
        margin, metrics = preference_margin(pairs, config.beta, log_ratios=(chosen.logps, rejected.logps))
        nll = -masked_sum(chosen.logps, chosen.mask)
        return PairLoss(logistic(margin), metrics, config.lam * nll)
