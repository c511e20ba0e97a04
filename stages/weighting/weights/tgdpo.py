"""Weights - TGDPO: the token rewards of a model trained on the preferences before, as factors around 1."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from stages.weighting.weights.base import (
    ResponseBatch,
    WeightConfig,
    WeightProvider,
    Weights,
    fraction,
    result,
)


class TGDPOWeights(WeightProvider):
    VERSION = "1"
    SOURCE = "TGDPO, Eq. 21; token rewards of DPO, or of SimPO (B.2)"
    NEEDS = frozenset({"reward_model", "reference"})

    class Config(WeightConfig):
        """Vetted setting: Table 10, Llama-3-8B-Instruct with PairRM: alpha 0.5, beta_r 0.01 read literally. The released code has one
        beta for both (`beta_r: 0.1`), which makes the weights deviate ten times as far from 1."""

        name: Literal["tgdpo"] = "tgdpo"
        alpha: float = Field(0.5, ge=0)
        """Factor of the token reward; 0.2-2."""
        beta_r: float = Field(0.01, gt=0)
        """Scale of the token reward: the beta that the reward model was trained with; 0.01-0.1 for DPO, 2.5-20 for SimPO."""
        kind: Literal["dpo", "simpo"] = "dpo"
        """How the reward model was trained: r = beta_r (log pi_rm - log pi_ref), or (beta_r / T) log pi_rm."""
        floor: float | None = None
        """Smallest weight; null: none, as the paper, so that a large alpha can turn tokens around (logged as `nonpositive`)."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        return cls.NEEDS if config.kind == "dpo" else frozenset({"reward_model"})

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""f_w = 1 + alpha r, f_l = 1 - alpha r.

        Stats: nonpositive (tokens with f <= 0, before the floor), min/weight.
        """
        tokens = batch.student
        reward = token_rewards(
            config,
            batch.column("reward_model"),
            None if config.kind == "simpo" else batch.column("reference"),
            tokens.starts,
        )
        raw = factors(reward, batch.chosen[tokens.rows()], config.alpha)
        values = raw if config.floor is None else np.maximum(raw, config.floor)
        lowest = float(raw.min()) if len(raw) else float("inf")
        return result(values, nonpositive=fraction(raw <= 0), **{"min/weight": (lowest, float(len(raw)))})


def token_rewards(
    config: TGDPOWeights.Config, model: np.ndarray, reference: np.ndarray | None, starts: np.ndarray
) -> np.ndarray:
    if config.kind == "dpo":
        return config.beta_r * (model - reference)
    lengths = np.diff(starts)
    return config.beta_r / np.repeat(lengths, lengths) * model


def factors(reward: np.ndarray, chosen: np.ndarray, alpha: float) -> np.ndarray:
    return 1 + alpha * np.where(chosen, reward, -reward)
