"""Arena-Hard: verdicts by hand, planted strengths and styles recovered, two games, failures."""

import json
import math

import numpy as np
import pytest
import yaml

from stages.evaluation.arena_hard import Game, interval, play, report, scores, style_difference, style_of, verdict
from stages.evaluation.judging import JudgeReply
from stages.evaluation.logistic import fit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My final verdict is tie: [[A=B]]", (0.5, 1)),
        ("[[A>>B]]", (1.0, 3)),
        ("first [[A>B]], no: [[B>>A]]", (0.0, 3)),
        ("[[B>A]]", (0.0, 1)),
        ("[[A<<B]]", (0.0, 3)),
        ("[[AB]]", None),
        ("A is better", None),
    ],
)
def test_verdicts(text, expected):
    assert verdict(text) == expected


def test_style_counts_marks_outside_code():
    text = "# Title\n\n- one\n- two\n1. three\n\n**bold** and __too__\n```\n# no header\n- no list\n```\n"
    style = style_of(text)
    assert (style["headers"], style["lists"], style["bold"]) == (1, 3, 2)
    assert style["length"] == len(text.split())


def test_style_difference_by_hand():
    model = {"length": 30.0, "headers": 2.0, "lists": 0.0, "bold": 0.0}
    baseline = {"length": 10.0, "headers": 0.0, "lists": 0.0, "bold": 0.0}
    # (30 - 10) / 40; density 2 / 31, then (2/31) / (2/31 + 1) = 2 / 33
    assert style_difference(model, baseline) == pytest.approx((0.5, 2 / 33, 0.0, 0.0))


def planted(strengths, styles, prompts=3000, seed=0):
    rng = np.random.default_rng(seed)
    games = []
    for m, strength in enumerate(strengths):
        shift = 0.3 * m  # stronger models also write with more style: the plain score confounds the two
        style = rng.normal(shift, 1, (prompts, 4))
        p = 1 / (1 + np.exp(-(strength + style @ np.array(styles))))
        wins = rng.random(prompts) < p
        games += [Game(f"m{m}", f"p{i}", float(wins[i]), 1, tuple(style[i])) for i in range(prompts)]
    return games


def test_planted_strengths_and_styles_are_recovered():
    strengths, styles = (-1.0, 0.0, 0.8), (0.7, 0.3, -0.2, 0.0)
    games = planted(strengths, styles)
    controlled, coefficients = scores(games)
    for m, strength in enumerate(strengths):
        assert controlled[f"m{m}"] == pytest.approx(100 / (1 + math.exp(-strength)), abs=2.5)
    spread = np.array([game.style for game in games]).std(axis=0)
    assert [coefficients[name] for name in ("length", "headers", "lists", "bold")] == pytest.approx(
        list(np.array(styles) * spread), abs=0.07
    )
    plain, nothing = scores(games, style_control=False)
    assert plain["m2"] > controlled["m2"] + 3
    assert nothing == {}


def test_the_fit_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 3))
    y = (rng.random(500) < 1 / (1 + np.exp(-x @ np.array([1.0, -0.5, 0.2])))).astype(int)
    w = rng.integers(1, 4, 500).astype(float)
    coefficients = (
        LogisticRegression(C=1e6, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, y, sample_weight=w).coef_[0]
    )
    assert fit(x, y, w) == pytest.approx(coefficients, abs=1e-5)


def test_a_model_that_wins_everything_has_a_finite_score():
    games = [Game("m", f"p{i}", 1.0, 3, (0.0, 0.0, 0.0, 0.0)) for i in range(10)]
    assert scores(games)[0]["m"] == pytest.approx(100, abs=0.1)
    assert math.isfinite(scores(games)[0]["m"])


def test_a_strong_verdict_counts_three_times():
    zero = (0.0,) * 4
    games = [Game("m", "p0", 1.0, 3, zero), Game("m", "p1", 0.0, 1, zero), Game("m", "p2", 0.5, 1, zero)]
    # (3 * 1 + 0 + 0.5) / 5
    assert scores(games, style_control=False)[0]["m"] == pytest.approx(70.0)


class Judge:
    name = "judge"

    def ask(self, conversations, **options):
        return [self.reply(messages, options) for messages in conversations]

    def reply(self, messages, options):
        assert messages[0]["role"] == "system"
        body = messages[1]["content"]
        if "broken" in body:
            return None
        return JudgeReply("[[A>>B]]" if body.index("mine") < body.index("theirs") else "[[B>A]]")


def test_two_games_a_prompt_with_the_official_template_and_failures_counted(shared):
    config = yaml.safe_load((shared / "data" / "arena_hard" / "v0.1_judge_config.yaml").read_text())
    with open(shared / "data" / "arena_hard" / "v0.1_question.jsonl") as file:
        questions = [json.loads(line) for line, _ in zip(file, range(3), strict=False)]
    rows = [
        {"prompt_id": question["uid"], "prompt": question["prompt"], "answer": "mine", "baseline": "theirs"}
        for question in questions
    ]
    rows.append({"prompt_id": "x", "prompt": "broken", "answer": "mine", "baseline": "theirs"})
    games = play(Judge(), config["system_prompt"], config["prompt_template"][0], "m", rows)
    assert len(games) == 8
    # The baseline is A first: [[B>A]] is a win of weight 1; then the model is A: [[A>>B]] is a win of weight 3.
    assert [(game.outcome, game.weight) for game in games[:2]] == [(1.0, 1), (1.0, 3)]
    rows_by_metric = {(row["task"], row["metric"]): row for row in report(games, "judge")}
    assert rows_by_metric["arena_hard", "failed_judgments"]["value"] == 2
    assert rows_by_metric["arena_hard/m", "score"]["value"] == 100
    assert rows_by_metric["arena_hard/m", "score"]["n"] == 6


def test_a_judge_that_is_away_gives_only_the_count():
    games = [Game("m", "p", None, 1, (0.0,) * 4)] * 4
    assert [(row["metric"], row["value"]) for row in report(games, "judge")] == [("failed_judgments", 4.0)]


def test_intervals_keep_a_prompts_games_together():
    games = planted((0.0,), (0.0, 0.0, 0.0, 0.0), prompts=200)
    low, high = interval(games, "m0", style_control=False)
    assert low < scores(games, style_control=False)[0]["m0"] < high
    assert 8 < high - low < 20  # 4 * 50 / sqrt(200) = 14


def test_the_interval_of_one_prompt_is_not_known():
    games = [Game("policy", "p", 1.0, 1, (0.0,) * 4), Game("policy", "p", 0.0, 1, (0.0,) * 4)]
    rows = {row["metric"]: row for row in report(games, "judge")}
    assert rows["score"]["value"] == 50
    assert [rows["score"][name] for name in ("stderr", "low", "high")] == [None] * 3
