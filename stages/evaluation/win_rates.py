"""Stages - pairwise win rates between policies over the same prompts, for any scores; and best-of-n. Pure numpy.

Axes: M policies, K candidates of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from stages.evaluation.intervals import Interval, bootstrap


def win_rate_matrix(scores: Sequence[Mapping[str, float]]) -> list[list[float | None]]:
    """Entry [i][j]: the fraction of shared prompts on which policy i scores higher than policy j. [M, M].

    Ties count half; an entry is None where two policies share no prompt. Entries [i][j] + [j][i] are 1, [i][i] is 1/2.
    scores: prompt_id -> score, of each policy.
    """
    return [[_win_rate(policy, opponent) for opponent in scores] for policy in scores]


def _win_rate(policy: Mapping[str, float], opponent: Mapping[str, float]) -> float | None:
    names = policy.keys() & opponent.keys()
    if not names:
        return None
    wins = sum(policy[name] > opponent[name] for name in names)
    ties = sum(policy[name] == opponent[name] for name in names)
    return (wins + 0.5 * ties) / len(names)


def best_of_n(
    scores: Mapping[str, Sequence[float | None]], counts: Sequence[int] = (1, 2, 4, 8, 16)
) -> dict[int, Interval]:
    """The expected score of the best of n candidates, for each n: the mean over all subsets of a prompt's K candidates.

    Prompts with fewer than n scored candidates are left out of that n; the interval is over prompts.
    scores: prompt_id -> scores of its candidates, None or NaN where a candidate has none.
    """
    intervals = {}
    for n in counts:
        if means := best_means(scores.values(), n):
            intervals[n] = bootstrap(means)
    return intervals


def best_means(scores: Iterable[Sequence[float | None]], n: int) -> list[float]:
    """The expected score of the best of n candidates, of each prompt that has as many scores.

    scores: of the candidates of each prompt, None or NaN where a candidate has none.
    """
    means = []
    for row in scores:
        values = [float(value) for value in row if value is not None and not math.isnan(value)]
        if len(values) >= n:
            means.append(_expected_maximum(values, n))
    return means


def _expected_maximum(values: Sequence[float], n: int) -> float:
    """E max of n of K values drawn without replacement.

    With values sorted downwards s_(1) >= ... >= s_(K): sum_r s_(r) C(K - r, n - 1) / C(K, n).
    """
    size = len(values)
    probability, total = n / size, 0.0  # C(K - 1, n - 1) / C(K, n) = n / K
    for rank, value in enumerate(sorted(values, reverse=True), start=1):
        total += probability * value
        if size - rank == 0:
            break
        probability *= (size - rank - n + 1) / (size - rank)
        if probability <= 0:
            break
    return total
