"""Win-rate matrices and best-of-n, against brute force."""

from itertools import combinations

import numpy as np
import pytest

from stages.evaluation.intervals import bootstrap
from stages.evaluation.rows import interval_row
from stages.evaluation.win_rates import best_of_n, win_rate_matrix


def test_the_matrix_by_hand():
    a, b, c = {"p": 1.0, "q": 0.0}, {"p": 0.5, "q": 0.0}, {"q": 1.0}
    # a beats b on p, ties on q: (1 + 1/2) / 2; c shares q only and wins it.
    assert win_rate_matrix([a, b, c]) == [[0.5, 0.75, 0.0], [0.25, 0.5, 0.0], [1.0, 1.0, 0.5]]
    assert win_rate_matrix([a, {}]) == [[0.5, None], [None, None]]


def test_opposite_entries_add_to_one():
    rng = np.random.default_rng(0)
    policies = [{f"p{i}": float(v) for i, v in enumerate(rng.integers(0, 4, 30))} for _ in range(4)]
    rates = np.array(win_rate_matrix(policies))
    assert rates + rates.T == pytest.approx(np.ones((4, 4)))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(2)
    scores = {f"p{i}": list(rng.normal(size=5)) for i in range(4)}
    brute = np.mean([np.mean([max(subset) for subset in combinations(row, n)]) for row in scores.values()])
    assert best_of_n(scores, (n,))[n].mean == pytest.approx(brute)


def test_candidates_without_a_score_do_not_compete():
    assert list(best_of_n({"p": [0.1, None, float("nan"), 0.9]}, (1, 2, 3))) == [1, 2]


def test_the_error_of_one_value_is_not_known():
    interval = bootstrap([0.75])
    assert interval.mean == 0.75 and np.isnan(interval[1:]).all() and interval.ends() == "[not known]"
    row = interval_row("suite", "task", "metric", interval, 1)
    assert [row[name] for name in ("value", "stderr", "low", "high")] == [0.75, None, None, None]
    assert interval.as_json() == {"mean": 0.75, "low": None, "high": None, "stderr": None}
