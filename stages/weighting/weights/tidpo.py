"""Weights - TI-DPO's importance under the reference, once: the cheap twin of recomputing it at every step."""

from __future__ import annotations

from typing import Literal

import numpy as np

from stages.methods.importance import DEGENERATE
from stages.weighting.weights.base import ResponseBatch, WeightConfig, WeightProvider, Weights, fraction


class TIDPOWeights(WeightProvider):
    """TI-DPO's importance, scaled to [0, 1] in each response."""

    SOURCE = "TI-DPO v1, Eq. 6-9"
    NEEDS = frozenset({"importance"})

    class Config(WeightConfig):
        """No setting. Goes with the method `tidpo` at `importance: given`."""

        name: Literal["tidpo"] = "tidpo"

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""w_i = (I_i - min I) / (max I - min I) over each response; ones where it has one token or equal importances.

        Stats: degenerate (such responses).

        >>> from stages.weighting.weights.base import Tokens
        >>> tokens = Tokens.of([[5, 6, 7]], None, ended=[False])  # N = 1, S = 3
        >>> batch = ResponseBatch(["a/chosen"], np.array([True]), tokens, {"importance": np.array([1.0, 3.0, 2.0])})
        >>> TIDPOWeights.weights(TIDPOWeights.Config(), batch).values.tolist()
        [0.0, 1.0, 0.5]
        """
        importance, starts = batch.column("importance"), batch.student.starts
        lengths = np.diff(starts)
        is_full = lengths > 0
        low, high = np.zeros(len(lengths)), np.zeros(len(lengths))
        if is_full.any():
            low[is_full] = np.minimum.reduceat(importance, starts[:-1][is_full])
            high[is_full] = np.maximum.reduceat(importance, starts[:-1][is_full])
        gap = high - low
        is_flat = (gap <= DEGENERATE) | (lengths <= 1)
        scaled = (importance - np.repeat(low, lengths)) / np.repeat(np.where(is_flat, 1.0, gap), lengths)
        values = np.where(np.repeat(is_flat, lengths), 1.0, scaled)
        return Weights.of(values, degenerate=fraction(is_flat[is_full]))
