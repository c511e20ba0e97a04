"""Scorers: a prompt and its candidates -> points or comparisons, by name; and what preferences are made of them."""

from stages.methods.preferences import preference_matrix, win_rates
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Scorer, Scores
from stages.scoring.pairrm import PairRM

__all__ = ["SCORERS", "Candidates", "PairRM", "Scorer", "Scores", "preference_matrix", "win_rates"]
