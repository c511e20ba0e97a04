"""Weights - TIS-DPO: how much a good model of a contrastive pair prefers a token to a bad one."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from stages.weighting.weights.base import ResponseBatch, WeightProvider, Weights, fraction
from stages.weighting.weights.rounding import round_decimals
from stages.weighting.weights.swift import ClampedExp


class ContrastiveSettings(ClampedExp):
    """Settings of weights that compare a good and a bad model."""

    mu_chosen: float = 1.0
    """Exponent for chosen responses; positive: what the good model prefers counts more."""
    mu_rejected: float = -1.0
    """Exponent for rejected responses; negative: what the bad model prefers counts more."""
    transform: Literal["exp_clamp", "rank", "threshold_scale"] = "exp_clamp"
    """exp_clamp: Eq. 19; the published code instead maps signed, rounded differences: rank (linear in the rank inside
    the response) or threshold_scale (clipped, then linear)."""
    eos: Literal["zero", "ranked"] = "zero"
    """rank and threshold_scale: the EOS counts 0 and takes no rank (the published code), or is weighted as the text's
    tokens are."""
    decimals: int = 2
    """Digits of the differences that the published code stores; for rank and threshold_scale."""
    threshold: float = 1.5
    """Clip of threshold_scale, nats on both sides."""
    low: float = 0.7
    """Smallest weight of rank and threshold_scale."""
    high: float = 1.3
    """Largest weight of rank and threshold_scale."""

    def identity(self) -> dict[str, Any]:
        """The settings; without `eos` for Eq. 19, which has no such choice."""
        fields = super().identity()
        if self.transform == "exp_clamp":
            del fields["eos"]
        return fields


class TISWeights(WeightProvider):
    """TIS-DPO's weights."""

    SOURCE = "Liu et al. 2024, Eq. 19 (arXiv:2410.04350)"
    NEEDS = frozenset({"positive", "negative"})

    class Config(ContrastiveSettings):
        """Vetted setting: Eq. 19 with k 1, mu 1 for chosen and -1 for rejected, L -0.5, U 1.5. What the two models are
        (two system prompts, two SFT models, DPO forward and reversed) is the flow's choice."""

        name: Literal["tis_dpo"] = "tis_dpo"

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        r"""w_t = k exp(mu clamp(log pi+(y_t) - log pi-(y_t), L, U)), mu > 0 for chosen, mu < 0 for rejected responses.

        Stats: at_L and at_U (tokens at a clamp).

        >>> from stages.weighting.weights.base import Tokens
        >>> logps = {"positive": np.array([-1.0, -1.0]), "negative": np.array([-2.0, -2.0])}
        >>> tokens = Tokens.of([[5], [6]], None, ended=[False, False])  # N = 2, S = 2
        >>> batch = ResponseBatch(["a/chosen", "a/rejected"], np.array([True, False]), tokens, logps)
        >>> TISWeights.weights(TISWeights.Config(), batch).values.round(4).tolist()  # e, 1 / e
        [2.7183, 0.3679]
        """
        return contrastive_weights(config, batch)


class ContrastiveWeights(WeightProvider):
    """TIS-DPO's weights under the name that SWIFT's ablation gives them."""

    VERSION = TISWeights.VERSION
    SOURCE = "SWIFT, Table 3 (contrastive): TIS-DPO Eq. 19"
    NEEDS = TISWeights.NEEDS

    class Config(ContrastiveSettings):
        """TIS-DPO's weights inside a SPIN or SWIFT loop: a row of SWIFT's ablation."""

        name: Literal["contrastive"] = "contrastive"

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        return contrastive_weights(config, batch)


def contrastive_weights(config: ContrastiveSettings, batch: ResponseBatch) -> Weights:
    """Weights [S] from the log-probs of the good model and the bad one."""
    gap = batch.column("positive") - batch.column("negative")
    is_chosen = batch.chosen[batch.student.rows()]
    if config.transform == "exp_clamp":
        values = config.omega(gap, np.where(is_chosen, config.mu_chosen, config.mu_rejected))
        return Weights.of(values, at_L=fraction(gap <= config.L), at_U=fraction(gap >= config.U))
    raw, starts = signed(gap, is_chosen, config.decimals), batch.student.starts
    counts = np.ones(len(raw), dtype=bool)
    if config.eos == "zero":
        counts = ~batch.student.is_eos()
        starts = starts - np.concatenate([[0], np.cumsum(batch.student.ended)])
    values = np.zeros(len(raw))
    if config.transform == "rank":
        values[counts] = by_rank(raw[counts], starts, config.low, config.high)
    else:
        values[counts] = by_threshold(raw[counts], -config.threshold, config.threshold, config.low, config.high)
    return Weights.of(values)


def signed(gap: np.ndarray, is_chosen: np.ndarray, decimals: int) -> np.ndarray:
    """The differences that the published code stores: negated for rejected responses, and rounded."""
    return round_decimals(np.where(is_chosen, gap, -gap), decimals)


def by_rank(raw: np.ndarray, starts: np.ndarray, low: float, high: float) -> np.ndarray:
    """Weights linear in the token's rank inside its response, ties in order of position; a single token gets 1."""
    lengths = np.diff(starts)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((raw, rows))
    rank = np.empty(len(raw), dtype=np.int64)
    rank[order] = np.arange(len(raw))
    last = np.repeat(lengths, lengths) - 1
    values = low + (rank - np.repeat(starts[:-1], lengths)) / np.maximum(last, 1) * (high - low)
    return np.where(last == 0, 1.0, values)


def by_threshold(raw: np.ndarray, lo: float, hi: float, out_lo: float, out_hi: float) -> np.ndarray:
    """The values clipped to [lo, hi], and that range mapped linearly to [out_lo, out_hi]."""
    return out_lo + (np.clip(raw, lo, hi) - lo) / (hi - lo) * (out_hi - out_lo)
