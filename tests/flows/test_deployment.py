"""The way through a server: a real Prefect server, pool, deployment and worker, as deploy/README.md says, with a tiny model.

Strategy: one server and one worker for all tests, under the supervisor so that they end with this process; the commands are those of the
README, and what happened is asked of the server's API. Work on other machines is in tests/cluster; here a whole run changes its profile.
"""

import collections
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_contracts.errors import ConfigError
from data_contracts.store import Store
from flows.config import load_run
from flows.forecast.rehearsal import rehearse
from stages.running.history import events
from tasks.execution.config import ExecutionConfig
from tasks.execution.engines import ENGINES
from tests.conftest import pretend_slurm
from tests.faults.deployed import cluster as started
from tests.faults.deployed import wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tools):
    with started(tmp_path_factory.mktemp("cluster"), tools.environment()) as one:
        one.worker()
        yield one


def watch(cluster, *parameters, timeout=300):
    words = [word for parameter in parameters for word in ("-p", parameter)]
    return cluster.run("--watch", "--watch-interval", "1", *words, timeout=timeout)


def task_states(cluster, run):
    """name -> state name of every task run; the server learns of them from events, a little late."""
    rows = cluster.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}, "limit": 200})
    return {row["name"]: row["state_name"] for row in rows}


@pytest.fixture(scope="module")
def first(cluster, make_run):
    """The first run of the deployment, watched to its end. Its parameters name a plug-in with an option of its own."""
    config = make_run("deployed", iterations=1)
    parameters = (f"config={config}", 'method={"name": "dpo", "beta": 0.2}')
    return SimpleNamespace(
        config=config, parameters=parameters, done=watch(cluster, *parameters), run=cluster.last_run()
    )


def test_a_deployment_runs_to_its_end_through_a_worker(cluster, first):
    assert first.done.returncode == 0, first.done.stdout + cluster.log.read_text()[-3000:]
    assert (first.run["state_type"], first.run["name"]) == ("COMPLETED", "deployed")
    assert (cluster.store / "runs" / "deployed" / "report.md").is_file()
    states = wait_for(lambda: len(found := task_states(cluster, first.run)) == 10 and found, 30)
    assert set(states.values()) == {"Completed"}
    assert {"sample-iter_01", "score-iter_01", "weigh-iter_01", "train-iter_01", "evaluate-iter_01"} <= states.keys()


def test_the_table_and_the_summaries_are_artifacts_of_the_run(cluster, first):
    found = cluster.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [first.run["id"]]}}, "limit": 200})
    by_key = {}
    for artifact in found:
        by_key.setdefault(artifact["key"], []).append(artifact)
    newest = max(by_key["deployed-history"], key=lambda artifact: artifact["created"])
    assert [row["iteration"] for row in json.loads(newest["data"])] == [0, 1]
    assert {"deployed-iter-00", "deployed-iter-01"} <= by_key.keys()
    assert any(artifact["type"] == "progress" for artifact in found)
    [report] = by_key["deployed-report"]
    assert report["type"] == "markdown" and "## Settings" in report["data"]
    [figures] = by_key["deployed-figures"]
    assert "![score](data:image/svg+xml;base64," in figures["data"]


def test_mlflow_has_a_parent_run_and_a_child_for_each_iteration(cluster, first):
    database = sqlite3.connect(cluster.store / "mlflow.db")
    names = {row[0] for row in database.execute("select name from runs")}
    parents = database.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
    assert {"deployed", "iter_00", "iter_01"} <= names and parents == 2


def test_run_again_every_stage_shows_as_cached(cluster, first):
    again = watch(cluster, *first.parameters)
    assert again.returncode == 0, again.stdout
    states = wait_for(lambda: len(found := task_states(cluster, cluster.last_run())) == 10 and found, 30)
    stages = {name: state for name, state in states.items() if "prompts" not in name}
    assert len(stages) == 8 and set(stages.values()) == {"Cached"}
    database = sqlite3.connect(cluster.store / "mlflow.db")
    assert database.execute("select count(*) from runs").fetchone() == (3,)  # the same as before


@pytest.mark.parametrize(
    "parameter", ["seed=many", 'sampling={"temprature": 1}', 'method={"name": "dop"}', "nonsense=1"]
)
def test_a_wrong_parameter_is_refused_before_a_run_exists(cluster, first, parameter):
    before = cluster.ask("/flow_runs/count", {})
    refused = cluster.run("-p", f"config={first.config}", "-p", parameter)
    assert refused.returncode == 1, refused.stdout
    assert cluster.ask("/flow_runs/count", {}) == before


def test_a_plug_ins_own_options_pass_the_servers_check(cluster, first):
    trained = [record.config["method"] for record in Store(cluster.store).records("checkpoint")]
    assert ("dpo", 0.2) in {(method["name"], method.get("beta")) for method in trained}


def test_a_cancelled_run_leaves_no_process(cluster, make_run, tools):
    config = make_run(
        "cancelled",
        iterations=1,
        sampling={"num_candidates": 64, "max_new_tokens": 64, "runtime": {"prompts_per_shard": 1}},
    )
    assert cluster.run("-p", f"config={config}").returncode == 0
    run = cluster.last_run()
    marker = f"PREFECT__FLOW_RUN_ID={run['id']}"

    def sampling():
        return any("stages" in " ".join(process.cmdline()) for process in tools.processes_of(marker))

    wait_for(sampling, 90, cluster.log)
    assert cluster.prefect("flow-run", "cancel", run["id"]).returncode == 0
    wait_for(lambda: not tools.processes_of(marker), 30, cluster.log)
    wait_for(lambda: cluster.state(run) == "CANCELLED", 30, cluster.log)


# --- work that other workers do


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (
            {"pool": "nowhere"},
            "there is no work pool 'nowhere': make it with `prefect work-pool create nowhere --type process`",
        ),
        (
            {"profile": "kubernetes"},
            "the work pool 'selfplay-work' is of type process, and the profile kubernetes wants kubernetes",
        ),
        (
            {"pool": "selfplay"},
            "there is no deployment stage-work/selfplay: `prefect --no-prompt deploy --prefect-file deploy/prefect/work.yaml --all`",
        ),
    ],
    ids=["no pool", "another type", "no deployment"],
)
def test_a_pool_that_cannot_take_the_work_is_refused(cluster, tmp_path, execution, message):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.execution.pool import Pool

    with (
        temporary_settings({PREFECT_API_URL: cluster.environment["PREFECT_API_URL"]}),
        pytest.raises(ConfigError) as refused,
    ):
        Pool(ExecutionConfig.model_validate({"profile": "process-pool"} | execution), Store(tmp_path), print)
    assert message in str(refused.value)


def test_a_run_whose_pool_is_missing_is_refused_before_anything_is_written(cluster, make_run, tools, tmp_path):
    settings = ("execution.profile=process-pool", "execution.pool=nowhere")
    refused = tools.play(
        make_run("elsewhere"), tmp_path / "store", *settings, PREFECT_API_URL=cluster.environment["PREFECT_API_URL"]
    )
    assert refused.code == 2, refused.out
    assert "ConfigError: there is no work pool 'nowhere'" in refused.out
    assert not (tmp_path / "store").exists()


@pytest.fixture
def slurm(tmp_path):
    """Slurm's commands, pretended: the directory to put on PATH."""
    return pretend_slurm(tmp_path / "slurm")


def cut_off(tools, command, log, moment, **more):
    """Start a run; at the moment, SIGKILL every process that came from it, on whatever "machine"."""
    mark = f"LEG={log.stem}-{os.getpid()}"
    environment = tools.environment(**more) | dict([mark.split("=")])
    with open(log, "wb") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "flows", "run", *command],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while not moment():
            assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
    finally:
        while left := tools.processes_of(mark):
            for process in left:
                process.kill()
        run.wait()


def unfinished(store: Store, kind: str):
    """The directory of the artifact of a kind that is being built, or None."""
    return next(
        (path for path in (store.root / "artifacts" / kind).glob("*") if not (path / "record.json").is_file()), None
    )


def counts(directory: Path | None, name: str) -> collections.Counter:
    """How often each shard was made, or each step done."""
    return collections.Counter(
        event["index"] for event in (events(directory) if directory else ()) if event["event"] == name
    )


def contents(store: Store) -> dict:
    return {(record.kind, record.key): record.content for record in store.records()}


def test_what_a_run_here_left_half_done_slurm_finishes(cluster, undisturbed, slurm, tools, tmp_path):
    """The undisturbed run's store, set back to the middle of the last sampling: one shard of three is gone, and what follows."""
    wanted = Store(undisturbed.store)
    store = Store(shutil.copytree(wanted.root, tmp_path / "store", symlinks=True))
    last = {
        name: (store.root / "runs" / "tiny" / "iter_02" / name).resolve()
        for name in ("heldout_generations", "evaluate")
    }
    store.discard("eval_report", last["evaluate"].name)
    sampling = last["heldout_generations"]
    for name in ("record.json", "part-00001.parquet"):
        (sampling / name).unlink()
    done = tools.play(
        undisturbed.config,
        store.root,
        "execution.profile=slurm",
        "execution.gpus_per_node=0",
        PATH=f"{slurm}:{os.environ['PATH']}",
        **{name: cluster.environment[name] for name in ("PREFECT_API_URL", "PREFECT_HOME")},
    )
    assert done.code == 0, done.out
    jobs = [json.loads(job.read_text())["job-name"] for job in sorted(slurm.glob("job-*.json"))]
    assert jobs == [f"sample-{sampling.name[:8]}", f"evaluate-{last['evaluate'].name[:8]}"]
    assert counts(sampling, "shard") == {0: 1, 1: 2, 2: 1}
    assert contents(store) == contents(wanted)
    assert tools.table_of(store.root, "tiny") == tools.table_of(wanted.root, "tiny")


@pytest.mark.parametrize("profile", ENGINES)
def test_keys_are_the_same_under_every_profile(undisturbed, profile):
    """A run that is complete on this machine is complete on any other, on two nodes, with as many workers and GPUs as one likes."""
    elsewhere = {
        "profile": profile,
        "nodes": 2,
        "gpus_per_node": 4,
        "workers": {"sample": 8, "weigh": 3},
        "gpus": {"sample": 2},
        "env": {"A": "1"},
    }
    config = load_run(str(undisturbed.config), {"execution": elsewhere})
    assert config.execution.profile == profile
    steps = rehearse(config, Store(undisturbed.store)).steps
    assert len(steps) > 10 and all(step.record for step in steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_begun_under_one_profile_is_finished_under_others(cluster, undisturbed, slurm, tools, tmp_path):
    """local, until some shards of a sampling are whole; Slurm, until some steps of the training are saved; then the workers of a pool."""
    store, wanted = Store(tmp_path / "store"), Store(undisturbed.store)
    command = [str(undisturbed.config), "--store", str(store.root), "--set", "iterations=1"]

    def sampled() -> int:
        """Whole shards of the candidates; those of the held-out answers do not count."""
        return (
            len(counts(unfinished(store, "generations"), "shard"))
            if len(list(store.records("eval_report"))) == 1
            else 0
        )

    cut_off(tools, command, tmp_path / "local.log", sampled)
    sampling = unfinished(store, "generations")
    here = counts(sampling, "shard")
    assert 1 <= len(here) < 4

    under_slurm = ["execution.profile=slurm", "execution.gpus_per_node=0", "execution.workers={weigh: 2}"]
    command += [word for setting in under_slurm for word in ("--set", setting)]
    path = f"{slurm}:{os.environ['PATH']}"
    cut_off(
        tools,
        command,
        tmp_path / "slurm.log",
        lambda: len(counts(unfinished(store, "checkpoint"), "step")) >= 2,
        PATH=path,
    )
    jobs = [json.loads(job.read_text())["job-name"].split("-")[0] for job in sorted(slurm.glob("job-*.json"))]
    assert jobs == ["sample", "score", "weigh", "weigh", "weigh", "train"]
    assert counts(sampling, "shard") == collections.Counter(range(4))
    training = unfinished(store, "checkpoint")
    assert (training / "resume" / "latest").is_file()

    cluster.start("worker", "start", "--pool", "selfplay-work", "--limit", "2")
    execution = {"execution.profile": "process-pool", "execution.gpus_per_node": 0, "execution.workers": {"sample": 2}}
    given = (
        f"config={undisturbed.config}",
        f"store={store.root}",
        "iterations=1",
        f"overrides={json.dumps(execution)}",
    )
    done = watch(cluster, *given, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + cluster.log.read_text()[-3000:]
    shown = [run["name"] for run in cluster.ask("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 200})]
    assert f"train-{training.name[:8]}" in shown and sum(name.startswith("sample-") for name in shown) >= 3

    links = [
        path.resolve() for step in ("iter_00", "iter_01") for path in (wanted.root / "runs" / "tiny" / step).iterdir()
    ]
    assert contents(store) == {
        name: content for name, content in contents(wanted).items() if wanted.directory(*name) in links
    }
    assert tools.table_of(store.root, "tiny") == tools.table_of(wanted.root, "tiny")[:2]
    for record in store.records():
        directory = store.directory(record.kind, record.key)
        assert not store.problems(record, deep=True)
        assert set(counts(directory, "shard").values()) <= {1}, (
            f"{record.kind} {record.key}: a whole shard was made again"
        )
        again = sum(count - 1 for count in counts(directory, "step").values())
        assert again <= (1 if directory == training else 0)  # it saves every step
    assert sum(counts(training, "step").values()) >= store.load("checkpoint", training.name).metrics["steps"]
