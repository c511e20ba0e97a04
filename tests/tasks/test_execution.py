"""What is said when work cannot be started, is lost or refused: the parts of the execution engines that need no engine.

Strategy: real processes where one can be had in a second; else the engine's handle with a double for what it asks. The engines themselves are
in tests/cluster.
"""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import tasks.launch
from data_contracts.config import parse
from data_contracts.errors import ConfigError, StageError, TransientError
from data_contracts.store import Store
from stages.sampling.stage import SamplingConfig
from tasks.execution import pool, share
from tasks.execution.base import Work
from tasks.execution.config import ExecutionConfig
from tasks.execution.local import Local
from tasks.execution.ray_tasks import RayHandle, RayTasks
from tasks.execution.remote import Request, check_cuda, main, run_request


@pytest.fixture
def work(tmp_path):
    """work(code="...", **changes): a piece of work whose interpreter runs this code, whatever stage it is asked for."""

    def make(code: str = "", **changes) -> Work:
        python = tmp_path / "python"
        python.write_text(f"#!{sys.executable}\n{code}\n")
        python.chmod(0o755)
        return Work(
            "sample-3f9c1a7b-w0", ("sample", "spec.json"), tmp_path / "stage.log", {}, python=str(python)
        )._replace(**changes)

    return make


def ended(handle) -> Exception | None:
    end = time.monotonic() + 30
    while not handle.has_ended():
        assert time.monotonic() < end
        time.sleep(0.05)
    return handle.error()


@pytest.mark.parametrize(("field", "least"), [("workers", 1), ("gpus", 0)])
def test_fewer_workers_or_gpus_than_there_can_be_are_refused(field, least):
    with pytest.raises(ConfigError, match=rf"execution.{field}.sample must be at least {least}, got {least - 1}"):
        parse(ExecutionConfig, {field: {"sample": least - 1}}, "execution")


def test_one_machine_is_not_several(work):
    with pytest.raises(
        ConfigError, match="asks for 2 nodes, and the profile local has one machine: set execution.profile"
    ):
        Local(ExecutionConfig(), Store("nowhere"), print).start(work(nodes=2))


def test_work_that_takes_too_long_is_ended_like_any_other(work):
    handle = Local(ExecutionConfig(), Store("nowhere"), print).start(work("import time; time.sleep(60)", timeout=0.5))
    assert "ran longer than runtime.timeout_seconds = 0.5" in str(ended(handle))
    assert handle.stage.process.poll() is not None


def test_work_that_fails_says_why_as_often_as_it_is_asked(work):
    handle = Local(ExecutionConfig(), Store("nowhere"), print).start(work("raise SystemExit(5)"))
    assert isinstance(ended(handle), StageError) and handle.error() is handle.error() and handle.has_ended()


def test_a_process_that_ignores_its_end_is_killed(monkeypatch):
    monkeypatch.setattr(tasks.launch, "GRACE_SECONDS", -6.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        tasks.launch.end_tree(process, "SELFPLAY_TREE=of-nobody")
    assert process.returncode == -9


class Failing:
    """An engine whose work fails; one error per piece, in turn."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def start(self, work):
        error = self.errors.pop(0)
        return SimpleNamespace(has_ended=lambda: True, error=lambda: error, cancel=lambda: None)


@pytest.mark.parametrize(
    ("workers", "errors", "raised"),
    [
        (1, [StageError("of the one")], "of the one"),
        (2, [StageError("one"), ConfigError("refused")], "refused"),
        (2, [StageError("of all"), StageError("another")], "of all"),
        (2, [StageError("one"), None, StageError("of the last look")], "of the last look"),
    ],
)
def test_of_several_errors_the_one_that_helps_is_raised(store, monkeypatch, workers, errors, raised):
    monkeypatch.setattr(share, "executor_for", lambda *_: Failing(*errors))
    directory = store.directory("generations", "k")
    directory.mkdir(parents=True)
    config = SamplingConfig.model_validate({"backend": {"name": "canned"}})
    execution = ExecutionConfig(profile="slurm", workers={"sample": workers})
    with pytest.raises((StageError, ConfigError), match=f"^{raised}$"):
        share.run_work("sample", config, directory, store, execution, 0, print, lambda progress: None)


# --- work on another machine


def test_work_without_its_lock_file_is_not_lost_yet(store, work):
    request = Request(work(), store.root)
    (request.directory / "hello-0.json").write_text("{}")  # seen before the file beside it, on a slow file system
    assert not request.is_lost(0)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("raise SystemExit(5)", "StageError", "ended with exit code 5"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "TransientError", "killed by signal 9"),
    ],
)
def test_what_became_of_work_is_written_down_for_whoever_asked(store, work, code, kind, words, capsys):
    request = Request(work(code), store.root)
    assert main([str(request.path), request.token]) == {"StageError": 5, "TransientError": 75}[kind]
    outcome = json.loads((request.directory / "outcome-0.json").read_text())
    assert outcome["error"]["type"] == kind and words in outcome["error"]["message"]
    assert words in str(request.error(0, "gone")) and words in capsys.readouterr().err


def test_an_error_that_nobody_expected_is_worth_another_try(store, work, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("none left")

    monkeypatch.setattr("tasks.execution.remote.run_stage", fail)
    request = Request(work(), store.root)
    with pytest.raises(MemoryError):
        run_request(request.path, request.token)
    found = request.error(0, "gone")
    assert isinstance(found, TransientError) and "MemoryError: none left [on " in str(found)


def test_an_interpreter_that_cannot_be_asked_for_its_torch_is_left_to_the_stage():
    check_cuda("/no/such/python")


# --- a pool, Ray


def handle_of(pool_, request, **more):
    handle = object.__new__(pool.PoolHandle)
    handle.__dict__ |= {
        "request": request,
        "pool": pool_,
        "states": {},
        "runs": ["a run"],
        "next_look": 0.0,
        "began": time.monotonic(),
    } | more
    return handle


class Client:
    def __init__(self, state=None):
        self.state = state

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read_flow_run(self, run):
        return SimpleNamespace(state=self.state)

    def set_flow_run_state(self, *_, **__):
        raise ConnectionError("no server")


def test_work_that_no_worker_takes_is_given_up(store, work, monkeypatch):
    from prefect.states import Scheduled

    monkeypatch.setattr(pool, "get_client", lambda **_: Client(Scheduled()))
    execution = ExecutionConfig(profile="process-pool", pool="gpus", start_timeout_seconds=5)
    one = SimpleNamespace(execution=execution, log=print)
    handle = handle_of(one, Request(work(), store.root))
    assert not handle.has_ended()
    handle.next_look, handle.began = 0.0, handle.began - 6
    with pytest.raises(TransientError, match=r"has waited 5 s for a worker of the pool 'gpus': start one"):
        handle.has_ended()


def test_a_server_that_is_gone_does_not_stop_the_clean_up(store, work, monkeypatch):
    monkeypatch.setattr(pool, "get_client", lambda **_: Client())
    said = []
    request = Request(work(), store.root)
    handle_of(SimpleNamespace(log=said.append), request).cancel()
    assert said == ["could not cancel sample-3f9c1a7b-w0: no server"] and not request.directory.exists()


def test_a_ray_cluster_that_is_too_small_says_so(work):
    executor = object.__new__(RayTasks)
    nodes = [{"Alive": True, "Resources": {"GPU": 2.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    executor.ray = SimpleNamespace(nodes=lambda: nodes)
    with pytest.raises(ConfigError, match="asks for 4 GPUs on a node; the largest node of the Ray cluster has 2"):
        executor.start(work(gpus=4))
    with pytest.raises(ConfigError, match="asks for 2 nodes; the Ray cluster has 1"):
        executor.start(work(nodes=2))


def test_what_ray_wraps_is_unwrapped():
    class TaskError(Exception):
        cause = StageError("of the stage")

    def get(task, timeout):
        if task is not None:
            raise task

    handle = object.__new__(RayHandle)
    handle.ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayTaskError=TaskError, RayError=RuntimeError))
    assert handle._failure(None) is None
    assert handle._failure(TaskError()) is TaskError.cause
    lost = RuntimeError("the node died")
    assert handle._failure(lost) is lost


def test_workers_on_a_machine_without_a_gpu_ask_for_none(monkeypatch):
    settings = SimpleNamespace(runtime=SimpleNamespace(device="auto"))
    for has_gpus, asked in ((False, [0, 1, 0, 1]), (True, [1, 1, 0, 1])):
        monkeypatch.setattr("tasks.execution.config.machine_has_gpus", lambda has_gpus=has_gpus: has_gpus)
        configs = ({}, {"profile": "slurm"}, {"gpus_per_node": 0}, {"gpus_per_node": 8})
        assert [ExecutionConfig.model_validate(config).gpus_of("weigh", settings) for config in configs] == asked
