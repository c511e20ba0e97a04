"""The decision: how often it is wrong, how often it sees what is there, and every outcome by hand.

Strategy: simulated held-out comparisons with fixed seeds. Scores are like the quickstart's (a prompt's difficulty, an
answer's luck); the sample size is the documented one, `prompts_needed` at the measured spread of the differences.
"""

import math

import numpy as np
import pytest

from stages.evaluation.promotion import (
    KEEP_GOING,
    PROMOTE,
    ROLL_BACK,
    STOP,
    GateConfig,
    Measurement,
    decide,
    detectable_gain,
    paired_gain,
    prompts_needed,
    regressions,
    select_checkpoint,
)

SPREAD = 0.3
"""Standard deviation of the difference of two answers' scores to one prompt; 0.29 in the quickstart."""
PROMPTS = 324
RUNS = 200


def comparison(rng, gain=0.0, length_effect=0.0, longer=0.0, prompts=PROMPTS):
    """Scores and lengths of two policies that share prompts.

    longer: tokens that the second adds, which earn it `length_effect` per standard deviation.
    """
    difficulty = rng.normal(0.5, 0.2, prompts)
    tokens = rng.normal(100, 20, (2, prompts))
    tokens[1] += longer
    luck = rng.normal(0, SPREAD / math.sqrt(2), (2, prompts))
    change = tokens[1] - tokens[0]
    scores = [difficulty + luck[0], difficulty + luck[1] + gain + length_effect * np.tanh(change / change.std())]
    names = [f"p{i}" for i in range(prompts)]
    return [
        Measurement(dict(zip(names, s, strict=True)), dict(zip(names, t, strict=True)))
        for s, t in zip(scores, tokens, strict=True)
    ]


def promoted(gain, seed, config=None, **more) -> float:
    rng = np.random.default_rng(seed)
    config = config or GateConfig(patience=9)
    outcomes = [decide(config, *comparison(rng, gain, **more), seed=run).outcome for run in range(RUNS)]
    return outcomes.count(PROMOTE) / RUNS


def test_a_policy_against_itself_is_promoted_in_at_most_five_percent_of_runs():
    assert promoted(0.0, seed=1) <= 0.05


def test_five_points_are_seen_in_eighty_percent_of_runs_at_the_documented_number_of_prompts():
    assert prompts_needed(SPREAD, gain=0.05) == PROMPTS
    assert promoted(0.05, seed=2) >= 0.8


def test_longer_answers_that_score_higher_only_for_their_length_are_not_promoted():
    # The judge likes length: +0.10 per standard deviation of the length difference, and the candidate writes one more.
    plain = GateConfig(length_controlled=False, patience=9)
    assert promoted(0.0, seed=3, length_effect=0.1, longer=28.0) <= 0.05
    assert promoted(0.0, seed=3, length_effect=0.1, longer=28.0, config=plain) >= 0.8


def test_a_real_gain_is_seen_beside_an_effect_of_length():
    # Longer answers cost precision: the intercept is estimated away from the mean length difference.
    assert promoted(0.1, seed=4, length_effect=0.1, longer=14.0) >= 0.8


def test_the_interval_is_the_plain_bootstrap_where_lengths_are_alike():
    difference = np.random.default_rng(0).normal(0.1, 0.3, 200)
    assert paired_gain(difference, np.zeros(200)) == paired_gain(difference)
    interval = paired_gain(difference)
    assert interval.mean == pytest.approx(difference.mean())
    assert interval.stderr == pytest.approx(difference.std(ddof=1) / math.sqrt(200), rel=0.05)


def test_the_gain_at_equal_length_is_the_intercept():
    lengths = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    difference = 0.25 + 0.5 * np.tanh(lengths / lengths.std())
    assert paired_gain(difference, lengths).mean == pytest.approx(0.25)


def test_sample_sizes():
    # (1.959964 + 0.841621)^2 = 7.8489; times (0.3 / 0.05)^2 = 36 gives 282.6. With z_0.85 = 1.036433: 8.9783 and 323.2
    assert prompts_needed(0.3, power=0.8) == 283
    assert prompts_needed(0.3) == 324
    assert prompts_needed(0.5) == 898
    assert detectable_gain(0.3, 283) == pytest.approx(0.05, abs=1e-4)


def of(value, prompts=50, **benchmarks):
    wobble = np.random.default_rng(0).normal(0, 0.05, prompts)
    names = [f"p{i}" for i in range(prompts)]
    marks = {name: (mark, 0.01) for name, mark in benchmarks.items()}
    scores = [value + (wobble[i] if value else 0.0) for i in range(prompts)]
    return Measurement(dict(zip(names, scores, strict=True)), dict.fromkeys(names, 10.0), marks)


@pytest.mark.parametrize(
    ("candidate", "config", "before", "outcome"),
    [
        (0.2, {}, 0, PROMOTE),
        (0.2, {"min_gain": 0.3}, 0, KEEP_GOING),
        (-0.2, {}, 0, ROLL_BACK),
        (-0.2, {}, 1, STOP),
        (0.2, {}, 1, PROMOTE),
        (0.001, {"patience": 1}, 0, STOP),
        (0.2, {"min_prompts": 51}, 5, KEEP_GOING),
    ],
)
def test_every_outcome(candidate, config, before, outcome):
    decision = decide(GateConfig(**config), of(0.0), of(candidate), before)
    assert decision.outcome == outcome
    assert decision.reason


def test_a_benchmark_that_falls_too_far_rolls_back_whatever_the_gain():
    before, after = of(0.0, mmlu=0.50, arc=0.40), of(0.2, mmlu=0.44, arc=0.41)
    assert decide(GateConfig(max_benchmark_drop=0.02), before, after).outcome == ROLL_BACK
    assert decide(GateConfig(max_benchmark_drop=0.10), before, after).outcome == PROMOTE
    assert decide(GateConfig(), before, after).outcome == PROMOTE
    # 0.02 is within two standard errors of the difference: 2 * sqrt(2) * 0.01 = 0.028
    assert regressions({"mmlu": (0.50, 0.01)}, {"mmlu": (0.48, 0.01)}, 0.0) == []


def test_prompts_that_one_side_could_not_score_are_counted_and_left_out():
    before, after = of(0.0), of(0.2)
    scores = {name: value for name, value in after.scores.items() if name not in ("p0", "p1")}
    decision = decide(GateConfig(), before, after._replace(scores=scores))
    assert (decision.prompts, decision.unscored) == (48, 2)


def test_nothing_scored_decides_nothing():
    decision = decide(GateConfig(patience=1), of(0.0), of(0.2)._replace(scores={}))
    assert (decision.outcome, decision.gain, decision.unscored) == (KEEP_GOING, None, 50)


def test_the_best_of_several_checkpoints_is_selected_and_the_first_of_equals():
    chosen, gains = select_checkpoint([of(0.1), of(0.3), of(0.2)])
    assert (chosen, gains[0]) == (1, None)
    assert [round(gain.mean, 6) for gain in gains[1:]] == [0.2, 0.1]
    assert select_checkpoint([of(0.1), of(0.1)])[0] == 0
    assert select_checkpoint([of(0.3), of(0.1), of(0.2)])[0] == 0


def test_where_too_little_was_scored_the_end_of_the_training_goes_on():
    assert select_checkpoint([of(0.1), of(0.3)._replace(scores={}), of(0.2)])[0] == 2


def test_rows_of_a_report_become_what_is_compared():
    heldout = [
        {"prompt_id": "a", "num_tokens": 4, "score": 1.0},
        {"prompt_id": "a", "num_tokens": 8, "score": None},
        {"prompt_id": "b", "num_tokens": 2, "score": None},
    ]
    report = [
        {"suite": "heldout", "task": "heldout", "metric": "score", "value": 1.0, "stderr": 0.1},
        {"suite": "lm-eval", "task": "arc", "metric": "acc", "value": 0.4, "stderr": 0.02},
        {"suite": "lm-eval", "task": "lambada", "metric": "perplexity", "value": 20.0, "stderr": None},
    ]
    assert Measurement.from_rows(heldout, report) == Measurement(
        {"a": 1.0}, {"a": 6.0, "b": 2.0}, {"arc/acc": (0.4, 0.02)}
    )
