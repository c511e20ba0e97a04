"""Per-token weights: log-probs of responses under some models -> one weight per token, by name."""

from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import NEEDS, ResponseBatch, Tokens, WeightConfig, WeightProvider, Weights

__all__ = ["NEEDS", "WEIGHTS", "ResponseBatch", "Tokens", "WeightConfig", "WeightProvider", "Weights"]
