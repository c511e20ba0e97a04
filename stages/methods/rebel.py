"""Method - REBEL: regress the log-ratio difference of two own answers to the difference of their rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, preference_margin, supplied


class REBEL(Method):
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

        Shapes: logps, reference_logps and weights [B, T] of both sides, scores r [B] -> loss [B].
        At policy = reference: (eta (r_1 - r_2))^2.
        Deviates from the paper: (1) multiplied by eta^2, as its code.

        >>> from stages.methods.base import Responses
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> scores = {"score_chosen": chosen.logps.new_tensor([1.5]), "score_rejected": chosen.logps.new_tensor([0.5])}
        >>> REBEL.pair_loss(REBEL.Config(), Pairs(chosen, rejected, **scores)).loss  # (0.6 + 0.1 - (1.5 - 0.5))^2
        tensor([0.0900])
        """
        margin, metrics = preference_margin(pairs, 1.0)
        difference = supplied(pairs.score_chosen, "scores") - supplied(pairs.score_rejected, "scores")
        return PairLoss((margin - config.eta * difference) ** 2, metrics)
