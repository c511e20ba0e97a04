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


def test_memory_goes_back_to_the_driver_only_where_cuda_is_in_use(monkeypatch):
    calls = []
    for in_use in (False, True):
        cuda = SimpleNamespace(is_initialized=lambda in_use=in_use: in_use, empty_cache=lambda: calls.append("emptied"))
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        free_device_memory()
    assert calls == ["emptied"]
    monkeypatch.delitem(sys.modules, "torch")
    free_device_memory()
