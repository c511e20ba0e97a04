"""Method - R-DPO: DPO with a length term inside, so that a longer winner needs less of a margin."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin


class RDPO(Method):
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

        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference and equal lengths: log 2.

        >>> from stages.methods.base import Responses
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> RDPO.pair_loss(RDPO.Config(), Pairs(chosen, rejected)).loss  # l(0.1 (0.6 + 0.1) + 0.05)
        tensor([0.6349])
        """
        chosen, rejected = pairs.both()
        extra_tokens = (chosen.mask.sum(-1) - rejected.mask.sum(-1)).to(chosen.logps.dtype)
        margin, metrics = preference_margin(pairs, config.beta, offset=config.alpha * extra_tokens)
        return PairLoss(logistic(margin), metrics)
