"""Stages - what a scorer is. One call per prompt batch; raw scores are kept for ever, preferences are derived from them (pairing.py).

Axes: K candidates of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stages.registry import Named


class Candidates(NamedTuple):
    """One prompt and its candidates, as rows of the contracts say."""

    prompt: dict[str, Any]
    """A row of `prompts`."""
    generations: list[dict[str, Any]]
    """Rows of `generations`, by candidate number."""
    start_logps: list[float] | None
    """Mean log-prob per token of each candidate under the start model; only if the scorer asked for it."""


class Scores(NamedTuple):
    scores: np.ndarray | None
    """[K] float64, larger is better; NaN: could not be scored, which is never a number."""
    preference_logits: np.ndarray | None
    """[K, K] float64, entry [i, j] > 0: i beats j; diagonal 0. None for a pointwise scorer."""
    reasons: list[str]
    """[K] why a candidate has no score, or what spoilt it; "" for none."""


class Scorer(Protocol):
    Config: type[Named]

    def __init__(self, config: Any, device: str): ...

    @staticmethod
    def needs_start_logps(config: Any) -> bool:
        """Whether the stage must supply `Candidates.start_logps`."""

    @staticmethod
    def check_prompts(config: Any, prompts: Sequence[dict[str, Any]]) -> None:
        """Raises: ConfigError for prompts it cannot score, before anything is sampled."""

    def score(self, batch: Sequence[Candidates]) -> list[Scores]: ...
