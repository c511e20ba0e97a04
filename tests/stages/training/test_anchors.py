"""TI-DPO's anchors: sampled in batches and dealt to ranks, each row as transformers would sample it alone."""

import types

import pytest
import torch

import stages.training.streams
from stages.methods.base import AnchorSampling
from stages.models.policy import load_causal_lm
from stages.training.anchors import gathered, sample_answers
from stages.training.streams import Streams, hash_seed

STOPS = [1, 7]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_causal_lm(str(tiny_model), "float32", "cpu").eval()


def prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(10, 300, (4 + 5 * number % 17,), generator=draw).tolist() for number in range(count)]


def alone(model, prompt: list[int], seed: int, sampling: AnchorSampling) -> list[int]:
    """A row by itself, by the global generator."""
    torch.manual_seed(seed)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=sampling.temperature,
        top_k=sampling.top_k, top_p=sampling.top_p, max_new_tokens=sampling.max_new_tokens, eos_token_id=STOPS,
        pad_token_id=STOPS[0], use_cache=True,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, {"top_k": 5}], ids=["default", "plain", "top_k"]
)
def test_a_batch_has_the_answers_of_its_rows_alone(model, settings):
    sampling = AnchorSampling(max_new_tokens=12, **settings)
    rows, seeds = prompts(7), list(range(100, 107))
    expected = [alone(model, prompt, seed, sampling) for prompt, seed in zip(rows, seeds, strict=True)]
    assert len({len(answer) for answer in expected}) > 1  # some end before others
    for budget in (1, 60, 10**6):
        assert sample_answers(model, rows, seeds, sampling, STOPS, budget) == expected


def streams_of_rank(model, rank: int, world_size: int) -> Streams:
    streams = object.__new__(Streams)
    streams.needs, streams.anchors = frozenset({"anchor"}), {}
    streams.method_config = types.SimpleNamespace(anchor=AnchorSampling(max_new_tokens=8, refresh=2))
    streams.config = types.SimpleNamespace(seed=5, runtime=types.SimpleNamespace(batch_tokens=64))
    streams.engine = types.SimpleNamespace(module=model, stop_ids=STOPS, rank=rank, world_size=world_size)
    return streams


def test_ranks_share_the_rows_and_all_have_all_answers(model, monkeypatch):
    rows = [{"pair_id": str(number), "prompt_ids": prompt} for number, prompt in enumerate(prompts(5))]
    rows.append(rows[0])  # a row that a step has twice is sampled once
    single = streams_of_rank(model, 0, 1)
    single.sample_anchors(rows, 4)
    sampling = single.method_config.anchor
    assert single.anchors == {
        row["pair_id"]: alone(model, row["prompt_ids"], hash_seed(5, 4, number), sampling)
        for number, row in enumerate(rows[:5])
    }
    parts = []

    def gather(answers, world_size):
        parts.append(answers)
        return answers

    monkeypatch.setattr(stages.training.streams, "gathered", gather)
    for rank in range(2):
        streams_of_rank(model, rank, 2).sample_anchors(rows, 4)
    assert [sorted(part) for part in parts] == [["0", "2", "4"], ["1", "3"]]
    assert parts[0] | parts[1] == single.anchors
    before = dict(single.anchors)
    single.sample_anchors(rows, 5)  # within the window the answers stay
    assert single.anchors == before
    single.sample_anchors(rows, 6)
    assert single.anchors != before


def test_answers_of_all_ranks_are_put_together(monkeypatch):
    def all_gather_object(parts, mine):
        parts[:] = [mine, {"b": [2]}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert gathered({"a": [1]}, 2) == {"a": [1], "b": [2]}
    assert gathered({"a": [1]}, 1) == {"a": [1]}
