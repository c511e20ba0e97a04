"""What a process must know before it starts an engine on a GPU, and what it gives back before it does. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.models.memory import free_device_memory

ROOT = Path(__file__).resolve().parents[3]
ASK = """
import json, os, sys
import stages.__main__
from stages.sampling.vllm import prepare_environment
prepare_environment(sys.argv[1])
names = ("PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING")
print(json.dumps([os.environ.get(name) for name in names] + ["torch" in sys.modules]))
"""


@pytest.mark.parametrize(("device", "settings"), [("cuda", ["1", "spawn", None]), ("cpu", ["1", None, "0"])])
def test_a_stage_process_may_ask_for_a_gpu_before_it_starts_an_engine(device, settings):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTORCH_"))}
    command = [sys.executable, "-c", ASK, device]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    *found, torch_is_loaded = json.loads(done.stdout.splitlines()[-1])
    assert found == settings and not torch_is_loaded, "too late: torch has read its environment"


ON_A_GPU_MACHINE = """
import os, sys
exists = os.path.exists
os.path.exists = lambda path: path == "/dev/nvidiactl" or exists(path)
import stages.__main__
print(os.environ["PYTORCH_ALLOC_CONF"], os.environ["CUDA_DEVICE_ORDER"])
from stages.sampling.vllm import prepare_environment
prepare_environment("cuda")
print(os.environ.get("PYTORCH_ALLOC_CONF"), "torch" in sys.modules)
"""


def test_segments_grow_on_gpus_but_not_in_an_engine_whose_processes_share_memory():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH_", "CUDA_"))}
    command = [sys.executable, "-c", ON_A_GPU_MACHINE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.split() == ["expandable_segments:True", "PCI_BUS_ID", "None", "False"]


def test_memory_goes_back_to_the_driver_only_where_cuda_is_in_use(monkeypatch):
    calls = []
    for in_use in (False, True):
        cuda = SimpleNamespace(is_initialized=lambda in_use=in_use: in_use, empty_cache=lambda: calls.append("emptied"))
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        free_device_memory()
    assert calls == ["emptied"]
    monkeypatch.delitem(sys.modules, "torch")
    free_device_memory()
