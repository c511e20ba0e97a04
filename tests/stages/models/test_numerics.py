"""The shared maths, against plain torch and against numbers worked out by hand.

Strategy: small tensors of round numbers; every function also sees what lies outside the mask (infinities, NaN) and the extremes of float32.
"""

import math

import pytest
import torch
from torch.nn import functional

from data_contracts.errors import ContractError
from stages.models.numerics import (
    check_shapes,
    kl_divergence,
    left_align,
    log_softmax,
    masked_mean,
    masked_sum,
    positions,
    token_logps,
)  # fmt: skip

YES = torch.ones(1, 1, dtype=torch.bool)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_token_logps_of_equal_logits_are_minus_log_v():
    logps = token_logps(torch.full((1, 1, 4), 7.0), torch.tensor([[2]]), YES)
    assert logps.item() == pytest.approx(-math.log(4))


def test_token_logps_by_hand():
    # softmax([log 1, log 2, log 5]) = [1/8, 2/8, 5/8]
    logits = torch.tensor([[[1.0, 2.0, 5.0]]]).log()
    for token, share in enumerate((1, 2, 5)):
        assert token_logps(logits, torch.tensor([[token]]), YES).item() == pytest.approx(math.log(share / 8))


def test_token_logps_are_those_of_plain_torch_with_the_same_gradient():
    logits, ids = (
        normal(3, 5, 11).requires_grad_(),
        torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1)),
    )
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 1])[:, None]
    plain = functional.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0] * mask
    ours = token_logps(logits, ids, mask)
    assert torch.allclose(ours, plain, atol=1e-6) and (ours[~mask] == 0).all()
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (ours, plain)]
    assert torch.allclose(*gradients, atol=1e-6) and (gradients[0][~mask] == 0).all()


def test_token_logps_are_float32_whatever_the_model_computes_in():
    logits = normal(2, 3, 50).to(torch.bfloat16)
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    logps = token_logps(logits, ids, mask)
    assert logps.dtype == torch.float32
    assert torch.equal(logps, token_logps(logits.float(), ids, mask))
    assert token_logps(logits.double(), ids, mask).dtype == torch.float64


def test_token_logps_do_not_overflow():
    logits = torch.tensor([[[1e4, -1e4, 0.0], [3e38, 3e38, 0.0]]])
    logps = token_logps(logits, torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool))
    assert logps[0, 0].item() == -2e4 and math.isfinite(logps[0, 1].item())


def test_a_token_that_cannot_occur_has_log_prob_minus_infinity_and_padding_has_none():
    logits = torch.tensor([[[0.0, -math.inf], [math.nan, math.inf]]])
    logps = token_logps(logits, torch.tensor([[1, 0]]), torch.tensor([[True, False]]))
    assert logps.tolist() == [[-math.inf, 0.0]]


def test_masked_sums_ignore_what_lies_outside_the_mask():
    values = torch.tensor([[1.0, 2.0, math.inf], [math.nan, math.nan, math.nan]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_sum(values, mask).tolist() == [3.0, 0.0]
    assert masked_mean(values, mask).tolist() == [1.5, 0.0]


def test_the_gradient_of_a_masked_sum_is_one_inside_and_zero_outside():
    values = torch.tensor([[1.0, math.inf]], requires_grad=True)
    masked_sum(values, torch.tensor([[True, False]])).sum().backward()
    assert values.grad.tolist() == [[1.0, 0.0]]


def test_shapes_that_differ_are_named():
    with pytest.raises(ContractError, match=r"loss: shapes must agree, got left \(2, 3\), right \(2, 4\)"):
        check_shapes("loss", left=torch.zeros(2, 3), right=torch.zeros(2, 4))
    with pytest.raises(ContractError, match=r"token_logps: shapes must agree, got ids \(1, 2\), mask \(1, 1\)"):
        token_logps(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), YES)


MASK = torch.tensor([[False, True, True, False], [True, False, False, True]])


def test_positions_count_scored_tokens_wherever_the_padding_lies():
    assert positions(MASK)[MASK].tolist() == [0, 1, 0, 1]


def test_left_align_moves_scored_values_to_the_front_in_order():
    values = torch.tensor([[9.0, 1.0, 2.0, 9.0], [3.0, 9.0, 9.0, 4.0]])
    aligned, mask = left_align(values, MASK)
    assert aligned.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0]] and mask.tolist() == [[True, True, False, False]] * 2
    wide, _ = left_align(torch.stack([values, -values], -1), MASK)
    assert torch.equal(wide, torch.stack([aligned, -aligned], -1))


def test_log_softmax_is_float32_or_better():
    assert log_softmax(torch.zeros(4, dtype=torch.float16)).dtype == torch.float32
    assert log_softmax(torch.zeros(4, dtype=torch.float64)).dtype == torch.float64


def test_kl_by_hand():
    # KL([1/2, 1/2] || [1/4, 3/4]) = log 2 / 2 + log(2/3) / 2
    left, right = torch.tensor([[[1.0, 1.0]]]).log(), torch.tensor([[[1.0, 3.0]]]).log()
    assert kl_divergence(left, right, YES).item() == pytest.approx((math.log(2) + math.log(2 / 3)) / 2, rel=1e-6)
    assert kl_divergence(left, left, YES).item() == 0


def test_kl_is_that_of_plain_torch_in_any_chunks_with_the_same_gradient():
    left, right, mask = normal(2, 5, 7).requires_grad_(), normal(2, 5, 7, seed=1), MASK[:, [0, 1, 2, 3, 3]]
    plain = (
        functional.kl_div(right.log_softmax(-1), left.log_softmax(-1), log_target=True, reduction="none").sum(-1) * mask
    )
    for chunk in (1, 2, 256):
        ours = kl_divergence(left, right, mask, chunk)
        assert torch.allclose(ours, plain, atol=1e-6)
        gradients = [torch.autograd.grad(value.sum(), left, retain_graph=True)[0] for value in (ours, plain)]
        assert torch.allclose(*gradients, atol=1e-6)


def test_kl_of_a_token_that_cannot_occur_is_finite_with_its_gradient():
    left = torch.tensor([[[0.0, -math.inf]]], requires_grad=True)
    value = kl_divergence(left, torch.zeros(1, 1, 2), YES)
    assert value.item() == pytest.approx(math.log(2))
    value.sum().backward()
    assert torch.isfinite(left.grad[0, 0, 0])


def test_kl_of_two_vocabularies_is_refused():
    with pytest.raises(ContractError, match="needs two models of one vocabulary"):
        kl_divergence(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3), YES)
