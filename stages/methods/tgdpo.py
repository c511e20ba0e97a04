"""Method - TGDPO: DPO whose tokens are weighted by the token rewards of a model trained on these preferences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin


class TGDPO(Method):
    SOURCE = "TGDPO, Eq. 20; weights Eq. 21"
    WEIGHTS = "tgdpo"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, with the weights' alpha 0.5 (Table 10, Llama-3-8B-Instruct with PairRM)."""

        name: Literal["tgdpo"] = "tgdpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.1 in Table 10. Not the beta of the token rewards."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta sum_t f_w(r_t) lr_t(y_w) - beta sum_t f_l(r_t) lr_t(y_l)).

        f are the weights of the provider `tgdpo`.
        Shapes: logps, reference_logps and weights f [B, T] of both sides -> loss [B].
        At policy = reference: log 2. Weights may be negative where alpha is too large; the provider counts them.

        >>> from stages.methods.base import Responses
        >>> weights = [[1.5, 0.5]]  # B = 1, T = 2
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]], weights=weights)
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> TGDPO.pair_loss(TGDPO.Config(), Pairs(chosen, rejected)).loss  # l(0.1 (1.5 * 0.2 + 0.5 * 0.4 + 0.1))
        tensor([0.6636])
        """
        margin, metrics = preference_margin(pairs, config.beta)
        return PairLoss(logistic(margin), metrics)
