"""Method - TIS-DPO: DPO whose tokens are weighted by how much a good model prefers them to a bad one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import (
    Method,
    MethodConfig,
    PairLoss,
    Pairs,
    logistic,
    preference_margin,
    supplied,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


class TISDPO(Method):
    SOURCE = "Liu et al. 2024, Eq. 14-18; weights Eq. 19 (arXiv:2410.04350)"
    WEIGHTS = "tis_dpo"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1 without eta, which its ablation finds minor (96.7 against 95.3) and which costs a
        second model's full-vocabulary logits. The paper's loss is `use_eta: true`."""

        name: Literal["tis_dpo"] = "tis_dpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        use_eta: bool = False
        """Subtract the weighted KL difference; loads the reference model for training."""
        alpha: float = Field(1.0, ge=0)
        """Factor of eta: 1 in the paper, 0.5 in its code when switched on."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        if config.use_eta:
            return cls.NEEDS | {"kl_policy_reference"}
        return cls.NEEDS

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(u - alpha eta), u = beta (sum_t w_t lr_t(y_w) - sum_t w_t lr_t(y_l)).

        eta is the same difference with KL(policy || reference) of each position in place of lr.
        Shapes: logps, reference_logps, weights w and kl [B, T] of both sides -> loss [B].
        At policy = reference: log 2.

        >>> from stages.methods.base import Responses
        >>> weights = [[2.0, 1.0]]  # B = 1, T = 2
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]], weights=weights)
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> TISDPO.pair_loss(TISDPO.Config(), Pairs(chosen, rejected)).loss  # l(0.1 (2 * 0.2 + 0.4 + 0.1))
        tensor([0.6492])
        """
        kl_metrics: dict[str, Tensor] = {}
        offset: Tensor | float = 0.0
        if config.use_eta:
            chosen, rejected = pairs.both()
            kl_chosen = weighted_sum(supplied(chosen.kl, "kl_policy_reference"), chosen)
            kl_rejected = weighted_sum(supplied(rejected.kl, "kl_policy_reference"), rejected)
            offset = -config.alpha * config.beta * (kl_chosen - kl_rejected)
            kl_metrics = {"kl/chosen": kl_chosen.detach(), "kl/rejected": kl_rejected.detach()}
        margin, metrics = preference_margin(pairs, config.beta, offset=offset)
        return PairLoss(logistic(margin), metrics | kl_metrics)
