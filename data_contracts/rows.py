"""Contracts - types of the rows that stages hand on. A row of prompts is PromptRow in prompts.py; all columns are in
shards.py."""

from __future__ import annotations

from typing import TypedDict


class GenerationRow(TypedDict):
    """A row of `generations`: a response that a policy sampled."""

    prompt_id: str
    candidate: int
    """Its number among the K responses to the prompt."""
    prompt_ids: list[int]
    token_ids: list[int]
    """With the EOS that ended it, if one did."""
    token_logps: list[float]
    """The sampler's own log-probs, before temperature; nats."""
    finish_reason: str
    """"stop": it ended by itself; "length": it was cut."""
    seed: int
    completion: str
    """Its text, for people and for scorers of texts; training uses token_ids."""


class ScoredPairRow(TypedDict):
    """A row of `scored_pairs`: one response preferred over another, or one response alone (then the rejected one is
    empty)."""

    pair_id: str
    prompt_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen: str
    rejected: str
    score_chosen: float | None
    score_rejected: float | None
    win_rate_chosen: float
    """Mean probability of beating the K candidates, self counted 1/2."""
    win_rate_rejected: float
    chosen_candidate: int
    """Its number among the K candidates; -1: a given text."""
    rejected_candidate: int
    group_scores: list[float] | None
    """Of all K candidates, for methods that compare inside the group; None: nothing was scored."""
    group_win_rates: list[float] | None
    scorer: str
