"""Method - SWIFT as its code was released, for comparison: other weights, read one token late, scaled to sum 100."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin


class SWIFTReleased(Method):
    SOURCE = "SWIFT's released code (commit 45d8acc), not its paper"
    PAIRING = "truth_vs_generation"
    WEIGHTS = "swift_released"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, which the weights' sum of 100 makes beta 10 on a weighted mean; compare with
        `spin_lengthnorm`."""

        name: Literal["swift_released"] = "swift_released"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature, before the weights' scale."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (sum_t w_t lr_t(y) - sum_t w_t lr_t(y'))).

        The loss is SWIFT's; the weights w of the provider `swift_released` are others.
        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference: log 2.

        >>> from stages.methods.base import Responses
        >>> weights = [[25.0, 75.0]]  # B = 1, T = 2
        >>> truth = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]], weights=weights)
        >>> generation = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]], weights=[[100.0]])
        >>> SWIFTReleased.pair_loss(SWIFTReleased.Config(), Pairs(truth, generation)).loss  # l(0.1 (5 + 30 + 10))
        tensor([0.0110])
        """
        margin, metrics = preference_margin(pairs, config.beta)
        return PairLoss(logistic(margin), metrics)
