"""Method - CPO: DPO without a reference, held in place by the likelihood of the chosen response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin
from stages.models.numerics import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class CPO(Method):
    VERSION = "1"
    SOURCE = "Xu et al. 2024, contrastive preference optimisation (arXiv:2401.08417)"
    NEEDS = frozenset()
    DROP_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, lam 1."""

        name: Literal["cpo"] = "cpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the log-probability difference; 0.01-0.5 is usual."""
        lam: float = Field(1.0, ge=0)
        """Weight of the negative log-likelihood of the chosen response."""

    @staticmethod
    def token_count(config: Config, pairs: Pairs) -> Tensor:
        return pairs.chosen.mask.sum(-1)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (log pi(y_w) - log pi(y_l))), token_loss = -lam log pi(y_w).

        Shapes: see Pairs. Returns: unreduced losses [B]; the likelihood is a mean per token over the whole step, as in TRL.
        Token weights act on the preference term only.
        """
        margin, metrics = preference_margin(pairs, config.beta, log_ratios=(pairs.chosen.logps, pairs.rejected.logps))
        nll = -masked_sum(pairs.chosen.logps, pairs.chosen.mask)
        return PairLoss(logistic(margin), metrics, config.lam * nll)
