"""Stages - the `rouge_l` scorer: ROUGE-L F1 of a completion against the prompt's `response` (Lin 2004).

The number is the one that the package rouge-score gives without stemming.

With L the length of the longest common subsequence of words: precision = L / words of the text, recall = L / words of
the reference, F1 = 2 precision recall / (precision + recall).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow
from stages.registry import Named
from stages.scoring.base import Candidates, Scorer, Scores


class RougeL(Scorer):
    TEXT_ONLY = True

    class Config(Named):
        """No setting: F1, no stemming, in [0, 1]."""

        name: Literal["rouge_l"] = "rouge_l"

    @classmethod
    def check_prompts(cls, config: Config, prompts: Sequence[PromptRow]) -> None:
        if missing := [prompt["prompt_id"] for prompt in prompts if not prompt["response"]]:
            raise ConfigError(
                f"the scorer rouge_l compares answers with the prompts' `response`, and {len(missing)} of "
                f"{len(prompts)} prompts have none ({', '.join(missing[:3])}): give prompts that have one, or say with "
                "`prompts.columns` which column it is"
            )

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        return [self._score(item) for item in batch]

    def _score(self, item: Candidates) -> Scores:
        reference = item.prompt["response"]
        if not reference:
            return Scores.of_points([float("nan")] * len(item.generations), ["no response"] * len(item.generations))
        return Scores.of_points([rouge_l(row["completion"], reference) for row in item.generations])


def words(text: str) -> list[str]:
    """The words in lower case; everything but ASCII letters and digits separates words."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; 0 if either text has none.

    >>> round(rouge_l("the cat sat", "the cat lay down"), 4)  # L = 2, precision 2/3, recall 2/4, F1 = 4/7
    0.5714
    """
    text_words, reference_words = words(text), words(reference)
    common = _longest_common_subsequence(text_words, reference_words)
    if not common:
        return 0.0
    precision, recall = common / len(text_words), common / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def best_rouge_l(text: str, references: Sequence[str]) -> float:
    """The highest ROUGE-L F1 over the references; 0 without any."""
    return max((rouge_l(text, reference) for reference in references), default=0.0)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by dynamic programming; `lengths[j]` is that of `first` so far and the first j words of `second`."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]
