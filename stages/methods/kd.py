"""Method - KD: the teacher's whole next-token distribution on the ground truth, for teacher and policy of one vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics
from stages.models.lazy import torch
from stages.models.numerics import kl_divergence, masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class KD(Method):
    VERSION = "1"
    SOURCE = "Hinton et al. 2015 (arXiv:1503.02531), per token; settings of DSKD's baselines"
    NEEDS = frozenset({"policy_logits", "teacher_logits"})
    SIDES = ("chosen",)
    PAIRING = "truth"
    USES_WEIGHTS = False
    DROP_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: half cross-entropy, half forward KL at temperature 1."""

        name: Literal["kd"] = "kd"
        direction: Literal["forward", "reverse"] = "forward"
        """forward: KL(teacher || policy), covers the teacher's modes; reverse: KL(policy || teacher), seeks one."""
        rate: float = Field(0.5, ge=0, le=1)
        """Share of the KL; the rest is cross-entropy with the ground truth. 1: KL alone."""
        tau: float = Field(1.0, gt=0)
        """Temperature of both distributions in the KL; 0.5-4."""
        scale_tau2: bool = False
        """Multiply the KL by tau^2, so that its gradient keeps its size."""
        common_vocabulary: bool = False
        """Cut both logits to the smaller vocabulary, for a tokenizer whose embedding one model pads further than the other."""

    @staticmethod
    def token_count(config: Config, pairs: Pairs) -> Tensor:
        return pairs.chosen.mask.sum(-1)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""token_loss = sum_t (1 - rate) (-log pi(y_t)) + rate KL_t, a mean per token over the whole step.

        Shapes: see Pairs, one response a row. Returns: unreduced losses [B].
        Deviates from the paper: (1) a mean over tokens where SWIFT's supplement prints a sum, as the code it cites.
        Raises: ContractError if the two vocabularies differ in size and `common_vocabulary` is off.
        """
        side = pairs.chosen
        policy, teacher = side.logits / config.tau, side.teacher_logits.detach() / config.tau
        if config.common_vocabulary:
            size = min(policy.shape[-1], teacher.shape[-1])
            policy, teacher = policy[..., :size], teacher[..., :size]
        left, right = (teacher, policy) if config.direction == "forward" else (policy, teacher)
        kl = masked_sum(kl_divergence(left, right, side.mask), side.mask) * (
            config.tau**2 if config.scale_tau2 else 1.0
        )
        nll = -masked_sum(side.logps, side.mask)
        metrics = single_metrics(pairs, distance=kl / side.length())
        return PairLoss(torch.zeros_like(nll), metrics, (1 - config.rate) * nll + config.rate * kl)
