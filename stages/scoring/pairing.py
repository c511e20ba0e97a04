"""Stages - raw scores -> rows to train on: a pure step, no model, no file.

Axes: K candidates of one prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stages.methods.preferences import preference_matrix, win_rates
from stages.scoring.base import Scores


class Choice(NamedTuple):
    """One row: which candidate is chosen, and over which."""

    chosen: int
    rejected: int | None


class Group(NamedTuple):
    """The K candidates of a prompt among each other; NaN for one that could not be scored."""

    rewards: np.ndarray
    """[K] mean relative reward (1/K) sum_j s_ij, or the score of a pointwise scorer: the same order."""
    win_rates: np.ndarray
    """[K] against the candidates that could be scored, self counted 1/2."""


def group_of(scores: Scores, tau: float) -> Group:
    """Win rates and rewards. A pointwise score r gives s_ij = (r_i - r_j) / tau; tau 0: the better one wins for sure."""
    if scores.preference_logits is not None:
        logits = scores.preference_logits
        usable = np.flatnonzero(~np.isnan(logits).all(axis=1, where=~np.eye(len(logits), dtype=bool)))
        logits = logits[np.ix_(usable, usable)]
        rewards = np.nan_to_num(logits).mean(axis=1) if len(usable) else np.zeros(0)  # a comparison that failed is a tie
        count = len(scores.preference_logits)
    else:
        usable, count = np.flatnonzero(~np.isnan(scores.scores)), len(scores.scores)
        rewards = scores.scores[usable]
        difference = rewards[:, None] - rewards[None, :]
        with np.errstate(invalid="ignore"):  # sign(0) * inf is NaN: a tie
            logits = np.sign(difference) * np.inf if tau == 0 else difference / tau
    group = Group(np.full(count, np.nan), np.full(count, np.nan))
    if len(usable):
        group.rewards[usable] = rewards
        group.win_rates[usable] = win_rates(preference_matrix(logits))
    return group


def best_vs_worst(group: Group) -> list[Choice] | str:
    """The candidates with the highest and the lowest reward; the first wins a tie. Or the reason why this prompt gives none."""
    usable = np.flatnonzero(~np.isnan(group.rewards))
    if len(usable) < 2:
        return "fewer than two candidates could be scored"
    rewards = group.rewards[usable]
    best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
    if rewards[best] == rewards[worst]:
        return "all candidates are equally good"
    return [Choice(int(usable[best]), int(usable[worst]))]


def each(group: Group) -> list[Choice] | str:
    """Every candidate that could be scored is a row of its own."""
    usable = np.flatnonzero(~np.isnan(group.rewards))
    return [Choice(int(k), None) for k in usable] if len(usable) else "no candidate could be scored"


CHOOSE: dict[str, Any] = {"best_vs_worst": best_vs_worst, "each": each}
