"""Stages - the `combination` scorer: a weighted sum of other scorers, some of which may veto."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_contracts.config import Config as BaseConfig
from stages.registry import Named
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Scores, Surroundings, close, compares, prepared, score_once


class Part(BaseConfig):
    scorer: Annotated[Named, SCORERS]
    weight: float = 1.0
    """Factor of its scores, or of its preference logits. 0: it can only veto."""
    veto_below: float | None = None
    """A candidate whose score by this part is lower is unscored by the whole: neither chosen nor rejected. Pointwise parts only."""


class Combination:
    class Config(Named):
        """Scores are added as they are: give each a weight that brings it to the others' scale.

        Beside a pair scorer, a pointwise score r counts as the logits r_i - r_j.
        """

        name: Literal["combination"] = "combination"
        parts: tuple[Part, ...] = Field(min_length=1)

        @model_validator(mode="after")
        def _adds_something(self) -> Combination.Config:
            if all(part.weight == 0 for part in self.parts):
                raise ValueError("all weights are 0: at least one part must count")
            return self

    def __init__(self, config: Config, device: str):
        self.config, self.device = config, device
        self.surroundings: Surroundings | None = None
        self.scorers: list[Any] | None = None

    @staticmethod
    def needs_start_logps(config: Config) -> bool:
        return any(SCORERS.get(part.scorer.name).needs_start_logps(part.scorer) for part in config.parts)

    @staticmethod
    def check_prompts(config: Config, prompts: Sequence[dict[str, Any]]) -> None:
        for part in config.parts:
            SCORERS.get(part.scorer.name).check_prompts(part.scorer, prompts)

    def prepare(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        if self.scorers is None:
            self.scorers = [self._open(part.scorer) for part in self.config.parts]
        found = [score_once(scorer, batch)[0] for scorer in self.scorers]
        return [combine(self.config.parts, scores) for scores in zip(*found, strict=True)]

    def _open(self, config: Named) -> Any:
        scorer_class = SCORERS.get(config.name)
        return (
            prepared(scorer_class, config, self.device, self.surroundings)
            if self.surroundings
            else scorer_class(config, self.device)
        )

    @staticmethod
    def compares(config: Config) -> bool:
        return any(compares(part.scorer) for part in config.parts)

    def close(self) -> None:
        for scorer in self.scorers or []:
            close(scorer)

    def metrics(self) -> dict[str, float]:
        return {
            f"{scorer.config.name}/{name}": value
            for scorer in self.scorers or []
            if hasattr(scorer, "metrics")
            for name, value in scorer.metrics().items()
        }


def combine(parts: Sequence[Part], scores: Sequence[Scores]) -> Scores:
    """sum_p w_p r_p, or sum_p w_p s_p where a part is a pair scorer. What one part could not score, the whole cannot."""
    count = len(scores[0].reasons)
    is_pairwise = any(item.preference_logits is not None for item in scores)
    total = np.zeros((count, count) if is_pairwise else count)
    reasons = [""] * count
    vetoed = np.zeros(count, dtype=bool)
    for part, item in zip(parts, scores, strict=True):
        told = part.scorer.name
        if part.veto_below is not None and item.scores is not None:
            with np.errstate(invalid="ignore"):
                low = item.scores < part.veto_below
            vetoed |= low
            reasons = [reason or (f"vetoed by {told}" if low[k] else "") for k, reason in enumerate(reasons)]
        reasons = [
            reason or (f"{told}: {item.reasons[k]}" if item.reasons[k] else "") for k, reason in enumerate(reasons)
        ]
        if part.weight == 0:
            continue
        if not is_pairwise:
            total += part.weight * item.scores
        elif item.preference_logits is not None:
            total += part.weight * item.preference_logits
        else:
            difference = part.weight * (item.scores[:, None] - item.scores[None, :])
            total += difference
    if not is_pairwise:
        total[vetoed] = np.nan
        return Scores(total, None, reasons)
    total[vetoed, :] = total[:, vetoed] = np.nan
    np.fill_diagonal(total, 0.0)
    return Scores(None, total, reasons)
