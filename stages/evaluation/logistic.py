"""Stages - logistic regression with soft labels, by Newton's method; for length and style control. Pure numpy.

Axes: N observations, F features.
"""

from __future__ import annotations

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def fit(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, ridge: float = 1e-6, lasso: float = 0.0
) -> np.ndarray:
    r"""The coefficients b [F] that minimise  sum_n w_n CE(y_n, sigmoid(x_n . b)) + ridge/2 |b|^2 + lasso |b|_1.

    features: [N, F], labels: [N] in [0, 1], weights: [N] or None for ones. There is no intercept. The ridge keeps the
    coefficients finite where the data can be separated; its effect on a fit of more than a few rows is below the fourth
    digit. Steps are halved until the loss falls, so the start (zeros) does not matter.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    w = np.ones(len(y))
    if weights is not None:
        w = np.asarray(weights, dtype=np.float64)
    b = np.zeros(x.shape[1])

    def loss(b: np.ndarray) -> float:
        z = x @ b
        return float((w * (np.logaddexp(0.0, z) - y * z)).sum() + ridge / 2 * b @ b + lasso * np.abs(b).sum())

    current = loss(b)
    for _ in range(100):
        p = sigmoid(x @ b)
        gradient = x.T @ (w * (p - y)) + ridge * b
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x + ridge * np.eye(x.shape[1])
        step = _lasso_step(hessian, gradient, b, lasso) if lasso else -np.linalg.solve(hessian, gradient)
        size = 1.0
        while (trial := loss(b + size * step)) > current and size > 1e-10:
            size /= 2
        b, before, current = b + size * step, current, trial
        if abs(before - current) <= 1e-12 * max(1.0, abs(current)) and np.abs(step).max() < 1e-8:
            break
    return b


def _lasso_step(hessian: np.ndarray, gradient: np.ndarray, b: np.ndarray, lasso: float) -> np.ndarray:
    """argmin_d  g.d + d.H.d / 2 + lasso |b + d|_1, by coordinate descent; for a handful of features. [F]."""
    target = b.copy()  # b + d
    for _ in range(1000):
        before = target.copy()
        for j in range(len(b)):
            slope = gradient[j] + hessian[j] @ (target - b) - hessian[j, j] * target[j]
            target[j] = -np.sign(slope) * max(abs(slope) - lasso, 0.0) / hessian[j, j]
        if np.abs(target - before).max() < 1e-12:
            break
    return target - b
