"""The vLLM sampler, as the command that a task runs: its log-probs are the policy's, its candidates do not depend on
the shards.

Strategy: the stage twice, in two stores, with other shards and threads; the log-probs it reports against a plain
forward of the same ids. Slow to start (10-20 s each), so everything is asked of these two runs.
"""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data_contracts.shards import read_shards
from data_contracts.store import Store
from stages.models.policy import load_causal_lm, score_responses
from stages.models.tokens import load_tokenizer
from stages.models.turns import Turns
from stages.running.history import events

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: the extras cpu and gpu have it"
)
SETTINGS = {
    "backend": {"name": "vllm", "dtype": "float32", "runtime": {"kv_cache_gib": 0.1}},
    "num_candidates": 4,
    "top_k": 20,
    "max_new_tokens": 16,
    "max_prompt_tokens": 96,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, make_prompts, run_stage_command):
    """Rows and directory of two runs: two prompts per shard, their requests side by side; and all in one shard."""

    def run(size: int, requests_in_flight: int):
        store = Store(tmp_path_factory.mktemp(f"vllm{size}") / "store")
        inputs = {"prompts": make_prompts(store, 7).key, "policy": tiny_model}
        backend = SETTINGS["backend"]
        backend = backend | {"runtime": backend["runtime"] | {"requests_in_flight": requests_in_flight}}
        settings = {"backend": backend, "runtime": {"device": "cpu", "prompts_per_shard": size}}
        done = run_stage_command("sample", SETTINGS | settings, inputs, store)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (record,) = store.records("generations")
        directory = store.directory("generations", record.key)
        return record, read_shards(directory, "generations").to_pylist(), directory

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (2, 64), (9, 0)))


def test_the_stage_signs_k_candidates_per_prompt(runs):
    for (record, rows, directory), shards in zip(runs, (4, 1), strict=True):
        assert record.rows == len(rows) == 28
        assert [(row["prompt_id"], row["candidate"]) for row in rows] == [
            (f"p{number:03d}", k) for number in range(7) for k in range(4)
        ]
        assert sum(event["event"] == "shard" for event in events(directory)) == shards
        assert "vllm" in record.provenance["versions"]


def test_log_probs_are_those_of_the_policy_for_the_same_ids(runs, tiny_model):
    rows = runs[0][1]
    model = load_causal_lm(str(tiny_model), "float32", "cpu").eval()
    scored = score_responses(model, [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows], 4096)
    gaps = np.abs(
        np.concatenate([np.array(row["token_logps"]) - logps for row, logps in zip(rows, scored, strict=True)])
    )
    assert gaps.max() < 0.05 and gaps.mean() < 1e-3


def test_other_shards_give_the_same_candidates(runs):
    (_, one, _), (_, other, _) = runs
    for left, right in zip(one, other, strict=True):
        assert [left[name] for name in ("prompt_id", "candidate", "seed", "token_ids", "finish_reason")] == [
            right[name] for name in ("prompt_id", "candidate", "seed", "token_ids", "finish_reason")
        ]
        assert np.allclose(left["token_logps"], right["token_logps"], atol=1e-4)


def test_every_token_is_one_of_the_top_k(runs, tiny_model, make_rows):
    model, turns = load_causal_lm(str(tiny_model), "float32", "cpu"), Turns(tiny_model)
    prompts = {row["prompt_id"]: turns.prompt(row["messages"]) for row in make_rows(7)}
    for row in runs[0][1]:
        prompt, answer = prompts[row["prompt_id"]], row["token_ids"]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        ranks = (logits > logits.gather(1, torch.tensor(answer)[:, None])).sum(1)
        assert ranks.max() < 20


def test_candidates_of_a_prompt_differ(runs):
    for number in range(7):
        assert len({tuple(row["token_ids"]) for row in runs[0][1][4 * number : 4 * number + 4]}) == 4


def test_the_eos_is_there_where_a_response_ended_and_nowhere_else(runs, tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    rows = runs[0][1]
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        ended = row["finish_reason"] == "stop"
        assert (row["token_ids"].count(1), row["token_ids"][-1] == 1) == (int(ended), ended)
        assert ended or len(row["token_ids"]) == 16
        assert row["completion"] == tokenizer.decode(row["token_ids"][: -1 if ended else None])


def test_the_padding_of_an_embedding_is_never_sampled(tmp_path, padded_model, make_prompts, run_stage_command):
    # Without the mask almost every token would be one of it; the log-probs are still the model's own.
    store = Store(tmp_path / "store")
    inputs = {"prompts": make_prompts(store, 3).key, "policy": padded_model}
    done = run_stage_command("sample", SETTINGS | {"runtime": {"device": "cpu"}}, inputs, store)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (record,) = store.records("generations")
    rows = read_shards(store.directory("generations", record.key), "generations").to_pylist()
    assert len(rows) == 12 and max(max(row["token_ids"]) for row in rows) < 320
    assert max(max(row["token_logps"]) for row in rows) < -1


@pytest.mark.slow
def test_a_checkpoint_of_an_adapter_alone_is_served_by_its_base_with_the_adapter(
    tmp_path, tiny_model, make_prompts, run_stage_command
):
    """The engine's own LoRA support, prompts in flight and all; log-probs against base and adapter in transformers."""
    from tests.stages.models.test_adapters import checkpoint_of_an_adapter

    policy = checkpoint_of_an_adapter(tmp_path / "policy", tiny_model)
    store = Store(tmp_path / "store")
    inputs = {"prompts": make_prompts(store, 7).key, "policy": policy.path}
    backend = SETTINGS["backend"]
    backend = backend | {"runtime": backend["runtime"] | {"requests_in_flight": 9}}
    settings = {"backend": backend, "runtime": {"device": "cpu", "prompts_per_shard": 2}}
    done = run_stage_command("sample", SETTINGS | settings, inputs, store)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (record,) = store.records("generations")
    rows = read_shards(store.directory("generations", record.key), "generations").to_pylist()

    def gap(directory) -> float:
        model = load_causal_lm(str(directory), "float32", "cpu").eval()
        scored = score_responses(model, [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows], 4096)
        return max(np.abs(np.array(row["token_logps"]) - logps).max() for row, logps in zip(rows, scored, strict=True))

    assert gap(policy.path) < 1e-3 < 1 < gap(tiny_model)
