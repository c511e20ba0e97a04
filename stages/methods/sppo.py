"""Method - SPPO: move each response's log-ratio to its advantage in the preference game against the policy itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from stages.methods.base import (
    Method,
    MethodConfig,
    PairLoss,
    Pairs,
    Responses,
    pair_metrics,
    single_metrics,
    supplied,
    weighted_sum,
)
from stages.methods.preferences import log_partition
from stages.models.lazy import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class SPPO(Method):
    SOURCE = "Wu et al. 2024, Eq. 3.5-3.7 and E.1 (arXiv:2405.00675)"
    NEEDS = frozenset({"reference", "win_rates"})
    DROPS_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: eta 1e3, soft win rates over K = 5 candidates; gradients clipped at 1 (always at work)."""

        name: Literal["sppo"] = "sppo"
        eta: float = Field(1000.0, gt=0)
        """Step size of the multiplicative update, 1/beta. The target of a sure winner is eta/2 nats."""
        target: Literal["soft", "hard"] = "soft"
        """soft: win rates over the K candidates; hard: 1 and 0."""
        keep: Literal["2", "all"] = "2"
        """2: best and worst candidate; all: every candidate is a row of its own (pairing `each`)."""
        log_z: bool = False
        """Subtract the estimated log partition function instead of eta/2. Usable only with a small eta: at 1e3 it
        pushes every answer but the best down by hundreds of nats."""
        halve: bool = False
        """Halve the sum of the two squares, as the released code does."""
        scale: Literal["eta", "unit"] = "eta"
        """unit: divide by eta^2, the form of the paper's appendix E; the same minimum, values of order 1."""

        @model_validator(mode="after")
        def _consistent(self) -> SPPO.Config:
            if self.target == "hard" and (self.keep == "all" or self.log_z):
                raise ValueError(
                    "`target: hard` is for `keep: 2` without `log_z`: only a pair has a sure winner and a sure loser"
                )
            return self

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        if config.log_z:
            return cls.NEEDS | {"log_z"}
        return cls.NEEDS

    @classmethod
    def sides(cls, config: Config) -> tuple[str, ...]:
        if config.keep == "all":
            return ("chosen",)
        return cls.SIDES

    @staticmethod
    def row_values(config: Config, scores: np.ndarray, win_rates: np.ndarray) -> dict[str, np.ndarray]:
        """log Z over the prompt's own K candidates, not over B fresh ones as in the paper: one number, K times."""
        if not config.log_z:
            return {}
        return {"log_z": win_rates * 0 + log_partition(config.eta, win_rates)}

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = sum over the kept responses of (LR(y) - eta (p - 1/2))^2, or (LR(y) - (eta p - log Z))^2.

        LR is the sum of weighted log-ratios, p the win rate against all K candidates of the prompt (self counted 1/2).
        Shapes: logps, reference_logps and weights [B, T] of the kept sides, win rates and log Z [B] -> loss [B].
        At policy = reference: eta^2 ((p_w - 1/2)^2 + (p_l - 1/2)^2).
        Deviates from the paper: (1) win rates over K also in the pair form, where E.1 prints the probability of the
        pair, as its algorithm and code do.

        >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
        >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
        >>> pairs = Pairs(chosen, rejected, win_rate_chosen=torch.tensor([0.8]), win_rate_rejected=torch.tensor([0.4]))
        >>> SPPO.pair_loss(SPPO.Config(eta=10), pairs).loss  # (0.6 - 3)^2 + (-0.1 + 1)^2
        tensor([6.5700])
        """
        win_rate = _target_win_rate(config, pairs.win_rate_chosen, hard=1.0)
        log_ratio, loss = _squared_error(config, pairs, pairs.chosen, win_rate)
        scale = config.eta**2 if config.scale == "unit" else 1.0
        if pairs.rejected is None:
            return PairLoss(loss / scale, single_metrics(pairs, **{"log_ratio/chosen": log_ratio}))
        win_rate = _target_win_rate(config, pairs.win_rate_rejected, hard=0.0)
        log_ratio_rejected, loss_rejected = _squared_error(config, pairs, pairs.rejected, win_rate)
        loss = (loss + loss_rejected) / (2 if config.halve else 1) / scale
        return PairLoss(loss, pair_metrics(pairs, log_ratio / config.eta, log_ratio_rejected / config.eta))


def _target_win_rate(config: SPPO.Config, win_rate: Tensor | None, hard: float) -> Tensor:
    """The measured win rate [B], or with hard targets the label `hard`."""
    win_rate = supplied(win_rate, "win_rates")
    if config.target == "hard":
        return torch.full_like(win_rate, hard)
    return win_rate


def _squared_error(config: SPPO.Config, pairs: Pairs, side: Responses, win_rate: Tensor) -> tuple[Tensor, Tensor]:
    """LR [B], and its squared distance from the target [B]."""
    baseline = pairs.values["log_z"] if config.log_z else config.eta / 2
    log_ratio = weighted_sum(side.log_ratio(), side)
    return log_ratio, (log_ratio - (config.eta * win_rate - baseline)) ** 2
