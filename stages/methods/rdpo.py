"""Method - R-DPO: DPO with a length term inside, so that a longer winner needs less of a margin."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin


class RDPO(Method):
    VERSION = "1"
    SOURCE = "Park et al. 2024, length-regularised DPO (arXiv:2403.19159)"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, alpha 0.05 (ours; the sources give none)."""

        name: Literal["rdpo"] = "rdpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        alpha: float = Field(0.05, ge=0)
        """Nats of margin per token of length difference; 0.005-0.1."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (LR(chosen) - LR(rejected)) + alpha (T_w - T_l)).

        Shapes: see Pairs. Returns: unreduced loss [B]. At policy = reference and equal lengths: log 2.
        """
        longer = (pairs.chosen.mask.sum(-1) - pairs.rejected.mask.sum(-1)).to(pairs.chosen.logps.dtype)
        margin, metrics = preference_margin(pairs, config.beta, offset=config.alpha * longer)
        return PairLoss(logistic(margin), metrics)
