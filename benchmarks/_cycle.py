"""A planted preference that no reward explains: rock, paper, scissors. SPPO and iterative DPO play it with the trainer's own losses.

The policy is a table over three answers; answer 0 beats 1, 1 beats 2 and 2 beats 0, each nine times out of ten.
Expectations are exact sums, so nothing is sampled, and a seed is a random start. A policy is as good as its win rate
against the answer that beats it most: 1/2 for a third each, the game's equilibrium, and 0.1 for one answer alone. No
Bradley-Terry reward ranks a cycle, so a policy that trusts one chases its own last answer. As in SPPO's Theorem 4.1, the
policy that counts is the mean over the iterations, for both methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from stages.methods import METHODS
from stages.methods.base import Pairs, Responses

PREFERENCE = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)
"""P(row beats column)."""
ITERATIONS, ETA = 100, 0.5
LIMITS = {"max_iter": 50, "tolerance_grad": 1e-10}
"""Of each iteration's minimisation."""


def worst_win_rate(method: str, seed: int) -> float:
    """Play from a random start; the mean policy's win rate against the answer that beats it most."""
    policy = torch.from_numpy(np.random.default_rng(seed).dirichlet([1.0, 1.0, 1.0]))
    total = torch.zeros(3, dtype=torch.float64)
    play = {"start": lambda policy: policy, "sppo": _sppo, "dpo": _dpo}[method]
    for _ in range(ITERATIONS):
        policy = play(policy)
        total += policy
    return float((total / ITERATIONS @ PREFERENCE).min())


def _side(logps: torch.Tensor, reference: torch.Tensor) -> Responses:
    """Responses of one token each."""
    ones = torch.ones(len(logps), 1, dtype=torch.float64)
    return Responses(logps[:, None], reference[:, None], ones, ones.bool())


def _sppo(policy: torch.Tensor) -> torch.Tensor:
    """One iteration of SPPO on all answers, with the partition function estimated (Eq. 3.5)."""
    method = METHODS.get("sppo")
    config = method.Config(eta=ETA, keep="all", log_z=True)
    rates, reference = PREFERENCE @ policy, policy.log()
    log_z = torch.log((policy * torch.exp(ETA * rates)).sum()).expand(3)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        pairs = Pairs(_side(logps, reference), None, rates, None, values={"log_z": log_z})
        return (policy * method.pair_loss(config, pairs).loss).sum()

    return minimise(loss, policy, **LIMITS).clamp(min=1e-9)


def _dpo(policy: torch.Tensor) -> torch.Tensor:
    """One iteration of DPO at beta = 1/eta on every pair of the policy's answers, labelled by the preference."""
    method = METHODS.get("dpo")
    config, reference = method.Config(beta=1 / ETA), policy.log()
    chosen, rejected = (index.reshape(-1) for index in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    share = policy[chosen] * policy[rejected] * PREFERENCE[chosen, rejected]

    def loss(logps: torch.Tensor) -> torch.Tensor:
        pairs = Pairs(*(_side(logps[index], reference[index]) for index in (chosen, rejected)))
        return (share * method.pair_loss(config, pairs).loss).sum()

    return minimise(loss, policy, **LIMITS).clamp(min=1e-9)


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, **limits: Any) -> torch.Tensor:
    """Return the table policy of least loss. `loss` takes its log-probs; `limits` are LBFGS's: steps and tolerances."""
    logits = start.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **limits)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(torch.log_softmax(logits, -1))
        value.backward()
        return value

    optimizer.step(closure)
    return torch.softmax(logits.detach(), -1)
