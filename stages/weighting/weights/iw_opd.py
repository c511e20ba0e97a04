"""Weights - IW-OPD: early tokens count more, by how much of the gap between teacher and policy is still to come."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from stages.registry import Named
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, WeightConfig, WeightProvider, Weights, segment_sum, split
from stages.weighting.weights.opd import teacher_gaps


class IWOPDWeights(WeightProvider):
    """IW-OPD's weights, by themselves or times another provider's."""

    SOURCE = "IW-OPD (arXiv:2606.22600), as TRL's experimental iw_opd"
    NEEDS = frozenset({"reference", "teacher"})

    class Config(WeightConfig):
        """Vetted setting: gamma 0.5."""

        name: Literal["iw_opd"] = "iw_opd"
        gamma: float = Field(0.5, ge=0)
        """How much more the first token counts than one behind the last; 0: all alike."""
        eps: float = Field(1e-8, gt=0)
        """Smallest sum of gaps, nats: a response on which teacher and policy agree has weights 1 + gamma."""
        segmenter: Literal["word", "common_starts"] = "word"
        """Where two tokenizers' components are cut, as in the weights `opd`."""
        teacher_prompt: Literal["auto", "raw", "chat_template"] = "auto"
        """What the teacher sees before the response, as in the weights `swift`."""
        of: Annotated[Named, WEIGHTS] = Field(default_factory=lambda: WEIGHTS.config("ones"), validate_default=False)
        """The weights to multiply: `opd` for the method opd, `swift` for SWIFT; by default ones."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        return cls.NEEDS | WEIGHTS.get(config.of.name).needs(config.of)

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""w_t = 1 + gamma (1 - sum_(s<t) |A_s| / max(sum_s |A_s|, eps)), times the weights of `of`.

        A is the teacher's log-prob less the policy's, as in the weights `opd`.
        Stats: those of the other provider, with the mean of the product.

        >>> from stages.weighting.weights.base import Tokens
        >>> tokens = Tokens.of([[5, 6, 7]], None, ended=[False])  # N = 1, S = 3
        >>> batch = ResponseBatch(
        ...     ["a/chosen"], np.array([True]), tokens, {"reference": np.array([-1.0, -2.0, -1.0])},
        ...     teacher=tokens, teacher_logps=np.array([-0.5, -3.0, -1.5]))  # A = 0.5, -1, -0.5
        >>> IWOPDWeights.weights(IWOPDWeights.Config(), batch).values.tolist()  # 1 + 0.5 (1 - (0, 0.5, 1.5) / 2)
        [1.5, 1.375, 1.125]
        """
        gaps = np.abs(teacher_gaps(batch, config.segmenter).values)
        starts = batch.student.starts
        before = np.concatenate([np.zeros(0), *(np.cumsum(row) - row for row in split(gaps, starts))])
        total = np.repeat(np.maximum(segment_sum(gaps, starts), config.eps), np.diff(starts))
        inner = WEIGHTS.get(config.of.name).weights(config.of, batch)
        values = (1 + config.gamma * (1 - before / total)) * inner.values
        return Weights(values, inner.stats | Weights.of(values).stats)
