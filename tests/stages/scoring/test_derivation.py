"""Raw logits -> preferences -> rows: the three readings of a pair scorer's matrix, the pairings beside best_vs_worst,
the scorer's own statistics.

Strategy: small matrices by hand; the released SPPO computation written out again, as compute_prob.py does it; and
answers of six real models (beside the project), with their real lengths.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.scoring.base import Scores
from stages.scoring.pairing import (
    PAIRINGS,
    Choice,
    Rules,
    all_pairs,
    best_vs_worst,
    group_of,
    length_matched,
    pair_statistics,
    random_pair,
    relative_rewards,
)

NAN = math.nan
SCORED = {name: PAIRINGS.get(name).choose for name in PAIRINGS.names() if PAIRINGS.get(name).needs_scores}
LOGITS = np.array([[0.0, 3.0, 1.0], [-1.0, 0.0, 2.0], [0.0, -1.0, 0.0]])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def group(logits, preference="both_orders"):
    return group_of(Scores(None, np.array(logits, dtype=float), [""] * len(logits)), 1.0, preference)


def points(*values):
    return group_of(Scores(np.array(values, dtype=float), None, [""] * len(values)), 1.0, "both_orders")


def test_both_orders_by_hand():
    # s = (L - L^T) / 2: s_01 = (3 + 1) / 2, s_02 = (1 - 0) / 2, s_12 = (2 + 1) / 2
    found = group(LOGITS)
    assert found.preferences == pytest.approx(sigmoid([[0, 2, 0.5], [-2, 0, 1.5], [-0.5, -1.5, 0]]))
    assert found.rewards == pytest.approx([2.5 / 3, -0.5 / 3, -2 / 3])
    assert (
        found.win_rates == pytest.approx(found.preferences.mean(axis=1))
        and np.diag(found.preferences).tolist() == [0.5] * 3
    )


def test_one_order_takes_each_pair_as_it_was_asked():
    assert group(LOGITS, "one_order").preferences == pytest.approx(sigmoid(LOGITS))


def test_sppo_release_is_what_the_released_code_computes():
    # rank.py: scores of llm_blender's rank(); compute_prob.py: prb[i][j] = exp(s_i) / (exp(s_i) + exp(s_j)), rows
    # averaged with the diagonal.
    scores = [sum(LOGITS[i][j] - LOGITS[j][i] for j in range(3)) / 3 for i in range(3)]
    prb = np.array([[math.exp(a) / (math.exp(a) + math.exp(b)) for b in scores] for a in scores])
    found = group(LOGITS, "sppo_release")
    assert found.preferences == pytest.approx(prb) and found.win_rates == pytest.approx(prb.mean(axis=1))
    assert best_vs_worst(found) == [Choice(int(np.argmax(scores)), int(np.argmin(scores)))]


def test_sppo_release_is_transitive_and_wider_where_the_paper_sees_a_cycle():
    cycle = np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    assert (
        group(cycle).preferences[0, 1] == pytest.approx(sigmoid(1))
        and best_vs_worst(group(cycle)) == "all candidates are equally good"
    )
    assert group(cycle, "sppo_release").preferences == pytest.approx(np.full((3, 3), 0.5))
    ladder = np.subtract.outer([2.0, 1.0, 0.0], [2.0, 1.0, 0.0])  # antisymmetric and additive: twice the difference
    assert relative_rewards(ladder, "sppo_release") == pytest.approx(2 * relative_rewards(ladder, "both_orders"))


@given(
    st.lists(st.lists(st.floats(-50, 50), min_size=4, max_size=4), min_size=4, max_size=4), st.permutations(range(4))
)
def test_preferences_are_complementary_and_follow_a_permutation(rows, order):
    logits = np.array(rows)
    np.fill_diagonal(logits, 0)
    for preference in ("both_orders", "sppo_release"):
        found = group(logits, preference)
        assert found.preferences + found.preferences.T == pytest.approx(np.ones((4, 4)))
        assert found.win_rates.mean() == pytest.approx(0.5)
        moved = group(logits[np.ix_(order, order)], preference)
        assert moved.win_rates == pytest.approx(found.win_rates[list(order)], abs=1e-9)


def test_a_comparison_that_failed_in_one_order_is_left_out_not_called_a_tie():
    found = group([[0, NAN, 2], [-4, 0, 2], [-2, -2, 0]])
    assert np.isnan(found.preferences[0, 1]) and np.isnan(found.preferences[1, 0])
    assert found.win_rates[0] == pytest.approx((0.5 + sigmoid(2)) / 2) and found.rewards[0] == pytest.approx(1.0)
    assert best_vs_worst(found) == [Choice(0, 2)]
    one = group([[0, NAN, 2], [-4, 0, 2], [-2, -2, 0]], "one_order")
    assert one.win_rates[1] == pytest.approx((sigmoid(-4) + 0.5 + sigmoid(2)) / 3)


def test_a_threshold_takes_out_what_is_not_sure_enough():
    rules = Rules(min_preference=0.7)
    assert best_vs_worst(points(0.0, 0.5), rules) == "no preference reaches min_preference"
    assert best_vs_worst(points(0.0, 1.0), rules) == [Choice(1, 0)]
    assert all_pairs(points(0.0, 0.5, 2.0), rules) == [Choice(2, 0), Choice(2, 1)]
    failed = group([[0, 2, NAN], [0, 0, 2], [NAN, 0, 0]])  # best and worst were never compared
    assert best_vs_worst(failed, rules) == "no preference reaches min_preference" and best_vs_worst(failed) == [
        Choice(0, 2)
    ]


def test_a_random_pair_is_unequal_repeats_and_follows_the_seed():
    found = points(1, 1, 0, 2, NAN)
    drawn = {tuple(random_pair(found, Rules(prompt_id=f"p{k}"))[0]) for k in range(200)}
    assert drawn == {(0, 2), (1, 2), (3, 0), (3, 1), (3, 2)}
    assert random_pair(found, Rules(prompt_id="p1", seed=3)) == random_pair(found, Rules(prompt_id="p1", seed=3))
    assert len({tuple(random_pair(found, Rules(prompt_id="p1", seed=seed))[0]) for seed in range(50)}) > 1
    assert random_pair(points(1, 1), Rules()) == "all candidates are equally good"
    assert random_pair(points(1, NAN), Rules()) == "fewer than two candidates could be scored"


def test_length_matched_takes_the_widest_difference_among_equals_in_length():
    found, rules = points(0, 1, 2, 9), Rules(lengths=(100, 80, 120, 300))
    assert length_matched(found, rules) == [
        Choice(2, 0)
    ]  # 3 is best and too long for all; 2 over 1 is 1.5 times as long
    assert length_matched(found, rules._replace(max_length_ratio=1.5)) == [Choice(2, 0)]
    assert length_matched(found, rules._replace(max_length_ratio=4)) == [Choice(3, 0)]
    assert (
        length_matched(found, rules._replace(max_length_ratio=1.1))
        == "no two unequal candidates are of about the same length"
    )
    assert length_matched(points(0, 1), Rules(lengths=(0, 0))) == [Choice(1, 0)]
    assert length_matched(points(1, 1), Rules(lengths=(5, 5))) == "all candidates are equally good"


def test_all_pairs_leaves_ties_out():
    assert all_pairs(points(1, 0, 1), Rules()) == [Choice(0, 1), Choice(2, 1)]


@pytest.mark.parametrize("name", SCORED)
def test_no_pairing_takes_an_unscored_candidate_or_a_lone_one(name):
    rules = Rules(lengths=(5, 5, 5))
    assert isinstance(SCORED[name](points(NAN, NAN, NAN), rules), str)
    for choice in SCORED[name](points(2, NAN, 1), rules):
        assert 1 not in choice


def test_statistics_of_a_scorer_by_hand():
    # Pairs (0,1): 3 and -1, (0,2): 1 and 0, (1,2): 2 and -1; bias (1 + 0.5 + 0.5) / 3.
    rates = pair_statistics([LOGITS]).rates()
    assert rates["position_bias"] == pytest.approx(2 / 3) and rates["mean_preference_logit"] == pytest.approx(4 / 3)
    assert rates["decided_by_order"] == 0 and rates["cyclic_triples"] == 0
    cycle = np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    assert pair_statistics([cycle, LOGITS]).rates()["cyclic_triples"] == 0.5
    first_wins = np.array([[0.0, 1.0], [2.0, 0.0]])
    assert pair_statistics([first_wins]).rates() | {"mean_preference_logit": 0.5} == {
        "position_bias": 1.5, "mean_preference_logit": 0.5, "decided_by_order": 1.0, "cyclic_triples": 0.0,
    }  # fmt: skip


def test_statistics_leave_failed_and_never_asked_comparisons_out():
    some = np.array([[0.0, NAN, 0.0], [1.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    found = pair_statistics([some, np.zeros((1, 1)), np.zeros((0, 0))])
    assert (found.pairs, found.triples) == (1, 0) and found.rates()["position_bias"] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def real_answers(shared):
    path = shared / "data" / "alpaca_eval" / "candidates_6models_first150.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_of_six_real_models_go_through_pairing(real_answers):
    """Scored by length in words, as a stand-in: real texts, real ties, real spread of lengths, and a few answers that
    are missing."""
    kept = dict.fromkeys(SCORED, 0)
    rates = []
    for row in real_answers:
        texts = list(row["outputs"].values())
        lengths = tuple(len((text or "").split()) for text in texts)
        logits = np.subtract.outer(lengths, lengths) / 100 + 0.3 * (1 - np.eye(6))  # with a position bias
        missing = [k for k, text in enumerate(texts) if text is None]
        logits[missing, :] = logits[:, missing] = NAN
        found, rules = group(logits), Rules(lengths, row["instruction"])
        assert np.isnan(found.win_rates).nonzero()[0].tolist() == missing
        assert np.nanmean(found.win_rates) == pytest.approx(0.5)
        rates.append(found.win_rates)
        for name, choose in SCORED.items():
            choices = choose(found, rules)
            if isinstance(choices, str):
                continue
            kept[name] += 1
            for chosen, rejected in choices:
                assert chosen not in missing and rejected not in missing
                if rejected is not None:
                    assert lengths[chosen] > lengths[rejected] and found.win_rates[chosen] > found.win_rates[rejected]
        if isinstance(choices := length_matched(found, rules), list):
            (pair,) = choices
            assert lengths[pair.chosen] <= 1.25 * max(1, lengths[pair.rejected])
        assert pair_statistics([logits]).rates()["position_bias"] == pytest.approx(0.3)
    by_model = dict(zip(real_answers[0]["outputs"], np.nanmean(rates, axis=0), strict=True))
    assert kept["best_vs_worst"] == kept["all_pairs"] == len(real_answers) == 150 and kept["length_matched"] > 100
    assert (
        by_model["SPPO-Mistral7B-PairRM"] > by_model["Mistral-7B-Instruct-v0.2"] > by_model["alpaca-7b"]
    )  # its known taste for length
