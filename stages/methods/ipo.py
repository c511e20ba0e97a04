"""Method - IPO: regress the log-ratio difference to a fixed margin, so that sure labels cannot drive it to infinity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, mean_weights, preference_margin


class IPO(Method):
    VERSION = "1"
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
        r"""loss = (h - 1 / (2 tau))^2, h = LR(chosen) - LR(rejected).

        Shapes: see Pairs. Returns: unreduced loss [B]. At policy = reference: 1 / (2 tau)^2.
        """
        mean = (mean_weights(pairs.chosen), mean_weights(pairs.rejected)) if config.average else None
        margin, metrics = preference_margin(pairs, 1.0, mean)
        if config.unit_scale:
            return PairLoss((2 * config.tau * margin - 1) ** 2, metrics)
        return PairLoss((margin - 1 / (2 * config.tau)) ** 2, metrics)
