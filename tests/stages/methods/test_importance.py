"""TI-DPO's gradient attribution on a tiny Llama: against one backward per token, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.methods.importance import HybridSettings, hybrid, max_logit, min_max, token_importance
from stages.models.policy import collate
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, Tokens
from tests.stages.methods.models import tiny_llama

PROMPTS = [[1, 5, 9], [1, 4], [1, 7, 8, 6, 3]]
RESPONSES = [[11, 12, 13, 2], [21, 2], [14, 15, 16, 17, 18, 2]]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def by_hand(model, prompt, response) -> list[float]:
    """One forward and one backward per response token, a single row, no padding."""
    ids = torch.tensor([prompt + response])
    total = None
    for j in range(len(response)):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logp = torch.log_softmax(logits[0, len(prompt) - 1 + j], -1)[response[j]]
        (gradient,) = torch.autograd.grad(logp, embeddings)
        total = gradient if total is None else total + gradient
    return (total[0, len(prompt) :] / len(response)).abs().sum(-1).tolist()


def test_one_backward_per_batch_equals_one_per_token_and_row(model):
    importance, span = token_importance(model, collate(PROMPTS, RESPONSES))
    for number, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        assert importance[number, : len(response)].tolist() == pytest.approx(
            by_hand(model, prompt, response), rel=1e-5
        )  # RMSNorm is float32 inside
        assert not importance[number, len(response) :].any()
    assert (span[:, 0] == 0).all() and (span[:, 1] >= importance.amax(-1)).all()


def test_the_largest_logit_behind_the_response_is_attributed_row_by_row(model):
    importance, _ = token_importance(model, collate(PROMPTS, RESPONSES), max_logit)
    for number, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        embeddings = model.get_input_embeddings()(torch.tensor([prompt + response])).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits[0, -1].max(), embeddings)
        expected = gradient[0, len(prompt) :].abs().sum(-1).tolist()
        assert importance[number, : len(response)].tolist() == pytest.approx(expected, rel=1e-5)
        assert expected[-1] > 0 and not importance[number, len(response) :].any()


@pytest.mark.parametrize("settings", [{}, {"variant": "code"}, {"lam": 0.2, "sigma_div": 2.0}])
def test_the_weights_of_tidpo_v3_are_the_same_in_loss_and_provider(settings):
    mask = torch.tensor([[False, True, True, True, False], [True, False, False, False, False], [True] * 5])
    importance = torch.where(mask, torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).double(), 9.0)
    importance[2] = 0.0
    provider = WEIGHTS.get("tidpo_v3")
    tokens = Tokens.of([range(3), range(1), range(5)], None, [False] * 3)
    batch = ResponseBatch(
        ["a", "b", "c"], np.ones(3, dtype=bool), tokens, {"importance_max_logit": importance[mask].numpy()}
    )
    result = provider.weights(provider.Config(**settings), batch)
    weights = hybrid(importance, mask, HybridSettings(**settings))
    assert weights[mask].tolist() == pytest.approx(result.values.tolist()) and not weights[~mask].any()
    assert result.stats["degenerate"] == (1.0, 3.0)
    if settings.get("variant") == "code":
        assert (weights.sum(-1) / mask.sum(-1)).tolist() == pytest.approx([1.0] * 3)


def test_the_last_token_has_weight_zero_and_the_largest_is_one(model):
    batch = collate(PROMPTS, RESPONSES)
    importance, _ = token_importance(model, batch)
    weights = min_max(importance, batch.response_mask)
    for number, response in enumerate(RESPONSES):
        assert weights[number, len(response) - 1] == 0.0 and weights[number].max() == 1.0
    assert weights[1, :2].tolist() == [1.0, 0.0]  # T = 2


def test_batch_composition_and_padding_do_not_matter(model):
    together, _ = token_importance(model, collate(PROMPTS, RESPONSES))
    for number in range(len(PROMPTS)):
        alone, _ = token_importance(model, collate([PROMPTS[number]], [RESPONSES[number]]))
        assert torch.allclose(alone[0], together[number, : len(RESPONSES[number])], rtol=1e-5)


def test_no_parameter_gets_a_gradient_and_the_mode_is_put_back(model):
    model.train()
    with torch.no_grad():  # the trainer calls it before its own forward
        token_importance(model, collate(PROMPTS, RESPONSES))
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_the_provider_scales_as_the_method_does(model):
    batch = collate(PROMPTS, RESPONSES)
    importance, _ = token_importance(model, batch)
    flat = np.concatenate([importance[i, : len(response)].numpy() for i, response in enumerate(RESPONSES)])
    tokens = Tokens.of(RESPONSES, None, [True] * 3)
    provider = WEIGHTS.get("tidpo")
    result = provider.weights(
        provider.Config(), ResponseBatch(["a", "b", "c"], np.ones(3, dtype=bool), tokens, {"importance": flat})
    )
    assert result.values.tolist() == pytest.approx(
        min_max(importance, batch.response_mask)[batch.response_mask].tolist()
    )
    assert result.stats["degenerate"] == (0.0, 3.0)
