"""Sums and vetoes, by hand: what the parts say, what the whole must say."""

import math

import numpy as np
import pytest

from stages.scoring import SCORERS
from stages.scoring.base import Scores
from stages.scoring.combination import Part, combine

NAN = math.nan


def part(weight=1.0, veto_below=None, name="length"):
    return Part.model_validate({"scorer": {"name": name}, "weight": weight, "veto_below": veto_below})


def points(*values, reasons=None):
    return Scores(np.array(values, dtype=float), None, reasons or [""] * len(values))


def test_pointwise_scores_are_added_with_their_weights():
    found = combine([part(2), part(-1)], [points(1, 2), points(10, 0)])
    assert found.scores.tolist() == [-8, 4] and found.preference_logits is None and found.reasons == ["", ""]


def test_what_a_part_could_not_score_the_whole_cannot_and_says_which():
    found = combine([part(), part()], [points(1, 2), points(NAN, 0, reasons=["judge timed out", ""])])
    assert math.isnan(found.scores[0]) and found.scores[1] == 2 and found.reasons == ["length: judge timed out", ""]


def test_a_veto_leaves_a_candidate_unscored():
    found = combine([part(), part(0, veto_below=-3, name="checks")], [points(9, 1, 5), points(-4, -3, NAN)])
    assert (
        math.isnan(found.scores[0])
        and found.scores[1:].tolist() == [1, 5]
        and found.reasons == ["vetoed by checks", "", ""]
    )


def test_beside_a_pair_scorer_a_score_counts_as_differences():
    logits = np.array([[0.0, 2.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = combine([part(), part(0.5, veto_below=0)], [Scores(None, logits, [""] * 3), points(4, 2, -1)])
    assert found.preference_logits[:2, :2].tolist() == [[0, 3], [-2, 0]] and found.scores is None
    assert np.isnan(found.preference_logits[2, :2]).all() and np.isnan(found.preference_logits[:2, 2]).all()
    assert found.preference_logits[2, 2] == 0 and found.reasons[2] == "vetoed by length"


def test_the_scorer_asks_its_parts(scoring):
    parts = [
        {"scorer": {"name": "length", "target_tokens": 2}},
        {"scorer": {"name": "checks"}, "weight": 0, "veto_below": 1},
    ]
    checks = '[{"name": "contains", "value": "fox"}]'
    scorer = scoring.scorer({"name": "combination", "parts": parts})
    (scores,) = scorer.score([scoring.candidates("p", ["a fox", "the lazy fox", "no dog"], checks=checks)])
    assert scores.scores[:2].tolist() == [0, -1] and math.isnan(scores.scores[2])


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="all weights are 0"):
        SCORERS.config({"name": "combination", "parts": [{"scorer": {"name": "length"}, "weight": 0}]})


def test_its_parts_are_part_of_the_key():
    def key(**part):
        return SCORERS.config({"name": "combination", "parts": [{"scorer": {"name": "length"}} | part]}).identity()

    assert key() != key(weight=2) and key()["parts"][0]["scorer"] == {"name": "length", "target_tokens": 16}
