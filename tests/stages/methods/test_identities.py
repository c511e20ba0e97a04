"""What must hold whatever the numbers are: constants at policy = reference, weights of one, padding, order and micro-batches.

No expected value here comes from the code itself: each is a line of the paper's algebra.
"""

from __future__ import annotations

import math

import pytest
import torch

from stages.methods import METHODS
from stages.methods.importance import min_max
from stages.models.numerics import js_divergence, masked_sum
from tests.stages.methods.rows import VARIANTS, gradients, make_row, stack, stack_pairs, step_loss, variant_id

LOG2 = math.log(2)
LENGTHS = [(4, 2, 3, 3), (1, 5, 2, 1), (3, 3, 1, 6), (2, 1, 4, 2)]


def rows(same: bool = False, lengths: list[tuple[int, ...]] = LENGTHS):
    return [make_row(seed, length, same) for seed, length in enumerate(lengths)]


AT_REFERENCE = [
    ("dpo", {}, LOG2),
    ("dpo", {"label_smoothing": 0.2}, LOG2),
    ("dpo", {"label_smoothing": 0.2, "robust": True}, LOG2),
    ("spin", {}, LOG2),
    ("spin", {"loss": "hinge"}, 1.0),
    ("spin", {"loss": "exponential"}, 1.0),
    ("spin_lengthnorm", {}, LOG2),
    *(
        (("swift"), {"weight_mode": mode, "kl_mode": kl}, LOG2)
        for mode in ("multiply", "divide")
        for kl in ("none", "paper", "tdpo", "supp")
    ),
    ("swift", {"loss": "hinge"}, 1.0),
    ("swift_released", {}, LOG2),
    ("tis_dpo", {}, LOG2),
    ("tis_dpo", {"use_eta": True}, LOG2),
    ("tdpo", {"version": 1}, LOG2),
    ("tdpo", {"version": 2}, LOG2),
    ("tgdpo", {}, LOG2),
    ("d2po", {}, LOG2),
    ("ipo", {"tau": 0.2}, 1 / (2 * 0.2) ** 2),
    ("ipo", {"tau": 0.2, "unit_scale": True}, 1.0),
    ("kto", {}, 0.5),
    ("kto_pair", {}, 1.0),
    ("tidpo", {"gamma": 0.1, "margin": 0.5}, LOG2 + 0.1 * 0.5),
    ("tidpo", {"gamma": 0.0}, LOG2),
    ("tidpo", {"version": "v3", "gamma": 0.1, "margin": 0.5}, LOG2 + 0.1 * 0.5),
    ("inpo", {}, (1 / (2 * 0.0075)) ** 2),
    ("inpo", {"eta": 0.5, "rho": 0.8}, 1.0),
    ("mnpo", {"eta": 0.25}, 4.0),
]


@pytest.mark.parametrize(("name", "settings", "constant"), AT_REFERENCE, ids=variant_id)
def test_a_policy_equal_to_its_reference_has_the_loss_of_the_formula(name, settings, constant):
    assert step_loss(name, settings, rows(same=True)).item() == pytest.approx(constant, abs=1e-12)


def test_sppo_at_the_reference_is_its_squared_targets():
    data = rows(same=True)
    eta = 1000.0
    expected = sum(
        eta**2 * ((row.numbers["win_rate_chosen"] - 0.5) ** 2 + (row.numbers["win_rate_rejected"] - 0.5) ** 2)
        for row in data
    ) / len(data)
    assert step_loss("sppo", {}, data).item() == pytest.approx(expected)
    assert step_loss("sppo", {"target": "hard"}, data).item() == pytest.approx(5e5)


def test_rebel_at_the_reference_is_the_squared_reward_difference():
    data = rows(same=True)
    expected = sum((2.0 * (row.numbers["score_chosen"] - row.numbers["score_rejected"])) ** 2 for row in data) / len(
        data
    )
    assert step_loss("rebel", {"eta": 2.0}, data).item() == pytest.approx(expected)


def test_rdpo_at_the_reference_is_log_two_for_equal_lengths_only():
    assert step_loss("rdpo", {}, rows(same=True, lengths=[(3, 3, 3, 3)])).item() == pytest.approx(LOG2)
    # alpha (T_w - T_l) = 0.05 * 2
    assert step_loss("rdpo", {}, rows(same=True, lengths=[(4, 2, 3, 3)])).item() == pytest.approx(
        math.log(1 + math.exp(-0.1))
    )


def test_grpo_on_policy_is_minus_the_mean_advantage():
    data = rows(same=True)
    expected = -sum(row.numbers["advantage"] for row in data) / len(data)
    assert step_loss("grpo", {}, data).item() == pytest.approx(expected)


PARENTS = [
    ("swift", {}, "spin", {}),
    ("swift", {"weight_mode": "divide"}, "spin", {}),
    ("swift", {"weight_mode": "divide", "kl_mode": "tdpo"}, "tdpo", {"version": 1}),
    ("swift", {"kl_mode": "paper"}, "tis_dpo", {"use_eta": True}),
    ("swift_released", {}, "dpo", {}),
    ("spin", {}, "dpo", {}),
    ("tis_dpo", {}, "dpo", {}),
    ("tgdpo", {}, "dpo", {}),
    ("d2po", {"gamma": 1.0}, "dpo", {}),
    ("rdpo", {"alpha": 0.0}, "dpo", {}),
    ("tdpo", {"alpha": 0.0}, "dpo", {}),
    ("tidpo", {"gamma": 0.0, "importance": "given"}, "dpo", {}),
    ("dpo", {"label_smoothing": 0.0, "robust": True}, "dpo", {}),
    ("cpo", {}, "tpo", {}),
    ("mnpo", {}, "inpo", {}),
    ("inpo", {"eta": 0.05, "rho": 1.0}, "ipo", {"tau": 0.05}),
    ("tidpo", {"version": "v3", "gamma": 0.0, "importance": "given"}, "tdpo", {}),
]


@pytest.mark.parametrize(("name", "settings", "parent", "parent_settings"), PARENTS, ids=variant_id)
def test_weights_of_one_give_the_parent_loss(name, settings, parent, parent_settings):
    data = rows()
    for row in data:
        row.chosen, row.rejected = row.chosen.with_ones(), row.rejected.with_ones()
        row.gold = row.chosen  # tpo without a gold answer is cpo
    mine, theirs = step_loss(name, settings, data), step_loss(parent, parent_settings, data)
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-13)
    assert all(
        torch.allclose(a, b, atol=1e-13) for a, b in zip(gradients(mine, data), gradients(theirs, data), strict=True)
    )


def test_opd_on_policy_has_minus_the_mean_advantage_as_loss_and_gradient():
    data = rows(same=True)
    method, config = METHODS.get("opd"), METHODS.get("opd").Config()
    pairs = stack_pairs(data, method, config)
    logps = pairs.chosen.logps.detach().requires_grad_()
    tokens = pairs.chosen.mask.sum()
    pairs = pairs._replace(chosen=pairs.chosen._replace(logps=logps))
    loss = method.pair_loss(config, pairs).share(len(data), float(tokens))
    (gradient,) = torch.autograd.grad(loss, logps)
    advantages = torch.where(pairs.chosen.mask, pairs.chosen.weights, 0.0)
    assert loss.item() == pytest.approx(-advantages.sum().item() / tokens.item())
    assert torch.allclose(gradient, -advantages / tokens)
    # The teacher is the policy: every advantage is 0.
    silent = pairs._replace(chosen=pairs.chosen._replace(weights=torch.zeros_like(logps)))
    assert not torch.autograd.grad(method.pair_loss(config, silent).share(1, 1), logps)[0].any()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_jensen_shannon_divergence_is_0_at_equal_logits_symmetric_at_a_half_and_never_above_log_two(beta):
    random = torch.Generator().manual_seed(0)
    left, right = (3 * torch.randn(2, 3, 7, generator=random, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    divergence = js_divergence(left, right, mask, beta, chunk=2)
    assert (divergence[mask] > 0).all() and (divergence <= LOG2).all() and not divergence[~mask].any()
    assert torch.allclose(divergence, js_divergence(right, left, mask, 1 - beta), atol=1e-14)
    assert js_divergence(left, left + 1.0, mask, beta).abs().max() < 1e-14
    apart = torch.tensor([[[0.0, -math.inf, -math.inf]]], dtype=torch.float64).requires_grad_()
    value = js_divergence(apart, apart.detach().flip(-1), torch.tensor([[True]]), 0.5)
    assert value.item() == pytest.approx(LOG2)  # no token that both can produce
    assert torch.isfinite(torch.autograd.grad(value.sum(), apart)[0]).all()


def test_tis_dpo_with_eta_and_weights_of_one_is_dpo_less_the_kl_difference():
    data = rows()
    for row in data:
        row.chosen, row.rejected = row.chosen.with_ones(), row.rejected.with_ones()
    method = METHODS.get("tis_dpo")
    config = method.Config(use_eta=True)
    pairs = stack_pairs(data, method, config)
    h = 0.1 * (
        masked_sum(pairs.chosen.log_ratio(), pairs.chosen.mask)
        - masked_sum(pairs.rejected.log_ratio(), pairs.rejected.mask)
    )
    v = 0.1 * (masked_sum(pairs.chosen.kl, pairs.chosen.mask) - masked_sum(pairs.rejected.kl, pairs.rejected.mask))
    assert torch.allclose(method.pair_loss(config, pairs).loss, torch.log1p(torch.exp(-(h - v))))


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=variant_id)
def test_padding_order_and_micro_batches_change_neither_loss_nor_gradient(name, settings):
    data = rows()
    whole = step_loss(name, settings, data)
    expected = gradients(whole, data)
    ways = [
        {"cuts": (1, 2, 3)},
        {"cuts": (3,)},
        {"right": 4, "fill": -3.0},
        {"left": 3, "fill": 2.5},
        {"left": 2, "right": 1, "fill": -700.0, "cuts": (2,)},
    ]
    for way in ways:
        loss = step_loss(name, settings, data, **way)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12), way
        assert all(
            torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(gradients(loss, data), expected, strict=True)
        ), way
    backwards = step_loss(name, settings, data[::-1], cuts=(1,))
    assert backwards.item() == pytest.approx(whole.item(), rel=1e-12)
    assert all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(gradients(backwards, data), expected, strict=True)
    )


@pytest.mark.parametrize(
    "name",
    [
        "dpo",
        "spin",
        "swift",
        "tis_dpo",
        "tgdpo",
        "d2po",
        "ipo",
        "simpo",
        "cpo",
        "orpo",
        "tdpo",
        "tidpo",
        "spin_lengthnorm",
        "inpo",
        "mnpo",
    ],
)
def test_swapping_chosen_and_rejected_flips_the_margin(name):
    method = METHODS.get(name)
    config = method.Config()
    pairs = stack_pairs(rows(), method, config)
    metrics, swapped = (
        method.pair_loss(config, each).metrics
        for each in (pairs, pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen))
    )
    assert torch.allclose(metrics["rewards/margins"], -swapped["rewards/margins"])
    assert torch.allclose(metrics["logps/chosen"], swapped["logps/rejected"])


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=variant_id)
def test_a_pair_of_equal_sides_has_no_gradient_exactly_where_the_method_says_so(name, settings):
    method = METHODS.get(name)
    config = method.Config(**settings)
    if "rejected" not in method.sides(config):
        assert not method.drops_identical(config)
        return
    data = [make_row(0)]
    data[0].rejected = data[0].chosen
    total = sum(float(grad.abs().sum()) for grad in gradients(step_loss(name, settings, data), data))
    if method.drops_identical(config):
        assert total < 1e-12


def test_a_weight_of_zero_removes_its_token_in_both_weight_modes():
    data = rows()
    for row in data:
        row.chosen.weights[0] = 0.0
    for mode in ("multiply", "divide"):
        grads = gradients(step_loss("swift", {"weight_mode": mode}, data), data)
        assert all(float(grad[0].abs().sum()) == 0.0 for grad in grads[::4])  # first token of every chosen response
        assert all(torch.isfinite(grad).all() for grad in grads)


def test_importance_scaled_to_min_max_does_not_depend_on_the_batch():
    data = rows()
    together = stack([row.chosen for row in data], frozenset({"importance"}))
    weights = min_max(together.importance, together.mask)
    for number, row in enumerate(data):
        alone = stack([row.chosen], frozenset({"importance"}), left=2, right=3, fill=99.0)
        assert torch.equal(min_max(alone.importance, alone.mask)[alone.mask], weights[number][together.mask[number]])
    assert weights[1][0] == 1.0  # one token: plain DPO on that response
    assert weights[0].max() == 1.0 and weights[0].min() == 0.0


def test_sequence_importance_uses_the_range_over_prompt_and_response():
    importance, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert torch.allclose(min_max(importance, mask, torch.tensor([[0.0, 4.0]])), torch.tensor([[0.25, 0.75]]))
    assert torch.equal(min_max(torch.full((1, 2), 2.0), mask), torch.ones(1, 2))
