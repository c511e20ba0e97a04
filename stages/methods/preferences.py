"""Stages - a prompt's K candidates compared: preference matrices, win rates, group advantages. numpy, no gradient.

Axes: K candidates of one prompt.
"""

from __future__ import annotations

import numpy as np


def preference_matrix(logits: np.ndarray, symmetrise: bool = False) -> np.ndarray:
    """P_ij = sigmoid(s_ij), P_ii = 1/2: the probability that i beats j. [K, K] -> [K, K].

    A pair scorer need not be antisymmetric; `symmetrise` averages its two orders, (s_ij - s_ji) / 2. NaN is a tie.
    """
    logits = np.nan_to_num(np.asarray(logits, dtype=np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if symmetrise:
        logits = (logits - logits.T) / 2
    matrix = 0.5 * (1 + np.tanh(logits / 2))  # the logistic function, without overflow at either end
    np.fill_diagonal(matrix, 0.5)
    return matrix


def aggregated_preference_matrix(logits: np.ndarray) -> np.ndarray:
    """P_ij = sigmoid(r_i - r_j) with r_i the mean relative reward of i. [K, K] -> [K, K].

    The released SPPO code's matrix: transitive, unlike the paper's.
    """
    mean = np.asarray(logits, dtype=np.float64).mean(axis=1)
    return preference_matrix(mean[:, None] - mean[None, :])


def win_rates(matrix: np.ndarray) -> np.ndarray:
    """p_i = (1/K) sum_j P_ij, self included with 1/2 (SPPO, section 4). [K, K] -> [K]."""
    return np.asarray(matrix, dtype=np.float64).mean(axis=1)


def log_partition(eta: float, rates: np.ndarray) -> float:
    """log Z ~ logsumexp_b(eta p_b) - log B over B sampled responses (SPPO, Eq. 3.5)."""
    rates = eta * np.asarray(rates, dtype=np.float64)
    top = rates.max()
    return float(top + np.log(np.exp(rates - top).mean()))


def group_advantages(rewards: np.ndarray, ddof: int = 1, eps: float = 1e-4) -> np.ndarray:
    """A_i = (r_i - mean r) / (std r + eps) inside a prompt's group; 0 for a group of one. [K] -> [K].

    ddof 1 is the sample standard deviation, as TRL takes it.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if len(rewards) <= ddof:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(ddof=ddof) + eps)
