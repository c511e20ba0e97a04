"""Stages - the `length` scorer: the nearer to a number of tokens, the better. The twin of reward models for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from stages.registry import Named
from stages.scoring.base import Candidates, Scores


class Length:
    class Config(Named):
        name: Literal["length"] = "length"
        target_tokens: int = Field(16, ge=1)
        """The length that scores best (0); every token off costs 1."""

    def __init__(self, config: Config, device: str):
        self.config = config

    @staticmethod
    def needs_start_logps(config: Config) -> bool:
        return False

    @staticmethod
    def check_prompts(config: Config, prompts: Sequence[dict[str, Any]]) -> None:
        return None

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        return [
            Scores(
                np.array(
                    [-abs(len(row["token_ids"]) - self.config.target_tokens) for row in item.generations], dtype=float
                ),
                None,
                [""] * len(item.generations),
            )
            for item in batch
        ]
