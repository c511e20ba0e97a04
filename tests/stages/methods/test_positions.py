"""The weight of token t belongs to the logits at position P-1+t: shown on a table of known next-token probabilities.

The released SWIFT code reads one position late; `swift_released` keeps that, and this shows what it then measures.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.methods import METHODS
from stages.methods.base import Pairs, Responses
from stages.models.policy import collate, response_logits, response_logps
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, Tokens
from stages.weighting.weights.swift_released import unshifted_logps
from tests.stages.methods.models import TableModel

# P(next | last) over three tokens; no row is like another, and no token repeats itself as often as it follows the one before.
TABLE = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.25, 0.7, 0.05]], dtype=torch.float64)
PROMPTS, RESPONSES = [[0, 2], [1]], [[1, 0, 1], [2, 2]]
FOLLOWS = [[TABLE[2, 1], TABLE[1, 0], TABLE[0, 1]], [TABLE[1, 2], TABLE[2, 2]]]
REPEATS = [[TABLE[2, 2], TABLE[1, 1], TABLE[0, 0]], [TABLE[1, 1], TABLE[2, 2]]]


@pytest.fixture(scope="module")
def model():
    return TableModel(TABLE.log())


def logs(rows) -> list[float]:
    return [float(torch.log(value)) for row in rows for value in row]


def test_a_token_is_scored_by_the_logits_of_the_position_before_it(model):
    batch = collate(PROMPTS, RESPONSES)
    assert response_logps(model, batch)[batch.response_mask].tolist() == pytest.approx(logs(FOLLOWS))


def test_the_weight_of_a_token_meets_the_gradient_of_its_own_logits_row(model):
    batch = collate([PROMPTS[0]], [RESPONSES[0]])
    method, chosen_weights = METHODS.get("swift"), torch.tensor([[2.0, 0.0, 3.0]], dtype=torch.float64)
    logps = response_logps(model, batch)
    side = Responses(logps, logps.detach(), chosen_weights, batch.response_mask)
    other = Responses(torch.zeros_like(logps), torch.zeros_like(logps), chosen_weights, batch.response_mask)
    (gradient,) = torch.autograd.grad(
        method.pair_loss(method.Config(beta=1.0), Pairs(side, other, torch.ones(1), torch.zeros(1))).loss.sum(),
        model.table,
    )
    # At equal models -d loss = 1/2 sum_t w_t d log p(y_t | y_{t-1}): token 0 follows 2, token 2 follows 0, and token 1's weight is 0.
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for last, token, weight in ((2, 1, 2.0), (0, 1, 3.0)):
        expected[last] += -0.5 * weight * (torch.eye(3, dtype=torch.float64)[token] - TABLE[last])
    assert torch.allclose(gradient, expected)


def test_the_released_indexing_measures_how_likely_a_token_repeats_itself(model):
    batch = collate(PROMPTS, RESPONSES)
    found = unshifted_logps(response_logits(model, batch), batch)[batch.response_mask].tolist()
    assert found == pytest.approx(logs(REPEATS))
    assert found != pytest.approx(logs(FOLLOWS))


def test_the_released_weights_follow_the_wrong_token(model):
    # A teacher that is sure of every token and never repeats one: the paper's weight is e^U, the released one its smallest.
    sure = torch.tensor([[1e-9, 1.0, 1e-9], [1.0, 1e-9, 1e-9], [1e-9, 1.0, 1e-9]], dtype=torch.float64)
    batch = collate([[0, 2]], [[1, 0, 1]])
    teacher = TableModel(sure.log())
    student = response_logps(model, batch)[0].numpy(force=True)
    right, late = (
        response_logps(teacher, batch)[0].numpy(force=True),
        unshifted_logps(response_logits(teacher, batch), batch)[0].numpy(force=True),
    )
    tokens = Tokens.of([[1, 0, 1]], None, [False])
    weights = {}
    for name, logps in (("swift", right), ("swift_released", late)):
        provider = WEIGHTS.get(name)
        rows = ResponseBatch(["row"], np.ones(1, dtype=bool), tokens, {"reference": student}, None, tokens, logps)
        config = provider.Config() if name == "swift" else provider.Config(normalise="none")
        weights[name] = provider.weights(config, rows).values
    assert weights["swift"].tolist() == pytest.approx([0.7**-1, 0.5**-1, 0.6**-1])
    assert weights["swift_released"].tolist() == pytest.approx([0.43, 0.43, 0.43])
