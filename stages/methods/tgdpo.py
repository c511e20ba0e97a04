"""Method - TGDPO: DPO whose tokens are weighted by the token rewards of a model trained on the same preferences before."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin


class TGDPO(Method):
    VERSION = "1"
    WEIGHTS = "tgdpo"
    SOURCE = "TGDPO, Eq. 20; weights Eq. 21"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, with the weights' alpha 0.5 (Table 10, Llama-3-8B-Instruct with PairRM)."""

        name: Literal["tgdpo"] = "tgdpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.1 in Table 10. Not the beta of the token rewards."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta sum_t f_w(r_t) lr_t(y_w) - beta sum_t f_l(r_t) lr_t(y_l)), f the weights of the provider `tgdpo`.

        Shapes: see Pairs. Returns: unreduced loss [B]. Weights may be negative where alpha is too large; the provider counts them.
        """
        margin, metrics = preference_margin(pairs, config.beta)
        return PairLoss(logistic(margin), metrics)
