"""Method - D2PO: DPO in which later tokens count less, by a temporal decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, Responses, logistic, preference_margin
from stages.models.numerics import positions

if TYPE_CHECKING:
    from torch import Tensor


class D2PO(Method):
    SOURCE = "Shao et al. 2025, temporal decay (arXiv:2502.14340)"

    class Config(MethodConfig):
        """Vetted setting: beta 0.1, gamma 0.98, the paper's best."""

        name: Literal["d2po"] = "d2po"
        beta: float = Field(0.1, gt=0)
        """Inverse temperature of the implicit reward; 0.01-0.5 is usual."""
        gamma: float = Field(0.98, gt=0, le=1)
        """Factor per token; 0.95-0.99. 1 is DPO."""

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = l(beta sum_t gamma^t lr_t(chosen) - beta sum_t gamma^t lr_t(rejected)), t from 0.

        Shapes: logps, reference_logps and weights [B, T] of both sides -> loss [B].
        At policy = reference: log 2.

        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> D2PO.pair_loss(D2PO.Config(gamma=0.5), Pairs(chosen, rejected)).loss  # l(0.1 (0.2 + 0.5 * 0.4 + 0.1))
        tensor([0.6685])
        """
        chosen, rejected = pairs.both()
        decayed = (_decayed_weights(chosen, config.gamma), _decayed_weights(rejected, config.gamma))
        margin, metrics = preference_margin(pairs, config.beta, decayed)
        return PairLoss(logistic(margin), metrics)


def _decayed_weights(side: Responses, gamma: float) -> Tensor:
    """w_t gamma^t, [B, T]."""
    return side.weights * gamma ** positions(side.mask).to(side.weights.dtype)
