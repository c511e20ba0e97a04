"""Method - TDPO1 and TDPO2: DPO that also balances the sequential KL of the two responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, logistic, preference_margin, supplied
from stages.models.numerics import masked_sum


class TDPO(Method):
    SOURCE = "Zeng et al. 2024, token-level DPO (arXiv:2404.11999)"
    NEEDS = frozenset({"reference", "kl_reference_policy"})

    class Config(MethodConfig):
        """Vetted setting: TDPO2, beta 0.1, alpha 0.5 (TGDPO's baseline runs use alpha 0.01)."""

        name: Literal["tdpo"] = "tdpo"
        version: Literal[1, 2] = 2
        """1: the whole KL difference; 2: alpha times it, without gradient through the chosen response's."""
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        alpha: float = Field(0.5, ge=0)
        """TDPO2's weight of the KL difference; 0.01-1."""

    @classmethod
    def drops_identical(cls, config: Config) -> bool:
        # TDPO2 stops one of two equal KL terms: the other still pushes.
        return config.version == 1

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""TDPO1: l(beta [LR_w - LR_l - (K_l - K_w)]); TDPO2: l(beta [LR_w - LR_l - alpha (K_l - sg K_w)]).

        K = sum_t KL(reference || policy) over the full vocabulary, sg stops the gradient.
        Shapes: logps, reference_logps, weights and kl [B, T] of both sides -> loss [B].
        At policy = reference: log 2.

        >>> from stages.methods.base import Responses
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> pairs = Pairs(chosen._replace(kl=chosen.weights * 0.1), rejected._replace(kl=rejected.weights * 0.5))
        >>> TDPO.pair_loss(TDPO.Config(), pairs).loss  # l(0.1 (0.6 + 0.1 - 0.5 (0.5 - 0.2)))
        tensor([0.6660])
        """
        chosen, rejected = pairs.both()
        kl_chosen = masked_sum(supplied(chosen.kl, "kl_reference_policy"), chosen.mask)
        kl_rejected = masked_sum(supplied(rejected.kl, "kl_reference_policy"), rejected.mask)
        if config.version == 1:
            gap = kl_rejected - kl_chosen
        else:
            gap = config.alpha * (kl_rejected - kl_chosen.detach())
        margin, metrics = preference_margin(pairs, config.beta, offset=-config.beta * gap)
        metrics |= {"kl/chosen": kl_chosen.detach(), "kl/rejected": kl_rejected.detach()}
        return PairLoss(logistic(margin), metrics)
