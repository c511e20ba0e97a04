"""Stages - the rows of the weigh stage: the responses of scored pairs, and the weighted pairs made of them. No model.

Axes: T tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from data_contracts.rows import ScoredPairRow, WeightedPairRow

Side = Literal["chosen", "rejected"]


class Response(NamedTuple):
    """One response of a pair."""

    number: int
    """Of the pair among those that were given."""
    side: Side
    pair: ScoredPairRow
    ids: list[int]


def responses_of(pairs: Sequence[ScoredPairRow]) -> list[Response]:
    """The responses of the pairs, all chosen ones first; a side without tokens is left out."""
    chosen = [Response(number, "chosen", pair, pair["chosen_ids"]) for number, pair in enumerate(pairs)]
    rejected = [Response(number, "rejected", pair, pair["rejected_ids"]) for number, pair in enumerate(pairs)]
    return [response for response in chosen + rejected if response.ids]


def swapped(pair: ScoredPairRow) -> ScoredPairRow:
    """The pair with its responses exchanged. Win rates stay with the label: the new chosen one is now preferred."""
    return {
        **pair,
        "chosen_ids": pair["rejected_ids"],
        "rejected_ids": pair["chosen_ids"],
        "chosen": pair["rejected"],
        "rejected": pair["chosen"],
        "score_chosen": pair["score_rejected"],
        "score_rejected": pair["score_chosen"],
        "chosen_candidate": pair["rejected_candidate"],
        "rejected_candidate": pair["chosen_candidate"],
    }


class TokenNumbers(NamedTuple):
    """What the weigh stage computed for the tokens of one response, each [T]."""

    weights: np.ndarray
    reference_logps: np.ndarray | None
    """None: not asked for."""
    old_logps: np.ndarray | None
    """None: not asked for."""

    @classmethod
    def of_no_tokens(cls, has_reference: bool, has_old_policy: bool) -> TokenNumbers:
        """The numbers of an empty response."""
        empty = np.zeros(0, dtype=np.float32)
        return cls(empty, empty if has_reference else None, empty if has_old_policy else None)


def mixture(logps: Sequence[np.ndarray], lambdas: Sequence[float]) -> np.ndarray:
    """sum_j lambda_j log pi_j of the same tokens under several policies, [T] each -> [T]; lambda is scaled to sum 1.

    `logps` may be fewer than `lambdas`: the first ones count.

    >>> mixture([np.array([-1.0, -2.0]), np.array([-3.0, -2.0])], [3.0, 1.0, 4.0]).tolist()
    [-1.5, -2.0]
    """
    weights = np.asarray(lambdas[: len(logps)], dtype=np.float64)
    return np.tensordot(weights / weights.sum(), np.stack(logps).astype(np.float64, copy=False), axes=1)


class TeacherIds(NamedTuple):
    """A prompt and its chosen response as the teacher's tokenizer cuts them."""

    prompt_ids: list[int]
    ids: list[int]


def weighted_pair(
    pair: ScoredPairRow, chosen: TokenNumbers, rejected: TokenNumbers, teacher: TeacherIds | None
) -> WeightedPairRow:
    """The row that the trainer reads."""
    return {
        "pair_id": pair["pair_id"],
        "prompt_id": pair["prompt_id"],
        "prompt_ids": pair["prompt_ids"],
        "chosen_ids": pair["chosen_ids"],
        "chosen_reference_logps": chosen.reference_logps,
        "chosen_old_logps": chosen.old_logps,
        "chosen_weights": chosen.weights,
        "rejected_ids": pair["rejected_ids"],
        "rejected_reference_logps": rejected.reference_logps,
        "rejected_old_logps": rejected.old_logps,
        "rejected_weights": rejected.weights,
        "teacher_prompt_ids": None if teacher is None else teacher.prompt_ids,
        "teacher_ids": None if teacher is None else teacher.ids,
        "score_chosen": pair["score_chosen"],
        "score_rejected": pair["score_rejected"],
        "win_rate_chosen": pair["win_rate_chosen"],
        "win_rate_rejected": pair["win_rate_rejected"],
        "chosen_candidate": pair["chosen_candidate"],
        "rejected_candidate": pair["rejected_candidate"],
        "group_scores": pair["group_scores"],
        "group_win_rates": pair["group_win_rates"],
    }


def is_identical(row: WeightedPairRow) -> bool:
    """Whether both responses have equal tokens and weights: such a pair carries no gradient."""
    same_ids = row["chosen_ids"] == row["rejected_ids"]
    return same_ids and np.array_equal(row["chosen_weights"], row["rejected_weights"])
