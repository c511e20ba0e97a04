"""What a build costs: parameters from headers, seconds over tries, FLOPs by the formula, memory of the whole process tree."""

import subprocess
import sys
import time

import pytest
from safetensors.torch import save_file

from stages.job import Job
from stages.running.cost import MemoryWatch, cost_of, loading, parameters
from stages.running.history import events, seconds_of
from stages.stage import STAGES


def test_parameters_are_counted_from_the_headers(tiny_model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert parameters(str(tiny_model)) == sum(one.numel() for one in model.parameters())
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(5)}, tmp_path / "model-00002-of-00002.safetensors")
    assert parameters(str(tmp_path)) == 17
    assert parameters(str(tmp_path / "nothing")) == 0


def test_seconds_of_a_build_that_was_killed_twice():
    history = [
        {"event": "start", "time": 102.0, "launched": 100.0},
        {"event": "shard", "time": 110.0, "index": 0},  # killed here: 10 s, of which 2 s imports
        {"event": "start", "time": 201.0, "launched": 200.0},
        {"event": "start", "time": 303.0, "launched": 300.0},
        {"event": "seconds", "time": 309.0, "what": "generate", "seconds": 4.0},
        {"event": "seconds", "time": 310.0, "what": "waiting", "seconds": 0.5},
        {"event": "seconds", "time": 311.0, "what": "load", "seconds": 2.0},
        {"event": "end", "time": 312.0},
    ]
    assert seconds_of(history) == {
        "wall": 10 + 1 + 12, "last_try": 12, "start_up": 2 + 1 + 3 + 2, "waiting": 0.5, "busy": 23 - 8 - 0.5, "generate": 4.0,
    }  # fmt: skip


def test_seconds_of_a_record_of_old_that_says_no_launch():
    assert seconds_of([{"event": "start", "time": 5.0}, {"event": "end", "time": 9.0}])["wall"] == 4.0


def test_loading_is_counted_once_however_it_is_nested():
    before = loading.seconds
    with loading(), loading():
        time.sleep(0.05)
    assert 0.05 <= loading.seconds - before < 0.09


def test_tokens_and_flops_add_up_over_tries(tmp_path, tiny_model):
    out = tmp_path / "artifacts" / "generations" / "k"
    out.mkdir(parents=True)
    count = parameters(str(tiny_model))
    for _ in range(2):  # two tries
        job = Job(STAGES["sample"], None, {}, out)
        job.used(tiny_model, 30, 12)
        job.used(tiny_model, 10, per_token=6, cache_hits=4)
    with MemoryWatch() as watch:
        pass
    cost = cost_of(events(out), watch)
    assert cost["tokens_in"] == 80 and cost["tokens_out"] == 24 and cost["cache_hits"] == 8
    assert cost["flops"] == 2 * (2 * count * 42 + 6 * count * 10)
    assert cost["gpus"] == 0 and "peak_gpu_bytes" not in cost


@pytest.mark.parametrize("where", ["here", "in a child"])
def test_the_peak_of_the_whole_tree_is_seen(where):
    hold = "import time; x = bytearray(300 * 2**20); time.sleep(2.5)"
    with MemoryWatch() as watch:
        if where == "here":
            block = bytearray(300 * 2**20)
            time.sleep(1.5)
            del block
        else:
            subprocess.run([sys.executable, "-c", hold], check=True)
    assert watch.peak_rss_bytes > 300 * 2**20
