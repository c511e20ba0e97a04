"""Method - MNPO: INPO against several opponents, the last policies of the run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from stages.methods.base import Method, PairLoss, Pairs
from stages.methods.inpo import INPO, Regularised, nash_loss


class MNPO(Method):
    SOURCE = "Wu et al. 2025, MNPO (arXiv:2509.23102), its code's loss"
    NEEDS = INPO.NEEDS
    REFERENCE = INPO.REFERENCE
    HISTORY = 2

    class Config(Regularised):
        """Vetted setting: eta 0.0075, rho 1/3, two opponents (its code); equal weights are ours, since the code's list
        [1, 0] is INPO."""

        name: Literal["mnpo"] = "mnpo"
        lambdas: tuple[float, ...] = ()
        """Weight of each opponent, newest first, as many as the run's `history`; scaled to sum 1. Empty: equal."""

        @model_validator(mode="after")
        def _weights(self) -> Self:
            if self.lambdas and (self.lambdas[0] <= 0 or min(self.lambdas) < 0):
                raise ValueError(f"`lambdas` must be >= 0, the first one > 0; got {list(self.lambdas)}")
            return self

    @classmethod
    def opponents(cls, config: Config, count: int) -> tuple[float, ...]:
        """lambda_j of the last `count` policies, newest first. Raises: ValueError if the settings name another
        number."""
        if not config.lambdas:
            return (1 / count,) * count
        if len(config.lambdas) != count:
            raise ValueError(
                f"method.lambdas has {len(config.lambdas)} weights and `history` is {count}: give one for each policy"
            )
        return tuple(weight / sum(config.lambdas) for weight in config.lambdas)

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = (h_w - h_l - 1 / (2 eta))^2, h = log pi - rho log pi_start - (1 - rho) sum_j lambda_j log pi_(t-j).

        The sum over j is linear in the opponents' log-probs, so the weigh stage makes it and a row holds one number per
        token (old_logps). In early iterations there are fewer policies: lambda is scaled to those.
        Shapes: logps, reference_logps (the start model's), old_logps (the sum over j) and weights [B, T] of both sides
        -> loss [B].
        At policy = start = every opponent: (1 / (2 eta))^2. With one opponent: INPO.

        >>> from stages.methods.base import Responses
        >>> side = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.0, -0.5]])  # B = 1, T = 2
        >>> side = side._replace(old_logps=side.logps)
        >>> MNPO.pair_loss(MNPO.Config(eta=0.25), Pairs(side, side)).loss  # (1 / (2 * 0.25))^2
        tensor([4.])
        """
        return nash_loss(config, pairs)
