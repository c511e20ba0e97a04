"""Flows - the tournament: policies of a run and other models on the held-out prompts, by any scorer (SPPO's figure 3).

One `generations` artifact holds an answer of each as its candidates, so the score stage compares them like the
candidates of one policy.

Axes: M policies, N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config
from data_contracts.identity import fingerprint
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from data_contracts.store import NAME_PART, Store
from stages.methods.preferences import preference_matrix
from stages.registry import Named
from stages.scoring import SCORERS
from stages.scoring.pairing import relative_rewards
from stages.scoring.stage import ScoringConfig


class TournamentConfig(Config):
    """Round-robin of all policies and baselines at the end of a run. It changes no other artifact."""

    scorer: Annotated[Named, SCORERS]
    """Who compares: a pair scorer (pairrm, llm_judge) in both orders, or a score, of which the higher one wins."""
    baselines: dict[str, ModelRef] = Field(default_factory=dict)
    """Other models by name; they answer the held-out prompts as the policies do."""

    @field_validator("baselines")
    @classmethod
    def _names_are_no_paths(cls, baselines: dict[str, ModelRef]) -> dict[str, ModelRef]:
        for name in baselines:
            if not NAME_PART.fullmatch(name):
                raise ValueError(f"{name!r} names files of the run: letters, digits, dots, dashes and underscores only")
        return baselines


class Standing(NamedTuple):
    scorer: str
    names: list[str]
    rates: list[list[float | None]]
    """[M, M] P(row beats column), mean over prompts; None where every comparison failed."""
    failed: int
    """Comparisons without a result, in no mean."""
    prompts: int


def _inputs(answers: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    return {f"{number:03d} {name}": ref for number, (name, ref) in enumerate(answers.items())}


def merge_key(answers: Mapping[str, ArtifactRef]) -> str:
    return fingerprint("merge", "1", {}, {name: ref.content for name, ref in _inputs(answers).items()})


def merged(answers: Mapping[str, ArtifactRef], store: Store) -> ArtifactRef:
    """The first answer of each policy to every prompt, as candidates 0, 1, ... in the order of `answers`."""
    inputs, key = _inputs(answers), merge_key(answers)
    with store.lock("generations", key):
        if existing := store.find("generations", key):
            return existing
        rows = [
            row | {"candidate": number}
            for number, ref in enumerate(answers.values())
            for row in read_shards(ref.path, "generations").to_pylist()
            if row["candidate"] == 0
        ]
        directory = store.directory("generations", key)
        write_shard(shard_path(directory, 0), to_table(sorted(rows, key=lambda row: row["prompt_id"]), "generations"))
        record = ArtifactRecord(
            kind="generations",
            key=key,
            stage="merge",
            version="1",
            config={},
            inputs=inputs,
            content="",
            files=[],
            rows=len(rows),
        )
        return store.sign(record).ref(str(directory))


def scoring_of(scorer: Any) -> ScoringConfig:
    """Settings of the score stage: the raw scores are wanted, no row has to come of them."""
    return ScoringConfig(scorer=scorer, pairing="each", max_drop_rate=1.0)


def standing(scorer: str, names: Sequence[str], scored: ArtifactRef | None, prompts: int) -> Standing:
    """From the raw scores: a pair scorer's P(i beats j) over both orders; of a score, the higher one wins and a tie
    is a half. None: all failed.
    """
    rows = read_shards(scored.path, "scores", "scores").to_pylist() if scored else []
    preferences = np.stack([_preferences(row, len(names)) for row in rows] or [_unknown(len(names))] * prompts)
    is_known = ~np.isnan(preferences)
    counts = is_known.sum(axis=0)
    means = np.divide(
        np.where(is_known, preferences, 0.0).sum(axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0
    )
    rates = [[float(value) if np.isfinite(value) else None for value in line] for line in means]
    return Standing(scorer, list(names), rates, int((~is_known).sum()) // 2, prompts)


def _unknown(count: int) -> np.ndarray:
    return np.where(np.eye(count, dtype=bool), 0.5, np.nan)


def _preferences(row: Mapping[str, Any], count: int) -> np.ndarray:
    """P(i beats j) of one prompt; NaN where it is not known. [M, M], the diagonal 1/2."""
    if row["preference_logits"] is not None:
        logits = np.array(row["preference_logits"], dtype=float).reshape(count, count)
        relative = relative_rewards(logits, "both_orders")
        return np.where(np.isnan(relative), np.nan, preference_matrix(relative))
    scores = np.array([np.nan if value is None else value for value in row["scores"]], dtype=float)
    wins = np.where(scores[:, None] > scores[None, :], 1.0, np.where(scores[:, None] == scores[None, :], 0.5, 0.0))
    unknown = np.isnan(scores)
    wins[unknown, :] = wins[:, unknown] = np.nan
    np.fill_diagonal(wins, 0.5)
    return wins


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly spaced, the first and the last among them."""
    if length <= count:
        return list(range(length))
    return sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})
