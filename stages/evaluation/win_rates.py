"""Stages - who beats whom: pairwise win rates between policies over the same prompts, with any scores; and best-of-n. Pure numpy.

Axes: M policies, N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

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
    return sum(1.0 if one[name] > other[name] else 0.5 if one[name] == other[name] else 0.0 for name in names) / len(names)


def preference_matrix(
    prompts: Sequence[str], answers: Sequence[Mapping[str, str]], prefer: Callable[[str, str, str], float | None]
) -> tuple[list[list[float | None]], int]:
    """The same with a pairwise scorer: prefer(prompt_id, answer, other) = P(answer beats other), or None if it could not say.

    Both orders are asked and averaged, so that a liking for a place cancels out. Returns the matrix and how many comparisons failed:
    a comparison that failed in either order counts in no mean.
    """
    count, failed = len(answers), 0
    rates: list[list[float | None]] = [[0.5 if i == j else None for j in range(count)] for i in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            found = []
            for name in prompts:
                if name not in answers[i] or name not in answers[j]:
                    continue
                there = prefer(name, answers[i][name], answers[j][name])
                back = prefer(name, answers[j][name], answers[i][name])
                if there is None or back is None:
                    failed += 1
                    continue
                found.append((there + 1 - back) / 2)
            if found:
                rates[i][j] = float(np.mean(found))
                rates[j][i] = 1 - rates[i][j]
    return rates, failed


def best_of_n(scores: Mapping[str, Sequence[float | None]], counts: Sequence[int] = (1, 2, 4, 8, 16)) -> dict[int, Interval]:
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


def pick_best(scores: Sequence[float | None]) -> int | None:
    """Candidate that best-of-n answers with: the highest score, the earlier one of equals; None if nothing could be scored."""
    known = [(value, -index) for index, value in enumerate(scores) if value is not None and value == value]
    return -max(known)[1] if known else None
