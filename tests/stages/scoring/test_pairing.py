"""Scores -> rows: who is chosen, who is rejected, how sure that is, and when there is no pair.

Strategy: three or four candidates with round scores; win rates are worked out by hand, with tau = 1 / log 3 one point
of difference is a probability of 3/4.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.scoring.base import Scores
from stages.scoring.pairing import Choice, best_vs_worst, each, group_of

NAN = math.nan
TAU = 1 / math.log(3)


def pointwise(*values: float, tau: float = TAU):
    return group_of(Scores(np.array(values, dtype=float), None, [""] * len(values)), tau)


def pairwise(*rows: list[float]):
    return group_of(Scores(None, np.array(rows, dtype=float), [""] * len(rows)), tau=123.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_win_rates_by_hand_count_oneself_as_a_half():
    # P = [[1/2, 3/4, 9/10], [1/4, 1/2, 3/4], [1/10, 1/4, 1/2]] for scores 2, 1, 0
    assert pointwise(2, 1, 0).win_rates == pytest.approx([(0.5 + 0.75 + 0.9) / 3, 0.5, (0.1 + 0.25 + 0.5) / 3])


def test_the_best_is_chosen_over_the_worst():
    assert best_vs_worst(pointwise(1, 0, 2)) == [Choice(2, 1)]


def test_tau_0_makes_every_difference_sure_and_a_tie_a_half():
    group = pointwise(0, 1e-9, -5, 0, tau=0.0)
    # (wins + ties / 2) / 4, oneself a tie
    assert group.win_rates == pytest.approx([(1 + 1) / 4, (3 + 0.5) / 4, (0 + 0.5) / 4, (1 + 1) / 4])
    assert best_vs_worst(group) == [Choice(1, 2)]


def test_the_first_of_equals_is_taken():
    assert best_vs_worst(pointwise(1, 1, 0, 0)) == [Choice(0, 2)]


def test_an_unscored_candidate_is_nobodys_opponent():
    group = pointwise(NAN, 2, 1, 0)
    assert best_vs_worst(group) == [Choice(1, 3)]
    assert math.isnan(group.win_rates[0]) and group.win_rates[1:] == pytest.approx([2.15 / 3, 0.5, 0.85 / 3])


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (pointwise(1, NAN, NAN), "fewer than two candidates could be scored"),
        (pointwise(NAN, NAN, NAN), "fewer than two candidates could be scored"),
        (pointwise(1, 1, 1), "all candidates are equally good"),
        (pointwise(1, 1, NAN), "all candidates are equally good"),
        (pairwise([0, 0, 0], [0, 0, 0], [0, 0, 0]), "all candidates are equally good"),
    ],
)
def test_a_prompt_that_gives_no_pair_says_why(group, reason):
    assert best_vs_worst(group) == reason


def test_each_candidate_that_could_be_scored_is_a_row():
    assert each(pointwise(1, NAN, 0)) == [Choice(0, None), Choice(2, None)]
    assert each(pointwise(NAN, NAN)) == "no candidate could be scored"


def test_a_pair_scorer_is_taken_at_its_word_also_where_it_is_not_antisymmetric():
    # Mean relative reward: 1 for the first, 0 for the second, -1/3 for the third; tau is for pointwise scores.
    group = pairwise([0, 2, 1], [1, 0, -1], [-1, 0, 0])
    assert group.rewards == pytest.approx([1, 0, -1 / 3]) and best_vs_worst(group) == [Choice(0, 2)]
    assert group.win_rates[0] == pytest.approx((0.5 + sigmoid(2) + sigmoid(1)) / 3)
    assert group.win_rates[2] == pytest.approx((sigmoid(-1) + 0.5 + 0.5) / 3)


def test_a_candidate_that_a_pair_scorer_could_not_compare_is_never_taken():
    group = pairwise([0, 5, NAN], [-5, 0, NAN], [NAN, NAN, 0])
    assert best_vs_worst(group) == [Choice(0, 1)]
    assert best_vs_worst(pairwise([0, NAN], [NAN, 0])) == "fewer than two candidates could be scored"


def test_win_rates_do_not_overflow():
    assert pairwise([0, 1e9], [-1e9, 0]).win_rates.tolist() == [0.75, 0.25]
    assert pairwise([0, math.inf], [-math.inf, 0]).win_rates.tolist() == [0.75, 0.25]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(0.01, 100))
def test_win_rates_of_pointwise_scores_are_in_their_order_and_average_a_half(values, tau):
    rates = pointwise(*values, tau=tau).win_rates
    assert rates.mean() == pytest.approx(0.5)
    assert ((rates >= 0) & (rates <= 1)).all()
    assert (np.diff(rates[np.argsort(values, kind="stable")]) >= -1e-12).all()


@given(st.permutations([3.0, 1.0, 0.0, 2.0]))
def test_the_order_of_the_candidates_does_not_matter(values):
    group = pointwise(*values)
    ((chosen, rejected),) = best_vs_worst(group)
    assert (values[chosen], values[rejected]) == (3.0, 0.0)
    assert group.win_rates[chosen] == pytest.approx((0.5 + 0.75 + 0.9 + 27 / 28) / 4)


def test_the_list_of_methods_names_every_pairing(capsys):
    from stages.__main__ import print_methods
    from stages.scoring.pairing import PAIRINGS

    print_methods()
    listed = capsys.readouterr().out
    assert all(f" {name}" in listed for name in PAIRINGS.names())
    sppo = listed.split("\nsppo ")[1].split("\n")[2]
    assert "(pairing best_vs_worst, random_pair, length_matched, all_pairs)" in sppo and "(pairing each" not in sppo
