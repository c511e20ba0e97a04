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
    weighted_sum,
)
from stages.methods.preferences import log_partition
from stages.models.lazy import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class SPPO(Method):
    VERSION = "1"
    SOURCE = "Wu et al. 2024, Eq. 3.5-3.7 and E.1 (arXiv:2405.00675)"
    NEEDS = frozenset({"reference", "win_rates"})
    DROP_IDENTICAL = False

    class Config(MethodConfig):
        """Vetted setting: eta 1e3 with soft win rates over K = 5 candidates; clip gradients at 1 (always active at this eta)."""

        name: Literal["sppo"] = "sppo"
        eta: float = Field(1000.0, gt=0)
        """Step size of the multiplicative update, 1/beta. The target of a sure winner is eta/2 nats."""
        target: Literal["soft", "hard"] = "soft"
        """soft: win rates over the K candidates; hard: 1 and 0."""
        keep: Literal["2", "all"] = "2"
        """2: best and worst candidate; all: every candidate is a row of its own (pairing `each`)."""
        log_z: bool = False
        """Subtract the estimated log partition function instead of eta/2. Usable only with a small eta: at 1e3 it pushes every
        answer but the best down by hundreds of nats."""
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
        return cls.NEEDS | ({"log_z"} if config.log_z else set())

    @classmethod
    def sides(cls, config: Config) -> tuple[str, ...]:
        return ("chosen",) if config.keep == "all" else cls.SIDES

    @staticmethod
    def row_values(config: Config, scores: np.ndarray, win_rates: np.ndarray) -> dict[str, np.ndarray]:
        """log Z over the prompt's own K candidates stands for the paper's B fresh ones; one number for all of them."""
        return {"log_z": win_rates * 0 + log_partition(config.eta, win_rates)} if config.log_z else {}

    @staticmethod
    def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
        r"""loss = sum over the kept responses of (LR(y) - eta (p - 1/2))^2, or (LR(y) - (eta p - log Z))^2.

        Shapes: see Pairs. Returns: unreduced loss [B]. LR is the sum of log-ratios, p the win rate against all K candidates of the
        prompt (self counted 1/2). At policy = reference: eta^2 ((p_w - 1/2)^2 + (p_l - 1/2)^2).
        Deviates from the paper: (1) win rates over K also in the pair form, where E.1 prints the probability of the pair, as its
        algorithm and code do.
        """
        square = config.eta**2 if config.scale == "unit" else 1.0
        chosen, loss = _squared_error(config, pairs, pairs.chosen, pairs.win_rate_chosen, winner=True)
        if pairs.rejected is None:
            return PairLoss(loss / square, single_metrics(pairs, **{"log_ratio/chosen": chosen}))
        rejected, other = _squared_error(config, pairs, pairs.rejected, pairs.win_rate_rejected, winner=False)
        loss = (loss + other) / (2 if config.halve else 1) / square
        return PairLoss(loss, pair_metrics(pairs, chosen / config.eta, rejected / config.eta))


def _squared_error(
    config: SPPO.Config, pairs: Pairs, side: Responses, win_rate: Tensor, winner: bool
) -> tuple[Tensor, Tensor]:
    """LR [B] and its squared distance from the target [B]."""
    if config.target == "hard":
        win_rate = torch.full_like(win_rate, float(winner))
    baseline = pairs.values["log_z"] if config.log_z else config.eta / 2
    log_ratio = weighted_sum(side.log_ratio(), side)
    return log_ratio, (log_ratio - (config.eta * win_rate - baseline)) ** 2
