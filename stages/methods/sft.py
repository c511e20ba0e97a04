"""Method - SFT: likelihood of the ground truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, weighted_sum
from stages.models.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class SFT(Method):
    VERSION = "1"
    SOURCE = "maximum likelihood"
    NEEDS = frozenset()
    SIDES = ("chosen",)
    PAIRING = "truth"
    DROP_IDENTICAL = False

    class Config(MethodConfig):
        """No setting."""

        name: Literal["sft"] = "sft"

    @staticmethod
    def token_count(config: Config, pairs: Pairs) -> Tensor:
        return pairs.chosen.mask.sum(-1)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""token_loss = -log pi(y), a mean per token over the whole step.

        Shapes: see Pairs, one response a row. Returns: unreduced losses [B].
        """
        nll = -weighted_sum(pairs.chosen.logps, pairs.chosen)
        return PairLoss(torch.zeros_like(nll), single_metrics(pairs), nll)
