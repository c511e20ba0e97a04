"""Gradients against central differences in float64, and behaviour at the ends of the number line.

Every method runs through the step of rows.py, from the policy's logits to the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from stages.methods import METHODS
from stages.methods.base import Pairs, Responses, hinge, logistic
from stages.models.numerics import kl_divergence, left_align, positions
from tests.stages.methods.rows import VARIANTS, gradients, make_row, step_loss, variant_id


def stops_a_gradient(name: str, settings: Mapping[str, Any]) -> bool:
    """TDPO2, and TI-DPO v3 which is built on it, stop one on purpose: differences see what autograd must not.

    The conformance cases cover them with that term held.
    """
    return (name, settings) == ("tdpo", {}) or settings.get("version") == "v3"


@pytest.mark.parametrize(
    ("name", "settings"), [case for case in VARIANTS if not stops_a_gradient(*case)], ids=variant_id
)
def test_gradient_equals_central_differences(name, settings):
    rows = [make_row(3, (3, 2, 2, 3)), make_row(4, (2, 3, 1, 2))]
    leaves = [leaf for row in rows for leaf in row.leaves()]
    found = gradients(step_loss(name, settings, rows, right=1), rows)
    random, step = torch.Generator().manual_seed(0), 1e-6
    for _ in range(4):  # along random directions: every entry takes part in each
        directions = [torch.randn(leaf.shape, generator=random, dtype=leaf.dtype) for leaf in leaves]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for leaf, direction in zip(leaves, directions, strict=True):
                    leaf += sign * step * direction
                values.append(step_loss(name, settings, rows, right=1).item())
                for leaf, direction in zip(leaves, directions, strict=True):
                    leaf -= sign * step * direction
        slope = sum(float((grad * direction).sum()) for grad, direction in zip(found, directions, strict=True))
        assert slope == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-7 * max(1.0, abs(values[0]))
        )


PAIRWISE = [
    "dpo",
    "spin",
    "spin_lengthnorm",
    "ipo",
    "simpo",
    "rdpo",
    "d2po",
    "cpo",
    "tpo",
    "orpo",
    "swift",
    "swift_released",
    "tis_dpo",
    "tgdpo",
    "kto_pair",
    "sppo",
]


def extreme(logp: float, reference: float, length: int = 3, dtype: torch.dtype = torch.float32) -> Responses:
    ones = torch.ones(1, length, dtype=dtype)
    return Responses((logp * ones).requires_grad_(), reference * ones, ones, torch.ones(1, length, dtype=torch.bool))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", PAIRWISE)
def test_five_hundred_nats_per_token_stay_finite_in_float32(name, sign):
    method = METHODS.get(name)
    low, high = extreme(-500.0, 0.0), extreme(0.0, -500.0)
    chosen, rejected = (low, high) if sign > 0 else (high, low)
    pairs = Pairs(
        chosen, rejected, torch.ones(1), torch.zeros(1), step_means={"mismatched_log_ratio": torch.tensor(500.0)}
    )
    result = method.pair_loss(method.Config(), pairs)
    loss = result.share(1, 3)
    grads = torch.autograd.grad(loss, [chosen.logps, rejected.logps])
    assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads)
    assert all(torch.isfinite(value).all() for value in result.metrics.values())


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_side_without_scored_tokens_gives_numbers_not_nan(name):
    method = METHODS.get(name)
    empty, full = extreme(-1.0, -1.5), extreme(-2.0, -1.0)
    empty = empty._replace(mask=torch.zeros(1, 3, dtype=torch.bool))
    pairs = Pairs(empty, full, torch.ones(1), torch.zeros(1), step_means={"mismatched_log_ratio": torch.tensor(0.0)})
    loss = method.pair_loss(method.Config(), pairs).share(1, 0)
    grads = torch.autograd.grad(loss, [empty.logps, full.logps])
    assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0].any()


def test_logistic_and_hinge_at_hand_picked_points():
    margin = torch.tensor([0.0, 1.0, -800.0, 800.0], dtype=torch.float64)
    # log(1 + e^-1) = 0.3132616875182228
    assert torch.allclose(
        logistic(margin),
        torch.tensor([0.6931471805599453, 0.3132616875182228, 800.0, 0.0], dtype=torch.float64),
        atol=1e-15,
    )
    assert hinge(margin).tolist() == [1.0, 0.0, 801.0, 0.0]


def test_dpo_by_hand():
    # LR_w = (-1 + 2) + (-0.5 + 0.5) = 1, LR_l = -3 + 2 = -1: h = 0.5 * (1 + 1) = 1, loss = log(1 + e^-1)
    mask = torch.tensor([[True, True], [True, False]])
    chosen = Responses(torch.tensor([[-1.0, -0.5]]), torch.tensor([[-2.0, -0.5]]), torch.ones(1, 2), mask[:1])
    rejected = Responses(torch.tensor([[-3.0, 0.0]]), torch.tensor([[-2.0, 0.0]]), torch.ones(1, 2), mask[1:])
    method = METHODS.get("dpo")
    result = method.pair_loss(method.Config(beta=0.5), Pairs(chosen, rejected, torch.ones(1), torch.zeros(1)))
    assert result.loss.item() == pytest.approx(0.3132616875182228)
    assert (
        result.metrics["rewards/margins"].item() == pytest.approx(1.0)
        and result.metrics["rewards/accuracies"].item() == 1.0
    )
    assert result.metrics["logps/chosen"].item() == pytest.approx(-1.5)


def test_orpo_by_hand():
    # p_w = e^{-log 2} = 1/2: odds 1; p_l = e^{-log 4} = 1/4: odds 1/3; ratio 3: l(log 3) = log(4/3); NLL = 2 log 2 over 2 tokens
    log2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
    ones, mask = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    sides = [Responses(factor * log2 * ones, None, ones, mask) for factor in (-1, -2)]
    method = METHODS.get("orpo")
    result = method.pair_loss(method.Config(lam=0.5), Pairs(*sides, torch.ones(1), torch.zeros(1)))
    assert result.share(1, 2).item() == pytest.approx(0.5 * 0.28768207245178085 + log2.item())


def test_the_full_vocabulary_kl_by_hand_and_in_chunks():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = 1/2 log 2 + 1/2 log(2/3) = 0.14384103622589045
    left, right = (
        torch.zeros(1, 1, 2, dtype=torch.float64),
        torch.log(torch.tensor([[[0.25, 0.75]]], dtype=torch.float64)),
    )
    assert kl_divergence(left, right, torch.ones(1, 1, dtype=torch.bool)).item() == pytest.approx(0.14384103622589045)
    left, right = (
        torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 7, 5, dtype=torch.float64),
    )
    mask = torch.rand(2, 7) > 0.3
    whole = kl_divergence(left, right, mask)
    assert torch.equal(whole[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    expected = torch.autograd.grad(whole.sum(), left)[0]
    cut = kl_divergence(left, right, mask, chunk=3)
    assert torch.allclose(cut, whole) and torch.allclose(torch.autograd.grad(cut.sum(), left)[0], expected)


def test_a_token_that_cannot_occur_adds_nothing_to_the_kl():
    left = torch.tensor([[[0.0, float("-inf"), 1.0]]], requires_grad=True)
    value = kl_divergence(left, torch.zeros(1, 1, 3), torch.ones(1, 1, dtype=torch.bool))
    grad = torch.autograd.grad(value.sum(), left)[0]
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()


def test_half_precision_logits_are_widened_before_the_kl():
    left, right = torch.randn(1, 2, 8).to(torch.bfloat16), torch.randn(1, 2, 8).to(torch.bfloat16)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert kl_divergence(left, right, mask).dtype == torch.float32
    assert torch.allclose(kl_divergence(left, right, mask), kl_divergence(left.float(), right.float(), mask))


def test_positions_count_scored_tokens_wherever_they_lie():
    mask = torch.tensor([[False, True, True, False, True]])
    assert positions(mask)[mask].tolist() == [0, 1, 2]
    values, kept = left_align(torch.tensor([[9.0, 1.0, 2.0, 9.0, 3.0]]), mask)
    assert values.tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0]] and kept.tolist() == [[True, True, True, False, False]]
