"""Stages - the `combination` scorer: a weighted sum of other scorers, some of which may veto."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config as BaseConfig
from data_contracts.prompts import PromptRow
from stages.registry import Named
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Scorer, Scores, compares, open_scorer, score_once, scorer_class


class Part(BaseConfig):
    scorer: Annotated[Named, SCORERS]
    weight: float = 1.0
    """Factor of its points, or of its preference logits. 0: it can only veto."""
    veto_below: float | None = None
    """The combination leaves a candidate unscored, neither chosen nor rejected, if this part's points for it are lower.
    Only for parts that give points."""


class Combination(Scorer):
    class Config(Named):
        """Scores are added as they are: give each a weight that brings it to the others' scale.

        Beside a scorer that compares pairs, points r count as the logits r_i - r_j.
        """

        name: Literal["combination"] = "combination"
        parts: tuple[Part, ...] = Field(min_length=1)

        @model_validator(mode="after")
        def _adds_something(self) -> Combination.Config:
            if all(part.weight == 0 for part in self.parts):
                raise ValueError("all weights are 0: at least one part must count")
            return self

    def __init__(self, config: Config, device: str):
        super().__init__(config, device)
        self.scorers: list[Scorer] = []

    @classmethod
    def compares(cls, config: Config) -> bool:
        return any(compares(part.scorer) for part in config.parts)

    @classmethod
    def needs_start_logps(cls, config: Config) -> bool:
        return any(scorer_class(part.scorer).needs_start_logps(part.scorer) for part in config.parts)

    @classmethod
    def check_prompts(cls, config: Config, prompts: Sequence[PromptRow]) -> None:
        for part in config.parts:
            scorer_class(part.scorer).check_prompts(part.scorer, prompts)

    @classmethod
    def models(cls, config: Config) -> list[tuple[ModelRef, str]]:
        return [model for part in config.parts for model in scorer_class(part.scorer).models(part.scorer)]

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        if not self.scorers:
            self.scorers = [open_scorer(part.scorer, self.device, self.services) for part in self.config.parts]
        by_part = [score_once(scorer, batch)[0] for scorer in self.scorers]
        return [combine(self.config.parts, scores) for scores in zip(*by_part, strict=True)]

    def metrics(self) -> dict[str, float]:
        return {
            f"{scorer.config.name}/{name}": value for scorer in self.scorers for name, value in scorer.metrics().items()
        }

    def close(self) -> None:
        for scorer in self.scorers:
            scorer.close()


def combine(parts: Sequence[Part], scores: Sequence[Scores]) -> Scores:
    """sum_p w_p r_p, or sum_p w_p L_p if a part compares pairs: one prompt's scores by each part -> the whole's.

    A candidate that a part with a weight could not score is NaN in the sum, so it is unscored.
    """
    count = len(scores[0].reasons)
    compared = any(score.preference_logits is not None for score in scores)
    total = np.zeros((count, count) if compared else count)
    reasons = [""] * count
    vetoed = np.zeros(count, dtype=bool)
    for part, score in zip(parts, scores, strict=True):
        name, low = part.scorer.name, _below(score, part.veto_below)
        vetoed |= low
        for k in range(count):
            if low[k]:
                reasons[k] = reasons[k] or f"vetoed by {name}"
            if score.reasons[k]:
                reasons[k] = reasons[k] or f"{name}: {score.reasons[k]}"
        if part.weight != 0:
            total += part.weight * _addend(score, compared)
    if not compared:
        total[vetoed] = np.nan
        return Scores.of_points(total, reasons)
    total[vetoed, :] = total[:, vetoed] = np.nan
    np.fill_diagonal(total, 0.0)
    return Scores.of_comparisons(total, reasons)


def _below(score: Scores, limit: float | None) -> np.ndarray:
    """Which candidates have fewer points than the limit. [K] bool."""
    if limit is None or score.scores is None:
        return np.zeros(len(score.reasons), dtype=bool)
    with np.errstate(invalid="ignore"):
        return score.scores < limit


def _addend(score: Scores, compared: bool) -> np.ndarray:
    """What a part adds: its points [K], or logits [K, K], for which points r count as r_i - r_j."""
    if score.preference_logits is not None:
        return score.preference_logits
    assert score.scores is not None, "a scorer gives points or comparisons"
    if not compared:
        return score.scores
    return score.scores[:, None] - score.scores[None, :]
