"""Weights - SWIFT: how much more likely the teacher finds a token, or its word, than the policy does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from stages.weighting.weights.alignment import Alignment, align, merge_empty, pair_means
from stages.weighting.weights.base import (
    ResponseBatch,
    Tokens,
    WeightConfig,
    WeightProvider,
    Weights,
    fraction,
    result,
    segment_sum,
)


class ClampedExp(WeightConfig):
    """omega = k exp(mu clamp(log-ratio, L, U)): the weight of SWIFT and of TIS-DPO."""

    k: float = Field(1.0, ge=0)
    """Weight of a token that both models find equally likely."""
    L: float = -0.5
    """Smallest log-ratio, nats."""
    U: float = 1.5
    """Largest log-ratio, nats."""

    @model_validator(mode="after")
    def _ordered(self):
        if self.L > self.U:
            raise ValueError(f"`L` ({self.L}) must not exceed `U` ({self.U})")
        return self

    def of(self, log_ratio: np.ndarray, mu: np.ndarray | float) -> np.ndarray:
        return self.k * np.exp(mu * np.clip(log_ratio, self.L, self.U))


class SwiftConfig(ClampedExp):
    """Vetted setting: k 1, mu 1 on both sides, L -0.5, U 1.5: weights in [0.607, 4.482]."""

    name: Literal["swift"] = "swift"
    mu_chosen: float = 1.0
    """Exponent for ground truths."""
    mu_rejected: float = 1.0
    """Exponent for generations; -1 pushes down most what the teacher dislikes, as TIS-DPO does."""
    segmenter: Literal["word", "common_starts"] = "word"
    """Where two tokenizers' components are cut: at words, or wherever a token starts in both (finer; the released code's)."""
    empty: Literal["neutral", "zero", "merge"] = "neutral"
    """A token whose component has no teacher token: weight k, weight 0, or its component is joined to the next one."""
    eos: Literal["pair", "neutral", "zero"] = "pair"
    """The EOS: compared with the teacher's (k if it has none), weight k, or weight 0."""
    normalise: Literal["none", "sum100", "mean1"] = "none"
    """Scale each response's weights to sum 100 (the released code), or to mean 1 (keeps DPO's scale)."""
    teacher_prompt: Literal["raw", "chat_template"] = "raw"
    """What the teacher sees before the response: the text of the student's prompt, or the messages in its own chat template."""


class SwiftWeights(WeightProvider):
    VERSION = "1"
    SOURCE = "SWIFT, Eq. 4-5 (one tokenizer) and Eq. 6 / Algorithm 2 (two)"
    NEEDS = frozenset({"reference", "teacher"})
    Config = SwiftConfig

    @staticmethod
    def weights(config: SwiftConfig, batch: ResponseBatch) -> Weights:
        r"""omega_i = mean over the teacher tokens r of i's component of k exp(mu clamp(a_r - b_i, L, U)).

        a and b are the teacher's and the policy's log-probs. A response with equal token ids for both models is compared token by
        token (Eq. 5). Stats: at_L and at_U (token pairs at a clamp), empty (tokens without a teacher token), unaligned (responses
        whose spans are unusable: weights k), component_chars.
        """
        student, teacher = batch.column("reference"), batch.teacher_column()
        mu = np.where(batch.chosen, config.mu_chosen, config.mu_rejected)[batch.student.rows()]
        shared = same_tokens(batch.student, batch.teacher)
        parts = []
        if shared.any():
            parts.append((shared, shared_weights(config, batch.student, batch.teacher, student, teacher, mu)))
        if not shared.all():
            parts.append(
                (~shared, cross_weights(config, batch.texts, batch.student, batch.teacher, student, teacher, mu))
            )
        values, stats = np.zeros(len(student)), {}
        for rows, part in parts:
            tokens = rows[batch.student.rows()]
            values[tokens] = part.values[tokens]
            stats |= part.stats(rows, tokens)
        return result(normalise(values, batch.student.starts, config.normalise), **stats)


class _Part(NamedTuple):
    """Weights of the whole batch by one of the two ways; the caller takes the rows that are its own."""

    values: np.ndarray
    """[S], float64."""
    at_low: np.ndarray
    """[S]: token pairs at L; likewise at U, and all of them."""
    at_high: np.ndarray
    pairs: np.ndarray
    empty: np.ndarray
    """bool [S]: no scored teacher token."""
    alignment: Alignment | None

    def stats(self, rows: np.ndarray, tokens: np.ndarray) -> dict[str, tuple[float, float]]:
        pairs = float(self.pairs[tokens].sum())
        found = {
            "at_L": (float(self.at_low[tokens].sum()), pairs),
            "at_U": (float(self.at_high[tokens].sum()), pairs),
            "empty": fraction(self.empty[tokens]),
        }
        if self.alignment is not None:
            mine = (rows & self.alignment.aligned)[self.alignment.rows]
            chars = (self.alignment.ends - self.alignment.starts)[mine]
            found |= {
                "unaligned": fraction(~self.alignment.aligned[rows]),
                "component_chars": (float(chars.sum()), float(chars.size)),
            }
        return found


def same_tokens(student: Tokens, teacher: Tokens) -> np.ndarray:
    """bool [N]: both models see the response as the same token ids."""
    equal = np.diff(student.starts) == np.diff(teacher.starts)
    mine, theirs = equal[student.rows()], equal[teacher.rows()]
    differs = student.ids[mine] != teacher.ids[theirs]
    return (
        equal
        & (np.bincount(student.rows()[mine][differs], minlength=len(equal)) == 0)
        & (student.ended == teacher.ended)
    )


def shared_weights(
    config: SwiftConfig, tokens: Tokens, other: Tokens, student: np.ndarray, teacher: np.ndarray, mu: np.ndarray
) -> _Part:
    """Eq. 4-5, token by token; only rows of `same_tokens` mean anything."""
    paired = np.full(len(student), np.nan)
    same = same_tokens(tokens, other)
    paired[same[tokens.rows()]] = teacher[same[other.rows()]]
    gap = paired - student
    scored = ~np.isnan(gap)
    values = np.where(scored, config.of(gap, mu), 0.0 if config.empty == "zero" else config.k)
    eos = tokens.is_eos()
    values[eos] = eos_weights(config, paired[eos], student[eos], mu[eos])
    return _Part(values, gap <= config.L, gap >= config.U, scored, ~scored, None)


def cross_weights(
    config: SwiftConfig,
    texts: Sequence[str],
    tokens: Tokens,
    other: Tokens,
    student: np.ndarray,
    teacher: np.ndarray,
    mu: np.ndarray,
) -> _Part:
    """Eq. 6 / Algorithm 2: the exponential inside the mean over each component's teacher tokens."""
    alignment = align(texts, tokens, other, config.segmenter)
    if config.empty == "merge":
        alignment = merge_empty(alignment, ~np.isnan(teacher))
    clamped = [np.zeros(len(student)), np.zeros(len(student))]

    def weight(gap: np.ndarray, token: np.ndarray) -> np.ndarray:
        for counts, hit in zip(clamped, (gap <= config.L, gap >= config.U), strict=True):
            counts += np.bincount(token[hit], minlength=len(student))
        return config.of(gap, mu[token])

    values, pairs = pair_means(alignment, student, teacher, weight)
    empty = pairs == 0
    values[empty] = 0.0 if config.empty == "zero" else config.k
    aligned = alignment.aligned[tokens.rows()]
    values[~aligned], empty = config.k, empty & aligned
    eos, ended = tokens.is_eos(), other.ended[tokens.ended]
    partner = np.full(len(ended), np.nan)
    partner[ended] = teacher[other.starts[1:][tokens.ended & other.ended] - 1]
    values[eos] = eos_weights(config, partner, student[eos], mu[eos])
    empty[eos] = np.isnan(partner)
    return _Part(values, *clamped, pairs, empty, alignment)


def eos_weights(config: SwiftConfig, teacher: np.ndarray, student: np.ndarray, mu: np.ndarray | float) -> np.ndarray:
    """Weight of each student EOS, which has no text: against the teacher's end-of-text log-prob (NaN: none, weight k)."""
    if config.eos == "zero":
        return np.zeros(len(student))
    if config.eos == "neutral":
        return np.full(len(student), config.k)
    return np.where(np.isnan(teacher), config.k, config.of(teacher - student, mu))


def normalise(values: np.ndarray, starts: np.ndarray, how: str) -> np.ndarray:
    """Scale each response's weights. A response of zeros cannot be scaled: the released code gives it 1/n, `mean1` leaves it."""
    if how == "none":
        return values
    lengths, sums = np.diff(starts), segment_sum(values, starts)
    zero = sums == 0
    factor = np.where(zero, 1.0, (100.0 if how == "sum100" else lengths) / np.where(zero, 1.0, sums))
    scaled = values * np.repeat(factor, lengths)
    if how == "sum100":
        scaled = np.where(np.repeat(zero, lengths), np.repeat(1.0 / np.maximum(lengths, 1), lengths), scaled)
    return scaled
