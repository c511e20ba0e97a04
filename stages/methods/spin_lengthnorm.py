"""Method - SPIN on mean log-ratios: the control that tells SWIFT's token weights from length normalisation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, mean_weights, preference_margin


class SPINLengthNorm(Method):
    SOURCE = "control for swift_released, ours; TRL calls the loss sigmoid_norm"
    PAIRING = "truth_vs_generation"

    class Config(MethodConfig):
        """Vetted setting: beta 10. The released SWIFT code scales a response's weights to sum 100 at beta 0.1, which is
        beta 10 on a weighted mean; this is the same with equal weights."""

        name: Literal["spin_lengthnorm"] = "spin_lengthnorm"
        beta: float = Field(10.0, gt=0)
        """Inverse temperature on mean log-ratios; about 100 times that of a summed loss on responses of 100 tokens."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (LR(truth) / T - LR(generation) / T')).

        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference: log 2.

        >>> from stages.methods.base import Responses
        >>> truth = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> generation = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> SPINLengthNorm.pair_loss(SPINLengthNorm.Config(), Pairs(truth, generation)).loss  # l(10 (0.3 + 0.1))
        tensor([0.0181])
        """
        truth, generation = pairs.both()
        margin, metrics = preference_margin(pairs, config.beta, (mean_weights(truth), mean_weights(generation)))
        return PairLoss(logistic(margin), metrics)
