"""Method - IPO: regress the log-ratio difference to a fixed margin, so that sure labels cannot drive it to infinity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, mean_weights, preference_margin


class IPO(Method):
    SOURCE = "Azar et al. 2023, Eq. 17 (arXiv:2310.12036); unit_scale: Wu et al. 2024, E.3"

    class Config(MethodConfig):
        """Vetted setting: tau 0.1 on summed log-ratios, as the paper and the original code."""

        name: Literal["ipo"] = "ipo"
        tau: float = Field(0.1, gt=0)
        """Strength of the regularisation; the margin is 1 / (2 tau) nats. 0.01-1 is usual."""
        average: bool = False
        """Mean instead of sum of each response's log-ratios, as TRL does; the margin is then nats per token."""
        unit_scale: bool = False
        """Multiply by (2 tau)^2: (beta h - 1)^2 with beta = 2 tau, the form of the SPPO paper's baseline."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = (h - 1 / (2 tau))^2, h = LR(chosen) - LR(rejected), LR the sum of weighted log-ratios.

        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference: 1 / (2 tau)^2.

        >>> from stages.methods.base import Responses
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> IPO.pair_loss(IPO.Config(), Pairs(chosen, rejected)).loss  # (0.6 + 0.1 - 5)^2
        tensor([18.4900])
        """
        means = None
        if config.average:
            chosen, rejected = pairs.both()
            means = (mean_weights(chosen), mean_weights(rejected))
        margin, metrics = preference_margin(pairs, 1.0, means)
        if config.unit_scale:
            return PairLoss((2 * config.tau * margin - 1) ** 2, metrics)
        return PairLoss((margin - 1 / (2 * config.tau)) ** 2, metrics)
