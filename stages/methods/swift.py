"""Method - SWIFT: ground truth against own generation, each token weighted by how much a teacher prefers it to the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, hinge, logistic, preference_margin
from stages.models.lazy import torch
from stages.models.numerics import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class SWIFT(Method):
    VERSION = "1"
    PAIRING = "truth_vs_generation"
    WEIGHTS = "swift"
    SOURCE = "SWIFT, Theorem 3.7 / Eq. 13 and section 4.3; weights Eq. 4-6"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1 (the code's; the paper is silent), weights multiply, no KL term. Eq. 13 as printed is
        `weight_mode: divide, kl_mode: paper`; what its proof gives is `divide, tdpo`."""

        name: Literal["swift"] = "swift"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        weight_mode: Literal["multiply", "divide"] = "multiply"
        """multiply: the paper's section 4.3, its ablation and its code; divide: its Eq. 13, where the tokens the teacher cares for
        most move least. A weight of 0 removes its token in both."""
        kl_mode: Literal["none", "paper", "tdpo", "supp"] = "none"
        """The term v inside the loss. Any but none loads the reference model for training: it needs full-vocabulary logits."""
        kl_coef: float = Field(1.0, ge=0)
        """Factor of v."""
        loss: Literal["logistic", "hinge"] = "logistic"
        """l(t) = log(1 + e^-t) or max(0, 1 - t)."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        return cls.NEEDS | _KL_NEEDS[config.kl_mode]

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(u - kl_coef v), u = beta (sum_t g_t lr_t(y) - sum_t g'_t lr_t(y')), g = omega or 1 / omega.

        v is 0 (none), beta (D(y) - D(y')) with D = sum_t g_t KL(policy || reference) (paper), beta (D(y') - D(y)) with
        D = sum_t g_t KL(reference || policy) (tdpo), or minus the paper's (supp, the last line of the proof read literally).
        Shapes: see Pairs; weights are constants from the weigh stage. Returns: unreduced loss [B]. At policy = reference: log 2.
        Deviates from the paper: (1) weights multiply and v is off by default; the docstrings of the settings say why.
        """
        g = (pairs.chosen.weights, pairs.rejected.weights)
        if config.weight_mode == "divide":
            g = (_inverse(g[0]), _inverse(g[1]))
        extra, offset = {}, 0.0
        if config.kl_mode != "none":
            kl_chosen, kl_rejected = (
                masked_sum(coefficient * side.kl, side.mask)
                for coefficient, side in zip(g, (pairs.chosen, pairs.rejected), strict=True)
            )
            sign = 1.0 if config.kl_mode == "paper" else -1.0
            offset = -config.kl_coef * config.beta * sign * (kl_chosen - kl_rejected)
            extra = {"kl/chosen": kl_chosen.detach(), "kl/rejected": kl_rejected.detach()}
        margin, metrics = preference_margin(pairs, config.beta, g, offset=offset)
        return PairLoss((hinge if config.loss == "hinge" else logistic)(margin), metrics | extra)


_KL_NEEDS = {
    "none": frozenset(),
    "paper": frozenset({"kl_policy_reference"}),
    "tdpo": frozenset({"kl_reference_policy"}),
    "supp": frozenset({"kl_policy_reference"}),
}


def _inverse(weights: Tensor) -> Tensor:
    one = torch.ones_like(weights)
    return torch.where(weights == 0, 0 * one, one / torch.where(weights == 0, one, weights))
