"""Method - TI-DPO: DPO weighted by each token's gradient importance, plus a triplet that draws a fresh answer to the chosen one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import (
    AnchorSampling,
    Method,
    MethodConfig,
    PairLoss,
    Pairs,
    Responses,
    logistic,
    preference_margin,
)
from stages.methods.importance import min_max
from stages.models.lazy import torch
from stages.models.numerics import left_align

if TYPE_CHECKING:
    from torch import Tensor


class TIDPO(Method):
    VERSION = "1"
    SOURCE = "TI-DPO v1, Eq. 6-9 and 12-15"
    NEEDS = frozenset({"reference", "importance", "anchor"})

    class Config(MethodConfig):
        """Vetted setting: ours, since the paper gives no number: beta 0.1, gamma 0.1, margin 0.5; anchors of up to 64 tokens at
        temperature 0.8, top_k 50, top_p 0.95 (the public fork's)."""

        name: Literal["tidpo"] = "tidpo"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        gamma: float = Field(0.1, ge=0)
        """Weight of the triplet; 0.001-0.1. 0: no anchor is sampled."""
        margin: float = Field(0.5, ge=0)
        """Squared nats by which the anchor should be nearer to the chosen response."""
        lengths: Literal["overlap", "zero", "mean"] = "overlap"
        """Which positions the triplet compares: those that exist in both; all of the preference response, missing ones as 0; the
        overlap divided by its length."""
        importance: Literal["step", "given"] = "step"
        """step: from the current policy at every step, as Algorithm 1; given: the weights of the weigh stage (provider `tidpo`: the
        reference's importance once; or `random`, `ones` for the ablations)."""
        normalise_over: Literal["response", "sequence"] = "response"
        """Tokens whose smallest and largest importance become 0 and 1."""
        anchor: AnchorSampling = AnchorSampling()
        """How the answer of the triplet is sampled."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        unused = ({"importance"} if config.importance == "given" else set()) | (
            {"anchor"} if config.gamma == 0 else set()
        )
        return cls.NEEDS - unused

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (sum_t w_t lr_t(y_w) - sum_t w_t lr_t(y_l))) + gamma max(0, near - far + margin).

        near = sum_t (d_t - b_t)^2, far = sum_t (c_t - d_t)^2 with d, b, c the log-ratios of anchor, chosen and rejected. Shapes: see
        Pairs. Returns: unreduced loss [B]. Weights and importance are constants. At policy = reference: log 2 + gamma margin.
        Deviates from the paper: (1) Eq. 14 sums over unequal lengths; see `lengths`. (2) beta also in Eq. 12-13, as its Algorithm 1.
        """
        g = (_weights(config, pairs.chosen), _weights(config, pairs.rejected))
        margin, metrics = preference_margin(pairs, config.beta, g)
        loss = logistic(margin)
        if config.gamma:
            triplet = triplet_loss(pairs.anchor, pairs.chosen, pairs.rejected, config.margin, config.lengths)
            loss, metrics = loss + config.gamma * triplet, metrics | {"triplet": triplet.detach()}
        return PairLoss(loss, metrics)


def _weights(config: TIDPO.Config, side: Responses) -> Tensor:
    if config.importance == "given":
        return side.weights
    return min_max(side.importance, side.mask, side.importance_range if config.normalise_over == "sequence" else None)


def triplet_loss(anchor: Responses, chosen: Responses, rejected: Responses, margin: float, lengths: str) -> Tensor:
    """max(0, near - far + margin), token i of one response against token i of the other (Eq. 14). [B]."""
    near, far = _distance(anchor, chosen, lengths), _distance(anchor, rejected, lengths)
    return torch.relu(near - far + margin)


def _distance(anchor: Responses, other: Responses, lengths: str) -> Tensor:
    d, in_anchor = left_align(anchor.log_ratio(), anchor.mask)
    o, in_other = left_align(other.log_ratio(), other.mask)
    width = max(d.shape[1], o.shape[1])
    d, o, in_anchor, in_other = (
        torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in (d, o, in_anchor, in_other)
    )
    # left_align leaves 0 where a response has ended, so a missing anchor position is log-ratio 0.
    compared = in_other if lengths == "zero" else in_anchor & in_other
    total = torch.where(compared, (d - o) ** 2, torch.zeros((), dtype=d.dtype, device=d.device)).sum(-1)
    return total / compared.sum(-1).clamp_min(1) if lengths == "mean" else total
