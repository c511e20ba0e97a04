"""Stages - who beats whom: pairwise win rates between policies over the same prompts, with any scores; and best-of-n. Pure numpy.

Axes: M policies, N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.evaluation.intervals import Interval, bootstrap


def win_rate_matrix(scores: Sequence[Mapping[str, float]]) -> list[list[float | None]]:
    """Entry [i][j]: part of the shared prompts on which policy i scores higher than policy j, ties counted half; None without any. [M, M].

    `scores`: prompt_id -> score of each policy. Entries [i][j] + [j][i] are 1, [i][i] is 1/2.
    """
    return [[_rate(one, other) for other in scores] for one in scores]


def _rate(one: Mapping[str, float], other: Mapping[str, float]) -> float | None:
    names = one.keys() & other.keys()
    if not names:
        return None
    return sum(1.0 if one[name] > other[name] else 0.5 if one[name] == other[name] else 0.0 for name in names) / len(
        names
    )


def best_of_n(
    scores: Mapping[str, Sequence[float | None]], counts: Sequence[int] = (1, 2, 4, 8, 16)
) -> dict[int, Interval]:
    """Expected score of the best of n candidates, without bias from which n were drawn: all subsets of the K candidates of a prompt.

    With scores sorted downwards s_(1) >= ... >= s_(K): E max of n of K = sum_r s_(r) C(K - r, n - 1) / C(K, n). Prompts with fewer than
    n scored candidates are left out of that n; the interval is over prompts.
    """
    out = {}
    for n in counts:
        means = []
        for row in scores.values():
            known = sorted((float(value) for value in row if value is not None and value == value), reverse=True)
            if len(known) < n:
                continue
            weight, total, size = n / len(known), 0.0, len(known)  # C(K - 1, n - 1) / C(K, n)
            for rank, value in enumerate(known, start=1):
                total += weight * value
                if size - rank == 0:
                    break
                weight *= (size - rank - n + 1) / (size - rank)
                if weight <= 0:
                    break
            means.append(total)
        if means:
            out[n] = bootstrap(means)
    return out
