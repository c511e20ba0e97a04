"""Stages - raw scores -> rows to train on: a pure step, no model, no file.

Axes: K candidates of one prompt.
"""

from __future__ import annotations

import random
from typing import Any, Literal, NamedTuple

import numpy as np

from stages.methods.preferences import preference_matrix, win_rates
from stages.scoring.base import Scores

Preference = Literal["both_orders", "one_order", "sppo_release"]


class Choice(NamedTuple):
    """One row: which candidate is chosen, and over which."""

    chosen: int
    rejected: int | None


class Group(NamedTuple):
    """The K candidates of a prompt among each other; NaN for one that could not be scored."""

    rewards: np.ndarray
    """[K] mean relative reward (1/K) sum_j s_ij, or the score of a pointwise scorer: the same order."""
    win_rates: np.ndarray
    """[K] against the candidates that it was compared with, self counted 1/2."""
    preferences: np.ndarray | None = None
    """[K, K] P(i beats j)."""


class Rules(NamedTuple):
    """What a pairing may ask beside the group."""

    lengths: tuple[int, ...] = ()
    """[K] tokens of each candidate."""
    prompt_id: str = ""
    seed: int = 0
    max_length_ratio: float = 1.25
    min_preference: float | None = None


def relative_rewards(logits: np.ndarray, preference: Preference) -> np.ndarray:
    r"""s_ij, what P(i beats j) = sigmoid(s_ij) is made of, from the raw logits of a pair scorer. [K, K] -> [K, K].

        both_orders    s_ij = (L_ij - L_ji) / 2                the position bias of the scorer cancels
        one_order      s_ij = L_ij                             each pair as it was asked
        sppo_release   s_ij = r_i - r_j,  r_i = (1/K) sum_j (L_ij - L_ji)

    The last one is the released SPPO code (llm_blender's rank scores, then compute_prob.py): transitive, about twice as wide as the first,
    and P of two candidates depends on the others, unlike the paper's. NaN where a comparison (with both orders, either of the two) failed.
    """
    logits = np.array(logits, dtype=np.float64)
    np.fill_diagonal(logits, 0.0)
    if preference == "one_order":
        return logits
    with np.errstate(invalid="ignore"):
        difference = logits - logits.T
    if preference == "both_orders":
        return difference / 2
    rewards = np.nanmean(difference, axis=1)
    return rewards[:, None] - rewards[None, :]


def group_of(scores: Scores, tau: float, preference: Preference = "one_order") -> Group:
    """Win rates and rewards. A pointwise score r gives s_ij = (r_i - r_j) / tau; tau 0: the better one wins for sure.

    A comparison that failed is no tie: it is left out of the means.
    """
    if scores.preference_logits is not None:
        relative = relative_rewards(scores.preference_logits, preference)
        usable = np.flatnonzero(~np.isnan(relative).all(axis=1, where=~np.eye(len(relative), dtype=bool)))
        relative = relative[np.ix_(usable, usable)]
        rewards = (
            np.nanmean(np.clip(relative, -1e300, 1e300), axis=1) if len(usable) else np.zeros(0)
        )  # inf - inf would be NaN
        count = len(scores.preference_logits)
    else:
        usable, count = np.flatnonzero(~np.isnan(scores.scores)), len(scores.scores)
        rewards = scores.scores[usable]
        difference = rewards[:, None] - rewards[None, :]
        with np.errstate(invalid="ignore"):  # sign(0) * inf is NaN: a tie
            relative = (
                np.nan_to_num(np.sign(difference) * np.inf, posinf=np.inf, neginf=-np.inf)
                if tau == 0
                else difference / tau
            )
    group = Group(np.full(count, np.nan), np.full(count, np.nan), np.full((count, count), np.nan))
    if len(usable):
        matrix = np.where(np.isnan(relative), np.nan, preference_matrix(relative))
        group.rewards[usable] = rewards
        group.win_rates[usable] = np.nanmean(matrix, axis=1) if np.isnan(matrix).any() else win_rates(matrix)
        group.preferences[np.ix_(usable, usable)] = matrix
    return group


def _usable(group: Group) -> np.ndarray:
    return np.flatnonzero(~np.isnan(group.rewards))


TOO_FEW, ALL_EQUAL = "fewer than two candidates could be scored", "all candidates are equally good"


def best_vs_worst(group: Group, rules: Rules = Rules()) -> list[Choice] | str:  # noqa: B008 - a NamedTuple does not change
    """The candidates with the highest and the lowest reward; the first wins a tie. Or the reason why this prompt gives none."""
    usable = _usable(group)
    if len(usable) < 2:
        return TOO_FEW
    rewards = group.rewards[usable]
    best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
    if rewards[best] == rewards[worst]:
        return ALL_EQUAL
    return _sure_enough([Choice(int(usable[best]), int(usable[worst]))], group, rules)


def _ordered_pairs(group: Group) -> list[Choice] | str:
    """Every pair of unequal candidates, the better one chosen. Or the reason why there is none."""
    usable = [int(k) for k in _usable(group)]
    if len(usable) < 2:
        return TOO_FEW
    return [Choice(i, j) for i in usable for j in usable if group.rewards[i] > group.rewards[j]] or ALL_EQUAL


def random_pair(group: Group, rules: Rules) -> list[Choice] | str:
    """One of the unequal pairs, drawn by prompt and seed: as many rows as best_vs_worst, of any difficulty."""
    pairs = _ordered_pairs(group)
    if isinstance(pairs, str):
        return pairs
    return _sure_enough([random.Random(f"{rules.seed}/{rules.prompt_id}").choice(pairs)], group, rules)


def length_matched(group: Group, rules: Rules) -> list[Choice] | str:
    """The widest difference of reward among pairs of about the same length, so that length is nothing to learn."""
    pairs = _ordered_pairs(group)
    if isinstance(pairs, str):
        return pairs
    lengths = np.maximum(rules.lengths, 1)
    near = [pair for pair in pairs if max(lengths[list(pair)]) <= rules.max_length_ratio * min(lengths[list(pair)])]
    if not near:
        return "no two unequal candidates are of about the same length"
    return _sure_enough(
        [max(near, key=lambda pair: group.rewards[pair.chosen] - group.rewards[pair.rejected])], group, rules
    )


def all_pairs(group: Group, rules: Rules) -> list[Choice] | str:
    """Every pair of unequal candidates is a row."""
    pairs = _ordered_pairs(group)
    return pairs if isinstance(pairs, str) else _sure_enough(pairs, group, rules)


def _sure_enough(pairs: list[Choice], group: Group, rules: Rules) -> list[Choice] | str:
    """Pairs whose preference reaches the threshold; a comparison that failed does not."""
    if rules.min_preference is None:
        return pairs
    kept = [pair for pair in pairs if group.preferences[pair.chosen, pair.rejected] >= rules.min_preference]
    return kept or "no preference reaches min_preference"


def each(group: Group, rules: Rules = Rules()) -> list[Choice] | str:  # noqa: B008 - a NamedTuple does not change
    """Every candidate that could be scored is a row of its own."""
    usable = _usable(group)
    return [Choice(int(k), None) for k in usable] if len(usable) else "no candidate could be scored"


CHOOSE: dict[str, Any] = {
    "best_vs_worst": best_vs_worst,
    "each": each,
    "random_pair": random_pair,
    "length_matched": length_matched,
    "all_pairs": all_pairs,
}


class PairStatistics(NamedTuple):
    """What a pair scorer's raw logits say of the scorer itself; sums over prompts, so that shards add up."""

    pairs: int
    """Unordered pairs that were compared in both orders."""
    bias: float
    """Sum of (L_ij + L_ji) / 2: > 0, the first place is favoured; 0 for a scorer that looks at the texts only."""
    width: float
    """Sum of |L_ij - L_ji| / 2, to compare the bias with."""
    decided_by_order: int
    """Pairs where the winner is whoever came first, or whoever came last."""
    triples: int
    cyclic: int
    """Triples of which each beats the next: no ranking agrees with them."""

    def rates(self) -> dict[str, float]:
        pairs, triples = max(1, self.pairs), max(1, self.triples)
        return {
            "position_bias": self.bias / pairs,
            "mean_preference_logit": self.width / pairs,
            "decided_by_order": self.decided_by_order / pairs,
            "cyclic_triples": self.cyclic / triples,
        }


def pair_statistics(matrices: list[np.ndarray]) -> PairStatistics:
    """Over the raw logit matrices of many prompts; failed comparisons are left out."""
    pairs, bias, width, decided, triples, cyclic = 0, 0.0, 0.0, 0, 0, 0
    for logits in matrices:
        upper = np.triu_indices(len(logits), 1)
        there, back = logits[upper], logits.T[upper]
        known = (
            np.isfinite(there) & np.isfinite(back) & ((there != 0) | (back != 0))
        )  # 0 and 0: equal texts, never asked
        there, back = there[known], back[known]
        pairs, bias, width = (
            pairs + len(there),
            bias + float((there + back).sum() / 2),
            width + float(np.abs(there - back).sum() / 2),
        )
        decided += int((np.sign(there) * np.sign(back) > 0).sum())
        wins = (logits - logits.T) > 0
        losses = wins.T
        for i in range(len(logits)):
            for j in range(i + 1, len(logits)):
                for k in range(j + 1, len(logits)):
                    if all(wins[a, b] or losses[a, b] for a, b in ((i, j), (j, k), (i, k))):
                        triples += 1
                        cyclic += bool(wins[i, j] == wins[j, k] != wins[i, k])
    return PairStatistics(pairs, bias, width, decided, triples, cyclic)
