"""Flows - what report.html tells: the data of a run so far, gathered by history.py and arranged by sections.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from data_contracts.artifact import ArtifactRef
from data_contracts.prompts import has_written_id, name_of
from data_contracts.rows import HeldoutRow, ReportRow
from data_contracts.shard_rows import RowsByPrompt, ShardRows
from flows.report.about import About
from flows.report.trained import Trained
from flows.tournament import Standing

SIDES = ("chosen", "rejected")
"""The responses of a pair."""


class TokenPieces(NamedTuple):
    """A pair of responses, cut into the text of each token with its weight."""

    name: str
    """The prompt's id, if somebody wrote it."""
    prompt: str
    sides: dict[str, list[tuple[str, float]]]
    """By the names of SIDES."""


class WeightPicture(NamedTuple):
    """Per-token weights of one iteration."""

    edges: list[float]
    chosen: list[float]
    """Fraction of the tokens in each bin."""
    rejected: list[float]
    clamped: dict[str, float]
    """Name of a bound -> fraction of the tokens at it."""
    tokens: int
    examples: list[TokenPieces]


class ShownPrompt(NamedTuple):
    """How a prompt appears in a report."""

    name: str
    """The id that its writer gave it, or the beginning of its last message."""
    text: str
    source: str = ""
    """Where its data says it comes from."""


def shown_prompts(prompts: ArtifactRef, prompt_ids: Sequence[str] | None = None) -> dict[str, ShownPrompt]:
    """Return prompts of an artifact by id; None: all of them."""
    rows = ShardRows([prompts.path], "prompts")
    chosen = rows if prompt_ids is None else chain.from_iterable(RowsByPrompt(rows).pick(prompt_ids))
    return {
        row["prompt_id"]: ShownPrompt(
            row["prompt_id"] if has_written_id(row) else name_of(row),
            "\n\n".join(message["content"] for message in row["messages"]),
            row["source"],
        )
        for row in chosen
    }


class Story(NamedTuple):
    """A run so far; every list has one entry per iteration, the start model's first."""

    name: str
    headline: str
    rows: list[dict[str, Any]]
    """Rows of the table: rounded values by column name."""
    reports: list[list[ReportRow]]
    heldout: list[list[HeldoutRow]]
    prompts: dict[str, ShownPrompt]
    """The held-out ones, by id."""
    gains: list[dict[str, Any]]
    """Against the start: {"mean", "low", "high", "controlled": {...}} or empty."""
    win_rates: dict[int, list[float | None]]
    """Iteration -> fraction of the prompts on which it beats each of these iterations; at most ten of them."""
    curves: dict[int, list[dict[str, float]]]
    """Iteration -> lines of metrics.jsonl."""
    weights: dict[int, WeightPicture]
    trained: dict[int, Trained]
    """By iteration."""
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
    about: About = About()
