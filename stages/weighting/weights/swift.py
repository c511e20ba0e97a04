"""Weights - SWIFT: how much more likely the teacher finds a token, or its word, than the policy does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from stages.weighting.weights.alignment import Alignment, align, merge_empty, pair_means
from stages.weighting.weights.base import (
    ResponseBatch,
    Stat,
    Tokens,
    WeightConfig,
    WeightProvider,
    Weights,
    fraction,
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
    def _ordered(self) -> Self:
        if self.L > self.U:
            raise ValueError(f"`L` ({self.L}) must not exceed `U` ({self.U})")
        return self

    def omega(self, log_ratio: np.ndarray, mu: np.ndarray | float) -> np.ndarray:
        return self.k * np.exp(mu * np.clip(log_ratio, self.L, self.U))


class SwiftWeights(WeightProvider):
    """SWIFT's weights, across any two tokenizers that have character offsets."""

    SOURCE = "SWIFT, Eq. 4-5 (one tokenizer) and Eq. 6 / Algorithm 2 (two)"
    NEEDS = frozenset({"reference", "teacher"})

    class Config(ClampedExp):
        """Vetted setting: k 1, mu 1 on both sides, L -0.5, U 1.5: weights in [0.607, 4.482]."""

        name: Literal["swift"] = "swift"
        mu_chosen: float = 1.0
        """Exponent for ground truths."""
        mu_rejected: float = 1.0
        """Exponent for generations; -1 pushes down most what the teacher dislikes, as TIS-DPO does."""
        segmenter: Literal["word", "common_starts"] = "word"
        """Where two tokenizers' components are cut: at words, or wherever a token starts in both (finer; the released
        code's)."""
        empty: Literal["neutral", "zero", "merge"] = "neutral"
        """A token whose component has no teacher token: weight k, weight 0, or its component is joined to the next
        one."""
        eos: Literal["pair", "neutral", "zero"] = "pair"
        """The EOS: compared with the teacher's (k if it has none), weight k, or weight 0."""
        normalise: Literal["none", "sum100", "mean1"] = "none"
        """Scale each response's weights to sum 100 (the released code), or to mean 1 (keeps DPO's scale)."""
        teacher_prompt: Literal["auto", "raw", "chat_template"] = "auto"
        """What the teacher sees before the response. chat_template: the messages in its own chat template; raw: the
        text of the student's prompt without the student's control tokens; auto: the first where the policy reads a chat
        and the teacher has a template, else the second."""

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""omega_i = mean over the teacher tokens r of i's component of k exp(mu clamp(a_r - b_i, L, U)).

        a and b are the teacher's and the policy's log-probs [R] and [S]. A response with equal token ids for both
        models is compared token by token (Eq. 5).
        Stats: at_L and at_U (token pairs at a clamp), empty (tokens without a teacher token), unaligned (responses
        whose spans are unusable: weights k), component_chars.

        >>> student = Tokens.of([[5, 6]], [[(0, 2), (2, 4)]], ended=[False])  # "so i" cut as "so", " i"; N = 1, S = 2
        >>> batch = ResponseBatch(
        ...     ["a/chosen"], np.array([True]), student, {"reference": np.array([-1.0, -2.0])},
        ...     ["so i"], teacher=student, teacher_logps=np.array([-0.5, -4.0]))
        >>> SwiftWeights.weights(SwiftWeights.Config(), batch).values.round(4).tolist()  # e^0.5, e^clamp(-2) = e^-0.5
        [1.6487, 0.6065]
        """
        student, teacher = batch.column("reference"), batch.teacher_column()
        mu = np.where(batch.chosen, config.mu_chosen, config.mu_rejected)[batch.student.rows()]
        is_shared = same_tokens(batch.student, batch.teacher_tokens())
        parts: list[tuple[np.ndarray, _Part]] = []
        if is_shared.any():
            part = shared_weights(config, batch.student, batch.teacher_tokens(), student, teacher, mu)
            parts.append((is_shared, part))
        if not is_shared.all():
            texts = batch.response_texts()
            part = cross_weights(config, texts, batch.student, batch.teacher_tokens(), student, teacher, mu)
            parts.append((~is_shared, part))
        values = np.zeros(len(student))
        stats: dict[str, Stat] = {}
        for rows, part in parts:
            tokens = rows[batch.student.rows()]
            values[tokens] = part.values[tokens]
            stats |= part.stats(rows, tokens)
        return Weights.of(normalise(values, batch.student.starts, config.normalise), **stats)


class _Part(NamedTuple):
    """Weights of the whole batch by one of the two ways; the caller takes the rows that are its own."""

    values: np.ndarray
    """[S], float64."""
    at_low: np.ndarray
    """[S]: token pairs at L."""
    at_high: np.ndarray
    """[S]: token pairs at U."""
    pairs: np.ndarray
    """[S]: token pairs."""
    is_empty: np.ndarray
    """bool [S]: no scored teacher token."""
    alignment: Alignment | None

    def stats(self, rows: np.ndarray, tokens: np.ndarray) -> dict[str, Stat]:
        """Statistics of these rows (bool [N]) and of their tokens (bool [S])."""
        pairs = float(self.pairs[tokens].sum())
        stats = {
            "at_L": (float(self.at_low[tokens].sum()), pairs),
            "at_U": (float(self.at_high[tokens].sum()), pairs),
            "empty": fraction(self.is_empty[tokens]),
        }
        if self.alignment is not None:
            components = (rows & self.alignment.aligned)[self.alignment.rows]
            characters = (self.alignment.ends - self.alignment.starts)[components]
            stats["unaligned"] = fraction(~self.alignment.aligned[rows])
            stats["component_chars"] = (float(characters.sum()), float(characters.size))
        return stats


def same_tokens(student: Tokens, teacher: Tokens) -> np.ndarray:
    """bool [N]: both models see the response as the same token ids; what ends it may be another token for each."""
    equal_length = np.diff(student.starts) == np.diff(teacher.starts)
    in_student, in_teacher = equal_length[student.rows()], equal_length[teacher.rows()]
    ends = student.is_eos()[in_student] & teacher.is_eos()[in_teacher]
    differs = (student.ids[in_student] != teacher.ids[in_teacher]) & ~ends
    differences = np.bincount(student.rows()[in_student][differs], minlength=len(equal_length))
    return equal_length & (differences == 0) & (student.ended == teacher.ended)


def shared_weights(
    config: SwiftWeights.Config,
    tokens: Tokens,
    teacher_tokens: Tokens,
    student: np.ndarray,
    teacher: np.ndarray,
    mu: np.ndarray,
) -> _Part:
    """Eq. 4-5, token by token, from log-probs [S] and [R]; only rows of `same_tokens` mean anything."""
    paired = np.full(len(student), np.nan)
    is_same = same_tokens(tokens, teacher_tokens)
    paired[is_same[tokens.rows()]] = teacher[is_same[teacher_tokens.rows()]]
    gap = paired - student
    is_scored = ~np.isnan(gap)
    values = np.where(is_scored, config.omega(gap, mu), _empty_weight(config))
    eos = tokens.is_eos()
    values[eos] = eos_weights(config, paired[eos], student[eos], mu[eos])
    return _Part(values, gap <= config.L, gap >= config.U, is_scored, ~is_scored, None)


def cross_weights(
    config: SwiftWeights.Config,
    texts: Sequence[str],
    tokens: Tokens,
    teacher_tokens: Tokens,
    student: np.ndarray,
    teacher: np.ndarray,
    mu: np.ndarray,
) -> _Part:
    """Return Eq. 6 / Algorithm 2: the exponential inside the mean over a component's teacher tokens.

    Args: log-probs, student [S] and teacher [R].
    """
    alignment = align(texts, tokens, teacher_tokens, config.segmenter)
    if config.empty == "merge":
        alignment = merge_empty(alignment, ~np.isnan(teacher))
    at_low, at_high = np.zeros(len(student)), np.zeros(len(student))

    def weight(gap: np.ndarray, token: np.ndarray) -> np.ndarray:
        nonlocal at_low, at_high
        at_low += np.bincount(token[gap <= config.L], minlength=len(student))
        at_high += np.bincount(token[gap >= config.U], minlength=len(student))
        return config.omega(gap, mu[token])

    values, pairs = pair_means(alignment, student, teacher, weight)
    is_empty = pairs == 0
    values[is_empty] = _empty_weight(config)
    is_aligned = alignment.aligned[tokens.rows()]
    values[~is_aligned] = config.k
    is_empty &= is_aligned
    eos, teacher_eos = tokens.is_eos(), _teacher_eos(tokens, teacher_tokens, teacher)
    values[eos] = eos_weights(config, teacher_eos, student[eos], mu[eos])
    is_empty[eos] = np.isnan(teacher_eos)
    return _Part(values, at_low, at_high, pairs, is_empty, alignment)


def _empty_weight(config: SwiftWeights.Config) -> float:
    """Weight of a token without a teacher token."""
    if config.empty == "zero":
        return 0.0
    return config.k


def _teacher_eos(tokens: Tokens, teacher_tokens: Tokens, teacher: np.ndarray) -> np.ndarray:
    """For each student EOS, the teacher's log-prob of its own EOS; NaN where the teacher's response has none."""
    has_partner = teacher_tokens.ended[tokens.ended]
    logps = np.full(len(has_partner), np.nan)
    logps[has_partner] = teacher[teacher_tokens.starts[1:][tokens.ended & teacher_tokens.ended] - 1]
    return logps


def eos_weights(
    config: SwiftWeights.Config, teacher: np.ndarray, student: np.ndarray, mu: np.ndarray | float
) -> np.ndarray:
    """Weight of each student EOS, which has no text: against the teacher's EOS log-prob (NaN: none, weight k)."""
    if config.eos == "zero":
        return np.zeros(len(student))
    if config.eos == "neutral":
        return np.full(len(student), config.k)
    return np.where(np.isnan(teacher), config.k, config.omega(teacher - student, mu))


def normalise(values: np.ndarray, starts: np.ndarray, scale: str) -> np.ndarray:
    """The weights [S] with each response scaled: `sum100` to sum 100, `mean1` to mean 1, `none` not at all.

    A response of zeros cannot be scaled: the released code gives it 1/n, `mean1` leaves it.
    """
    if scale == "none":
        return values
    lengths, sums = np.diff(starts), segment_sum(values, starts)
    is_zero = sums == 0
    target = np.full(len(lengths), 100.0) if scale == "sum100" else lengths
    factor = np.where(is_zero, 1.0, target / np.where(is_zero, 1.0, sums))
    scaled = values * np.repeat(factor, lengths)
    if scale == "sum100":
        return np.where(np.repeat(is_zero, lengths), np.repeat(1.0 / np.maximum(lengths, 1), lengths), scaled)
    return scaled
