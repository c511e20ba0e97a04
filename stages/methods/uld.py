"""Method - ULD: distillation across vocabularies, by the distance of the sorted distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, single_metrics
from stages.models.lazy import torch
from stages.models.numerics import left_align, log_softmax, masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class ULD(Method):
    VERSION = "1"
    SOURCE = "Boizard et al. 2024, universal logit distillation (arXiv:2402.12030)"
    NEEDS = frozenset({"policy_logits", "teacher_logits"})
    SIDES = ("chosen",)
    PAIRING = "truth"
    USES_WEIGHTS = False
    DROP_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: half cross-entropy, half sorted distance."""

        name: Literal["uld"] = "uld"
        rate: float = Field(0.5, ge=0, le=1)
        """Share of the distance; the rest is cross-entropy with the ground truth. 1: the distance alone."""

    @staticmethod
    def token_count(config: Config, pairs: Pairs) -> Tensor:
        return pairs.chosen.mask.sum(-1)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = rate mean_t sum_v |p_(v) - q_(v)| over sorted probabilities, token_loss = -(1 - rate) log pi(y).

        The smaller vocabulary is padded with zeros, the longer tokenization cut: t runs over the first min(T, T') tokens of each
        response. Shapes: see Pairs, one response a row; teacher_logits [B, T', V'], teacher_mask [B, T']. Returns: unreduced losses [B].
        """
        side = pairs.chosen
        policy, in_policy = left_align(log_softmax(side.logits).exp(), side.mask)
        teacher_mask = side.mask if side.teacher_mask is None else side.teacher_mask
        teacher, in_teacher = left_align(log_softmax(side.teacher_logits.detach()).exp(), teacher_mask)
        length, size = min(policy.shape[1], teacher.shape[1]), max(policy.shape[2], teacher.shape[2])
        both = in_policy[:, :length] & in_teacher[:, :length]
        distance = (_sorted(policy[:, :length], size) - _sorted(teacher[:, :length], size)).abs().sum(-1)
        mean = masked_sum(distance, both) / both.sum(-1).clamp_min(1)
        nll = -masked_sum(side.logps, side.mask)
        return PairLoss(config.rate * mean, single_metrics(pairs, distance=mean), (1 - config.rate) * nll)


def _sorted(probabilities: Tensor, size: int) -> Tensor:
    """Largest first, zeros up to `size`."""
    ordered = probabilities.sort(dim=-1, descending=True).values
    return torch.nn.functional.pad(ordered, (0, size - ordered.shape[-1]))
