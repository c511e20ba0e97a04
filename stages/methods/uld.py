"""Method - ULD: distillation across vocabularies, by the distance of the sorted distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics, supplied
from stages.models.lazy import torch
from stages.models.numerics import left_align, log_softmax, masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class ULD(Method):
    SOURCE = "Boizard et al. 2024, universal logit distillation (arXiv:2402.12030)"
    NEEDS = frozenset({"policy_logits", "teacher_logits"})
    SIDES = ("chosen",)
    PAIRING = "truth"
    WEIGHTS = None

    class Config(MethodConfig):
        """Vetted setting: half cross-entropy, half sorted distance."""

        name: Literal["uld"] = "uld"
        rate: float = Field(0.5, ge=0, le=1)
        """Share of the distance; the rest is cross-entropy with the ground truth. 1: the distance alone."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = rate mean_t sum_v |p_(v) - q_(v)| over sorted probabilities, token_loss = -(1 - rate) log pi(y).

        The smaller vocabulary is padded with zeros, the longer tokenization cut: t runs over the first min(T, T')
        tokens of each response.
        Shapes: logps [B, T], logits [B, T, V], teacher_logits [B, T', V'] and teacher_mask [B, T'] of one response a
        row -> loss and token_loss [B].

        >>> from stages.methods.base import Responses
        >>> side = Responses.unpadded([[-0.6931]])._replace(logits=torch.zeros(1, 1, 2))  # B = 1, T = 1, V = 2: uniform
        >>> side = side._replace(teacher_logits=torch.tensor([[[1.0, 6.0, 1.0]]]).log())  # V' = 3: 3/4, 1/8, 1/8
        >>> ULD.pair_loss(ULD.Config(), Pairs(side)).loss  # 0.5 (|1/2 - 3/4| + |1/2 - 1/8| + |0 - 1/8|)
        tensor([0.3750])
        """
        side = pairs.chosen
        teacher_logits = supplied(side.teacher_logits, "teacher_logits").detach()
        teacher_mask = side.mask if side.teacher_mask is None else side.teacher_mask
        policy, in_policy = left_align(log_softmax(supplied(side.logits, "policy_logits")).exp(), side.mask)
        teacher, in_teacher = left_align(log_softmax(teacher_logits).exp(), teacher_mask)
        length, size = min(policy.shape[1], teacher.shape[1]), max(policy.shape[2], teacher.shape[2])
        in_both = in_policy[:, :length] & in_teacher[:, :length]
        distance = (_sorted(policy[:, :length], size) - _sorted(teacher[:, :length], size)).abs().sum(-1)
        mean = masked_sum(distance, in_both) / in_both.sum(-1).clamp_min(1)
        nll = -masked_sum(side.logps, side.mask)
        return PairLoss(config.rate * mean, single_metrics(pairs, distance=mean), (1 - config.rate) * nll)


def _sorted(probabilities: Tensor, size: int) -> Tensor:
    """[B, T, V] -> [B, T, size]: the largest first, zeros behind."""
    descending = probabilities.sort(dim=-1, descending=True).values
    return torch.nn.functional.pad(descending, (0, size - descending.shape[-1]))
