"""Method - SPIN on mean log-ratios instead of sums: the control that tells SWIFT's token weights from length normalisation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import (
    Method,
    MethodConfig,
    PairLoss,
    Pairs,
    logistic,
    mean_weights,
    preference_margin,
)


class SPINLengthNorm(Method):
    VERSION = "1"
    PAIRING = "truth_vs_generation"
    SOURCE = "control for swift_released, ours; TRL calls the loss sigmoid_norm"

    class Config(MethodConfig):
        """Vetted setting: beta 10. The released SWIFT code scales a response's weights to sum 100 at beta 0.1, which is
        beta 10 on a weighted mean; this is the same with equal weights."""

        name: Literal["spin_lengthnorm"] = "spin_lengthnorm"
        beta: float = Field(10.0, gt=0)
        """Inverse temperature on mean log-ratios; about 100 times that of a summed loss on responses of 100 tokens."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (LR(truth) / T - LR(generation) / T')).

        Shapes: see Pairs. Returns: unreduced loss [B].
        """
        margin, metrics = preference_margin(
            pairs, config.beta, (mean_weights(pairs.chosen), mean_weights(pairs.rejected))
        )
        return PairLoss(logistic(margin), metrics)
