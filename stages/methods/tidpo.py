"""Method - TI-DPO: DPO weighted by gradient importance, plus a triplet that draws a fresh answer to the chosen one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
    supplied,
)
from stages.methods.importance import HybridSettings, hybrid, min_max
from stages.models.lazy import torch
from stages.models.numerics import left_align, masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class TIDPO(Method):
    SOURCE = "TI-DPO v1, Eq. 6-9 and 12-15; version v3: ICLR 2026"
    NEEDS = frozenset({"reference", "importance", "anchor"})

    class Config(MethodConfig):
        """Vetted setting: ours, since the paper gives no number: beta 0.1, gamma 0.1, margin 0.5; anchors of up to 64
        tokens at temperature 0.8, top_k 50, top_p 0.95 (the public fork's)."""

        NEUTRAL: ClassVar[dict[str, Any]] = {"version": "v1", "hybrid": HybridSettings(), "alpha": 0.5}

        name: Literal["tidpo"] = "tidpo"
        version: Literal["v1", "v3"] = "v1"
        """v3: weights mixed with a prior over positions, attribution of the largest logit behind the response, and
        TDPO2 as the base loss, which holds all logits of the reference."""
        hybrid: HybridSettings = HybridSettings()
        """v3: how importances become weights."""
        alpha: float = Field(0.5, ge=0)
        """v3: TDPO2's weight of the KL difference; 0.01-1."""
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        gamma: float = Field(0.1, ge=0)
        """Weight of the triplet; 0.001-0.1. 0: no anchor is sampled."""
        margin: float = Field(0.5, ge=0)
        """Squared nats by which the anchor should be nearer to the chosen response."""
        lengths: Literal["overlap", "zero", "mean"] = "overlap"
        """Which positions the triplet compares: those that exist in both; all of the preference response, missing ones
        as 0; the overlap divided by its length."""
        importance: Literal["step", "given"] = "step"
        """step: from the current policy at every step, as Algorithm 1; given: the weights of the weigh stage (provider
        `tidpo`: the reference's importance once; or `random`, `ones` for the ablations)."""
        normalise_over: Literal["response", "sequence"] = "response"
        """Tokens whose smallest and largest importance become 0 and 1."""
        anchor: AnchorSampling = AnchorSampling()
        """How the answer of the triplet is sampled."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        needs = cls.NEEDS
        if config.version == "v3":
            needs = needs - {"importance"} | {"importance_max_logit", "kl_reference_policy"}
        if config.importance == "given":
            needs -= {"importance", "importance_max_logit"}
        if config.gamma == 0:
            needs -= {"anchor"}
        return needs

    @classmethod
    def drops_identical(cls, config: Config) -> bool:
        # TDPO2 stops one of two equal KL terms: the other still pushes.
        return config.version == "v1"

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta (sum_t w_t lr_t(y_w) - sum_t w_t lr_t(y_l) - v)) + gamma max(0, near - far + margin).

        near = sum_t (d_t - b_t)^2, far = sum_t (c_t - d_t)^2 with d, b, c the log-ratios of anchor, chosen and
        rejected. v is 0 (v1) or TDPO2's alpha (K_l - sg K_w), K = sum_t KL(reference || policy) (v3).
        Shapes: logps, reference_logps and importance (v3: and kl) [B, T] of both sides, the anchor's logps and
        reference_logps [B, T'] -> loss [B]. Importance and weights w are constants.
        At policy = reference: log 2 + gamma margin.
        Deviates from the paper: (1) Eq. 14 sums over unequal lengths; see `lengths`. (2) beta also in Eq. 12-13, as its
        Algorithm 1.

        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> chosen = chosen._replace(importance=torch.tensor([[3.0, 1.0]]))  # weights 1 and 0
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])._replace(importance=torch.tensor([[2.0]]))
        >>> pairs = Pairs(chosen, rejected, anchor=Responses.unpadded([[-1.0]], reference_logps=[[-1.3]]))
        >>> TIDPO.pair_loss(TIDPO.Config(), pairs).loss  # l(0.1 (0.2 + 0.1)) + 0.1 (0.1^2 - 0.4^2 + 0.5)
        tensor([0.7133])
        """
        chosen, rejected = pairs.both()
        weights = (_weights(config, chosen), _weights(config, rejected))
        offset: Tensor | float = 0.0
        if config.version == "v3":
            kl_chosen, kl_rejected = _summed_kl(chosen), _summed_kl(rejected)
            offset = -config.beta * config.alpha * (kl_rejected - kl_chosen.detach())
        margin, metrics = preference_margin(pairs, config.beta, weights, offset=offset)
        loss = logistic(margin)
        if config.gamma:
            anchor = supplied(pairs.anchor, "anchor")
            triplet = triplet_loss(anchor, chosen, rejected, config.margin, config.lengths)
            loss = loss + config.gamma * triplet
            metrics["triplet"] = triplet.detach()
        return PairLoss(loss, metrics)


def _weights(config: TIDPO.Config, side: Responses) -> Tensor:
    """The weight of each token [B, T], a constant."""
    if config.importance == "given":
        return side.weights
    if config.version == "v3":
        return hybrid(supplied(side.importance, "importance_max_logit"), side.mask, config.hybrid)
    importance = supplied(side.importance, "importance")
    if config.normalise_over == "sequence":
        return min_max(importance, side.mask, supplied(side.importance_range, "importance"))
    return min_max(importance, side.mask)


def _summed_kl(side: Responses) -> Tensor:
    """K = sum_t KL(reference || policy), [B]."""
    return masked_sum(supplied(side.kl, "kl_reference_policy"), side.mask)


def triplet_loss(anchor: Responses, chosen: Responses, rejected: Responses, margin: float, lengths: str) -> Tensor:
    """max(0, near - far + margin), token i of one response against token i of the other (Eq. 14). [B]."""
    near, far = _distance(anchor, chosen, lengths), _distance(anchor, rejected, lengths)
    return torch.relu(near - far + margin)


def _distance(anchor: Responses, side: Responses, lengths: str) -> Tensor:
    """Squared distance [B] of two responses' log-ratios over the positions that `lengths` names."""
    d, in_anchor = left_align(anchor.log_ratio(), anchor.mask)
    b, in_side = left_align(side.log_ratio(), side.mask)
    width = max(d.shape[1], b.shape[1])
    d, b, in_anchor, in_side = (_widened(values, width) for values in (d, b, in_anchor, in_side))
    # left_align leaves 0 where a response has ended, so a missing anchor position is log-ratio 0.
    compared = in_side if lengths == "zero" else in_anchor & in_side
    total = torch.where(compared, (d - b) ** 2, torch.zeros((), dtype=d.dtype, device=d.device)).sum(-1)
    if lengths == "mean":
        return total / compared.sum(-1).clamp_min(1)
    return total


def _widened(values: Tensor, width: int) -> Tensor:
    """[B, T] with zeros appended up to [B, width]."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
