"""Weights - TGDPO: the token rewards of a model trained on the preferences before, as factors around 1."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from stages.weighting.weights.base import ResponseBatch, WeightConfig, WeightProvider, Weights, fraction


class TGDPOWeights(WeightProvider):
    """TGDPO's weights."""

    SOURCE = "TGDPO, Eq. 21; token rewards of DPO, or of SimPO (B.2)"
    NEEDS = frozenset({"reward_model", "reference"})

    class Config(WeightConfig):
        """Vetted setting: Table 10, Llama-3-8B-Instruct with PairRM: alpha 0.5, beta_r 0.01 read literally. The
        released code has one beta for both (`beta_r: 0.1`), which makes the weights deviate ten times as far from 1."""

        name: Literal["tgdpo"] = "tgdpo"
        alpha: float = Field(0.5, ge=0)
        """Factor of the token reward; 0.2-2."""
        beta_r: float = Field(0.01, gt=0)
        """Scale of the token reward: the beta that the reward model was trained with; 0.01-0.1 for DPO, 2.5-20 for
        SimPO."""
        kind: Literal["dpo", "simpo"] = "dpo"
        """How the reward model was trained: r = beta_r (log pi_rm - log pi_ref), or (beta_r / T) log pi_rm."""
        floor: float | None = None
        """Smallest weight; null: none, as the paper, so that a large alpha can turn tokens around (logged as
        `nonpositive`)."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        if config.kind == "simpo":
            return cls.NEEDS - {"reference"}
        return cls.NEEDS

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""f_w = 1 + alpha r, f_l = 1 - alpha r, with r the token reward [S].

        Stats: nonpositive (tokens with f <= 0, before the floor), min/weight.

        >>> from stages.weighting.weights.base import Tokens
        >>> logps = {"reward_model": np.array([-1.0, -1.0]), "reference": np.array([-2.0, -2.0])}
        >>> tokens = Tokens.of([[5], [6]], None, ended=[False, False])  # N = 2, S = 2
        >>> batch = ResponseBatch(["a/chosen", "a/rejected"], np.array([True, False]), tokens, logps)
        >>> TGDPOWeights.weights(TGDPOWeights.Config(beta_r=0.1), batch).values.tolist()  # 1 +- 0.5 * 0.1 * 1
        [1.05, 0.95]
        """
        raw = factors(token_rewards(config, batch), batch.chosen[batch.student.rows()], config.alpha)
        values = raw
        if config.floor is not None:
            values = np.maximum(raw, config.floor)
        lowest = float(raw.min(initial=np.inf))
        return Weights.of(values, nonpositive=fraction(raw <= 0), **{"min/weight": (lowest, float(len(raw)))})


def token_rewards(config: TGDPOWeights.Config, batch: ResponseBatch) -> np.ndarray:
    """r = beta_r (log pi_rm - log pi_ref), or (beta_r / T) log pi_rm. [S]."""
    logps = batch.column("reward_model")
    if config.kind == "dpo":
        return config.beta_r * (logps - batch.column("reference"))
    lengths = np.diff(batch.student.starts)
    return config.beta_r / np.repeat(lengths, lengths) * logps


def factors(reward: np.ndarray, is_chosen: np.ndarray, alpha: float) -> np.ndarray:
    """1 + alpha r for chosen responses, 1 - alpha r for rejected ones. [S]."""
    return 1 + alpha * np.where(is_chosen, reward, -reward)
