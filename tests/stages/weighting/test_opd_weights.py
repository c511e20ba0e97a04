"""The advantages of on-policy distillation across tokenizers: each component keeps the teacher's sum of log-probs."""

from __future__ import annotations

import numpy as np
import pytest

from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.alignment import align
from stages.weighting.weights.base import ResponseBatch, Tokens, segment_sum

TEXT = "so it is  fine"
STUDENT = [(0, 2), (2, 5), (5, 7), (7, 9), (9, 10), (10, 14)]
TEACHER = [(0, 1), (1, 2), (2, 4), (4, 5), (5, 8), (8, 9), (9, 14)]


def batch_of(student_logps, teacher_logps, ended=(False, False), text=TEXT, student=STUDENT, teacher=TEACHER):
    """One response that the two models cut differently."""
    return ResponseBatch(
        ["a/chosen"],
        np.array([True]),
        Tokens.of([range(100, 100 + len(student_logps))], [student], [ended[0]]),
        {"reference": np.array(student_logps, dtype=float)},
        [text],
        Tokens.of([range(len(teacher_logps))], [teacher], [ended[1]]),
        np.array(teacher_logps, dtype=float),
    )


def advantages(batch, name="opd", **settings):
    provider = WEIGHTS.get(name)
    return provider.weights(provider.Config(**settings), batch)


def test_a_components_log_probs_add_up_to_the_teachers():
    random = np.random.default_rng(3)
    batch = batch_of(-random.random(6), -random.random(7))
    alignment = align([TEXT], batch.student, batch.teacher)
    shared_out = batch.column("reference") + advantages(batch).values
    count = len(alignment.starts)
    assert count > 2
    teacher = np.bincount(alignment.teacher, weights=batch.teacher_logps, minlength=count)
    assert np.bincount(alignment.student, weights=shared_out, minlength=count) == pytest.approx(teacher)
    assert shared_out.sum() == pytest.approx(batch.teacher_logps.sum())  # and so does the response's


def test_within_a_component_the_difference_is_shared_out_evenly():
    # "ab" in two student tokens and one teacher token, " c" in one of each
    batch = batch_of([-1, -3, -2], [-1, -0.5], text="ab c", student=[(0, 1), (1, 2), (2, 4)], teacher=[(0, 2), (2, 4)])
    assert advantages(batch).values.tolist() == [1.5, 1.5, 1.5]
    assert advantages(batch, coef=2.0).values.tolist() == [3.0] * 3


def test_what_the_teacher_has_no_number_for_has_no_advantage():
    spans = {"text": "ab c", "student": [(0, 1), (1, 2), (2, 4)], "teacher": [(0, 2), (2, 4)]}
    truncated = advantages(batch_of([-1, -3, -2], [-1, np.nan], **spans))
    assert truncated.values.tolist() == [1.5, 1.5, 0.0] and truncated.stats["empty"] == (1.0, 3.0)
    half = advantages(batch_of([-1], [-1, np.nan], text="ab", student=[(0, 2)], teacher=[(0, 1), (1, 2)]))
    assert half.values.tolist() == [0.0], "the sum of a component of which a token is missing is not known"
    unusable = advantages(batch_of([-1, -3, -2], [-1, -1], text="ab c", student=None, teacher=[(0, 2), (2, 4)]))
    assert unusable.values.tolist() == [0.0] * 3 and unusable.stats["unaligned"] == (1.0, 1.0)


def test_the_end_of_a_response_is_compared_with_the_teachers():
    spans = {"text": "ab", "student": [(0, 1), (1, 2)], "teacher": [(0, 2)]}
    both = advantages(batch_of([-1, -1, -3], [-1, -0.5], ended=(True, True), **spans))
    assert both.values.tolist() == [0.5, 0.5, 2.5]
    alone = advantages(batch_of([-1, -1, -3], [-1], ended=(True, False), **spans))
    assert alone.values.tolist() == [0.5, 0.5, 0.0]


def test_responses_of_one_batch_do_not_touch_each_other():
    cut = batch_of([-1, -3, -2], [-1, -0.5], text="ab c", student=[(0, 1), (1, 2), (2, 4)], teacher=[(0, 2), (2, 4)])
    student = Tokens.of(
        [[9], [100, 101, 102], [7, 8]], [[(0, 1)], [(0, 1), (1, 2), (2, 4)], [(0, 1), (1, 2)]], [False] * 3
    )
    teacher = Tokens.of([[9], [0, 1], [7, 8]], [[(0, 1)], [(0, 2), (2, 4)], [(0, 1), (1, 2)]], [False] * 3)
    batch = ResponseBatch(
        ["a", "b", "c"],
        np.ones(3, dtype=bool),
        student,
        {"reference": np.array([-1.0, *cut.logps["reference"], -1.0, -1.0])},
        ["x", "ab c", "yz"],
        teacher,
        np.array([-3.0, *cut.teacher_logps, -2.0, -0.5]),
    )
    assert advantages(batch).values.tolist() == [-2.0, *advantages(cut).values.tolist(), -1.0, 0.5]
    # |A| of each response by itself: 2; 1.5 thrice; 1 and 0.5
    result = advantages(batch, "iw_opd", gamma=1.0)
    assert result.values == pytest.approx([2.0, 2.0, 2 - 1 / 3, 2 - 2 / 3, 2.0, 2 - 1 / 1.5])


def test_iw_opd_multiplies_another_providers_weights():
    batch = batch_of([-1, -3, -2], [-1, -0.5], text="ab c", student=[(0, 1), (1, 2), (2, 4)], teacher=[(0, 2), (2, 4)])
    plain, product = advantages(batch, "iw_opd"), advantages(batch, "iw_opd", of={"name": "opd"})
    assert product.values == pytest.approx(plain.values * advantages(batch).values)
    assert advantages(batch, "iw_opd", of={"name": "swift"}).values == pytest.approx(
        plain.values * advantages(batch, "swift").values
    )
    assert segment_sum(plain.values, batch.student.starts) == pytest.approx([3 + 0.5 * (1 + 2 / 3 + 1 / 3)])
    provider = WEIGHTS.get("iw_opd")
    assert provider.needs(provider.Config(of={"name": "tidpo"})) == {"reference", "teacher", "importance"}
