"""Method - DPO: the log-odds of the chosen response against a fixed reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin


class DPO(Method):
    SOURCE = "Rafailov et al. 2023, Eq. 7 (arXiv:2305.18290)"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, no label smoothing."""

        name: Literal["dpo"] = "dpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """Probability that a label is flipped (cDPO)."""
        robust: bool = False
        """Correct for the flips without bias (Chowdhury et al. 2024) instead of smoothing."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = (1 - eps) l(h) + eps l(-h), h = beta (LR(chosen) - LR(rejected)), l(t) = -log sigmoid(t).

        robust: loss = ((1 - eps) l(h) - eps l(-h)) / (1 - 2 eps). LR is the sum of log-ratios, each times its token's
        weight; weights of 1 are the paper's loss.
        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference: log 2.

        >>> from stages.methods.base import Responses
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])  # T = 1
        >>> DPO.pair_loss(DPO.Config(), Pairs(chosen, rejected)).loss  # l(0.1 (0.6 + 0.1))
        tensor([0.6588])
        """
        margin, metrics = preference_margin(pairs, config.beta)
        eps = config.label_smoothing
        if config.robust:
            return PairLoss(((1 - eps) * logistic(margin) - eps * logistic(-margin)) / (1 - 2 * eps), metrics)
        return PairLoss((1 - eps) * logistic(margin) + eps * logistic(-margin), metrics)
