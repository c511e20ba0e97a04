"""Weights - the controls: ones, random, and another provider's weights reversed or blurred."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from stages.registry import Named
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, WeightConfig, WeightProvider, Weights, fraction


class Ones(WeightProvider):
    """Weights of one: every method's own loss."""

    SOURCE = "none"

    class Config(WeightConfig):
        """No setting."""

        name: Literal["ones"] = "ones"

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        return Weights.of(np.ones(len(batch.student.ids)))


class EqualWeights(WeightProvider):
    """One weight for all tokens."""

    SOURCE = "SWIFT, Table 3 (equal)"

    class Config(WeightConfig):
        """One weight for all tokens; with another value than 1 it scales beta."""

        name: Literal["equal"] = "equal"
        value: float = 1.0
        """The weight."""

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        return Weights.of(np.full(len(batch.student.ids), config.value))


class RandomWeights(WeightProvider):
    """Uniform random weights."""

    SOURCE = "SWIFT, Table 3 (random); TI-DPO's ablation with low 0, high 1"

    class Config(WeightConfig):
        """Vetted setting: uniform in [-0.5, 1.5], as SWIFT's ablation."""

        name: Literal["random"] = "random"
        low: float = -0.5
        """Smallest weight."""
        high: float = 1.5
        """Largest weight."""
        seed: int = Field(0, ge=0)
        """Same seed and row, same weights, however rows are batched."""

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.low > self.high:
                raise ValueError(f"`low` ({self.low}) must not exceed `high` ({self.high})")
            return self

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        """Stats: nonpositive (tokens with a weight <= 0)."""
        values = uniform(batch, config.seed, config.low, config.high)
        return Weights.of(values, nonpositive=fraction(values <= 0))


class _OfAnother(WeightConfig):
    """Settings that hold the settings of another provider."""

    of: Annotated[Named, WEIGHTS] = Field(default_factory=lambda: WEIGHTS.config("swift"), validate_default=False)
    """The weights to change, with their settings."""


class ReverseWeights(WeightProvider):
    """1 - w, for the weights w of another provider."""

    SOURCE = "SWIFT, Table 3 (reverse)"
    NEEDS = frozenset({"reference", "teacher"})

    class Config(_OfAnother):
        """Vetted setting: 1 - omega of SWIFT's weights."""

        name: Literal["reverse"] = "reverse"

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        return WEIGHTS.get(config.of.name).needs(config.of)

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        """Stats: those of the other provider, with nonpositive (tokens with a weight <= 0)."""
        inner = WEIGHTS.get(config.of.name).weights(config.of, batch)
        values = 1 - inner.values
        return Weights(values, inner.stats | Weights.of(values, nonpositive=fraction(values <= 0)).stats)


class NoiseWeights(WeightProvider):
    """Another provider's weights with uniform noise added."""

    SOURCE = "SWIFT, noise on the weights (+-0.2)"
    NEEDS = frozenset({"reference", "teacher"})

    class Config(_OfAnother):
        """Vetted setting: uniform noise of +-0.2 on SWIFT's weights."""

        name: Literal["noise"] = "noise"
        amplitude: float = Field(0.2, ge=0)
        """Largest change of a weight."""
        seed: int = Field(0, ge=0)
        """Same seed and row, same noise, however rows are batched."""

    @classmethod
    def needs(cls, config: Config) -> frozenset[str]:
        return WEIGHTS.get(config.of.name).needs(config.of)

    @staticmethod
    def weights(config: Config, batch: ResponseBatch) -> Weights:
        """Stats: those of the other provider."""
        inner = WEIGHTS.get(config.of.name).weights(config.of, batch)
        values = inner.values + uniform(batch, config.seed, -config.amplitude, config.amplitude)
        return Weights(values, inner.stats | Weights.of(values).stats)


def uniform(batch: ResponseBatch, seed: int, low: float, high: float) -> np.ndarray:
    """A number in [low, high) per token [S] that depends on seed and row alone."""
    parts = [np.zeros(0)]
    for key, length in zip(batch.keys, np.diff(batch.student.starts), strict=True):
        stream = int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16], "big")
        parts.append(np.random.Generator(np.random.PCG64(stream)).uniform(low, high, int(length)))
    return np.concatenate(parts)
