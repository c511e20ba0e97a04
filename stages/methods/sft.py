"""Method - SFT: likelihood of the ground truth."""

from __future__ import annotations

from typing import Literal

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, weighted_sum
from stages.models.lazy import torch


class SFT(Method):
    SOURCE = "maximum likelihood"
    NEEDS = frozenset[str]()
    SIDES = ("chosen",)
    PAIRING = "truth"

    class Config(MethodConfig):
        """No setting."""

        name: Literal["sft"] = "sft"

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""token_loss = -log pi(y), a mean per token over the whole step.

        Shapes: logps and weights [B, T] of one response a row -> token_loss [B].

        >>> from stages.methods.base import Responses
        >>> rows = Pairs(Responses.unpadded([[-1.0, -0.5]]))  # B = 1, T = 2
        >>> result = SFT.pair_loss(SFT.Config(), rows)
        >>> result.token_loss, result.share(num_rows=1, num_tokens=2)
        (tensor([1.5000]), tensor(0.7500))
        """
        nll = -weighted_sum(pairs.chosen.logps, pairs.chosen)
        return PairLoss(torch.zeros_like(nll), single_metrics(pairs), nll)
