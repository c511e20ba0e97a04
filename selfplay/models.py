"""Models as the stages read them: conversations -> token ids, and log-probs of responses under a frozen model."""

from stages.models.policy import load_causal_lm, score_responses
from stages.models.turns import Turns

__all__ = ["Turns", "load_causal_lm", "score_responses"]
