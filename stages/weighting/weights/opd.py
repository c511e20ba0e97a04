"""Weights - OPD: how many nats the teacher finds a token of the policy's own response more likely than the policy."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from stages.weighting.weights.alignment import Alignment, align
from stages.weighting.weights.base import ResponseBatch, Stat, WeightConfig, WeightProvider, Weights, fraction
from stages.weighting.weights.swift import same_tokens


class OPDWeights(WeightProvider):
    """The advantages of on-policy distillation, across any two tokenizers that have character offsets."""

    SOURCE = "on-policy distillation as in tinker-cookbook; across tokenizers by SWIFT's components (ours)"
    NEEDS = frozenset({"reference", "teacher"})

    class Config(WeightConfig):
        """Vetted setting: coef 1."""

        name: Literal["opd"] = "opd"
        coef: float = Field(1.0, ge=0)
        """Factor of the log-ratio."""
        segmenter: Literal["word", "common_starts"] = "word"
        """Where two tokenizers' components are cut, as in the weights `swift`."""
        teacher_prompt: Literal["auto", "raw", "chat_template"] = "auto"
        """What the teacher sees before the response, as in the weights `swift`."""

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""A_i = coef (a_i - b_i), with b_i the policy's and a_i the teacher's log-prob of student token i [S].

        One tokenizer: a_i is the teacher's log-prob of the same token. Two: the teacher's log-probs of a component add
        up to that of its text, and so do the policy's; the difference is shared out evenly,
        a_i = b_i + (sum_r a_r - sum_j b_j) / n over the component's teacher tokens r and its n student tokens j. The
        a_i of a component add up to the teacher's sum. Within a component the two models cannot be told apart.
        The EOS is compared with the teacher's. A_i = 0 for a token that the teacher has no number for: in a component
        with an unscored teacher token or with none, in a response whose spans are unusable, an EOS without a partner.
        Stats: empty (such tokens), unaligned (responses with unusable spans).

        >>> from stages.weighting.weights.base import Tokens
        >>> student = Tokens.of([[5, 6]], [[(0, 1), (1, 4)]], ended=[False])  # "s", "o i"; N = 1, S = 2
        >>> teacher = Tokens.of([[7, 8]], [[(0, 2), (2, 4)]], ended=[False])  # "so", " i": one component, "so i"
        >>> batch = ResponseBatch(
        ...     ["a/chosen"], np.array([True]), student, {"reference": np.array([-1.0, -2.0])},
        ...     ["so i"], teacher=teacher, teacher_logps=np.array([-0.5, -1.5]))
        >>> OPDWeights.weights(OPDWeights.Config(), batch).values.tolist()  # ((-0.5 - 1.5) - (-1 - 2)) / 2
        [0.5, 0.5]
        """
        gap = teacher_gaps(batch, config.segmenter)
        return Weights.of(config.coef * gap.values, **gap.stats)


class Gaps(NamedTuple):
    """How much more likely the teacher finds each student token."""

    values: np.ndarray
    """log pi_T - log pi of each student token [S], nats; 0 where the teacher has no number."""
    stats: dict[str, Stat]


def teacher_gaps(batch: ResponseBatch, segmenter: str = "word") -> Gaps:
    """a_i - b_i of every student token, by the rule of `OPDWeights.weights`."""
    student, teacher, teacher_tokens = batch.column("reference"), batch.teacher_column(), batch.teacher_tokens()
    is_shared = same_tokens(batch.student, teacher_tokens)
    gap = np.full(len(student), np.nan)
    by_token = is_shared[batch.student.rows()]
    gap[by_token] = teacher[is_shared[teacher_tokens.rows()]] - student[by_token]
    stats: dict[str, Stat] = {}
    if not is_shared.all():
        alignment = align(batch.response_texts(), batch.student, teacher_tokens, segmenter)
        shared_out = component_gaps(alignment, student, teacher)
        eos = _eos_gaps(batch, student, teacher)
        gap = np.where(by_token, gap, np.where(batch.student.is_eos(), eos, shared_out))
        stats["unaligned"] = fraction(~alignment.aligned[~is_shared])
    is_empty = np.isnan(gap)
    return Gaps(np.where(is_empty, 0.0, gap), stats | {"empty": fraction(is_empty)})


def component_gaps(alignment: Alignment, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """(sum of the component's teacher log-probs - sum of its student log-probs) / its student tokens, [S].

    NaN where the component has no teacher token or one that is not scored, and for a token of no component.
    """
    count = len(alignment.starts) + 1  # the last entry is component -1's
    of_student, of_teacher = alignment.student % count, alignment.teacher % count
    sums = np.bincount(of_teacher, weights=teacher, minlength=count)
    sums[np.bincount(of_teacher, minlength=count) == 0] = np.nan
    sums[-1] = np.nan
    students = np.bincount(of_student, minlength=count)
    gap = (sums - np.bincount(of_student, weights=student, minlength=count)) / np.maximum(students, 1)
    return gap[of_student]


def _eos_gaps(batch: ResponseBatch, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """The teacher's log-prob of its EOS less the policy's of its own, at the EOS of each response; else NaN. [S]."""
    gap = np.full(len(student), np.nan)
    ends = batch.student.ended & batch.teacher_tokens().ended
    at = batch.student.starts[1:][ends] - 1
    gap[at] = teacher[batch.teacher_tokens().starts[1:][ends] - 1] - student[at]
    return gap
