"""Log-probabilities of responses: the right position, whatever else is in the batch.

Strategy: a "model" that is a table of next-token logits shows which position is read; the tiny Llama, one response at a time and without
padding, is what every batch must reproduce in float32.
"""

import itertools
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_contracts.errors import ConfigError
from stages.models.policy import (
    batches_by_budget,
    collate,
    load_causal_lm,
    pick_device,
    response_logits,
    response_logps,
    score_responses,
)

TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))


class TableModel:
    """The logits at a position are a row of TABLE: that of the token there."""

    def __call__(self, input_ids, use_cache):
        assert not use_cache
        self.logits = TABLE[input_ids].requires_grad_()
        return SimpleNamespace(logits=self.logits)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_causal_lm(str(tiny_model), "float32", "cpu").eval()


def texts(count: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 12 tokens, responses of 1 to 9."""
    draw = random.Random(seed)
    one = lambda most: [draw.randrange(320) for _ in range(draw.randint(1, most))]  # noqa: E731
    return [one(12) for _ in range(count)], [one(9) for _ in range(count)]


def alone(model, prompt: list[int], response: list[int]) -> np.ndarray:
    """The log-probs of a response, by plain torch: no padding, no batch, all logits."""
    ids = torch.tensor([prompt + response])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    return logits.log_softmax(-1)[torch.arange(len(prompt) - 1, len(ids[0]) - 1), ids[0, len(prompt) :]].numpy()


# --- which position


def test_a_batch_is_as_wide_as_its_longest_prompt_with_its_response():
    batch = collate([[1, 2], [3]], [[4], [5, 6, 7]])
    assert batch.input_ids.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert batch.in_row.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.sources.tolist() == [[1, 0, 0], [0, 1, 2]]
    assert batch.response_ids.tolist() == [[4, 0, 0], [5, 6, 7]]
    assert batch.response_mask.tolist() == [[True, False, False], [True, True, True]]


def test_token_t_is_read_from_the_position_of_the_token_before_it():
    batch = collate([[1, 2], [3]], [[4], [5, 6, 7]])
    table = TABLE.log_softmax(-1)
    expected = torch.tensor([[table[2, 4], 0, 0], [table[3, 5], table[5, 6], table[6, 7]]])
    assert torch.allclose(response_logps(TableModel(), batch), expected)


def test_the_weight_of_token_t_reaches_the_logits_of_position_p_minus_1_plus_t_alone():
    model, batch = TableModel(), collate([[1, 2], [3]], [[4], [5, 6, 7]])
    weights = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    (weights * response_logps(model, batch)).sum().backward()
    # Row 0 (P = 2) has its only token at 1 + 0, row 1 (P = 1) its second at 0 + 1.
    assert model.logits.grad.abs().sum(-1).nonzero().tolist() == [[0, 1], [1, 1]]


def test_only_the_logits_that_are_needed_are_asked_for(model):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, hidden, logits: seen.append(logits.shape))
    assert response_logits(model, collate([[1] * 30], [[2, 3]])).shape == (1, 2, 320)
    hook.remove()
    assert seen == [(1, 2, 320)] and not model.lm_head._forward_pre_hooks


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12), st.integers(1, 200))
def test_no_batch_is_wider_than_its_budget(sizes, budget):
    prompts, responses = [[1] * prompt for prompt, _ in sizes], [[2] * response for _, response in sizes]
    for rows in batches_by_budget([prompt + response for prompt, response in sizes], budget):
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows])
        assert len(rows) == 1 or batch.input_ids.numel() <= budget


# --- whatever else is in the batch


def test_log_probs_are_those_of_plain_torch_one_by_one(model):
    prompts, responses = texts(12)
    for got, prompt, response in zip(score_responses(model, prompts, responses, 4096), prompts, responses, strict=True):
        assert got.dtype == np.float32 and got.shape == (len(response),)
        assert np.abs(got - alone(model, prompt, response)).max() < 1e-5


@pytest.mark.parametrize("budget", [1, 40, 100, 4096])
def test_the_size_of_the_batches_does_not_matter(model, budget):
    prompts, responses = texts(12)
    for one, other in zip(
        score_responses(model, prompts, responses, 4096),
        score_responses(model, prompts, responses, budget),
        strict=True,
    ):
        assert np.abs(one - other).max() < 1e-5


def test_the_order_of_the_responses_does_not_matter(model):
    prompts, responses = texts(12)
    order = random.Random(1).sample(range(12), 12)
    straight = score_responses(model, prompts, responses, 60)
    mixed = score_responses(model, [prompts[i] for i in order], [responses[i] for i in order], 60)
    for i, row in zip(order, mixed, strict=True):
        assert np.abs(row - straight[i]).max() < 1e-5


@pytest.mark.parametrize(("left", "right"), [(20, 0), (0, 20), (17, 23)])
def test_padding_on_either_side_does_not_matter(model, left, right):
    prompts, responses = texts(1)
    plain = alone(model, prompts[0], responses[0])
    other = [7] * (len(prompts[0]) + left), [8] * (len(responses[0]) + right)
    padded = response_logps(model, collate([prompts[0], other[0]], [responses[0], other[1]]))[0]
    assert np.abs(padded[: len(plain)].detach().numpy() - plain).max() < 1e-5
    assert (padded[len(plain) :] == 0).all()


def test_a_text_split_elsewhere_has_the_same_log_probs(model):
    # log pi(y|x): what moves from response to prompt leaves the rest as it was.
    whole = alone(model, [5], [6, 7, 8, 9])
    assert np.abs(score_responses(model, [[5, 6, 7]], [[8, 9]], 100)[0] - whole[2:]).max() < 1e-5


def test_dropout_is_off_also_while_training(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    noisy = load_causal_lm(str(copy), "float32", "cpu").train()
    batch = collate([[1, 2, 3]], [[4, 5]])
    assert torch.equal(response_logps(noisy, batch), response_logps(noisy, batch))


def test_weights_are_loaded_in_the_dtype_that_was_asked_for(tiny_model):
    assert load_causal_lm(str(tiny_model), "bfloat16", "cpu").dtype == torch.bfloat16


def test_a_device_that_was_named_is_taken():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


# --- batches


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_take_every_row_once_within_the_budget_longest_first(lengths, budget):
    batches = list(batches_by_budget(lengths, budget))
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert rows == sorted(rows, key=lambda row: (-lengths[row], row))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    # No batch could have taken the first row of the next one.
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[batch[0]] > budget and following


def test_batches_by_hand():
    assert list(batches_by_budget([3, 10, 4, 4, 1], 12)) == [[1], [2, 3, 0], [4]]
    assert list(batches_by_budget([], 12)) == []


def test_a_model_is_compared_with_its_files_at_every_load(tiny_model, tmp_path, capsys):
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = directory / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"score.weight": torch.zeros(1, 64)}, path, metadata={"format": "pt"})
    load_causal_lm(str(directory), "float32", "cpu")
    assert "1 tensors are of another task and are not read, e.g. ['score.weight']" in capsys.readouterr().out
    save_file({name: value for name, value in weights.items() if name != "model.norm.weight"}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 tensors of a LlamaForCausalLM, e.g. \['model.norm.weight'\]"):
        load_causal_lm(str(directory), "float32", "cpu")
    save_file(weights | {"model.norm.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.norm.weight \(3,\), not \(64,\)"):
        load_causal_lm(str(directory), "float32", "cpu")
