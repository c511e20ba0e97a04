"""Stages - decimal rounding as Python does it, for weights whose published code stores rounded numbers."""

from __future__ import annotations

import numpy as np


def round_decimals(values: np.ndarray, decimals: int) -> np.ndarray:
    """round(x, decimals) of every entry, as Python rounds.

    numpy scales by 10^d first, which moves ties; those few go through Python's own.

    >>> round_decimals(np.array([2.675, 0.125]), 2).tolist(), np.round([2.675, 0.125], 2).tolist()
    ([2.67, 0.12], [2.68, 0.12])
    """
    scale = 10.0**decimals
    rounded = np.round(values, decimals)
    ties = np.flatnonzero(np.abs(np.abs(values * scale - np.floor(values * scale)) - 0.5) < 1e-6)
    rounded[ties] = [round(float(value), decimals) for value in values[ties]]
    return rounded
