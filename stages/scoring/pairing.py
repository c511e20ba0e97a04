"""Stages - raw scores -> preference pairs: a pure step, no model, no file.

Axes: K candidates of one prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stages.scoring.base import Scores


class Pair(NamedTuple):
    chosen: int
    rejected: int
    win_rates: np.ndarray
    """[K], self counted 1/2."""


def preference_logits(scores: Scores, tau: float) -> np.ndarray:
    """s_ij, antisymmetric or not: the pair scorer's own logits, or (r_i - r_j) / tau of a pointwise one. [K, K]; NaN rows: unscored."""
    if scores.preference_logits is not None:
        return scores.preference_logits
    difference = scores.scores[:, None] - scores.scores[None, :]
    return np.sign(difference) * np.inf if tau == 0 else difference / tau


def win_rates(logits: np.ndarray) -> np.ndarray:
    """p_i = (1/K) sum_j P_ij with P_ij = sigmoid(s_ij) and P_ii = 1/2 (SPPO, section 4). [K, K] -> [K]."""
    logits = np.where(np.isnan(logits), 0.0, logits)  # sign(0) * inf is NaN: a tie
    preference = 0.5 * (1 + np.tanh(logits / 2))  # the logistic function, without overflow at either end
    np.fill_diagonal(preference, 0.5)
    return preference.mean(axis=1)


def best_vs_worst(scores: Scores, generations: list[dict[str, Any]], tau: float) -> Pair | str:
    """The candidates with the highest and the lowest mean relative reward (1/K) sum_j s_ij; the first wins a tie.

    Returns: the pair, with win rates against the candidates that could be scored; or the reason why this prompt gives none.
    """
    usable = np.arange(len(generations)) if scores.scores is None else np.flatnonzero(~np.isnan(scores.scores))
    if len(usable) < 2:
        return "fewer than two candidates could be scored"
    kept = Scores(
        None if scores.scores is None else scores.scores[usable],
        None if scores.preference_logits is None else scores.preference_logits[np.ix_(usable, usable)],
        [],
    )
    # A pointwise mean relative reward orders like the score itself, also at tau = 0 where s_ij is infinite.
    reward = kept.scores if kept.preference_logits is None else kept.preference_logits.mean(axis=1)
    best, worst = int(np.argmax(reward)), int(np.argmin(reward))
    if reward[best] == reward[worst]:
        return "all candidates are equally good"
    chosen, rejected = int(usable[best]), int(usable[worst])
    if generations[chosen]["token_ids"] == generations[rejected]["token_ids"]:
        return "chosen and rejected are the same text"
    rates = np.full(len(generations), np.nan)
    rates[usable] = win_rates(preference_logits(kept, tau))
    return Pair(chosen, rejected, rates)
