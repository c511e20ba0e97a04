"""Stages - the `checks` scorer: the fraction of a prompt's verifiable instructions that a completion satisfies.

A policy that is paid for format alone learns to pay in gibberish. Two floors stop that trade: a completion that the *start* model finds
too unlikely, or that repeats itself, scores 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_contracts.errors import ConfigError
from stages.registry import Named
from stages.scoring.base import Candidates, Scores
from stages.scoring.checks import grade, repetition, validate_checks


class Checks:
    class Config(Named):
        """Without floors: the plain fraction of satisfied instructions."""

        name: Literal["checks"] = "checks"
        min_start_logp: float | None = Field(None, lt=0)
        """Fluency floor: mean log-prob per token under the start model, in nats; below it the score is 0. -3 to -2 is usual."""
        max_repetition: float | None = Field(None, ge=0, le=1)
        """A completion that repeats more of its word 3-grams than this scores 0."""

    def __init__(self, config: Config, device: str):
        self.config = config

    @staticmethod
    def needs_start_logps(config: Config) -> bool:
        return config.min_start_logp is not None

    @staticmethod
    def check_prompts(config: Config, prompts: Sequence[dict[str, Any]]) -> None:
        for prompt in prompts:
            checks = json.loads(prompt["checks"])
            try:
                validate_checks(checks)
            except ConfigError as error:
                raise ConfigError(f"prompt {prompt['prompt_id']!r}: {error}") from None
            if not checks:
                raise ConfigError(
                    f"prompt {prompt['prompt_id']!r} has no `checks`, and the scorer `checks` has nothing else to go by"
                )

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        return [self._score(item) for item in batch]

    def _score(self, item: Candidates) -> Scores:
        checks = json.loads(item.prompt["checks"])
        scores, reasons = np.zeros(len(item.generations)), []
        for k, row in enumerate(item.generations):
            reason = self._floor(row["completion"], item.start_logps[k] if item.start_logps else None)
            if not reason:
                scores[k] = grade(row["completion"], checks, finished=row["finish_reason"] == "stop").score
            reasons.append(reason)
        return Scores(scores, None, reasons)

    def _floor(self, completion: str, start_logp: float | None) -> str:
        """The name of the floor that a completion falls through, or ""."""
        if (
            self.config.min_start_logp is not None
            and start_logp is not None
            and start_logp < self.config.min_start_logp
        ):
            return "not fluent"
        if self.config.max_repetition is not None and repetition(completion) > self.config.max_repetition:
            return "repeats itself"
        return ""
