"""Method - SWIFT: ground truth against own generation, each token weighted by how much a teacher prefers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import (
    Method,
    MethodConfig,
    PairLoss,
    Pairs,
    Responses,
    hinge,
    logistic,
    preference_margin,
    supplied,
)
from stages.models.lazy import torch
from stages.models.numerics import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class SWIFT(Method):
    SOURCE = "SWIFT, Theorem 3.7 / Eq. 13 and section 4.3; weights Eq. 4-6"
    PAIRING = "truth_vs_generation"
    WEIGHTS = "swift"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1 (the code's; the paper is silent), weights multiply, no KL term. Eq. 13 as printed
        is `weight_mode: divide, kl_mode: paper`; what its proof gives is `divide, tdpo`."""

        name: Literal["swift"] = "swift"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        weight_mode: Literal["multiply", "divide"] = "multiply"
        """multiply: the paper's section 4.3, its ablation and its code; divide: its Eq. 13, where the tokens the
        teacher cares for most move least. A weight of 0 removes its token in both."""
        kl_mode: Literal["none", "paper", "tdpo", "supp"] = "none"
        """The term v of the loss. Any but none holds the reference model while training: it needs all its logits."""
        kl_coef: float = Field(1.0, ge=0)
        """Factor of v."""
        loss: Literal["logistic", "hinge"] = "logistic"
        """l(t) = log(1 + e^-t) or max(0, 1 - t)."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        if config.kl_mode == "none":
            return cls.NEEDS
        return cls.NEEDS | {_KL_NEED[config.kl_mode]}

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(u - kl_coef v), u = beta (sum_t g_t lr_t(y) - sum_t g'_t lr_t(y')), g = omega or 1 / omega.

        v is 0 (none), beta (D(y) - D(y')) with D = sum_t g_t KL(policy || reference) (paper), beta (D(y') - D(y)) with
        D = sum_t g_t KL(reference || policy) (tdpo), or minus the paper's (supp, the last line of the proof read
        literally).
        Shapes: logps, reference_logps, weights omega and kl [B, T] of both sides -> loss [B].
        At policy = reference: log 2.
        Deviates from the paper: (1) weights multiply and v is off by default; the docstrings of the settings say why.

        >>> weights = [[2.0, 1.0]]  # B = 1, T = 2
        >>> truth = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]], weights=weights)
        >>> generation = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> SWIFT.pair_loss(SWIFT.Config(), Pairs(truth, generation)).loss  # l(0.1 (2 * 0.2 + 0.4 + 0.1))
        tensor([0.6492])
        """
        truth, generation = pairs.both()
        g_truth, g_generation = truth.weights, generation.weights
        if config.weight_mode == "divide":
            g_truth, g_generation = _inverse(g_truth), _inverse(g_generation)
        kl_metrics: dict[str, Tensor] = {}
        offset: Tensor | float = 0.0
        if config.kl_mode != "none":
            kl_truth = _summed_kl(config, truth, g_truth)
            kl_generation = _summed_kl(config, generation, g_generation)
            sign = 1.0 if config.kl_mode == "paper" else -1.0
            offset = -config.kl_coef * config.beta * sign * (kl_truth - kl_generation)
            kl_metrics = {"kl/chosen": kl_truth.detach(), "kl/rejected": kl_generation.detach()}
        margin, metrics = preference_margin(pairs, config.beta, (g_truth, g_generation), offset=offset)
        loss = hinge(margin) if config.loss == "hinge" else logistic(margin)
        return PairLoss(loss, metrics | kl_metrics)


_KL_NEED = {"paper": "kl_policy_reference", "tdpo": "kl_reference_policy", "supp": "kl_policy_reference"}


def _summed_kl(config: SWIFT.Config, side: Responses, g: Tensor) -> Tensor:
    """D = sum_t g_t KL_t, [B]."""
    return masked_sum(g * supplied(side.kl, _KL_NEED[config.kl_mode]), side.mask)


def _inverse(weights: Tensor) -> Tensor:
    """1 / omega, and 0 where omega is 0: the token stays removed. [B, T]."""
    is_zero = weights == 0
    ones = torch.ones_like(weights)
    return torch.where(is_zero, 0 * ones, ones / torch.where(is_zero, ones, weights))
