"""The sample stage around its samplers: limits are checked by name, rows keep the token contract, a broken sampler is
caught.

Strategy: the canned sampler on the tiny model, in this process; samplers that lie are three lines of our own.
"""

import numpy as np
import pytest

import stages.sampling.stage as stage
from data_contracts.checkpoint import external_model
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shards import read_shards
from stages.execute import execute
from stages.models.tokens import load_tokenizer
from stages.sampling.base import Candidate
from stages.sampling.stage import SamplingConfig, encode_prompts
from stages.stage import STAGES


def config(**changes) -> SamplingConfig:
    settings = {
        "backend": {"name": "canned"},
        "num_candidates": 3,
        "max_new_tokens": 6,
        "max_prompt_tokens": 64,
        "runtime": {"device": "cpu"},
    }
    return SamplingConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture
def sample(store, make_prompts, tiny_model):
    """sample(rows or count, settings) -> (record, rows of generations)."""

    def run(prompts=5, **changes):
        inputs = {"prompts": make_prompts(store, prompts), "policy": external_model(tiny_model)}
        record = execute(STAGES["sample"], config(**changes), inputs, store)
        return record, read_shards(store.directory(record.kind, record.key), "generations").to_pylist()

    return run


def test_there_are_k_rows_per_prompt_in_the_order_of_the_prompts(sample, make_rows, tokenizer):
    record, rows = sample(make_rows(5))
    assert [(row["prompt_id"], row["candidate"]) for row in rows] == [
        (f"p{number:03d}", k) for number in range(5) for k in range(3)
    ]
    assert record.rows == record.metrics["candidates"] == 15
    for row, prompt in zip(rows[::3], make_rows(5), strict=True):
        assert row["prompt_ids"] == stage.encode_prompt(tokenizer, prompt["messages"], "chat")
    assert record.metrics["tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert record.metrics["mean_tokens"] == pytest.approx(np.mean([len(row["token_ids"]) for row in rows]))
    assert record.metrics["finished_rate"] == pytest.approx(np.mean([row["finish_reason"] == "stop" for row in rows]))
    assert (
        record.facts["template"] == "chat"
        and len(record.facts["tokenizer_digest"]) == 64
        and record.facts["device"] == "cpu"
    )


def test_the_text_of_a_response_is_that_of_its_tokens_without_the_eos_that_ended_it(sample, tokenizer):
    _, rows = sample(20)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        body = row["token_ids"][:-1] if row["finish_reason"] == "stop" else row["token_ids"]
        assert row["completion"] == tokenizer.decode(body)


def test_prompts_in_another_order_or_company_give_the_same_rows(sample, make_rows):
    first = {(row["prompt_id"], row["candidate"]): row for row in sample(make_rows(6))[1]}
    other = sample(make_rows(6)[::-1][:4], runtime={"device": "cpu", "prompts_per_shard": 3})[1]
    assert all(first[row["prompt_id"], row["candidate"]] == row for row in other) and len(other) == 12


def test_a_prompt_that_is_too_long_is_refused_by_name(make_rows, tiny_model, tokenizer):
    lengths = [len(ids) for ids in encode_prompts(make_rows(3), config(), str(tiny_model), tokenizer)]
    limit = max(lengths)
    encode_prompts(make_rows(3), config(max_prompt_tokens=limit), str(tiny_model), tokenizer)
    late = lengths.index(limit)
    with pytest.raises(
        ConfigError, match=rf"the prompt 'p00{late}' has {limit} tokens, allowed are 1 to {limit - 1} .*context is 256"
    ):
        encode_prompts(make_rows(3)[late:], config(max_prompt_tokens=limit - 1), str(tiny_model), tokenizer)


def test_limits_beyond_the_context_are_refused(make_rows, tiny_model, tokenizer):
    encode_prompts(make_rows(1), config(max_prompt_tokens=200, max_new_tokens=56), str(tiny_model), tokenizer)
    with pytest.raises(
        ConfigError, match=r"max_prompt_tokens \+ max_new_tokens = 257 exceeds the context of 256 positions"
    ):
        encode_prompts(make_rows(1), config(max_prompt_tokens=200, max_new_tokens=57), str(tiny_model), tokenizer)


def test_an_empty_prompt_is_refused(tiny_model, tokenizer):
    empty = [{"prompt_id": "e", "messages": [{"role": "user", "content": ""}]}]
    with pytest.raises(ConfigError, match="the prompt 'e' has 0 tokens"):
        encode_prompts(empty, config(template="plain"), str(tiny_model), tokenizer)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (
            Candidate([5, 6], [-1.0, -1.0], "stop"),
            r"prompt p000 candidate 0: finish_reason 'stop' but the last token is \[?6",
        ),
        (Candidate([5, 1], [-1.0, -1.0], "length"), r"finish_reason 'length' but the last token is \[?1"),
        (Candidate([], [], "length"), "0 tokens and 0 log-probs"),
        (Candidate([5, 6], [-1.0], "length"), "2 tokens and 1 log-probs"),
    ],
)
def test_a_sampler_that_breaks_the_token_contract_is_caught(sample, monkeypatch, candidate, message):
    monkeypatch.setattr(
        "stages.sampling.canned.Canned.generate", lambda self, prompts: [[candidate] * 3 for _ in prompts]
    )
    with pytest.raises(ContractError, match=message):
        sample(2)


def test_a_sampler_that_forgets_a_candidate_is_caught(sample, monkeypatch):
    monkeypatch.setattr(
        "stages.sampling.canned.Canned.generate",
        lambda self, prompts: [[Candidate([5], [-1.0], "length")] * 2 for _ in prompts],
    )
    with pytest.raises(ContractError, match="4 rows for 2 prompts x 3 candidates"):
        sample(2)
