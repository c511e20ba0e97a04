"""Method - SimPO: mean log-probabilities with a margin, and no reference model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, mean_weights, preference_margin


class SimPO(Method):
    SOURCE = "Meng et al. 2024, Eq. 6 (arXiv:2405.14734)"
    NEEDS = frozenset[str]()

    class Config(MethodConfig):
        """Vetted setting: beta 2.5, gamma 1.4 (gamma/beta 0.55), the authors' for Llama-3-Instruct."""

        name: Literal["simpo"] = "simpo"
        beta: float = Field(2.5, gt=0)
        """Scale of the mean log-probability; 2-10."""
        gamma: float = Field(1.4, ge=0)
        """Target margin, absolute: beta times the authors' gamma/beta ratio, which is 0-1; start at 0.5."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta / T_w log pi(y_w) - beta / T_l log pi(y_l) - gamma).

        Shapes: logps and weights [B, T] of both sides -> loss [B].

        >>> from stages.methods.base import Responses
        >>> pairs = Pairs(Responses.unpadded([[-1.0, -0.5]]), Responses.unpadded([[-2.0]]))  # B = 1, T = 2 and 1
        >>> SimPO.pair_loss(SimPO.Config(), pairs).loss  # l(2.5 (-0.75 + 2) - 1.4)
        tensor([0.1640])
        """
        chosen, rejected = pairs.both()
        margin, metrics = preference_margin(
            pairs,
            config.beta,
            coefficients=(mean_weights(chosen), mean_weights(rejected)),
            log_ratios=(chosen.logps, rejected.logps),
            offset=-config.gamma,
        )
        return PairLoss(logistic(margin), metrics)
