"""Method - ORPO: supervised fine-tuning on the chosen response plus the log-odds ratio against the rejected one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, Responses, logistic, pair_metrics
from stages.models.lazy import torch
from stages.models.numerics import masked_mean, masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class ORPO(Method):
    SOURCE = "Hong et al. 2024, Eq. 6-7 (arXiv:2403.07691)"
    NEEDS = frozenset[str]()
    WEIGHTS = None
    DROPS_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: lam 0.1."""

        name: Literal["orpo"] = "orpo"
        lam: float = Field(0.1, ge=0)
        """Weight of the odds-ratio term (TRL calls it beta); 0.05-0.5."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = lam l(log odds(y_w) - log odds(y_l)), token_loss = -log pi(y_w).

        odds = p / (1 - p) with p = exp(mean_t log pi(y_t)).
        Shapes: logps [B, T] of both sides -> loss and token_loss [B]; the likelihood is a mean over the response's
        tokens of the whole step (TRL's covers the prompt too).

        >>> chosen = Responses.unpadded([[-0.6931, -0.6931]])  # B = 1, T = 2: p = 1/2, odds 1
        >>> rejected = Responses.unpadded([[-1.3863]])  # p = 1/4, odds 1/3
        >>> result = ORPO.pair_loss(ORPO.Config(), Pairs(chosen, rejected))
        >>> result.loss, result.token_loss  # 0.1 l(log 3), 2 log 2
        (tensor([0.0288]), tensor([1.3862]))
        """
        chosen, rejected = pairs.both()
        odds_chosen, odds_rejected = _log_odds(chosen), _log_odds(rejected)
        nll = -masked_sum(chosen.logps, chosen.mask)
        metrics = pair_metrics(pairs, config.lam * odds_chosen, config.lam * odds_rejected)
        return PairLoss(config.lam * logistic(odds_chosen - odds_rejected), metrics, nll)


def _log_odds(side: Responses) -> Tensor:
    """log p - log(1 - p), [B]. Probability 1 has infinite odds: the mean is kept one rounding step below 0."""
    mean = masked_mean(side.logps, side.mask).clamp_max(-torch.finfo(side.logps.dtype).eps)
    # log(1 - e^x): each form is exact where the other cancels.
    near = torch.log(-torch.expm1(mean.clamp_min(-math.log(2))))
    far = torch.log1p(-torch.exp(mean.clamp_max(-math.log(2))))
    return mean - torch.where(mean > -math.log(2), near, far)
