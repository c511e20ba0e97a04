"""Weights - what SWIFT's released code stores: an affine map of the teacher's score, read one token late.

For comparison only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from stages.models.numerics import token_logps
from stages.weighting.weights.alignment import align, pair_means
from stages.weighting.weights.base import ResponseBatch, WeightConfig, WeightProvider, Weights, fraction
from stages.weighting.weights.rounding import round_decimals
from stages.weighting.weights.swift import normalise, same_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.policy import Batch


class SwiftReleasedWeights(WeightProvider):
    """The weights of SWIFT's released code."""

    SOURCE = "SWIFT's released code (commit 45d8acc)"
    NEEDS = frozenset({"teacher_unshifted"})
    VERSION = "2"

    class Config(WeightConfig):
        """Vetted setting: the released constants. Differs from the paper: (1) the policy's own probability is not used;
        (2) the teacher's logits are read at the token's own position, so it scores a repetition of the previous token;
        (3) an affine map to [0.43, 1.5] in place of exp; (4) two decimals before and after it; (5) each response sums to 100; (6) EOS gets
        0."""

        name: Literal["swift_released"] = "swift_released"
        clip_lo: float = 7.0
        """Smallest negated score, nats."""
        clip_hi: float = 15.0
        """Largest negated score, nats."""
        div: float = Field(15.0, gt=0)
        """What the clipped score is divided by."""
        decimals: int = Field(2, ge=0)
        """Digits of the scores that are stored, and of the weights."""
        normalise: Literal["none", "sum100"] = "sum100"
        """The data loader's scale."""

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""w_i = 2 (1 - (clip(-s_i, lo, hi) - lo) / div) - 0.5.

        s_i is the mean teacher log-prob over i's common-starts component. A token without a teacher token is scored
        like the worst.
        Stats: empty (such tokens).

        >>> from stages.weighting.weights.base import Tokens
        >>> tokens = Tokens.of([[5, 6]], None, ended=[True])  # N = 1, S = 2, the second is the EOS
        >>> batch = ResponseBatch(
        ...     ["a/chosen"], np.array([True]), tokens, teacher=tokens, teacher_logps=np.array([-10.0, -1.0]))
        >>> config = SwiftReleasedWeights.Config(normalise="none")
        >>> SwiftReleasedWeights.weights(config, batch).values.tolist()  # 2 (1 - 3/15) - 0.5, and 0 for the EOS
        [1.1, 0.0]
        """
        teacher, teacher_tokens = batch.teacher_column(), batch.teacher_tokens()
        tokens, score = batch.student, np.full(len(batch.student.ids), np.nan)
        is_shared = same_tokens(tokens, teacher_tokens)
        score[is_shared[tokens.rows()]] = teacher[is_shared[teacher_tokens.rows()]]
        if not is_shared.all():
            alignment = align(batch.response_texts(), tokens, teacher_tokens, "common_starts")
            means, _ = pair_means(alignment, np.zeros(len(score)), teacher, lambda gap, token: gap)
            score = np.where(is_shared[tokens.rows()], score, means)
        is_empty = np.isnan(score)
        score = round_decimals(score, config.decimals)  # the code stores scores, and maps what it stored
        values = affine(np.where(is_empty, -np.inf, score), config)
        eos = tokens.is_eos()
        values[eos] = 0.0
        return Weights.of(normalise(values, tokens.starts, config.normalise), empty=fraction(is_empty & ~eos))


def affine(score: np.ndarray, config: SwiftReleasedWeights.Config) -> np.ndarray:
    """2 (1 - (clip(-s, lo, hi) - lo) / div) - 0.5, rounded."""
    clipped = np.clip(-score, config.clip_lo, config.clip_hi)
    return round_decimals(2 * (1 - (clipped - config.clip_lo) / config.div) - 0.5, config.decimals)


def unshifted_logps(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probs by the released indexing: logits at input position P-1+t, read for the token at input position P-1+t,
    which is the one before.

    Shapes: logits [N, T, V] as `policy.response_logits` gives them -> [N, T].
    """
    tokens_before = batch.input_ids.gather(1, batch.sources)
    return token_logps(logits, tokens_before, batch.response_mask)
