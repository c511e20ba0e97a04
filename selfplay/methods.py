"""Preference methods: a loss over log-probs of responses, by name. A method holds no model, so any trainer can use it."""

from stages.methods import METHODS
from stages.methods.base import (
    NEEDS,
    Method,
    MethodConfig,
    PairLoss,
    Pairs,
    Responses,
    hinge,
    preference_margin,
)

__all__ = [
    "METHODS",
    "NEEDS",
    "Method",
    "MethodConfig",
    "PairLoss",
    "Pairs",
    "Responses",
    "hinge",
    "preference_margin",
]
