"""What the stages promise, on a GPU: packed rows are padded rows, passes and PairRM's choices are a CPU's, the sampler
starts.

Strategy: the tiny models of the other tests, a few seconds each; `pytest -m gpu` runs them, and on a CPU the same lines
run with its device. More of them lie beside what they test: flash attention in models/test_packing.py, loading in
training/test_weights.py, resuming and two ranks in training/test_training.py, counters in running/test_cost.py.
"""

import importlib.util
import random

import numpy as np
import pytest
import torch

from data_contracts.shards import read_shards
from stages.models.packing import pack
from stages.models.policy import collate, load_causal_lm, response_logps, score_responses
from stages.scoring import SCORERS
from stages.scoring.base import Services, open_scorer

CPU_TOO = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


def texts(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Two responses to each of `count` prompts."""
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 300) for _ in range(draw.randint(1, 30))] for _ in range(count)] * 2
    return prompts, [[draw.randrange(5, 300) for _ in range(draw.randint(1, 20))] for _ in prompts]


@pytest.mark.parametrize("device", CPU_TOO)
def test_packed_rows_are_padded_rows_in_float32(tiny_model, device):
    model = load_causal_lm(str(tiny_model), "float32", device)
    prompts, responses = texts(6)
    results = []
    for batch in (pack(prompts, responses), collate(prompts, responses)):
        model.zero_grad()
        logps = response_logps(model, batch.to(device))
        (logps * torch.linspace(0.5, 1.5, logps.shape[1], device=device)).sum().backward()
        results.append([logps.detach(), *(weight.grad.clone() for weight in model.parameters())])
    for packed, padded in zip(*results, strict=True):
        assert (packed - padded).norm() <= 1e-5 * padded.norm()


@pytest.mark.parametrize("device", CPU_TOO)
def test_a_pass_scores_as_the_cpu_does(tiny_model, device):
    prompts, responses = texts(6)
    exact = score_responses(load_causal_lm(str(tiny_model), "float32", "cpu").eval(), prompts, responses, 64)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
        model = load_causal_lm(str(tiny_model), dtype, device).eval()
        rows = score_responses(model, prompts, responses, 64)
        gaps = np.abs(np.concatenate(exact) - np.concatenate(rows))
        assert gaps.mean() < tolerance


@pytest.mark.parametrize("device", CPU_TOO)
def test_pairrm_prefers_what_it_prefers_on_a_cpu(device, tmp_path):
    path = importlib.util.spec_from_file_location("pairrm_tiny", "tests/assets/pairrm_tiny.py")
    assets = importlib.util.module_from_spec(path)
    path.loader.exec_module(assets)
    directory = assets.build(tmp_path / "tiny")["hf"]
    from benchmarks.pairrm import texts as cases
    from stages.scoring.base import Candidates

    batch = [
        Candidates(
            {"messages": [{"role": "user", "content": case["prompt"]}]},
            [{"completion": text} for text in case["candidates"]],
            None,
        )
        for case in cases(3, 3, 24)
    ]
    config = SCORERS.config({"name": "pairrm", "model": {"path": str(directory)}})
    logits = [
        np.stack([scores.preference_logits for scores in open_scorer(config, where, Services()).score(batch)])
        for where in ("cpu", device)
    ]
    off_diagonal = ~np.eye(3, dtype=bool)
    left, right = (values[:, off_diagonal] for values in logits)
    assert abs(left - right).max() < 0.02 and ((left > 0) == (right > 0)).mean() >= 0.995


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_vllm_sampler_starts_and_its_log_probs_are_the_policys(tiny_model, store, make_prompts, run_stage_command):
    config = {
        "backend": {"name": "vllm", "runtime": {"enforce_eager": True, "gpu_memory_utilization": 0.2}},
        "num_candidates": 2,
        "max_new_tokens": 8,
        "max_prompt_tokens": 96,
        "runtime": {"device": "auto"},
    }
    done = run_stage_command("sample", config, {"prompts": make_prompts(store, 3), "policy": tiny_model}, store)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (record,) = store.records("generations")
    rows = read_shards(store.directory("generations", record.key), "generations").to_pylist()
    model = load_causal_lm(str(tiny_model), "bfloat16", "cuda").eval()
    exact = score_responses(model, [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows], 512)
    gaps = np.abs(np.concatenate(exact) - np.concatenate([row["token_logps"] for row in rows]))
    assert len(rows) == 6 and gaps.mean() < 0.1
