"""Method - REBEL: regress the log-ratio difference of two own answers to the difference of their rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, preference_margin


class REBEL(Method):
    VERSION = "1"
    SOURCE = "Gao et al. 2024, in the scaling of its code (arXiv:2404.16767)"
    NEEDS = frozenset({"reference", "scores"})

    class Config(MethodConfig):
        """Vetted setting: eta 1, the code's for chat at a learning rate of 1e-7."""

        name: Literal["rebel"] = "rebel"
        eta: float = Field(1.0, gt=0)
        """Nats of log-ratio per unit of reward; 1.0, or 1e6 in the code's large-batch runs."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = (LR(y_1) - LR(y_2) - eta (r_1 - r_2))^2; which of the two is called chosen does not matter.

        Shapes: see Pairs. Returns: unreduced loss [B]. At policy = reference: (eta (r_1 - r_2))^2.
        Deviates from the paper: (1) multiplied by eta^2, as its code.
        """
        margin, metrics = preference_margin(pairs, 1.0)
        return PairLoss((margin - config.eta * (pairs.score_chosen - pairs.score_rejected)) ** 2, metrics)
