"""What a build costs: parameters from headers, seconds over tries, FLOPs by the formula, memory of the whole process tree."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
from safetensors.torch import save_file

from data_contracts.errors import TransientError
from stages.job import Job
from stages.running import gpus
from stages.running.cost import MemoryWatch, cost_of, loading, parameters
from stages.running.gpus import GPU_EVENT, gpu_cost, report_rank, torch_peaks
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


@pytest.fixture
def cuda(monkeypatch):
    """cuda({index: bytes}): torch counts so much on each of this process's GPUs, GPU-0, GPU-1 ..."""
    import torch

    def pretend(peaks: dict[int, int]):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: peaks.get(index, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-{index}"))

    return pretend


def test_gpus_of_all_workers_and_ranks_are_counted_by_torch_itself(tmp_path, cuda):
    # In a container the driver's process numbers are not ours: every process reports its own.
    cuda({0: 5 * 2**30})
    job = Job(STAGES["sample"], None, {}, tmp_path)
    job.event(GPU_EVENT, peaks=torch_peaks())
    cuda({1: 3 * 2**30})
    report_rank(tmp_path)  # another process: a file of its own
    assert len(list(tmp_path.glob(".events*.jsonl"))) == 2
    with MemoryWatch() as watch:
        pass
    cost = cost_of(events(tmp_path), watch)
    assert cost["gpus"] == 2 and cost["peak_gpu_bytes"] == 8 * 2**30
    assert seconds_of(events(tmp_path))["wall"] == 0.0  # a rank's event is no try


def test_a_gpu_counts_its_largest_process_and_at_least_what_the_driver_saw():
    history = [{"event": GPU_EVENT, "peaks": peaks} for peaks in ({"a": 5}, {"a": 7, "b": 1}, {})]
    assert gpu_cost(history, {}) == (8, 2)
    assert gpu_cost(history, {"b": 4, "c": 2}) == (13, 3)
    assert gpu_cost([], {}) == (0, 0)


def test_a_process_without_cuda_reports_no_gpu(tmp_path):
    assert torch_peaks() == {}
    report_rank(tmp_path)
    assert not list(tmp_path.iterdir())


class Nvml:
    """The driver of two GPUs; the first holds a gigabyte of somebody else's."""

    used: ClassVar[dict[int, int]] = {0: 2**30, 1: 0}
    nvmlDeviceGetCount = staticmethod(lambda: 2)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
    nvmlDeviceGetUUID = staticmethod(lambda index: f"GPU-uuid-{index}")
    nvmlDeviceGetMemoryInfo = staticmethod(lambda index: SimpleNamespace(used=Nvml.used[index]))
    nvmlDeviceGetComputeRunningProcesses = staticmethod(
        lambda index: [SimpleNamespace(pid=70 + index, usedGpuMemory=Nvml.used[index])]
    )


@pytest.mark.parametrize("in_container", [True, False])
def test_an_engines_child_is_seen_by_the_driver(monkeypatch, in_container):
    monkeypatch.setattr(gpus, "_nvml", lambda: Nvml)
    monkeypatch.setattr(Nvml, "used", {0: 2**30, 1: 0})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    watch = gpus.GpuWatch()
    watch.knows_processes = not in_container
    watch.look({71})
    assert watch.peaks == {}
    Nvml.used[1] = 6 * 2**30
    watch.look({71})
    Nvml.used[1] = 0
    watch.look({71})
    assert watch.peaks == {"uuid-1": 6 * 2**30}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-uuid-0")
    assert set(gpus._used_bytes()) == {"uuid-0"}


GIB = 2**30


def cards(monkeypatch, *free_and_total: tuple[float, float]) -> None:
    """Cards with so many GiB free and in all."""
    memory = [
        SimpleNamespace(free=int(free * GIB), total=int(total * GIB), used=int((total - free) * GIB))
        for free, total in free_and_total
    ]
    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: len(memory),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: f"GPU-uuid-{index}",
        nvmlDeviceGetMemoryInfo=lambda index: memory[index],
    )
    monkeypatch.setattr(gpus, "_nvml", lambda: nvml)


@pytest.mark.parametrize(
    ("visible", "count", "share"),
    [
        (None, 1, 0.9),  # the first card is free
        (None, 2, 0.5),  # half of the second is taken, and 1 GiB is the engine's own context
        ("1", 1, 0.5),
        ("GPU-uuid-1", 1, 0.5),
        ("GPU-uuid-0,1", 1, 0.9),
        ("1,0", 1, 0.5),
        ("MIG-3f", 1, 0.9),  # the driver does not count it among the cards
    ],
)
def test_an_engine_gets_what_is_free(monkeypatch, visible, count, share):
    cards(monkeypatch, (79, 80), (41, 80))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.engine_share(0.9, 14 * GIB, count) == pytest.approx(share)


def test_an_engine_whose_weights_do_not_fit_into_what_is_free_is_worth_another_try(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards(monkeypatch, (10, 80), (79, 80))
    with pytest.raises(TransientError, match=r"GPU uuid-0 has 10.0 GiB free of 80.0, and the model's weights take 14"):
        gpus.engine_share(0.9, 14 * GIB)
    assert gpus.engine_share(0.9, 14 * GIB, 2) == pytest.approx(9 / 80)  # 7 GiB on each of two


def test_without_a_driver_an_engine_gets_what_the_settings_say(monkeypatch):
    monkeypatch.setattr(gpus, "_nvml", lambda: None)
    assert gpus.engine_share(0.7, 14 * GIB) == 0.7


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Quadro P1000", None),
    ],
)
def test_a_gpus_peak_follows_from_its_name(name, peak):
    assert gpus.peak_flops(name) == peak


@pytest.mark.gpu
def test_the_counters_of_a_real_gpu():
    import torch

    block = torch.ones(2**28, device="cuda")
    ((uuid, size),) = torch_peaks().items()
    assert size >= block.numel() * 4 and uuid == str(torch.cuda.get_device_properties(0).uuid)


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
