"""Stages - how sure a mean is: bootstrap intervals over prompts, alone and paired. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Interval(NamedTuple):
    """A mean, the ends of its interval and its standard error; of one value these three are NaN: not known."""

    mean: float
    low: float
    high: float
    stderr: float

    def ends(self) -> str:
        """Return both ends as a sentence has them.

        >>> Interval(0.2, 0.1, 0.3, 0.05).ends(), Interval(0.2, math.nan, math.nan, math.nan).ends()
        ('[+0.100, +0.300]', '[not known]')
        """
        if math.isnan(self.stderr):
            return "[not known]"
        return f"[{self.low:+.3f}, {self.high:+.3f}]"

    def text(self) -> str:
        """Return the mean and both ends as a table has them.

        >>> Interval(0.2, 0.1, 0.3, 0.05).text()
        '+0.200 [+0.100, +0.300]'
        """
        return f"{self.mean:+.3f} {self.ends()}"

    def as_json(self) -> dict[str, float | None]:
        """Return the fields by name; None for what is not known."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}


PICKS_AT_ONCE = 2**24
"""Resampled rows that are held at a time: 128 MiB."""


def bootstrap(
    values: Sequence[float] | npt.NDArray[np.float64], seed: int = 0, draws: int = 5000, level: float = 0.95
) -> Interval:
    """The percentile interval of the mean over resampled rows.

    Give one value per prompt: several answers to one prompt are not independent. One value alone says nothing about
    its error. Raises: ValueError without any value.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample):
        raise ValueError("no values to take an interval of")
    if len(sample) == 1:
        return Interval(float(sample[0]), math.nan, math.nan, math.nan)
    generator, at_once = np.random.default_rng(seed), max(1, PICKS_AT_ONCE // len(sample))
    means = np.empty(draws)
    for first in range(0, draws, at_once):
        size = (min(at_once, draws - first), len(sample))
        means[first : first + at_once] = sample[generator.integers(0, len(sample), size=size)].mean(axis=1)
    tail = (1 - level) / 2
    return Interval(
        float(sample.mean()),
        float(np.quantile(means, tail)),
        float(np.quantile(means, 1 - tail)),
        float(means.std(ddof=1)),
    )


def paired_bootstrap(before: dict[str, float], after: dict[str, float], seed: int = 0) -> Interval:
    """The interval of the mean difference after - before over the prompts that both have; pairs are resampled whole.

    before, after: prompt_id -> value.
    """
    shared = sorted(before.keys() & after.keys())
    return bootstrap([after[name] - before[name] for name in shared], seed)
