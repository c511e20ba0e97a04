"""Stages - raw scores -> rows to train on: pure functions, no model, no file.

A pairing is a function that picks the rows of one prompt, and one line of the table PAIRINGS, which says what it needs.

Axes: K candidates of one prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from stages.methods.preferences import preference_matrix, win_rates
from stages.scoring.base import Scores
from stages.scoring.table import Table

Preference = Literal["both_orders", "one_order", "sppo_release"]


TextField = Literal["response", "chosen", "rejected"]
"""A field of the prompt that holds a given text."""


class Choice(NamedTuple):
    """One row: a response chosen over another. A number is a candidate, a name is a given text of the prompt."""

    chosen: int | TextField
    rejected: int | TextField | None
    """None: a row of a single response."""


Choices = list[Choice] | str
"""The rows of one prompt, or the reason why it gives none."""


class Group(NamedTuple):
    """The K candidates of a prompt compared with each other; NaN for one that could not be scored."""

    rewards: np.ndarray
    """[K] mean relative reward (1/K) sum_j s_ij, or the points of a scorer that gives points: the same order."""
    win_rates: np.ndarray
    """[K] against the candidates that it was compared with, self counted 1/2."""
    preferences: np.ndarray
    """[K, K] P(i beats j)."""

    @classmethod
    def unscored(cls, count: int) -> Group:
        """Of `count` candidates without scores."""
        return cls(np.full(count, np.nan), np.full(count, np.nan), np.full((count, count), np.nan))


class Rules(NamedTuple):
    """What a pairing may use beside the group: settings of the score stage, and the prompt's own facts."""

    lengths: tuple[int, ...] = ()
    """[K] tokens of each candidate."""
    prompt_id: str = ""
    seed: int = 0
    max_length_ratio: float = 1.25
    min_preference: float | None = None


class Pairing(NamedTuple):
    """How the rows of a prompt are picked, and what that needs."""

    choose: Callable[[Group, Rules], Choices]
    made_of: str = "K candidates and a scorer"
    """What the rows are made of, for `selfplay methods`."""
    candidates: int = 2
    """Generations that every prompt needs at least; 0: the stage reads no generations."""
    needs_scores: bool = True
    texts: tuple[TextField, ...] = ()
    """The given texts that become responses."""
    is_single: bool = False
    """Whether a row is a single response."""


# --- scores -> preferences ---


def relative_rewards(logits: np.ndarray, preference: Preference) -> np.ndarray:
    r"""s_ij, of which P(i beats j) = sigmoid(s_ij), from the raw logits L of a pair scorer. [K, K] -> [K, K].

        both_orders    s_ij = (L_ij - L_ji) / 2                the position bias of the scorer cancels
        one_order      s_ij = L_ij                             each pair as it was asked
        sppo_release   s_ij = r_i - r_j,  r_i = (1/K) sum_j (L_ij - L_ji)

    The last one is the released SPPO code (llm_blender's rank scores, then compute_prob.py): transitive, about twice as
    wide as the first, and P of two candidates depends on the others, unlike the paper's. NaN where a comparison (with
    both orders, either of the two) failed.
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
    """Rewards, win rates and preferences from raw scores. Points r give s_ij = (r_i - r_j) / tau; tau 0: the better one
    wins for sure.

    A comparison that failed is no tie: it is left out of the means.
    """
    if scores.preference_logits is not None:
        usable, rewards, relative = _from_comparisons(scores.preference_logits, preference)
    elif scores.scores is not None:
        usable, rewards, relative = _from_points(scores.scores, tau)
    else:
        return Group.unscored(len(scores.reasons))
    group = Group.unscored(len(scores.reasons))
    if len(usable):
        matrix = np.where(np.isnan(relative), np.nan, preference_matrix(relative))
        group.rewards[usable] = rewards
        group.win_rates[usable] = np.nanmean(matrix, axis=1) if np.isnan(matrix).any() else win_rates(matrix)
        group.preferences[np.ix_(usable, usable)] = matrix
    return group


def _from_comparisons(logits: np.ndarray, preference: Preference) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the usable candidates, their rewards [U], and s_ij among them [U, U]."""
    relative = relative_rewards(logits, preference)
    usable = np.flatnonzero(~np.isnan(relative).all(axis=1, where=~np.eye(len(relative), dtype=bool)))
    relative = relative[np.ix_(usable, usable)]
    if not len(usable):
        return usable, np.zeros(0), relative
    return usable, np.nanmean(np.clip(relative, -1e300, 1e300), axis=1), relative  # inf - inf would be NaN


def _from_points(points: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same from points; the reward is the point."""
    usable = np.flatnonzero(~np.isnan(points))
    rewards = points[usable]
    difference = rewards[:, None] - rewards[None, :]
    if tau > 0:
        return usable, rewards, difference / tau
    with np.errstate(invalid="ignore"):  # sign(0) * inf is NaN: a tie
        return usable, rewards, np.nan_to_num(np.sign(difference) * np.inf, posinf=np.inf, neginf=-np.inf)


# --- preferences -> rows ---

TOO_FEW, ALL_EQUAL = "fewer than two candidates could be scored", "all candidates are equally good"


def best_vs_worst(group: Group, rules: Rules = Rules()) -> Choices:  # noqa: B008 - a NamedTuple does not change
    """The candidate with the highest reward over the one with the lowest; the first wins a tie."""
    usable = _usable(group)
    if len(usable) < 2:
        return TOO_FEW
    best, worst = max(usable, key=group.rewards.__getitem__), min(usable, key=group.rewards.__getitem__)
    if group.rewards[best] == group.rewards[worst]:
        return ALL_EQUAL
    return _sure_enough([(best, worst)], group, rules)


def random_pair(group: Group, rules: Rules) -> Choices:
    """One of the unequal pairs, drawn by prompt and seed: as many rows as best_vs_worst, of any difficulty."""
    pairs = _unequal_pairs(group)
    if isinstance(pairs, str):
        return pairs
    return _sure_enough([random.Random(f"{rules.seed}/{rules.prompt_id}").choice(pairs)], group, rules)


def length_matched(group: Group, rules: Rules) -> Choices:
    """The pair with the widest difference of reward among pairs of about the same length, so that length is nothing to
    learn."""
    pairs = _unequal_pairs(group)
    if isinstance(pairs, str):
        return pairs
    lengths = np.maximum(rules.lengths, 1)
    near = [pair for pair in pairs if max(lengths[list(pair)]) <= rules.max_length_ratio * min(lengths[list(pair)])]
    if not near:
        return "no two unequal candidates are of about the same length"
    widest = max(near, key=lambda pair: group.rewards[pair[0]] - group.rewards[pair[1]])
    return _sure_enough([widest], group, rules)


def all_pairs(group: Group, rules: Rules) -> Choices:
    """Every pair of unequal candidates, the better one chosen."""
    pairs = _unequal_pairs(group)
    if isinstance(pairs, str):
        return pairs
    return _sure_enough(pairs, group, rules)


def each(group: Group, rules: Rules = Rules()) -> Choices:  # noqa: B008 - a NamedTuple does not change
    """Every candidate that could be scored, by itself."""
    return [Choice(k, None) for k in _usable(group)] or "no candidate could be scored"


def generations(group: Group, rules: Rules) -> Choices:
    """Every candidate by itself, scored or not: distillation on the policy's own samples."""
    return [Choice(k, None) for k in range(len(group.rewards))] or "no candidate"


def given(group: Group, rules: Rules) -> Choices:
    """The prompt's `chosen` over its `rejected`."""
    return [Choice("chosen", "rejected")]


def given_each(group: Group, rules: Rules) -> Choices:
    """The prompt's `chosen` and its `rejected`, each by itself: a good answer and a bad one (KTO)."""
    return [Choice("chosen", None), Choice("rejected", None)]


def truth_vs_generation(group: Group, rules: Rules) -> Choices:
    """The prompt's `response` over candidate 0 (SPIN)."""
    return [Choice("response", 0)]


def truth(group: Group, rules: Rules) -> Choices:
    """The prompt's `response` alone (SFT)."""
    return [Choice("response", None)]


def _usable(group: Group) -> list[int]:
    """Numbers of the candidates that could be scored."""
    return np.flatnonzero(~np.isnan(group.rewards)).tolist()


def _unequal_pairs(group: Group) -> list[tuple[int, int]] | str:
    """Every pair of unequal candidates, the better one first; or the reason why there is none."""
    usable = _usable(group)
    if len(usable) < 2:
        return TOO_FEW
    return [(i, j) for i in usable for j in usable if group.rewards[i] > group.rewards[j]] or ALL_EQUAL


def _sure_enough(pairs: Sequence[tuple[int, int]], group: Group, rules: Rules) -> Choices:
    """The pairs whose preference reaches min_preference, as rows; one whose comparison failed does not."""
    least = rules.min_preference
    rows = [Choice(i, j) for i, j in pairs if least is None or group.preferences[i, j] >= least]
    return rows or "no preference reaches min_preference"


PAIRINGS = Table(
    "pairings",
    Pairing,
    {
        "best_vs_worst": Pairing(best_vs_worst),
        "each": Pairing(each, candidates=1, is_single=True),
        "generations": Pairing(generations, "generations", 1, needs_scores=False, is_single=True),
        "random_pair": Pairing(random_pair),
        "length_matched": Pairing(length_matched),
        "all_pairs": Pairing(all_pairs),
        "given": Pairing(given, "given pairs", 0, needs_scores=False, texts=("chosen", "rejected")),
        "given_each": Pairing(
            given_each,
            "given answers, good or bad",
            0,
            needs_scores=False,
            texts=("chosen", "rejected"),
            is_single=True,
        ),
        "truth_vs_generation": Pairing(
            truth_vs_generation, "ground truths and one generation each", 1, needs_scores=False, texts=("response",)
        ),
        "truth": Pairing(truth, "ground truths", 0, needs_scores=False, texts=("response",), is_single=True),
    },
)


# --- a scorer's consistency ---


class PairStatistics(NamedTuple):
    """What the raw logits of a pair scorer say about the scorer; sums over prompts, so that shards add up."""

    pairs: int
    """Unordered pairs that were compared in both orders."""
    bias: float
    """Sum of (L_ij + L_ji) / 2: > 0, the first place is favoured; 0 for a scorer that looks at the texts only."""
    width: float
    """Sum of |L_ij - L_ji| / 2, to compare the bias with."""
    decided_by_order: int
    """Pairs where the winner is whoever came first, or whoever came last."""
    triples: int
    """Sets of three candidates without a tie among them."""
    cyclic: int
    """Triples of which each beats the next: no ranking agrees with them."""

    def rates(self) -> dict[str, float]:
        """Means per pair, and the share of triples, by the names of the stage's metrics."""
        pairs, triples = max(1, self.pairs), max(1, self.triples)
        return {
            "position_bias": self.bias / pairs,
            "mean_preference_logit": self.width / pairs,
            "decided_by_order": self.decided_by_order / pairs,
            "cyclic_triples": self.cyclic / triples,
        }


def pair_statistics(matrices: Sequence[np.ndarray]) -> PairStatistics:
    """Statistics over the raw logit matrices [K, K] of many prompts; failed comparisons are left out."""
    total = np.zeros(6)
    for logits in matrices:
        upper = np.triu_indices(len(logits), 1)
        forward, backward = logits[upper], logits.T[upper]
        is_asked = (forward != 0) | (backward != 0)  # equal texts are never compared: 0 in both orders
        compared = np.isfinite(forward) & np.isfinite(backward) & is_asked
        forward, backward = forward[compared], backward[compared]
        cycles = list(_cycles(logits))
        total += (
            len(forward),
            (forward + backward).sum() / 2,
            np.abs(forward - backward).sum() / 2,
            (np.sign(forward) * np.sign(backward) > 0).sum(),
            len(cycles),
            sum(cycles),
        )
    pairs, bias, width, decided_by_order, triples, cyclic = total.tolist()
    return PairStatistics(int(pairs), bias, width, int(decided_by_order), int(triples), int(cyclic))


def _cycles(logits: np.ndarray) -> Iterator[bool]:
    """For each triple without a tie: whether it is a cycle."""
    with np.errstate(invalid="ignore"):
        wins = (logits - logits.T) > 0
    decided = wins | wins.T
    for i, j, k in combinations(range(len(logits)), 3):
        if decided[i, j] and decided[j, k] and decided[i, k]:
            yield bool(wins[i, j] == wins[j, k] != wins[i, k])
