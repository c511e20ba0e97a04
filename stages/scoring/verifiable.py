"""Stages - the `checks` scorer: the fraction of a prompt's verifiable instructions that a completion satisfies.

A policy that is paid for format alone learns to pay in gibberish. Two floors stop that trade: a completion that the
*start* model finds too unlikely, or that repeats itself, scores 0.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import numpy as np
from pydantic import Field

from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow, name_of
from stages.registry import Named
from stages.scoring.base import Candidates, Scorer, Scores
from stages.scoring.checks import grade, repetition, validate_checks

ANSWER_SECONDS = 10.0
"""Longest time for the checks of one answer. Ours need a thousandth of it; those of other packages may not."""


class OutOfTimeError(Exception):
    """The block of `at_most` ran too long."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the block after so many seconds, in the main thread; elsewhere it runs as long as it takes.

    Raises: OutOfTimeError, in the middle of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    handler = signal.signal(signal.SIGALRM, stop)
    earlier, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        yield
    finally:
        left = max(1e-3, earlier - (time.monotonic() - began)) if earlier else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


class Checks(Scorer):
    class Config(Named):
        """Without floors: the plain fraction of satisfied instructions."""

        name: Literal["checks"] = "checks"
        min_start_logp: float | None = Field(None, lt=0)
        """Fluency floor: mean log-prob per token under the start model, in nats; below it the score is 0. -3 to -2 is
        usual."""
        max_repetition: float | None = Field(None, ge=0, le=1)
        """A completion that repeats more of its word 3-grams than this scores 0."""

    @classmethod
    def needs_start_logps(cls, config: Config) -> bool:
        return config.min_start_logp is not None

    @classmethod
    def check_prompts(cls, config: Config, prompts: Sequence[PromptRow]) -> None:
        for prompt in prompts:
            checks = json.loads(prompt["checks"])
            try:
                validate_checks(checks)
            except ConfigError as error:
                raise ConfigError(f"the prompt {name_of(prompt)}: {error}") from None

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        return [self._score(item) for item in batch]

    def _score(self, item: Candidates) -> Scores:
        checks = json.loads(item.prompt["checks"])
        points, reasons = np.zeros(len(item.generations)), []
        for k, row in enumerate(item.generations):
            start_logp = item.start_logps[k] if item.start_logps else None
            try:
                with at_most(ANSWER_SECONDS):
                    reason = self._missed_floor(row["completion"], start_logp)
                    if not reason:
                        points[k] = grade(row["completion"], checks, finished=row["finish_reason"] == "stop").score
            except OutOfTimeError:
                points[k], reason = np.nan, f"checks took longer than {ANSWER_SECONDS:g} s"
            reasons.append(reason)
        return Scores.of_points(points, reasons)

    def _missed_floor(self, completion: str, start_logp: float | None) -> str:
        """Why a completion is below a floor, or ""."""
        lowest = self.config.min_start_logp
        if lowest is not None and start_logp is not None and start_logp < lowest:
            return "not fluent"
        most = self.config.max_repetition
        if most is not None and repetition(completion) > most:
            return "repeats itself"
        return ""
