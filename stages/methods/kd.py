"""Method - KD: the teacher's whole next-token distribution on ground truths or own samples (GKD); one vocabulary."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, supplied
from stages.models.lazy import torch
from stages.models.numerics import js_divergence, kl_divergence, masked_sum


class KD(Method):
    SOURCE = (
        "Hinton et al. 2015 (arXiv:1503.02531), per token; settings of DSKD's baselines; jsd: GKD (arXiv:2306.13649)"
    )
    NEEDS = frozenset({"policy_logits", "teacher_logits"})
    SIDES = ("chosen",)
    PAIRING = "truth"
    WEIGHTS = None

    class Config(MethodConfig):
        """Vetted setting: half cross-entropy, half forward KL at temperature 1. GKD is `direction: jsd, rate: 1` on the
        policy's own samples (`scoring: {pairing: generations}`)."""

        NEUTRAL: ClassVar[dict[str, Any]] = {"beta": 0.5}

        name: Literal["kd"] = "kd"
        direction: Literal["forward", "reverse", "jsd"] = "forward"
        """forward: KL(teacher || policy), covers the teacher's modes; reverse: KL(policy || teacher), seeks one; jsd:
        the generalised Jensen-Shannon divergence between them."""
        beta: float = Field(0.5, gt=0, lt=1)
        """jsd: share of the teacher in the mixture m = beta teacher + (1 - beta) policy; near 0 it is forward KL scaled
        by beta, near 1 reverse KL scaled by 1 - beta."""
        rate: float = Field(0.5, ge=0, le=1)
        """Share of the divergence; the rest is cross-entropy with the response. 1: the divergence alone."""
        tau: float = Field(1.0, gt=0)
        """Temperature of both distributions in the KL; 0.5-4."""
        scale_tau2: bool = False
        """Multiply the KL by tau^2, so that its gradient keeps its size."""
        common_vocabulary: bool = False
        """Cut both logits to the smaller vocabulary, for models that pad the embedding of one tokenizer differently."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""token_loss = sum_t (1 - rate) (-log pi(y_t)) + rate KL_t, a mean per token over the whole step.

        KL_t is D(teacher || policy), D(policy || teacher), or beta D(teacher || m) + (1 - beta) D(policy || m).
        Shapes: logps [B, T], logits and teacher_logits [B, T, V] of one response a row -> token_loss [B].
        At equal logits: KL_t 0; jsd is at most log 2.
        Deviates from the paper: (1) a mean over tokens where SWIFT's supplement prints a sum, as the code it cites.
        Raises: ContractError if the two vocabularies differ in size and `common_vocabulary` is off.

        >>> from stages.methods.base import Responses
        >>> logits = torch.zeros(1, 1, 2)  # B = 1, T = 1, V = 2: the policy is uniform, the teacher sure to 3/4
        >>> teacher_logits = torch.tensor([[[3.0, 1.0]]]).log()
        >>> side = Responses.unpadded([[-0.6931]])._replace(logits=logits, teacher_logits=teacher_logits)
        >>> KD.pair_loss(KD.Config(), Pairs(side)).token_loss  # 0.5 log 2 + 0.5 (3/4 log(3/2) + 1/4 log(1/2))
        tensor([0.4120])
        """
        side = pairs.chosen
        policy = supplied(side.logits, "policy_logits") / config.tau
        teacher = supplied(side.teacher_logits, "teacher_logits").detach() / config.tau
        if config.common_vocabulary:
            size = min(policy.shape[-1], teacher.shape[-1])
            policy, teacher = policy[..., :size], teacher[..., :size]
        if config.direction == "forward":
            divergence = kl_divergence(teacher, policy, side.mask)
        elif config.direction == "reverse":
            divergence = kl_divergence(policy, teacher, side.mask)
        else:
            divergence = js_divergence(teacher, policy, side.mask, config.beta)
        kl = masked_sum(divergence, side.mask)
        if config.scale_tau2:
            kl = kl * config.tau**2
        nll = -masked_sum(side.logps, side.mask)
        metrics = single_metrics(pairs, distance=kl / side.length())
        return PairLoss(torch.zeros_like(nll), metrics, (1 - config.rate) * nll + config.rate * kl)
