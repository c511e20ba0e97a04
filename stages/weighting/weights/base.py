"""Stages - what a weight provider is: settings, what it needs, and a pure function from log-probs to one weight per token.

Responses travel flat: the tokens of N responses one after the other, and where each response starts. No loop runs per token.
Axes: N responses, S student tokens of all of them, R teacher tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data_contracts.errors import ContractError
from stages.registry import Named

NEEDS = {
    "reference": "the policy as the iteration finds it, on the student's tokens -> logps['reference']",
    "teacher": "the teacher, on its own tokens of the response's text -> teacher, teacher_logps",
    "teacher_unshifted": "the teacher's logits read one position late (swift_released.unshifted_logps) -> teacher, teacher_logps",
    "positive": "the good model of a contrastive pair, on the student's tokens -> logps['positive']",
    "negative": "the bad one -> logps['negative']",
    "reward_model": "a model of the student's tokenizer trained on the preferences -> logps['reward_model']",
    "importance": "gradient attribution under the reference (methods.importance.token_importance) -> logps['importance']",
}
"""Everything a provider may ask of the weigh stage, and where it expects it."""


class Tokens(NamedTuple):
    """N responses as one tokenizer cuts them, flat."""

    starts: np.ndarray
    """int64 [N + 1]: response i is [starts[i]:starts[i + 1]]."""
    ids: np.ndarray
    """int64 [S]."""
    spans: np.ndarray | None
    """int64 [S, 2]: (start, end) characters in the response's text; an EOS has none and is ignored here. None: not known."""
    ended: np.ndarray
    """bool [N]: the last token is the EOS that ended the response."""
    aligned: np.ndarray | None = None
    """bool [N]: False where the spans could not be found; such a response gets neutral weights. None: all of them."""

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], spans: Sequence[Any] | None, ended: Sequence[bool]) -> Tokens:
        """From one list per response. `spans` rows may leave out the EOS; None marks a response without spans."""
        starts = row_starts([len(row) for row in ids])
        flat = (
            np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
            if starts[-1]
            else np.zeros(0, dtype=np.int64)
        )
        if spans is None:
            return cls(starts, flat, None, np.asarray(ended, dtype=bool))
        table = np.zeros((starts[-1], 2), dtype=np.int64)
        for start, row, tokens, end in zip(starts[:-1], spans, ids, ended, strict=True):
            if row is None:
                continue
            row = np.asarray(row, dtype=np.int64).reshape(-1, 2)
            if len(row) not in (len(tokens), len(tokens) - bool(end)):
                raise ContractError(f"{len(row)} spans for {len(tokens)} tokens")
            table[start : start + len(row)] = row
        return cls(starts, flat, table, np.asarray(ended, dtype=bool), np.asarray([row is not None for row in spans]))

    def is_eos(self) -> np.ndarray:
        """bool [S]: the EOS tokens that ended a response."""
        mask = np.zeros(self.starts[-1], dtype=bool)
        mask[self.starts[1:][self.ended] - 1] = True
        return mask

    def rows(self) -> np.ndarray:
        """int64 [S]: which response each token belongs to."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@dataclass(frozen=True)
class ResponseBatch:
    """N responses, and what the weigh stage found out about them. What the provider does not need is left empty."""

    keys: Sequence[str]
    """Names the row in messages and seeds the random ablations, e.g. "pair17/chosen"."""
    chosen: np.ndarray
    """bool [N]: the preferred side of its pair."""
    student: Tokens
    logps: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Role -> log-probability of each student token [S], nats (for "importance": the raw attribution)."""
    texts: Sequence[str] | None = None
    """What the response's tokens without EOS say; both tokenizers' spans refer to it."""
    teacher: Tokens | None = None
    teacher_logps: np.ndarray | None = None
    """[R]; NaN for a token beyond the teacher's context."""

    def column(self, role: str) -> np.ndarray:
        """One log-prob per student token, as float64 unless it is wider.

        Raises: ContractError naming the row if the length is wrong or a value is NaN or infinite.
        """
        if role not in self.logps:
            raise ContractError(f"the weights need the log-probs {role!r}; the weigh stage gave {sorted(self.logps)}")
        values = np.asarray(self.logps[role])
        self._check(role, values, self.student, ~np.isfinite(values))
        return values.astype(np.float64, copy=False)

    def teacher_column(self) -> np.ndarray:
        """The same for the teacher's tokens, where NaN means "not scored"."""
        if self.teacher is None or self.teacher_logps is None:
            raise ContractError("the weights need a teacher; the weigh stage gave none")
        values = np.asarray(self.teacher_logps)
        self._check("teacher", values, self.teacher, np.isinf(values))
        return values.astype(np.float64, copy=False)

    def _check(self, role: str, values: np.ndarray, tokens: Tokens, bad: np.ndarray) -> None:
        if values.shape != (tokens.starts[-1],):
            raise ContractError(
                f"log-probs {role!r}: {values.size} values for {tokens.starts[-1]} tokens of {len(self.keys)} responses"
            )
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(tokens.starts, first, side="right")) - 1
            raise ContractError(
                f"row {self.keys[row]!r}, log-probs {role!r}, token {first - tokens.starts[row]}: {values[first]} "
                f"({int(bad.sum())} such value(s) in the batch): the model's weights are damaged, or it cannot produce this token"
            )


class Weights(NamedTuple):
    values: np.ndarray
    """[S], in the precision they were computed in."""
    stats: dict[str, tuple[float, float]]
    """Name -> (sum, count): a mean, added up over batches by `add_stats`. Names that start with "min/" hold (minimum, count)."""

    def per_response(self, tokens: Tokens) -> list[np.ndarray]:
        """One float32 array per response, as the shards hold them."""
        return split(self.values.astype(np.float32), tokens.starts)


class WeightConfig(Named):
    """Settings of a provider. Choosing `name` and nothing else is the paper's weight."""


class WeightProvider:
    """What every provider declares. The weigh stage knows these names and no provider's."""

    VERSION: ClassVar[str]
    """Bumped when the numbers change their meaning."""
    SOURCE: ClassVar[str]
    """The equation."""
    Config: ClassVar[type[WeightConfig]]
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    """Names of the table NEEDS, at the default settings."""

    @classmethod
    def needs(cls, config: WeightConfig) -> frozenset[str]:
        """What these settings ask for."""
        return cls.NEEDS

    @staticmethod
    def weights(config: WeightConfig, batch: ResponseBatch) -> Weights:
        raise NotImplementedError


def row_starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def split(values: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """One array per response."""
    return np.split(values, starts[1:-1]) if len(starts) > 1 else []


def segment_sum(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each response's values [N]; 0 for an empty one. Rows do not touch each other's rounding."""
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return np.bincount(rows, weights=values, minlength=len(starts) - 1)


def result(values: np.ndarray, **stats: tuple[float, float]) -> Weights:
    """Weights with their mean."""
    return Weights(values, {"mean": (float(values.sum()), float(values.size)), **stats})


def fraction(mask: np.ndarray) -> tuple[float, float]:
    return float(np.count_nonzero(mask)), float(mask.size)


def add_stats(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """The statistics of several batches as one number each."""
    totals: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            old, seen = totals.get(name, (float("inf"), 0.0) if name.startswith("min/") else (0.0, 0.0))
            totals[name] = (min(old, value) if name.startswith("min/") else old + value, seen + count)
    return {
        name: value if name.startswith("min/") else value / max(count, 1.0) for name, (value, count) in totals.items()
    }
