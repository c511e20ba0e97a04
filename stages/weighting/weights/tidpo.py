"""Weights - TI-DPO's importance under the reference, once: the cheap twin of recomputing it at every step."""

from __future__ import annotations

from typing import Literal

import numpy as np

from stages.methods.importance import DEGENERATE
from stages.weighting.weights.base import (
    ResponseBatch,
    WeightConfig,
    WeightProvider,
    Weights,
    fraction,
    result,
)


class TIDPOWeights(WeightProvider):
    VERSION = "1"
    SOURCE = "TI-DPO v1, Eq. 6-9"
    NEEDS = frozenset({"importance"})

    class Config(WeightConfig):
        """No setting. Goes with the method `tidpo` at `importance: given`."""

        name: Literal["tidpo"] = "tidpo"

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""w_i = (I_i - min I) / (max I - min I) over each response; ones where it has one token or equal importances.

        Stats: degenerate (such responses).
        """
        importance, starts = batch.column("importance"), batch.student.starts
        lengths = np.diff(starts)
        full = lengths > 0
        low, high = np.zeros(len(lengths)), np.zeros(len(lengths))
        if full.any():
            low[full] = np.minimum.reduceat(importance, starts[:-1][full])
            high[full] = np.maximum.reduceat(importance, starts[:-1][full])
        gap = high - low
        flat = (gap <= DEGENERATE) | (lengths <= 1)
        scaled = (importance - np.repeat(low, lengths)) / np.repeat(np.where(flat, 1.0, gap), lengths)
        return result(np.where(np.repeat(flat, lengths), 1.0, scaled), degenerate=fraction(flat[full]))
