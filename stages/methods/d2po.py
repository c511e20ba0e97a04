"""Method - D2PO: DPO in which later tokens count less, by a temporal decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, Responses, logistic, preference_margin
from stages.models.numerics import positions

if TYPE_CHECKING:
    from torch import Tensor


class D2PO(Method):
    VERSION = "1"
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

        Shapes: see Pairs. Returns: unreduced loss [B]. At policy = reference: log 2.
        """
        decays = (_decay(pairs.chosen, config.gamma), _decay(pairs.rejected, config.gamma))
        margin, metrics = preference_margin(pairs, config.beta, decays)
        return PairLoss(logistic(margin), metrics)


def _decay(side: Responses, gamma: float) -> Tensor:
    return side.weights * gamma ** positions(side.mask).to(side.weights.dtype)
