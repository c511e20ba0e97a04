"""Ranks are processes of this node: each knows its number, sees the GPUs it was given, and outlives no failed rank.

Strategy: plain Python commands in place of ranks; they write their environment down, or fail.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from data_contracts.errors import ConfigError
from stages.running.rendezvous import Meeting, announce
from stages.running.supervise import processes_with
from stages.training import launch
from stages.training.config import TrainingRuntime
from stages.training.launch import exit_code_of, rank_environments, run_processes, start_ranks

ROOT = Path(__file__).resolve().parents[3]
MEETING = Meeting("10.0.0.1", 29500)
GPUS = ["4,5", "GPU-8f6a1b0c-0000-1111-2222-333344445555,GPU-7e5d0a9b-0000-1111-2222-333344445555"]


def test_ranks_are_numbered_over_all_nodes():
    ranks = rank_environments(2, 3, 1, MEETING)
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("2", "0"), ("3", "1")]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"6"} and {rank["LOCAL_WORLD_SIZE"] for rank in ranks} == {"2"}
    assert {(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks} == {("10.0.0.1", "29500")}


@pytest.mark.parametrize("gpus", GPUS)
def test_ranks_see_the_gpus_that_the_stage_was_given(tmp_path, monkeypatch, gpus):
    # DeepSpeed's launcher would make 0,1 of them: the GPUs of another run.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    program = (
        "import json, os, sys; names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS');"
        "open(sys.argv[-1] + '/' + os.environ['RANK'], 'w').write(json.dumps({name: os.environ[name] for name in names}))"
    )
    monkeypatch.setattr(launch, "pick_device", lambda setting: "cuda")
    monkeypatch.setattr(launch, "run_processes", _instead_of_ranks(program, tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert start_ranks(tmp_path, TrainingRuntime(num_processes=2), MEETING, 0) == 0
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in seen] == [gpus, gpus]
    assert [rank["LOCAL_RANK"] for rank in seen] == ["0", "1"]


def _instead_of_ranks(program, directory):
    return lambda command, environments: run_processes([sys.executable, "-c", program, str(directory)], environments)


def test_more_ranks_than_visible_gpus_are_refused_before_any_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(launch, "pick_device", lambda setting: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"num_processes is 2, and this process sees 1 GPUs .*is 3\): lower it"):
        start_ranks(tmp_path, TrainingRuntime(num_processes=2), MEETING, 0)


def test_a_rank_that_fails_ends_the_others_and_its_code_is_the_launchers(tmp_path):
    program = "import os, sys, time; time.sleep(600) if os.environ['RANK'] == '0' else sys.exit(3)"
    marker = f"TEST_LAUNCH={tmp_path}"
    environments = [dict(os.environ) | {"RANK": str(rank), "TEST_LAUNCH": str(tmp_path)} for rank in range(2)]
    began = time.monotonic()
    assert run_processes([sys.executable, "-c", program], environments) == 3
    assert time.monotonic() - began < 30 and not processes_with(marker)


def test_a_rank_that_ignores_the_end_is_killed(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(600 if os.environ['RANK'] == '0' else 1.5)\n"
        "os.kill(os.getpid(), 9)"
    )
    environments = [dict(os.environ) | {"RANK": str(rank)} for rank in range(2)]
    assert run_processes([sys.executable, "-c", program], environments) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("codes", "code"), [([], 0), ([3], 3), ([75, 3], 3), ([75, 75], 75), ([-9, 75], -9), ([75, -9], -9)]
)
def test_the_rank_at_fault_speaks_for_those_that_only_lost_it(codes, code):
    assert exit_code_of(codes) == code


LISTENING = """
import json, os, sys
from types import SimpleNamespace as Namespace
from stages.training.engine import _join
accelerator = Namespace(get_accelerator=lambda: Namespace(communication_backend_name=lambda: "gloo"))
_join(Namespace(accelerator=accelerator, init_distributed=lambda **_: None), 60)
import torch
total = torch.ones(1)
torch.distributed.all_reduce(total)
inodes = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
addresses = []
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/self/net/{table}").readlines()[1:]:
        columns = line.split()
        if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
            addresses.append(columns[1].partition(":")[0])
open(sys.argv[1] + os.environ["RANK"], "w").write(json.dumps([total.item(), addresses]))
torch.distributed.barrier()
os._exit(0)
"""


def test_ranks_of_one_node_listen_on_loopback_only(tmp_path):
    """By the kernel's table of listening sockets, after the ranks have met and added up."""
    with announce(tmp_path, 1) as meeting:
        ranks = rank_environments(2, 1, 0, meeting)
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert run_processes([sys.executable, "-c", LISTENING, f"{tmp_path}/"], [settings | rank for rank in ranks]) == 0
    for rank in "01":
        total, addresses = json.loads((tmp_path / rank).read_text())
        assert total == 2 and set(addresses) == {"0100007F"}, addresses  # 127.0.0.1
