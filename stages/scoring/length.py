"""Stages - the `length` scorer: the nearer to a number of tokens, the better. Stands in for reward models in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from stages.registry import Named
from stages.scoring.base import Candidates, Scorer, Scores


class Length(Scorer):
    class Config(Named):
        name: Literal["length"] = "length"
        target_tokens: int = Field(16, ge=1)
        """The length that scores best (0); every token more or less costs 1."""

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        target = self.config.target_tokens
        return [Scores.of_points([-abs(len(row["token_ids"]) - target) for row in item.generations]) for item in batch]
