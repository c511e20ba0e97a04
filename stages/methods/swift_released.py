"""Method - SWIFT as its code was released, for comparison only: other weights, read one token late, scaled to sum 100."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin


class SWIFTReleased(Method):
    VERSION = "1"
    PAIRING = "truth_vs_generation"
    WEIGHTS = "swift_released"
    SOURCE = "SWIFT's released code (commit 45d8acc), not its paper"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, which the weights' sum of 100 makes beta 10 on a weighted mean; compare with `spin_lengthnorm`."""

        name: Literal["swift_released"] = "swift_released"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature, before the weights' scale."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (sum_t w_t lr_t(y) - sum_t w_t lr_t(y'))); what differs from SWIFT is in the weights `swift_released`.

        Shapes: see Pairs. Returns: unreduced loss [B].
        """
        margin, metrics = preference_margin(pairs, config.beta)
        return PairLoss(logistic(margin), metrics)
