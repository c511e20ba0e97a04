"""The profile slurm: what is asked of sbatch, and work that really runs through it.

Strategy: the scripts are read by `bash -n` and shellcheck (where it is installed) and by a stub of Slurm's commands
that checks the directives as sbatch does and runs the job; where slurmctld, slurmd and munge are installed and this is
root, the same goes through a real Slurm of one node.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_contracts.checkpoint import external_model
from data_contracts.errors import ConfigError, StageError, TransientError
from data_contracts.store import Store
from stages.sampling.stage import SamplingConfig
from tasks.build import build
from tasks.execution.base import Work, perform
from tasks.execution.config import ExecutionConfig
from tasks.execution.remote import Request, check_cuda, run_request
from tasks.execution.slurm import Slurm, script
from tests.conftest import pretend_slurm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A Slurm made of five scripts; its directory holds what was asked, job by job."""
    home = pretend_slurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setattr("tasks.execution.slurm.LOOK_EVERY_SECONDS", 0.2)
    return home


def asked(home: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(home.glob("job-*.json"))]


def work(tmp_path: Path, **changes) -> Work:
    return Work("train-3f9c1a7b", ("train", "spec.json"), tmp_path / "stage.log", {})._replace(**changes)


def checked_by_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "--severity=style", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("changes", [{}, {"nodes": 4, "gpus": 8, "timeout": 7200.0}])
def test_the_script_asks_for_what_the_work_needs(tmp_path, changes):
    execution = ExecutionConfig(
        profile="slurm", sbatch=("--partition=gpu", "--account=me"), setup="module load cuda/13"
    )
    path = tmp_path / "job.sh"
    path.write_text(script(work(tmp_path, **changes), execution, tmp_path / "request.json", "t0ken"))
    text = path.read_text()
    if not text.count("module load"):
        raise AssertionError(text)
    checked_by_bash(path)
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--partition=gpu", "--account=me", "--ntasks-per-node=1", "--no-requeue"} <= set(directives)
    if changes:
        assert {"--nodes=4", "--gpus-per-node=8", "--time=125"} <= set(directives)
        assert "MASTER_ADDR=$(scontrol show hostnames" in text
    else:
        assert "--nodes=1" in directives
        assert not any("gpus" in directive for directive in directives)
    assert "srun --kill-on-bad-exit=1" in text


def test_a_whole_stage_goes_through_slurm(stub, store, make_prompts, tiny_model):
    config = SamplingConfig.model_validate(
        {
            "backend": {"name": "canned"},
            "max_new_tokens": 4,
            "max_prompt_tokens": 64,
            "runtime": {"device": "cpu", "prompts_per_shard": 2},
        }
    )
    inputs = {"prompts": make_prompts(store, 4), "policy": external_model(tiny_model)}
    built = build("sample", config, inputs, store, execution=ExecutionConfig(profile="slurm"))
    assert built.record.rows == 20
    (job,) = asked(stub)
    assert (job["nodes"], job["job-name"]) == ("1", f"sample-{built.ref.key[:8]}")
    assert not list((store.root / "work").iterdir())  # nothing is left of the request


@pytest.fixture
def real_slurm(monkeypatch):
    """munged, slurmctld and slurmd of our own, one node with one pretended GPU."""
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(f"a real Slurm needs root and {', '.join(missing) or 'nothing else'} (apt-get install slurm-wlm)")
    host = os.uname().nodename
    with tempfile.TemporaryDirectory(prefix="spslurm") as directory:
        home = Path(directory)
        (home / "key").write_bytes(os.urandom(1024))
        (home / "key").chmod(0o400)
        for name in ("state", "spool"):
            (home / name).mkdir()
        ports = [_free_port(), _free_port()]
        (home / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
        settings = {
            "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root", "AuthType": "auth/munge",
            "AuthInfo": f"socket={home}/munge.sock", "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "GresTypes": "gpu",
            "StateSaveLocation": home / "state", "SlurmdSpoolDir": home / "spool", "SlurmctldPidFile": home / "ctld.pid", "SlurmdPidFile": home / "d.pid",
            "SlurmctldPort": ports[0], "SlurmdPort": ports[1], "ReturnToService": 2, "SelectType": "select/cons_tres", "CredType": "cred/munge",
            "SchedulerParameters": "sched_interval=1", "MpiDefault": "none", "SwitchType": "switch/none",
        }  # fmt: skip
        node = f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} Gres=gpu:1 State=UNKNOWN\nPartitionName=all Nodes=ALL Default=YES\n"
        (home / "slurm.conf").write_text("".join(f"{name}={value}\n" for name, value in settings.items()) + node)
        monkeypatch.setenv("SLURM_CONF", str(home / "slurm.conf"))
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        munge = [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={home}/key",
            f"--socket={home}/munge.sock",
            f"--pid-file={home}/m.pid",
        ]
        munge += [f"--log-file={home}/m.log", f"--seed-file={home}/seed"]
        started = []
        try:
            for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
                with open(home / f"{command[0]}.log", "wb") as log:
                    started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
                time.sleep(1)
            end = time.monotonic() + 90
            while (
                "idle"
                not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False).stdout
            ):
                logs = "".join(path.read_text()[-1500:] for path in home.glob("*.log"))
                assert time.monotonic() < end, logs
                time.sleep(0.5)
            yield home
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                process.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_shards_and_signature_go_through_a_real_slurm(
    real_slurm, store, make_prompts, tiny_model, flaky, shared_work, tmp_path
):
    log = flaky({"p003": "once"})
    monkey = {name: os.environ[name] for name in ("FLAKY", "FLAKY_LOG", "PYTHONPATH")}
    config = SamplingConfig.model_validate(
        {
            "backend": {"name": "flaky"},
            "max_new_tokens": 4,
            "max_prompt_tokens": 64,
            "runtime": {"device": "cpu", "prompts_per_shard": 2},
        }
    )
    policy = external_model(tiny_model)
    execution = ExecutionConfig(
        profile="slurm", workers={"sample": 2}, env=monkey, sbatch=("--time=5", "--mem=0", "--oversubscribe")
    )
    logged = []
    built = build(
        "sample",
        config,
        {"prompts": make_prompts(store, 8), "policy": policy},
        store,
        logged.append,
        execution=execution,
    )
    jobs = [line for line in logged if "is Slurm job" in line]
    assert len(jobs) in (
        3,
        4,
    )  # two workers, one signature; a worker in the dead one's place, if anything was left by then
    assert any("killed by signal 9" in line for line in logged)
    assert len(log.read_text().splitlines()) == 5  # four shards, one of them twice
    alone = Store(tmp_path / "alone")
    record = shared_work.sign("sample", config, {"prompts": make_prompts(alone, 8), "policy": policy}, alone)
    assert (record.key, record.content) == (built.ref.key, built.ref.content)


@pytest.mark.slow
def test_a_real_slurm_gives_gpus_and_refuses_more_than_it_has(real_slurm, store, tmp_path):
    with pytest.raises(ConfigError, match="Slurm takes no job .*Requested node configuration is not available"):
        perform(Slurm(ExecutionConfig(profile="slurm"), store, print), [work(tmp_path, gpus=4)], lambda: None)


def test_a_refused_job_says_what_slurm_said(stub, store, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"Slurm takes no job for train-3f9c1a7b: .*Requested node configuration is not available.*execution.gpus against",
    ):
        perform(Slurm(ExecutionConfig(profile="slurm"), store, print), [work(tmp_path, gpus=16)], lambda: None)


def test_a_job_that_waits_too_long_is_given_up_and_cancelled(stub, store, tmp_path):
    (stub / "busy").touch()
    execution = ExecutionConfig(profile="slurm", start_timeout_seconds=0.5)
    with pytest.raises(TransientError, match="Slurm job 1 .* has waited 0 s for its place"):
        perform(Slurm(execution, store, print), [work(tmp_path)], lambda: None)
    assert (stub / "state-1").read_text() == "CANCELLED"


def test_a_machine_without_slurm_is_told_so(store, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match="there is no sbatch on this machine; start the run on a login or submit node"
    ):
        perform(Slurm(ExecutionConfig(profile="slurm"), store, print), [work(tmp_path)], lambda: None)


def test_a_store_that_the_node_does_not_see_is_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"does not see .*request.json, which the run has just written: the store is not shared.*SELFPLAY_STORE",
    ):
        run_request(tmp_path / "request.json", "t0ken", grace=0.1)
    (tmp_path / "request.json").write_text('{"token": "of another store"}')
    with pytest.raises(ConfigError, match="not shared"):
        run_request(tmp_path / "request.json", "t0ken", grace=0.1)


def test_a_clock_that_is_wrong_is_refused(store, tmp_path):
    request = Request(work(tmp_path), store.root)
    for shift, word in ((-120, "behind"), (120, "ahead of")):
        request.greeted.clear()
        (request.directory / "hello-0.json").write_text(json.dumps({"host": "n7", "time": time.time() + shift}))
        with pytest.raises(ConfigError, match=rf"the clock of n7 is 1[12]\d s {word} that of .*run a time service"):
            request.check_clock(0)
    (request.directory / "hello-0.json").write_text(json.dumps({"host": "n7", "time": time.time()}))
    request.check_clock(0)


def test_work_whose_process_is_gone_is_lost(store, tmp_path):
    request = Request(work(tmp_path), store.root)
    assert not request.is_lost(0)  # not begun
    (request.directory / "alive-0").touch()
    (request.directory / "hello-0.json").write_text(json.dumps({"host": "n7", "time": time.time()}))
    assert request.is_lost(0)
    assert isinstance(request.error(0, "Slurm job 1 is NODE_FAIL"), TransientError)
    (request.directory / "outcome-0.json").write_text(
        json.dumps({"error": {"type": "StageError", "message": "it broke"}})
    )
    assert not request.is_lost(0)
    assert isinstance(request.error(0, ""), StageError)


def test_requests_of_killed_runs_are_swept_when_nobody_can_still_be_at_them(store, tmp_path, monkeypatch):
    mine = Request(work(tmp_path), store.root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 4194300)  # above the kernel's highest
        dead, recent = (Request(work(tmp_path), store.root) for _ in range(2))
        patch.setattr(os, "uname", lambda: SimpleNamespace(nodename="elsewhere"))
        far = Request(work(tmp_path), store.root)
    for request in (mine, dead, far):
        os.utime(request.directory, (0, time.time() - 7200))
    assert store.sweep() == 1
    assert not dead.directory.exists() and all(request.path.is_file() for request in (mine, recent, far))


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (
            "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n",
            "is built without CUDA, and the work has GPUs: install the gpu lock",
        ),
        (
            "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n",
            r"is built for CUDA 13.0, the driver of \S+ knows CUDA 12.4 at most",
        ),
        ("__version__ = '2.13.0+cu126'\ncuda: Optional[str] = '12.6'\n", None),
    ],
)
def test_a_torch_that_cannot_use_the_driver_is_refused(tmp_path, monkeypatch, version, problem):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(version)
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        "#!/bin/sh\necho '| NVIDIA-SMI 550.54.14   Driver Version: 550.54.14   CUDA Version: 12.4     |'\n"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if problem is None:
        check_cuda(sys.executable)
        return
    with pytest.raises(ConfigError, match=problem):
        check_cuda(sys.executable)
