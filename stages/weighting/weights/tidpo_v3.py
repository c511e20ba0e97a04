"""Weights - TI-DPO v3's: importance mixed with a prior over positions, under the reference, once."""

from __future__ import annotations

from typing import Literal

import numpy as np

from stages.methods.importance import HybridSettings
from stages.weighting.weights.base import (
    ResponseBatch,
    WeightConfig,
    WeightProvider,
    Weights,
    fraction,
    segment_sum,
)


class TIDPOv3Weights(WeightProvider):
    """TI-DPO v3's weights: the cheap twin of recomputing them at every step."""

    SOURCE = "TI-DPO v3 (ICLR 2026); variant code: its public fork"
    NEEDS = frozenset({"importance_max_logit"})

    class Config(HybridSettings, WeightConfig):
        """Vetted setting: lam 0.7, sigma T/4. Goes with the method `tidpo` at `importance: given`."""

        name: Literal["tidpo_v3"] = "tidpo_v3"

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""W_t = lam I_t / sum I + (1 - lam) exp(-((t - mu) / sigma)^2 / 2), as methods.importance.hybrid. [S].

        Stats: degenerate (responses whose importances are all 0: the prior alone).

        >>> from stages.weighting.weights.base import Tokens
        >>> tokens = Tokens.of([[5, 6]], None, ended=[False])  # N = 1, S = 2; mu 0.5, sigma 0.5
        >>> batch = ResponseBatch(
        ...     ["a/chosen"], np.array([True]), tokens, {"importance_max_logit": np.array([3.0, 1.0])})
        >>> TIDPOv3Weights.weights(TIDPOv3Weights.Config(), batch).values.round(4).tolist()
        [0.707, 0.357]
        """
        importance, starts = batch.column("importance_max_logit"), batch.student.starts
        lengths = np.diff(starts)
        size = np.repeat(lengths, lengths).astype(np.float64)
        position = np.arange(len(importance)) - np.repeat(starts[:-1], lengths)
        sigma = size / config.sigma_div
        if config.variant == "code":
            sigma = np.maximum(sigma, 1.0)
        prior = np.exp(-0.5 * ((position - (size - 1) / 2) / sigma) ** 2)
        if config.variant == "code":
            prior /= np.repeat(segment_sum(prior, starts), lengths)
        sums = segment_sum(importance, starts)
        total = np.repeat(sums, lengths)
        share = importance / np.where(total > 0, total, 1.0)
        values = np.where(total > 0, config.lam * share + (1 - config.lam) * prior, prior)
        if config.variant == "code":
            values = values * size / np.repeat(segment_sum(values, starts), lengths)
        return Weights.of(values, degenerate=fraction(sums[lengths > 0] == 0))
