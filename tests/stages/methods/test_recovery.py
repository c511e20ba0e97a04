"""Toy worlds small enough to enumerate: self-play reaches the data and stops there; the preference game averages to its equilibrium.

The policy is a table, expectations over pairs are exact sums, and the loss is the one the trainer calls.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks._cycle import PREFERENCE, minimise
from stages.methods import METHODS
from stages.methods.base import Pairs, Responses
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, Tokens

VOCABULARY = 5
LIMITS = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 1e-14}
DATA = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
TEACHER = torch.tensor([0.45, 0.2, 0.2, 0.1, 0.05], dtype=torch.float64)


def side(logps: torch.Tensor, reference: torch.Tensor, weights: torch.Tensor) -> Responses:
    """Responses of one token each."""
    return Responses(logps[:, None], reference[:, None], weights[:, None], torch.ones(len(logps), 1, dtype=torch.bool))


def swift_weights(policy: torch.Tensor) -> torch.Tensor:
    tokens = Tokens.of([[token] for token in range(VOCABULARY)], None, [False] * VOCABULARY)
    rows = ResponseBatch(
        [str(token) for token in range(VOCABULARY)],
        np.ones(VOCABULARY, dtype=bool),
        tokens,
        {"reference": policy.log().numpy()},
        None,
        tokens,
        TEACHER.log().numpy(),
    )
    provider = WEIGHTS.get("swift")
    return torch.from_numpy(provider.weights(provider.Config(), rows).values)


def iterate(name: str, policy: torch.Tensor, beta: float) -> torch.Tensor:
    """One self-play iteration: y from the data, y' from the policy, which is also the reference and the start."""
    method = METHODS.get(name)
    config, reference = method.Config(beta=beta), policy.log()
    truth, generation = (
        index.reshape(-1) for index in torch.meshgrid(torch.arange(VOCABULARY), torch.arange(VOCABULARY), indexing="ij")
    )
    weights = swift_weights(policy) if name == "swift" else torch.ones(VOCABULARY, dtype=torch.float64)
    share = DATA[truth] * policy[generation]

    def loss(logps: torch.Tensor) -> torch.Tensor:
        sides = [side(logps[index], reference[index], weights[index]) for index in (truth, generation)]
        ones = torch.ones(len(truth), dtype=torch.float64)
        return (share * method.pair_loss(config, Pairs(*sides, ones, 0 * ones)).loss).sum()

    return minimise(loss, policy, **LIMITS)


@pytest.mark.parametrize(("name", "beta", "iterations"), [("spin", 1.0, 2), ("spin", 2.0, 30), ("swift", 2.0, 60)])
def test_self_play_moves_the_policy_to_the_data_and_stops_there(name, beta, iterations):
    policy = torch.tensor([0.05, 0.1, 0.2, 0.25, 0.4], dtype=torch.float64)
    for _ in range(iterations):
        policy = iterate(name, policy, beta)
    assert torch.allclose(policy, DATA, atol=1e-4)
    assert torch.allclose(iterate(name, DATA, beta), DATA, atol=1e-9)


def test_spin_at_beta_one_recovers_the_data_in_a_single_iteration():
    # The optimum of the logistic loss is the log-odds of "came from the data": beta LR(y) = log p_data(y) / pi(y).
    uniform = torch.full((VOCABULARY,), 1 / VOCABULARY, dtype=torch.float64)
    assert torch.allclose(iterate("spin", uniform, 1.0), DATA, atol=1e-6)


def test_sppo_on_a_cyclic_game_averages_to_a_third_each():
    # Rock, paper, scissors: 0 beats 1 beats 2 beats 0. Sampled often enough, the K candidates are the policy itself.
    method = METHODS.get("sppo")
    eta = 0.5
    config = method.Config(eta=eta, keep="all", log_z=True)
    policy, total, rounds = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 500
    for _ in range(rounds):
        rates = PREFERENCE @ policy
        log_z = torch.log((policy * torch.exp(eta * rates)).sum()).expand(3)
        reference = policy.log()

        def loss(logps, reference=reference, rates=rates, log_z=log_z):
            ones = torch.ones(3, dtype=torch.float64)
            return method.pair_loss(
                config, Pairs(side(logps, reference, ones), None, rates, None, values={"log_z": log_z})
            ).loss.mean()

        policy = minimise(loss, policy, **LIMITS)
        total += policy
    assert torch.allclose(total / rounds, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03)
