"""Scores -> pairs: who is chosen, who is rejected, how sure that is, and when there is no pair.

Strategy: three or four candidates with round scores; win rates are worked out by hand, with tau = 1 / log 3 one point of difference is a
probability of 3/4.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.scoring.base import Scores
from stages.scoring.pairing import best_vs_worst, preference_logits, win_rates

NAN = math.nan
TAU = 1 / math.log(3)


def candidates(count: int, *same: tuple[int, int]) -> list[dict]:
    """`count` generations of different tokens, but for pairs in `same`."""
    rows = [{"token_ids": [k]} for k in range(count)]
    for left, right in same:
        rows[right] = rows[left]
    return rows


def pointwise(*values: float) -> Scores:
    return Scores(np.array(values, dtype=float), None, [""] * len(values))


def pairwise(*rows: list[float]) -> Scores:
    return Scores(None, np.array(rows, dtype=float), [""] * len(rows))


def test_win_rates_by_hand_count_oneself_as_a_half():
    # P = [[1/2, 3/4, 9/10], [1/4, 1/2, 3/4], [1/10, 1/4, 1/2]] for scores 2, 1, 0
    rates = win_rates(preference_logits(pointwise(2, 1, 0), TAU))
    assert rates == pytest.approx([(0.5 + 0.75 + 0.9) / 3, 0.5, (0.1 + 0.25 + 0.5) / 3])


def test_best_and_worst_are_paired_with_their_win_rates():
    pair = best_vs_worst(pointwise(1, 0, 2), candidates(3), TAU)
    assert (pair.chosen, pair.rejected) == (2, 1)
    assert pair.win_rates == pytest.approx([0.5, 0.85 / 3, 2.15 / 3])


def test_tau_0_makes_every_difference_sure():
    pair = best_vs_worst(pointwise(0, 1e-9, -5, 0), candidates(4), 0.0)
    # (wins + ties/2) / 4, self counted as a tie
    assert pair.win_rates == pytest.approx([(1 + 1) / 4, (3 + 0.5) / 4, (0 + 0.5) / 4, (1 + 1) / 4])
    assert (pair.chosen, pair.rejected) == (1, 2)


def test_the_first_of_equals_is_taken():
    pair = best_vs_worst(pointwise(1, 1, 0, 0), candidates(4), TAU)
    assert (pair.chosen, pair.rejected) == (0, 2)


def test_an_unscored_candidate_is_nobodys_opponent():
    pair = best_vs_worst(pointwise(NAN, 2, 1, 0), candidates(4), TAU)
    assert (pair.chosen, pair.rejected) == (1, 3)
    assert math.isnan(pair.win_rates[0]) and pair.win_rates[1:] == pytest.approx([2.15 / 3, 0.5, 0.85 / 3])


@pytest.mark.parametrize(
    ("scores", "same", "reason"),
    [
        (pointwise(1, NAN, NAN), (), "fewer than two candidates could be scored"),
        (pointwise(NAN, NAN, NAN), (), "fewer than two candidates could be scored"),
        (pointwise(1, 1, 1), (), "all candidates are equally good"),
        (pointwise(1, 1, NAN), (), "all candidates are equally good"),
        (pointwise(1, 0, 0.5), ((0, 1),), "chosen and rejected are the same text"),
        (pairwise([0, 0, 0], [0, 0, 0], [0, 0, 0]), (), "all candidates are equally good"),
    ],
)
def test_a_prompt_that_gives_no_pair_says_why(scores, same, reason):
    assert best_vs_worst(scores, candidates(3, *same), TAU) == reason


def test_a_pair_scorer_is_taken_at_its_word_also_where_it_is_not_antisymmetric():
    # Mean relative reward: 1 for the first, 0 for the second, -1/3 for the third. tau is for pointwise scores.
    scores = pairwise([0, 2, 1], [1, 0, -1], [-1, 0, 0])
    pair = best_vs_worst(scores, candidates(3), tau=123.0)
    assert (pair.chosen, pair.rejected) == (0, 2)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert pair.win_rates[0] == pytest.approx((0.5 + sigmoid(2) + sigmoid(1)) / 3)
    assert pair.win_rates[2] == pytest.approx((sigmoid(-1) + 0.5 + 0.5) / 3)


def test_win_rates_do_not_overflow():
    assert win_rates(np.array([[0, 1e9], [-1e9, 0]])).tolist() == [0.75, 0.25]
    assert win_rates(np.array([[0, np.inf], [-np.inf, 0]])).tolist() == [0.75, 0.25]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(0.01, 100))
def test_win_rates_of_pointwise_scores_are_in_their_order_and_average_a_half(values, tau):
    rates = win_rates(preference_logits(pointwise(*values), tau))
    assert rates.mean() == pytest.approx(0.5)
    assert ((rates >= 0) & (rates <= 1)).all()
    order = np.argsort(values, kind="stable")
    assert (np.diff(rates[order]) >= -1e-12).all()


@given(st.permutations([3.0, 1.0, 0.0, 2.0]))
def test_the_order_of_the_candidates_does_not_matter(values):
    pair = best_vs_worst(pointwise(*values), candidates(4), TAU)
    assert (values[pair.chosen], values[pair.rejected]) == (3.0, 0.0)
    assert pair.win_rates[pair.chosen] == pytest.approx((0.5 + 0.75 + 0.9 + 27 / 28) / 4)
