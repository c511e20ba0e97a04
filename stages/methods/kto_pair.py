"""Method - KTO on pairs, simplified: both responses against one constant, the policy's drift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, pair_metrics, weighted_sum
from stages.methods.kto import mismatched_log_ratio
from stages.models.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class KTOPair(Method):
    SOURCE = "Wu et al. 2024, E.4 (arXiv:2405.00675)"
    NEEDS = frozenset({"reference", "mismatched"})
    DROPS_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: beta 0.1."""

        name: Literal["kto_pair"] = "kto_pair"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""

    @staticmethod
    def step_values(config: Config, pairs: Pairs) -> dict[str, Tensor]:
        return mismatched_log_ratio(pairs)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = sigmoid(c - a) + sigmoid(b - c).

        a = beta LR(chosen), b = beta LR(rejected), c = beta KL(policy || reference).
        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference: 1.
        Deviates from the paper: (1) the KL is KTO's estimate, max(0, mean log-ratio of mismatched responses) over the
        optimizer step.

        >>> from stages.methods.base import Responses
        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> drift = {"mismatched_log_ratio": torch.tensor(0.2)}
        >>> KTOPair.pair_loss(KTOPair.Config(), Pairs(chosen, rejected, step_means=drift)).loss
        tensor([0.9825])
        """
        chosen, rejected = pairs.both()
        c = config.beta * pairs.step_means["mismatched_log_ratio"].clamp_min(0)
        a = config.beta * weighted_sum(chosen.log_ratio(), chosen)
        b = config.beta * weighted_sum(rejected.log_ratio(), rejected)
        return PairLoss(torch.sigmoid(c - a) + torch.sigmoid(b - c), pair_metrics(pairs, a, b))
