"""Method - OPD: policy gradient on the policy's own samples, each token's advantage how much a teacher prefers it."""

from __future__ import annotations

from typing import Literal

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, supplied
from stages.models.lazy import torch
from stages.models.numerics import masked_mean, masked_sum


class OPD(Method):
    SOURCE = "on-policy distillation as in tinker-cookbook `distillation/train_on_policy.py` (discount 0)"
    NEEDS = frozenset({"old_policy"})
    SIDES = ("chosen",)
    PAIRING = "generations"
    WEIGHTS = "opd"

    class Config(MethodConfig):
        """No setting: the advantages are the token weights, and their settings those of the weights `opd`. IW-OPD is
        `weighting: {weights: {name: iw_opd, of: {name: opd}}}`."""

        name: Literal["opd"] = "opd"

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""token_loss = sum_t -rho_t A_t, a mean per token over the whole step, rho = exp(log pi - log pi_old).

        A_t = coef (log pi_T(y_t) - log pi_old(y_t)) is the weight of the token, a constant (weights `opd`).
        Shapes: logps, old_logps and weights [B, T] of one response a row -> token_loss [B].
        At policy = pi_old: -A_t with gradient -A_t; 0 where the teacher is the policy.
        Deviates from the code: (1) a mean over tokens where it sums.

        >>> from stages.methods.base import Responses
        >>> side = Responses.unpadded([[-1.0, -0.5]], weights=[[0.5, -0.2]])  # B = 1, T = 2
        >>> OPD.pair_loss(OPD.Config(), Pairs(side._replace(old_logps=side.logps))).token_loss  # -(0.5 - 0.2)
        tensor([-0.3000])
        """
        side = pairs.chosen
        zero = torch.zeros((), dtype=side.logps.dtype, device=side.logps.device)
        # Masked before exp: what padding holds must reach neither the value nor the gradient.
        gap = torch.where(side.mask, side.logps - supplied(side.old_logps, "old_policy"), zero)
        loss = -masked_sum(torch.exp(gap) * side.weights, side.mask)
        metrics = {"advantage": masked_mean(side.weights, side.mask), "log_ratio": masked_mean(gap, side.mask)}
        return PairLoss(torch.zeros_like(loss), single_metrics(pairs, **metrics), loss)
