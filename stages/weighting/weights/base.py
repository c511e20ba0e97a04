"""Stages - what a weight provider is: its settings, what it needs, and a pure function from log-probs to token weights.

Responses travel flat: the tokens of N responses one after the other, and where each response starts. No loop runs per
token.
Axes: N responses, S student tokens of all of them, R teacher tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from data_contracts.errors import ContractError
from stages.registry import Named, Plugin

NEEDS = {
    "reference": "the policy as the iteration finds it, on the student's tokens -> logps['reference']",
    "teacher": "the teacher, on its own tokens of the response's text -> texts, teacher, teacher_logps",
    "teacher_unshifted": "the same with its logits read one position late (swift_released.unshifted_logps)",
    "positive": "the good model of a contrastive pair, on the student's tokens -> logps['positive']",
    "negative": "the bad model of a contrastive pair -> logps['negative']",
    "reward_model": "a model of the student's tokenizer trained on the preferences -> logps['reward_model']",
    "importance": "gradient attribution under the reference (methods.importance) -> logps['importance']",
    "importance_max_logit": "the same of the largest logit behind the response -> logps['importance_max_logit']",
}
"""Everything a provider may ask of the weigh stage, and where the provider finds it."""

Stat = tuple[float, float]
"""(sum, count) of a mean; under a name that starts with "min/": (minimum, count)."""


class Tokens(NamedTuple):
    """N responses as one tokenizer cuts them, flat."""

    starts: np.ndarray
    """int64 [N + 1]: response i is [starts[i]:starts[i + 1]]."""
    ids: np.ndarray
    """int64 [S]."""
    spans: np.ndarray | None
    """int64 [S, 2]: (start, end) characters in the response's text; an EOS has none and is ignored. None: not known."""
    ended: np.ndarray
    """bool [N]: the last token is the EOS that ended the response."""
    aligned: np.ndarray | None = None
    """bool [N]: False where a response's spans are not known; it gets neutral weights. None: all are known."""

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], spans: Sequence[ArrayLike | None] | None, ended: Sequence[bool]
    ) -> Tokens:
        """Tokens of one list of ids per response, each with a list of spans.

        A list of spans may leave out the EOS; None marks a response without spans. Raises: ContractError if a response
        has another number of spans than of tokens.
        """
        starts = row_starts([len(row) for row in ids])
        flat = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(row, dtype=np.int64) for row in ids)])
        has_ended = np.asarray(ended, dtype=bool)
        if spans is None:
            return cls(starts, flat, None, has_ended)
        table = np.zeros((starts[-1], 2), dtype=np.int64)
        for start, row, tokens, has_eos in zip(starts[:-1], spans, ids, ended, strict=True):
            if row is None:
                continue
            pairs = np.asarray(row, dtype=np.int64).reshape(-1, 2)
            if len(pairs) not in (len(tokens), len(tokens) - bool(has_eos)):
                raise ContractError(f"{len(pairs)} spans for {len(tokens)} tokens")
            table[start : start + len(pairs)] = pairs
        return cls(starts, flat, table, has_ended, np.asarray([row is not None for row in spans]))

    def is_eos(self) -> np.ndarray:
        """bool [S]: True at the EOS tokens that ended a response."""
        mask = np.zeros(self.starts[-1], dtype=bool)
        mask[self.starts[1:][self.ended] - 1] = True
        return mask

    def rows(self) -> np.ndarray:
        """int64 [S]: which response each token belongs to."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@dataclass(frozen=True)
class ResponseBatch:
    """N responses, and what the weigh stage computed for them. What the provider does not need is left empty."""

    keys: Sequence[str]
    """Names of the rows in messages, e.g. "pair17/chosen"; they also seed the random ablations."""
    chosen: np.ndarray
    """bool [N]: the response is the preferred one of its pair."""
    student: Tokens
    logps: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Role -> log-probability of each student token [S], in nats; under "importance" the raw attribution."""
    texts: Sequence[str] | None = None
    """The text of each response's tokens without EOS; both tokenizers' spans refer to it."""
    teacher: Tokens | None = None
    teacher_logps: np.ndarray | None = None
    """[R], in nats; NaN for a token beyond the teacher's context."""

    def column(self, role: str) -> np.ndarray:
        """The role's log-prob of each student token [S], as float64 unless it is wider.

        Raises: ContractError naming the row if the length is wrong or a value is NaN or infinite.
        """
        if role not in self.logps:
            raise ContractError(
                f"the weights read the log-probs {role!r}, and the weigh stage gave {sorted(self.logps)}: "
                f"put {role!r} into NEEDS of the provider"
            )
        values = np.asarray(self.logps[role])
        self._check(role, values, self.student, ~np.isfinite(values))
        return values.astype(np.float64, copy=False)

    def teacher_column(self) -> np.ndarray:
        """The teacher's log-prob of each of its tokens [R], as float64 unless it is wider; NaN: not scored.

        Raises: ContractError without a teacher, for a wrong length, and for an infinite value.
        """
        if self.teacher_logps is None:
            raise ContractError(_NO_TEACHER)
        values = np.asarray(self.teacher_logps)
        self._check("teacher", values, self.teacher_tokens(), np.isinf(values))
        return values.astype(np.float64, copy=False)

    def teacher_tokens(self) -> Tokens:
        """The responses as the teacher's tokenizer cuts them. Raises: ContractError without a teacher."""
        if self.teacher is None:
            raise ContractError(_NO_TEACHER)
        return self.teacher

    def response_texts(self) -> Sequence[str]:
        """The text of each response [N]. Raises: ContractError without a teacher, for whom alone they are made."""
        if self.texts is None:
            raise ContractError(_NO_TEACHER)
        return self.texts

    def _check(self, role: str, values: np.ndarray, tokens: Tokens, is_bad: np.ndarray) -> None:
        if values.shape != (tokens.starts[-1],):
            raise ContractError(
                f"log-probs {role!r}: {values.size} values for {tokens.starts[-1]} tokens of {len(self.keys)} responses"
            )
        if is_bad.any():
            first = int(np.flatnonzero(is_bad)[0])
            row = int(np.searchsorted(tokens.starts, first, side="right")) - 1
            raise ContractError(
                f"row {self.keys[row]!r}, log-probs {role!r}, token {first - tokens.starts[row]}: {values[first]}, and "
                f"{int(is_bad.sum())} such values in the batch: the model's weights are damaged, or it cannot produce "
                "this token"
            )


_NO_TEACHER = (
    "the weights read a teacher's tokens, and the weigh stage gave none: put 'teacher' into NEEDS of the provider"
)


class Weights(NamedTuple):
    """One weight per student token, and statistics of the batch."""

    values: np.ndarray
    """[S], in the precision they were computed in."""
    stats: dict[str, Stat]
    """By name; `add_stats` adds them up over batches."""

    @classmethod
    def of(cls, values: np.ndarray, **stats: Stat) -> Weights:
        """The weights with their mean, and `stats` beside it."""
        return cls(values, {"mean": (float(values.sum()), float(values.size)), **stats})

    def per_response(self, tokens: Tokens) -> list[np.ndarray]:
        """One float32 array per response, as the shards hold them."""
        return split(self.values.astype(np.float32), tokens.starts)


class WeightConfig(Named):
    """Settings of a provider. Choosing `name` and nothing else is the paper's weight."""


class WeightProvider(Plugin):
    """A weight for every token of a batch of responses. A subclass writes `Config` and `weights`.

    A provider is a formula and holds no model: the weigh stage makes the passes that NEEDS names, and `weights` turns
    their log-probs into weights. They are constants of the iteration: no gradient passes through them. The weigh stage
    knows the names below and no provider's own.

    By default a provider needs no model. One that does names it in NEEDS; where that depends on the settings, it
    overrides `needs`. In both functions `config` is an instance of the subclass's own `Config`.

    >>> from typing import Literal
    >>> class FirstTokens(WeightProvider):
    ...     class Config(WeightConfig):
    ...         name: Literal["first_tokens"] = "first_tokens"
    ...         count: int = 1
    ...
    ...     @staticmethod
    ...     def weights(config: Config, batch: ResponseBatch) -> Weights:
    ...         tokens = batch.student
    ...         position = np.arange(len(tokens.ids)) - tokens.starts[tokens.rows()]
    ...         return Weights.of((position < config.count).astype(float))
    >>> tokens = Tokens.of([[5, 6, 7], [8]], None, ended=[False, False])  # N = 2, S = 4
    >>> batch = ResponseBatch(["a/chosen", "a/rejected"], np.array([True, False]), tokens)
    >>> FirstTokens.weights(FirstTokens.Config(), batch).values.tolist()
    [1.0, 0.0, 0.0, 1.0]
    """

    SOURCE: ClassVar[str] = ""
    """The equation and its paper."""
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    """Names of the table NEEDS, at the default settings."""

    @classmethod
    def needs(cls, config: Any) -> frozenset[str]:
        """Names of the table NEEDS that these settings ask for."""
        return cls.NEEDS

    @staticmethod
    def weights(config: Any, batch: ResponseBatch) -> Weights:
        """One weight per student token [S]."""
        raise NotImplementedError("a weight provider defines weights(config, batch)")


def row_starts(lengths: Sequence[int]) -> np.ndarray:
    """Where each row starts in a flat array, and where the last one ends. int64 [N + 1]."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def split(values: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """One array per response."""
    if len(starts) < 2:
        return []
    return np.split(values, starts[1:-1])


def segment_sum(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each response's values [N]; 0 for an empty one. Rows do not touch each other's rounding."""
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return np.bincount(rows, weights=values, minlength=len(starts) - 1)


def fraction(mask: np.ndarray) -> Stat:
    """The share of True entries, as (number, size)."""
    return float(np.count_nonzero(mask)), float(mask.size)


def add_stats(parts: Iterable[Mapping[str, Stat]]) -> dict[str, float]:
    """The statistics of several batches as one number each.

    >>> add_stats([{"mean": (6.0, 3.0), "min/weight": (0.5, 3.0)}, {"mean": (2.0, 1.0), "min/weight": (0.2, 1.0)}])
    {'mean': 2.0, 'min/weight': 0.2}
    """
    sums: dict[str, Stat] = {}
    minima: dict[str, float] = {}
    for part in parts:
        for name, (value, count) in part.items():
            if name.startswith("min/"):
                minima[name] = min(minima.get(name, float("inf")), value)
            else:
                total, size = sums.get(name, (0.0, 0.0))
                sums[name] = (total + value, size + count)
    return {name: total / max(size, 1.0) for name, (total, size) in sums.items()} | minima
