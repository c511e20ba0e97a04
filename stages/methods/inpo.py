"""Method - INPO: regress the log-ratio difference to a margin, drawn to the start model and to the current policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig, PairLoss, Pairs, Responses, preference_margin, supplied

if TYPE_CHECKING:
    from torch import Tensor


class Regularised(MethodConfig):
    """Settings of INPO's loss."""

    eta: float = Field(0.0075, gt=0)
    """Step size of the mirror descent; the margin is 1 / (2 eta) nats. 0.002 (COMAL)-0.0075."""
    rho: float = Field(1 / 3, ge=0, le=1)
    """tau / eta: share of the start model in what the policy is compared with; the rest is the policy that sampled."""


class INPO(Method):
    SOURCE = "Zhang et al. 2024, INPO (arXiv:2407.00617); as `nash_loss` in COMAL's code (arXiv:2410.23223)"
    NEEDS = frozenset({"reference", "old_policy"})
    REFERENCE = "start"

    class Config(Regularised):
        """Vetted setting: eta 0.0075, rho 1/3 (MNPO's code); COMAL takes eta 0.002 and `reference: {every: 12}`."""

        name: Literal["inpo"] = "inpo"

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = (h_w - h_l - 1 / (2 eta))^2, h = log pi - rho log pi_start - (1 - rho) log pi_t.

        Sums over the weighted tokens of a response; pi_t is the policy as the iteration finds it.
        Shapes: logps, reference_logps (the start model's), old_logps and weights [B, T] of both sides -> loss [B].
        At policy = start = pi_t: (1 / (2 eta))^2.

        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> chosen = chosen._replace(old_logps=chosen.reference_logps)  # the first iteration: pi_t is the start model
        >>> rejected = rejected._replace(old_logps=rejected.reference_logps)
        >>> INPO.pair_loss(INPO.Config(eta=0.5), Pairs(chosen, rejected)).loss  # (0.6 + 0.1 - 1)^2
        tensor([0.0900])
        """
        return nash_loss(config, pairs)


def nash_loss(config: Regularised, pairs: Pairs) -> PairLoss:
    """(h_w - h_l - 1 / (2 eta))^2 of B rows, with h against the start model and Responses.old_logps."""
    chosen, rejected = pairs.both()
    log_ratios = (_regularised_log_ratio(config, chosen), _regularised_log_ratio(config, rejected))
    margin, metrics = preference_margin(pairs, 1.0, log_ratios=log_ratios)
    return PairLoss((margin - 1 / (2 * config.eta)) ** 2, metrics)


def _regularised_log_ratio(config: Regularised, side: Responses) -> Tensor:
    """log pi - rho log pi_start - (1 - rho) log pi_t of each token, [B, T]."""
    start_logps, old_logps = supplied(side.reference_logps, "reference"), supplied(side.old_logps, "old_policy")
    return side.logps - config.rho * start_logps - (1 - config.rho) * old_logps
