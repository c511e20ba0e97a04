"""Flows - what report.html tells: the data of a run so far, gathered by history.py and arranged by sections.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from data_contracts.rows import HeldoutRow, ReportRow
from flows.tournament import Standing

SIDES = ("chosen", "rejected")
"""The responses of a pair."""


class WeightPicture(NamedTuple):
    """Per-token weights of one iteration."""

    edges: list[float]
    chosen: list[float]
    """Fraction of the tokens in each bin."""
    rejected: list[float]
    clamped: dict[str, float]
    """Name of a bound -> fraction of the tokens at it."""
    tokens: int
    examples: list[dict[str, Any]]
    """{"prompt_id", "chosen": [(text, weight), ...], "rejected": [...]}"""


class Story(NamedTuple):
    """A run so far; every list has one entry per iteration, the start model's first."""

    name: str
    headline: str
    rows: list[dict[str, Any]]
    """Rows of the table: rounded values by column name."""
    reports: list[list[ReportRow]]
    heldout: list[list[HeldoutRow]]
    prompts: dict[str, str]
    """prompt_id -> its text."""
    gains: list[dict[str, Any]]
    """Against the start: {"mean", "low", "high", "controlled": {...}} or empty."""
    win_rates: dict[int, list[float | None]]
    """Iteration -> fraction of the prompts on which it beats each of these iterations; at most ten of them."""
    curves: dict[int, list[dict[str, float]]]
    """Iteration -> lines of metrics.jsonl."""
    weights: dict[int, WeightPicture]
    dropped: dict[int, dict[str, float]]
    """Iteration -> reason -> count."""
    seconds: list[dict[str, float]]
    """Stage -> seconds."""
    decisions: list[dict[str, Any]]
    """Of the promotion gate."""
    selections: list[dict[str, Any]]
    """Checkpoints of each training: rows of a table."""
    tournament: Standing | None
    settings: str
    """What differs from the defaults, as JSON."""
    data: Sequence[str] = ()
    """Lines on the prompts: how many were read and used, and why the others were not."""
