"""Contracts - types of the rows that stages hand on. PromptRow is in prompts.py, the columns are in shards.py."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

PerToken = list[float] | np.ndarray
"""One number per token: an array where the row is made, a list where it is read."""


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
    """A row of `scored_pairs`: a preferred and a rejected response, or one response (rejected is empty)."""

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


class WeightedPairRow(TypedDict):
    """A row of `weighted_pairs`: what the trainer reads, which loads no model but its own. Per token: [T] numbers."""

    pair_id: str
    prompt_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    chosen_reference_logps: PerToken | None
    """Nats; None: the method needs none."""
    chosen_old_logps: PerToken | None
    """Under the policy that sampled the response; nats. None: the method needs none."""
    chosen_weights: PerToken
    rejected_ids: list[int]
    """Empty for methods on single responses, and then its columns are too."""
    rejected_reference_logps: PerToken | None
    rejected_old_logps: PerToken | None
    rejected_weights: PerToken
    teacher_prompt_ids: list[int] | None
    """The prompt as the teacher's tokenizer cuts it; None: not needed."""
    teacher_ids: list[int] | None
    """The chosen response as the teacher's tokenizer cuts it; None: not needed."""
    score_chosen: float | None
    score_rejected: float | None
    win_rate_chosen: float
    win_rate_rejected: float
    chosen_candidate: int
    rejected_candidate: int
    group_scores: list[float] | None
    group_win_rates: list[float] | None


class HeldoutRow(TypedDict):
    """A row of `heldout`: an answer to a held-out prompt, measured."""

    prompt_id: str
    candidate: int
    completion: str
    score: float | None
    """None: it could not be scored."""
    num_tokens: int
    finished: bool
    """It ended by itself."""
    start_logp: float | None
    """Mean log-prob per token under the start model, in nats: the fluency."""


class ReportRow(TypedDict):
    """A row of `eval_report`: one number about a policy."""

    suite: str
    task: str
    metric: str
    value: float
    stderr: float | None
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None
    n: int
    """Prompts, questions or judgments behind the value."""
    n_shot: int | None
    task_version: str
    """Or the name of the scorer or judge."""
