"""Stages - ROUGE-L F1 of a text against a reference, as the package rouge-score computes it without stemming. Standard library.

Axes: N and M words.
"""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """Lower case; what is not an ASCII letter or digit parts words."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; 0 if either text has none.

    >>> rouge_l("the cat sat", "the cat lay down")  # lcs 2, precision 2/3, recall 2/4
    0.5714285714285714
    """
    ours, theirs = words(text), words(reference)
    common = _common(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def best_rouge_l(text: str, references: list[str]) -> float:
    return max((rouge_l(text, reference) for reference in references), default=0.0)


def _common(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for j, against in enumerate(other, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == against else max(above, row[j - 1])
            diagonal = above
    return row[-1]
