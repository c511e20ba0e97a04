"""Stages - how sure a mean is: bootstrap intervals over prompts, alone and paired. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    stderr: float


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 5000, level: float = 0.95) -> Interval:
    """Percentile interval of the mean over resampled rows. One value per prompt: several answers to one prompt are not independent."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no values to take an interval of")
    picks = np.random.default_rng(seed).integers(0, len(values), size=(draws, len(values)))
    means = values[picks].mean(axis=1)
    tail = (1 - level) / 2
    return Interval(
        float(values.mean()),
        float(np.quantile(means, tail)),
        float(np.quantile(means, 1 - tail)),
        float(means.std(ddof=1)),
    )


def paired_bootstrap(before: dict[str, float], after: dict[str, float], seed: int = 0) -> Interval:
    """Interval of the mean difference after - before over the prompts that both have; the prompts are resampled, their pairs kept."""
    shared = sorted(before.keys() & after.keys())
    return bootstrap([after[name] - before[name] for name in shared], seed)
